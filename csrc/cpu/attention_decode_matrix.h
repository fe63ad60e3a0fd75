// Decoding by the matrix unit, with keys and values read from where they lie: no other layout of them would be read
// more than once.
//
// Keys are the left factor of the scores, and the rows that share a KV head its columns: sixteen cost what one does.
//
// Values are the right factor of the outputs. The unit multiplies pairs along the sum, and what lies side by side in a
// value is a pair of columns: with probabilities (p, 0) it gives the even columns, with (0, p) the odd ones. A product
// takes as long for one row as for sixteen: up to eight rows have both kinds in one.
#pragma once
#include "cpu/attention_pack.h"

#if MK_AMX

namespace mk::MK_ISA {
namespace {

constexpr int64_t matrix_keys = 4 * matrix_rows;  // of a head, worked on at a time

// The query rows as right factors, [heads][rows / 16][words / 16], a block of one register each.
template <class D>
void tile_queries(const D& t) {
  uint32_t* to = t.q_blocks;
  for (int64_t head = 0; head < t.item.heads; head++)
    for (int64_t row = 0; row < t.rows; row += matrix_rows)
      for (int64_t w = 0; w < t.words; w += matrix_words, to += matrix_block) {
        vu block[matrix_rows];
#pragma GCC unroll 16
        for (int i = 0; i < matrix_rows; i++)
          block[i] = row + i < t.rows ? load_words<vu>(t.q + (head * t.all_rows + row + i) * t.words + w) : vu{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < matrix_rows; i++) store_words(to + i * matrix_rows, block[i]);
      }
}

// Sixteen rows of keys or values, and the same columns of those `ahead` elements farther come into L1. The unit's own
// loads hardly run ahead of its products, and while it multiplies no memory would be read. (Fetching whole blocks of 64
// keys ahead, or in the order of memory, gained nothing.)
#define MK_LOAD_ROWS(to, p, row, ahead) \
  fetch_rows((p) + (ahead), row);       \
  _tile_loadd(to, p, (row) * 2);

#define MK_ADD_KEYS(sum, ahead)                             \
  for (int64_t s = 0; s < steps; s++) {                     \
    _tile_loadd(6, q + s * matrix_block, 64);               \
    MK_LOAD_ROWS(4, k + s * 2 * matrix_words, k_row, ahead) \
    _tile_dpbf16ps(sum, 4, 6);                              \
  }                                                         \
  k += matrix_rows * k_row;

// sums [16 MT][16] = keys . queries: sums that do not wait for one another. Each key is read whole before the next
// ones: the first-level cache does not hold the lines of 64 keys that lie far apart, and their neighbours come along
// with them. After the last of these keys the next ones lie `ahead` elements farther.
template <int MT>
MK_INLINE void multiply_keys(const bf16* k, int64_t k_row, int64_t ahead, const uint32_t* q, int64_t steps,
                             float* sums) {
  const int64_t next = matrix_rows * k_row;
  asm volatile("" ::: "memory");  // as in multiply_matrices
  _tile_zero(0);
  if constexpr (MT > 1) _tile_zero(1);
  if constexpr (MT > 2) _tile_zero(2);
  if constexpr (MT > 3) _tile_zero(3);
  MK_ADD_KEYS(0, MT == 1 ? ahead : next)
  if constexpr (MT > 1) {
    MK_ADD_KEYS(1, MT == 2 ? ahead : next)
  }
  if constexpr (MT > 2) {
    MK_ADD_KEYS(2, MT == 3 ? ahead : next)
  }
  if constexpr (MT > 3) {
    MK_ADD_KEYS(3, MT == 4 ? ahead : next)
  }
  _tile_stored(0, sums, 64);
  if constexpr (MT > 1) _tile_stored(1, sums + matrix_block, 64);
  if constexpr (MT > 2) _tile_stored(2, sums + 2 * matrix_block, 64);
  if constexpr (MT > 3) _tile_stored(3, sums + 3 * matrix_block, 64);
  asm volatile("" ::: "memory");
}

#undef MK_ADD_KEYS

// Sums of sixteen keys as vectors of one row each, four rows at a time.
template <class D>
MK_INLINE void store_scores(const D& t, const float* sums, int64_t first, int64_t rows, int64_t place) {
  for (int64_t row = 0; row < rows; row += 4) {
    vf block[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const float* from = sums + i * matrix_rows + row;
      const auto key = [from](int j) { return _mm_load_ps(from + j * 4 * matrix_rows); };
      const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(key(0)), key(1), 1);
      const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(key(2)), key(3), 1);
      block[i] = (vf)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    transpose(block);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) store_words(t.scores + (first + row + i) * t.score_stride + place, block[i]);
  }
}

// Scores of 16 MT keys with all rows of a head; those of the first `keys` are stored, by sixteens. For `ahead` see
// multiply_keys.
template <int MT, class D>
MK_INLINE void matrix_scores(const D& t, const bf16* k, int64_t k_row, int64_t ahead, int64_t keys, int64_t head,
                             int64_t place) {
  alignas(64) float sums[MT * matrix_block];
  const int64_t blocks = (t.rows + matrix_rows - 1) / matrix_rows;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t row = b * matrix_rows;
    const uint32_t* q = t.q_blocks + (head * blocks + b) * t.words * matrix_rows;
    multiply_keys<MT>(k, k_row, ahead, q, t.words / matrix_words, sums);
    for (int64_t i = 0; i < keys; i += matrix_rows)
      store_scores(t, sums + i * matrix_rows, head * t.all_rows + row, least(matrix_rows, t.rows - row), place + i);
  }
}

// Up to so many rows that share a KV head have their even columns and their odd ones in one register of results.
constexpr int64_t paired_rows = matrix_rows / 2;

// Probabilities as left factors: of each row those for the even columns, then those for the odd ones.
struct LeftPairs {
  alignas(64) uint32_t words[matrix_rows][2][matrix_keys];
};

// Behind the last of `keys` follow zeros up to a whole register.
template <class D>
MK_INLINE void spread_probabilities(const D& t, int64_t first, int64_t rows, int64_t place, int64_t keys,
                                    LeftPairs& p) {
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t* from = (const uint16_t*)(t.scores + (first + r) * t.score_stride) + place;
    for (int64_t k = 0; k < keys; k += lanes) {
      vh some = {};
      if (k + lanes <= keys)
        some = load_words<vh>(from + k);
      else
        __builtin_memcpy(&some, from + k, (keys - k) * sizeof(uint16_t));
      const vu words = widen(some);
      store_words(&p.words[r][0][k], words);
      store_words(&p.words[r][1][k], words << 16);
    }
  }
}

// acc += P V for 32 NT columns. Of a row of acc the first half are the even columns, the second the odd ones: as much
// farther on as in p one kind follows the other, so that a register can hold both of eight rows.
template <int NT>
MK_INLINE void multiply_paired(const LeftPairs& p, const bf16* v, int64_t v_row, int64_t ahead, int64_t keys,
                               float* acc, int64_t acc_half) {
  asm volatile("" ::: "memory");
  _tile_loadd(0, acc, acc_half * 4);
  if constexpr (NT > 1) _tile_loadd(1, acc + 16, acc_half * 4);
  if constexpr (NT > 2) _tile_loadd(2, acc + 32, acc_half * 4);
  if constexpr (NT > 3) _tile_loadd(3, acc + 48, acc_half * 4);
  for (int64_t k = 0; k < keys; k += matrix_rows, v += matrix_rows * v_row) {
    const int64_t next = k + matrix_rows < keys ? matrix_rows * v_row : ahead;
    _tile_loadd(4, &p.words[0][0][k], sizeof p.words[0][0]);
    MK_LOAD_ROWS(6, v, v_row, next)
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NT > 1) {
      MK_LOAD_ROWS(7, v + 32, v_row, next)
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (NT > 2) {
      MK_LOAD_ROWS(6, v + 64, v_row, next)
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (NT > 3) {
      MK_LOAD_ROWS(7, v + 96, v_row, next)
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, acc, acc_half * 4);
  if constexpr (NT > 1) _tile_stored(1, acc + 16, acc_half * 4);
  if constexpr (NT > 2) _tile_stored(2, acc + 32, acc_half * 4);
  if constexpr (NT > 3) _tile_stored(3, acc + 48, acc_half * 4);
  asm volatile("" ::: "memory");
}

// The same where each kind has registers of its own.
template <int NT>
MK_INLINE void multiply_values(const LeftPairs& p, const bf16* v, int64_t v_row, int64_t ahead, int64_t keys,
                               float* acc, int64_t acc_half) {
  constexpr int64_t p_row = sizeof p.words[0];
  float* odd = acc + acc_half;
  const int64_t acc_row = 2 * acc_half * 4;
  asm volatile("" ::: "memory");
  _tile_loadd(0, acc, acc_row);
  _tile_loadd(1, odd, acc_row);
  if constexpr (NT == 2) _tile_loadd(2, acc + 16, acc_row);
  if constexpr (NT == 2) _tile_loadd(3, odd + 16, acc_row);
  for (int64_t k = 0; k < keys; k += matrix_rows, v += matrix_rows * v_row) {
    const int64_t next = k + matrix_rows < keys ? matrix_rows * v_row : ahead;
    _tile_loadd(4, &p.words[0][0][k], p_row);
    _tile_loadd(5, &p.words[0][1][k], p_row);
    MK_LOAD_ROWS(6, v, v_row, next)
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (NT == 2) {
      MK_LOAD_ROWS(7, v + 32, v_row, next)
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, acc, acc_row);
  _tile_stored(1, odd, acc_row);
  if constexpr (NT == 2) _tile_stored(2, acc + 16, acc_row);
  if constexpr (NT == 2) _tile_stored(3, odd + 16, acc_row);
  asm volatile("" ::: "memory");
}

#undef MK_LOAD_ROWS

// The same for all rows of a head and all columns, which are a multiple of 32.
template <class D>
MK_INLINE void matrix_values(const D& t, const bf16* v, int64_t v_row, int64_t ahead, int64_t keys, int64_t head,
                             int64_t place) {
  LeftPairs p;
  for (int64_t row = 0; row < t.rows; row += matrix_rows) {
    const int64_t first = head * t.all_rows + row, half = t.n / 2;
    spread_probabilities(t, first, least(matrix_rows, t.rows - row), place, keys, p);
    float* acc = t.acc + first * t.n;
    int64_t d = 0;
    if (t.rows > paired_rows) {
      for (; d + 64 <= t.n; d += 64) multiply_values<2>(p, v + d, v_row, ahead, keys, acc + d / 2, half);
      if (d < t.n) multiply_values<1>(p, v + d, v_row, ahead, keys, acc + d / 2, half);
      continue;
    }
    for (; d + 128 <= t.n; d += 128) multiply_paired<4>(p, v + d, v_row, ahead, keys, acc + d / 2, half);
    if (d + 96 <= t.n)
      multiply_paired<3>(p, v + d, v_row, ahead, keys, acc + d / 2, half);
    else if (d + 64 <= t.n)
      multiply_paired<2>(p, v + d, v_row, ahead, keys, acc + d / 2, half);
    else if (d < t.n)
      multiply_paired<1>(p, v + d, v_row, ahead, keys, acc + d / 2, half);
  }
}

// Rows of the registers that hold results.
template <class D>
MK_INLINE int64_t result_rows(const D& t) {
  return t.rows > paired_rows ? least(t.rows, matrix_rows) : 2 * t.rows;
}

// Puts the columns of all rows back into their order.
template <class D>
void join_columns(const D& t) {
  const int64_t half = t.n / 2;
  float* even_columns = (float*)t.copy;
  for (int64_t head = 0; head < t.item.heads; head++)
    for (int64_t row = 0; row < t.rows; row++) {
      float* at = t.acc + (head * t.all_rows + row) * t.n;
      __builtin_memcpy(even_columns, at, half * sizeof(float));
      // What is written has been read: the odd columns of the last two vectors are the last ones.
      for (int64_t d = 0; d < half; d += lanes) {
        const vf even = load_words<vf>(even_columns + d), odd = load_words<vf>(at + half + d);
        const vf low = (vf)_mm512_unpacklo_ps((__m512)even, (__m512)odd);
        const vf high = (vf)_mm512_unpackhi_ps((__m512)even, (__m512)odd);
        // Of low and high the blocks of four lanes in turn.
        store_words(at + 2 * d,
                    __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
        store_words(at + 2 * d + lanes,
                    __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
      }
    }
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

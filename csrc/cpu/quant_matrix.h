// Rows of x by 16 rows of int8 or int4 codes on the matrix unit. The codes are the left factor, int8 as they lie in
// memory and int4 taken apart; x's digits are the columns of the right one. A product takes as long for one column as
// for 16.
#pragma once
#include "cpu/matrix.h"
#include "cpu/quant_digits.h"

#if MK_AMX

namespace mk::MK_ISA {
namespace {

// What a piece leaves for the next steps: its codes taken apart, and its sums. Both are used one piece later than they
// are stored, when they are in the cache.
struct MatrixScratch {
  alignas(64) uint8_t copy[outputs * byte_piece];
  alignas(64) uint8_t codes[2][2][outputs][64];
  alignas(64) int32_t sums[2][2][outputs * matrix_rows];
};

MK_INLINE void take_apart(CodeRows codes, uint8_t (*to)[outputs][64]) {
  const vu half = set1(0x0f0f0f0fu);
#pragma GCC unroll 16
  for (int r = 0; r < outputs; r++) {
    const vu w = load_words<vu>(codes.first + r * codes.row);
    store_words(to[0][r], w & half);
    store_words(to[1][r], w >> 4 & half);
  }
}

// Sums of a piece's products with the digits of one or two blocks of x, `columns` wide and `block` bytes apart.
template <int blocks>
MK_INLINE void multiply_piece(CodeRows low, const uint8_t* high, const char* x, int64_t columns, int64_t block,
                              int32_t (*sums)[outputs * matrix_rows]) {
  const int64_t row = 4 * columns;
  const char *first = x, *second = x + matrix_words * row;
  asm volatile("" ::: "memory");  // as in multiply_matrices
  _tile_zero(0);
  _tile_loadd(4, low.first, low.row);
  _tile_loadd(6, first, row);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(5, high, low.row);
  _tile_loadd(7, second, row);
  _tile_dpbssd(0, 5, 7);
  if constexpr (blocks == 2) {
    _tile_zero(1);
    _tile_loadd(6, first + block, row);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, second + block, row);
    _tile_dpbssd(1, 5, 7);
    _tile_stored(1, sums[1], row);
  }
  _tile_stored(0, sums[0], row);
  asm volatile("" ::: "memory");
}

// A row's sums with a digit are `pairs` neighbours: those of both digits in two vectors, joined.
struct JoinDigits {
  vi high, low;
  explicit JoinDigits(int pairs) {
    for (int i = 0; i < lanes; i++) high[i] = i / pairs * 2 * pairs + i % pairs, low[i] = high[i] + pairs;
  }
  vi operator()(const int32_t* sums) const {
    const __m512i a = _mm512_load_si512(sums), b = _mm512_load_si512(sums + lanes);
    const vi of_high = (vi)_mm512_permutex2var_epi32(a, (__m512i)high, b);
    return (of_high << 8) + (vi)_mm512_permutex2var_epi32(a, (__m512i)low, b);
  }
};

// out[block][output][row of x][group of the piece] = sums over all pieces, for 16 outputs; `pairs` are the rows of x in
// a block by the groups of a piece.
template <Codes kind, int pairs, int blocks>
__attribute__((noinline)) void matrix_dots(const QuantWeight& w, const DigitLayout& l, const char* x, int64_t n,
                                           int64_t count, MatrixScratch& m, float* out) {
  constexpr int bytes = kind == Codes::int8 ? 128 : 64;
  GroupScales scales(w, n, count, l.groups);
  const JoinDigits join(pairs);
  vi at;  // of a lane: its output's scales, and among them its group's
  for (int i = 0; i < lanes; i++) at[i] = i / pairs * (int32_t)l.groups + (i & (int32_t)(l.groups - 1));
  vf acc[blocks][pairs] = {};
  const auto rows_of = [&](int64_t c)
                           __attribute__((always_inline)) { return code_rows<bytes>(w, n, count, c, m.copy); };
  const auto add = [&](int64_t c, const float* scale, const float* offset) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; b++) {
      const SumsOfX of_x(l, x + c * l.piece + b * l.block);
#pragma GCC unroll 8
      for (int u = 0; u < pairs; u++) {
        const int64_t from = u * outputs * l.groups / pairs;
        add_scaled(acc[b][u], join(m.sums[c % 2][b] + u * 2 * lanes), of_x, permuted(at, scale + from));
        if (w.offset) acc[b][u] += of_x.sums * permuted(at, offset + from);
      }
    }
  };
  if constexpr (kind == Codes::int4) take_apart(rows_of(0), m.codes[0]);
  const float *scale = nullptr, *offset = nullptr;
  for (int64_t c = 0; c < l.pieces; c++) {
    for (int r = 0; r < outputs; r++) {
      __builtin_prefetch(w.codes + (n + outputs + r) * w.row + c * bytes, 0, 2);
      if constexpr (bytes == 128) __builtin_prefetch(w.codes + (n + outputs + r) * w.row + c * bytes + 64, 0, 2);
    }
    const char* const at_c = x + c * l.piece;
    if constexpr (kind == Codes::int4) {
      if (c + 1 < l.pieces) take_apart(rows_of(c + 1), m.codes[(c + 1) % 2]);
      const auto& codes = m.codes[c % 2];
      multiply_piece<blocks>({codes[0][0], 64}, codes[1][0], at_c, 2 * pairs, l.block, m.sums[c % 2]);
    } else {
      const CodeRows codes = rows_of(c);
      multiply_piece<blocks>(codes, codes.first + 64, at_c, 2 * pairs, l.block, m.sums[c % 2]);
    }
    if (c) add(c - 1, scale, offset);
    go_to(scales, c);
    scale = scales.scale, offset = scales.offset;
  }
  if (l.pieces) add(l.pieces - 1, scale, offset);
#pragma GCC unroll 2
  for (int b = 0; b < blocks; b++)
#pragma GCC unroll 8
    for (int u = 0; u < pairs; u++) store(out + (b * pairs + u) * lanes, acc[b][u]);
}

// sums[output] of a row of x, whose `groups` sums each are added up.
MK_INLINE void row_sums(const float* from, int64_t pairs, int64_t groups, float* sums) {
  for (int64_t r = 0; r < outputs; r++, from += pairs)
    sums[r] = groups == 1 ? from[0] : groups == 2 ? from[0] + from[1] : (from[0] + from[1]) + (from[2] + from[3]);
}

using MatrixDots = void (*)(const QuantWeight&, const DigitLayout&, const char*, int64_t, int64_t, MatrixScratch&,
                            float*);

template <Codes kind>
MatrixDots matrix_dots_of(int64_t pairs, int64_t blocks) {
  if (blocks == 2) return matrix_dots<kind, 8, 2>;
  if (pairs == 8) return matrix_dots<kind, 8, 1>;
  if (pairs == 4) return matrix_dots<kind, 4, 1>;
  return pairs == 2 ? matrix_dots<kind, 2, 1> : matrix_dots<kind, 1, 1>;
}

template <class T>
void run_matrix(const QuantWeight& w, const QuantRows& rows, const QuantShare& share, const DigitLayout& l) {
  const int64_t pairs = l.rows * l.groups;
  const Matrices matrices(matrix_rows, 2 * pairs);
  MatrixScratch scratch;
  for (int64_t n = share.first; n < share.first + share.count; n += outputs) {
    const int64_t count = least(outputs, share.first + share.count - n);
    for (int64_t b = 0; b < l.blocks; b += 2) {
      const int64_t blocks = least(2, l.blocks - b);
      const auto dots = w.kind == Codes::int8 ? matrix_dots_of<Codes::int8>(pairs, blocks)
                                              : matrix_dots_of<Codes::int4>(pairs, blocks);
      alignas(64) float out[2 * 8 * lanes];
      dots(w, l, rows.memory + b * l.block, n, count, scratch, out);
      for (int64_t i = 0; i < blocks * l.rows && b * l.rows + i < rows.rows; i++) {
        float sums[outputs];
        row_sums(out + i / l.rows * pairs * lanes + i % l.rows * l.groups, pairs, l.groups, sums);
        finish_digits<T>(w, share, b * l.rows + i, n, count, sums);
      }
    }
  }
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

// Keys and values laid out for the products of the attention tiles: keys in panels of [dim words][panel keys],
// transposed in registers; values in rows of words, [panel keys / step][columns]. For the matrix unit both are blocks
// of one register, 16 words by 16 keys or columns: keys [keys / 16][dim words / 16], values [keys / 32][columns / 16].
#pragma once
#include "cpu/attention_math.h"

namespace mk::MK_ISA {
namespace {

template <class M>
constexpr int panel_keys = strip_vectors * M::width;

// Words of a key, with zeros up to whole steps of the matrix unit, and columns of a value row.
template <class M>
MK_INLINE int64_t key_words(int64_t dim) {
  return round_up(dim, by_matrices<M> ? 16 * M::step : M::step) / M::step;
}

template <class M>
MK_INLINE int64_t value_columns(int64_t dim) {
  return round_up(dim, M::width);
}

// One vector of the words of a row, from word `w` on; zeros past `dim`. Pairs by a mask: g++ calls memcpy for a part
// of a vector.
template <class M, class T>
MK_INLINE typename M::Words row_words(const T* row, int64_t w, int64_t dim) {
  const int64_t left = dim - w * M::step;
  if constexpr (M::step == 1) {
    return left >= M::width ? load(row + w) : load_n(row + w, most(left, 0));
  } else {
#if MK_BF16
    const T* p = row + w * M::step;
    return left >= 2 * lanes ? load_words<vu>(p) : (vu)_mm512_maskz_loadu_epi16((1u << most(left, 0)) - 1, p);
#endif
  }
}

struct Row {
  const char *k, *v;
};

// Where key `key` of a sequence lies.
template <class T>
MK_INLINE Row find_key(const AttentionSequence& s, int64_t kv_head, int64_t key) {
  const KeySpan* span = s.spans;
  for (; key >= span->count; span++) key -= span->count;
  const int64_t k = key * span->k_row + kv_head * span->k_head, v = key * span->v_row + kv_head * span->v_head;
  return {span->k + k * (int64_t)sizeof(T), span->v + v * (int64_t)sizeof(T)};
}

template <class M, class T>
MK_INLINE void pack_keys(const T* const* rows, int64_t keys, int64_t dim, typename M::Word* out) {
  constexpr int n = M::width;
  const int64_t words = key_words<M>(dim);
  for (int64_t first = 0; first < panel_keys<M>; first += n)
    for (int64_t w = 0; w < words; w += n) {
      typename M::Words t[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; i++) t[i] = first + i < keys ? row_words<M>(rows[first + i], w, dim) : typename M::Words{};
      transpose(t);
      for (int i = 0; i < least(n, words - w); i++)
        store_words(by_matrices<M> ? out + first * words + (w + i) * n : out + (w + i) * panel_keys<M> + first, t[i]);
    }
}

// Two vectors of bf16 as pairs.
MK_INLINE vu pair(vu even, vu odd) { return even | (odd << 16); }

template <class T>
MK_INLINE vu raw_words(const T* p, int64_t n) {
  if (n >= lanes) return widen(load_words<vh>(p));
  vh h = {};
  __builtin_memcpy(&h, p, n * sizeof(T));
  return widen(h);
}

template <class M, class T>
MK_INLINE void pack_values(const T* const* rows, int64_t keys, int64_t dim, typename M::Word* out) {
  const int64_t columns = value_columns<M>(dim);
  for (int64_t key = 0; key < panel_keys<M>; key += M::step)
    for (int64_t d = 0; d < columns; d += M::width) {
      typename M::Word* to =
          by_matrices<M> ? out + key / 32 * 16 * columns + (d + key % 32 / 2) * 16 : out + key / M::step * columns + d;
      if (key >= keys)
        store_words(to, typename M::Words{});
      else if constexpr (M::step == 1)
        store_words(to, row_words<M>(rows[key], d, dim));
      else
        store_words(
            to, pair(raw_words(rows[key] + d, dim - d), key + 1 < keys ? raw_words(rows[key + 1] + d, dim - d) : vu{}));
    }
}

#if MK_AMX

// From key `key` on the packed keys as columns of scores, and the packed values' columns from `d` on.
MK_INLINE Right key_columns(const uint32_t* keys, int64_t words, int64_t key) {
  return {keys + key * words, 64, words * 64, matrix_block * 4};
}

MK_INLINE Right value_rows(const uint32_t* values, int64_t columns, int64_t key, int64_t d) {
  return {values + key / 2 * columns + d * matrix_words, 64, matrix_block * 4, columns * 64};
}

#endif

// Query rows as words, times the sign of the scale, with zeros to the next whole vector.
template <class M>
MK_INLINE int64_t query_words(int64_t dim) {
  return round_up(key_words<M>(dim), M::width);
}

template <class M, class T>
MK_INLINE void pack_query(const T* row, int64_t dim, double sign, typename M::Word* out) {
  const int64_t whole = dim / (M::width * M::step) * M::width, words = query_words<M>(dim);
  const auto put = [&](int64_t w, typename M::Words v) {
    if constexpr (M::step == 1)
      store_words(out + w, v * (typename M::Scalar)sign);
    else
      store_words(out + w, (v ^ (sign < 0 ? 0x80008000u : 0u)) & (sign == 0 ? 0u : ~0u));
  };
  for (int64_t w = 0; w < whole; w += M::width) put(w, row_vector<M>(row + w * M::step));
  for (int64_t w = whole; w < words; w += M::width) put(w, row_words<M>(row, w, dim));
}

}  // namespace
}  // namespace mk::MK_ISA

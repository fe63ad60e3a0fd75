// Attention of many queries by FlashAttention-2 (Dao 2023, algorithm 1): keys and values packed once, then tiles of
// queries over blocks of keys. The query heads of a group share the packed block while it lies in the L2 cache.
#include "cpu/attention.h"

#include "cpu/attention_tile_matrix.h"

namespace mk::MK_ISA {
namespace {

template <class T>
void pack(const Attention& a, int64_t sequence, int64_t kv_head, int64_t panel) {
  using M = typename ArithmeticOf<T>::type;
  const AttentionSequence& s = a.sequences[sequence];
  const int64_t first = s.first_key + panel * panel_keys<M>, keys = least(panel_keys<M>, s.keys - first);
  const T *k[panel_keys<M>], *v[panel_keys<M>];
  for (int64_t i = 0; i < keys; i++) {
    const Row row = find_key<T>(s, kv_head, first + i);
    k[i] = (const T*)row.k;
    v[i] = (const T*)row.v;
  }
  using Word = typename M::Word;
  const int64_t index = kv_head * a.panels + s.first_panel + panel;
  pack_keys<M>(k, keys, a.dim, (Word*)a.key_panels + index * key_panel_words<M>(a.dim));
  pack_values<M>(v, keys, a.dim, (Word*)a.value_panels + index * value_panel_words<M>(a.dim));
}

// Scores of MR rows with NV vectors of keys, from key `key` of the packed ones on. Long dot products are summed in
// parts: one float32 sum over 256 dimensions errs 1.4 times as much as a BLAS, which does the same.
template <class M, int MR, int NV>
MK_INLINE void strip_scores(const Tile<M>& t, int64_t row, int64_t key, typename M::Scalar* scores) {
  constexpr int64_t n = panel_keys<M>, part = lanes == 4 ? 32 : 64;  // the plain x86 has no FMA
  const typename M::Word *panel = t.k + key / n * n * t.q_words + key % n, *q = t.q + row * t.q_row;
  for (int64_t first = 0; first < t.q_words; first += part, panel += part * n, q += part) {
    typename M::Vec c[MR][NV] = {};
    multiply<M>(q, t.q_row, least(part, t.q_words - first), c,
                [&](int64_t k, int v) { return load_words<typename M::Words>(panel + k * n + v * M::width); });
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        typename M::Scalar* to = scores + r * block_keys<M> + v * M::width;
        store_words(to, first ? load_words<typename M::Vec>(to) + c[r][v] : c[r][v]);
      }
  }
}

// acc = factor * acc + P V (without `factor`, P V) for NV vectors of columns, from column `d` on, and `keys` keys from
// `key` on. Each block is summed by itself: one float32 sum over 4000 keys errs twice as much as a BLAS does.
template <class M, int MR, int NV>
MK_INLINE void strip_values(const Tile<M>& t, int64_t row, int64_t key, int64_t keys, int64_t d,
                            const typename M::Scalar* factor) {
  const typename M::Word* v = t.v + key / M::step * t.columns + d;
  typename M::Vec c[MR][NV] = {};
  multiply<M>(t.probabilities, block_keys<M> / M::step, keys / M::step, c,
              [&](int64_t k, int n) { return load_words<typename M::Words>(v + k * t.columns + n * M::width); });
#pragma GCC unroll 6
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) {
      typename M::Scalar* acc = t.acc + (row + r) * t.columns + d + n * M::width;
      store_words(acc, factor ? load_words<typename M::Vec>(acc) * factor[r] + c[r][n] : c[r][n]);
    }
}

// Online softmax (Milakov and Gimelshein 2018) of `count` rows: scores become probabilities relative to the largest so
// far; factors[r] is that for what was summed before. Returns whether nothing was. The factors, of which most are 1,
// are computed for all rows at once: neither a call nor a branch for each.
template <class M>
MK_INLINE bool strip_softmax(const Tile<M>& t, int64_t count, int64_t row, int64_t query, int64_t first, int64_t last,
                             typename M::Scalar* factors) {
  const int64_t base = t.s.first_key + first, keys = last - first;
  bool fresh = true;
  for (int64_t r = 0; r < count; r++) {
    typename M::Scalar *scores = t.scores + r * block_keys<M>, &top = t.tops[row + r];
    mask_vectors<M>(scores, keys, first_visible(t.a, t.s, query + r) - base, end_visible(t.a, t.s, query + r) - base);
    const typename M::Scalar before = top;
    fresh &= before == -INFINITY;
    top = larger(largest_of_row<M>(scores, keys), before);
    factors[r] = (before - base_of(top)) * t.scale;
  }
  for (int64_t r = 0; r < count; r += M::width)
    store_words(factors + r, exp2_negative<M::degree>(load_words<typename M::Vec>(factors + r)));
  for (int64_t r = 0; r < count; r++) {
    typename M::Scalar& sum = t.sums[row + r];
    sum = sum * factors[r] + exponentials<M>(t.scores + r * block_keys<M>,
                                             t.probabilities + r * (block_keys<M> / M::step), keys,
                                             base_of(t.tops[row + r]), t.scale);
  }
  return fresh;
}

// Room for the factors of a strip's rows, by whole vectors.
template <class M>
constexpr int64_t strip_factors = (rows_of_strip<M> + M::width - 1) / M::width * M::width;

// MR rows, which are the queries from `query` on, over the keys [first, last) as far as any of them sees those.
template <class M, int MR>
void strip(const Tile<M>& t, int64_t row, int64_t query, int64_t first, int64_t last) {
  constexpr int64_t n = strip_vectors * M::width, half = 2 * M::width;
  narrow_keys(t, MR, query, first, last);
  if (first >= last) return;
  for (int64_t key = first; key < last;) {
    if (strip_vectors == 4 && (key % n || last - key < n)) {
      strip_scores<M, MR, 2>(t, row, key, t.scores + key - first);
      key += half;
    } else {
      strip_scores<M, MR, strip_vectors>(t, row, key, t.scores + key - first);
      key += n;
    }
  }
  typename M::Scalar factors[strip_factors<M>] = {};
  const typename M::Scalar* factor = strip_softmax(t, MR, row, query, first, last, factors) ? nullptr : factors;
  int64_t d = 0;
  for (; d + n <= t.columns; d += n) strip_values<M, MR, strip_vectors>(t, row, first, last - first, d, factor);
  if (strip_vectors == 4 && d + half <= t.columns) {
    strip_values<M, MR, 2>(t, row, first, last - first, d, factor);
    d += half;
  }
  if (d < t.columns) strip_values<M, MR, 1>(t, row, first, last - first, d, factor);
}

template <class M>
void any_strip(const Tile<M>& t, int64_t rows, int64_t row, int64_t query, int64_t first, int64_t last) {
  switch (rows) {
    case 1:
      return strip<M, 1>(t, row, query, first, last);
    case 2:
      return strip<M, 2>(t, row, query, first, last);
    case 3:
      return strip<M, 3>(t, row, query, first, last);
    case 4:
      return strip<M, 4>(t, row, query, first, last);
    case 5:
      return strip<M, 5>(t, row, query, first, last);
    default:
      return strip<M, 6>(t, row, query, first, last);
  }
}

template <class M, class T>
void start_tile(Tile<M>& t, const AttentionItem& item, int64_t rows) {
  const int64_t head_rows = t.head_rows, heads = item.heads, dim = t.a.dim, to = t.q_row;
  const int64_t from_row = t.a.q_row, from_head = t.a.q_head;
  const double sign = scaling(t.a.scale).sign;
  for (int64_t row = 0; row < heads * head_rows; row++) {
    t.tops[row] = -INFINITY;
    t.sums[row] = 0;
  }
  const T* q = (const T*)t.s.q + item.first * from_row + item.head * from_head;
  typename M::Word* out = t.q;
  for (int64_t i = 0; i < rows; i++, q += from_row, out += to)  // the heads of a query lie side by side
    for (int64_t head = 0; head < heads; head++)
      pack_query<M>(q + head * from_head, dim, sign, out + head * head_rows * to);
}

template <class M, class T>
void finish_tile(const Tile<M>& t, const AttentionItem& item, int64_t rows) {
  using Scalar = typename M::Scalar;
  for (int64_t head = 0; head < item.heads; head++)
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row = head * t.head_rows + i, query = item.first + i;
      T* out = (T*)t.s.out + query * t.a.out_row + (item.head + head) * t.a.out_head;
      Scalar* lse = t.s.lse ? (Scalar*)t.s.lse + (item.head + head) * t.a.lse_head + query : nullptr;
      finish_row<M>(t.a, t.acc + row * t.columns, {t.tops[row], t.sums[row]}, out, lse);
    }
}

template <class T>
void tile(const Attention& a, const AttentionItem& item, char* scratch) {
  using M = typename ArithmeticOf<T>::type;
  Tile<M> t(a, item, scratch);
  const NoSubnormals no_subnormals;
#if MK_AMX
  const Matrices matrices;
#endif
  const int64_t rows = item.last - item.first;
  start_tile<M, T>(t, item, rows);
  const int64_t first = round_down(most(first_visible(a, t.s, item.first) - t.s.first_key, 0), panel_keys<M>);
  const int64_t last = end_visible(a, t.s, item.last - 1) - t.s.first_key;
#if MK_AMX
  if constexpr (by_matrices<M>) return matrix_tile(t, item, first, last);
#endif
  for (int64_t key = first; key < last; key += block_keys<M>)
    for (int64_t head = 0; head < item.heads; head++)
      for (int64_t i = 0; i < rows; i += rows_of_strip<M>)
        any_strip(t, least(rows_of_strip<M>, rows - i), head * t.head_rows + i, item.first + i, key,
                  key + block_keys<M>);
  finish_tile<M, T>(t, item, rows);
}

template <class T>
TileSizes sizes(int64_t dim, int64_t rows) {
  using M = typename ArithmeticOf<T>::type;
  const int64_t word = sizeof(typename M::Word);
  return {panel_keys<M>, key_panel_words<M>(dim) * word, value_panel_words<M>(dim) * word, Tile<M>::bytes(dim, rows)};
}

}  // namespace

const AttentionKernels attention = {
    {sizes<float>, sizes<bf16>, sizes<f16>, sizes<double>},
    {pack<float>, pack<bf16>, pack<f16>, pack<double>},
    {tile<float>, tile<bf16>, tile<f16>, tile<double>},
};

}  // namespace mk::MK_ISA

// Strips of a tile by the matrix unit, which multiplies so fast that the softmax takes most of the time: sixteen rows
// have their largest scores, their factors and their sums computed side by side, and what the rows summed before is
// touched only where it has to be scaled.
#pragma once
#include "cpu/attention_tile.h"

#if MK_AMX

namespace mk::MK_ISA {
namespace {

constexpr int64_t score_stride = score_row<PairsBf16>;

// Scores whose exponentials take so long that the unit would fall asleep soon.
constexpr int64_t wakeful_scores = 1536;

// The largest score of each of sixteen rows.
MK_INLINE vf largest_of_rows(const float* scores, int64_t keys) {
  vf top[matrix_rows];
  for (int r = 0; r < matrix_rows; r++) top[r] = top_of_row<PairsBf16>(scores + r * score_stride, keys);
  return join_each(top, [](vf a, vf b) { return max(a, b); });
}

// Where a row of the output goes.
MK_INLINE bf16* output_row(const Tile<PairsBf16>& t, int64_t row, int64_t query) {
  return (bf16*)t.s.out + query * t.a.out_row + (t.head + row / t.head_rows) * t.a.out_head;
}

// Asks for a row of the output, which is far from the one before, long enough ahead.
MK_INLINE void fetch_to_write(const bf16* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 32) asm volatile("prefetchw %0" ::"m"(row[d]));
}

// Turns a row's scores into exp2(score * scale - base), bf16 in their place, and returns their sums lane by lane.
MK_INLINE vf exponentials_in_place(float* s, int64_t keys, float base, float scale) {
  uint32_t* p = (uint32_t*)s;
  vf sum0 = {}, sum1 = {};
  for (int64_t j = 0; j < keys; j += 2 * lanes) {
    const vf e0 = exp2_negative<5>(load_words<vf>(s + j) * scale - base);
    const vf e1 = exp2_negative<5>(load_words<vf>(s + j + lanes) * scale - base);
    sum0 += e0;
    sum1 += e1;
    store_probabilities<PairsBf16>(p + j / 2, e0, e1);
  }
  return sum0 + sum1;
}

MK_INLINE bool all(vi mask) { return _mm512_movepi32_mask((__m512i)mask) == 0xffff; }

// Whether sixteen rows from `row` on have nothing before these scores, or factors for what they have.
struct Before {
  bool nothing, scaled;
};

// The same as strip_softmax() for sixteen rows, `scores` being theirs and `out`, if not null, where their output goes
// soon. The base is rounded the same way wherever it occurs, so that it cancels out.
MK_INLINE Before matrix_softmax(const Tile<PairsBf16>& t, float* scores, int64_t row, int64_t keys, float* factors,
                                const bf16* out) {
  const vf before = load_words<vf>(t.tops + row);
  const auto [top, base, factor] = lagging_base(before, max(largest_of_rows(scores, keys), before), t.scale);
  store_words(t.tops + row, top);
  store_words(factors, factor);
  float bases[matrix_rows];
  store_words(bases, base);
  vf sums[matrix_rows];
  for (int r = 0; r < matrix_rows; r++) {
    if (r * keys % wakeful_scores < keys) keep_awake();
    if (out) fetch_to_write(out + r * t.a.out_row, t.a.dim);
    sums[r] = exponentials_in_place(scores + r * score_stride, keys, bases[r], t.scale);
  }
  store_words(t.sums + row, load_words<vf>(t.sums + row) * factor + sum_each(sums));
  return {all(before == set1(-INFINITY)), !all(factor == set1(1.f))};
}

// Scores of the keys that a row does not see become -inf: only a few strips have any. `base` is the key of their first
// score. What the last row sees is not cut off at the first key, and the rows before see one key less each.
MK_INLINE void mask_strip(const Tile<PairsBf16>& t, int64_t count, int64_t query, int64_t base, int64_t keys) {
  const int64_t step = t.a.causal, back = (count - 1) * step, last = query + count - 1;
  const int64_t begin = first_visible(t.a, t.s, last) - base - back, end = end_visible(t.a, t.s, last) - base - back;
  const vf none = set1(-INFINITY);
  vf lane;
  for (int i = 0; i < lanes; i++) lane[i] = i;
  for (int64_t r = 0; r < count && end + r * step < keys; r++) {
    float* s = t.scores + r * score_stride;
    int64_t j = round_down(most(end + r * step, 0), lanes);
    store_words(s + j, lane + (float)j < (float)(end + r * step) ? load_words<vf>(s + j) : none);
    for (j += lanes; j < keys; j += lanes) store_words(s + j, none);
  }
  for (int64_t r = most(1 - begin, 0); r < count * step; r++) {
    float* s = t.scores + r * score_stride;
    int64_t j = 0;
    for (; j + lanes <= least(begin + r, keys); j += lanes) store_words(s + j, none);
    if (j < keys) store_words(s + j, lane + (float)j < (float)(begin + r) ? none : load_words<vf>(s + j));
  }
}

// acc *= factor for sixteen rows.
MK_INLINE void scale_rows(float* acc, int64_t columns, const float* factors) {
  for (int r = 0; r < matrix_rows; r++, acc += columns) {
    if (factors[r] == 1) continue;
    for (int64_t d = 0; d < columns; d += lanes) store_words(acc + d, load_words<vf>(acc + d) * factors[r]);
  }
}

// Natural logarithms: an exponent, and a polynomial of cephes' logf for the rest, in [sqrt(1/2), sqrt(2)), that errs by
// 1e-7 of it. nan stays.
struct Logarithms {
  vf exponent, rest;
};

MK_INLINE Logarithms logarithms(vf x) {
  const vi exponent = ((vi)x - 0x3f3504f3) >> 23;
  const vf f = (vf)((vi)x - (exponent << 23)) - 1.f;
  constexpr float c[] = {-0.24999993993f, 0.20000714765f, -0.16668057665f, 0.14249322787f,
                         -0.12420140846f, 0.1167699874f,  -0.1151461031f,  0.070376836292f};
  vf p = set1(c[7]);
#pragma GCC unroll 7
  for (int i = 6; i >= 0; i--) p = p * f + c[i];
  p = p * f + 0.33333331174f;
  const vf rest = f + f * f * (f * p - 0.5f);
  return {__builtin_convertvector(exponent, vf), x == x ? rest : x};
}

// The natural log of the softmax's denominator for sixteen rows, added up in double as finish_row() does.
MK_INLINE vf natural_lse(vf tops, vf sums, double scale) {
  typedef float Half __attribute__((vector_size(32)));
  const Logarithms logs = logarithms(sums);
  const auto part = [&](auto half) {
    const auto wide = [&](vf v) { return __builtin_convertvector(half(v), vd); };
    return __builtin_convertvector(wide(tops) * scale + (wide(logs.exponent) * ln_2 + wide(logs.rest)), Half);
  };
  const Half low = part([](vf v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); });
  const Half high = part([](vf v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); });
  const vf lse = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return sums == 0.f ? set1(-INFINITY) : lse;
}

// The same as finish_row() for up to sixteen rows from `row` on, which are the queries from `query` on. The compiler
// takes each store for one that changes the numbers of `t`: they are read before.
MK_INLINE void finish_rows(const Tile<PairsBf16>& t, int64_t row, int64_t count, int64_t query) {
  bf16* out = output_row(t, row, query);
  const float* acc = t.acc + row * t.columns;
  const int64_t dim = t.a.dim, pairs = round_down(dim, 2 * lanes), out_row = t.a.out_row, columns = t.columns;
  const vf tops = load_words<vf>(t.tops + row), sums = load_words<vf>(t.sums + row);
  float inverses[matrix_rows];
  store_words(inverses, sums == 0.f ? vf{} : 1.f / sums);
  for (int64_t r = 0; r < count; r++, out += out_row, acc += columns) {
    const float inverse = inverses[r];
    const auto scaled = [&](int64_t d) { return inverse == 0 ? vf{} : load_words<vf>(acc + d) * inverse; };
    int64_t d = 0;
    for (; d < pairs; d += 2 * lanes)
      store_probabilities<PairsBf16>((uint32_t*)(out + d), scaled(d), scaled(d + lanes));
    for (; d < dim; d += lanes) store_columns<PairsBf16>(out, d, dim, scaled(d));
  }
  if (!t.s.lse) return;
  float* lse = (float*)t.s.lse + (t.head + row / t.head_rows) * t.a.lse_head + query;
  const vf v = natural_lse(tops, sums, scaling(t.a.scale).magnitude);
  if (count == lanes)
    store(lse, v);
  else
    store_n(lse, v, count);
}

// The same as strip() for `count` of 16 MT rows; those past `count` hold anything, and nobody reads them.
template <int MT>
void strip_of(const Tile<PairsBf16>& t, int64_t count, int64_t row, int64_t query, int64_t first, int64_t last,
              bool ends) {
  const int64_t keys = last - first, base = t.s.first_key + first;
  for (int64_t key = first; key < last; key += 2 * lanes)
    multiply_matrices<false, MT, 2>(t.q + row * t.q_row, t.q_row * 4, key_columns(t.k, t.q_words, key),
                                    t.q_words / matrix_words, t.scores + key - first, score_stride * 4, true);
  mask_strip(t, count, query, base, keys);
  float factors[MT][matrix_rows];
  Before before[MT];
  bool fresh = true;
  for (int i = 0; i < MT; i++) {
    const bf16* out = ends ? output_row(t, row, query + i * matrix_rows) : nullptr;
    before[i] =
        matrix_softmax(t, t.scores + i * matrix_rows * score_stride, row + i * matrix_rows, keys, factors[i], out);
    fresh &= before[i].nothing;
  }
  float* acc = t.acc + row * t.columns;
  if (!fresh)
    for (int i = 0; i < MT; i++)
      if (before[i].scaled) scale_rows(acc + i * matrix_rows * t.columns, t.columns, factors[i]);
  each_registers(t.columns, [&]<int NT>(int64_t d, Registers<NT>) {
    multiply_matrices<false, MT, NT>(t.scores, score_stride * 4, value_rows(t.v, t.columns, first, d), keys / 32,
                                     acc + d, t.columns * 4, fresh);
  });
}

// Up to 32 rows over a block of keys. With the last block, which `ends` them, their outputs are written while they are
// in the cache.
MK_INLINE void matrix_strip(const Tile<PairsBf16>& t, int64_t count, int64_t row, int64_t query, int64_t first,
                            int64_t last, bool ends) {
  narrow_keys(t, count, query, first, last);
  if (first < last) {
    if (count > matrix_rows)
      strip_of<2>(t, count, row, query, first, last, ends);
    else
      strip_of<1>(t, count, row, query, first, last, ends);
  }
  if (!ends) return;
  for (int64_t i = 0; i < count; i += matrix_rows) finish_rows(t, row + i, least(matrix_rows, count - i), query + i);
}

// All strips of a tile over the keys [first, last).
MK_INLINE void matrix_tile(const Tile<PairsBf16>& t, const AttentionItem& item, int64_t first, int64_t last) {
  constexpr int64_t unit = rows_of_strip<PairsBf16>;
  const int64_t rows = item.last - item.first;
  bool ends;
  do {
    const int64_t end = first + block_keys<PairsBf16>;
    ends = end >= last;
    for (int64_t head = 0; head < item.heads; head++)
      for (int64_t i = 0; i < rows; i += unit)
        matrix_strip(t, least(unit, rows - i), head * t.head_rows + i, item.first + i, first, end, ends);
    first = end;
  } while (!ends);
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

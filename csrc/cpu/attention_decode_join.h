// Partial results of a row, each of some of the keys it sees, become one: every one of them is read once, and what it
// counts for comes from the largest score of all.
#pragma once
#include "cpu/attention_math.h"

namespace mk::MK_ISA {
namespace {

// The first of `count` partial results, which lie `next` bytes apart: sums of `columns` values, a multiple of whole
// vectors, and what the softmax knows of their keys.
template <class M>
struct PartialRow {
  typename M::Scalar* sums;
  const RowState<typename M::Scalar>* state;
  int64_t next, count, columns;
  typename M::Scalar scale;
};

template <class M>
MK_INLINE RowState<typename M::Scalar> state_of(const PartialRow<M>& row, int64_t i) {
  return *(const RowState<typename M::Scalar>*)((const char*)row.state + i * row.next);
}

constexpr int64_t joined_at_once = 64;

// NV vectors of the sums from column d on: those of the partial results [first, first + count), which count for
// `weights`, come to what is there already, or in place of it.
template <class M, int NV>
MK_INLINE void add_columns(const PartialRow<M>& row, const typename M::Scalar* weights, int64_t first, int64_t count,
                           int64_t d) {
  using Vec = typename M::Vec;
  Vec sums[NV] = {};
  typename M::Scalar* to = row.sums + d;
  if (first)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) sums[n] = load_words<Vec>(to + n * M::width);
  for (int64_t i = 0; i < count; i++) {
    const auto* from = (const typename M::Scalar*)((const char*)to + (first + i) * row.next);
    const Vec weight = set1(weights[i]);
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) sums[n] += load_words<Vec>(from + n * M::width) * weight;
  }
#pragma GCC unroll 4
  for (int n = 0; n < NV; n++) store_words(to + n * M::width, sums[n]);
}

// Leaves the joined sums in the first one's place, and returns what the softmax knows of all keys.
template <class M>
RowState<typename M::Scalar> join_row(const PartialRow<M>& row) {
  using Scalar = typename M::Scalar;
  using Vec = typename M::Vec;
  RowState<Scalar> all = {row.state->top, 0};
  for (int64_t i = 1; i < row.count; i++) all.top = larger(state_of(row, i).top, all.top);
  const Scalar base = base_of(all.top);
  for (int64_t first = 0; first < row.count; first += joined_at_once) {
    const int64_t count = least(joined_at_once, row.count - first);
    Scalar weights[joined_at_once] = {};
    for (int64_t i = 0; i < count; i++) weights[i] = (state_of(row, first + i).top - base) * row.scale;
    for (int64_t i = 0; i < count; i += M::width)
      store_words(weights + i, exp2_negative<6>(load_words<Vec>(weights + i)));
    for (int64_t i = 0; i < count; i++) all.sum += state_of(row, first + i).sum * weights[i];
    int64_t d = 0;
    for (; d + 4 * M::width <= row.columns; d += 4 * M::width) add_columns<M, 4>(row, weights, first, count, d);
    for (; d < row.columns; d += M::width) add_columns<M, 1>(row, weights, first, count, d);
  }
  return all;
}

}  // namespace
}  // namespace mk::MK_ISA

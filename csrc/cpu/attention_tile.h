// A tile of queries as the kernels of vectors and those of the matrix unit work on it.
#pragma once
#include "cpu/attention_pack.h"

namespace mk::MK_ISA {
namespace {

template <class M>
constexpr int64_t block_keys = by_matrices<M> ? 256 : 512 / (sizeof(typename M::Word) / M::step / 2);

// Words from a row of scores to the next. The matrix unit stores sixteen rows one after the other: a line more than a
// power of two, so that these are not all in a few sets of the cache.
template <class M>
constexpr int64_t score_row = block_keys<M> + (by_matrices<M> ? M::width : 0);

template <class M>
MK_INLINE int64_t key_panel_words(int64_t dim) {
  return key_words<M>(dim) * panel_keys<M>;
}

template <class M>
MK_INLINE int64_t value_panel_words(int64_t dim) {
  return value_columns<M>(dim) * panel_keys<M> / M::step;
}

// What a thread keeps for one tile.
template <class M>
struct Tile {
  using Scalar = typename M::Scalar;
  using Word = typename M::Word;
  const Attention& a;
  const AttentionSequence& s;
  const Word *k, *v;                // the panels of this sequence and KV head
  Scalar *scores, *acc;             // [rows_of_strip][score_row], [rows][value columns]
  Scalar *tops, *sums;              // [rows], RowState's
  Word *probabilities, *q;          // [rows_of_strip][block_keys / step], [rows][key words]
  int64_t head;                     // the first one
  int64_t head_rows;                // of each head, those past the queries without meaning
  int64_t q_words, q_row, columns;  // q_row: q_words to the next whole vector
  Scalar scale;

  static int64_t bytes(int64_t dim, int64_t rows) {
    const int64_t strip = rows_of_strip<M> * score_row<M>;
    rows += tile_heads * (rows_unit<M> - 1);
    return (strip + rows * (value_columns<M>(dim) + 2)) * sizeof(Scalar) +
           (strip + rows * query_words<M>(dim)) * sizeof(Word);
  }

  Tile(const Attention& a, const AttentionItem& item, char* scratch) : a(a), s(a.sequences[item.sequence]) {
    head = item.head;
    head_rows = round_up(item.last - item.first, rows_unit<M>);
    const int64_t rows = item.heads * head_rows, strip = rows_of_strip<M> * score_row<M>;
    q_words = key_words<M>(a.dim);
    q_row = query_words<M>(a.dim);
    columns = value_columns<M>(a.dim);
    scores = (Scalar*)scratch;
    acc = scores + strip;
    probabilities = (Word*)(acc + rows * columns);
    q = probabilities + strip;
    tops = (Scalar*)(q + rows * q_row);
    sums = tops + rows;
    const int64_t panel = item.head / (a.heads / a.kv_heads) * a.panels + s.first_panel;
    k = (const Word*)a.key_panels + panel * key_panel_words<M>(a.dim);
    v = (const Word*)a.value_panels + panel * value_panel_words<M>(a.dim);
    scale = (Scalar)(scaling(a.scale).magnitude * log2_e);
  }
};

// Of the keys [first, last) those that any of `rows` queries from `query` on sees, to whole units of both ends.
template <class M>
MK_INLINE void narrow_keys(const Tile<M>& t, int64_t rows, int64_t query, int64_t& first, int64_t& last) {
  constexpr int64_t unit = 2 * M::width;
  const int64_t base = t.s.first_key;
  first = most(first, round_down(most(first_visible(t.a, t.s, query) - base, 0), unit));
  last = least(last, round_up(end_visible(t.a, t.s, query + rows - 1) - base, unit));
}

}  // namespace
}  // namespace mk::MK_ISA

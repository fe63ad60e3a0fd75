// The gradients of attention in bf16 by the matrix unit. Scores and their gradients are kept transposed, keys as rows
// and sixteen queries side by side in a vector: P^T and dS^T are then left factors as they are rounded, keys and values
// as they lie in memory, and the softmax joins no lanes. Queries come in strips of 32 of one head. A tile has strips of
// several heads that share their keys, so that the sums of dk and dv are loaded and stored once for all of them.
#pragma once
#include "cpu/attention_backward_tile.h"

#if MK_AMX

namespace mk::MK_ISA {
namespace {

constexpr int64_t strip_queries = 32, block_keys = 32;
constexpr int64_t block_scores = block_keys * strip_queries;

struct MatrixTask : TaskKeys<bf16> {
  uint32_t *k, *v;                 // [held / 16][words / 16][16 keys][16 words]
  uint32_t* k_columns;             // [held / 32][32 columns][16 pairs of keys, 16 keys apart] for each 32 columns
  uint32_t* rows;                  // [32][row_words], a strip's q or dout
  uint32_t *q, *dout;              // [2][words][16 queries] of a strip
  uint32_t *q_pairs, *dout_pairs;  // [strips][2][16 pairs of queries][16 columns] for each 32 columns
  bf16 *p, *ds;                    // [span / 32][strips][32 keys][32 queries]
  uint32_t* ds_pairs;              // [span / 32][2][16 pairs of keys][16 queries] of a strip
  float *scores, *bases;           // [span / 32][scores and dp][32 keys][32 queries] and [span / 32][32] of a strip
  float* dq;                       // [columns][32 queries]
  int64_t strips, bytes;

  MatrixTask(const AttentionGradients& g, const GradientTask& task, char* scratch)
      : TaskKeys(g, task), strips(g.heads * g.rows / strip_queries) {
    Buffers from = {scratch};
    const int64_t blocks = span / block_keys;
    from.take(k, held * words);
    from.take(v, held * words);
    from.take(k_columns, held / 2 * columns);
    from.take(rows, strip_queries * row_words);
    from.take(q, strip_queries * words);
    from.take(dout, strip_queries * words);
    from.take(q_pairs, strips * strip_queries / 2 * columns);
    from.take(dout_pairs, strips * strip_queries / 2 * columns);
    from.take(p, blocks * strips * block_scores);
    from.take(ds, blocks * strips * block_scores);
    from.take(ds_pairs, blocks * block_scores / 2);
    from.take(scores, blocks * 2 * block_scores);
    from.take(bases, blocks * strip_queries);
    from.take(dq, columns * strip_queries);
    bytes = from.at - scratch;
  }
};

// The sums of dk and dv, of which the keys before `begun` hold something.
struct KeySums {
  const MatrixTask& t;
  float *dk, *dv;
  int64_t begun = 0;

  // Zeros up to `key`.
  void begin(int64_t key) {
    if (key <= begun) return;
    float* const both[] = {dk, dv};
    for (float* sums : both) __builtin_memset(sums + begun * t.columns, 0, (key - begun) * t.columns * sizeof(float));
    begun = key;
  }
};

// Where column d of block number `block` of 32 lies, of `blocks` that have each 32 columns one after the other.
MK_INLINE int64_t column_words(const MatrixTask& t, int64_t blocks, int64_t block, int64_t d) {
  const int64_t group = round_down(d, 2 * matrix_rows), width = least(2 * matrix_rows, t.columns - group);
  return (blocks * group + block * width + d - group) * matrix_words;
}

// 16 rows of words, transposed.
MK_INLINE void load_transposed(const uint32_t* from, int64_t row, vu (&x)[lanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++) x[i] = load_words<vu>(from + i * row);
  transpose(x);
}

// Of 32 keys from `key` on each column's elements side by side.
void pack_key_columns(const MatrixTask& t, int64_t key) {
  const uint32_t* from = t.k + key * t.words;
  for (int64_t w = 0; 2 * w < t.columns; w += lanes) {
    vu low[lanes], high[lanes];
    load_transposed(from + w * matrix_rows, matrix_words, low);
    load_transposed(from + (t.words + w) * matrix_rows, matrix_words, high);
    for (int64_t j = 0; j < least(lanes, t.columns / 2 - w); j++) {
      uint32_t* to = t.k_columns + column_words(t, t.held / block_keys, key / block_keys, 2 * (w + j));
      store_words(to, (low[j] & 0xffffu) | high[j] << 16);
      store_words(to + lanes, low[j] >> 16 | (high[j] & 0xffff0000u));
    }
  }
}

// A key, zeros where there is none.
MK_INLINE void pack_key(const MatrixTask& t, const bf16* row, int64_t key, uint32_t* to) {
  to += (round_down(key, matrix_rows) * t.words + key % matrix_rows * matrix_words);
  for (int64_t w = 0; w < t.words; w += matrix_words)
    store_words(to + w * matrix_rows, row ? row_words<PairsBf16>(row, w, t.a.dim) : vu{});
}

// Asks for a row of t.a.dim elements.
MK_INLINE void fetch_row(const MatrixTask& t, const void* row) {
  for (int64_t d = 0; d < t.a.dim; d += 32) __builtin_prefetch((const bf16*)row + d, 0, 2);
}

constexpr int64_t keys_ahead = 32;

void pack_keys_of(const MatrixTask& t, int64_t packed) {
  const int64_t there = t.s.keys - t.start;
  for (int64_t key = packed; key < t.keys; key++) {
    if (key + keys_ahead < there) {
      const Row row = find_key<bf16>(t.s, t.kv_head, t.start + key + keys_ahead);
      fetch_row(t, row.k);
      fetch_row(t, row.v);
    }
    const Row row = key < there ? find_key<bf16>(t.s, t.kv_head, t.start + key) : Row{};
    pack_key(t, (const bf16*)row.k, key, t.k);
    pack_key(t, (const bf16*)row.v, key, t.v);
    if (key % block_keys == block_keys - 1) pack_key_columns(t, key + 1 - block_keys);
  }
}

// `count` rows of q or dout as columns of scores and as pairs of rows, zeros behind them.
void pack_strip(const MatrixTask& t, const bf16* from, int64_t stride, int64_t count, double sign, int64_t index,
                uint32_t* columns, uint32_t* pairs) {
  for (int64_t i = 0; i < count; i++) pack_query<PairsBf16>(from + i * stride, t.a.dim, sign, t.rows + i * t.row_words);
  __builtin_memset(t.rows + count * t.row_words, 0, (strip_queries - count) * t.row_words * sizeof *t.rows);
  for (int64_t half = 0; half < 2; half++)
    for (int64_t w = 0; w < t.words; w += lanes) {
      vu x[lanes];
      load_transposed(t.rows + half * lanes * t.row_words + w, t.row_words, x);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) store_words(columns + (half * t.words + w + i) * lanes, x[i]);
    }
  for (int64_t d = 0; d < t.columns; d += lanes) {
    uint32_t* to = pairs + column_words(t, t.strips, index, d);
#pragma GCC unroll 4
    for (int64_t i = 0; i < strip_queries / 2; i++) {
      const bf16* even = (const bf16*)(t.rows + 2 * i * t.row_words) + d;
      store_words(to + i * lanes, pair(widen(load_words<vh>(even)), widen(load_words<vh>(even + 2 * t.row_words))));
    }
  }
}

// Of a strip's queries the keys that they see and what their softmax knows so far.
struct StripRows {
  vi first[2], end[2];               // keys that count from the tile's base
  vf top[2], base[2];                // the largest score, and what exponentials are relative to
  vf sum[2] = {}, weighted[2] = {};  // of them, and of them times dp
};

// Strip number `index` of a tile: `count` queries of a head from `first` on, and their keys.
struct Strip {
  int64_t index, head, first, count;
  Keys keys;

  const bf16* q(const MatrixTask& t) const { return (const bf16*)t.s.q + first * t.a.q_row + head * t.a.q_head; }
  const bf16* dout(const MatrixTask& t) const {
    return (const bf16*)t.d.dout + first * t.g.dout_row + head * t.g.dout_head;
  }
  bf16* out(const MatrixTask& t) const { return (bf16*)t.s.out + first * t.a.out_row + head * t.a.out_head; }
};

Strip strip_at(const MatrixTask& t, const Tile& tile, int64_t heads, int64_t index) {
  const int64_t row = index / heads * strip_queries, count = least(strip_queries, tile.count - row);
  return {index, tile.head + index % heads, tile.first + row, count, keys_of_strip(t, tile, row, count)};
}

// Asks for the rows that come next, q and dout, and for those that dq goes to.
MK_INLINE void fetch_ahead(const MatrixTask& t, const Strip& strip, const Strip& next, int64_t first, int64_t last) {
  for (int64_t i = first; i < least(last, next.count); i++) {
    fetch_row(t, next.q(t) + i * t.a.q_row);
    fetch_row(t, next.dout(t) + i * t.g.dout_row);
  }
  for (int64_t i = first; i < least(last, strip.count); i++) fetch_row(t, strip.out(t) + i * t.a.out_row);
}

StripRows rows_of(const MatrixTask& t, const Tile& tile, const Strip& strip) {
  StripRows rows;
  const int64_t base = t.start + tile.base;
  int32_t first[strip_queries], end[strip_queries];
  for (int64_t i = 0; i < strip_queries; i++) {
    first[i] = least(first_visible(t.a, t.s, strip.first + i) - base, INT32_MAX);
    end[i] = least(end_visible(t.a, t.s, strip.first + i), t.s.keys) - base;
  }
  for (int h = 0; h < 2; h++) {
    rows.first[h] = load_words<vi>(first + h * lanes);
    rows.end[h] = load_words<vi>(end + h * lanes);
    rows.top[h] = set1(-INFINITY);
  }
  return rows;
}

// Where a key is not seen its score becomes -inf, and dp 0.
MK_INLINE void mask_block(const StripRows& rows, int64_t key, float* s, float* dp) {
  for (int64_t j = 0; j < block_keys; j++)
    for (int h = 0; h < 2; h++) {
      const vi at = vi{} + int32_t(key + j);
      const vi seen = (at >= rows.first[h]) & (at < rows.end[h]);
      float *to = s + j * strip_queries + h * lanes, *to_dp = dp + j * strip_queries + h * lanes;
      store_words(to, seen ? load_words<vf>(to) : set1(-INFINITY));
      store_words(to_dp, seen ? load_words<vf>(to_dp) : vf{});
    }
}

MK_INLINE void new_bases(StripRows& rows, const float* s, float scale, float* bases) {
  vf top[2][2] = {{rows.top[0], rows.top[1]}, {rows.top[0], rows.top[1]}};
#pragma GCC unroll 4
  for (int64_t j = 0; j < block_keys; j += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) top[i][h] = max(load_words<vf>(s + (j + i) * strip_queries + h * lanes), top[i][h]);
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const Lagging next = lagging_base(rows.top[h], max(top[0][h], top[1][h]), scale);
    rows.top[h] = next.top;
    rows.base[h] = next.base;
    rows.sum[h] *= next.factor;
    rows.weighted[h] *= next.factor;
    store_words(bases + h * lanes, rows.base[h]);
  }
}

// Scores of a block become exponentials.
MK_INLINE void exponentials_of_block(StripRows& rows, float* s, const float* dp, float scale) {
  vf sum[2] = {}, weighted[2] = {};
#pragma GCC unroll 2
  for (int64_t j = 0; j < block_keys; j++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const int64_t at = j * strip_queries + h * lanes;
      const vf e = exp2_negative<5>(load_words<vf>(s + at) * scale - rows.base[h]);
      store_words(s + at, e);
      sum[h] += e;
      weighted[h] += e * load_words<vf>(dp + at);
    }
  for (int h = 0; h < 2; h++) {
    rows.sum[h] += sum[h];
    rows.weighted[h] += weighted[h];
  }
}

// What turns exponentials and dp into P = e * inverse, and dS = P * (dp - less).
struct Factors {
  vf inverse[2], less[2];
};

// What exponentials relative to the base `then` have to be multiplied by; anything finite where there were none.
MK_INLINE vf since(vf then, vf now) { return exp2_negative<5>(min(then - now, vf{})); }

Factors factors_of(const MatrixTask& t, const StripRows& rows, const Strip& strip) {
  float dlse[strip_queries] = {};
  const float* from = (const float*)t.d.dlse + strip.head * t.g.dlse_head + strip.first * t.g.dlse_row;
  for (int64_t i = 0; i < strip.count; i++) dlse[i] = from[i * t.g.dlse_row];
  Factors f;
  for (int h = 0; h < 2; h++) {
    f.inverse[h] = rows.sum[h] == 0.f ? vf{} : 1.f / rows.sum[h];
    f.less[h] = rows.weighted[h] * f.inverse[h] - load_words<vf>(dlse + h * lanes);
  }
  return f;
}

// P and dS of a block, and dS as pairs of keys; queries change places in these as unpacking has them.
MK_INLINE void gradients_of_block(const Factors& f, const float* e, const float* dp, uint32_t* p, uint32_t* ds,
                                  uint32_t* pairs) {
#pragma GCC unroll 2
  for (int64_t j = 0; j < block_keys / 2; j++) {
    vu gradients[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const int64_t at = (j + i * lanes) * strip_queries;
      vf prob[2], grad[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        prob[h] = load_words<vf>(e + at + h * lanes) * f.inverse[h];
        grad[h] = prob[h] * (load_words<vf>(dp + at + h * lanes) - f.less[h]);
      }
      gradients[i] = round_rows(grad[0], grad[1]);
      store_words(p + at / 2, round_rows(prob[0], prob[1]));
      store_words(ds + at / 2, gradients[i]);
    }
    const __m512i low = (__m512i)gradients[0], high = (__m512i)gradients[1];
    store_words(pairs + j * lanes, (vu)_mm512_unpacklo_epi16(low, high));
    store_words(pairs + matrix_block + j * lanes, (vu)_mm512_unpackhi_epi16(low, high));
  }
}

// Where a column of ds_pairs comes from.
MK_INLINE int64_t query_of_column(int64_t half, int64_t column) { return column / 4 * 8 + half * 4 + column % 4; }

void store_strip_dq(const MatrixTask& t, const Strip& strip) {
  bf16* out = strip.out(t);
  for (int64_t d = 0; d < t.a.dim; d += lanes)
    for (int64_t half = 0; half < 2; half++) {
      vf x[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) x[i] = load_words<vf>(t.dq + (d + i) * strip_queries + half * lanes);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) {
        const int64_t query = query_of_column(half, i);
        if (query < strip.count)
          store_columns<PairsBf16>(out + query * t.a.out_row, d, t.a.dim, x[i] * (float)t.a.scale);
      }
    }
}

// A factor whose registers lie one after the other, two side by side.
MK_INLINE Left left_blocks(const void* first, int64_t step) { return {first, 64, matrix_block * 4, step}; }
MK_INLINE Right right_blocks(const void* first, int64_t step) { return {first, 64, matrix_block * 4, step}; }

// Scores and dp of the keys from `key` on.
MK_INLINE void score_block(const MatrixTask& t, int64_t key, float* scores) {
  const auto multiply = [&](const uint32_t* keys, const uint32_t* queries, float* out) {
    multiply_matrices<false, 2, 2>({keys + key * t.words, 64, t.words * 64, matrix_block * 4},
                                   key_columns(queries, t.words, 0), t.words / matrix_words, out, strip_queries * 4,
                                   true);
  };
  multiply(t.k, t.q, scores);
  multiply(t.v, t.dout, scores + block_scores);
}

// Whether all queries of the strip see all keys of a block from `key` on.
MK_INLINE bool whole_block(const MatrixTask& t, const Strip& strip, int64_t key) {
  key += t.start;
  return first_visible(t.a, t.s, strip.first + strip_queries - 1) <= key &&
         key + block_keys <= least(t.s.keys, end_visible(t.a, t.s, strip.first));
}

// Exponentials of a strip's scores, and dp.
StripRows softmax_of_strip(const MatrixTask& t, const Tile& tile, const Strip& strip, const Strip& next) {
  const float scale = scaling(t.a.scale).magnitude * log2_e;
  const int64_t first = strip.keys.first, blocks = (strip.keys.last - first) / block_keys;
  StripRows rows = rows_of(t, tile, strip);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t key = first + b * block_keys;
    float *s = t.scores + b * 2 * block_scores, *dp = s + block_scores;
    score_block(t, key, s);
    fetch_ahead(t, strip, next, b * strip_queries / blocks, (b + 1) * strip_queries / blocks);
    if (!whole_block(t, strip, key)) mask_block(rows, key - tile.base, s, dp);
    new_bases(rows, s, scale, t.bases + b * strip_queries);
    exponentials_of_block(rows, s, dp, scale);
  }
  return rows;
}

// P and dS of a strip, and its dq.
void matrix_strip(const MatrixTask& t, const Tile& tile, const Strip& strip, const Strip& next) {
  const int64_t first = strip.keys.first, blocks = (strip.keys.last - first) / block_keys;
  const StripRows rows = softmax_of_strip(t, tile, strip, next);
  const Factors last = factors_of(t, rows, strip);
  // From the last block to the first, whose scores left the first-level cache long ago.
  for (int64_t b = blocks - 1; b >= 0; b--) {
    Factors f = last;
    for (int h = 0; h < 2; h++)
      f.inverse[h] *= since(load_words<vf>(t.bases + b * strip_queries + h * lanes), rows.base[h]);
    const float* s = t.scores + b * 2 * block_scores;
    const int64_t to = (((first - tile.base) / block_keys + b) * t.strips + strip.index) * block_scores;
    gradients_of_block(f, s, s + block_scores, (uint32_t*)(t.p + to), (uint32_t*)(t.ds + to),
                       t.ds_pairs + b * block_scores / 2);
  }
  each_registers(t.columns, [&]<int MT>(int64_t d, Registers<MT>) {
    const uint32_t* from = t.k_columns + column_words(t, t.held / block_keys, first / block_keys, d);
    multiply_matrices<false, MT, 2>(left_blocks(from, MT * matrix_block * 4),
                                    right_blocks(t.ds_pairs, block_scores * 2), blocks, t.dq + d * strip_queries,
                                    strip_queries * 4, true);
  });
  store_strip_dq(t, strip);
}

// dk and dv of 32 keys from `key` on, from `count` strips from the one with number `first` on. Meanwhile the sums that
// come next are asked for.
void add_block(const MatrixTask& t, const Tile& tile, int64_t key, int64_t first, int64_t count, KeySums& sums) {
  const bool fresh = key >= sums.begun;
  const int64_t at = ((key - tile.base) / block_keys * t.strips + first) * block_scores;
  const auto add = [&](const bf16* scores, const uint32_t* pairs, float* out) {
    each_registers(t.columns, [&]<int NT>(int64_t d, Registers<NT>) {
      float* const to = out + key * t.columns + d;
      const int64_t beside = d + 2 * matrix_rows, more = block_keys * t.columns;
      const float* next = beside < t.columns ? to + 2 * matrix_rows : to - d + more;
      const float* const end = next + more;
      multiply_matrices<false, 2, NT>(left_blocks(scores + at, block_scores * 2),
                                      right_blocks(pairs + column_words(t, t.strips, first, d), NT * matrix_block * 4),
                                      count, to, t.columns * 4, fresh, [&] {
                                        if (next >= end) return;
                                        __builtin_prefetch(next, 1);
                                        __builtin_prefetch(next + matrix_rows, 1);
                                        next += t.columns;
                                      });
    });
  };
  add(t.p, t.dout_pairs, sums.dv);
  add(t.ds, t.q_pairs, sums.dk);
  if (fresh) sums.begun = key + block_keys;
}

// Queries of `heads` heads from the tile's on.
void run_matrix_tile(const MatrixTask& t, const Tile& tile, int64_t heads, KeySums& sums) {
  const Matrices matrices;
  const int64_t strips = (tile.count + strip_queries - 1) / strip_queries * heads;
  for (int64_t i = 0; i < strips; i++) {
    const Strip strip = strip_at(t, tile, heads, i), next = strip_at(t, tile, heads, least(i + 1, strips - 1));
    pack_strip(t, strip.q(t), t.a.q_row, strip.count, scaling(t.a.scale).sign, i, t.q, t.q_pairs);
    pack_strip(t, strip.dout(t), t.g.dout_row, strip.count, 1, i, t.dout, t.dout_pairs);
    matrix_strip(t, tile, strip, next);
  }
  sums.begin(tile.base);
  int64_t first = 0, last = 0;
  const auto keys_of = [&](int64_t index) { return strip_at(t, tile, heads, index).keys; };
  for (int64_t key = tile.base; key < tile.end; key += block_keys) {
    while (first < strips && keys_of(first).last <= key) first++;
    last = most(first, last);
    while (last < strips && keys_of(last).first <= key) last++;
    add_block(t, tile, key, first, last - first, sums);
  }
}

// All tiles of a task, of `group` heads from `head` on.
void run_matrix_tiles(const MatrixTask& t, int64_t head, int64_t group, KeySums sums) {
  each_tile(t, [&](int64_t first, int64_t end) {
    for (int64_t h = 0; h < group; h += t.g.heads)
      run_matrix_tile(t, tile_at(t, head + h, first, end), least(t.g.heads, group - h), sums);
  });
  sums.begin(t.keys);
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

// The gradients of attention in bf16 by the matrix unit. Sums of dk and dv are kept transposed, [columns][keys]: so P
// and dS, which lie by pairs of rows, are right factors.
#pragma once
#include "cpu/attention_backward_tile.h"

#if MK_AMX

namespace mk::MK_ISA {
namespace {

// out = rows . panels for 16 MT rows and the keys [first, last).
template <int MT>
MK_INLINE void matrix_products(const Task<bf16>& t, const uint32_t* rows, const uint32_t* panels, Keys keys,
                               float* out) {
  for (int64_t key = keys.first; key < keys.last; key += 2 * lanes)
    multiply_matrices<false, MT, 2>(rows, t.row_words * 4, key_columns(panels, t.words, key), t.words / matrix_words,
                                    out + key - keys.first, t.span * 4, true);
}

// The same as strip() for `count` of 16 MT rows.
template <int MT>
void matrix_strip(const Task<bf16>& t, const Tile& tile, int64_t row, int64_t count) {
  const Keys keys = keys_of_strip(t, tile, row, count);
  matrix_products<MT>(t, t.q + row * t.row_words, t.k_panels, keys, t.scores);
  matrix_products<MT>(t, t.dout + row * t.row_words, t.v_panels, keys, t.dp);
  strip_gradients(t, tile, row, count, keys);
  each_registers(t.columns, [&]<int NT>(int64_t d, Registers<NT>) {
    multiply_matrices<false, MT, NT>(t.strip_ds, t.span * 2, value_rows(t.k_rows, t.columns, keys.first, d),
                                     (keys.last - keys.first) / 32, t.dq + d, t.columns * 4, true);
  });
  store_dq(t, tile, row, count);
}

// dk and dv, transposed, of the tile's keys, from the rows that see them; past the last query rows are zeros.
void add_matrix_gradients(const Task<bf16>& t, const Tile& tile, float* dk, float* dv) {
  const int64_t offset = t.s.keys - t.s.queries + tile.first - t.start, sums = t.sum_keys();
  for (int64_t key = tile.base; key < tile.end; key += 2 * lanes) {
    int64_t first = 0, last = tile.count;
    if (t.a.causal) {
      first = most(0, key - offset);
      if (t.a.window) last = least(last, key + 2 * lanes - 1 - offset + t.a.window);
    }
    first = round_down(first, 32);
    if (first >= last) continue;
    const int64_t steps = (last - first + 31) / 32, at = first / 2 * t.span + key - tile.base, row = t.span * 4;
    each_registers(t.columns, [&]<int MT>(int64_t d, Registers<MT>) {
      const int64_t from = (d * t.g.rows + first) / 2, to = d * sums + key;
      multiply_matrices<false, MT, 2>(t.dout_rows + from, t.g.rows * 2, {t.p + at, row, 64, 16 * row}, steps, dv + to,
                                      sums * 4, false);
      multiply_matrices<false, MT, 2>(t.q_rows + from, t.g.rows * 2, {t.ds + at, row, 64, 16 * row}, steps, dk + to,
                                      sums * 4, false);
    });
  }
}

// [rows][words] of pairs to [columns][rows] of bf16.
void transpose_rows(const Task<bf16>& t, int64_t rows, const uint32_t* from, uint32_t* to_words) {
  bf16* to = (bf16*)to_words;
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t w = 0; 2 * w < t.columns; w += lanes) {
      vu x[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; r++) x[r] = load_words<vu>(from + (i + r) * t.row_words + w);
      transpose(x);
      for (int64_t j = 0; j < lanes && 2 * (w + j) < t.columns; j++) {
        store_words(to + 2 * (w + j) * t.g.rows + i, narrow(x[j]));
        store_words(to + (2 * (w + j) + 1) * t.g.rows + i, narrow(x[j] >> 16));
      }
    }
}

void run_matrix_tile(const Task<bf16>& t, const Tile& tile, float* dk, float* dv) {
  const Matrices matrices;
  const int64_t rows = round_up(tile.count, 32), more = rows - tile.count, head = tile.head;
  const bf16* q = (const bf16*)t.s.q + tile.first * t.a.q_row + head * t.a.q_head;
  const bf16* dout = (const bf16*)t.d.dout + tile.first * t.g.dout_row + head * t.g.dout_head;
  for (int64_t i = 0; i < tile.count; i++) {
    pack_query<PairsBf16>(q + i * t.a.q_row, t.a.dim, scaling(t.a.scale).sign, t.q + i * t.row_words);
    pack_query<PairsBf16>(dout + i * t.g.dout_row, t.a.dim, 1, t.dout + i * t.row_words);
  }
  __builtin_memset(t.q + tile.count * t.row_words, 0, more * t.row_words * 4);
  __builtin_memset(t.dout + tile.count * t.row_words, 0, more * t.row_words * 4);
  transpose_rows(t, rows, t.q, t.q_rows);
  transpose_rows(t, rows, t.dout, t.dout_rows);
  for (int64_t row = 0; row < tile.count; row += 32) {
    const int64_t count = least(32, tile.count - row);
    if (count > matrix_rows)
      matrix_strip<2>(t, tile, row, count);
    else
      matrix_strip<1>(t, tile, row, count);
  }
  for (int64_t k = (tile.count + 1) / 2; k < rows / 2; k++) {
    __builtin_memset(t.p + k * t.span, 0, (tile.end - tile.base) * 4);
    __builtin_memset(t.ds + k * t.span, 0, (tile.end - tile.base) * 4);
  }
  add_matrix_gradients(t, tile, dk, dv);
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

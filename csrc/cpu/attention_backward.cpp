// A tile is some queries of one head over all keys that they see. Strips of its rows: scores and their gradients, the
// softmax of each row whole, dq. Then, with the tile's probabilities P and the gradients of its scores dS at hand,
// dV += P^T dO and dK += dS^T Q for all keys of the tile. The row sums of P dP come from these very scores, not from
// the rounded output: where one key takes all, dS is the small difference of the two.
#include "cpu/attention_backward.h"

#include "cpu/attention_pack.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t keys_of_sum = 512;  // float32 sums over keys are no longer than this

template <class T>
struct Task {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  using Vec = typename M::Vec;
  using Word = typename M::Word;
  const AttentionGradients& g;
  const Attention& a;
  const AttentionSequence& s;
  const GradientSequence& d;
  int64_t kv_head, words, row_words, columns, start, keys, span;
  Word *k_panels, *v_panels, *k_rows;  // K and V as columns of scores, K as rows
  Word *q, *dout;                      // [rows][row_words]
  Word *q_rows, *dout_rows;            // [rows / step][columns]; where the matrix unit multiplies, [columns][rows]
  Word *p, *ds;                        // [rows / step][span]
  Word* strip_ds;                      // [rows_of_strip][span / step]
  Scalar *scores, *dp, *dq;            // [rows_of_strip][span], twice, and [rows_of_strip][columns]
  int64_t bytes;

  // Keys count from `start`, a whole panel; a tile's from its own first panel on.
  Task(const AttentionGradients& g, int64_t sequence, int64_t kv_head, char* scratch)
      : g(g), a(g.a), s(a.sequences[sequence]), d(g.sequences[sequence]), kv_head(kv_head) {
    constexpr int64_t n = panel_keys<M>;
    words = key_words<M>(a.dim);
    row_words = query_words<M>(a.dim);
    columns = value_columns<M>(a.dim);
    start = round_down(first_visible(a, s, 0), n);
    keys = round_up(s.keys - start, n);
    span = least(keys, a.causal && a.window ? round_up(a.window + g.rows, n) + n : keys) + 2 * n;
    char* at = scratch;
    const auto take = [&at](auto*& to, int64_t count) {
      to = (decltype(to + 0))at;
      at += round_up(count * (int64_t)sizeof(*to), 64);
    };
    take(k_panels, keys * words);
    take(v_panels, keys * words);
    take(k_rows, keys / M::step * columns);
    take(q, g.rows * row_words);
    take(dout, g.rows * row_words);
    take(q_rows, g.rows / M::step * columns);
    take(dout_rows, g.rows / M::step * columns);
    take(p, g.rows / M::step * span);
    take(ds, g.rows / M::step * span);
    take(strip_ds, rows_of_strip<M> * span / M::step);
    take(scores, rows_of_strip<M> * span);
    take(dp, rows_of_strip<M> * span);
    take(dq, rows_of_strip<M> * columns);
    bytes = at - scratch;
  }

  // Keys of the sums: [sum_keys()][columns], or [columns][sum_keys()] where the matrix unit multiplies.
  int64_t sum_keys() const { return keys + (by_matrices<M> ? lanes : strip_rows); }
};

// Queries [first, first + count) of a head, and their keys [base, end), which count from the task's start.
struct Tile {
  int64_t head, first, count, base, end;
};

template <class T>
void pack_keys_of(const Task<T>& t) {
  using M = typename Task<T>::M;
  constexpr int64_t n = panel_keys<M>;
  for (int64_t key = 0; key < t.keys; key += n) {
    const int64_t count = least(n, t.s.keys - t.start - key);
    const T *k[n], *v[n];
    for (int64_t i = 0; i < count; i++) {
      const Row row = find_key<T>(t.s, t.kv_head, t.start + key + i);
      k[i] = (const T*)row.k;
      v[i] = (const T*)row.v;
    }
    pack_keys<M>(k, count, t.a.dim, t.k_panels + key * t.words);
    pack_keys<M>(v, count, t.a.dim, t.v_panels + key * t.words);
    pack_values<M>(k, count, t.a.dim, t.k_rows + key / M::step * t.columns);
  }
}

// Rows as words one by one, with the sign, and as pairs of rows.
template <class T>
void pack_rows_of(const Task<T>& t, const T* from, int64_t stride, int64_t count, double sign,
                  typename Task<T>::Word* row, typename Task<T>::Word* pairs) {
  using M = typename Task<T>::M;
  for (int64_t i = 0; i < count; i++) pack_query<M>(from + i * stride, t.a.dim, sign, row + i * t.row_words);
  for (int64_t i = 0; i < count; i += M::step)
    for (int64_t d = 0; d < t.columns; d += M::width) {
      if constexpr (M::step == 1)
        store_words(pairs + i * t.columns + d, row_words<M>(from + i * stride, d, t.a.dim));
      else
        store_words(pairs + i / 2 * t.columns + d,
                    pair(raw_words(from + i * stride + d, t.a.dim - d),
                         i + 1 < count ? raw_words(from + (i + 1) * stride + d, t.a.dim - d) : vu{}));
    }
}

// out = rows . panel for MR rows and NV vectors of keys; long dot products are summed in parts, as in the forward.
template <class M, int MR, int NV>
MK_INLINE void row_products(const typename M::Word* row, int64_t row_words, int64_t words,
                            const typename M::Word* panel, typename M::Scalar* out, int64_t out_row) {
  constexpr int64_t n = panel_keys<M>, part = lanes == 4 ? 32 : 64;
  for (int64_t first = 0; first < words; first += part) {
    typename M::Vec c[MR][NV] = {};
    multiply<M>(row + first, row_words, least(part, words - first), c, [&](int64_t k, int v) {
      return load_words<typename M::Words>(panel + (first + k) * n + v * M::width);
    });
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        typename M::Scalar* to = out + r * out_row + v * M::width;
        store_words(to, first ? load_words<typename M::Vec>(to) + c[r][v] : c[r][v]);
      }
  }
}

// Products of MR rows with the packed keys [first, last), which count from the task's start.
template <class M, int MR>
void all_products(const typename M::Word* row, int64_t row_words, int64_t words, const typename M::Word* panels,
                  int64_t first, int64_t last, typename M::Scalar* out, int64_t out_row) {
  constexpr int64_t n = panel_keys<M>, half = 2 * M::width;
  for (int64_t key = first; key < last;) {
    const typename M::Word* panel = panels + key / n * n * words + key % n;
    if (strip_vectors == 4 && (key % n || last - key < n)) {
      row_products<M, MR, 2>(row, row_words, words, panel, out + key - first, out_row);
      key += half;
    } else {
      row_products<M, MR, strip_vectors>(row, row_words, words, panel, out + key - first, out_row);
      key += n;
    }
  }
}

// f(j) for the vectors of each block of keys, and end_block() behind each.
template <class M, class F, class End>
MK_INLINE void each_vector(int64_t n, F f, End end_block) {
  for (int64_t block = 0; block < n; block += keys_of_sum) {
    for (int64_t j = block; j < least(n, block + keys_of_sum); j += M::width) f(j);
    end_block();
  }
}

// What the whole row has in common is as exact as it can be where the result is float32: an error in it does not
// average out over the keys.
template <class M>
MK_INLINE double wide_total(typename M::Vec v) {
  if constexpr (M::step == 2) return total<M>(v);
  double whole = 0;
  for (int i = 0; i < M::width; i++) whole += v[i];
  return whole;
}

// What turns a row's exponentials e into probabilities e * inverse, and its dp into gradients of the scaled scores,
// p * (dp - less - rest).
template <class Scalar>
struct RowFactors {
  Scalar inverse, less, rest;
};

// Scores become exponentials relative to the largest. Of a row that sees no key they and dp become 0.
template <class M>
RowFactors<typename M::Scalar> exponentials_of_row(typename M::Scalar* s, typename M::Scalar* dp, int64_t n,
                                                   typename M::Scalar scale, double dlse) {
  using Vec = typename M::Vec;
  using Scalar = typename M::Scalar;
  const Scalar highest = n ? largest_of_row<M>(s, n) : Scalar(-INFINITY);
  if (highest == -INFINITY) {
    __builtin_memset(s, 0, n * sizeof(Scalar));
    __builtin_memset(dp, 0, n * sizeof(Scalar));
    return {0, 0, 0};
  }
  double sum = 0, delta = 0;
  Vec part = {}, weighted = {};
  each_vector<M>(
      n,
      [&](int64_t j) {
        const Vec e = exp2_negative<M::degree>((load_words<Vec>(s + j) - highest) * scale);
        store_words(s + j, e);
        part += e;
        weighted += e * load_words<Vec>(dp + j);
      },
      [&] {
        sum += wide_total<M>(part);
        delta += wide_total<M>(weighted);
        part = weighted = Vec{};
      });
  const double exact = delta / sum - dlse;
  const Scalar less = Scalar(exact);
  return {Scalar(1 / sum), less, Scalar(exact - less)};
}

#if MK_BF16

// Two rows rounded to bf16: the first one's numbers in the lower half.
MK_INLINE vu round_rows(vf even, vf odd) { return (vu)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even); }

// Of such the pairs of both.
MK_INLINE vu pairs_of_rows(vu rows) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  return (vu)__builtin_shufflevector((Halves)rows, (Halves)rows, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

#endif

// Exponentials and dp of a row, or of a pair of them `stride` elements apart: dS as rows, P and dS as words of pairs.
template <class M>
MK_INLINE void store_gradients(const typename M::Scalar* s, const typename M::Scalar* dp, int64_t stride, int64_t n,
                               const RowFactors<typename M::Scalar>* rows, typename M::Word* ds_rows,
                               typename M::Word* p, typename M::Word* ds) {
  using Vec = typename M::Vec;
  for (int64_t j = 0; j < n; j += M::width) {
    Vec prob[M::step], grad[M::step];
#pragma GCC unroll 2
    for (int r = 0; r < M::step; r++) {
      prob[r] = load_words<Vec>(s + r * stride + j) * rows[r].inverse;
      grad[r] = prob[r] * (load_words<Vec>(dp + r * stride + j) - rows[r].less - (M::step == 1 ? rows[r].rest : 0));
    }
    if constexpr (M::step == 1) {
      store_words(ds_rows + j, grad[0]);
      store_words(p + j, prob[0]);
      store_words(ds + j, grad[0]);
    } else {
#if MK_BF16
      const vu both = round_rows(grad[0], grad[1]);
      _mm256_storeu_si256((__m256i*)(ds_rows + j / 2), _mm512_castsi512_si256((__m512i)both));
      _mm256_storeu_si256((__m256i*)(ds_rows + (stride + j) / 2), _mm512_extracti64x4_epi64((__m512i)both, 1));
      store_words(p + j, pairs_of_rows(round_rows(prob[0], prob[1])));
      store_words(ds + j, pairs_of_rows(both));
#endif
    }
  }
}

// out[r] += or, where `fresh`, = a[r] . rows, for NV vectors of columns.
template <class M, int MR, int NV>
MK_INLINE void add_columns(const typename M::Word* a, int64_t a_row, int64_t steps, const typename M::Word* rows,
                           int64_t columns, bool fresh, typename M::Scalar* out) {
  typename M::Vec c[MR][NV] = {};
  multiply<M>(a, a_row, steps, c,
              [&](int64_t k, int v) { return load_words<typename M::Words>(rows + k * columns + v * M::width); });
#pragma GCC unroll 6
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      typename M::Scalar* to = out + r * columns + v * M::width;
      store_words(to, fresh ? c[r][v] : load_words<typename M::Vec>(to) + c[r][v]);
    }
}

// out[j] += a[., j] . rows for strip_rows keys j, which lie side by side in `a`.
template <class M, int NV>
MK_INLINE void add_transposed(const typename M::Word* a, int64_t a_step, int64_t steps, const typename M::Word* rows,
                              int64_t columns, typename M::Scalar* out) {
  typename M::Vec c[strip_rows][NV] = {};
  for (int64_t k = 0; k < steps; k++) {
    typename M::Words b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = load_words<typename M::Words>(rows + k * columns + v * M::width);
#pragma GCC unroll 6
    for (int r = 0; r < strip_rows; r++) {
      const typename M::Words x = M::splat(a[k * a_step + r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) M::multiply_add(c[r][v], x, b[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < strip_rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      typename M::Scalar* to = out + r * columns + v * M::width;
      store_words(to, load_words<typename M::Vec>(to) + c[r][v]);
    }
}

template <int>
struct Vectors {};

// f(column, how many vectors) over all columns.
template <class M, class F>
MK_INLINE void each_columns(int64_t columns, F f) {
  int64_t d = 0;
  for (; d + strip_vectors * M::width <= columns; d += strip_vectors * M::width) f(d, Vectors<strip_vectors>());
  if (strip_vectors == 4 && d + 2 * M::width <= columns) {
    f(d, Vectors<2>());
    d += 2 * M::width;
  }
  if (d < columns) f(d, Vectors<1>());
}

// Keys [first, last) of a tile that count from the task's start, in units of two vectors.
struct Keys {
  int64_t first, last;
};

// Those that any of `count` rows sees.
template <class T>
MK_INLINE Keys keys_of_strip(const Task<T>& t, const Tile& tile, int64_t row, int64_t count) {
  constexpr int64_t unit = 2 * Task<T>::M::width;
  const int64_t query = tile.first + row;
  const int64_t seen = round_down(most(first_visible(t.a, t.s, query) - t.start, 0), unit);
  const int64_t first = least(tile.end, most(tile.base, seen));
  const int64_t end = round_up(end_visible(t.a, t.s, query + count - 1) - t.start, unit);
  return {first, most(first, least(tile.end, end))};
}

// Of `count` rows' scores and dp: dS as rows, and both P and dS as pairs of rows, zeros outside the strip's keys. An odd
// last row is paired with zeros.
template <class T>
MK_INLINE void strip_gradients(const Task<T>& t, const Tile& tile, int64_t row, int64_t count, Keys keys) {
  using M = typename Task<T>::M;
  using Scalar = typename M::Scalar;
  using Word = typename M::Word;
  const int64_t query = tile.first + row, span = t.span, first = keys.first, n = keys.last - first;
  const int64_t before = first - tile.base, behind = tile.end - keys.last;
  const Scalar scale = (Scalar)(scaling(t.a.scale).magnitude * log2_e);
  for (int64_t pair = 0; pair < count; pair += M::step) {
    Scalar *s = t.scores + pair * span, *dp = t.dp + pair * span;
    const int64_t there = least(M::step, count - pair);
    RowFactors<Scalar> factors[M::step] = {};
    for (int64_t i = 0; i < there; i++) {
      const int64_t r = pair + i;
      const Scalar* dlse = (const Scalar*)t.d.dlse + tile.head * t.g.dlse_head + (query + r) * t.g.dlse_row;
      mask_row<M>(s + i * span, n, first_visible(t.a, t.s, query + r) - t.start - first,
                  end_visible(t.a, t.s, query + r) - t.start - first);
      factors[i] = exponentials_of_row<M>(s + i * span, dp + i * span, n, scale, *dlse);
    }
    for (int64_t i = there; i < M::step; i++) {
      __builtin_memset(s + i * span, 0, n * sizeof(Scalar));
      __builtin_memset(dp + i * span, 0, n * sizeof(Scalar));
    }
    const int64_t at = (row + pair) / M::step * span;
    Word* const pairs[] = {t.p + at, t.ds + at};
    for (Word* to : pairs) {
      __builtin_memset(to, 0, before * sizeof(Word));
      __builtin_memset(to + before + n, 0, behind * sizeof(Word));
    }
    store_gradients<M>(s, dp, span, n, factors, t.strip_ds + pair * span / M::step, pairs[0] + before,
                       pairs[1] + before);
  }
}

// A vector of columns of a row, from column d on, as far as there are any.
template <class M, class T>
MK_INLINE void store_columns(T* row, int64_t d, int64_t dim, typename M::Vec v) {
  if (d + M::width <= dim)
    store(row + d, v);
  else
    store_n(row + d, v, dim - d);
}

template <class T>
MK_INLINE void store_dq(const Task<T>& t, const Tile& tile, int64_t row, int64_t count) {
  using M = typename Task<T>::M;
  using Scalar = typename M::Scalar;
  for (int r = 0; r < count; r++) {
    T* out = (T*)t.s.out + (tile.first + row + r) * t.a.out_row + tile.head * t.a.out_head;
    for (int64_t d = 0; d < t.a.dim; d += M::width)
      store_columns<M>(out, d, t.a.dim, load_words<typename M::Vec>(t.dq + r * t.columns + d) * (Scalar)t.a.scale);
  }
}

template <class T, int MR>
void strip(const Task<T>& t, const Tile& tile, int64_t row) {
  using M = typename Task<T>::M;
  const int64_t span = t.span;
  const Keys keys = keys_of_strip(t, tile, row, MR);
  const int64_t first = keys.first, last = keys.last, n = last - first;
  all_products<M, MR>(t.q + row * t.row_words, t.row_words, t.words, t.k_panels, first, last, t.scores, span);
  all_products<M, MR>(t.dout + row * t.row_words, t.row_words, t.words, t.v_panels, first, last, t.dp, span);
  strip_gradients(t, tile, row, MR, keys);
  for (int64_t key = 0; key == 0 || key < n; key += keys_of_sum)
    each_columns<M>(t.columns, [&]<int NV>(int64_t d, Vectors<NV>) {
      add_columns<M, MR, NV>(t.strip_ds + key / M::step, span / M::step, most(least(keys_of_sum, n - key), 0) / M::step,
                             t.k_rows + (first + key) / M::step * t.columns + d, t.columns, key == 0, t.dq + d);
    });
  store_dq(t, tile, row, MR);
}

template <class T>
void any_strip(const Task<T>& t, const Tile& tile, int64_t row) {
  switch (tile.count - row) {
    case 1:
      return strip<T, 1>(t, tile, row);
    case 2:
      return strip<T, 2>(t, tile, row);
    case 3:
      return strip<T, 3>(t, tile, row);
    case 4:
      return strip<T, 4>(t, tile, row);
    case 5:
      return strip<T, 5>(t, tile, row);
    default:
      return strip<T, 6>(t, tile, row);
  }
}

// dk and dv of the tile's keys, from the rows that see them.
template <class T>
void add_key_gradients(const Task<T>& t, const Tile& tile, typename Task<T>::Scalar* dk, typename Task<T>::Scalar* dv) {
  using M = typename Task<T>::M;
  const int64_t offset = t.s.keys - t.s.queries + tile.first - t.start;  // where the first row's own key lies
  for (int64_t key = tile.base; key < tile.end; key += strip_rows) {
    int64_t first = 0, last = tile.count;
    if (t.a.causal) {
      first = most(0, key - offset);
      if (t.a.window) last = least(last, key + strip_rows - 1 - offset + t.a.window);
    }
    first = round_down(first, M::step) / M::step;
    last = round_up(last, M::step) / M::step;
    if (first >= last) continue;
    const int64_t at = first * t.span + key - tile.base, to = key * t.columns;
    each_columns<M>(t.columns, [&]<int NV>(int64_t d, Vectors<NV>) {
      add_transposed<M, NV>(t.p + at, t.span, last - first, t.dout_rows + first * t.columns + d, t.columns,
                            dv + to + d);
      add_transposed<M, NV>(t.ds + at, t.span, last - first, t.q_rows + first * t.columns + d, t.columns, dk + to + d);
    });
  }
}

#if MK_AMX

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

#endif

template <class T>
void run_tile(const Task<T>& t, const Tile& tile, typename Task<T>::Scalar* dk, typename Task<T>::Scalar* dv) {
  using M = typename Task<T>::M;
#if MK_AMX
  if constexpr (by_matrices<M>) return run_matrix_tile(t, tile, dk, dv);
#endif
  const T* q = (const T*)t.s.q + tile.first * t.a.q_row + tile.head * t.a.q_head;
  const T* dout = (const T*)t.d.dout + tile.first * t.g.dout_row + tile.head * t.g.dout_head;
  pack_rows_of(t, q, t.a.q_row, tile.count, scaling(t.a.scale).sign, t.q, t.q_rows);
  pack_rows_of(t, dout, t.g.dout_row, tile.count, 1, t.dout, t.dout_rows);
  for (int64_t row = 0; row < tile.count; row += strip_rows) any_strip(t, tile, row);
  // The keys side by side behind the last are read as well.
  for (int64_t k = 0; k < round_up(tile.count, M::step) / M::step; k++)
    for (int64_t j = tile.end - tile.base; j < tile.end - tile.base + strip_rows; j++)
      t.p[k * t.span + j] = t.ds[k * t.span + j] = 0;
  add_key_gradients(t, tile, dk, dv);
}

template <class T>
void run(const AttentionGradients& g, const GradientTask& task, char* scratch, char* sums) {
  using M = typename Task<T>::M;
  using Scalar = typename M::Scalar;
  const Task<T> t(g, task.sequence, task.kv_head, scratch);
  Scalar *dk = (Scalar*)sums, *dv = dk + t.sum_keys() * t.columns;
  __builtin_memset(sums, 0, 2 * t.sum_keys() * t.columns * sizeof(Scalar));
  pack_keys_of(t);
  const int64_t group = t.a.heads / t.a.kv_heads;
  for (int64_t first = task.part * g.rows; first < t.s.queries; first += task.parts * g.rows) {
    Tile tile = {0, first, least(g.rows, t.s.queries - first), 0, 0};
    const int64_t from = most(first_visible(t.a, t.s, first) - t.start, 0);
    tile.base = least(round_down(from, panel_keys<M>), t.keys);
    tile.end = most(tile.base, round_up(end_visible(t.a, t.s, first + tile.count - 1) - t.start, 2 * M::width));
    for (tile.head = task.kv_head * group; tile.head < (task.kv_head + 1) * group; tile.head++)
      run_tile(t, tile, dk, dv);
  }
}

// One key's sums of `lanes` columns over all parts, or where the matrix unit multiplies one column's of `lanes` keys.
template <class M>
MK_INLINE typename M::Vec sum_of_parts(const char* sums, int64_t parts, int64_t sums_bytes, int64_t at) {
  typename M::Vec v = {};
  for (int64_t p = 0; p < parts; p++)
    v += load_words<typename M::Vec>((const typename M::Scalar*)(sums + p * sums_bytes) + at);
  return v;
}

template <class T>
void finish(const AttentionGradients& g, const GradientTask& task, char* sums, int64_t sums_bytes) {
  using M = typename Task<T>::M;
  using Scalar = typename M::Scalar;
  using Vec = typename M::Vec;
  const Task<T> t(g, task.sequence, task.kv_head, nullptr);
  const int64_t row = t.a.kv_heads * t.a.dim, second = t.sum_keys() * t.columns;
  // The unit's q has the sign of the scale already.
  const Scalar scale = (Scalar)(by_matrices<M> ? scaling(t.a.scale).magnitude : t.a.scale);
  const auto write = [&](int which, int64_t key, int64_t d, Vec v) {
    T* out = (T*)(which ? t.d.dv : t.d.dk) + key * row + task.kv_head * t.a.dim;
    store_columns<M>(out, d, t.a.dim, which ? v : v * scale);
  };
  const auto sum = [&](int64_t at) { return sum_of_parts<M>(sums, task.parts, sums_bytes, at); };
  for (int64_t key = 0; key < t.start; key++)
    for (int which = 0; which < 2; which++)
      for (int64_t d = 0; d < t.a.dim; d += M::width) write(which, key, d, Vec{});
  for (int64_t key = t.start; key < t.s.keys; key += by_matrices<M> ? M::width : 1)
    for (int which = 0; which < 2; which++)
      for (int64_t d = 0; d < t.a.dim; d += M::width) {
        if constexpr (by_matrices<M>) {
          Vec block[M::width];
          for (int i = 0; i < M::width; i++) block[i] = sum(which * second + (d + i) * t.sum_keys() + key - t.start);
          transpose(block);
          for (int64_t i = 0; i < least(M::width, t.s.keys - key); i++) write(which, key + i, d, block[i]);
        } else {
          write(which, key, d, sum(which * second + (key - t.start) * t.columns + d));
        }
      }
}

template <class T>
AttentionBackwardKernels::Sizes sizes(const AttentionGradients& g, int64_t sequence) {
  const Task<T> t(g, sequence, 0, nullptr);
  return {t.bytes, round_up(2 * t.sum_keys() * t.columns * (int64_t)sizeof(typename Task<T>::Scalar), 64)};
}

}  // namespace

const AttentionBackwardKernels attention_backward = {
    {12, by_matrices<PairsBf16> ? 32 : 12, 12, 12},
    {sizes<float>, sizes<bf16>, sizes<f16>, sizes<double>},
    {run<float>, run<bf16>, run<f16>, run<double>},
    {finish<float>, finish<bf16>, finish<f16>, finish<double>},
};

}  // namespace mk::MK_ISA

// A tile is some queries of one head over all keys that they see. Strips of its rows: scores and their gradients, the
// softmax of each row whole, dq. Then, with the tile's probabilities P and the gradients of its scores dS at hand,
// dV += P^T dO and dK += dS^T Q for all keys of the tile. The row sums of P dP come from these very scores, not from
// the rounded output: where one key takes all, dS is the small difference of the two.
#include "cpu/attention_backward.h"

#include "cpu/attention_backward_matrix.h"

namespace mk::MK_ISA {
namespace {

template <class T>
struct TaskFor {
  using type = Task<T>;
};
#if MK_AMX
template <>
struct TaskFor<bf16> {
  using type = MatrixTask;
};
#endif
template <class T>
using TaskOf = typename TaskFor<T>::type;

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

template <class T>
void run_tile(const Task<T>& t, const Tile& tile, typename Task<T>::Scalar* dk, typename Task<T>::Scalar* dv) {
  using M = typename Task<T>::M;
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
int64_t run(const AttentionGradients& g, const GradientTask& task, char* scratch, int64_t packed) {
  using Scalar = typename TaskKeys<T>::Scalar;
  const TaskOf<T> t(g, task, scratch);
  const NoSubnormals no_subnormals;
  const int64_t group = t.a.heads / t.a.kv_heads, head = task.kv_head * group;
  Scalar *dk = (Scalar*)task.sums, *dv = dk + t.sum_keys() * t.columns;
  pack_keys_of(t, packed);
  if constexpr (by_matrices<typename TaskKeys<T>::M>) {
#if MK_AMX
    run_matrix_tiles(t, head, group, {t, dk, dv});
#endif
  } else {
    __builtin_memset(task.sums, 0, 2 * t.sum_keys() * t.columns * sizeof(Scalar));
    each_tile(t, [&](int64_t first, int64_t end) {
      for (int64_t h = 0; h < group; h++) run_tile(t, tile_at(t, head + h, first, end), dk, dv);
    });
  }
  return most(packed, t.keys);
}

// The sums of all parts.
template <class T>
struct Sums {
  using M = typename Task<T>::M;
  using Vec = typename M::Vec;
  struct Part {
    const typename M::Scalar* sums;
    int64_t start, keys, second;
  };
  Part parts[most_parts];
  int64_t count, columns;

  Sums(const AttentionGradients& g, const GradientTask* tasks, int64_t count)
      : count(count), columns(value_columns<M>(g.a.dim)) {
    for (int64_t i = 0; i < count; i++) {
      const TaskKeys<T> t(g, tasks[i]);
      parts[i] = {(const typename M::Scalar*)tasks[i].sums, t.start, t.keys, t.sum_keys() * columns};
    }
  }

  // Of dk, or with `which` dv, one key's columns from d on.
  Vec add_up(int which, int64_t key, int64_t d) const {
    Vec v = {};
    for (int64_t p = 0; p < count; p++) {
      const Part& part = parts[p];
      const int64_t at = key - part.start;
      if (at >= 0 && at < part.keys) v += load_words<Vec>(part.sums + which * part.second + at * columns + d);
    }
    return v;
  }
};

template <class T>
void finish(const AttentionGradients& g, const GradientTask* parts, int64_t count, int64_t first, int64_t last) {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  const Attention& a = g.a;
  const GradientSequence& to = g.sequences[parts->sequence];
  // The unit's q has the sign of the scale already.
  const Scalar scale = (Scalar)(by_matrices<M> ? scaling(a.scale).magnitude : a.scale);
  const Sums<T> all(g, parts, count);
  for (int64_t key = first; key < last; key++) {
    const int64_t at = (key * a.kv_heads + parts->kv_head) * a.dim;
    for (int64_t d = 0; d < a.dim; d += M::width) {
      store_columns<M>((T*)to.dk + at, d, a.dim, all.add_up(0, key, d) * scale);
      store_columns<M>((T*)to.dv + at, d, a.dim, all.add_up(1, key, d));
    }
  }
}

template <class T>
AttentionBackwardKernels::Sizes sizes(const AttentionGradients& g, const GradientTask& task) {
  const TaskOf<T> t(g, task, nullptr);
  return {t.bytes, t.sums_bytes()};
}

}  // namespace

const AttentionBackwardKernels attention_backward = {
    {12, by_matrices<PairsBf16> ? 32 : 12, 12, 12},
    {false, by_matrices<PairsBf16>, false, false},
    {sizes<float>, sizes<bf16>, sizes<f16>, sizes<double>},
    {run<float>, run<bf16>, run<f16>, run<double>},
    {finish<float>, finish<bf16>, finish<f16>, finish<double>},
};

}  // namespace mk::MK_ISA

// What the gradients of attention consist of: the keys of a task, the buffers of one that works with vectors, keys and
// values packed once, and the softmax of a strip's rows with the gradients of its scores.
#pragma once
#include "cpu/attention_backward.h"
#include "cpu/attention_pack.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t keys_of_sum = 512;  // float32 sums over keys are no longer than this

// The tiles of a task and the keys that they see. Keys count from `start`, a whole panel, and are those that the part's
// queries see; a tile's count from its own first panel on, and are at most `span`. There is room for `held` packed
// keys: without a window all tasks of a KV head find them in one place.
template <class T>
struct TaskKeys {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  const AttentionGradients& g;
  const Attention& a;
  const AttentionSequence& s;
  const GradientSequence& d;
  const GradientTiles (&tiles)[2];
  int64_t kv_head, words, row_words, columns, start, keys, held, span;

  TaskKeys(const AttentionGradients& g, const GradientTask& task)
      : g(g),
        a(g.a),
        s(a.sequences[task.sequence]),
        d(g.sequences[task.sequence]),
        tiles(task.tiles),
        kv_head(task.kv_head) {
    constexpr int64_t n = panel_keys<M>;
    words = key_words<M>(a.dim);
    row_words = query_words<M>(a.dim);
    columns = value_columns<M>(a.dim);
    const int64_t last = most(tiles[0].last, tiles[1].last);
    start = round_down(first_visible(a, s, tiles[0].first), n);
    keys = most(0, round_up(end_visible(a, s, last - 1) - start, n));
    held = windowed(a) ? keys : round_up(s.keys, n);
    span = least(keys, windowed(a) ? round_up(a.window + g.rows, n) + n : keys) + 2 * n;
  }

  // Keys of the sums, [sum_keys()][columns].
  int64_t sum_keys() const { return keys + (by_matrices<M> ? 0 : strip_rows); }
  int64_t sums_bytes() const { return round_up(2 * sum_keys() * columns * (int64_t)sizeof(Scalar), 64); }
};

// Buffers one after the other.
struct Buffers {
  char* at;

  template <class T>
  void take(T*& to, int64_t count) {
    to = (T*)at;
    at += round_up(count * (int64_t)sizeof(T), 64);
  }
};

template <class T>
struct Task : TaskKeys<T> {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  using Vec = typename M::Vec;
  using Word = typename M::Word;
  Word *k_panels, *v_panels, *k_rows;  // K and V as columns of scores, K as rows
  Word *q, *dout;                      // [rows][row_words]
  Word *q_rows, *dout_rows;            // [rows / step][columns]
  Word *p, *ds;                        // [rows / step][span]
  Word* strip_ds;                      // [strip_rows][span / step]
  Scalar *scores, *dp, *dq;            // [strip_rows][span], twice, and [strip_rows][columns]
  int64_t bytes;

  Task(const AttentionGradients& g, const GradientTask& task, char* scratch) : TaskKeys<T>(g, task) {
    const int64_t held = this->held, span = this->span, columns = this->columns;
    Buffers from = {scratch};
    from.take(k_panels, held * this->words);
    from.take(v_panels, held * this->words);
    from.take(k_rows, held / M::step * columns);
    from.take(q, g.rows * this->row_words);
    from.take(dout, g.rows * this->row_words);
    from.take(q_rows, g.rows / M::step * columns);
    from.take(dout_rows, g.rows / M::step * columns);
    from.take(p, g.rows / M::step * span);
    from.take(ds, g.rows / M::step * span);
    from.take(strip_ds, strip_rows * span / M::step);
    from.take(scores, strip_rows * span);
    from.take(dp, strip_rows * span);
    from.take(dq, strip_rows * columns);
    bytes = from.at - scratch;
  }
};

// Queries [first, first + count) of a head, and their keys [base, end), which count from the task's start.
struct Tile {
  int64_t head, first, count, base, end;
};

// f(first, end) for the queries of each tile.
template <class T, class F>
MK_INLINE void each_tile(const TaskKeys<T>& t, F f) {
  for (const GradientTiles& tiles : t.tiles)
    for (int64_t first = tiles.first; first < tiles.last; first += t.g.rows)
      f(first, least(first + t.g.rows, tiles.last));
}

// The tile of the queries [first, end).
template <class T>
Tile tile_at(const TaskKeys<T>& t, int64_t head, int64_t first, int64_t end) {
  using M = typename TaskKeys<T>::M;
  Tile tile = {head, first, end - first, 0, 0};
  const int64_t from = most(first_visible(t.a, t.s, first) - t.start, 0);
  tile.base = least(round_down(from, panel_keys<M>), t.keys);
  tile.end = most(tile.base, round_up(end_visible(t.a, t.s, first + tile.count - 1) - t.start, 2 * M::width));
  return tile;
}

template <class T>
void pack_keys_of(const Task<T>& t, int64_t packed) {
  using M = typename Task<T>::M;
  constexpr int64_t n = panel_keys<M>;
  for (int64_t key = packed; key < t.keys; key += n) {
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

// Keys [first, last) of a tile that count from the task's start, in units of two vectors.
struct Keys {
  int64_t first, last;
};

// Those that any of `count` rows sees.
template <class T>
MK_INLINE Keys keys_of_strip(const TaskKeys<T>& t, const Tile& tile, int64_t row, int64_t count) {
  constexpr int64_t unit = 2 * TaskKeys<T>::M::width;
  const int64_t query = tile.first + row;
  const int64_t seen = round_down(most(first_visible(t.a, t.s, query) - t.start, 0), unit);
  const int64_t first = least(tile.end, most(tile.base, seen));
  const int64_t end = round_up(end_visible(t.a, t.s, query + count - 1) - t.start, unit);
  return {first, most(first, least(tile.end, end))};
}

// Of `count` rows' scores and dp: dS as rows, and both P and dS as pairs of rows, zeros outside the strip's keys. An
// odd last row is paired with zeros.
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
      mask_vectors<M>(s + i * span, n, first_visible(t.a, t.s, query + r) - t.start - first,
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

}  // namespace
}  // namespace mk::MK_ISA

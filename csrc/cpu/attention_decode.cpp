// Attention of few queries, read once from where the keys and values lie: the rows that share a KV head (its query
// heads, times a few queries) share each load. The keys are cut into pieces of a length that the shape alone decides; a
// piece is read in two passes, so that each row has one softmax a piece. int8 codes become numbers in registers; their
// scales multiply the scores, and the probabilities on their way to the values.
#include "cpu/attention.h"
#include "cpu/attention_decode_join.h"
#include "cpu/attention_decode_matrix.h"
#include "cpu/attention_pack.h"
#include "cpu/codes.h"

namespace mk::MK_ISA {
namespace {

constexpr int rows_at_once = 4;
constexpr int64_t value_tile = 32;  // keys whose values are added up in registers
#if MK_AMX
constexpr int64_t tail_keys = matrix_keys;
#else
constexpr int64_t tail_keys = value_tile;
#endif
// Prefetched into L2: keys 16 rows ahead, values one head ahead (4096 bf16 keys on Zen 5: 21 GB/s a thread instead of
// 13).
constexpr int64_t key_ahead = 16;

template <class M>
constexpr int row_unit = M::width * M::step;  // elements in a vector of words

// Scores of a piece: its keys, and what it takes to let each span start at a whole pair, and the last vectors be full.
template <class M>
constexpr int64_t score_row = piece_keys + max_spans + 2 * M::width - (piece_keys + max_spans) % (2 * M::width);

// Rows of a head in the buffers; those that follow the real ones are computed, and nobody reads them.
template <class M>
MK_INLINE int64_t padded_rows(int64_t rows) {
  return round_up(rows, by_matrices<M> && rows > rows_unit<M> ? rows_unit<M> : rows_at_once);
}

template <class T>
DecodeSizes sizes(int64_t dim, int64_t rows) {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  const int64_t n = round_up(dim, row_unit<M>), all = decode_heads * padded_rows<M>(rows);
  const int64_t words = n / M::step, blocks = by_matrices<M> ? decode_heads * round_up(rows, rows_unit<M>) : 0;
  return {(all + blocks) * words * (int64_t)sizeof(typename M::Word) +
              (all + 2) * score_row<M> * (int64_t)sizeof(Scalar) + tail_keys * n * (int64_t)sizeof(T),
          all * (n * (int64_t)sizeof(Scalar) + (int64_t)sizeof(RowState<Scalar>))};
}

// Keys of one span that belong to the piece: `count` from the span's key `at`, the sequence's key `key`, on. Their
// scores start at `place`.
struct Segment {
  const KeySpan* span;
  int64_t at, key, count, place;
};

template <class T>
struct Decode {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  using Word = typename M::Word;
  using State = RowState<Scalar>;
  static constexpr int64_t score_stride = score_row<M>;
  const Attention& a;
  const AttentionSequence& s;
  const AttentionItem& item;
  int64_t group, rows, all_rows, n, words;
  Scalar scale;
  Word* q;
  Scalar *scores, *acc;       // the scores become probabilities in place
  Scalar *k_scale, *v_scale;  // of a head's keys, in the places of their scores
  State* states;
  char* copy;
  Word* q_blocks;      // for the matrix unit
  bool codes = false;  // in any of the spans
  Segment segments[max_spans];

  Decode(const Attention& a, const AttentionItem& item, char* scratch)
      : a(a), s(a.sequences[item.sequence]), item(item) {
    group = a.heads / a.kv_heads;
    rows = group * s.queries;
    all_rows = padded_rows<M>(rows);
    n = round_up(a.dim, row_unit<M>);
    words = n / M::step;
    scale = (Scalar)(scaling(a.scale).magnitude * log2_e);
    q = (Word*)scratch;
    scores = (Scalar*)(q + item.heads * all_rows * words);
    k_scale = scores + item.heads * all_rows * score_row<M>;
    v_scale = k_scale + score_row<M>;
    copy = (char*)(v_scale + score_row<M>);
    q_blocks = (Word*)(copy + tail_keys * n * sizeof(T));
    acc = (Scalar*)(a.partials + item.partial * a.partial_bytes);
    states = (State*)(acc + item.heads * all_rows * n);
    int64_t begin = 0, place = 0;
    for (int i = 0; i < max_spans; begin += s.spans[i++].count) {
      const int64_t first = most(item.first, begin), last = least(item.last, begin + s.spans[i].count);
      segments[i] = {&s.spans[i], first - begin, first, most(last - first, 0), place};
      codes |= s.spans[i].k_scale && segments[i].count;
      place = round_up(place + segments[i].count, M::step);
    }
  }
};

template <int>
struct Number {};

template <class T>
constexpr int widest = Decode<T>::M::width < rows_at_once ? 2 : rows_at_once;

// f(row, how many) for groups of the rows that share a KV head; rows past the last are computed and never read.
template <class T, class F>
MK_INLINE void each_rows(const Decode<T>& t, F f) {
  for (int64_t row = 0; row < t.rows; row += widest<T>) {
    if (t.rows - row == 1)
      f(row, Number<1>());
    else if (t.rows - row == 2)
      f(row, Number<2>());
    else
      f(row, Number<widest<T>>());
  }
}

// Rows of up to `tail_keys` keys that are not whole vectors, or fewer than are `needed`, are copied to a place where
// zeros follow. K is T or int8.
template <class T, class K>
MK_INLINE const K* whole_rows(const Decode<T>& t, const K* p, int64_t keys, int64_t needed, int64_t& row) {
  if (t.a.dim == t.n && keys == needed) return p;
  K* copy = (K*)t.copy;
  for (int64_t i = 0; i < keys; i++) {
    __builtin_memcpy(copy + i * t.n, p + i * row, t.a.dim * sizeof(K));
    __builtin_memset(copy + i * t.n + t.a.dim, 0, (t.n - t.a.dim) * sizeof(K));
  }
  __builtin_memset(copy + keys * t.n, 0, (needed - keys) * t.n * sizeof(K));
  row = t.n;
  return copy;
}

// Scores of MR rows with `keys` keys, at most width / MR: each dot product is summed across one group of lanes. What
// lies `ahead` elements farther is read next.
template <class T, int MR, class K>
MK_INLINE void row_scores(const Decode<T>& t, const K* k, int64_t k_row, int64_t keys, int64_t row, int64_t place,
                          int64_t ahead) {
  using M = typename Decode<T>::M;
  constexpr int group = M::width / MR;
  const typename M::Word* q = t.q + row * t.words;
  typename M::Vec dots[M::width] = {};
  const K* from[group];
#pragma GCC unroll 16
  for (int j = 0; j < group; j++) from[j] = k + least(j, keys - 1) * k_row;
  for (int64_t w = 0; w < t.words; w += M::width) {
    typename M::Words x[MR];
#pragma GCC unroll 4
    for (int r = 0; r < MR; r++) x[r] = load_words<typename M::Words>(q + r * t.words + w);
#pragma GCC unroll 16
    for (int j = 0; j < group; j++) {
      __builtin_prefetch(from[j] + w * M::step + ahead, 0, 2);
      const typename M::Words y = row_vector<M>(from[j] + w * M::step);
#pragma GCC unroll 4
      for (int r = 0; r < MR; r++) M::multiply_add(dots[r * group + j], x[r], y);
    }
  }
  typename M::Scalar sums[M::width];
  store_words(sums, sum_each(dots));
#pragma GCC unroll 4
  for (int r = 0; r < MR; r++)
    __builtin_memcpy(t.scores + (row + r) * score_row<M> + place, sums + r * group, group * sizeof(sums[0]));
}

// The heads take turns every few keys: with [slots, heads, dim] in memory that reads it from front to back.
template <class T, class K>
void segment_scores(const Decode<T>& t, const Segment& s) {
  constexpr int width = Decode<T>::M::width;
  const int64_t step = t.rows == 1 ? width : t.rows == 2 ? width / 2 : width / widest<T>;
  for (int64_t i = 0; i < s.count; i += step) {
    const int64_t keys = least(step, s.count - i);
    for (int64_t head = 0; head < t.item.heads; head++) {
      int64_t k_row = s.span->k_row;
      const K* k = (const K*)s.span->k + (s.at + i) * k_row + (t.item.head + head) * s.span->k_head;
      k = whole_rows(t, k, keys, keys, k_row);
      each_rows(t, [&]<int n>(int64_t row, Number<n>) {
        row_scores<T, n>(t, k, k_row, keys, head * t.all_rows + row, s.place + i, key_ahead * s.span->k_row);
      });
    }
  }
}

// acc += P V for MR rows and NV vectors of columns from column d on; `ahead` is the distance in bytes to the next head.
template <class T, int MR, int NV, class K>
MK_INLINE void row_values(const Decode<T>& t, const K* v, int64_t v_row, int64_t ahead, int64_t keys, int64_t row,
                          int64_t place, int64_t d) {
  using M = typename Decode<T>::M;
  constexpr int64_t p_row = score_row<M>;
  const typename M::Word* p = (const typename M::Word*)(t.scores + row * p_row) + place / M::step;
  typename M::Vec c[MR][NV] = {};
  v += d;
  if constexpr (M::step == 1) {
    multiply<M>(p, p_row, keys, c, [&](int64_t k, int n) {
      const K* from = v + k * v_row + n * M::width;
      __builtin_prefetch((const char*)from + ahead, 0, 2);
      return row_vector<M>(from);
    });
  }
#if MK_BF16
  else {
    const int64_t pairs = keys / 2;
    multiply<M>(p, p_row, pairs, c, [&](int64_t k, int n) {
      const K *even = v + 2 * k * v_row, *odd = even + v_row;
      __builtin_prefetch((const char*)((n % 2 ? odd : even) + n / 2 * 32) + ahead, 0, 2);
      return value_pairs(even, odd, n);
    });
    if (keys % 2)
      multiply<M>(p + pairs, p_row, 1, c,
                  [&](int64_t, int n) { return value_pairs(v + 2 * pairs * v_row, (const K*)nullptr, n); });
  }
#endif
  typename M::Scalar* acc = t.acc + row * t.n + d;
#pragma GCC unroll 4
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) {
      typename M::Scalar* to = acc + r * t.n + n * M::width;
      store_words(to, load_words<typename M::Vec>(to) + c[r][n]);
    }
}

template <class T, int MR, class K>
MK_INLINE void all_columns(const Decode<T>& t, const K* v, int64_t v_row, int64_t ahead, int64_t keys, int64_t row,
                           int64_t place) {
  using M = typename Decode<T>::M;
  constexpr int64_t wide = strip_vectors * M::width;
  int64_t d = 0;
  for (; d + wide <= t.n; d += wide) row_values<T, MR, strip_vectors>(t, v, v_row, ahead, keys, row, place, d);
  if (strip_vectors == 4 && d + 2 * M::width <= t.n) {
    row_values<T, MR, 2>(t, v, v_row, ahead, keys, row, place, d);
    d += 2 * M::width;
  }
  if constexpr (M::step == 1)
    if (d < t.n) row_values<T, MR, 1>(t, v, v_row, ahead, keys, row, place, d);
}

template <class T, class K>
void segment_values(const Decode<T>& t, const Segment& s) {
  for (int64_t i = 0; i < s.count; i += value_tile) {
    const int64_t keys = least(value_tile, s.count - i);
    for (int64_t head = 0; head < t.item.heads; head++) {
      int64_t v_row = s.span->v_row;
      const bool last = head + 1 == t.item.heads;
      const int64_t ahead = (last ? value_tile * v_row - head * s.span->v_head : s.span->v_head) * (int64_t)sizeof(K);
      const K* v = (const K*)s.span->v + (s.at + i) * v_row + (t.item.head + head) * s.span->v_head;
      v = whole_rows(t, v, keys, keys, v_row);
      each_rows(t, [&]<int n>(int64_t row, Number<n>) {
        all_columns<T, n>(t, v, v_row, ahead, keys, head * t.all_rows + row, s.place + i);
      });
    }
  }
}

#if MK_AMX

// f(first key, keys) for a segment's keys as the matrix unit takes them: by whole registers, then the few that fill
// none.
template <class F>
MK_INLINE void each_keys(int64_t count, F f) {
  for (int64_t i = 0, keys; i < count; i += keys) {
    keys = least(matrix_keys, count - i);
    if (keys > matrix_rows) keys = round_down(keys, matrix_rows);
    f(i, keys);
  }
}

// All columns of the first rows of a head, before which no rows are that would fetch them.
template <class T>
MK_INLINE void fetch_first_rows(const Decode<T>& t, const T* p, int64_t row) {
  for (int64_t d = 0; d < t.a.dim; d += 2 * matrix_words) fetch_rows(p + d, row);
}

template <class T>
void matrix_segment_scores(const Decode<T>& t, const Segment& s) {
  each_keys(s.count, [&](int64_t i, int64_t keys) {
    for (int64_t head = 0; head < t.item.heads; head++) {
      int64_t k_row = s.span->k_row;
      const T* k = (const T*)s.span->k + (s.at + i) * k_row + (t.item.head + head) * s.span->k_head;
      if (i == 0 && head + 1 < t.item.heads) fetch_first_rows(t, k + s.span->k_head, k_row);
      k = whole_rows(t, k, keys, round_up(keys, matrix_rows), k_row);
      const int64_t ahead = i + keys < s.count ? matrix_rows * k_row : 0;
      if (keys == matrix_keys)
        matrix_scores<4>(t, k, k_row, ahead, keys, head, s.place + i);
      else if (keys > 2 * matrix_rows)
        matrix_scores<3>(t, k, k_row, ahead, keys, head, s.place + i);
      else if (keys > matrix_rows)
        matrix_scores<2>(t, k, k_row, ahead, keys, head, s.place + i);
      else
        matrix_scores<1>(t, k, k_row, ahead, keys, head, s.place + i);
    }
  });
}

template <class T>
void matrix_segment_values(const Decode<T>& t, const Segment& s) {
  each_keys(s.count, [&](int64_t i, int64_t keys) {
    for (int64_t head = 0; head < t.item.heads; head++) {
      int64_t v_row = s.span->v_row;
      const T* v = (const T*)s.span->v + (s.at + i) * v_row + (t.item.head + head) * s.span->v_head;
      v = whole_rows(t, v, keys, round_up(keys, matrix_rows), v_row);
      const int64_t ahead = i + keys < s.count ? matrix_rows * v_row : 0;
      matrix_values(t, v, v_row, ahead, keys, head, s.place + i);
    }
  });
}

#endif

// The scales of a head's keys, 1 where there is none. Between the segments, where probabilities are 0, anything finite.
template <class T>
void gather_scales(const Decode<T>& t, int64_t head) {
  using Scalar = typename Decode<T>::Scalar;
  for (int64_t i = 0; i < score_row<typename Decode<T>::M>; i++) t.k_scale[i] = t.v_scale[i] = 1;
  for (const Segment& s : t.segments) {
    const KeySpan& from = *s.span;
    if (!from.k_scale) continue;
    const Scalar* k = (const Scalar*)from.k_scale + s.at * from.k_scale_row + head * from.k_scale_head;
    const Scalar* v = (const Scalar*)from.v_scale + s.at * from.v_scale_row + head * from.v_scale_head;
    for (int64_t i = 0; i < s.count; i++) {
      t.k_scale[s.place + i] = k[i * from.k_scale_row];
      t.v_scale[s.place + i] = v[i * from.v_scale_row];
    }
  }
}

// Scores become probabilities; those of keys that the row does not see, and of the places between spans, become 0.
template <class T>
void softmax(const Decode<T>& t, int64_t head, int64_t row) {
  using M = typename Decode<T>::M;
  const int64_t query = row / t.group, first = first_visible(t.a, t.s, query), last = end_visible(t.a, t.s, query);
  const int64_t index = head * t.all_rows + row;
  typename M::Scalar* scores = t.scores + index * score_row<M>;
  int64_t end = 0;
  for (const Segment& s : t.segments) {
    for (; end < s.place; end++) scores[end] = -INFINITY;
    if (s.span->k_scale)
      for (int64_t i = s.place; i < s.place + s.count; i++) scores[i] *= t.k_scale[i];
    mask_row<M>(scores + s.place, s.count, first - s.key, last - s.key);
    end = s.place + s.count;
  }
  const int64_t n = most(round_up(end, 2 * M::width), 2 * M::width);
  for (; end < n; end++) scores[end] = -INFINITY;
  const auto top = largest_of_row<M>(scores, n);
  t.states[index] = {
      top, exponentials<M>(scores, (typename M::Word*)scores, n, base_of(top), t.scale, t.codes ? t.v_scale : nullptr)};
}

template <class T>
void start(const Decode<T>& t) {
  using M = typename Decode<T>::M;
  const int64_t rows = round_up(t.rows, rows_at_once);
  for (int64_t head = 0; head < t.item.heads; head++)
    for (int64_t i = head * t.all_rows, end = i + rows; i < end; i++) {
      const int64_t row = least(i - head * t.all_rows, t.rows - 1), q_head = (t.item.head + head) * t.group;
      const T* q = (const T*)t.s.q + row / t.group * t.a.q_row + (q_head + row % t.group) * t.a.q_head;
      pack_query<M>(q, t.a.dim, scaling(t.a.scale).sign, t.q + i * t.words);
      for (int64_t d = 0; d < t.n; d += M::width) store_words(t.acc + i * t.n + d, typename M::Vec{});
    }
}

template <class T>
void number_scores(const Decode<T>& t, const Segment& s) {
#if MK_AMX
  if constexpr (by_matrices<typename Decode<T>::M>) return matrix_segment_scores(t, s);
#endif
  segment_scores<T, T>(t, s);
}

// In the order of their places: behind a segment's last score each kernel leaves some that nobody asked for.
template <class T>
void all_scores(const Decode<T>& t) {
  const auto each = [&t] {
    for (const Segment& s : t.segments) s.span->k_scale ? segment_scores<T, int8_t>(t, s) : number_scores(t, s);
  };
#if MK_AMX
  if constexpr (by_matrices<typename Decode<T>::M>) {
    const Matrices matrices;
    tile_queries(t);
    return each();
  }
#endif
  each();
}

template <class T>
void all_values(const Decode<T>& t) {
#if MK_AMX
  if constexpr (by_matrices<typename Decode<T>::M>) {
    const Matrices matrices(result_rows(t));
    for (const Segment& s : t.segments)
      if (!s.span->k_scale) matrix_segment_values(t, s);
    join_columns(t);
  }
#endif
  for (const Segment& s : t.segments) {
    if (s.span->k_scale)
      segment_values<T, int8_t>(t, s);
    else if (!by_matrices<typename Decode<T>::M>)
      segment_values<T, T>(t, s);
  }
}

// The head's first values come into the cache while its scores become probabilities.
template <class T>
MK_INLINE void fetch_first_values([[maybe_unused]] const Decode<T>& t, [[maybe_unused]] int64_t head) {
#if MK_AMX
  if constexpr (by_matrices<typename Decode<T>::M>)
    for (const Segment& s : t.segments)
      if (s.count >= matrix_rows && !s.span->k_scale)
        fetch_first_rows(t, (const T*)s.span->v + s.at * s.span->v_row + (t.item.head + head) * s.span->v_head,
                         s.span->v_row);
#endif
}

template <class T>
void decode(const Attention& a, const AttentionItem& item, char* scratch) {
  const Decode<T> t(a, item, scratch);
  const NoSubnormals no_subnormals;
  start(t);
  all_scores(t);
  for (int64_t head = 0; head < item.heads; head++) {
    if (t.codes) gather_scales(t, item.head + head);
    fetch_first_values(t, head);
    for (int64_t row = 0; row < t.rows; row++) softmax(t, head, row);
  }
  all_values(t);
}

// In the order of the keys, whichever piece was done first.
template <class T>
void join(const Attention& a, const AttentionItem& item, int64_t count) {
  using M = typename Decode<T>::M;
  using Scalar = typename M::Scalar;
  const Decode<T> t(a, item, nullptr);
  for (int64_t head = 0; head < item.heads; head++)
    for (int64_t row = 0; row < t.rows; row++) {
      const int64_t index = head * t.all_rows + row;
      const int64_t query = row / t.group, q_head = (item.head + head) * t.group + row % t.group;
      Scalar* acc = t.acc + index * t.n;
      const RowState<Scalar> state =
          count > 1 ? join_row<M>({acc, t.states + index, a.partial_bytes, count, t.n, t.scale}) : t.states[index];
      T* out = (T*)t.s.out + query * a.out_row + q_head * a.out_head;
      Scalar* lse = t.s.lse ? (Scalar*)t.s.lse + q_head * a.lse_head + query : nullptr;
      finish_row<M>(a, acc, state, out, lse);
    }
}

}  // namespace

const DecodeKernels attention_decode = {
    {sizes<float>, sizes<bf16>, sizes<f16>, sizes<double>},
    {decode<float>, decode<bf16>, decode<f16>, decode<double>},
    {join<float>, join<bf16>, join<f16>, join<double>},
};

}  // namespace mk::MK_ISA

// Attention of few queries, read once from where the keys and values lie: the rows that share a KV head (its query
// heads, times a few queries) share each load. The keys are cut into pieces of a length that the shape alone decides.
#include "cpu/attention.h"
#include "cpu/attention_pack.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t tile_keys = 32;  // two tiles of K and V stay in the L1 cache: this one, and the one being prefetched
constexpr int row_step = 4;

template <class M>
constexpr int row_unit = M::width * M::step;  // elements in a vector of words

template <class M>
MK_INLINE int64_t padded(int64_t dim) {
  return round_up(dim, row_unit<M>);
}

template <class T>
DecodeSizes sizes(int64_t dim, int64_t rows) {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  const int64_t n = padded<M>(dim), all = round_up(rows, row_step);
  const int64_t strip = row_step * tile_keys * (sizeof(Scalar) + sizeof(typename M::Word));
  return {decode_heads * all * n * (int64_t)sizeof(T) * (sizeof(T) < sizeof(Scalar) && M::step == 1 ? 2 : 1) + strip +
              2 * tile_keys * n * (int64_t)sizeof(T),
          decode_heads * all * (n * (int64_t)sizeof(Scalar) + (int64_t)sizeof(RowState<Scalar>))};
}

// One tile of one KV head. `k_ahead` and `v_ahead` are the distances in bytes to what will be read next.
template <class T>
struct Block {
  const T *k, *v;
  int64_t k_row, v_row, k_ahead, v_ahead;
  int64_t key, keys;
};

template <class T>
struct Decode {
  using M = typename ArithmeticOf<T>::type;
  using Scalar = typename M::Scalar;
  using Word = typename M::Word;
  using State = RowState<Scalar>;
  const Attention& a;
  const AttentionSequence& s;
  int64_t group, rows, all_rows, n, words;
  Scalar scale;
  Word *q, *probabilities;
  Scalar *scores, *acc;
  State* states;
  T *k_copy, *v_copy;

  Decode(const Attention& a, const AttentionItem& item, char* scratch) : a(a), s(a.sequences[item.sequence]) {
    group = a.heads / a.kv_heads;
    rows = group * s.queries;
    all_rows = round_up(rows, row_step);
    n = padded<M>(a.dim);
    words = n / M::step;
    scale = (Scalar)(scaling(a.scale).magnitude * log2_e);
    q = (Word*)scratch;
    scores = (Scalar*)(q + item.heads * all_rows * words);
    probabilities = (Word*)(scores + row_step * tile_keys);
    k_copy = (T*)(probabilities + row_step * tile_keys);
    v_copy = k_copy + tile_keys * n;
    acc = (Scalar*)(a.partials + item.partial * a.partial_bytes);
    states = (State*)(acc + item.heads * all_rows * n);
  }
};

// Lane i becomes the sum of t[i].
template <int half = 1, int n, class V>
MK_INLINE V sum_each(V (&t)[n]) {
  if constexpr (n == 1) {
    return t[0];
  } else {
    V u[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; i++) {
      V a = t[2 * i], b = t[2 * i + 1];
      exchange<half>(a, b, typename Count<sizeof(V) / sizeof(t[0][0])>::type());
      u[i] = a + b;
    }
    return sum_each<2 * half>(u);
  }
}

// Scores of MR rows with the keys of a block: width / MR keys at a time, each dot product summed across one lane group.
template <class T, int MR>
MK_INLINE void block_scores(const Decode<T>& t, const Block<T>& b, const typename Decode<T>::Word* q) {
  using M = typename Decode<T>::M;
  constexpr int keys = M::width / MR;
  for (int64_t key = 0; key < b.keys; key += keys) {
    typename M::Vec dots[M::width] = {};
    const T* row[keys];
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) row[j] = b.k + least(key + j, b.keys - 1) * b.k_row;
    for (int64_t w = 0; w < t.words; w += M::width) {
      typename M::Words x[MR];
#pragma GCC unroll 4
      for (int r = 0; r < MR; r++) x[r] = load_words<typename M::Words>(q + r * t.words + w);
#pragma GCC unroll 16
      for (int j = 0; j < keys; j++) {
        const T* p = row[j] + w * M::step;
        __builtin_prefetch((const char*)p + b.k_ahead);
        typename M::Words y;
        if constexpr (M::step == 1)
          y = load(p);
        else
          y = load_words<typename M::Words>(p);
#pragma GCC unroll 4
        for (int r = 0; r < MR; r++) M::multiply_add(dots[r * keys + j], x[r], y);
      }
    }
    typename M::Scalar sums[M::width];
    store_words(sums, sum_each(dots));
#pragma GCC unroll 4
    for (int r = 0; r < MR; r++)
      __builtin_memcpy(t.scores + r * tile_keys + key, sums + r * keys, keys * sizeof(sums[0]));
  }
}

// Two keys' values from column d on, as NV vectors of pairs; `odd` may be null for zeros.
#if MK_BF16
MK_INLINE vu value_pairs(const bf16* even, const bf16* odd, int n) {
  typedef uint16_t Wide __attribute__((vector_size(64)));
  const Wide a = load_words<Wide>(even + n / 2 * 32), b = odd ? load_words<Wide>(odd + n / 2 * 32) : Wide{};
  if (n % 2)
    return (vu)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                       57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  return (vu)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
}
#endif

// acc = factor * acc + P V for MR rows and NV vectors of columns from column d on.
template <class T, int MR, int NV>
MK_INLINE void block_values(const Decode<T>& t, const Block<T>& b, typename Decode<T>::Scalar* acc,
                            const typename Decode<T>::Scalar* factor, int64_t d) {
  using M = typename Decode<T>::M;
  typename M::Vec c[MR][NV];
#pragma GCC unroll 4
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) c[r][n] = load_words<typename M::Vec>(acc + r * t.n + d + n * M::width) * factor[r];
  const T* v = b.v + d;
  if constexpr (M::step == 1) {
    multiply<M>(t.probabilities, tile_keys, b.keys, c, [&](int64_t k, int n) {
      const T* p = v + k * b.v_row + n * M::width;
      __builtin_prefetch((const char*)p + b.v_ahead);
      return load(p);
    });
  }
#if MK_BF16
  else {
    const int64_t pairs = b.keys / 2;
    multiply<M>(t.probabilities, tile_keys / 2, pairs, c, [&](int64_t k, int n) {
      const T *even = v + 2 * k * b.v_row, *odd = even + b.v_row;
      __builtin_prefetch((const char*)((n % 2 ? odd : even) + n / 2 * 32) + b.v_ahead);
      return value_pairs(even, odd, n);
    });
    if (b.keys % 2)
      multiply<M>(t.probabilities + pairs, tile_keys / 2, 1, c,
                  [&](int64_t, int n) { return value_pairs(v + 2 * pairs * b.v_row, nullptr, n); });
  }
#endif
#pragma GCC unroll 4
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) store_words(acc + r * t.n + d + n * M::width, c[r][n]);
}

// MR rows from `row` on of the item's head `head` over a block; rows past the last are computed and never read.
template <class T, int MR>
void block_rows(const Decode<T>& t, const Block<T>& b, int64_t head, int64_t row) {
  using M = typename Decode<T>::M;
  const int64_t index = head * t.all_rows + row;
  block_scores<T, MR>(t, b, t.q + index * t.words);
  typename M::Scalar factor[MR];
  for (int r = 0; r < MR; r++) {
    const int64_t query = least(row + r, t.rows - 1) / t.group;
    const int64_t first = first_visible(t.a, t.s, query) - b.key, last = end_visible(t.a, t.s, query) - b.key;
    typename M::Scalar* scores = t.scores + r * tile_keys;
    const int64_t n = round_up(b.keys, 2 * M::width);
    mask_row<M>(scores, n, first, least(last, b.keys));
    factor[r] = softmax_row<M>(scores, t.probabilities + r * (tile_keys / M::step), n, t.scale, t.states[index + r]);
  }
  typename M::Scalar* acc = t.acc + index * t.n;
  int64_t d = 0;
  for (; d + strip_vectors * M::width <= t.n; d += strip_vectors * M::width)
    block_values<T, MR, strip_vectors>(t, b, acc, factor, d);
  if (strip_vectors == 4 && d + 2 * M::width <= t.n) {
    block_values<T, MR, 2>(t, b, acc, factor, d);
    d += 2 * M::width;
  }
  if constexpr (M::step == 1)
    if (d < t.n) block_values<T, MR, 1>(t, b, acc, factor, d);
}

template <class T>
void block(const Decode<T>& t, Block<T> b, int64_t head) {
  for (int64_t row = 0; row < t.rows; row += row_step) {
    const int64_t left = t.rows - row;
    constexpr int wide = Decode<T>::M::width < row_step ? 2 : row_step;
    if (left >= 3 && wide == row_step)
      block_rows<T, wide>(t, b, head, row);
    else if (left >= 2)
      for (int64_t r = 0; r < least(left, row_step); r += 2) block_rows<T, 2>(t, b, head, row + r);
    else
      block_rows<T, 1>(t, b, head, row);
    b.k_ahead = b.v_ahead = 0;  // once is enough
  }
}

// Rows that are not whole vectors are copied to a place where zeros follow.
template <class T>
void copy_block(const Decode<T>& t, Block<T>& b) {
  for (int64_t i = 0; i < b.keys; i++) {
    __builtin_memcpy(t.k_copy + i * t.n, b.k + i * b.k_row, t.a.dim * sizeof(T));
    __builtin_memcpy(t.v_copy + i * t.n, b.v + i * b.v_row, t.a.dim * sizeof(T));
    __builtin_memset(t.k_copy + i * t.n + t.a.dim, 0, (t.n - t.a.dim) * sizeof(T));
    __builtin_memset(t.v_copy + i * t.n + t.a.dim, 0, (t.n - t.a.dim) * sizeof(T));
  }
  b.k = t.k_copy;
  b.v = t.v_copy;
  b.k_row = b.v_row = t.n;
  b.k_ahead = b.v_ahead = 0;
}

// All heads of the item over up to `tile_keys` keys of one span, from its key `at` on.
template <class T>
void heads(const Decode<T>& t, const AttentionItem& item, const KeySpan& span, int64_t at, int64_t key, int64_t keys) {
  for (int64_t head = 0; head < item.heads; head++) {
    const bool end = head + 1 == item.heads;
    Block<T> b;
    b.k = (const T*)span.k + at * span.k_row + (item.head + head) * span.k_head;
    b.v = (const T*)span.v + at * span.v_row + (item.head + head) * span.v_head;
    b.k_row = span.k_row;
    b.v_row = span.v_row;
    b.k_ahead = (end ? tile_keys * span.k_row - head * span.k_head : span.k_head) * (int64_t)sizeof(T);
    b.v_ahead = (end ? tile_keys * span.v_row - head * span.v_head : span.v_head) * (int64_t)sizeof(T);
    b.key = key;
    b.keys = keys;
    if (t.a.dim != t.n) copy_block(t, b);
    block(t, b, head);
  }
}

template <class T>
void start(const Decode<T>& t, const AttentionItem& item) {
  using M = typename Decode<T>::M;
  for (int64_t i = 0; i < item.heads * t.all_rows; i++) {
    const int64_t head = i / t.all_rows, row = least(i % t.all_rows, t.rows - 1);
    const T* q =
        (const T*)t.s.q + row / t.group * t.a.q_row + ((item.head + head) * t.group + row % t.group) * t.a.q_head;
    pack_query<M>(q, t.a.dim, scaling(t.a.scale).sign, t.q + i * t.words);
    t.states[i] = {-INFINITY, 0};
    for (int64_t d = 0; d < t.n; d += M::width) store_words(t.acc + i * t.n + d, typename M::Vec{});
  }
}

template <class T>
void decode(const Attention& a, const AttentionItem& item, char* scratch) {
  const Decode<T> t(a, item, scratch);
  start(t, item);
  int64_t begin = 0;
  for (const KeySpan& span : t.s.spans) {
    const int64_t last = least(item.last, begin + span.count);
    for (int64_t key = most(item.first, begin); key < last; key += tile_keys)
      heads(t, item, span, key - begin, key, least(tile_keys, last - key));
    begin += span.count;
  }
}

// The partial results of one row, in the order of the keys.
template <class T>
void join_row(const Decode<T>& t, int64_t index, int64_t count, T* out, typename Decode<T>::Scalar* lse) {
  using M = typename Decode<T>::M;
  using Scalar = typename M::Scalar;
  using Vec = typename M::Vec;
  const int64_t bytes = t.a.partial_bytes;
  RowState<Scalar> state = t.states[index];
  Scalar* acc = t.acc + index * t.n;
  for (int64_t i = 1; i < count; i++) {
    const RowState<Scalar> next = *(const RowState<Scalar>*)((const char*)(t.states + index) + i * bytes);
    const Scalar* more = (const Scalar*)((const char*)acc + i * bytes);
    const Scalar top = next.top > state.top ? next.top : state.top, base = top == -INFINITY ? 0 : top;
    const Scalar before = exp2_scalar((state.top - base) * t.scale), after = exp2_scalar((next.top - base) * t.scale);
    for (int64_t d = 0; d < t.n; d += M::width)
      store_words(acc + d, load_words<Vec>(acc + d) * before + load_words<Vec>(more + d) * after);
    state = {top, state.sum * before + next.sum * after};
  }
  finish_row<M>(t.a, acc, state, out, lse);
}

template <class T>
void join(const Attention& a, const AttentionItem& item, int64_t count) {
  using Scalar = typename Decode<T>::Scalar;
  const Decode<T> t(a, item, nullptr);
  for (int64_t head = 0; head < item.heads; head++)
    for (int64_t row = 0; row < t.rows; row++) {
      const int64_t query = row / t.group, q_head = (item.head + head) * t.group + row % t.group;
      T* out = (T*)t.s.out + query * a.out_row + q_head * a.out_head;
      Scalar* lse = t.s.lse ? (Scalar*)t.s.lse + q_head * a.lse_head + query : nullptr;
      join_row(t, head * t.all_rows + row, count, out, lse);
    }
}

}  // namespace

const DecodeKernels attention_decode = {
    {sizes<float>, sizes<bf16>, sizes<f16>, sizes<double>},
    {decode<float>, decode<bf16>, decode<f16>, decode<double>},
    {join<float>, join<bf16>, join<f16>, join<double>},
};

}  // namespace mk::MK_ISA

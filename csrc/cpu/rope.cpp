#include "cpu/rope.h"

#include "cpu/two.h"

namespace mk::MK_ISA {
namespace {

template <int... i>
struct Indices {};
template <int n, int... i>
struct CountTo : CountTo<n - 1, n - 1, i...> {};
template <int... i>
struct CountTo<0, i...> {
  using type = Indices<i...>;
};

#if defined(__clang__)
#define MK_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)
#else
template <int size>
struct Index;
template <>
struct Index<4> {
  using type = vi;
};
template <>
struct Index<8> {
  typedef int64_t type __attribute__((vector_size(4 * MK_LANES)));
};
#define MK_SHUFFLE(a, b, index) __builtin_shuffle(a, b, typename Index<sizeof(a[0])>::type{(index)...})
#endif

// Even and odd elements of (a, b), and both back in order.
template <class V, int... i>
MK_INLINE V evens(V a, V b, Indices<i...>) {
  return MK_SHUFFLE(a, b, 2 * i);
}
template <class V, int... i>
MK_INLINE V odds(V a, V b, Indices<i...>) {
  return MK_SHUFFLE(a, b, 2 * i + 1);
}
template <class V, int... i>
MK_INLINE V zip_low(V a, V b, Indices<i...>) {
  return MK_SHUFFLE(a, b, i / 2 + i % 2 * int(sizeof...(i)));
}
template <class V, int... i>
MK_INLINE V zip_high(V a, V b, Indices<i...>) {
  return MK_SHUFFLE(a, b, i / 2 + int(sizeof...(i)) / 2 + i % 2 * int(sizeof...(i)));
}

template <bool kInverse, class V>
MK_INLINE void turn(V& a, V& b, V c, V s) {
  if constexpr (kInverse) s = -s;
  const V first = a * c - b * s;
  b = b * c + a * s;
  a = first;
}

// Elements to what is fetched: where heads lie side by side, of heads that follow.
template <class T>
constexpr int64_t ahead = fetch_ahead / int64_t{sizeof(T)};

template <class T, bool kInverse, bool kStream, class S>
MK_INLINE void half_split(const T* x, T* out, int64_t half, const S* cos, const S* sin) {
  constexpr int w = Format<T>::width;
  int64_t j = 0;
  for (; j + 2 * w <= half; j += 2 * w) {
    constexpr Order o = Order::memory;
    two_of<T> a = load_two<o>(x + j), b = load_two<o>(x + half + j);
    const Two c = load_two<o>(cos + j), s = load_two<o>(sin + j);
    fetch(x + j + ahead<T>, 2 * w * sizeof(T));
    fetch(x + half + j + ahead<T>, 2 * w * sizeof(T));
    turn<kInverse>(a.a, b.a, c.a, s.a);
    turn<kInverse>(a.b, b.b, c.b, s.b);
    put_two<o, Nans::any, kStream>(out + j, a);
    put_two<o, Nans::any, kStream>(out + half + j, b);
  }
  for (; j + w <= half; j += w) {
    vec_of<T> a = load(x + j), b = load(x + half + j);
    turn<kInverse>(a, b, load(cos + j), load(sin + j));
    put<T, kStream>(out + j, a);
    put<T, kStream>(out + half + j, b);
  }
  if (const int64_t left = half - j; left) {
    vec_of<T> a = load_n(x + j, left), b = load_n(x + half + j, left);
    turn<kInverse>(a, b, load_n(cos + j, left), load_n(sin + j, left));
    store_n(out + j, a, left);
    store_n(out + half + j, b, left);
  }
}

template <class T, bool kInverse, bool kStream, class S>
MK_INLINE void adjacent(const T* x, T* out, int64_t half, const S* cos, const S* sin) {
  constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  constexpr typename CountTo<w>::type order;
  const auto turn_pairs = [&](V& low, V& high, V c, V s) {
    V a = evens(low, high, order), b = odds(low, high, order);
    turn<kInverse>(a, b, c, s);
    low = zip_low(a, b, order);
    high = zip_high(a, b, order);
  };
  int64_t j = 0;
  for (; j + w <= half; j += w) {
    constexpr Order o = is_bf16<T> ? Order::apart : Order::memory;
    two_of<T> v = load_two<o>(x + 2 * j);
    fetch(x + 2 * j + ahead<T>, 2 * w * sizeof(T));
    if constexpr (o == Order::apart)
      turn<kInverse>(v.a, v.b, load(cos + j), load(sin + j));
    else
      turn_pairs(v.a, v.b, load(cos + j), load(sin + j));
    put_two<o, Nans::any, kStream>(out + 2 * j, v);
  }
  if (const int64_t left = half - j; left) {
    const int64_t first = 2 * left < w ? 2 * left : w, second = 2 * left - first;
    V low = load_n(x + 2 * j, first), high = load_n(x + 2 * j + first, second);
    turn_pairs(low, high, load_n(cos + j, left), load_n(sin + j, left));
    store_n(out + 2 * j, low, first);
    store_n(out + 2 * j + first, high, second);
  }
}

template <class T, bool kAdjacent, bool kInverse, bool kStream>
void rotate_heads(const RopeHeads& a) {
  using S = decltype(sum(vec_of<T>{}));
  const S *cos = static_cast<const S*>(a.cos), *sin = static_cast<const S*>(a.sin);
  for (int64_t h = 0; h < a.heads; h++) {
    const T* from = static_cast<const T*>(a.x) + h * a.head_stride;
    T* to = static_cast<T*>(a.out) + h * a.dim;
    if constexpr (kAdjacent)
      adjacent<T, kInverse, kStream>(from, to, a.dim / 2, cos, sin);
    else
      half_split<T, kInverse, kStream>(from, to, a.dim / 2, cos, sin);
  }
}

template <class T, bool kAdjacent, bool kInverse>
void rotate(const RopeHeads& a) {
  if (a.past_caches)
    rotate_heads<T, kAdjacent, kInverse, true>(a);
  else
    rotate_heads<T, kAdjacent, kInverse, false>(a);
}

}  // namespace

#define MK_ROTATE(T)                                                                                     \
  {                                                                                                      \
    {rotate<T, false, false>, rotate<T, false, true>}, { rotate<T, true, false>, rotate<T, true, true> } \
  }
const RopeKernels rope = {{MK_ROTATE(float), MK_ROTATE(bf16), MK_ROTATE(f16), MK_ROTATE(double)}};

}  // namespace mk::MK_ISA

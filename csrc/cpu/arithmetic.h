// What the products share: the three kinds of arithmetic, and the order of lanes.
//
// A "word" is what one step of a product consumes: a float, a double, or a pair of bf16 that vdpbf16ps multiplies at
// once.
#pragma once
#include "cpu/vec.h"

namespace mk::MK_ISA {
namespace {

struct Float32 {
  using Scalar = float;
  using Vec = vf;
  using Word = float;
  using Words = vf;
  static constexpr int width = lanes, step = 1, degree = 6;
  MK_INLINE Words splat(Word w) { return set1(w); }
  MK_INLINE void multiply_add(Vec& c, Words a, Words b) { c += a * b; }
};

struct Float64 {
  using Scalar = double;
  using Vec = vd;
  using Word = double;
  using Words = vd;
  static constexpr int width = lanes / 2, step = 1, degree = 0;
  MK_INLINE Words splat(Word w) { return set1(w); }
  MK_INLINE void multiply_add(Vec& c, Words a, Words b) { c += a * b; }
};

#if MK_BF16
struct PairsBf16 {
  using Scalar = float;
  using Vec = vf;
  using Word = uint32_t;
  using Words = vu;
  static constexpr int width = lanes, step = 2, degree = 5;
  MK_INLINE Words splat(Word w) { return set1(w); }
  MK_INLINE void multiply_add(Vec& c, Words a, Words b) {
    c = (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#else
using PairsBf16 = Float32;
#endif

template <class T>
struct ArithmeticOf;
template <>
struct ArithmeticOf<float> {
  using type = Float32;
};
template <>
struct ArithmeticOf<double> {
  using type = Float64;
};
template <>
struct ArithmeticOf<f16> {
  using type = Float32;
};
template <>
struct ArithmeticOf<bf16> {
  using type = PairsBf16;
};

MK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
MK_INLINE int64_t round_down(int64_t a, int64_t to) { return a / to * to; }
MK_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// The words of a row from `p` on, in the order of memory.
template <class M, class T>
MK_INLINE typename M::Words row_vector(const T* p) {
  if constexpr (M::step == 1)
    return load(p);
  else
    return load_words<typename M::Words>(p);
}

// The first n elements of it; zeros in place of the others.
template <class M, class T>
MK_INLINE typename M::Words row_vector(const T* p, int64_t n) {
  if constexpr (M::step == 1) {
    return load_n(p, n);
  } else {
    typename M::Words w = {};
    __builtin_memcpy(&w, p, n * sizeof(T));
    return w;
  }
}

// How many vectors of a row's elements are read at once. Of bf16 that become floats two: the even elements and then the
// odd ones, an operation each, where vectors in the order of memory take two each.
template <class M, class T>
constexpr int read_vectors = 1;
template <>
constexpr int read_vectors<Float32, bf16> = 2;

// Elements of a row in the order in which read_vectors<M, T> vectors of T are read.
template <class M, class T>
MK_INLINE void row_vectors(const T* p, typename M::Words (&out)[1]) {
  out[0] = row_vector<M>(p);
}

template <class M, class T>
MK_INLINE void row_vectors(const bf16* p, vf (&out)[2]) {
  const vu both = load_words<vu>(p);
  out[0] = (vf)(both << 16);
  out[1] = (vf)(both & 0xffff0000u);
}

// The first n elements of them.
template <class M, class T>
MK_INLINE void row_vectors(const T* p, int64_t n, typename M::Words (&out)[read_vectors<M, T>]) {
  if constexpr (read_vectors<M, T> == 1) {
    out[0] = row_vector<M>(p, n);
  } else {
    T copy[2 * lanes] = {};
    __builtin_memcpy(copy, p, n * sizeof(T));
    row_vectors<M, T>(copy, out);
  }
}

template <int... I>
struct Indices {};
template <int n, int... I>
struct Count : Count<n - 1, n - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

template <int by, class V, int... I>
MK_INLINE V rotate(V v, Indices<I...>) {
  return __builtin_shufflevector(v, v, (I + by) % int{sizeof...(I)}...);
}

// Joins all lanes by halves, which is a fixed order; lane by lane the compiler goes through memory, at twice the time
// of a short row's whole softmax.
template <int half, class V, class Join>
MK_INLINE auto fold(V v, Join join) {
  if constexpr (half == 0)
    return v[0];
  else
    return fold<half / 2>(join(v, rotate<half>(v, typename Count<sizeof(V) / sizeof(v[0])>::type())), join);
}

// Exchanges the blocks of `half` lanes at odd places in a with those at even places in b.
template <int half, class V, int... I>
MK_INLINE void exchange(V& a, V& b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (I & half ? n + I - half : I)...);
  b = __builtin_shufflevector(a, b, (I & half ? n + I : I + half)...);
  a = low;
}

template <int half, int n, class V>
MK_INLINE void exchange_all(V (&t)[n]) {
#pragma GCC unroll 16
  for (int i = 0; i < n; i++)
    if (!(i & half)) exchange<half>(t[i], t[i + half], typename Count<sizeof(V) / sizeof(t[0][0])>::type());
}

// Vector i with the lanes i of all n; each block of n x n lanes by itself, where a vector has more.
template <int n, class V>
MK_INLINE void transpose(V (&t)[n]) {
  if constexpr (n > 8) exchange_all<8>(t);
  if constexpr (n > 4) exchange_all<4>(t);
  if constexpr (n > 2) exchange_all<2>(t);
  exchange_all<1>(t);
}

// Of a and b the blocks of four lanes at even places, and those at odd ones, a's before b's.
template <class V, int... I>
MK_INLINE void take_turns(V& a, V& b, Indices<I...>) {
  const V even = __builtin_shufflevector(a, b, (I / 4 * 8 + I % 4)...);
  b = __builtin_shufflevector(a, b, (I / 4 * 8 + 4 + I % 4)...);
  a = even;
}

// Lanes of a and b in turn, from the lower half of each block of four lanes, and from the upper one: what an
// instruction does without a table.
template <class V, int... I>
MK_INLINE void unpack(V& a, V& b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + I % 2 * n)...);
  b = __builtin_shufflevector(a, b, (I / 4 * 4 + 2 + I % 4 / 2 + I % 2 * n)...);
  a = low;
}

template <class V, class F, class Join>
MK_INLINE V joined(V a, V b, F f, Join join) {
  f(a, b, typename Count<sizeof(V) / sizeof(a[0])>::type());
  return join(a, b);
}

// Lane i becomes what all lanes of t[i % n] join to, n a power of two, where only blocks of `half` lanes are left to be
// joined.
template <int half, int n, class V, class Join>
MK_INLINE V join_blocks(V (&t)[n], Join join) {
  constexpr int lanes_of = sizeof(V) / sizeof(t[0][0]);
  if constexpr (n == 1) {
    V whole = t[0];
    if constexpr (half < lanes_of) {
      V more[1] = {join(whole, rotate<half>(whole, typename Count<lanes_of>::type()))};
      return join_blocks<2 * half>(more, join);
    }
    return whole;
  } else {
    V u[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; i++)
      u[i] = joined(t[2 * i], t[2 * i + 1], [](V& a, V& b, auto order) { exchange<half>(a, b, order); }, join);
    return join_blocks<2 * half>(u, join);
  }
}

// The same for as many vectors as a vector has blocks of four lanes.
template <int n, class V, class Join>
MK_INLINE V join_all_blocks(V (&t)[n], Join join) {
  if constexpr (n == 1) {
    return t[0];
  } else {
    V u[n / 2];
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; i++)
      u[i] = joined(t[2 * i], t[2 * i + 1], [](V& a, V& b, auto order) { take_turns(a, b, order); }, join);
    return join_all_blocks(u, join);
  }
}

// Lane i becomes what all lanes of t[i % n] join to, n a power of two up to the lanes.
template <int n, class V, class Join>
MK_INLINE V join_each(V (&t)[n], Join join) {
  constexpr int lanes_of = sizeof(V) / sizeof(t[0][0]);
  if constexpr (n < 4 || sizeof(t[0][0]) != 4) {
    return join_blocks<1>(t, join);
  } else {
    const auto in_turn = [](V& a, V& b, auto order) { unpack(a, b, order); };
    V u[n / 4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i += 4) {
      const V even = joined(t[i], t[i + 2], in_turn, join);
      const V odd = joined(t[i + 1], t[i + 3], in_turn, join);
      u[i / 4] = joined(even, odd, in_turn, join);
    }
    if constexpr (n == lanes_of)
      return join_all_blocks(u, join);
    else
      return join_blocks<4>(u, join);
  }
}

template <int n, class V>
MK_INLINE V sum_each(V (&t)[n]) {
  return join_each(t, [](V a, V b) { return a + b; });
}

}  // namespace
}  // namespace mk::MK_ISA

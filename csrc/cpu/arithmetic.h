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

template <class V, class T>
MK_INLINE V load_words(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
MK_INLINE void store_words(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
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

// Lane i becomes the sum of t[i % n], n a power of two up to the lanes.
template <int half = 1, int n, class V>
MK_INLINE V sum_each(V (&t)[n]) {
  constexpr int lanes_of = sizeof(V) / sizeof(t[0][0]);
  if constexpr (n == 1) {
    V whole = t[0];
    if constexpr (half < lanes_of) {
      V more[1] = {whole + rotate<half>(whole, typename Count<lanes_of>::type())};
      return sum_each<2 * half>(more);
    }
    return whole;
  } else {
    V u[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; i++) {
      V a = t[2 * i], b = t[2 * i + 1];
      exchange<half>(a, b, typename Count<lanes_of>::type());
      u[i] = a + b;
    }
    return sum_each<2 * half>(u);
  }
}

}  // namespace
}  // namespace mk::MK_ISA

// What the attention kernels share: the product of a few rows with packed columns held in registers, and the online
// softmax of a row of scores.
#pragma once
#include "cpu/arithmetic.h"
#include "cpu/attention.h"
#include "cpu/matrix.h"

namespace mk::MK_ISA {
namespace {

// Registers: rows * vectors accumulators, one row of columns, one broadcast. 32 of them hold 6 x 4, 16 hold 6 x 2.
constexpr int strip_rows = 6;
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int strip_vectors = 2;
#else
constexpr int strip_vectors = 4;
#endif

// Whether the matrix unit multiplies; rows of a strip, and the unit in which rows come.
template <class M>
constexpr bool by_matrices = MK_AMX && M::step == 2;
template <class M>
constexpr int64_t rows_of_strip = by_matrices<M> ? 32 : strip_rows;
template <class M>
constexpr int64_t rows_unit = by_matrices<M> ? 16 : 1;

template <class V>
MK_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <class M>
MK_INLINE typename M::Scalar largest(typename M::Vec v) {
  return fold<M::width / 2>(v, [](auto a, auto b) { return larger(a, b); });
}

template <class M>
MK_INLINE typename M::Scalar total(typename M::Vec v) {
  return fold<M::width / 2>(v, [](auto a, auto b) { return a + b; });
}

// c[r][n] += sum over k of a[r, k] * column(k, n).
template <class M, int MR, int NV, class Column>
MK_INLINE void multiply(const typename M::Word* a, int64_t a_row, int64_t steps, typename M::Vec (&c)[MR][NV],
                        Column column) {
  for (int64_t k = 0; k < steps; k++) {
    typename M::Words b[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) b[n] = column(k, n);
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++) {
      const typename M::Words x = M::splat(a[r * a_row + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) M::multiply_add(c[r][n], x, b[n]);
    }
  }
}

// 1 + c[0] f + c[1] f^2 + ...
template <int n>
MK_INLINE vf polynomial(vf f, const float (&c)[n]) {
  vf p = c[n - 1] * f + c[n - 2];
#pragma GCC unroll 6
  for (int i = n - 3; i >= 0; i--) p = p * f + c[i];
  return p * f + 1.f;
}

// 2^x for x <= 0: exactly 1 at 0, exactly 0 below -125 or deeper; relative error 1e-7 at degree 5, 2e-8 at 6. nan
// stays. The fraction is in [0, 1) where the processor scales by a power of two, floor and all, else in [-1/2, 1/2].
template <int degree>
MK_INLINE vf exp2_negative(vf x) {
#if defined(__AVX512DQ__)
  constexpr float c5[] = {0.693151295f, 0.240164444f, 0.0557999127f, 0.00901702978f, 0.0018671304f};
  constexpr float c6[] = {0.693147063f, 0.240229309f, 0.0554852821f, 0.00967545155f, 0.00124678458f, 0.000216129178f};
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 1);
#else
  constexpr float c5[] = {0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
  constexpr float c6[] = {0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f, 0.0013398875f, 0.00015353362f};
  const vf inside = x < -125.f ? set1(-125.f) : x;
  const vf shifted = inside + round_magic, f = inside - (shifted - round_magic);
#endif
  vf p;
  if constexpr (degree == 6)
    p = polynomial(f, c6);
  else
    p = polynomial(f, c5);
#if defined(__AVX512DQ__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const vf power = (vf)(((vi)shifted << 23) + (127 << 23));
  return x < -125.f ? vf{} : p * power;
#endif
}

template <int degree>
MK_INLINE vd exp2_negative(vd x) {
  for (int i = 0; i < lanes / 2; i++) x[i] = __builtin_exp2(x[i]);
  return x;
}

// While it lives, results below the normal numbers are 0 on this thread. Where the processor scales by a power of two,
// exponentials of scores far below the largest one would be such results, which take 150 cycles each.
class NoSubnormals {
 public:
#if defined(__AVX512DQ__)
  NoSubnormals() : before_(_mm_getcsr()) { set(before_ | 0x8000); }
  ~NoSubnormals() { set(before_); }
  NoSubnormals(const NoSubnormals&) = delete;

 private:
  // The compiler does not know that arithmetic depends on this; what is between two of these loads and stores memory.
  static void set(uint32_t control) { asm volatile("ldmxcsr %0" ::"m"(control) : "memory"); }
  const uint32_t before_;
#else
  NoSubnormals() {}
#endif
};

#if MK_AMX

// What the softmax of the matrix unit's rows knows, a row in each lane: the score that exponentials are relative to,
// that score scaled, and the factor of what was summed before.
struct Lagging {
  vf top, base, factor;
};

// Exponentials are relative to the largest score so far, or to one that is at most 2^8 times less: bf16 and float32
// hold both equally well, and most blocks leave what was summed before as it is. `before` is the top until now, `found`
// the largest score, at least that.
MK_INLINE Lagging lagging_base(vf before, vf found, float scale) {
  constexpr float slack = 8;
  const vf none = set1(-INFINITY);
  const vf top = (found - before) * scale <= slack ? before : found;  // not where both are -inf
  const vf base = top == none ? vf{} : top * scale;
  return {top, base, exp2_negative<5>((before == none ? none : before * scale) - base)};
}

#endif

// Probabilities as the product with the values takes them.
template <class M>
MK_INLINE void store_probabilities(typename M::Word* p, typename M::Vec e0, typename M::Vec e1) {
  if constexpr (M::step == 1) {
    store_words(p, e0);
    store_words(p + M::width, e1);
  } else {
#if MK_BF16
    store_words(p, (vu)_mm512_cvtne2ps_pbh((__m512)e1, (__m512)e0));
#endif
  }
}

// Scores outside [first, last) become -inf.
template <class M>
MK_INLINE void mask_row(typename M::Scalar* s, int64_t n, int64_t first, int64_t last) {
  for (int64_t j = 0; j < least(first, n); j++) s[j] = -INFINITY;
  for (int64_t j = most(last, 0); j < n; j++) s[j] = -INFINITY;
}

// The same where `n` is a multiple of whole vectors, which are stored whole: their next load would wait for single
// lanes to get to the cache.
template <class M>
MK_INLINE void mask_vectors(typename M::Scalar* s, int64_t n, int64_t first, int64_t last) {
  using Vec = typename M::Vec;
  using Scalar = typename M::Scalar;
  Vec lane;
  for (int i = 0; i < M::width; i++) lane[i] = i;
  const auto mask = [&](int64_t j) {
    const Vec at = lane + (Scalar)j, seen = at < (Scalar)first ? set1(Scalar(-INFINITY)) : load_words<Vec>(s + j);
    store_words(s + j, at >= (Scalar)last ? set1(Scalar(-INFINITY)) : seen);
  };
  int64_t j = 0;
  for (; j < least(first, n); j += M::width) mask(j);
  for (j = most(j, round_down(most(last, 0), M::width)); j < n; j += M::width) mask(j);
}

template <class Scalar>
struct RowState {
  Scalar top;  // the largest score so far
  Scalar sum;  // of exp2((score - top) * scale)
};

// Lane by lane the largest of a row of a multiple of two vectors; four chains of comparisons keep a long one from
// waiting for each.
template <class M>
MK_INLINE typename M::Vec top_of_row(const typename M::Scalar* s, int64_t n) {
  using Vec = typename M::Vec;
  constexpr int width = M::width;
  Vec top[4] = {load_words<Vec>(s), load_words<Vec>(s + width)};
  top[2] = top[0], top[3] = top[1];
  int64_t j = 2 * width;
  for (; j + 4 * width <= n; j += 4 * width)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) top[i] = larger(top[i], load_words<Vec>(s + j + i * width));
  if (j < n)
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) top[i] = larger(top[i], load_words<Vec>(s + j + i * width));
  return larger(larger(top[0], top[1]), larger(top[2], top[3]));
}

template <class M>
MK_INLINE typename M::Scalar largest_of_row(const typename M::Scalar* s, int64_t n) {
  return largest<M>(top_of_row<M>(s, n));
}

// What scores are taken relative to: the largest, where any key is visible.
template <class Scalar>
MK_INLINE Scalar base_of(Scalar top) {
  return top == -INFINITY ? 0 : top;
}

// Turns `n` scores, a multiple of two vectors, into exp2((score - base) * scale), and returns their sum. Subtracting
// before scaling makes the largest exactly 1, and with it a window of one key exact. `weights`, where given, multiply
// what is stored.
template <class M>
MK_INLINE typename M::Scalar exponentials(const typename M::Scalar* s, typename M::Word* p, int64_t n,
                                          typename M::Scalar base, typename M::Scalar scale,
                                          const typename M::Scalar* weights = nullptr) {
  using Vec = typename M::Vec;
  constexpr int width = M::width;
  Vec sum0 = {}, sum1 = {};
  for (int64_t j = 0; j < n; j += 2 * width) {
    Vec e0 = exp2_negative<M::degree>((load_words<Vec>(s + j) - base) * scale);
    Vec e1 = exp2_negative<M::degree>((load_words<Vec>(s + j + width) - base) * scale);
    sum0 += e0;
    sum1 += e1;
    if (weights) {
      e0 *= load_words<Vec>(weights + j);
      e1 *= load_words<Vec>(weights + j + width);
    }
    store_probabilities<M>(p + j / M::step, e0, e1);
  }
  return total<M>(sum0 + sum1);
}

// Scores are computed with the sign of the scale in q, so that the largest score is the largest exponent.
struct Scaling {
  double sign, magnitude;
};

MK_INLINE Scaling scaling(double scale) {
  return scale == 0 ? Scaling{0, 1} : scale < 0 ? Scaling{-1, -scale} : Scaling{1, scale};
}

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// A vector of columns of a row, from column d on, as far as there are any.
template <class M, class T>
MK_INLINE void store_columns(T* row, int64_t d, int64_t dim, typename M::Vec v) {
  if (d + M::width <= dim)
    store(row + d, v);
  else
    store_n(row + d, v, dim - d);
}

// The output row and the natural log of the softmax's denominator: 0 and -inf where no key is visible.
template <class M, class T>
MK_INLINE void finish_row(const Attention& a, const typename M::Scalar* acc, RowState<typename M::Scalar> state, T* out,
                          typename M::Scalar* lse) {
  using Vec = typename M::Vec;
  const typename M::Scalar inverse = 1 / state.sum;
  for (int64_t d = 0; d < a.dim; d += M::width) {
    const Vec sums = load_words<Vec>(acc + d);
    const Vec row = state.sum == 0 ? Vec{} : sizeof(T) == 2 ? sums * inverse : sums / state.sum;
    store_columns<M>(out, d, a.dim, row);
  }
  if (!lse) return;
  *lse = state.sum == 0 ? -INFINITY : state.top * scaling(a.scale).magnitude + __builtin_log((double)state.sum);
}

}  // namespace
}  // namespace mk::MK_ISA

#include "cpu/rms_norm.h"

#include "cpu/vec.h"

namespace mk::MK_ISA {
namespace {

// Sum of squares; with kAdd of the rounded x + residual, which goes to `total`. Float partial sums of at most 64 terms,
// which are summed in double, keep the error within float's rounding for any n.
template <class T, bool kAdd>
MK_INLINE double sum_of_squares(const T* x, const T* residual, T* total, int64_t n) {
  constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  const auto value = [&](int64_t i) {
    V v = load(x + i);
    if constexpr (kAdd) {
      v = round_to<T>(v + load(residual + i));
      store(total + i, v);
    }
    return v;
  };
  double whole = 0;
  V part[4] = {};
  const auto add_part = [&] { whole += sum((part[0] + part[1]) + (part[2] + part[3])); };
  int64_t i = 0;
  while (i + 4 * w <= n) {
    const int64_t end = n - i < 256 * w ? n : i + 256 * w;
    for (; i + 4 * w <= end; i += 4 * w)
      for (int j = 0; j < 4; j++) {
        const V v = value(i + j * w);
        part[j] += v * v;
      }
    if (i + 4 * w > n) break;
    add_part();
    for (V& p : part) p = V{};
  }
  for (; i + w <= n; i += w) {
    const V v = value(i);
    part[0] += v * v;
  }
  if (i < n) {
    V v = load_n(x + i, n - i);
    if constexpr (kAdd) {
      v = round_to<T>(v + load_n(residual + i, n - i));
      store_n(total + i, v, n - i);
    }
    part[1] += v * v;
  }
  add_part();
  return whole;
}

template <class T, class W, bool kModel, class S>
MK_INLINE void scale(const T* x, S rstd, const W* weight, W* y, int64_t n) {
  constexpr int w = Format<T>::width;
  const auto product = [&](vec_of<T> v, vec_of<T> by) {
    v *= rstd;
    return (kModel ? round_to<T>(v) : v) * by;
  };
  int64_t i = 0;
  for (; i + w <= n; i += w) store(y + i, product(load(x + i), load(weight + i)));
  if (i < n) store_n(y + i, product(load_n(x + i, n - i), load_n(weight + i, n - i)), n - i);
}

template <class T, class W, bool kModel, bool kAdd>
void run(const RmsNormRows& a) {
  using S = decltype(sum(vec_of<T>{}));
  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t r = 0; r < a.rows; r++, x += a.x_stride, residual += kAdd ? a.residual_stride : 0) {
    T* total = kAdd ? static_cast<T*>(a.total) + r * a.n : nullptr;
    const double mean = sum_of_squares<T, kAdd>(x, residual, total, a.n) / double(a.n);
    const S rstd = S(1 / __builtin_sqrt(mean + a.eps));
    static_cast<S*>(a.rstd)[r] = rstd;
    scale<T, W, kModel>(kAdd ? total : x, rstd, weight, static_cast<W*>(a.y) + r * a.n, a.n);
  }
}

}  // namespace

#define MK_ADD(T, W, model) {run<T, W, model, false>, run<T, W, model, true>}
#define MK_MODEL(T, W) {MK_ADD(T, W, false), MK_ADD(T, W, true)}
const RmsNormKernels rms_norm = {{
    {MK_MODEL(float, float), {}},
    {MK_MODEL(bf16, bf16), MK_MODEL(bf16, float)},
    {MK_MODEL(f16, f16), MK_MODEL(f16, float)},
    {MK_MODEL(double, double), {}},
}};

}  // namespace mk::MK_ISA

#include "cpu/rms_norm_backward.h"

#include "cpu/vec.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t block_rows = 16;  // summed alone before they are added to the rest: short sums err less

// Sum of x * dy * weight. Float partial sums of at most 64 terms are summed in double, as in the forward.
template <class T, class W>
MK_INLINE double dot(const T* x, const W* dy, const W* weight, int64_t n) {
  constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  double whole = 0;
  V part[4] = {};
  const auto add_part = [&] { whole += sum((part[0] + part[1]) + (part[2] + part[3])); };
  const auto value = [&](int64_t i) { return load(x + i) * (load(dy + i) * load(weight + i)); };
  int64_t i = 0;
  while (i + 4 * w <= n) {
    const int64_t end = n - i < 256 * w ? n : i + 256 * w;
    for (; i + 4 * w <= end; i += 4 * w)
      for (int j = 0; j < 4; j++) part[j] += value(i + j * w);
    if (i + 4 * w > n) break;
    add_part();
    for (V& p : part) p = V{};
  }
  for (; i + w <= n; i += w) part[0] += value(i);
  if (const int64_t left = n - i; left)
    part[1] += load_n(x + i, left) * (load_n(dy + i, left) * load_n(weight + i, left));
  add_part();
  return whole;
}

// What one row gives: dx, and its addition to dweight.
template <class T, class W, bool kModel, bool kTotal, class S>
MK_INLINE void row(const T* x, const W* dy, const T* dtotal, const W* weight, S rstd, T* dx, S* dweight, int64_t n) {
  constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  const S mean = S(double(rstd) * dot(x, dy, weight, n) / double(n));
  const auto value = [&](V x, V d, V by, V& sum) {
    const V normed = x * rstd;
    sum += d * (kModel ? round_to<T>(normed) : normed);
    return (d * by - normed * mean) * rstd;
  };
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    V sum = load(dweight + i), out = value(load(x + i), load(dy + i), load(weight + i), sum);
    if constexpr (kTotal) out += load(dtotal + i);
    store(dx + i, out);
    store(dweight + i, sum);
  }
  if (const int64_t left = n - i; left) {
    V sum = load_n(dweight + i, left);
    V out = value(load_n(x + i, left), load_n(dy + i, left), load_n(weight + i, left), sum);
    if constexpr (kTotal) out += load_n(dtotal + i, left);
    store_n(dx + i, out, left);
    store_n(dweight + i, sum, left);
  }
}

// to += from, which becomes 0.
template <class S>
MK_INLINE void move_sums(S* to, S* from, int64_t n) {
  constexpr int w = Format<S>::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(to + i, load(to + i) + load(from + i));
  for (; i < n; i++) to[i] += from[i];
  __builtin_memset(from, 0, n * sizeof(S));
}

template <class T, class W, bool kModel, bool kTotal>
void run(const RmsNormGradients& a) {
  using S = decltype(sum(vec_of<T>{}));
  const T *x = static_cast<const T*>(a.x), *dtotal = static_cast<const T*>(a.dtotal);
  const W *dy = static_cast<const W*>(a.dy), *weight = static_cast<const W*>(a.weight);
  S *whole = static_cast<S*>(a.dweight), *block = static_cast<S*>(a.block);
  if (a.at == 0) {
    __builtin_memset(whole, 0, a.n * sizeof(S));
    __builtin_memset(block, 0, a.n * sizeof(S));
  }
  for (int64_t r = 0; r < a.rows; r++) {
    row<T, W, kModel, kTotal>(x + r * a.x_stride, dy + r * a.dy_stride, kTotal ? dtotal + r * a.dtotal_stride : nullptr,
                              weight, static_cast<const S*>(a.rstd)[r], static_cast<T*>(a.dx) + r * a.n, block, a.n);
    if (const int64_t done = a.at + r + 1; done % block_rows == 0 || done == a.of) move_sums(whole, block, a.n);
  }
}

template <class S, class W>
void join(const void* partials, int64_t parts, int64_t n, int64_t first, int64_t count, void* dweight) {
  constexpr int w = Format<W>::width;
  const S* from = static_cast<const S*>(partials);
  for (int64_t i = first; i < first + count; i += w) {
    const int64_t some = first + count - i < w ? first + count - i : w;
    double sums[Format<W>::width] = {};
    for (int64_t p = 0; p < parts; p++)
      for (int64_t j = 0; j < some; j++) sums[j] += from[p * n + i + j];
    vec_of<W> v = {};
    for (int64_t j = 0; j < some; j++) v[j] = sums[j];
    store_n(static_cast<W*>(dweight) + i, v, some);
  }
}

}  // namespace

#define MK_TOTAL(T, W, model) {run<T, W, model, false>, run<T, W, model, true>}
#define MK_MODEL(T, W) {MK_TOTAL(T, W, false), MK_TOTAL(T, W, true)}
const RmsNormBackwardKernels rms_norm_backward = {
    {
        {MK_MODEL(float, float), {}},
        {MK_MODEL(bf16, bf16), MK_MODEL(bf16, float)},
        {MK_MODEL(f16, f16), MK_MODEL(f16, float)},
        {MK_MODEL(double, double), {}},
    },
    {
        {join<float, float>, nullptr},
        {join<float, bf16>, join<float, float>},
        {join<float, f16>, join<float, float>},
        {join<double, double>, nullptr},
    },
};

}  // namespace mk::MK_ISA

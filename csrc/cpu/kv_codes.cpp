#include "cpu/kv_codes.h"

#include "cpu/codes.h"

namespace mk::MK_ISA {
namespace {

constexpr int limit = 127;

typedef int64_t vl __attribute__((vector_size(4 * MK_LANES)));

// The larger of a and |b| by their bits, in which nan is beyond infinity.
MK_INLINE vf magnitude(vf a, vf b) {
  const vi bits = (vi)b & 0x7fffffff;
  return (vi)a > bits ? a : (vf)bits;
}
MK_INLINE vd magnitude(vd a, vd b) {
  const vl bits = (vl)b & 0x7fffffffffffffff;
  return (vl)a > bits ? a : (vd)bits;
}

// Adding it leaves no bits after the point.
constexpr float rounder(vf) { return round_magic; }
constexpr double rounder(vd) { return 6755399441055744.; }

template <class T, class F>
MK_INLINE void each_vector(const T* x, int64_t dim, F f) {
  constexpr int w = Format<T>::width;
  int64_t d = 0;
  for (; d + w <= dim; d += w) f(d, w, load(x + d));
  if (d < dim) f(d, int(dim - d), load_n(x + d, dim - d));
}

template <class T>
auto quantise_head(const T* x, int64_t dim, int8_t* codes) {
  using V = vec_of<T>;
  constexpr int w = Format<T>::width;
  V top = {};
  each_vector(x, dim, [&](int64_t, int, V v) __attribute__((always_inline)) { top = magnitude(top, v); });
  const auto scale = fold<w / 2>(top, [](V a, V b) { return magnitude(a, b); }) / limit;
  if (!(scale > 0 && scale < INFINITY)) {
    __builtin_memset(codes, 0, dim);
    return scale;
  }
  each_vector(x, dim, [&](int64_t d, int n, V v) __attribute__((always_inline)) {
    v /= scale;
    v = (v + rounder(V{})) - rounder(V{});
    for (int i = 0; i < n; i++) codes[d + i] = (int8_t)(v[i] > limit ? limit : v[i] < -limit ? -limit : v[i]);
  });
  return scale;
}

template <class T>
void quantise(const void* x, int64_t x_head, int64_t heads, int64_t dim, int8_t* codes, int64_t codes_head, void* scale,
              int64_t scale_head) {
  for (int64_t h = 0; h < heads; h++) {
    const auto s = quantise_head((const T*)x + h * x_head, dim, codes + h * codes_head);
    __builtin_memcpy((char*)scale + h * scale_head * (int64_t)sizeof s, &s, sizeof s);
  }
}

template <class T>
void dequantise(const int8_t* codes, int64_t codes_head, const void* scale, int64_t scale_head, int64_t heads,
                int64_t dim, void* out) {
  using M = typename ArithmeticOf<T>::type;
  using V = vec_of<T>;
  constexpr int w = Format<T>::width;
  const auto* scales = (const typename M::Scalar*)scale;
  for (int64_t h = 0; h < heads; h++, codes += codes_head) {
    T* to = (T*)out + h * dim;
    for (int64_t d = 0; d < dim; d += w) {
      V v = {};
      for (int i = 0; i < least(w, dim - d); i++) v[i] = codes[d + i];
      store_n(to + d, v * scales[h * scale_head], least(w, dim - d));
    }
  }
}

}  // namespace

const KvCodesKernels kv_codes = {
    {quantise<float>, quantise<bf16>, quantise<f16>, quantise<double>},
    {dequantise<float>, dequantise<bf16>, dequantise<f16>, dequantise<double>},
};

}  // namespace mk::MK_ISA

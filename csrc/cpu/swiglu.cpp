#include "cpu/swiglu.h"

#include "cpu/traffic.h"

namespace mk::MK_ISA {
namespace {

template <class T>
MK_INLINE vec_of<T> silu_times(vec_of<T> gate, vec_of<T> up) {
  if constexpr (sizeof(T) == 2)
    return gate * up / (exp_fast(-gate) + 1);
  else
    return gate / (exp(-gate) + 1) * up;
}

template <class T, bool kStream>
void row(const T* gate, const T* up, T* out, int64_t n) {
  constexpr int w = Format<T>::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const vec_of<T> y = silu_times<T>(load(gate + i), load(up + i));
    put<T, kStream>(out + i, y);
  }
  if (i < n) store_n(out + i, silu_times<T>(load_n(gate + i, n - i), load_n(up + i, n - i)), n - i);
}

template <class T>
void run(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t n,
         bool past_caches) {
  const auto one = past_caches ? row<T, true> : row<T, false>;
  for (int64_t r = 0; r < rows; r++)
    one((const T*)gate + r * gate_stride, (const T*)up + r * up_stride, (T*)out + r * n, n);
  if (past_caches) stream_fence();
}

}  // namespace

const SwigluKernels swiglu = {{run<float>, run<bf16>, run<f16>, run<double>}};

}  // namespace mk::MK_ISA

#include "cpu/swiglu.h"

#include "cpu/two.h"

namespace mk::MK_ISA {
namespace {

template <class T>
MK_INLINE vec_of<T> silu_times(vec_of<T> gate, vec_of<T> up) {
  if constexpr (sizeof(T) == 2)
    return gate * up / sigmoid_divisor(gate);
  else
    return gate / (exp(-gate) + 1) * up;
}

template <class T, bool kStream>
void row(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out, int64_t n) {
  constexpr int w = Format<T>::width;
  constexpr int64_t step = line_of<T>;
  const auto put_product = [&](int64_t i) {
    const two_of<T> g = load_two<Order::apart>(gate + i), u = load_two<Order::apart>(up + i);
    const two_of<T> y = {silu_times<T>(g.a, u.a), silu_times<T>(g.b, u.b)};
    put_two<Order::apart, Nans::short_ones, kStream>(out + i, y);
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    fetch_later(gate, i, step * sizeof(T), n, gate_stride);
    fetch_later(up, i, step * sizeof(T), n, up_stride);
    for (int64_t j = 0; j < step; j += 2 * w) put_product(i + j);
  }
  for (; i + 2 * w <= n; i += 2 * w) put_product(i);
  for (; i + w <= n; i += w) put<T, kStream>(out + i, silu_times<T>(load(gate + i), load(up + i)));
  if (i < n) store_n(out + i, silu_times<T>(load_n(gate + i, n - i), load_n(up + i, n - i)), n - i);
}

template <class T>
void run(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t n,
         bool past_caches) {
  const auto one = past_caches ? row<T, true> : row<T, false>;
  for (int64_t r = 0; r < rows; r++)
    one((const T*)gate + r * gate_stride, gate_stride, (const T*)up + r * up_stride, up_stride, (T*)out + r * n, n);
}

}  // namespace

const SwigluKernels swiglu = {{run<float>, run<bf16>, run<f16>, run<double>}};

}  // namespace mk::MK_ISA

#include "cpu/swiglu_backward.h"

#include "cpu/two.h"

namespace mk::MK_ISA {
namespace {

template <class T>
struct Gradients {
  vec_of<T> gate, up;
};

// dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, s = sigmoid(gate).
template <class T>
MK_INLINE Gradients<T> gradients(vec_of<T> dy, vec_of<T> gate, vec_of<T> up) {
  vec_of<T> s;
  if constexpr (sizeof(T) == 2)
    s = 1 / sigmoid_divisor(gate);
  else
    s = 1 / (exp(-gate) + 1);
  return {dy * up * s * (gate * (1 - s) + 1), dy * gate * s};
}

template <class T>
struct Inputs {
  const T *dy, *gate, *up;
  int64_t dy_stride, gate_stride, up_stride;
};

template <class T, bool kStream>
void row(const Inputs<T>& in, T* dgate, T* dup, int64_t n) {
  constexpr int w = Format<T>::width;
  constexpr int64_t step = line_of<T>;
  constexpr Order o = Order::apart;
  const T *dy = in.dy, *gate = in.gate, *up = in.up;
  const auto put_gradients = [&](int64_t i) {
    const two_of<T> y = load_two<o>(dy + i), g = load_two<o>(gate + i), u = load_two<o>(up + i);
    const Gradients<T> first = gradients<T>(y.a, g.a, u.a), second = gradients<T>(y.b, g.b, u.b);
    put_two<o, Nans::short_ones, kStream>(dgate + i, {first.gate, second.gate});
    put_two<o, Nans::short_ones, kStream>(dup + i, {first.up, second.up});
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    fetch_later(dy, i, step * sizeof(T), n, in.dy_stride);
    fetch_later(gate, i, step * sizeof(T), n, in.gate_stride);
    fetch_later(up, i, step * sizeof(T), n, in.up_stride);
    for (int64_t j = 0; j < step; j += 2 * w) put_gradients(i + j);
  }
  for (; i + 2 * w <= n; i += 2 * w) put_gradients(i);
  for (; i + w <= n; i += w) {
    const Gradients<T> d = gradients<T>(load(dy + i), load(gate + i), load(up + i));
    put<T, kStream>(dgate + i, d.gate);
    put<T, kStream>(dup + i, d.up);
  }
  if (const int64_t left = n - i; left) {
    const Gradients<T> d = gradients<T>(load_n(dy + i, left), load_n(gate + i, left), load_n(up + i, left));
    store_n(dgate + i, d.gate, left);
    store_n(dup + i, d.up, left);
  }
}

template <class T>
void run(const SwigluGradients& a) {
  const auto one = a.past_caches ? row<T, true> : row<T, false>;
  for (int64_t r = 0; r < a.rows; r++)
    one({(const T*)a.dy + r * a.dy_stride, (const T*)a.gate + r * a.gate_stride, (const T*)a.up + r * a.up_stride,
         a.dy_stride, a.gate_stride, a.up_stride},
        (T*)a.dgate + r * a.out_stride, (T*)a.dup + r * a.out_stride, a.n);
}

}  // namespace

const SwigluBackwardKernels swiglu_backward = {{run<float>, run<bf16>, run<f16>, run<double>}};

}  // namespace mk::MK_ISA

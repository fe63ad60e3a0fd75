// mistral_kernels::swiglu_backward and swiglu_packed_backward on a CPU.
#include "cpu/swiglu_backward.h"

#include "torch/binding.h"
#include "torch/traffic.h"
#include "torch/work.h"

namespace mk {
namespace {

struct Places {
  const char *dy, *gate, *up;
  char *dgate, *dup;
};

// `rows`: of dy, gate and up, n elements each that lie side by side.
void run(Dtype dtype, const Places& p, int64_t out_stride, const Rows<3>& rows, int64_t n) {
  const int64_t size = size_of(dtype), total = rows.count() * n;
  const auto kernel = pick(swiglu_backward_tiers).run[static_cast<int>(dtype)];
  const bool past = past_caches(total * size, p.dgate, p.dup, rows.count() > 1 ? out_stride * size : 0);
  if (rows.count() == 1) {
    // Shares are multiples of a cache line.
    in_pieces((total + 63) / 64, grain_elements / 64, [&](int64_t begin, int64_t end, int64_t) {
      const int64_t first = begin * 64, count = (end * 64 < total ? end * 64 : total) - first, at = first * size;
      kernel({p.dy + at, p.gate + at, p.up + at, p.dgate + at, p.dup + at, count, count, count, 0, 1, count, past});
    });
    return;
  }
  in_pieces(rows.count(), grain_rows(n), [&](int64_t begin, int64_t end, int64_t) {
    rows.each(begin, end, [&](int64_t first, int64_t count, const int64_t* at) {
      const int64_t to = first * out_stride * size;
      kernel({p.dy + at[0] * size, p.gate + at[1] * size, p.up + at[2] * size, p.dgate + to, p.dup + to, rows.stride(0),
              rows.stride(1), rows.stride(2), out_stride, count, n, past});
    });
  });
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_in, const Tensor& gate_in, const Tensor& up_in) {
  const Tensor dy = unit_stride(dy_in), gate = unit_stride(gate_in), up = unit_stride(up_in);
  const Dtype dtype = dtype_of(gate);
  STD_TORCH_CHECK(dtype_of(up) == dtype && up.numel() == gate.numel() && up.dim() == gate.dim() &&
                      dtype_of(dy) == dtype && dy.numel() == gate.numel() && dy.dim() == gate.dim(),
                  "dy, gate and up must be of one shape and dtype");
  Tensor dgate = empty(gate.sizes(), dtype), dup = empty(gate.sizes(), dtype);
  if (!dgate.numel()) return {dgate, dup};
  Rows<3> rows({&dy, &gate, &up}, 0);
  const int64_t n = rows.take_unit_stride();
  run(dtype, {data(dy), data(gate), data(up), mutable_data(dgate), mutable_data(dup)}, n, rows, n);
  return {dgate, dup};
}

Tensor swiglu_packed_backward(const Tensor& dy_in, const Tensor& packed) {
  const Tensor dy = unit_stride(dy_in), both = unit_stride(packed);
  const Dtype dtype = dtype_of(both);
  STD_TORCH_CHECK(dtype_of(dy) == dtype && dy.dim() == both.dim() && dy.numel() * 2 == both.numel(),
                  "dy must be [..., F] of gate_up's dtype [..., 2F]");
  Tensor out = empty(both.sizes(), dtype);
  if (!out.numel()) return out;
  const Rows<3> rows({&dy, &both, &both}, 1);
  const int64_t n = both.size(-1) / 2, half = n * size_of(dtype);
  char* to = mutable_data(out);
  run(dtype, {data(dy), data(both), data(both) + half, to, to + half}, 2 * n, rows, n);
  return out;
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::swiglu_backward>(m, "swiglu_backward");
  mk::implement<&mk::swiglu_packed_backward>(m, "swiglu_packed_backward");
}

// mistral_kernels::swiglu and swiglu_packed on a CPU.
#include "cpu/swiglu.h"

#include "torch/ops.h"
#include "torch/traffic.h"
#include "torch/work.h"

namespace mk {
namespace {

// gate and up: `rows`' tensors, from these addresses on, in rows of n elements that lie side by side.
void run(Dtype dtype, const char* gate, const char* up, char* out, const Rows<2>& rows, int64_t n) {
  const int64_t size = size_of(dtype), total = rows.count() * n;
  const auto kernel = pick(swiglu_tiers).run[static_cast<int>(dtype)];
  const bool past = past_caches(total * size, out, rows.count() > 1 ? n * size : 0);
  if (rows.count() == 1) {
    // Shares are multiples of a cache line.
    in_pieces((total + 63) / 64, grain_elements / 64, [&](int64_t begin, int64_t end, int64_t) {
      const int64_t first = begin * 64, count = (end * 64 < total ? end * 64 : total) - first;
      kernel(gate + first * size, count, up + first * size, count, out + first * size, 1, count, past);
    });
    return;
  }
  in_pieces(rows.count(), grain_rows(n), [&](int64_t begin, int64_t end, int64_t) {
    rows.each(begin, end, [&](int64_t first, int64_t count, const int64_t* at) {
      kernel(gate + at[0] * size, rows.stride(0), up + at[1] * size, rows.stride(1), out + first * n * size, count, n,
             past);
    });
  });
}

}  // namespace

Tensor swiglu(const Tensor& gate_in, const Tensor& up_in) {
  const Dtype dtype = dtype_of(gate_in);
  on_cpu({&gate_in, &up_in});
  STD_TORCH_CHECK(dtype_of(up_in) == dtype && same_shape(gate_in, up_in), "gate and up must be of one shape and dtype");
  const Tensor gate = unit_stride(gate_in), up = unit_stride(up_in);
  Tensor out = empty(gate.sizes(), dtype);
  if (!out.numel()) return out;
  Rows<2> rows({&gate, &up}, 0);
  const int64_t n = rows.take_unit_stride();
  run(dtype, data(gate), data(up), mutable_data(out), rows, n);
  return out;
}

namespace {

Tensor swiglu_packed(const Tensor& packed) {
  const Tensor both = unit_stride(packed);
  const Dtype dtype = dtype_of(both);
  const int64_t dims = both.dim();
  on_cpu({&both});
  STD_TORCH_CHECK(dims >= 1 && dims <= max_dims && both.size(dims - 1) % 2 == 0,
                  "gate_up must be [..., 2F], of at most ", max_dims, " dimensions");
  const int64_t n = both.size(dims - 1) / 2;
  int64_t sizes[max_dims];
  for (int64_t d = 0; d < dims; d++) sizes[d] = d + 1 < dims ? both.size(d) : n;
  Tensor out = empty({sizes, static_cast<size_t>(dims)}, dtype);
  if (!out.numel()) return out;
  const Rows<2> rows({&both, &both}, 1);
  run(dtype, data(both), data(both) + n * size_of(dtype), mutable_data(out), rows, n);
  return out;
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::swiglu>(m, "swiglu");
  mk::implement<&mk::swiglu_packed>(m, "swiglu_packed");
}

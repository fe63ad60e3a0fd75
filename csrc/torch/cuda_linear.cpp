// mistral_kernels::linear of few rows on a GPU.
#include "cuda/linear.h"
#include "torch/cuda_device.h"

namespace mk {
namespace {

Tensor rows_of_unit_stride(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1 ? t : contiguous(t); }

Tensor linear_cuda(const Tensor& x_in, const Tensor& weight_in, Maybe bias_in) {
  STD_TORCH_CHECK(x_in.dim() >= 1 && weight_in.dim() == 2 && x_in.size(-1) == weight_in.size(1),
                  "x must be [..., K] for a weight [N, K]");
  const int64_t k = weight_in.size(1), n = weight_in.size(0), dims = x_in.dim();
  const Dtype dtype = dtype_of(x_in);
  STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->numel() == n), "bias must be [", n, "]");
  STD_TORCH_CHECK(dtype_of(weight_in) == dtype && (!bias_in || dtype_of(*bias_in) == dtype),
                  "x, weight and bias must be of one dtype");
  STD_TORCH_CHECK(dims <= max_dims, "x has ", dims, " dimensions; at most ", max_dims, " are supported");
  STD_TORCH_CHECK(n <= INT32_MAX, "a weight of ", n, " rows is too large");
  const Device device(x_in);
  const Tensor weight = rows_of_unit_stride(weight_in);
  const Maybe bias = bias_in ? Maybe(contiguous(*bias_in)) : std::nullopt;
  Tensor x = unit_stride(x_in);
  if (Rows<1>({&x}, 1).runs() > 1) x = contiguous(x);
  const Rows<1> rows({&x}, 1);
  int64_t sizes[max_dims];
  for (int64_t d = 0; d < dims; d++) sizes[d] = d + 1 < dims ? x.size(d) : n;
  const Tensor y = device_empty({sizes, static_cast<size_t>(dims)}, dtype, x);
  if (!y.numel()) return y;
  STD_TORCH_CHECK(rows.count() <= cuda::linear_few_rows, "x has ", rows.count(), " rows; at most ",
                  cuda::linear_few_rows, " are supported");
  cuda::LinearFew a = {};
  a.x = device_data(x), a.weight = device_data(weight);
  if (bias) a.bias = device_data(*bias);
  a.y = device_mutable_data(y);
  a.m = static_cast<int>(rows.count()), a.n = static_cast<int>(n), a.k = k;
  a.x_row = a.m > 1 ? rows.stride(0) : 0, a.weight_row = weight.stride(0);
  a.dtype = static_cast<int>(dtype);
  check_launch(mk_cuda_linear(a, device.stream()), "linear");
  return y;
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, MK_CUDA_KEY, m) { m.impl("linear_cuda", mk::boxed<&mk::linear_cuda>); }

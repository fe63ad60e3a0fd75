// mistral_kernels::linear on a CPU: few rows here, more by torch's matrix product.
#include "cpu/linear.h"

#include <algorithm>

#include "torch/ops.h"

namespace mk {
namespace {

// Of the weight, what keeps a thread busy for some microseconds.
constexpr int64_t grain_bytes = int64_t{1} << 16;

Tensor by_torch(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool readable(const Tensor& weight) { return weight.stride(1) == 1 || weight.size(1) == 1; }

}  // namespace

Tensor linear(const Tensor& x_in, const Tensor& weight, Maybe bias) {
  STD_TORCH_CHECK(x_in.dim() >= 1 && weight.dim() == 2 && x_in.size(-1) == weight.size(1),
                  "x must be [..., K] for a weight [N, K]");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == weight.size(0)), "bias must be [", weight.size(0),
                  "]");
  const Dtype dtype = dtype_of(weight);
  const int64_t k = weight.size(1), n = weight.size(0), dims = x_in.dim();
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; d++) rows *= x_in.size(d);
  const auto kernel = pick(linear_tiers).run[static_cast<int>(dtype)];
  if (!kernel || rows > linear_rows || dims > max_dims || !readable(weight)) return by_torch(x_in, weight, bias);
  STD_TORCH_CHECK(dtype_of(x_in) == dtype && (!bias || dtype_of(*bias) == dtype),
                  "x, weight and bias must be of one dtype");
  Tensor x = unit_stride(x_in);
  const Rows<1> merged({&x}, 1);
  if (rows > 1 && merged.runs() > 1) x = torch::stable::contiguous(x);
  int64_t sizes[max_dims];
  for (int64_t d = 0; d < dims; d++) sizes[d] = d + 1 < dims ? x.size(d) : n;
  Tensor out = empty({sizes, static_cast<size_t>(dims)}, dtype);
  if (!out.numel()) return out;
  const Tensor along = bias ? torch::stable::contiguous(*bias) : x;
  const LinearRows all{data(x),
                       data(weight),
                       bias ? data(along) : nullptr,
                       mutable_data(out),
                       rows > 1 ? Rows<1>({&x}, 1).stride(0) : 0,
                       weight.stride(0),
                       n,
                       rows,
                       k,
                       0,
                       n};
  const int64_t groups = (n + linear_group - 1) / linear_group, group_bytes = linear_group * k * size_of(dtype);
  in_parallel(groups, std::max<int64_t>(1, grain_bytes / std::max<int64_t>(1, group_bytes)),
              [&](int64_t begin, int64_t end) {
                LinearRows share = all;
                share.first = begin * linear_group;
                share.count = std::min(end * linear_group, n) - share.first;
                kernel(share);
              });
  return out;
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) { m.impl("linear", TORCH_BOX(&mk::linear)); }

#include "torch/products.h"

namespace mk {

Tensor closed_rows(const Tensor& t) {
  constexpr int64_t step = 32;
  const int64_t dims = t.dim();
  if (dims < 2 || dtype_of(t) != Dtype::bf16 || t.size(dims - 1) % step == 0) return t;
  return torch::stable::contiguous(t);
}

Tensor torch_linear(const Tensor& x_in, const Tensor& weight, const Maybe& bias) {
  const Tensor x = closed_rows(x_in);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void torch_mm(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the same tensor; it was counted
}

}  // namespace mk

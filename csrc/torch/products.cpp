#include "torch/products.h"

namespace mk {

Tensor closed_rows(const Tensor& t) {
  constexpr int64_t step = 32;
  const int64_t dims = t.dim();
  if (dims < 2 || dtype_of(t) != Dtype::bf16 || t.size(dims - 1) % step == 0) return t;
  return contiguous(t);
}

Tensor torch_linear(const Tensor& x_in, const Tensor& weight, const Maybe& bias) {
  using Torch = Tensor::Torch;
  const Torch x = closed_rows(x_in), by = weight;
  const auto along = bias ? std::optional<Torch>(*bias) : std::nullopt;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(by),
                                    torch::stable::detail::from(along)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Torch>(stack[0]);
}

void torch_mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  using Torch = Tensor::Torch;
  const auto of = [](const Torch& t) { return torch::stable::detail::from(t); };
  std::array<StableIValue, 3> stack{of(a), of(b), of(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Torch>(stack[0]);  // the same tensor; it was counted
}

}  // namespace mk

// The linear layer as other ops on the torch side call it.
#pragma once
#include <optional>

#include "torch/binding.h"

namespace mk {

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias);

}  // namespace mk

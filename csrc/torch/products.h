// Matrix products of torch.
#pragma once
#include "torch/ops.h"

namespace mk {

// `t` itself, or a copy without room between its rows. For the left factor of a product of bf16: oneDNN's kernels for
// Intel's matrix unit read each row to a multiple of 32 elements, times zeros, and NaN behind the row becomes NaN in
// the result (torch 2.13). What is not t's may hold anything.
Tensor closed_rows(const Tensor& t);

Tensor torch_linear(const Tensor& x, const Tensor& weight, const Maybe& bias);

// out = a . b, in place.
void torch_mm(const Tensor& out, const Tensor& a, const Tensor& b);

}  // namespace mk

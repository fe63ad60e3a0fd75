// What the ops on codes ask of their arguments on every device.
#pragma once
#include "torch/ops.h"

namespace mk {

enum class Scheme { int8, w8a8, int4, nf4 };

constexpr bool in_bytes(Scheme scheme) { return scheme == Scheme::int8 || scheme == Scheme::w8a8; }

inline void check_quantised(Scheme scheme, const Tensor& x, const Tensor& codes, const Tensor& scale,
                            const Maybe& offset, const Maybe& bias, int64_t group) {
  STD_TORCH_CHECK(x.dim() >= 1 && codes.dim() == 2 && scale.dim() == 2, "x must be [..., K], codes and scale 2-D");
  const int64_t k = x.size(-1), n = codes.size(0);
  const bool bytes = in_bytes(scheme);
  STD_TORCH_CHECK(codes.scalar_type() == (bytes ? ScalarType::Char : ScalarType::Byte), "codes must be ",
                  bytes ? "int8" : "uint8");
  STD_TORCH_CHECK(codes.size(1) == (bytes ? k : (k + 31) / 32 * 16), "codes must be [N, ",
                  bytes ? "K" : "16 * ceil(K / 32)", "] for x [..., K]");
  STD_TORCH_CHECK(group == 0 || group == 32 || group == 64 || group == 128, "group must be 0, 32, 64 or 128");
  const int64_t groups = group && group < k ? (k + group - 1) / group : 1;
  for (const Tensor* t : {&scale, offset ? &*offset : &scale}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == n && t->size(1) == groups, "scale and offset must be [N, ", groups,
                    "]");
    const Dtype of = dtype_of(*t);
    STD_TORCH_CHECK(of == Dtype::f32 || (of == Dtype::f64 && dtype_of(x) == Dtype::f64), "scales must be float32");
  }
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == n && dtype_of(*bias) == dtype_of(x)), "bias must be [",
                  n, "] of x's dtype");
}

}  // namespace mk

// The dtypes that kernels are written for.
#pragma once

namespace mk {

// In this order wherever a table is indexed by dtype.
enum class Dtype : int { f32, bf16, f16, f64 };
constexpr int dtypes = 4;

}  // namespace mk

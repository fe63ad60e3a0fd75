// SwiGLU's gate: silu(gate) * up (Shazeer 2020, eq. 5).
#pragma once
#include "cpu/isa.h"

namespace mk {

// Rows of n elements, `*_stride` elements apart; out is contiguous. `past_caches` for an output no
// cache will hold, each row of which starts at a whole vector.
struct SwigluKernels {
  using Run = void (*)(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
                       int64_t rows, int64_t n, bool past_caches);
  Run run[dtypes];
};

}  // namespace mk

MK_KERNELS(SwigluKernels, swiglu)

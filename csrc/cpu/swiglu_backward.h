// The gradients of SwiGLU's gate, which is computed again.
#pragma once
#include "cpu/isa.h"

namespace mk {

// Rows of n elements, `*_stride` elements apart, of dy, gate and up, and of both outputs.
struct SwigluGradients {
  const void *dy, *gate, *up;
  void *dgate, *dup;
  int64_t dy_stride, gate_stride, up_stride, out_stride, rows, n;
  bool past_caches;  // the outputs are larger than any cache, and each of their rows starts at a whole vector
};

struct SwigluBackwardKernels {
  void (*run[dtypes])(const SwigluGradients&);
};

}  // namespace mk

MK_KERNELS(SwigluBackwardKernels, swiglu_backward)

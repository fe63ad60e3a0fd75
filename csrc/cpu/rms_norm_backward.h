// The gradients of RMSNorm, alone and fused with the residual addition before it.
#pragma once
#include "cpu/isa.h"

namespace mk {

// Rows of n elements, `*_stride` elements apart; dx is contiguous. `dtotal` is what flows into the sum by the other
// way, null where there is none. They are the rows [at, at + rows) of a part of `of` rows, whose sum `dweight` [n]
// takes, in the accumulation dtype; calls for one part come in order, with the same `block`, room for n more such sums.
// `follow` rows are read after these, at the same distances. `past_caches` for a dx that no cache will hold, each row
// of which starts at a whole vector.
struct RmsNormGradients {
  const void *dy, *dtotal, *x, *weight, *rstd;
  int64_t dy_stride, dtotal_stride, x_stride;
  void *dx, *dweight, *block;
  int64_t rows, n, at, of, follow;
  bool past_caches;
};

struct RmsNormBackwardKernels {
  // run[dtype of x][weight is float32 and x is not][x * rstd was rounded before the product with the weight][dtotal]
  void (*run[dtypes][2][2][2])(const RmsNormGradients&);
  // Adds up `parts` rows of n sums of `run`, whose columns it knows the order of: dweight[first ... first + count),
  // `first` a multiple of 64.
  void (*join[dtypes][2])(const void* partials, int64_t parts, int64_t n, int64_t first, int64_t count, void* dweight);
};

}  // namespace mk

MK_KERNELS(RmsNormBackwardKernels, rms_norm_backward)

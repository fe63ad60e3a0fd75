// RMSNorm (Zhang & Sennrich 2019, eq. 4), alone and fused with the residual addition before it.
#pragma once
#include "cpu/isa.h"

namespace mk {

// Rows of n elements, x and residual `*_stride` elements apart; the outputs are contiguous. With a residual, `total`
// takes its rounded sum with x, which is what is normalised. `follow` rows are read after these, at the same distances.
// `past_caches` for outputs no cache will hold, each row of which starts at a whole vector.
struct RmsNormRows {
  const void *x, *residual, *weight;
  int64_t x_stride, residual_stride;
  void *y, *total, *rstd;
  int64_t rows, n, follow;
  double eps;
  bool past_caches;
};

// run[dtype of x][weight is float32 and x is not][x * rstd is rounded before the product with the weight][residual]
struct RmsNormKernels {
  void (*run[dtypes][2][2][2])(const RmsNormRows&);
};

}  // namespace mk

MK_KERNELS(RmsNormKernels, rms_norm)

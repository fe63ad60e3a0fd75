// RMSNorm (Zhang & Sennrich 2019, eq. 4), alone and fused with the residual addition before it, and its gradients.
#pragma once
#include "cuda/launch.h"

namespace mk::cuda {

// Rows of n elements; the outputs are contiguous. With a residual, `total` takes its rounded sum with x, which is what
// is normalised. The weight and y are of the same dtype, x's or float32.
struct RmsNorm {
  const void *x, *residual, *weight;
  void *y, *total;
  float* rstd;
  RowSizes sizes;
  RowStrides x_rows, residual_rows;
  int64_t n;
  double inverse_n, eps;  // 1 / n in float64: one multiplication for each row in place of a division
  int dtype, weight_dtype;
  bool model_rounding;
};

// dy is of the weight's dtype; dtotal, of x's, is added to dx before its rounding where it is not null. `partials`
// holds `groups` rows of n float32 sums over the rows of x; dweight adds them up.
struct RmsNormBackward {
  const void *dy, *dtotal, *x, *weight;
  const float* rstd;
  void *dx, *dweight;
  float* partials;
  RowSizes sizes;
  RowStrides dy_rows, dtotal_rows, x_rows;
  int64_t n, groups;
  double inverse_n;
  int dtype, weight_dtype;
  bool model_rounding;
};

}  // namespace mk::cuda

extern "C" {
int mk_cuda_rms_norm(const mk::cuda::RmsNorm& a, void* stream);
// The rows of partials that the backward of this many rows needs.
int64_t mk_cuda_rms_norm_groups(int64_t rows, int64_t n);
int mk_cuda_rms_norm_backward(const mk::cuda::RmsNormBackward& a, void* stream);
}

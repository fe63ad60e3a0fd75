// The gate of a SwiGLU feed-forward layer, silu(gate) · up (Shazeer 2020, eq. 5), and its gradients.
#pragma once
#include "cuda/launch.h"

namespace mk::cuda {

// Rows of n elements, all of one dtype. y and, of a backward, dgate and dup have rows at equal distances: those of a
// packed gradient are twice as long as they.
struct Swiglu {
  const void *dy, *gate, *up;
  void *y, *dgate, *dup;
  RowSizes sizes;
  RowStrides dy_rows, gate_rows, up_rows;
  int64_t out_row, n;
  int dtype;
};

}  // namespace mk::cuda

extern "C" {
int mk_cuda_swiglu(const mk::cuda::Swiglu& a, void* stream);
int mk_cuda_swiglu_backward(const mk::cuda::Swiglu& a, void* stream);
}

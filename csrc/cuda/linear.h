// The linear layer y = x · weightᵀ + bias for so few rows of x that its time is that of reading the weight once.
#pragma once
#include "cuda/launch.h"

namespace mk::cuda {

// More rows are left to a matrix product with tiles.
constexpr int64_t linear_few_rows = 4;

// Rows of x and of the weight are at equal distances, counted in elements; y is contiguous.
struct LinearFew {
  const void *x, *weight;  // [m, k], [n, k]
  const void* bias;        // [n], or null
  void* y;                 // [m, n]
  int64_t x_row, weight_row, k;
  int m, n, dtype;
};

}  // namespace mk::cuda

extern "C" {
int mk_cuda_linear(const mk::cuda::LinearFew& a, void* stream);
}

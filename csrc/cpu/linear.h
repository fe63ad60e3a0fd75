// A linear layer of few rows: the time is that of reading the weight once.
#pragma once
#include "cpu/isa.h"

namespace mk {

// out[i][first ... first + count) = x[i] . weight[n] + bias[n] for i < rows <= linear_rows; k elements in a row of x
// and of the weight, whose last dimension has stride 1. bias may be null.
struct LinearRows {
  const void *x, *weight, *bias;
  void* out;
  int64_t x_row, weight_row, out_row, rows, k, first, count;
  char* memory;  // of the thread, aligned to 64
  bool packed;   // whether x is there already
};

constexpr int64_t linear_rows = 16;
constexpr int64_t linear_group = 16;  // shares of threads are multiples of so many outputs

struct LinearKernels {
  // out[i] = from[i] + bias, rounded, for `rows` rows of `count` elements; bias may be null.
  using Round = void (*)(const float* from, int64_t from_row, const void* bias, void* out, int64_t out_row,
                         int64_t rows, int64_t count);
  void (*run[dtypes])(const LinearRows&);              // null for float64
  int64_t (*memory[dtypes])(int64_t rows, int64_t k);  // bytes; null where none is needed
  Round round[dtypes];                                 // null for other dtypes than those of 16 bits
};

}  // namespace mk

MK_MATRIX_KERNELS(LinearKernels, linear)

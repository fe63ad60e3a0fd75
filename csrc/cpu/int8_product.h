// A linear layer on an int8 weight whose activations are rounded to int8 too: the sums of products are exact.
#pragma once
#include "cpu/quant_linear.h"

namespace mk {

// x and the weight in int8: `x` [rows][x_row] holds codes plus 128, zero codes past k, and `x_scale` one for each row.
struct Int8Product {
  const uint8_t* x;
  const float* x_scale;
  int64_t x_row, rows;
  const QuantWeight* weight;
  QuantShare share;
};

constexpr int64_t int8_row_unit = 128;  // an Int8Product's x_row is a multiple

struct Int8ProductKernels {
  void (*quantise_row[dtypes])(const void* x, int64_t k, uint8_t* codes, float* scale);  // null for float64
  void (*multiply[dtypes])(const Int8Product&);
};

}  // namespace mk

MK_KERNELS(Int8ProductKernels, int8_product)

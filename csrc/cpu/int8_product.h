// A linear layer on an int8 weight whose activations are rounded to int8 too: the sums of products are exact.
#pragma once
#include "cpu/quant_linear.h"

namespace mk {

// x and the weight in int8: `x` [rows][x_row] holds codes as the product takes them, zero codes past k.
struct Int8Product {
  const uint8_t* x;
  const float* x_scale;
  int64_t x_row, rows;  // x_row in bytes
  const QuantWeight* weight;
  QuantShare share;
};

constexpr int64_t int8_row_unit = 128;  // a row of x has a multiple of so many codes

// Few rows take the weight as it lies in memory. Of many rows, blocks of it are put in the order of a tile's vectors
// first, for one block after the other of x.
struct Int8ProductKernels {
  // Bytes of a code of x: of few rows it is the code plus 128 in one; of many the same, or the code itself in two.
  int64_t many_code_bytes;
  int64_t many_memory;                                                                   // of each thread, in bytes
  void (*quantise_row[dtypes])(const void* x, int64_t k, uint8_t* codes, float* scale);  // null for float64
  void (*quantise_row_of_many[dtypes])(const void* x, int64_t k, uint8_t* codes, float* scale);
  void (*multiply[dtypes])(const Int8Product&);
  // With at most 2^17 codes a row. `memory` holds many_memory, aligned to 64.
  void (*multiply_many[dtypes])(const Int8Product&, char* memory);
};

}  // namespace mk

MK_MATRIX_KERNELS(Int8ProductKernels, int8_product)

// Linear layers on quantised weights: few rows of x by a pass over the codes, many by int8 products or by torch on the
// dequantised weight. Formats as kernels/mistral_kernels/quant_linear/reference.py defines them.
#pragma once
#include "cpu/isa.h"

namespace mk {

enum class Codes : int { int8, int4, nf4 };

struct QuantWeight {
  Codes kind;
  const uint8_t* codes;
  int64_t row;  // bytes from one row of codes to the next
  const float *scale, *offset;
  int64_t groups, group;  // groups in a row, elements in a group (a power of two, or at least k)
  int64_t n, k;
};

// Rows of x as the kernels take them; `memory` holds prepared_bytes, aligned to 64.
struct QuantRows {
  const void* x;
  int64_t x_row, rows;
  char* memory;
  bool fixed;  // x in int16 with a scale for each piece; else in float32
};

struct QuantShare {
  const void* bias;  // or null
  void* out;
  int64_t out_row, first, count;
};

constexpr int64_t quant_group = 16;  // outputs computed together; shares of threads are multiples of it
// Rows of x up to which a pass over the codes with vectors is quicker than dequantising them (Zen 5).
constexpr int64_t few_quant_rows = 16;

struct QuantLinearKernels {
  // Up to so many rows of 16-bit elements a pass over the codes is quicker than dequantising them.
  int64_t (*few_rows)(const QuantWeight&);
  int64_t (*prepared_bytes)(const QuantWeight&, int64_t rows);
  // False where x has what int16 cannot hold: infinities, nan, or nothing but the tiniest numbers.
  bool (*prepare[dtypes])(const QuantWeight&, const QuantRows&);
  void (*run[dtypes])(const QuantWeight&, const QuantRows&, const QuantShare&);  // null for float64
  void (*dequantise[dtypes])(const QuantWeight&, int64_t row, void* out);        // null for float64
};

}  // namespace mk

MK_MATRIX_KERNELS(QuantLinearKernels, quant_linear)

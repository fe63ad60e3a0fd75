// Keys and values as int8 codes, each head of a token with a scale of its own: scale = max|x| / 127, code = x / scale
// rounded to the nearest, halves to even.
#pragma once
#include "cpu/isa.h"

namespace mk {

struct KvCodesKernels {
  // Of one token; distances between heads count elements. Scales are float32, or float64 of float64 tokens. A head of
  // zeros, or with an infinity or nan, has codes 0; the scale of the latter is not finite.
  using Quantise = void (*)(const void* x, int64_t x_head, int64_t heads, int64_t dim, int8_t* codes,
                            int64_t codes_head, void* scale, int64_t scale_head);
  // Into contiguous heads of numbers, rounded once.
  using Dequantise = void (*)(const int8_t* codes, int64_t codes_head, const void* scale, int64_t scale_head,
                              int64_t heads, int64_t dim, void* out);
  Quantise quantise[dtypes];
  Dequantise dequantise[dtypes];
};

}  // namespace mk

MK_KERNELS(KvCodesKernels, kv_codes)

// Linear layers on codes, y = x · (scale · codes)ᵀ + bias; kernels/mistral_kernels/quant_linear/reference.py says what
// the codes stand for.
#pragma once
#include "cuda/launch.h"

namespace mk::cuda {

// With an offset for each group beside the scale, int4 is a kind of its own: the sums of x are needed too.
enum class QuantKind : int { int8, int4, int4_offset, nf4, w8a8 };

// Up to so many rows a pass over the codes takes less than tiles, whose products would mostly be of rows not there.
constexpr int64_t quant_few_rows = 4;

// x and the codes are rows at equal distances; everything else is contiguous. n and k are below 2 ** 31.
struct QuantLinear {
  const void* x;                // [m, k]; of w8a8 the int8 codes from quant_round, their rows padded with zeros
  const float* x_scale;         // [m], of w8a8
  const uint8_t* codes;         // [n, k] int8, or [n, 16 * ceil(k / 32)] with two codes in a byte
  const float *scale, *offset;  // [n, groups]
  const void* bias;             // [n], or null
  void* y;                      // [m, n]
  int64_t x_row, code_row;      // in elements and in bytes
  int64_t m;
  int n, k, groups;
  int group;  // elements that share a scale: 32, 64 or 128; 0 where a row does
  int kind, dtype;
};

// Rows of x as int8 codes, rows of `padded` bytes (a multiple of 16) with zeros from k on, and their scales.
struct QuantRound {
  const void* x;
  int8_t* codes;
  float* scale;
  int64_t x_row, padded, m;
  int k, dtype;
};

}  // namespace mk::cuda

extern "C" {
// Few rows of x, each code read once.
int mk_cuda_quant_few(const mk::cuda::QuantLinear& a, void* stream);
// Tiles, for any number of rows.
int mk_cuda_quant_tiles(const mk::cuda::QuantLinear& a, void* stream);
int mk_cuda_quant_round(const mk::cuda::QuantRound& a, void* stream);
}

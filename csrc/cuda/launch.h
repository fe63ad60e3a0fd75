// What every launcher and the torch side of the CUDA kernels share; plain C++, no CUDA header.
//
// A kernel family is three files: <op>.h, a struct of raw pointers, sizes and strides (counted in elements) with the
// launchers declared `extern "C"`; <op>.cu, the kernels and these launchers; csrc/torch/cuda_<op>.cpp, the torch op.
// A launcher checks nothing about shapes, allocates nothing, waits for nothing, and returns the cudaError_t as an int.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace mk::cuda {

constexpr int max_leading = 3;

// Where the rows of a tensor with up to three leading dimensions start. `size` counts the inner two.
struct RowStrides {
  int64_t stride[max_leading];
};
struct RowSizes {
  int64_t rows, size1, size2;
  int depth;
};

}  // namespace mk::cuda

extern "C" {
// The message of a status that a launcher returned.
const char* mk_cuda_error(int status);
// Multiprocessors of the current device; 1 where there is none.
int mk_cuda_multiprocessors();
}

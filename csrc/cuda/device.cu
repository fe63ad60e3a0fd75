#include "cuda/launch.h"

extern "C" const char* mk_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

extern "C" int mk_cuda_multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

#include "cuda/quant_linear.h"
#include "cuda/quant_tiles.cuh"

extern "C" int mk_cuda_quant_tiles(const mk::cuda::QuantLinear& a, void* stream) {
  using namespace mk::cuda;
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.kind == static_cast<int>(QuantKind::w8a8)) return quant_tiles_int8(a, on);
  switch (static_cast<mk::Dtype>(a.dtype)) {
    case mk::Dtype::f32:
      return quant_tiles_f32(a, on);
    case mk::Dtype::bf16:
      return quant_tiles_bf16(a, on);
    case mk::Dtype::f16:
      return quant_tiles_f16(a, on);
    default:
      return cudaErrorInvalidValue;
  }
}

#include "cuda/quant_tiles_half.cuh"

namespace mk::cuda {
int quant_tiles_f16(const QuantLinear& a, cudaStream_t stream) { return quant_tiles_half<f16>(a, stream); }
}  // namespace mk::cuda

#include "cuda/attention_forward.cuh"

int mk::cuda::attention_forward_f16(const Attention& a, cudaStream_t stream) {
  return attention_forward<f16>(a, stream);
}

#include "cuda/attention_forward.cuh"

int mk::cuda::attention_forward_bf16(const Attention& a, cudaStream_t stream) {
  return attention_forward<bf16>(a, stream);
}

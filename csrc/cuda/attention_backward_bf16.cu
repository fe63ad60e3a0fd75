#include "cuda/attention_backward.cuh"

int mk::cuda::attention_backward_bf16(const AttentionBackward& a, cudaStream_t stream) {
  return attention_backward<bf16>(a, stream);
}

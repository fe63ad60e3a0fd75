#include "cuda/attention_backward.cuh"

int mk::cuda::attention_backward_f16(const AttentionBackward& a, cudaStream_t stream) {
  return attention_backward<f16>(a, stream);
}

#include "cuda/hopper_consumer.cuh"

int mk::cuda::hopper_forward_bf16(const HopperForward& f, int consumers, cudaStream_t stream) {
  return hopper_forward<bf16>(f, consumers, stream);
}

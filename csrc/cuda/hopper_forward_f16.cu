#include "cuda/hopper_consumer.cuh"

int mk::cuda::hopper_forward_f16(const HopperForward& f, int consumers, cudaStream_t stream) {
  return hopper_forward<f16>(f, consumers, stream);
}

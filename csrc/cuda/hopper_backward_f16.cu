#include "cuda/hopper_gradient_consumer.cuh"

int mk::cuda::hopper_backward_f16(const HopperForward& f, const HopperBackward& b, cudaStream_t stream) {
  return hopper_backward<f16>(f, b, stream);
}

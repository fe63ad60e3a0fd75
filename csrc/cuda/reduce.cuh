// Sums over the threads of a row, in a fixed order.
#pragma once

namespace mk::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum over the blockDim.x threads of a row, known to each. Rows of more than one warp have a block of their own.
template <class T>
__device__ __forceinline__ T row_sum(T value) {
  __shared__ T parts[32];
  value = warp_sum(value);
  if (blockDim.x == 32) return value;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the parts of a sum before this one have been read
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x / 32) ? parts[lane] : T{});
}

}  // namespace mk::cuda

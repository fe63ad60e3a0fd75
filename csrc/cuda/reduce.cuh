// Sums over the threads of a row, in a fixed order.
#pragma once

namespace mk::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum of the values of the blockDim.x threads of a row, known to each. Rows of more than one warp have a block of
// their own. Four values a thread are added up as those of four times as many threads with one value each would be.
template <class T, int kValues>
__device__ __forceinline__ T row_sum(T (&values)[kValues]) {
  __shared__ T parts[32 * kValues];
#pragma unroll
  for (int i = 0; i < kValues; i++) values[i] = warp_sum(values[i]);
  if (blockDim.x == 32) {
#pragma unroll
    for (int distance = kValues / 2; distance; distance /= 2)
#pragma unroll
      for (int i = 0; i < distance; i++) values[i] += values[i + distance];
    return values[0];
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // the parts of a sum before this one have been read
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kValues; i++) parts[i * warps + warp] = values[i];
  }
  __syncthreads();
  T sum{};
#pragma unroll
  for (int i = 0; i < kValues; i++)
    if (i * 32 + lane < kValues * warps) sum += parts[i * 32 + lane];
  return warp_sum(sum);
}

template <class T>
__device__ __forceinline__ T row_sum(T value) {
  T values[1] = {value};
  return row_sum(values);
}

}  // namespace mk::cuda

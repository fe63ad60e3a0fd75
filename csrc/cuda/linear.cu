#include "cuda/linear.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace mk::cuda {
namespace {

constexpr int block_threads = 128;

// 16 bytes that nobody else reads: they are the first to leave the caches.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_once(const T* from) {
  Pack<T, V> pack;
  if constexpr (V == 1)
    pack.value = *from;
  else
#pragma unroll
    for (int i = 0; i < Pack<T, V>::quads; i++) pack.bits[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  return pack;
}

// blockDim.x threads take a row of the weight, and all rows of x with it; blockDim.y rows a block. Many small blocks
// have as many reads in flight as the memory takes, without a loop that would have to be kept ahead.
template <class T, int V, int kRows>
__global__ void __launch_bounds__(block_threads) linear_kernel(const LinearFew a) {
  const int n = blockIdx.x * blockDim.y + threadIdx.y;
  if (n >= a.n) return;
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_row;
  const T* x = static_cast<const T*>(a.x);
  float sums[kRows] = {};
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * V; at < a.k; at += static_cast<int64_t>(blockDim.x) * V) {
    float w[V];
    load_once<T, V>(weight + at).get(w);
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (kRows > 1 && m >= a.m) break;
      float values[V];
      load_values<T, V>(x + m * a.x_row + at, values);
#pragma unroll
      for (int e = 0; e < V; e++) sums[m] = fmaf(w[e], values[e], sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; m++) {
    if (kRows > 1 && m >= a.m) break;
    float sum = row_sum(sums[m]);
    if (threadIdx.x != 0) continue;
    if (a.bias) sum += to_float(static_cast<const T*>(a.bias)[n]);
    static_cast<T*>(a.y)[static_cast<int64_t>(m) * a.n + n] = from_float<T>(sum);
  }
}

// Rows that a warp reads in two goes share a block.
template <class T, int V, int kRows>
int run(const LinearFew& a, cudaStream_t stream) {
  const int threads = a.k <= 64 * V ? 32 : block_threads, together = block_threads / threads;
  linear_kernel<T, V, kRows><<<(a.n - 1) / together + 1, dim3(threads, together), 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T, int kRows>
int run(const LinearFew& a, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const bool vectors = a.k % wide == 0 && a.x_row % wide == 0 && a.weight_row % wide == 0 && aligned_to_16(a.x) &&
                       aligned_to_16(a.weight);
  return vectors ? run<T, wide, kRows>(a, stream) : run<T, 1, kRows>(a, stream);
}

}  // namespace
}  // namespace mk::cuda

extern "C" int mk_cuda_linear(const mk::cuda::LinearFew& a, void* stream) {
  using namespace mk::cuda;
  return with_type(a.dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto on = static_cast<cudaStream_t>(stream);
    return a.m == 1 ? run<T, 1>(a, on) : run<T, linear_few_rows>(a, on);
  });
}

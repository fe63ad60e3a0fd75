#include "cuda/swiglu.h"
#include "cuda/vec.cuh"

namespace mk::cuda {
namespace {

constexpr int block_threads = 256;

// 1 / (1 + exp(-x)); the quick exponential and division are off by a few float32 units, which 16-bit results do not
// show.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4)
    return 1.0f / (1.0f + expf(-x));
  else
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// Float32 divides x itself, as eager does: one rounding fewer.
template <class T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (sizeof(T) == 4)
    return x / (1.0f + expf(-x));
  else
    return x * sigmoid<T>(x);
}

template <class T, int V, bool kBackward>
__device__ __forceinline__ void gate_pack(const Swiglu& a, int64_t row, int64_t at) {
  float gate[V], up[V];
  load_values<T, V>(static_cast<const T*>(a.gate) + row_offset(row, a.sizes, a.gate_rows) + at, gate);
  load_values<T, V>(static_cast<const T*>(a.up) + row_offset(row, a.sizes, a.up_rows) + at, up);
  const int64_t to = row * a.out_row + at;
  if constexpr (!kBackward) {
#pragma unroll
    for (int e = 0; e < V; e++) gate[e] = silu<T>(gate[e]) * up[e];
    store_values<T, V>(static_cast<T*>(a.y) + to, gate);
  } else {
    float dy[V];
    load_values<T, V>(static_cast<const T*>(a.dy) + row_offset(row, a.sizes, a.dy_rows) + at, dy);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float s = sigmoid<T>(gate[e]), g = gate[e];
      gate[e] = dy[e] * up[e] * s * (1.0f + g * (1.0f - s));
      up[e] = dy[e] * g * s;
    }
    store_values<T, V>(static_cast<T*>(a.dgate) + to, gate);
    store_values<T, V>(static_cast<T*>(a.dup) + to, up);
  }
}

// A thread a pack of V elements; rows of any length share blocks.
template <class T, int V, bool kBackward>
__global__ void __launch_bounds__(block_threads) swiglu_kernel(const Swiglu a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x, packs = a.n / V;
  if (index >= a.sizes.rows * packs) return;
  // A 64-bit division costs as much as the rest of the kernel.
  const bool small = a.sizes.rows * packs <= 0x7fffffff;
  const int64_t row = a.sizes.rows == 1 ? 0
                      : small           ? static_cast<uint32_t>(index) / static_cast<uint32_t>(packs)
                                        : index / packs;
  gate_pack<T, V, kBackward>(a, row, (index - row * packs) * V);
}

template <class T, int V, bool kBackward>
int run(const Swiglu& a, cudaStream_t stream) {
  const int64_t blocks = (a.sizes.rows * (a.n / V) + block_threads - 1) / block_threads;
  swiglu_kernel<T, V, kBackward><<<blocks, block_threads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <bool kBackward>
int launch(const Swiglu& a, void* stream) {
  return with_type(a.dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int wide = 16 / sizeof(T), bytes = sizeof(T);
    bool vectors = a.n % wide == 0 && a.out_row % wide == 0 && aligned_to_16(a.gate, a.sizes, a.gate_rows, bytes) &&
                   aligned_to_16(a.up, a.sizes, a.up_rows, bytes);
    if (kBackward)
      vectors =
          vectors && aligned_to_16(a.dy, a.sizes, a.dy_rows, bytes) && aligned_to_16(a.dgate) && aligned_to_16(a.dup);
    else
      vectors = vectors && aligned_to_16(a.y);
    const auto on = static_cast<cudaStream_t>(stream);
    return vectors ? run<T, wide, kBackward>(a, on) : run<T, 1, kBackward>(a, on);
  });
}

}  // namespace
}  // namespace mk::cuda

extern "C" int mk_cuda_swiglu(const mk::cuda::Swiglu& a, void* stream) { return mk::cuda::launch<false>(a, stream); }

extern "C" int mk_cuda_swiglu_backward(const mk::cuda::Swiglu& a, void* stream) {
  return mk::cuda::launch<true>(a, stream);
}

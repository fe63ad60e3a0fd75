#include "cuda/reduce.cuh"
#include "cuda/rms_norm.h"
#include "cuda/vec.cuh"

namespace mk::cuda {
namespace {

// Packs of a row that one thread keeps in registers. Of many rows, 64 bytes, so that 1024 threads hold 32768 16-bit
// elements and a memory read is in flight four times a thread. Of rows that do not fill the device one, since then the
// time is that of the longest chain of waits; the weight is on its way before the sum is known. The sums are the same.
constexpr int many_packs = 4, one_pack = 1;
constexpr int most_threads = 1024;
// Short rows share a block of so many threads, a warp each.
constexpr int block_threads = 128;

// An error of rstd is in every element of its row, and shows in float32 results: their squares are summed in float64.
template <class T>
struct Sum {
  using type = float;
};
template <>
struct Sum<float> {
  using type = double;
};

__device__ __forceinline__ float inverse_root(float mean, double eps) { return rsqrtf(mean + static_cast<float>(eps)); }
// A Newton step in float64 takes the float32 root of 22 bits to all that rounding to float32 sees; 0 and infinity have
// none.
__device__ __forceinline__ float inverse_root(double mean, double eps) {
  mean += eps;
  const double root = rsqrtf(static_cast<float>(mean));
  const float refined = static_cast<float>(root * (1.5 - 0.5 * mean * root * root));
  return isfinite(refined) ? refined : static_cast<float>(root);
}

template <class T, int V>
__device__ __forceinline__ void load_total(const RmsNorm& a, const T* x, const T* residual, T* total, int64_t at,
                                           Pack<T, V>& pack) {
  pack.load(x + at);
  if (!residual) return;
  float values[V], others[V];
  pack.get(values);
  load_values<T, V>(residual + at, others);
#pragma unroll
  for (int e = 0; e < V; e++) values[e] += others[e];
  pack.set(values);
  pack.store(total + at);
}

template <class T, int V, class S>
__device__ __forceinline__ void add_squares(const Pack<T, V>& pack, S& sum) {
  float values[V];
  pack.get(values);
#pragma unroll
  for (int e = 0; e < V; e++) sum += static_cast<S>(values[e]) * static_cast<S>(values[e]);
}

template <class T, class W, int V>
__device__ __forceinline__ void store_normed(const RmsNorm& a, const Pack<T, V>& pack, const Pack<W, V>& weight,
                                             float rstd, W* y, int64_t at) {
  float values[V], by[V];
  pack.get(values);
  weight.get(by);
#pragma unroll
  for (int e = 0; e < V; e++) {
    const float n = values[e] * rstd;
    values[e] = (a.model_rounding ? round_to<T>(n) : n) * by[e];
  }
  store_values<W, V>(y + at, values);
}

// blockDim.x threads a row, blockDim.y rows a block. A row longer than the threads' registers is read twice (kLong):
// the sum of x and its residual from where this very thread has stored it.
template <class T, class W, int V, int kPacks, bool kLong>
__global__ void __launch_bounds__(most_threads) norm_kernel(const RmsNorm a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.sizes.rows) return;
  const T* x = static_cast<const T*>(a.x) + row_offset(row, a.sizes, a.x_rows);
  const T* residual =
      a.residual ? static_cast<const T*>(a.residual) + row_offset(row, a.sizes, a.residual_rows) : nullptr;
  T* total = static_cast<T*>(a.total) + row * a.n;
  W* y = static_cast<W*>(a.y) + row * a.n;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * V, step = static_cast<int64_t>(blockDim.x) * V;
  const W* weights = static_cast<const W*>(a.weight);
  typename Sum<T>::type squares[kPacks] = {};
  Pack<T, V> kept[kPacks];
  Pack<W, V> weight;
  if constexpr (kLong) {
    for (int64_t at = first; at < a.n; at += step) {
      load_total<T, V>(a, x, residual, total, at, kept[0]);
      add_squares(kept[0], squares[0]);
    }
  } else {
    if (kPacks == one_pack && first < a.n) weight.load(weights + first);
#pragma unroll
    for (int i = 0; i < kPacks; i++)
      if (first + i * step < a.n) load_total<T, V>(a, x, residual, total, first + i * step, kept[i]);
#pragma unroll
    for (int i = 0; i < kPacks; i++)
      if (first + i * step < a.n) add_squares(kept[i], squares[i]);
  }
  const auto mean = row_sum(squares) * static_cast<typename Sum<T>::type>(a.inverse_n);
  const float rstd = inverse_root(mean, a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  if constexpr (kLong) {
    const T* again = residual ? total : x;
    for (int64_t at = first; at < a.n; at += step) {
      kept[0].load(again + at);
      weight.load(weights + at);
      store_normed<T, W, V>(a, kept[0], weight, rstd, y, at);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; i++)
      if (first + i * step < a.n) {
        if (kPacks != one_pack) weight.load(weights + first + i * step);
        store_normed<T, W, V>(a, kept[i], weight, rstd, y, first + i * step);
      }
  }
}

// A power of two of threads that holds a row in registers, a warp at least; 0 where none does.
int threads_of_row(int64_t n, int width) {
  int threads = 32;
  while (threads <= most_threads && static_cast<int64_t>(threads) * width < n) threads *= 2;
  return threads <= most_threads ? threads : 0;
}

template <class T, class W, int V>
int run_forward(const RmsNorm& a, cudaStream_t stream) {
  const int at_once = a.sizes.rows <= mk_cuda_multiprocessors() ? threads_of_row(a.n, V) : 0;
  const int needed = at_once ? at_once : threads_of_row(a.n, V * many_packs), threads = needed ? needed : most_threads;
  const int together = threads == 32 ? block_threads / 32 : 1;
  const dim3 block(threads, together), grid((a.sizes.rows + together - 1) / together);
  if (at_once)
    norm_kernel<T, W, V, one_pack, false><<<grid, block, 0, stream>>>(a);
  else if (needed)
    norm_kernel<T, W, V, many_packs, false><<<grid, block, 0, stream>>>(a);
  else
    norm_kernel<T, W, V, one_pack, true><<<grid, block, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T, class W>
int forward(const RmsNorm& a, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const int bytes = sizeof(T);
  const bool vectors = a.n % wide == 0 && aligned_to_16(a.x, a.sizes, a.x_rows, bytes) && aligned_to_16(a.weight) &&
                       aligned_to_16(a.y) && aligned_to_16(a.total) &&
                       (!a.residual || aligned_to_16(a.residual, a.sizes, a.residual_rows, bytes));
  return vectors ? run_forward<T, W, wide>(a, stream) : run_forward<T, W, 1>(a, stream);
}

}  // namespace
}  // namespace mk::cuda

extern "C" int mk_cuda_rms_norm(const mk::cuda::RmsNorm& a, void* stream) {
  using namespace mk::cuda;
  return with_type(a.dtype, [&](auto* x) -> int {
    using T = std::remove_pointer_t<decltype(x)>;
    const auto on = static_cast<cudaStream_t>(stream);
    return a.weight_dtype == a.dtype ? forward<T, T>(a, on) : forward<T, float>(a, on);
  });
}

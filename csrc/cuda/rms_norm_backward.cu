// dx = rstd · (g − n · mean(g · n)) with n = x · rstd and g = dy · weight; dweight sums dy · n over the rows, where n
// is rounded as it was before the product with the weight.
#include "cuda/reduce.cuh"
#include "cuda/rms_norm.h"
#include "cuda/vec.cuh"

namespace mk::cuda {
namespace {

// Elements of a row that one thread keeps: x, dy and the float32 sums of dweight stay in registers.
constexpr int kept_elements = 16;
constexpr int most_threads = 512;
constexpr int block_threads = 128;
// Threads on each multiprocessor: enough reads in flight, and few partial sums to write.
constexpr int resident_threads = 512;

__device__ __forceinline__ double add_product(double sum, float x, float y) { return sum + static_cast<double>(x) * y; }
__device__ __forceinline__ float add_product(float sum, float x, float y) { return fmaf(x, y, sum); }

template <class T>
using Sum = std::conditional_t<sizeof(T) == 4, double, float>;

// n and g of the elements from `at`, and what dweight adds for them.
template <class T, class W, int V>
__device__ __forceinline__ void terms(const RmsNormBackward& a, const T* x, const W* dy, float rstd, int64_t at,
                                      float (&n)[V], float (&g)[V], float (&dw)[V]) {
  load_values<T, V>(x + at, n);
  load_values<W, V>(dy + at, dw);
  load_values<W, V>(static_cast<const W*>(a.weight) + at, g);
#pragma unroll
  for (int e = 0; e < V; e++) {
    n[e] *= rstd;
    g[e] *= dw[e];
    dw[e] *= a.model_rounding ? round_to<T>(n[e]) : n[e];
  }
}

template <class T, int V>
__device__ __forceinline__ void store_dx(const RmsNormBackward& a, int64_t row, int64_t at, float rstd, float mean,
                                         const float (&n)[V], const float (&g)[V]) {
  float values[V], others[V] = {};
  if (a.dtotal)
    load_values<T, V>(static_cast<const T*>(a.dtotal) + row_offset(row, a.sizes, a.dtotal_rows) + at, others);
#pragma unroll
  for (int e = 0; e < V; e++) values[e] = rstd * (g[e] - n[e] * mean) + others[e];
  store_values<T, V>(static_cast<T*>(a.dx) + row * a.n + at, values);
}

// blockDim.x threads a row; each group of them takes the rows group, group + groups, … and sums dweight over these.
template <class T, class W, int V>
__global__ void __launch_bounds__(most_threads) backward_kernel(const RmsNormBackward a) {
  constexpr int packs = kept_elements / V;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * V, step = static_cast<int64_t>(blockDim.x) * V;
  float sums[packs][V] = {};
  if (group >= a.groups) return;
  for (int64_t row = group; row < a.sizes.rows; row += a.groups) {
    const T* x = static_cast<const T*>(a.x) + row_offset(row, a.sizes, a.x_rows);
    const W* dy = static_cast<const W*>(a.dy) + row_offset(row, a.sizes, a.dy_rows);
    const float rstd = a.rstd[row];
    float n[packs][V], g[packs][V];
    Sum<T> product = 0;
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (first + i * step >= a.n) continue;
      float dw[V];
      terms<T, W, V>(a, x, dy, rstd, first + i * step, n[i], g[i], dw);
#pragma unroll
      for (int e = 0; e < V; e++) {
        product = add_product(product, g[i][e], n[i][e]);
        sums[i][e] += dw[e];
      }
    }
    const float mean = static_cast<float>(row_sum(product) * static_cast<Sum<T>>(a.inverse_n));
#pragma unroll
    for (int i = 0; i < packs; i++)
      if (first + i * step < a.n) store_dx<T, V>(a, row, first + i * step, rstd, mean, n[i], g[i]);
  }
#pragma unroll
  for (int i = 0; i < packs; i++)
    if (first + i * step < a.n) store_values<float, V>(a.partials + group * a.n + first + i * step, sums[i]);
}

// dx of a row that is longer than the registers, read twice.
template <class T, class W, int V>
__global__ void __launch_bounds__(most_threads) long_dx_kernel(const RmsNormBackward a) {
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * V;
  const T* x = static_cast<const T*>(a.x) + row_offset(row, a.sizes, a.x_rows);
  const W* dy = static_cast<const W*>(a.dy) + row_offset(row, a.sizes, a.dy_rows);
  const float rstd = a.rstd[row];
  float n[V], g[V], dw[V];
  Sum<T> product = 0;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * V; at < a.n; at += step) {
    terms<T, W, V>(a, x, dy, rstd, at, n, g, dw);
#pragma unroll
    for (int e = 0; e < V; e++) product = add_product(product, g[e], n[e]);
  }
  const float mean = static_cast<float>(row_sum(product) * static_cast<Sum<T>>(a.inverse_n));
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * V; at < a.n; at += step) {
    terms<T, W, V>(a, x, dy, rstd, at, n, g, dw);
    store_dx<T, V>(a, row, at, rstd, mean, n, g);
  }
}

// A thread a pack of columns; blockIdx.y is the group, which takes the rows group, group + groups, …
template <class T, class W, int V>
__global__ void __launch_bounds__(block_threads) long_partials_kernel(const RmsNormBackward a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (at >= a.n) return;
  float n[V], g[V], dw[V], sums[V] = {};
  for (int64_t row = blockIdx.y; row < a.sizes.rows; row += a.groups) {
    const T* x = static_cast<const T*>(a.x) + row_offset(row, a.sizes, a.x_rows);
    const W* dy = static_cast<const W*>(a.dy) + row_offset(row, a.sizes, a.dy_rows);
    terms<T, W, V>(a, x, dy, a.rstd[row], at, n, g, dw);
#pragma unroll
    for (int e = 0; e < V; e++) sums[e] += dw[e];
  }
  store_values<float, V>(a.partials + blockIdx.y * a.n + at, sums);
}

// dweight from the groups' sums: 32 columns a block, its warps take the groups in turn, and their sums are added in
// the order of the warps.
template <class W>
__global__ void __launch_bounds__(256) columns_kernel(const RmsNormBackward a) {
  __shared__ float parts[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (column < a.n)
    for (int64_t group = warp; group < a.groups; group += 8) sum += a.partials[group * a.n + column];
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp || column >= a.n) return;
#pragma unroll
  for (int i = 1; i < 8; i++) sum += parts[i][lane];
  static_cast<W*>(a.dweight)[column] = from_float<W>(sum);
}

int threads_of_row(int64_t n) {
  int threads = 32;
  while (threads <= most_threads && static_cast<int64_t>(threads) * kept_elements < n) threads *= 2;
  return threads <= most_threads ? threads : 0;
}

int rows_of_block(int threads) { return threads == 32 ? block_threads / 32 : 1; }

template <class T, class W, int V>
int run_backward(const RmsNormBackward& a, cudaStream_t stream) {
  if (const int threads = threads_of_row(a.n)) {
    const int together = rows_of_block(threads);
    const dim3 block(threads, together), grid((a.groups + together - 1) / together);
    backward_kernel<T, W, V><<<grid, block, 0, stream>>>(a);
  } else {
    long_dx_kernel<T, W, V><<<a.sizes.rows, most_threads, 0, stream>>>(a);
    const dim3 grid((a.n + block_threads * V - 1) / (block_threads * V), a.groups);
    long_partials_kernel<T, W, V><<<grid, block_threads, 0, stream>>>(a);
  }
  columns_kernel<W><<<(a.n + 31) / 32, 256, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T, class W>
int backward(const RmsNormBackward& a, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const bool vectors = a.n % wide == 0 && aligned_to_16(a.x, a.sizes, a.x_rows, sizeof(T)) &&
                       aligned_to_16(a.dy, a.sizes, a.dy_rows, sizeof(W)) && aligned_to_16(a.weight) &&
                       aligned_to_16(a.dx) && aligned_to_16(a.partials) &&
                       (!a.dtotal || aligned_to_16(a.dtotal, a.sizes, a.dtotal_rows, sizeof(T)));
  return vectors ? run_backward<T, W, wide>(a, stream) : run_backward<T, W, 1>(a, stream);
}

}  // namespace
}  // namespace mk::cuda

extern "C" int64_t mk_cuda_rms_norm_groups(int64_t rows, int64_t n) {
  using namespace mk::cuda;
  const int threads = threads_of_row(n), block = threads ? (threads < block_threads ? block_threads : threads) : 0;
  const int blocks = mk_cuda_multiprocessors() * (block ? resident_threads / block : 1);
  const int64_t most = static_cast<int64_t>(blocks) * (threads ? rows_of_block(threads) : 1);
  return rows < most ? rows : most;
}

extern "C" int mk_cuda_rms_norm_backward(const mk::cuda::RmsNormBackward& a, void* stream) {
  using namespace mk::cuda;
  return with_type(a.dtype, [&](auto* x) -> int {
    using T = std::remove_pointer_t<decltype(x)>;
    const auto on = static_cast<cudaStream_t>(stream);
    return a.weight_dtype == a.dtype ? backward<T, T>(a, on) : backward<T, float>(a, on);
  });
}

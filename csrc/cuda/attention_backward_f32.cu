// The gradients of float32 inputs by FMA, as in attention_forward_f32.cu: a warp takes four rows of a tile of 16, its
// lanes are 32 tokens of the other side for the products of rows, and columns for the sums.
#include "cuda/attention_backward.cuh"
#include "cuda/reduce.cuh"

namespace mk::cuda {
namespace {

constexpr int tile_rows = 16, warp_rows = 4, block = 32;
constexpr int columns_of_lane = 8;  // for head dimensions up to 256

__host__ __device__ __forceinline__ int padded(int dim) { return dim + 4; }

// Rows `first` to first + rows - 1 of `count`; zeros behind.
__device__ __forceinline__ void load_rows(float* to, const Rows<float>& from, int first, int rows, int count, int dim) {
  const int quads = dim / 4;
  for (int index = threadIdx.x; index < rows * quads; index += attention_threads) {
    const int row = index / quads, quad = index % quads;
    *reinterpret_cast<float4*>(to + row * padded(dim) + 4 * quad) =
        first + row < count ? *reinterpret_cast<const float4*>(from.at(first + row) + 4 * quad) : float4{};
  }
}

__device__ __forceinline__ float dot(const float* x, const float* y, int dim) {
  float4 sum = {};
  for (int d = 0; d < dim; d += 4) {
    const float4 u = *reinterpret_cast<const float4*>(x + d), v = *reinterpret_cast<const float4*>(y + d);
    sum.x = fmaf(u.x, v.x, sum.x), sum.y = fmaf(u.y, v.y, sum.y);
    sum.z = fmaf(u.z, v.z, sum.z), sum.w = fmaf(u.w, v.w, sum.w);
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

// sums[r][column] += Σ over the 32 lanes j of weight[r] of lane j · row j of the tile
__device__ __forceinline__ void add_rows(float (&sums)[warp_rows][columns_of_lane], const float (&weight)[warp_rows],
                                         const float* tile, int dim) {
  // The sums of a block first: their rounding errors grow with its 32 terms, not with all keys.
  const int lane = threadIdx.x % 32;
  float part[warp_rows][columns_of_lane] = {};
  for (int j = 0; j < block; j++) {
    float w[warp_rows];
#pragma unroll
    for (int r = 0; r < warp_rows; r++) w[r] = __shfl_sync(0xffffffffu, weight[r], j);
#pragma unroll
    for (int c = 0; c < columns_of_lane; c++) {
      if (32 * c >= dim) break;
      const float value = lane + 32 * c < dim ? tile[j * padded(dim) + lane + 32 * c] : 0.0f;
#pragma unroll
      for (int r = 0; r < warp_rows; r++) part[r][c] = fmaf(w[r], value, part[r][c]);
    }
  }
#pragma unroll
  for (int r = 0; r < warp_rows; r++)
#pragma unroll
    for (int c = 0; c < columns_of_lane; c++) sums[r][c] += part[r][c];
}

__device__ __forceinline__ void store_sums(const float (&sums)[columns_of_lane], float scale, float* to, int dim) {
#pragma unroll
  for (int c = 0; c < columns_of_lane; c++) {
    const int column = threadIdx.x % 32 + 32 * c;
    if (column < dim) to[column] = sums[c] * scale;
  }
}

__global__ void __launch_bounds__(attention_threads) query_gradient_kernel_f32(const AttentionBackward a) {
  extern __shared__ __align__(16) float floats[];
  const BackwardWork<float> w(a, tile_rows, a.max_q, true);
  const int count = w.queries.count, pitch = padded(a.dim), lane = threadIdx.x % 32;
  if (w.first >= count) return;
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), own = threadIdx.x / 32 * warp_rows;
  float *queries = floats, *outs = queries + tile_rows * pitch;
  float *key_tile = outs + tile_rows * pitch, *value_tile = key_tile + block * pitch;
  const Rows<float> k = w.of_keys(a.k, kv_head), v = w.of_keys(a.v, kv_head);
  load_rows(queries, w.of_queries(a.q, head), w.first, tile_rows, count, a.dim);
  load_rows(outs, w.of_queries(a.dout, head), w.first, tile_rows, count, a.dim);
  const int last = min(w.first + tile_rows, count) - 1;
  const int begin = w.visible.begin(w.first + w.offset()) / block;
  const int blocks = max((w.visible.end(last + w.offset()) + block - 1) / block - begin, 0);
  Statistics of_row[warp_rows];
  float dq[warp_rows][columns_of_lane] = {};
  const auto finish_statistics = [&] {
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) of_row[r].join(lanes, log2e);
      if (w.first + own + r >= count) continue;
      const int64_t at = w.statistic(a, head, w.first + own + r);
      of_row[r].finish(a.dlse[at]);
      if (lane == 0) of_row[r].store(a.scratch, at, a.tokens * a.heads);
    }
  };
  if (!blocks) finish_statistics();
  for (int i = 0; i < 2 * blocks; i++) {
    const int key = (begin + i % blocks) * block;
    __syncthreads();  // the block before is done with
    load_rows(key_tile, k, key, block, w.keys.count, a.dim);
    load_rows(value_tile, v, key, block, w.keys.count, a.dim);
    __syncthreads();
    float ds[warp_rows];
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
      const float score = __fmul_rn(dot(queries + (own + r) * pitch, key_tile + lane * pitch, a.dim), a.scale);
      const float dp = dot(outs + (own + r) * pitch, value_tile + lane * pitch, a.dim);
      const bool seen = w.visible.sees(w.first + own + r + w.offset(), key + lane);
      if (i < blocks) of_row[r].add(seen ? score : -INFINITY, dp, log2e);
      ds[r] = seen ? expf(score - of_row[r].largest) * of_row[r].sum * (dp - of_row[r].delta) : 0.0f;
    }
    if (i >= blocks) add_rows(dq, ds, key_tile, a.dim);
    if (i == blocks - 1) finish_statistics();
  }
  const int64_t token = (w.packed ? w.queries.first : static_cast<int64_t>(w.sequence) * a.max_q) + w.first + own;
#pragma unroll
  for (int r = 0; r < warp_rows; r++)
    if (w.first + own + r < count)
      store_sums(dq[r], a.scale, static_cast<float*>(a.dq) + ((token + r) * a.heads + head) * a.dim, a.dim);
}

__global__ void __launch_bounds__(attention_threads) key_gradient_kernel_f32(const AttentionBackward a) {
  extern __shared__ __align__(16) float floats[];
  const BackwardWork<float> w(a, tile_rows, a.max_k, false);
  const int keys = w.keys.count, pitch = padded(a.dim), lane = threadIdx.x % 32, offset = w.offset();
  if (w.first >= keys) return;
  const int kv_head = blockIdx.y, group = a.heads / a.kv_heads, own = threadIdx.x / 32 * warp_rows;
  float *key_tile = floats, *value_tile = key_tile + tile_rows * pitch;
  float *queries = value_tile + tile_rows * pitch, *outs = queries + block * pitch;
  load_rows(key_tile, w.of_keys(a.k, kv_head), w.first, tile_rows, keys, a.dim);
  load_rows(value_tile, w.of_keys(a.v, kv_head), w.first, tile_rows, keys, a.dim);
  const int last = min(w.first + tile_rows, keys) - 1;
  const int first_seen = a.causal ? max(w.first - offset, 0) : 0;
  const int end_seen = a.causal && a.window ? min(w.queries.count, last + a.window - offset) : w.queries.count;
  const int begin = first_seen / block, blocks = max((end_seen + block - 1) / block - begin, 0);
  float dk[warp_rows][columns_of_lane] = {}, dv[warp_rows][columns_of_lane] = {};
  for (int i = 0; i < group * blocks; i++) {
    const int head = kv_head * group + i / blocks, first = (begin + i % blocks) * block, query = first + lane;
    __syncthreads();  // the block before is done with
    load_rows(queries, w.of_queries(a.q, head), first, block, w.queries.count, a.dim);
    load_rows(outs, w.of_queries(a.dout, head), first, block, w.queries.count, a.dim);
    __syncthreads();
    const int64_t at = w.statistic(a, head, min(query, w.queries.count - 1)), count = a.tokens * a.heads;
    const float largest = a.scratch[at], inverse = a.scratch[count + at], delta = a.scratch[2 * count + at];
    float p[warp_rows], ds[warp_rows];
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
      const float score = __fmul_rn(dot(key_tile + (own + r) * pitch, queries + lane * pitch, a.dim), a.scale);
      const float dp = dot(value_tile + (own + r) * pitch, outs + lane * pitch, a.dim);
      const bool seen = query < w.queries.count && w.visible.sees(query + offset, w.first + own + r);
      p[r] = seen ? expf(score - largest) * inverse : 0.0f;
      ds[r] = p[r] * (dp - delta);
    }
    add_rows(dv, p, outs, a.dim);
    add_rows(dk, ds, queries, a.dim);
  }
  const int64_t token = (w.packed ? w.keys.first : static_cast<int64_t>(w.sequence) * a.max_k) + w.first + own;
#pragma unroll
  for (int r = 0; r < warp_rows; r++) {
    if (w.first + own + r >= keys) continue;
    const int64_t at = ((token + r) * a.kv_heads + kv_head) * a.dim;
    store_sums(dk[r], a.scale, static_cast<float*>(a.dk) + at, a.dim);
    store_sums(dv[r], 1.0f, static_cast<float*>(a.dv) + at, a.dim);
  }
}

}  // namespace

int attention_backward_f32(const AttentionBackward& a, cudaStream_t stream) {
  const int bytes = 2 * (tile_rows + block) * padded(a.dim) * 4;
  if (const int status = allow_shared(query_gradient_kernel_f32, bytes)) return status;
  if (const int status = allow_shared(key_gradient_kernel_f32, bytes)) return status;
  const auto grid = [&](int longest, int heads) {
    return dim3((longest + tile_rows - 1) / tile_rows * static_cast<int64_t>(a.sequences), heads);
  };
  if (a.max_q) query_gradient_kernel_f32<<<grid(a.max_q, a.heads), attention_threads, bytes, stream>>>(a);
  if (a.max_k) key_gradient_kernel_f32<<<grid(a.max_k, a.kv_heads), attention_threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace mk::cuda

// Float32 inputs: float32 products on the ordinary units (FMA), since those of the tensor cores drop 13 bits of each
// factor. A warp takes four rows of a tile of 16; its lanes are 32 keys for the scores, and columns for the values.
#include "cuda/attention_forward.cuh"

namespace mk::cuda {
namespace {

constexpr int tile_rows = 16, warp_rows = 4, key_block = 32;
constexpr int columns_of_lane = 8;  // for head dimensions up to 256

// Four more floats a row: lanes that read neighbouring rows then hit different banks.
__host__ __device__ __forceinline__ int padded(int dim) { return dim + 4; }

__device__ __forceinline__ void load_rows(float* to, const ForwardKeys<float>& from, int first, int dim) {
  const int quads = dim / 4;
  for (int index = threadIdx.x; index < key_block * quads; index += attention_threads) {
    const int row = index / quads, quad = index % quads;
    const float* source = from.at(first + row);
    *reinterpret_cast<float4*>(to + row * padded(dim) + 4 * quad) =
        source ? *reinterpret_cast<const float4*>(source + 4 * quad) : float4{};
  }
}

__device__ __forceinline__ void load_queries(float* to, const Attention& a, const ForwardWork<float>& w) {
  const int quads = a.dim / 4;
  for (int index = threadIdx.x; index < tile_rows * quads; index += attention_threads) {
    const int row = w.first_row + index / quads, quad = index % quads;
    float4 value = {};
    if (row < w.rows())
      value = *reinterpret_cast<const float4*>(
          Rows<float>(a.q, w.sequence, w.packed, w.queries.first, w.head_of(row)).at(row / w.packed_heads) + 4 * quad);
    *reinterpret_cast<float4*>(to + index / quads * padded(a.dim) + 4 * quad) = value;
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

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

struct Row {
  float largest = -INFINITY, sum = 0, out[columns_of_lane] = {};

  // This lane's score of a block of keys; it becomes its exponential.
  __device__ __forceinline__ float add(float score) {
    const float top = fmaxf(largest, warp_max(score)), base = top == -INFINITY ? 0.0f : top;
    const float shrink = expf(largest - base);
    largest = top;
    score = expf(score - base);
    sum = sum * shrink + score;
#pragma unroll
    for (int c = 0; c < columns_of_lane; c++) out[c] *= shrink;
    return score;
  }
};

__device__ __forceinline__ void store_row(const Attention& a, const ForwardWork<float>& w, Row& row, int of_sequence) {
  const int lane = threadIdx.x % 32, query = of_sequence / w.packed_heads, head = w.head_of(of_sequence);
#pragma unroll
  for (int distance = 16; distance; distance /= 2) row.sum += __shfl_xor_sync(0xffffffffu, row.sum, distance);
  if (of_sequence >= w.rows()) return;
  const float inverse = row.sum > 0 ? 1.0f / row.sum : 0.0f;
  const int64_t token = (w.packed ? w.queries.first : static_cast<int64_t>(w.sequence) * a.max_q) + query;
  float* out = static_cast<float*>(a.out) + (token * a.heads + head) * a.dim;
#pragma unroll
  for (int c = 0; c < columns_of_lane; c++)
    if (lane + 32 * c < a.dim) out[lane + 32 * c] = row.out[c] * inverse;
  if (lane || !a.lse) return;
  a.lse[lse_at(w.packed, a.tokens, a.heads, w.sequence, a.max_q, head, w.packed ? w.queries.first + query : query)] =
      row.sum > 0 ? row.largest + logf(row.sum) : -INFINITY;
}

__global__ void __launch_bounds__(attention_threads) attention_kernel_f32(const Attention a, const int packed_heads) {
  extern __shared__ __align__(16) float floats[];
  const ForwardWork<float> w(a, tile_rows, packed_heads);
  if (w.first_row >= w.rows()) return;
  const int pitch = padded(a.dim), lane = threadIdx.x % 32, first = threadIdx.x / 32 * warp_rows;
  float *queries = floats, *key_tile = queries + tile_rows * pitch, *value_tile = key_tile + key_block * pitch;
  const ForwardKeys<float> keys(a.k_ring, a.k, w, a), values(a.v_ring, a.v, w, a);
  const int last_row = min(w.first_row + tile_rows, w.rows()) - 1;
  const int begin = w.visible.begin(w.position(w.first_row)) / key_block * key_block;
  const int end = w.visible.end(w.position(last_row));
  load_queries(queries, a, w);
  Row rows[warp_rows];
  for (int key = begin; key < end; key += key_block) {
    __syncthreads();  // the block before is done with
    load_rows(key_tile, keys, key, a.dim);
    load_rows(value_tile, values, key, a.dim);
    __syncthreads();
    float p[warp_rows];
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
      const float score = dot(queries + (first + r) * pitch, key_tile + lane * pitch, a.dim) * a.scale;
      const bool seen = w.visible.sees(w.position(w.first_row + first + r), key + lane);
      p[r] = rows[r].add(seen ? score : -INFINITY);
    }
    for (int j = 0; j < key_block; j++) {
      float weight[warp_rows];
#pragma unroll
      for (int r = 0; r < warp_rows; r++) weight[r] = __shfl_sync(0xffffffffu, p[r], j);
#pragma unroll
      for (int c = 0; c < columns_of_lane; c++) {
        if (32 * c >= a.dim) break;
        const float value = lane + 32 * c < a.dim ? value_tile[j * pitch + lane + 32 * c] : 0.0f;
#pragma unroll
        for (int r = 0; r < warp_rows; r++) rows[r].out[c] = fmaf(weight[r], value, rows[r].out[c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < warp_rows; r++) store_row(a, w, rows[r], w.first_row + first + r);
}

}  // namespace

int attention_forward_f32(const Attention& a, cudaStream_t stream) {
  const int packed_heads = packed_heads_of(a), bytes = (tile_rows + 2 * key_block) * (a.dim + 4) * 4;
  if (const int status = allow_shared(attention_kernel_f32, bytes)) return status;
  const int64_t tiles = (static_cast<int64_t>(a.max_q) * packed_heads + tile_rows - 1) / tile_rows;
  const dim3 grid(tiles * a.sequences, a.heads / packed_heads);
  attention_kernel_f32<<<grid, attention_threads, bytes, stream>>>(a, packed_heads);
  return cudaGetLastError();
}

}  // namespace mk::cuda

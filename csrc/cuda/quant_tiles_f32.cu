// Tiles for float32 x: FMA, since tf32 would not keep the parity rule. A block takes 64 by 64 results, a thread 8 by 4.
// The products of 32 elements are added up before they join the total: sums of sums lose less than one long chain.
#include "cuda/quant_tiles.cuh"

namespace mk::cuda {
namespace {

constexpr int size = 64, depth = 32, pitch = size + 4;

// What a thread brings of a block of `depth` elements: four pieces of x, and the codes of 16 elements.
template <QuantKind kind>
struct Piece {
  static constexpr int x_pieces = size * depth / 4 / tile_threads;
  float4 x[x_pieces];
  uint4 codes;

  __device__ __forceinline__ void load(const QuantLinear& a, int64_t first_m, int first_n, int k, bool x_vectors,
                                       bool vectors) {
#pragma unroll
    for (int i = 0; i < x_pieces; i++) {
      const int index = threadIdx.x + i * tile_threads, at = k + index % (depth / 4) * 4;
      const int64_t row = first_m + index / (depth / 4);
      const float* from = static_cast<const float*>(a.x) + row * a.x_row + at;
      const int left = row < a.m ? a.k - at : 0;
      if (x_vectors && left >= 4)
        x[i] = *reinterpret_cast<const float4*>(from);
      else
        x[i] =
            make_float4(left > 0 ? from[0] : 0, left > 1 ? from[1] : 0, left > 2 ? from[2] : 0, left > 3 ? from[3] : 0);
    }
    // Of half-byte codes 8 bytes: eight elements in the low halves, and the eight 16 further on.
    constexpr int mine = is_bytes<kind> ? 16 : 8;
    const int n = first_n + threadIdx.x / 2, at = k * mine / 16 + threadIdx.x % 2 * mine;
    const uint8_t* from = a.codes + static_cast<int64_t>(n) * a.code_row + at;
    const int left = n < a.n ? bytes_of_row<kind>(a.k) - at : 0;
    if (!vectors || left < mine)
      codes = gather<uint8_t>(from, min(left, mine));
    else if constexpr (is_bytes<kind>)
      codes = *reinterpret_cast<const uint4*>(from);
    else
      codes = make_uint4(reinterpret_cast<const uint2*>(from)->x, reinterpret_cast<const uint2*>(from)->y, 0, 0);
  }

  // Column by column, so that the elements of eight rows of x, or of four of the codes, lie together.
  __device__ __forceinline__ void store(float* x_tile, float* weight, const float* nf4) const {
#pragma unroll
    for (int i = 0; i < x_pieces; i++) {
      const int index = threadIdx.x + i * tile_threads;
      float* to = x_tile + index % (depth / 4) * 4 * pitch + index / (depth / 4);
      to[0] = x[i].x, to[pitch] = x[i].y, to[2 * pitch] = x[i].z, to[3 * pitch] = x[i].w;
    }
#pragma unroll
    for (int part = 0; part < 2; part++) {
      float w[8];
      decode<kind>(codes, is_bytes<kind> ? part : 2 * part, nf4, w);
      const int first = is_bytes<kind> ? threadIdx.x % 2 * 16 + 8 * part : threadIdx.x % 2 * 8 + 16 * part;
#pragma unroll
      for (int e = 0; e < 8; e++) weight[(first + e) * pitch + threadIdx.x / 2] = w[e];
    }
  }
};

// Columns 4 c to 4 c + 3, of which those past the last are zero.
__device__ __forceinline__ void load_four(const QuantLinear& a, const float* values, int n, int k, float (&to)[4]) {
  const int group = a.group ? k / a.group : 0;
#pragma unroll
  for (int e = 0; e < 4; e++)
    to[e] = n + e < a.n ? __ldg(values + static_cast<int64_t>(n + e) * a.groups + group) : 0.0f;
}

template <QuantKind kind>
__device__ __forceinline__ void add_block(const QuantLinear& a, const float* x_tile, const float* weight, int n, int k,
                                          float (&total)[8][4]) {
  float part[8][4] = {}, scale[4], offset[4];
  load_four(a, a.scale, n, k, scale);
  if (has_offset<kind>) load_four(a, a.offset, n, k, offset);
#pragma unroll 8
  for (int e = 0; e < depth; e++) {
    const float4* left = reinterpret_cast<const float4*>(x_tile + e * pitch + threadIdx.x / 16 * 8);
    const float4 low = left[0], high = left[1];
    const float4 right = *reinterpret_cast<const float4*>(weight + e * pitch + threadIdx.x % 16 * 4);
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float w[4] = {right.x, right.y, right.z, right.w};
    // Not as sums of its own: where codes and offset nearly cancel, so would those, with the rounding of both.
    if (has_offset<kind>) {
#pragma unroll
      for (int j = 0; j < 4; j++) w[j] = fmaf(w[j], scale[j], offset[j]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) part[i][j] = fmaf(x[i], w[j], part[i][j]);
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) total[i][j] = fmaf(part[i][j], has_offset<kind> ? 1.0f : scale[j], total[i][j]);
}

template <QuantKind kind>
__global__ void __launch_bounds__(tile_threads)
    quant_tile_kernel_f32(const QuantLinear a, bool x_vectors, bool vectors) {
  __shared__ __align__(16) float x_tile[depth * pitch], weight[depth * pitch];
  __shared__ float nf4[16];
  if constexpr (kind == QuantKind::nf4) load_nf4(nf4);
  const uint32_t down = static_cast<uint32_t>((a.m + size - 1) / size);
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % down) * size;
  const int first_n = static_cast<int>(blockIdx.x / down) * size, n = first_n + threadIdx.x % 16 * 4;
  float total[8][4] = {};
  Piece<kind> piece;
  if (a.k) piece.load(a, first_m, first_n, 0, x_vectors, vectors);
  for (int k = 0; k < a.k; k += depth) {
    __syncthreads();  // the last block is done with
    piece.store(x_tile, weight, nf4);
    __syncthreads();
    if (a.k - k > depth) piece.load(a, first_m, first_n, k + depth, x_vectors, vectors);
    add_block<kind>(a, x_tile, weight, n, k, total);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int64_t m = first_m + threadIdx.x / 16 * 8 + i;
    if (m >= a.m) break;
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (a.bias && n + j < a.n) total[i][j] += static_cast<const float*>(a.bias)[n + j];
    float* to = static_cast<float*>(a.y) + m * a.n + n;
    if (a.n % 4 == 0 && n < a.n)
      *reinterpret_cast<float4*>(to) = make_float4(total[i][0], total[i][1], total[i][2], total[i][3]);
    else
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (n + j < a.n) to[j] = total[i][j];
  }
}

}  // namespace

int quant_tiles_f32(const QuantLinear& a, cudaStream_t stream) {
  return with_kind(a.kind, [&](auto of) -> int {
    const int64_t blocks = (a.m + size - 1) / size * ((static_cast<int64_t>(a.n) + size - 1) / size);
    quant_tile_kernel_f32<decltype(of)::kind><<<blocks, tile_threads, 0, stream>>>(
        a, rows_aligned(a.x, a.m, a.x_row * 4), rows_aligned(a.codes, a.n, a.code_row));
    return cudaGetLastError();
  });
}

}  // namespace mk::cuda

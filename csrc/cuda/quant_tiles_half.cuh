// Tiles for 16-bit x on mma.m16n8k16. Within 16 elements the order is not that of memory but one that both operands
// share: lane t of four has the elements 4 t to 4 t + 3, so that four codes are one 32-bit load and come out as the two
// registers of an operand. Half-byte codes hold elements 16 apart in a byte: the low halves are one product's, the high
// ones the next one's.
#pragma once
#include "cuda/quant_tiles.cuh"

namespace mk::cuda {

template <QuantKind kind, int kRows>
struct HalfTile : TileShape<kRows> {
  using TileShape<kRows>::columns;
  static constexpr int depth = 64, stages = 3;
  static constexpr int code_chunks = is_bytes<kind> ? 4 : 2;  // of a row
  static constexpr int x_bytes = kRows * depth * 2, stage_bytes = x_bytes + columns * code_chunks * 16;

  // 16-byte chunks are permuted so that the lanes of a load reach different banks.
  static __device__ __forceinline__ int x_at(int row, int chunk) {
    return row * (depth * 2) + (chunk ^ (row & 3) * 2) * 16;
  }
  static __device__ __forceinline__ int codes_at(int row, int chunk) {
    const int turn = is_bytes<kind> ? row >> 1 & 3 : row >> 2 & 1;
    return x_bytes + row * (code_chunks * 16) + (chunk ^ turn) * 16;
  }
};

template <class T>
__device__ __forceinline__ uint32_t subtract_pair(uint32_t pair, float value) {
  const uint32_t values = pack_pair<T>(value, value);
  if constexpr (__is_same(T, bf16)) {
    const __nv_bfloat162 d =
        __hsub2(*reinterpret_cast<__nv_bfloat162*>(&pair), *reinterpret_cast<const __nv_bfloat162*>(&values));
    return *reinterpret_cast<const uint32_t*>(&d);
  } else {
    const __half2 d = __hsub2(*reinterpret_cast<__half2*>(&pair), *reinterpret_cast<const __half2*>(&values));
    return *reinterpret_cast<const uint32_t*>(&d);
  }
}

// The codes of a word's bytes 2 i and 2 i + 1 in T, exactly but for nf4, whose entries are rounded after they are
// multiplied with `factor`; `high`: of their high halves.
template <class T, QuantKind kind>
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, int i, int high, const float* nf4, float factor) {
  const int select = i ? 0x4342 : 0x4140;
  if constexpr (is_bytes<kind>) {
    word ^= 0x80808080u;
    // float16 holds 1024 + byte; bfloat16 does not, but byte - 128 is exact in the upper half of a float32.
    if constexpr (__is_same(T, f16)) return subtract_pair<T>(__byte_perm(word, 0x64646464u, select), 1152.0f);
    return __byte_perm(__float_as_uint(byte_value(word, 2 * i, 128.0f)),
                       __float_as_uint(byte_value(word, 2 * i + 1, 128.0f)), 0x7632);
  } else {
    const uint32_t codes = word >> (4 * high) & 0x0f0f0f0fu;
    if constexpr (kind == QuantKind::nf4) {
      const float first = nf4[codes >> (16 * i) & 15], second = nf4[codes >> (16 * i + 8) & 15];
      return pack_pair<T>(first * factor, second * factor);
    } else if constexpr (__is_same(T, f16)) {
      return subtract_pair<T>(__byte_perm(codes, 0x64646464u, select), 1032.0f);
    } else {
      return subtract_pair<T>(__byte_perm(codes, 0x43434343u, select), 136.0f);  // 128 + code
    }
  }
}

// x = significand · power, of which the first is 1 to 2 in size; where x is subnormal, the second is 1.
__device__ __forceinline__ float significand(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x7f800000u ? __uint_as_float((bits & 0x807fffffu) | 0x3f800000u) : x;
}
__device__ __forceinline__ float power(float x) {
  const uint32_t bits = __float_as_uint(x) & 0x7f800000u;
  return bits ? __uint_as_float(bits) : 1.0f;
}

template <class T, QuantKind kind, int kRows>
struct HalfSums {
  using Tile = HalfTile<kind, kRows>;
  static constexpr int m_tiles = Tile::m_tiles, n_tiles = Tile::n_tiles;
  float total[m_tiles][n_tiles][4] = {}, part[m_tiles][n_tiles][4] = {}, x_sum[m_tiles][4] = {};
  float scale[n_tiles][2], offset[n_tiles][2], factor[n_tiles] = {};

  // Those of the group of element k. With nf4, codes are multiplied with the significand of the scale before they are
  // rounded, as the rounding of the 16 entries themselves would be the same throughout a weight and not average out;
  // the power of two is left for the sums, where it neither overflows nor underflows.
  __device__ __forceinline__ void load_group(const QuantLinear& a, int first, int k) {
    load_columns(a, a.scale, first, k, scale);
    if constexpr (has_offset<kind>) load_columns(a, a.offset, first, k, offset);
    if constexpr (kind == QuantKind::nf4) {
      const int group = a.group ? k / a.group : 0;
#pragma unroll
      for (int j = 0; j < n_tiles; j++) {
        const int64_t n = min(first + 8 * j + static_cast<int>(threadIdx.x) % 32 / 4, a.n - 1);
        factor[j] = significand(__ldg(a.scale + n * a.groups + group));
        scale[j][0] = power(scale[j][0]), scale[j][1] = power(scale[j][1]);
      }
    }
  }

  // Adds the products of 32 elements of a stage, its first or second half.
  __device__ __forceinline__ void multiply(const char* stage, int half, int column, const float* nf4) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int q = 0; q < 2; q++) {
      uint32_t left[m_tiles][4];
#pragma unroll
      for (int i = 0; i < m_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int at = Tile::x_at(16 * i + g + 8 * r, 4 * half + 2 * q + t / 2) + t % 2 * 8;
          const uint2 pair = *reinterpret_cast<const uint2*>(stage + at);
          left[i][r] = pair.x, left[i][2 + r] = pair.y;
        }
#pragma unroll
      for (int j = 0; j < n_tiles; j++) {
        const int chunk = is_bytes<kind> ? 2 * half + q : half;
        const uint32_t word =
            *reinterpret_cast<const uint32_t*>(stage + Tile::codes_at(column + 8 * j + g, chunk) + 4 * t);
        const uint32_t b0 = decode_pair<T, kind>(word, 0, q, nf4, factor[j]);
        const uint32_t b1 = decode_pair<T, kind>(word, 1, q, nf4, factor[j]);
#pragma unroll
        for (int i = 0; i < m_tiles; i++) mma<T>(part[i][j], left[i], b0, b1);
      }
      if constexpr (has_offset<kind>) {
        const uint32_t ones = pack_pair<T>(1.0f, 1.0f);
#pragma unroll
        for (int i = 0; i < m_tiles; i++) mma<T>(x_sum[i], left[i], ones, ones);
      }
    }
  }

  __device__ __forceinline__ void scale_group() {
#pragma unroll
    for (int i = 0; i < m_tiles; i++) {
#pragma unroll
      for (int j = 0; j < n_tiles; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          total[i][j][e] = fmaf(part[i][j][e], scale[j][e % 2], total[i][j][e]);
          if (has_offset<kind>) total[i][j][e] = fmaf(x_sum[i][e], offset[j][e % 2], total[i][j][e]);
          part[i][j][e] = 0;
        }
#pragma unroll
      for (int e = 0; e < 4; e++) x_sum[i][e] = 0;
    }
  }
};

template <class T, QuantKind kind, int kRows>
__global__ void __launch_bounds__(tile_threads) quant_tile_kernel(const QuantLinear a, bool x_vectors, bool vectors) {
  using Tile = HalfTile<kind, kRows>;
  __shared__ __align__(128) char shared[Tile::stages * Tile::stage_bytes];
  __shared__ float nf4[16];
  if constexpr (kind == QuantKind::nf4) load_nf4(nf4);
  int64_t first_m;
  int first_n;
  tile_of_block<kRows>(a, first_m, first_n);
  const ByteRows x{static_cast<const char*>(a.x), a.x_row * 2, a.m, int64_t{2} * a.k, x_vectors};
  const ByteRows codes = code_rows_of<kind>(a, vectors);
  const int blocks = (a.k + Tile::depth - 1) / Tile::depth, column = threadIdx.x / 32 * 8 * Tile::n_tiles;
  // Where a row shares a scale, sums are still taken over 128 elements first: they lose less than one over the row.
  const int group = a.group ? a.group : 128;
  const auto stage_of = [&](int block) { return shared + block % Tile::stages * Tile::stage_bytes; };
  const auto load = [&](int block) {
    if (block < blocks) {
      char* stage = stage_of(block);
      load_rows<kRows, Tile::depth / 8, uint16_t>(x, first_m, static_cast<int64_t>(block) * Tile::depth * 2,
                                                  [&](int row, int chunk) { return stage + Tile::x_at(row, chunk); });
      load_rows<Tile::columns, Tile::code_chunks, uint8_t>(
          codes, first_n, static_cast<int64_t>(block) * Tile::code_chunks * 16,
          [&](int row, int chunk) { return stage + Tile::codes_at(row, chunk); });
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < Tile::stages - 1; s++) load(s);
  HalfSums<T, kind, kRows> sums;
  for (int block = 0; block < blocks; block++) {
    wait_copies<Tile::stages - 2>();
    __syncthreads();  // this block's data are there, and the buffer of the last is free
    load(block + Tile::stages - 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int k = block * Tile::depth + 32 * half;
      if (k >= a.k) break;
      if (k % group == 0) sums.load_group(a, first_n + column, k);
      sums.multiply(stage_of(block), half, column, nf4);
      if ((k + 32) % group == 0 || k + 32 >= a.k) sums.scale_group();
    }
  }
  __syncthreads();  // the buffers are free, and all copies have been waited for
  store_tile<T, kRows>(a, shared, first_m, first_n, sums.total);
}

template <class T, QuantKind kind, int kRows>
int run_tiles(const QuantLinear& a, cudaStream_t stream) {
  quant_tile_kernel<T, kind, kRows><<<tile_blocks<kRows>(a), tile_threads, 0, stream>>>(
      a, rows_aligned(a.x, a.m, a.x_row * 2), rows_aligned(a.codes, a.n, a.code_row));
  return cudaGetLastError();
}

template <class T>
int quant_tiles_half(const QuantLinear& a, cudaStream_t stream) {
  return with_kind(a.kind, [&](auto of) -> int {
    constexpr QuantKind kind = decltype(of)::kind;
    return a.m <= 16 ? run_tiles<T, kind, 16>(a, stream) : run_tiles<T, kind, 64>(a, stream);
  });
}

}  // namespace mk::cuda

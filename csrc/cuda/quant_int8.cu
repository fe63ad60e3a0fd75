// Rows of x rounded to int8, and tiles of products of int8, whose sums are exact.
#include "cuda/quant_tiles.cuh"

namespace mk::cuda {
namespace {

constexpr int round_threads = 256;

// The largest of the block's values, known to each thread.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t parts[round_threads / 32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, parts[threadIdx.x % (round_threads / 32)]);
}

__device__ __forceinline__ uint32_t code_of(float x, float scale) {
  const float steps = scale > 0 ? rintf(__fdiv_rn(x, scale)) : 0.0f;
  return steps == steps ? static_cast<uint32_t>(__float2int_rn(fminf(fmaxf(steps, -127.0f), 127.0f))) & 255 : 0;
}

// A block a row. A row that is not finite has a scale that is not: as an integer, NaN is above infinity.
template <class T>
__global__ void __launch_bounds__(round_threads) quant_round_kernel(const QuantRound a, const bool vectors) {
  const int64_t row = blockIdx.x;
  const T* from = static_cast<const T*>(a.x) + row * a.x_row;
  const auto load = [&](int k, float (&x)[8]) {
    if (vectors && k + 8 <= a.k)
      load_eight<T, true>(from, k, a.k, x);
    else
      load_eight<T, false>(from, k, a.k, x);
  };
  float x[8];
  uint32_t most = 0;
  for (int64_t k = threadIdx.x * 8; k < a.k; k += round_threads * 8) {
    load(static_cast<int>(k), x);
#pragma unroll
    for (int e = 0; e < 8; e++) most = max(most, __float_as_uint(x[e]) & 0x7fffffffu);
  }
  const float scale = __fdiv_rn(__uint_as_float(block_max(most)), 127.0f);
  for (int64_t k = threadIdx.x * 8; k < a.padded; k += round_threads * 8) {
    load(static_cast<int>(k), x);
    uint32_t words[2] = {};
#pragma unroll
    for (int e = 0; e < 8; e++) words[e / 4] |= code_of(x[e], scale) << (8 * (e % 4));
    *reinterpret_cast<uint2*>(a.codes + row * a.padded + k) = make_uint2(words[0], words[1]);
  }
  if (threadIdx.x == 0) a.scale[row] = scale;
}

template <int kRows>
struct ByteTile : TileShape<kRows> {
  using TileShape<kRows>::columns;
  static constexpr int depth = 128, stages = 2, chunks = depth / 16;
  static constexpr int x_bytes = kRows * depth, stage_bytes = x_bytes + columns * depth;
};

// c += a · b, of bytes
__device__ __forceinline__ void mma_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kRows>
struct ByteSums {
  using Shape = TileShape<kRows>;
  static constexpr int m_tiles = Shape::m_tiles, n_tiles = Shape::n_tiles;
  int part[m_tiles][n_tiles][4] = {};
  float total[m_tiles][n_tiles][4] = {}, scale[n_tiles][2];

  // Adds the products of 32 elements; a 16-bit matrix of eight columns has 16 bytes in its rows.
  __device__ __forceinline__ void multiply(Tile<bf16, 64> x, Tile<bf16, 64> codes, int step, int column) {
    uint32_t left[m_tiles][4];
#pragma unroll
    for (int i = 0; i < m_tiles; i++) x.load_a(left[i], 16 * i, 2 * step);
#pragma unroll
    for (int j = 0; j < n_tiles / 2; j++) {
      uint32_t right[4];
      codes.load_b_rows(right, column + 16 * j, 2 * step);
#pragma unroll
      for (int i = 0; i < m_tiles; i++) {
        mma_bytes(part[i][2 * j], left[i], right[0], right[1]);
        mma_bytes(part[i][2 * j + 1], left[i], right[2], right[3]);
      }
    }
  }

  __device__ __forceinline__ void scale_group(const float (&x_scale)[m_tiles][2]) {
#pragma unroll
    for (int i = 0; i < m_tiles; i++)
#pragma unroll
      for (int j = 0; j < n_tiles; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          total[i][j][e] += static_cast<float>(part[i][j][e]) * x_scale[i][e / 2] * scale[j][e % 2];
          part[i][j][e] = 0;
        }
  }
};

template <int kRows>
__global__ void __launch_bounds__(tile_threads) quant_int8_tile_kernel(const QuantLinear a, const bool vectors) {
  using Sizes = ByteTile<kRows>;
  __shared__ __align__(128) char shared[Sizes::stages * Sizes::stage_bytes];
  int64_t first_m;
  int first_n;
  tile_of_block<kRows>(a, first_m, first_n);
  const ByteRows x{static_cast<const char*>(a.x), a.x_row, a.m, a.x_row, true};
  const ByteRows codes = code_rows_of<QuantKind::w8a8>(a, vectors);
  const int blocks = (a.k + Sizes::depth - 1) / Sizes::depth, column = threadIdx.x / 32 * 8 * Sizes::n_tiles;
  const auto x_tile = [&](int block) { return Tile<bf16, 64>{shared + (block & 1) * Sizes::stage_bytes}; };
  const auto code_tile = [&](int block) { return Tile<bf16, 64>{x_tile(block).base + Sizes::x_bytes}; };
  const auto load = [&](int block) {
    if (block < blocks) {
      const int64_t at = static_cast<int64_t>(block) * Sizes::depth;
      load_rows<kRows, Sizes::chunks, uint8_t>(x, first_m, at,
                                               [&](int row, int chunk) { return x_tile(block).at(row, chunk); });
      load_rows<Sizes::columns, Sizes::chunks, uint8_t>(
          codes, first_n, at, [&](int row, int chunk) { return code_tile(block).at(row, chunk); });
    }
    commit_copies();
  };
  load(0);
  float x_scale[Sizes::m_tiles][2];
#pragma unroll
  for (int i = 0; i < Sizes::m_tiles; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t m = first_m + 16 * i + threadIdx.x % 32 / 4 + 8 * r;
      x_scale[i][r] = m < a.m ? a.x_scale[m] : 0.0f;
    }
  ByteSums<kRows> sums;
  for (int block = 0; block < blocks; block++) {
    wait_copies<0>();
    __syncthreads();  // this block's data are there, and the buffer of the last is free
    load(block + 1);
#pragma unroll
    for (int step = 0; step < Sizes::depth / 32; step++) {
      const int k = block * Sizes::depth + 32 * step;
      if (k >= a.k) break;
      if (a.group ? k % a.group == 0 : k == 0) load_columns(a, a.scale, first_n + column, k, sums.scale);
      sums.multiply(x_tile(block), code_tile(block), step, column);
      if (k + 32 >= a.k || (a.group && (k + 32) % a.group == 0)) sums.scale_group(x_scale);
    }
  }
  __syncthreads();  // the buffers are free, and all copies have been waited for
  switch (static_cast<Dtype>(a.dtype)) {
    case Dtype::bf16:
      return store_tile<bf16, kRows>(a, shared, first_m, first_n, sums.total);
    case Dtype::f16:
      return store_tile<f16, kRows>(a, shared, first_m, first_n, sums.total);
    default:
      return store_tile<float, kRows>(a, shared, first_m, first_n, sums.total);
  }
}

template <int kRows>
int run(const QuantLinear& a, cudaStream_t stream) {
  quant_int8_tile_kernel<kRows>
      <<<tile_blocks<kRows>(a), tile_threads, 0, stream>>>(a, rows_aligned(a.codes, a.n, a.code_row));
  return cudaGetLastError();
}

}  // namespace

int quant_tiles_int8(const QuantLinear& a, cudaStream_t stream) {
  return a.m <= 16 ? run<16>(a, stream) : run<64>(a, stream);
}

}  // namespace mk::cuda

extern "C" int mk_cuda_quant_round(const mk::cuda::QuantRound& a, void* stream) {
  using namespace mk::cuda;
  return with_type(a.dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = rows_aligned(a.x, a.m, a.x_row * sizeof(T));
    quant_round_kernel<T><<<a.m, round_threads, 0, static_cast<cudaStream_t>(stream)>>>(a, vectors);
    return cudaGetLastError();
  });
}

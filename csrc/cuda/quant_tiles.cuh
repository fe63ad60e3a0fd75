// Many rows of x: a block of four warps takes a tile of the result, each warp all its rows and a quarter of its
// columns, so that no code is decoded twice in a block. Codes stay codes up to the registers, where they become exact
// operands of the tensor cores; products of a group are scaled and added up in float32.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/quant_codes.cuh"

namespace mk::cuda {

constexpr int tile_threads = 128;

// Rows of x and rows of codes that a block works on. Where 16 rows hold all of x, blocks have fewer columns: there are
// more of them to share the multiprocessors.
template <int kRows>
struct TileShape {
  static constexpr int m_tiles = kRows / 16, n_tiles = kRows == 16 ? 2 : 4, columns = 32 * n_tiles;
};

__device__ __forceinline__ void copy_async_bytes(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Rows in global memory, their distances and sizes in bytes.
struct ByteRows {
  const char* base;
  int64_t distance, count, bytes;
  bool vectors;
};

// Starts the copy of `rows` rows of `chunks` times 16 bytes, from byte `at` of row `first` on, to where to(row, chunk)
// says; an odd number of bytes at a row's end is read byte by byte. What lies past the last row or past the end of a
// row is zero.
template <int rows, int chunks, class Unit, class To>
__device__ __forceinline__ void load_rows(const ByteRows& from, int64_t first, int64_t at, const To& to) {
  static_assert(rows * chunks % tile_threads == 0);
#pragma unroll
  for (int i = 0; i < rows * chunks / tile_threads; i++) {
    const int index = threadIdx.x + i * tile_threads, row = index / chunks, chunk = index % chunks;
    const int64_t byte = at + 16 * chunk, left = first + row < from.count ? from.bytes - byte : 0;
    const int bytes = static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16);
    const char* source = from.base + (bytes ? (first + row) * from.distance + byte : 0);
    if (from.vectors && bytes % 2 == 0)
      copy_async_bytes(to(row, chunk), source, bytes);
    else
      *reinterpret_cast<uint4*>(to(row, chunk)) = gather<Unit>(source, bytes);
  }
}

template <QuantKind kind>
__device__ __forceinline__ ByteRows code_rows_of(const QuantLinear& a, bool vectors) {
  return {reinterpret_cast<const char*>(a.codes), a.code_row, a.n, bytes_of_row<kind>(a.k), vectors};
}

// Scales, or offsets, of the columns 8 j + 2 t and the next from `first` on, for the group of element k.
template <int n_tiles>
__device__ __forceinline__ void load_columns(const QuantLinear& a, const float* values, int first, int k,
                                             float (&to)[n_tiles][2]) {
  const int group = a.group ? k / a.group : 0;
#pragma unroll
  for (int j = 0; j < n_tiles; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int n = first + 8 * j + threadIdx.x % 4 * 2 + e;
      to[j][e] = n < a.n ? __ldg(values + static_cast<int64_t>(n) * a.groups + group) : 0.0f;
    }
}

// Rounds the sums of a block to T and writes them, through shared memory so that 16 bytes of a row go together.
template <class T, int kRows, int m_tiles, int n_tiles>
__device__ __forceinline__ void store_tile(const QuantLinear& a, char* shared, int64_t first_m, int first_n,
                                           const float (&sums)[m_tiles][n_tiles][4]) {
  constexpr int columns = TileShape<kRows>::columns, wide = 16 / sizeof(T), pitch = columns + wide;
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 8 * n_tiles + lane % 4 * 2;
  T* stage = reinterpret_cast<T*>(shared);
  const T* bias = static_cast<const T*>(a.bias);
#pragma unroll
  for (int j = 0; j < n_tiles; j++) {
    const int column = own + 8 * j, n = first_n + column;
    const float low = bias && n < a.n ? to_float(bias[n]) : 0.0f;
    const float high = bias && n + 1 < a.n ? to_float(bias[n + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < m_tiles; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        T* to = stage + (16 * i + lane / 4 + 8 * r) * pitch + column;
        const float2 pair = make_float2(sums[i][j][2 * r] + low, sums[i][j][2 * r + 1] + high);
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<float2*>(to) = pair;
        else
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(pair.x, pair.y);
      }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kRows * (columns / wide); index += tile_threads) {
    const int row = index / (columns / wide), column = index % (columns / wide) * wide, n = first_n + column;
    if (first_m + row >= a.m || n >= a.n) continue;
    const T* from = stage + row * pitch + column;
    T* to = static_cast<T*>(a.y) + (first_m + row) * a.n + n;
    if (a.n % wide == 0)
      store_quad(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(from));
    else
      for (int e = 0; e < wide && n + e < a.n; e++) to[e] = from[e];
  }
}

// The tile of a block: neighbours share codes.
template <int kRows>
__device__ __forceinline__ void tile_of_block(const QuantLinear& a, int64_t& first_m, int& first_n) {
  const uint32_t down = static_cast<uint32_t>((a.m + kRows - 1) / kRows);
  first_m = static_cast<int64_t>(blockIdx.x % down) * kRows;
  first_n = static_cast<int>(blockIdx.x / down) * TileShape<kRows>::columns;
}

template <int kRows>
inline int64_t tile_blocks(const QuantLinear& a) {
  constexpr int columns = TileShape<kRows>::columns;
  return (a.m + kRows - 1) / kRows * ((static_cast<int64_t>(a.n) + columns - 1) / columns);
}

int quant_tiles_f32(const QuantLinear& a, cudaStream_t stream);
int quant_tiles_bf16(const QuantLinear& a, cudaStream_t stream);
int quant_tiles_f16(const QuantLinear& a, cudaStream_t stream);
int quant_tiles_int8(const QuantLinear& a, cudaStream_t stream);

}  // namespace mk::cuda

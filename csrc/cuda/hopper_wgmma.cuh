// Products of a warpgroup on tiles in shared memory (wgmma), 64 rows at a time.
//
// A tile is panels of 64 16-bit columns; a panel is rows of 128 bytes, one after the other, in the 128-byte swizzle
// that the copy engine writes. Lane 4g + t of warp w holds of the sums the rows 16w + g and 16w + g + 8 and of each
// eight columns those at 2t and 2t + 1: element i has row (i / 2) % 2 of the two and column i / 4 * 8 + 2t + i % 2.
#pragma once
#include "cuda/hopper.cuh"

namespace mk::cuda {

constexpr int panel_columns = 64, panel_row_bytes = 128;

// A tile as wgmma takes it: the address, and the distances `leading` and `stride`, all in units of 16 bytes, and the
// 128-byte swizzle. Rows as K: `stride` from eight rows to the next, `leading` without meaning. Columns as K's other
// side (transposed): `leading` from panel to panel, `stride` from eight rows to the next.
__device__ __forceinline__ uint64_t describe_tile(uint32_t address, uint32_t leading) {
  constexpr uint64_t stride = 8 * panel_row_bytes / 16, swizzle_128 = 1;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | stride << 32 |
         swizzle_128 << 62;
}

// The same tile some bytes on.
__device__ __forceinline__ uint64_t advance(uint64_t tile, int bytes) { return tile + (bytes >> 4); }

// Before the first product of a batch, and after the registers of its sums or its left operand were touched.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` of the committed batches are under way.
template <int pending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses of these registers past this place: it does not know that products write
// them later.
template <int n>
__device__ __forceinline__ void hold(float (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

#define MK_SUMS_8(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MK_SUMS_32(d, i) MK_SUMS_8(d, i), MK_SUMS_8(d, i + 8), MK_SUMS_8(d, i + 16), MK_SUMS_8(d, i + 24)
#define MK_SUMS_64(d) MK_SUMS_32(d, 0), MK_SUMS_32(d, 32)
#define MK_NAMES_32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MK_NAMES_64                                                                                                  \
  MK_NAMES_32                                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_PRODUCT(columns, type, names, left, right, add, transposed, sums, ...)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64" columns    \
               "k16.f32." type "." type " {" names "}, " left ", " right ", p, 1, 1, " transposed ";\n}\n" \
               : sums                                                                                      \
               : __VA_ARGS__)
#define MK_SHARED_INPUTS "l"(a), "l"(b), "r"(add), "n"(transpose_a), "n"(transpose_b)
#define MK_MIXED_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(transpose_b)
#define MK_SHARED_64(type) \
  MK_PRODUCT("n64", type, MK_NAMES_32, "%32", "%33", "%34", "%35, %36", MK_SUMS_32(d, 0), MK_SHARED_INPUTS)
#define MK_SHARED_128(type) \
  MK_PRODUCT("n128", type, MK_NAMES_64, "%64", "%65", "%66", "%67, %68", MK_SUMS_64(d), MK_SHARED_INPUTS)
#define MK_MIXED_64(type) \
  MK_PRODUCT("n64", type, MK_NAMES_32, "{%32, %33, %34, %35}", "%36", "%37", "%38", MK_SUMS_32(d, 0), MK_MIXED_INPUTS)
#define MK_MIXED_128(type) \
  MK_PRODUCT("n128", type, MK_NAMES_64, "{%64, %65, %66, %67}", "%68", "%69", "%70", MK_SUMS_64(d), MK_MIXED_INPUTS)

// d = a · b + d, or a · b where `add` is 0, of 16 columns of a; d has 64 or 128 columns. Nothing is done before the
// batch is waited for.
template <class T, bool transpose_a, bool transpose_b, int n>
__device__ __forceinline__ void add_product_of_tiles(float (&d)[n], uint64_t a, uint64_t b, int add) {
  static_assert(n == 32 || n == 64);
  if constexpr (__is_same(T, bf16) && n == 32) MK_SHARED_64("bf16");
  if constexpr (__is_same(T, bf16) && n == 64) MK_SHARED_128("bf16");
  if constexpr (__is_same(T, f16) && n == 32) MK_SHARED_64("f16");
  if constexpr (__is_same(T, f16) && n == 64) MK_SHARED_128("f16");
}

// The same with a in registers: the fragment of m16n8k16 of each warp's 16 rows.
template <class T, bool transpose_b, int n>
__device__ __forceinline__ void add_product_of_rows(float (&d)[n], const uint32_t* a, uint64_t b, int add) {
  static_assert(n == 32 || n == 64);
  if constexpr (__is_same(T, bf16) && n == 32) MK_MIXED_64("bf16");
  if constexpr (__is_same(T, bf16) && n == 64) MK_MIXED_128("bf16");
  if constexpr (__is_same(T, f16) && n == 32) MK_MIXED_64("f16");
  if constexpr (__is_same(T, f16) && n == 64) MK_MIXED_128("f16");
}

#undef MK_SUMS_8
#undef MK_SUMS_32
#undef MK_SUMS_64
#undef MK_NAMES_32
#undef MK_NAMES_64
#undef MK_PRODUCT
#undef MK_SHARED_INPUTS
#undef MK_MIXED_INPUTS
#undef MK_SHARED_64
#undef MK_SHARED_128
#undef MK_MIXED_64
#undef MK_MIXED_128

// Word i of lane t goes to lane i of the four as its word t.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      const bool upper = threadIdx.x & step;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + step], step);
      w[i] = upper ? got : w[i], w[i + step] = upper ? w[i + step] : got;
    }
}

// Writes one of a thread's two rows of sums, times `factor`, from column `first` on; `to` is the whole row. All lanes
// of a warp come here.
template <class T, int n>
__device__ __forceinline__ void store_sums(const float (&d)[n], int r, float factor, T* to, int first, int dim,
                                           bool live) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < n; i += 16) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      words[j] = pack_pair<T>(d[i + 4 * j + 2 * r] * factor, d[i + 4 * j + 2 * r + 1] * factor);
    transpose_quad(words);
    const int column = first + i * 2 + 8 * t;
    if (live && column < dim)
      store_quad(reinterpret_cast<uint4*>(to + column), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

}  // namespace mk::cuda

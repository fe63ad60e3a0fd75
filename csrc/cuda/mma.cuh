// Tensor-core products of 16-bit tiles in shared memory: the PTX that has no CUDA function.
//
// Fragments of m16n8k16: lane 4g + t holds of A the rows g and g + 8 and the column pairs 2t and 2t + 8, of B the
// column g and the same pairs of rows, of C the rows g and g + 8 and the columns 2t and 2t + 1.
#pragma once
#include "cuda/vec.cuh"

namespace mk::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// c += a · b
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, bf16))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lanes 8i to 8i + 7 name the rows of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes, past the registers and the L1 cache; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's groups of copies are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A tile of rows of D 16-bit elements in shared memory, 16-byte chunks permuted within each row so that the same chunk
// of eight neighbouring rows lies in different banks.
template <class T, int D>
struct Tile {
  static constexpr int chunks = D / 8;
  static constexpr int bytes_of_row = D * 2;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    constexpr bool whole_lines = D % 64 == 0;  // else a row is an odd number of 64-byte halves
    return row * bytes_of_row + (chunk ^ (whole_lines ? row & 7 : (row >> 1) & 3)) * 16;
  }

  char* base;

  __device__ __forceinline__ char* at(int row, int chunk) const { return base + offset(row, chunk); }

  // A fragments: 16 rows from `row`, 16 columns from 8 · chunk.
  __device__ __forceinline__ void load_a(uint32_t (&r)[4], int row, int chunk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, at(row + lane % 16, chunk + lane / 16));
  }
  // B fragments of two products with this tile transposed: 16 rows from `row` are the columns of B, 16 elements of each
  // from 8 · chunk its rows.
  __device__ __forceinline__ void load_b_rows(uint32_t (&r)[4], int row, int chunk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, at(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
  }
  // B fragments of two products with this tile as it is: 16 rows from `row`, 16 columns from 8 · chunk.
  __device__ __forceinline__ void load_b(uint32_t (&r)[4], int row, int chunk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(r, at(row + lane % 16, chunk + lane / 16));
  }
};

// Rows of `products` (16 rows by 16 columns, two n8 tiles) as the A operand of the next product, rounded to T.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack_pair<T>(low[0], low[1]);
  a[1] = pack_pair<T>(low[2], low[3]);
  a[2] = pack_pair<T>(high[0], high[1]);
  a[3] = pack_pair<T>(high[2], high[3]);
}

}  // namespace mk::cuda

// What the attention kernels share: a sequence's tokens, which keys a query sees, and the loads of tiles.
#pragma once
#include "cuda/attention.h"
#include "cuda/mma.cuh"

namespace mk::cuda {

constexpr int attention_threads = 128;
constexpr float log2e = 1.44269504f, ln2 = 0.69314718f;

// Tokens of a sequence: where they start in a packed tensor, and how many they are.
struct Span {
  int first, count;
};

__device__ __forceinline__ Span span_of(const int32_t* cu, int sequence, int length) {
  if (!cu) return {0, length};
  return {cu[sequence], cu[sequence + 1] - cu[sequence]};
}

// The keys [begin, end) that a query at this position sees.
struct Visible {
  int keys, window;
  bool causal;

  __device__ __forceinline__ int begin(int position) const {
    return causal && window && position >= window ? position - window + 1 : 0;
  }
  __device__ __forceinline__ int end(int position) const { return causal ? min(keys, position + 1) : keys; }
  __device__ __forceinline__ bool sees(int position, int key) const {
    return key < keys && (!causal || (key <= position && (!window || key > position - window)));
  }
};

// The tokens of one sequence and head.
template <class T>
struct Rows {
  const T* base;
  int64_t row;

  __device__ __forceinline__ Rows(const AttentionTokens& t, int sequence, bool packed, int first, int head)
      : base(static_cast<const T*>(t.data) + head * t.head + (packed ? first * t.row : sequence * t.batch)),
        row(t.row) {}
  __device__ __forceinline__ const T* at(int i) const { return base + i * row; }
};

// Starts the copy of `rows` rows into a tile; row i comes from from(i), or is zero where that is null. Columns from
// `dim` on are zero.
template <class T, int D, int rows, class From>
__device__ __forceinline__ void load_tile(Tile<T, D> to, int dim, const void* somewhere, const From& from) {
  constexpr int chunks = Tile<T, D>::chunks;
  constexpr int together = D == 256   ? 2
                           : D == 128 ? 4
                                      : 16;  // unrolled further, the addresses would spill accumulators
#pragma unroll together
  for (int i = 0; i < (rows * chunks + attention_threads - 1) / attention_threads; i++) {
    const int index = threadIdx.x + i * attention_threads, row = index / chunks, chunk = index % chunks;
    if (rows * chunks % attention_threads && row >= rows) continue;
    const T* source = from(row);
    const bool valid = source && chunk * 8 < dim;
    copy_async(to.at(row, chunk), valid ? static_cast<const void*>(source + chunk * 8) : somewhere, valid);
  }
}

// c = (rows `row` to row + 15 of a) · (rows `column` to column + 8 n - 1 of b) transposed
template <class T, int D, int n>
__device__ __forceinline__ void product_of_rows(float (&c)[n][4], Tile<T, D> a, int row, Tile<T, D> b, int column) {
#pragma unroll
  for (int i = 0; i < n; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t left[4];
    a.load_a(left, row, 2 * k);
#pragma unroll
    for (int i = 0; i < n / 2; i++) {
      uint32_t right[4];
      b.load_b_rows(right, column + 16 * i, 2 * k);
      mma<T>(c[2 * i], left, right[0], right[1]);
      mma<T>(c[2 * i + 1], left, right[2], right[3]);
    }
  }
}

// c += p (16 rows, 8 n columns, rounded to T) · rows `row` to row + 8 n - 1 of b
template <class T, int D, int n>
__device__ __forceinline__ void add_product(float (&c)[D / 8][4], const float (&p)[n][4], Tile<T, D> b, int row) {
#pragma unroll
  for (int k = 0; k < n / 2; k++) {
    uint32_t left[4];
    as_operand<T>(left, p[2 * k], p[2 * k + 1]);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      uint32_t right[4];
      b.load_b(right, row + 16 * k, 2 * i);
      mma<T>(c[2 * i], left, right[0], right[1]);
      mma<T>(c[2 * i + 1], left, right[2], right[3]);
    }
  }
}

// Where lse of a query and head lies.
__device__ __forceinline__ int64_t lse_at(bool packed, int64_t tokens, int heads, int sequence, int length, int head,
                                          int token) {
  return packed ? head * tokens + token : (static_cast<int64_t>(sequence) * heads + head) * length + token;
}

// Calls f with the width that a head dimension is padded to, as a type.
template <int D>
struct Width {
  static constexpr int value = D;
};
template <class F>
int with_width(int dim, const F& f) {
  if (dim <= 64) return f(Width<64>{});
  if (dim <= 96) return f(Width<96>{});
  if (dim <= 128) return f(Width<128>{});
  return f(Width<256>{});
}

// Scores stay as the products gave them, times the sign of the scale: differences of raw scores are exact where they
// matter, those of scaled ones are off by the rounding of a large product. This is the factor of the differences in an
// exponent of two; never 0, so that those with hidden scores stay minus infinity.
__host__ __device__ __forceinline__ float exponent_scale(float scale) { return fmaxf(fabsf(scale) * log2e, 1e-37f); }

// 2 ** ((score - base) * scale); 0 for hidden scores, of minus infinity.
__device__ __forceinline__ float exponential(float score, float base, float scale) {
  return exp2_approx((score - base) * scale);
}

// Lets a kernel use more than 48 KB of shared memory.
template <class K>
inline int allow_shared(K* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace mk::cuda

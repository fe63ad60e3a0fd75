// Few rows of x: a warp takes two rows of codes, 16 bytes a lane, and every row of x. Each lane keeps sums of its own,
// which a tree over the lanes adds up.
#include "cuda/quant_codes.cuh"
#include "cuda/reduce.cuh"

namespace mk::cuda {
namespace {

constexpr int few_threads = 128, code_rows = 2;

// Codes and scale of one chunk of the warp's rows; beyond the last row the last again.
template <QuantKind kind, bool kWhole>
struct FewCodes {
  uint4 raw[code_rows];
  float scale[code_rows], offset[code_rows];

  __device__ __forceinline__ FewCodes(const QuantLinear& a, int first, int chunk) {
#pragma unroll
    for (int r = 0; r < code_rows; r++) {
      const int64_t n = min(first + r, a.n - 1);
      const uint8_t* from = a.codes + n * a.code_row + chunk * 16;
      if constexpr (kWhole)
        raw[r] = __ldg(reinterpret_cast<const uint4*>(from));
      else
        raw[r] = gather<uint8_t>(from, bytes_of_row<kind>(a.k) - chunk * 16);
      const int64_t at = n * a.groups + (a.group ? chunk * chunk_of<kind> / a.group : 0);
      scale[r] = __ldg(a.scale + at);
      offset[r] = has_offset<kind> ? __ldg(a.offset + at) : 0.0f;
    }
  }
};

// Adds the products of one chunk to the sums.
template <class T, QuantKind kind, int kRows, bool kWhole>
__device__ __forceinline__ void add_chunk(const QuantLinear& a, int first, int chunk, const float* nf4,
                                          float (&total)[code_rows][kRows]) {
  const FewCodes<kind, kWhole> codes(a, first, chunk);
  float part[code_rows][kRows] = {};
#pragma unroll
  for (int s = 0; s < chunk_of<kind> / 8; s++) {
    float w[code_rows][8];
#pragma unroll
    for (int r = 0; r < code_rows; r++) {
      decode<kind>(codes.raw[r], s, nf4, w[r]);
      // Not as sums of its own: where codes and offset nearly cancel, so would those, with the rounding of both.
      if (has_offset<kind>) {
#pragma unroll
        for (int e = 0; e < 8; e++) w[r][e] = fmaf(w[r][e], codes.scale[r], codes.offset[r]);
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (kRows > 1 && m >= a.m) break;
      float x[8];
      load_eight<T, kWhole>(static_cast<const T*>(a.x) + m * a.x_row, chunk * chunk_of<kind> + 8 * s, a.k, x);
#pragma unroll
      for (int e = 0; e < 8; e++)
#pragma unroll
        for (int r = 0; r < code_rows; r++) part[r][m] = fmaf(x[e], w[r][e], part[r][m]);
    }
  }
#pragma unroll
  for (int r = 0; r < code_rows; r++)
#pragma unroll
    for (int m = 0; m < kRows; m++)
      total[r][m] = fmaf(part[r][m], has_offset<kind> ? 1.0f : codes.scale[r], total[r][m]);
}

template <class T>
__device__ __forceinline__ void store_sum(const QuantLinear& a, int64_t m, int n, float value) {
  if (a.bias) value += to_float(static_cast<const T*>(a.bias)[n]);
  static_cast<T*>(a.y)[m * a.n + n] = from_float<T>(value);
}

template <class T, QuantKind kind, int kRows>
__global__ void __launch_bounds__(few_threads, 4) quant_few_kernel(const QuantLinear a, const bool vectors) {
  __shared__ float nf4[16];
  if constexpr (kind == QuantKind::nf4) load_nf4(nf4);
  const int lane = threadIdx.x % 32, first = (blockIdx.x * (few_threads / 32) + threadIdx.x / 32) * code_rows;
  if (first >= a.n) return;
  const int chunks = (a.k + chunk_of<kind> - 1) / chunk_of<kind>, whole = vectors ? a.k / chunk_of<kind> : 0;
  float total[code_rows][kRows] = {};
  int chunk = lane;  // a lane has the same chunks however they are read
#pragma unroll 2
  for (; chunk < whole; chunk += 32) add_chunk<T, kind, kRows, true>(a, first, chunk, nf4, total);
  for (; chunk < chunks; chunk += 32) add_chunk<T, kind, kRows, false>(a, first, chunk, nf4, total);
#pragma unroll
  for (int r = 0; r < code_rows; r++)
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      const float sum = warp_sum(total[r][m]);
      if (lane == 0 && m < a.m && first + r < a.n) store_sum<T>(a, m, first + r, sum);
    }
}

__device__ __forceinline__ void store_any(const QuantLinear& a, int64_t m, int n, float value) {
  switch (static_cast<Dtype>(a.dtype)) {
    case Dtype::bf16:
      return store_sum<bf16>(a, m, n, value);
    case Dtype::f16:
      return store_sum<f16>(a, m, n, value);
    default:
      return store_sum<float>(a, m, n, value);
  }
}

// x as int8 too: whole sums are exact, of groups those of each chunk.
template <bool kWhole, int kRows>
__device__ __forceinline__ void add_int8_chunk(const QuantLinear& a, int first, int chunk,
                                               int (&exact)[code_rows][kRows], float (&total)[code_rows][kRows]) {
  const FewCodes<QuantKind::w8a8, kWhole> codes(a, first, chunk);
#pragma unroll
  for (int m = 0; m < kRows; m++) {
    if (kRows > 1 && m >= a.m) break;
    const auto* row = static_cast<const int8_t*>(a.x) + m * a.x_row;
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(row) + chunk);
#pragma unroll
    for (int r = 0; r < code_rows; r++) {
      int sum = __dp4a(static_cast<int>(x.x), static_cast<int>(codes.raw[r].x), 0);
      sum = __dp4a(static_cast<int>(x.y), static_cast<int>(codes.raw[r].y), sum);
      sum = __dp4a(static_cast<int>(x.z), static_cast<int>(codes.raw[r].z), sum);
      sum = __dp4a(static_cast<int>(x.w), static_cast<int>(codes.raw[r].w), sum);
      if (a.group)
        total[r][m] = fmaf(static_cast<float>(sum), codes.scale[r], total[r][m]);
      else
        exact[r][m] += sum;
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(few_threads, 4) quant_few_int8_kernel(const QuantLinear a, const bool vectors) {
  const int lane = threadIdx.x % 32, first = (blockIdx.x * (few_threads / 32) + threadIdx.x / 32) * code_rows;
  if (first >= a.n) return;
  const int chunks = (a.k + 15) / 16, whole = vectors ? a.k / 16 : 0;
  int exact[code_rows][kRows] = {};
  float total[code_rows][kRows] = {};
  int chunk = lane;
#pragma unroll 2
  for (; chunk < whole; chunk += 32) add_int8_chunk<true>(a, first, chunk, exact, total);
  for (; chunk < chunks; chunk += 32) add_int8_chunk<false>(a, first, chunk, exact, total);
#pragma unroll
  for (int r = 0; r < code_rows; r++)
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      const float groups = warp_sum(total[r][m]);
      const int sum = warp_sum(exact[r][m]);
      if (lane != 0 || m >= a.m || first + r >= a.n) continue;
      const float x_scale = a.x_scale[m];
      const float scaled = static_cast<float>(sum) * x_scale * a.scale[static_cast<int64_t>(first + r) * a.groups];
      store_any(a, m, first + r, a.group ? groups * x_scale : scaled);
    }
}

template <class K>
int run(K* kernel, const QuantLinear& a, bool vectors, cudaStream_t stream) {
  constexpr int rows_of_block = few_threads / 32 * code_rows;
  kernel<<<(a.n - 1) / rows_of_block + 1, few_threads, 0, stream>>>(a, vectors);
  return cudaGetLastError();
}

}  // namespace
}  // namespace mk::cuda

extern "C" int mk_cuda_quant_few(const mk::cuda::QuantLinear& a, void* stream) {
  using namespace mk::cuda;
  const auto on = static_cast<cudaStream_t>(stream);
  const bool codes = rows_aligned(a.codes, a.n, a.code_row);
  if (a.kind == static_cast<int>(QuantKind::w8a8))
    return a.m == 1 ? run(quant_few_int8_kernel<1>, a, codes, on)
                    : run(quant_few_int8_kernel<quant_few_rows>, a, codes, on);
  return with_type(a.dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = codes && rows_aligned(a.x, a.m, a.x_row * sizeof(T));
    return with_kind(a.kind, [&](auto of) -> int {
      constexpr QuantKind kind = decltype(of)::kind;
      return a.m == 1 ? run(quant_few_kernel<T, kind, 1>, a, vectors, on)
                      : run(quant_few_kernel<T, kind, quant_few_rows>, a, vectors, on);
    });
  });
}

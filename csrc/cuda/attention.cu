#include "cuda/attention.h"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/hopper_attention.h"
#include "cuda/reduce.cuh"

namespace mk::cuda {
namespace {

// Of up to 64 splits, what the two that a lane knows weigh in the sum of a token and head; below 0 where the split saw
// no key, and left no sum.
struct SplitWeights {
  float low, high, base, sum;  // of splits below 32 and from there on; scalars, since an array would lie in memory

  __device__ __forceinline__ SplitWeights(const Attention& a, int64_t rows, int64_t row) {
    const int lane = threadIdx.x % 32;
    const float low_lse = lane < a.splits ? a.split_lse[lane * rows + row] : -INFINITY;
    const float high_lse = 32 + lane < a.splits ? a.split_lse[(32 + lane) * rows + row] : -INFINITY;
    float largest = fmaxf(low_lse, high_lse);
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    base = largest == -INFINITY ? 0.0f : largest;
    low = __expf(low_lse - base), high = __expf(high_lse - base);
    sum = warp_sum(low + high);
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    low = low_lse == -INFINITY ? -1.0f : low * inverse;
    high = high_lse == -INFINITY ? -1.0f : high * inverse;
  }
  // All lanes of the warp ask together.
  __device__ __forceinline__ float of(int split) const {
    const float of_low = __shfl_sync(0xffffffffu, low, split % 32),
                of_high = __shfl_sync(0xffffffffu, high, split % 32);
    return split < 32 ? of_low : of_high;
  }
};

// A warp a token and head: the sum in the order of the splits.
template <class T>
__global__ void __launch_bounds__(attention_threads) combine_kernel(const Attention a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (attention_threads / 32) + threadIdx.x / 32;
  const int64_t rows = a.tokens * a.heads;
  if (row >= rows) return;
  const SplitWeights splits(a, rows, row);
  for (int first = 0; first < a.dim; first += 128) {
    const int column = first + threadIdx.x % 32 * 4;
    const float* parts = a.split_out + row * a.dim + min(column, a.dim - 4);
    float4 total = {};
#pragma unroll 8
    for (int s = 0; s < a.splits; s++) {
      const float4 part = *reinterpret_cast<const float4*>(parts + s * rows * a.dim);  // many at once: of all splits
      const float weight = splits.of(s);
      if (weight < 0) continue;
      total.x += part.x * weight, total.y += part.y * weight;
      total.z += part.z * weight, total.w += part.w * weight;
    }
    if (column >= a.dim) continue;
    T* out = static_cast<T*>(a.out) + row * a.dim + column;
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(out) = total;
    else
      *reinterpret_cast<uint2*>(out) = make_uint2(pack_pair<T>(total.x, total.y), pack_pair<T>(total.z, total.w));
  }
  if (!a.lse || threadIdx.x % 32) return;
  const int64_t token = row / a.heads, length = a.cu_q ? 1 : a.max_q;
  const int head = row % a.heads;
  a.lse[lse_at(a.cu_q != nullptr, a.tokens, a.heads, token / length, length, head, a.cu_q ? token : token % length)] =
      splits.sum > 0 ? splits.base + logf(splits.sum) : -INFINITY;
}

}  // namespace
}  // namespace mk::cuda

extern "C" int mk_cuda_attention_splits(const mk::cuda::Attention& a) {
  using namespace mk::cuda;
  if (hopper_applies(a)) return hopper_splits(a);
  if (a.dtype == static_cast<int>(mk::Dtype::f32) || a.max_q > few_queries) return 1;
  const int packed_heads = packed_heads_of(a), rows = decodes(a) ? 16 : 64;
  const int64_t tiles = (static_cast<int64_t>(a.max_q) * packed_heads + rows - 1) / rows;
  const int64_t blocks = tiles * a.sequences * (a.heads / packed_heads);
  int64_t keys = (a.ring_lens ? a.slots : 0) + static_cast<int64_t>(a.max_k);
  if (a.window && a.causal && keys > a.window + a.max_q) keys = a.window + a.max_q;
  // Two blocks a multiprocessor; a split is worth its overhead from some four blocks of 64 keys on.
  const int64_t wanted = (2 * mk_cuda_multiprocessors() + blocks - 1) / blocks, most = keys / 256;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits > 64 ? 64 : static_cast<int>(splits);
}

extern "C" int mk_cuda_attention(const mk::cuda::Attention& a, void* stream) {
  using namespace mk::cuda;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_type(a.dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    int status;
    if (hopper_applies(a))
      status = hopper_attention(a, on);
    else if constexpr (__is_same(T, bf16))
      status = attention_forward_bf16(a, on);
    else if constexpr (__is_same(T, f16))
      status = attention_forward_f16(a, on);
    else
      status = attention_forward_f32(a, on);
    if (status || a.splits == 1) return status;
    const int64_t rows_of_block = attention_threads / 32, rows = a.tokens * a.heads;
    combine_kernel<T><<<(rows + rows_of_block - 1) / rows_of_block, attention_threads, 0, on>>>(a);
    return cudaGetLastError();
  });
}

extern "C" int64_t mk_cuda_attention_backward_scratch(const mk::cuda::AttentionBackward& a) {
  return mk::cuda::hopper_applies(a) ? mk::cuda::hopper_scratch(a) : 3 * a.tokens * a.heads;
}

extern "C" int mk_cuda_attention_backward(const mk::cuda::AttentionBackward& a, void* stream) {
  using namespace mk::cuda;
  const auto on = static_cast<cudaStream_t>(stream);
  if (hopper_applies(a)) return hopper_attention_backward(a, on);
  if (a.dtype == static_cast<int>(mk::Dtype::bf16)) return attention_backward_bf16(a, on);
  if (a.dtype == static_cast<int>(mk::Dtype::f16)) return attention_backward_f16(a, on);
  return attention_backward_f32(a, on);
}

#include "cuda/rope.h"
#include "cuda/vec.cuh"

namespace mk::cuda {
namespace {

constexpr int most_threads = 256;

// Where a token's keys and values go: its sequence and slot, or slot -1 where they are not written.
struct Target {
  int64_t sequence, slot;
};

__device__ __forceinline__ int64_t position_of(const Rope& a, int64_t token) {
  if (!a.positions) return token % a.length;
  return a.wide_positions ? static_cast<const int64_t*>(a.positions)[token]
                          : static_cast<const int32_t*>(a.positions)[token];
}

// Positions of a sequence are consecutive and its idle tokens come last, so a later token takes this one's slot just
// where the token `slots` further on is of the same sequence and not idle.
__device__ Target target_of(const Rope& a, int64_t token, int64_t position) {
  Target target{token / (a.length ? a.length : 1), position % a.slots};
  int64_t end = (target.sequence + 1) * a.length;
  if (a.cu) {
    int low = 0, high = a.sequences;  // the last sequence that starts at or before the token
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (a.cu[middle] <= token ? low : high) = middle;
    }
    target.sequence = low;
    end = a.cu[low + 1];
  }
  if (token + a.slots < end && position_of(a, token + a.slots) >= 0) target.slot = -1;
  return target;
}

// The two packs of V elements that item `chunk` of a head rotates: halves apart, or neighbours.
template <bool kAdjacent, int V>
__device__ __forceinline__ int second_at(int first, int dim) {
  return kAdjacent ? first + V : first + dim / 2;
}

// x rotated in place: pairs (x[i], y[i]), or neighbours within x and within y. cos and sin are of the pairs in order.
template <bool kAdjacent, int V>
__device__ __forceinline__ void rotate(float (&x)[V], float (&y)[V], const float* cos, const float* sin) {
  if constexpr (kAdjacent && V == 1) {
    const float a = x[0], b = y[0];
    x[0] = a * cos[0] - b * sin[0];
    y[0] = b * cos[0] + a * sin[0];
  } else if constexpr (kAdjacent) {
#pragma unroll
    for (int e = 0; e < V; e += 2) {
      const float a = x[e], b = x[e + 1], c = y[e], d = y[e + 1];
      x[e] = a * cos[e / 2] - b * sin[e / 2];
      x[e + 1] = b * cos[e / 2] + a * sin[e / 2];
      y[e] = c * cos[(V + e) / 2] - d * sin[(V + e) / 2];
      y[e + 1] = d * cos[(V + e) / 2] + c * sin[(V + e) / 2];
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float a = x[e], b = y[e];
      x[e] = a * cos[e] - b * sin[e];
      y[e] = b * cos[e] + a * sin[e];
    }
  }
}

// One token a block. Its row of the tables goes to shared memory once: cos, then sin. Items are pairs of packs: those
// of q, then of k, then of v, which is only moved.
template <class T, int V, bool kAdjacent>
__global__ void __launch_bounds__(most_threads) rope_kernel(const Rope a) {
  extern __shared__ float tables[];
  const int64_t token = blockIdx.x, position = position_of(a, token);
  const int half = a.dim / 2, chunks = half / V;
  const bool idle = a.k_ring.to && position < 0, lost = position < 0 || position >= a.table_rows;
  if (a.rotates) {
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
      tables[i] = lost ? __int_as_float(0x7fffffff) : a.cos[position * a.table_row + i];
      const float sin = lost ? 0.0f : a.sin[position * a.table_row + i];
      tables[half + i] = a.inverse ? -sin : sin;
    }
    __syncthreads();
  }
  Target target{0, -1};
  if (a.k_ring.to && !idle) target = target_of(a, token, position);
  const int q_items = a.q.heads * chunks, k_items = a.k.heads * chunks, v_items = a.v.heads * chunks;
  for (int item = threadIdx.x; item < q_items + k_items + v_items; item += blockDim.x) {
    const bool of_q = item < q_items, of_v = item >= q_items + k_items;
    const RopeHeads& from = of_q ? a.q : of_v ? a.v : a.k;
    const int within = item - (of_q ? 0 : of_v ? q_items + k_items : q_items);
    const int head = within / chunks, chunk = within % chunks;
    const int first = (kAdjacent ? 2 : 1) * chunk * V, second = second_at<kAdjacent, V>(first, a.dim);
    float x[V] = {}, y[V] = {};
    if (!idle) {
      const T* at = static_cast<const T*>(from.from) + row_offset(token, a.sizes, from.rows) + head * from.head;
      load_values<T, V>(at + first, x);
      load_values<T, V>(at + second, y);
      if (!of_v && a.rotates) rotate<kAdjacent, V>(x, y, tables + chunk * V, tables + half + chunk * V);
    }
    if (!of_v && a.rotates) {
      T* to = static_cast<T*>(of_q ? a.q_out : a.k_out) + (token * from.heads + head) * a.dim;
      store_values<T, V>(to + first, x);
      store_values<T, V>(to + second, y);
    }
    if (of_q || target.slot < 0) continue;
    const RopeRing& ring = of_v ? a.v_ring : a.k_ring;
    T* to = static_cast<T*>(ring.to) + target.sequence * ring.sequence + target.slot * ring.slot + head * ring.head;
    store_values<T, V>(to + first, x);
    store_values<T, V>(to + second, y);
  }
}

template <class T, int V, bool kAdjacent>
int run(const Rope& a, cudaStream_t stream) {
  const int items = (a.q.heads + a.k.heads + a.v.heads) * (a.dim / 2 / V);
  int threads = 32;
  while (threads < most_threads && threads < items) threads *= 2;
  rope_kernel<T, V, kAdjacent><<<a.sizes.rows, threads, a.dim * sizeof(float), stream>>>(a);
  return cudaGetLastError();
}

bool aligned(const Rope& a, const RopeHeads& from, int bytes) {
  return !from.heads || (aligned_to_16(from.from, a.sizes, from.rows, bytes) && from.head * bytes % 16 == 0);
}

bool aligned(const RopeRing& ring, int bytes) {
  return !ring.to || (aligned_to_16(ring.to) && ring.sequence * bytes % 16 == 0 && ring.slot * bytes % 16 == 0 &&
                      ring.head * bytes % 16 == 0);
}

}  // namespace
}  // namespace mk::cuda

extern "C" int mk_cuda_rope(const mk::cuda::Rope& a, void* stream) {
  using namespace mk::cuda;
  return with_type(a.dtype, [&](auto* type) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int wide = 16 / sizeof(T), bytes = sizeof(T);
    const bool vectors = a.dim % (2 * wide) == 0 && aligned(a, a.q, bytes) && aligned(a, a.k, bytes) &&
                         aligned(a, a.v, bytes) && aligned(a.k_ring, bytes) && aligned(a.v_ring, bytes) &&
                         aligned_to_16(a.q_out) && aligned_to_16(a.k_out);
    const auto on = static_cast<cudaStream_t>(stream);
    if (a.adjacent) return vectors ? run<T, wide, true>(a, on) : run<T, 1, true>(a, on);
    return vectors ? run<T, wide, false>(a, on) : run<T, 1, false>(a, on);
  });
}

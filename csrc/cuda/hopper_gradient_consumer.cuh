// A warpgroup that owns 64 keys: their dK and dV, and its share of the tiles of dQ. The products, with keys as rows:
// S' = K Q', dP' = V dO', dV = P' dO, dK = dS' Q; then dQ = dS K, for which dS' goes through shared memory.
#pragma once
#include <climits>

#include "cuda/hopper_gradients.cuh"
#include "cuda/hopper_statistics.cuh"

namespace mk::cuda {

template <class T, int D>
struct GradientConsumer {
  using Shared = GradientShared<D>;
  static constexpr int panels = Shared::panels, n = gradient_queries / 2;
  static constexpr int all_consumers = 1;  // a named barrier

  const HopperBackward& b;
  const GradientWork& w;
  Shared shared;
  int consumer;
  Stage<Shared::stages> stage;
  uint32_t sums_parity = 0;
  float dk[D / 2] = {}, dv[D / 2] = {}, p[n], dp[n];
  uint32_t operand[n / 2], operand_of_dk[n / 2];

  static __device__ __forceinline__ int row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

  // c = 64 rows of `left` · 64 rows of `right` transposed
  __device__ __forceinline__ void multiply_rows(float (&c)[n], uint32_t left, uint32_t right) {
    const uint64_t x = describe_tile(left + consumer * Shared::query_panel, 0), y = describe_tile(right, 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      add_product_of_tiles<T, false, false>(c, advance(x, k / 4 * Shared::key_panel + k % 4 * 32),
                                            advance(y, k / 4 * Shared::query_panel + k % 4 * 32), k > 0);
    commit_products();
  }
  // c += 64 rows in registers · a tile of 64 queries
  __device__ __forceinline__ void add_to_keys(float (&c)[D / 2], const uint32_t* left, uint32_t right) {
    const uint64_t y = describe_tile(right, Shared::query_panel);
#pragma unroll
    for (int k = 0; k < gradient_queries / 16; k++)
      add_product_of_rows<T, true>(c, left + 4 * k, advance(y, k * 16 * panel_row_bytes), 1);
    commit_products();
  }

  // Scores become probabilities.
  template <bool kMasked>
  __device__ __forceinline__ void exponentiate(int first_query) {
    const float sign = b.a.scale < 0 ? -1.0f : 1.0f, scale = b.exponent_scale * sign;
    const int live_queries = w.plan.queries.count - first_query, first_key = w.first_key + consumer * 64 + row();
    // A key is seen from distances low to low + span, span 0 behind the last key.
    const int low = w.plan.causal ? 0 : INT_MIN / 2, distance = first_query + w.plan.offset() - first_key - low;
    unsigned span[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
      span[r] = first_key + 8 * r >= w.plan.keys.count ? 0 : w.plan.causal && w.plan.window ? w.plan.window : INT_MAX;
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const int query = i * 2 + threadIdx.x % 4 * 2;
      const float2 largest = load_shared_pair(shared.statistic(stage.index, 0, query));
      const float2 inverse = load_shared_pair(shared.statistic(stage.index, 1, query));
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = p[i + 2 * r + e];
          x = exponential(x, sign * (e ? largest.y : largest.x), scale) * (e ? inverse.y : inverse.x);
          const bool seen = static_cast<unsigned>(distance + query + e - 8 * r) < span[r] && query + e < live_queries;
          if (kMasked && !seen) x = 0;
        }
    }
  }
  __device__ __forceinline__ bool all_seen(int first_query) const {
    const int first_key = w.first_key + consumer * 64, position = first_query + w.plan.offset();
    const Visible visible = {w.plan.keys.count, w.plan.window, w.plan.causal};
    return first_query + gradient_queries <= w.plan.queries.count &&
           visible.begin(position + gradient_queries - 1) <= first_key && first_key + 64 <= visible.end(position);
  }
  __device__ __forceinline__ void round_operand(uint32_t (&to)[n / 2], const float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n / 2; i++) to[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
  }
  // dS' = P' (dP' - delta), as the left operand of dK, and into shared memory for dQ.
  __device__ __forceinline__ void differentiate(uint32_t to) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float2 delta = load_shared_pair(shared.statistic(stage.index, 2, i * 2 + threadIdx.x % 4 * 2));
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int x = i + 2 * r, at = row() + 8 * r;
        // A probability of 0 stands for an unseen pair too, whose dP may be anything.
        const float low = p[x] == 0 ? 0 : p[x] * (dp[x] - delta.x);
        const float high = p[x + 1] == 0 ? 0 : p[x + 1] * (dp[x + 1] - delta.y);
        operand_of_dk[x / 2] = pack_pair<T>(low, high);
        store_shared(to + (consumer * 64 + at) * panel_row_bytes + ((i / 4 ^ (at & 7)) << 4) + threadIdx.x % 4 * 4,
                     operand_of_dk[x / 2]);
      }
    }
    fence_async_proxy();
  }

  // A panel of a tile of dQ, from all 128 keys: `dp` is its sums now.
  __device__ __forceinline__ void multiply_queries(uint32_t from, int panel) {
    const uint64_t x = describe_tile(from, Shared::key_panel);
    const uint64_t y = describe_tile(shared.keys() + panel * Shared::key_panel, Shared::key_panel);
#pragma unroll
    for (int k = 0; k < gradient_keys / 16; k++)
      add_product_of_tiles<T, true, true>(dp, advance(x, k * 16 * panel_row_bytes),
                                          advance(y, k * 16 * panel_row_bytes), k > 0);
    commit_products();
  }
  // The share goes to who adds it up, in the order of the threads.
  __device__ __forceinline__ void hand_over(int piece) {
    wait(shared.sums_empty(consumer), sums_parity ^ 1);
    sums_parity ^= 1;
#pragma unroll
    for (int i = 0; i < n; i += 4)
      store_shared(shared.sums(consumer) + (i / 4 * 128 + threadIdx.x % 128) * 16, dp[i], dp[i + 1], dp[i + 2],
                   dp[i + 3]);
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared.sums_full(consumer, piece % Shared::adders));
  }

  // The scores and dP of a tile, under way.
  __device__ __forceinline__ void begin() {
    wait(shared.full(stage.index), stage.parity);
    hold(p);
    hold(dp);
    fence_products();
    multiply_rows(p, shared.keys(), shared.queries(stage.index));
    multiply_rows(dp, shared.values(), shared.outs(stage.index));
  }
  // From there to dS', which all consumers have when they go on; the products of dV are under way.
  __device__ __forceinline__ void middle(int step, int tile) {
    wait_products<1>();
    hold(p);
    const int first_query = tile * gradient_queries;
    all_seen(first_query) ? exponentiate<false>(first_query) : exponentiate<true>(first_query);
    round_operand(operand, p);
    wait_products<0>();
    hold(dp);
    hold(dv);
    fence_products();
    add_to_keys(dv, operand, shared.outs(stage.index));
    differentiate(shared.scores(step & 1));
    sync_named(all_consumers, 256);  // who read the buffer two steps ago is done, too
    hold(dp);
    hold(dk);
    fence_products();
  }
  __device__ __forceinline__ void end() {
    wait_products<0>();
    hold(dp);
    hold(dv);
    hold(dk);
    arrive(shared.empty(stage.index));
  }

  // Of D 64: the warpgroups take dQ in turns.
  __device__ __forceinline__ void step_in_turn(int step, int tile) {
    begin();
    middle(step, tile);
    add_to_keys(dk, operand_of_dk, shared.queries(stage.index));
    const bool mine = step % 2 == consumer;
    if (mine) {
      fence_products();  // the assembler wants one behind a branch
      multiply_queries(shared.scores(step & 1), 0);
    }
    end();
    if (mine) hand_over(step);
    stage.next();
  }
  // A panel of dQ each. It is handed over beside the products of dK.
  __device__ __forceinline__ void step_by_panels(int step, int tile) {
    begin();
    middle(step, tile);
    multiply_queries(shared.scores(step & 1), consumer);
    add_to_keys(dk, operand_of_dk, shared.queries(stage.index));
    wait_products<1>();
    hold(dp);
    hand_over(2 * step + consumer);
    end();
    stage.next();
  }

  __device__ __forceinline__ void run() {
    if (w.steps()) wait(shared.keys_full(), 0);
    GradientTile t = w.first();
    for (int step = 0; step < w.steps(); step++, w.advance(t)) {
      if constexpr (panels == 2) step_by_panels(step, t.tile);
      if constexpr (panels == 1) step_in_turn(step, t.tile);
    }
    const AttentionBackward& a = b.a;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int key = w.first_key + consumer * 64 + row() + 8 * r;
      const int64_t token = (a.cu_k ? w.plan.keys.first : static_cast<int64_t>(w.sequence) * a.max_k) + key;
      const int64_t at = (token * a.kv_heads + w.kv_head) * a.dim;
      store_sums(dk, r, a.scale, static_cast<T*>(a.dk) + at, 0, a.dim, key < w.plan.keys.count);
      store_sums(dv, r, 1.0f, static_cast<T*>(a.dv) + at, 0, a.dim, key < w.plan.keys.count);
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(384, 1)
    hopper_gradient_kernel(const __grid_constant__ HopperBackward b, const int blocks) {
  extern __shared__ char raw[];
  const GradientShared<D> shared(raw);
  const GradientWork w(b.a, blockIdx.x, blocks);
  if (w.first_key >= w.plan.keys.count) return;
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    release_registers<24>();
    if (warp == 0) GradientProducer<D>{b, w, shared}.run();
    if (warp > 0 && threadIdx.x % 32 == 0) GradientAdder<D>{b, w, shared, warp - 1}.run();
  } else {
    claim_registers<240>();
    GradientConsumer<T, D>{b, w, shared, warp >= 8}.run();
  }
}

// dQ, from the sums in the order of the threads that made them. A block a tile of one head.
template <class T, int D>
__global__ void __launch_bounds__(128) hopper_query_gradient_kernel(const HopperBackward b, const int tiles) {
  constexpr int panels = D / panel_columns, n = gradient_queries / 2;
  const AttentionBackward& a = b.a;
  const int tile = blockIdx.x % tiles, sequence = blockIdx.x / tiles, head = blockIdx.y;
  const GradientPlan plan(a, sequence);
  if (tile * gradient_queries >= plan.queries.count) return;
  const int64_t slot = plan.slot(a, sequence, tile) * a.heads + head;
#pragma unroll
  for (int panel = 0; panel < panels; panel++) {
    float sums[n];
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float* from = b.sums + ((slot * panels + panel) * (n / 4) + i / 4) * 512 + threadIdx.x * 4;
      const float4 x = *reinterpret_cast<const float4*>(from);
      sums[i] = x.x, sums[i + 1] = x.y, sums[i + 2] = x.z, sums[i + 3] = x.w;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int query = tile * gradient_queries + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
      const int64_t token = (a.cu_q ? plan.queries.first : static_cast<int64_t>(sequence) * a.max_q) + query;
      store_sums(sums, r, a.scale, static_cast<T*>(a.dq) + (token * a.heads + head) * a.dim, panel * panel_columns,
                 a.dim, query < plan.queries.count);
    }
  }
}

template <class T, int D>
int run_hopper_backward(const HopperForward& f, const HopperBackward& b, cudaStream_t stream) {
  const AttentionBackward& a = b.a;
  constexpr int statistics_bytes = HopperTile<D, 2, 2>::bytes, bytes = GradientShared<D>::bytes;
  const auto statistics = hopper_statistics_kernel<T, D>;
  const auto gradients = hopper_gradient_kernel<T, D>;
  if (const int status = allow_shared(statistics, statistics_bytes)) return status;
  if (const int status = allow_shared(gradients, bytes)) return status;
  const int room = mk_cuda_multiprocessors(), grid = f.blocks > room ? room : f.blocks;
  statistics<<<grid, 384, statistics_bytes, stream>>>(f);
  if (const int status = cudaGetLastError()) return status;
  const int blocks = (a.max_k + gradient_keys - 1) / gradient_keys;
  gradients<<<blocks * a.kv_heads * a.sequences, 384, bytes, stream>>>(b, blocks);
  if (const int status = cudaGetLastError()) return status;
  const int tiles = (a.max_q + gradient_queries - 1) / gradient_queries;
  hopper_query_gradient_kernel<T, D><<<dim3(tiles * a.sequences, a.heads), 128, 0, stream>>>(b, tiles);
  return cudaGetLastError();
}

template <class T>
int hopper_backward(const HopperForward& f, const HopperBackward& b, cudaStream_t stream) {
  return b.a.dim <= 64 ? run_hopper_backward<T, 64>(f, b, stream) : run_hopper_backward<T, 128>(f, b, stream);
}

}  // namespace mk::cuda

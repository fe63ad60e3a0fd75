// What the gradients need of each query: the largest score, 1 / the sum of the exponentials, and delta. They are of
// these very scores, and not from the forward's output and lse; see attention_backward.cuh.
#pragma once
#include "cuda/hopper_consumer.cuh"
#include "cuda/hopper_gradients.cuh"

namespace mk::cuda {

template <class T, int D>
struct HopperStatistics : HopperConsumer<T, D, 2, 2> {
  using Base = HopperConsumer<T, D, 2, 2>;
  using Base::f, Base::shared, Base::stage, Base::scores, Base::sum, Base::shrink, Base::largest, Base::consumer;
  using typename Base::Sizes;
  using typename Base::Work;
  static constexpr int key_rows = Base::key_rows;
  float dp[key_rows / 2], delta[2];

  using Base::Base;

  // dp = gradients of the output · values transposed
  __device__ __forceinline__ void multiply_gradients() {
    const uint64_t left = describe_tile(shared.outs(consumer), 0), right = describe_tile(shared.values(stage.index), 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      add_product_of_tiles<T, false, false>(dp, advance(left, k / 4 * Sizes::query_panel + k % 4 * 32),
                                            advance(right, k / 4 * Sizes::key_panel + k % 4 * 32), k > 0);
    commit_products();
  }

  __device__ __forceinline__ void walk(const Work& w) {
    wait(shared.queries_full(), this->query_parity);
    this->query_parity ^= 1;
    for (int block = w.begin; block < w.end; block++) {
      wait(shared.values_full(stage.index), stage.parity);
      hold(dp);
      this->begin_scores(w, block);
      multiply_gradients();
      this->pass_turn();
      wait_products<1>();
      hold(scores);
      this->release(shared.keys_empty(stage.index));
      this->mask(w, w.plan.block(block));
      this->exponentiate();
      wait_products<0>();
      hold(dp);
      this->release(shared.values_empty(stage.index));
      if (block == w.end - 1) this->release(shared.queries_empty());
#pragma unroll
      for (int r = 0; r < 2; r++) delta[r] *= shrink[r];
#pragma unroll
      for (int i = 0; i < key_rows / 2; i++) delta[i / 2 % 2] += scores[i] * dp[i];
      stage.next();
    }
  }

  __device__ __forceinline__ void operator()(const Work& w) {
    const Attention& a = f.a;
#pragma unroll
    for (int r = 0; r < 2; r++) largest[r] = -INFINITY, sum[r] = delta[r] = 0;
    if (w.begin < w.end) walk(w);
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], lanes);
        delta[r] += __shfl_xor_sync(0xffffffffu, delta[r], lanes);
      }
      const int query = w.first_query + consumer * 64 + Base::row() + 8 * r;
      if (query >= w.queries.count || threadIdx.x % 4) continue;
      const bool packed = a.cu_q != nullptr;
      const int64_t at =
          lse_at(packed, a.tokens, a.heads, w.sequence, a.max_q, w.group, packed ? w.queries.first + query : query);
      const float inverse = sum[r] > 0 ? __fdividef(1.0f, sum[r]) : 0.0f;
      const int64_t slot = tile_slot(packed, w.queries.first, w.sequence, a.max_q, query / gradient_queries);
      float* to = f.statistics + (slot * a.heads + w.group) * tile_statistics + query % gradient_queries;
      to[0] = largest[r];
      to[gradient_queries] = inverse;
      to[2 * gradient_queries] = delta[r] * inverse - f.dlse[at];
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(384, 1) hopper_statistics_kernel(const __grid_constant__ HopperForward f) {
  extern __shared__ char raw[];
  play_roles<HopperStatistics<T, D>, D, 2, 2>(f, raw);
}

}  // namespace mk::cuda

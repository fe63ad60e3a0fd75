// A warpgroup that multiplies: 64 rows of queries over all blocks of keys of a piece of work, and what becomes of them.
#pragma once
#include <climits>

#include "cuda/hopper_forward.cuh"

namespace mk::cuda {

template <class T, int D, int kConsumers, int kInputs = 1>
struct HopperConsumer {
  using Sizes = HopperTile<D, kConsumers, kInputs>;
  using Shared = HopperShared<D, kConsumers, kInputs>;
  using Work = HopperWork<D, kConsumers>;
  static constexpr int key_rows = Sizes::key_rows, parts = D == 256 ? 2 : 1, part = D / parts / 2;
  static constexpr int first_turn = 1;  // named barriers: barrier 0 is that of all threads

  const HopperForward& f;
  Shared shared;
  int consumer;
  Stage<Sizes::stages> stage;
  uint32_t query_parity = 0;
  float out[parts][part], scores[key_rows / 2], largest[2], sum[2], shrink[2];
  uint32_t weights[key_rows / 4];

  __device__ __forceinline__ HopperConsumer(const HopperForward& f_, Shared shared_, int consumer_)
      : f(f_), shared(shared_), consumer(consumer_) {
    if (kConsumers == 2 && consumer == 1) arrive_named(first_turn, 256);  // the first warpgroup begins
  }

  // The first of this thread's two rows, of the warpgroup's 64.
  static __device__ __forceinline__ int row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
  // Turns of issuing products. Two warpgroups have as many turns each.
  __device__ __forceinline__ void await_turn() const {
    if (kConsumers == 2) sync_named(first_turn + consumer, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if (kConsumers == 2) arrive_named(first_turn + (consumer ^ 1), 256);
  }
  // The second warpgroup has passed the turn once more than the first has taken it.
  __device__ __forceinline__ void finish() const {
    if (consumer == 0) await_turn();
  }
  static __device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) arrive(barrier);
  }

  __device__ __forceinline__ void hold_out() {
#pragma unroll
    for (int p = 0; p < parts; p++) hold(out[p]);
  }

  // scores = queries · keys transposed
  __device__ __forceinline__ void multiply_scores() {
    const uint64_t left = describe_tile(shared.queries(consumer), 0),
                   right = describe_tile(shared.keys(stage.index), 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      add_product_of_tiles<T, false, false>(scores, advance(left, k / 4 * Sizes::query_panel + k % 4 * 32),
                                            advance(right, k / 4 * Sizes::key_panel + k % 4 * 32), k > 0);
    commit_products();
  }

  // out += weights · values
  __device__ __forceinline__ void multiply_values(int of_stage) {
    const uint64_t right = describe_tile(shared.values(of_stage), Sizes::key_panel);
#pragma unroll
    for (int k = 0; k < key_rows / 16; k++)
#pragma unroll
      for (int p = 0; p < parts; p++)
        add_product_of_rows<T, true>(
            out[p], weights + 4 * k,
            advance(right, p * (Sizes::panels / parts) * Sizes::key_panel + k * 16 * panel_row_bytes), 1);
    commit_products();
  }

  __device__ __forceinline__ void mask(const Work& w, const KeyBlock& block) {
    const int first = w.position(w.first_query + consumer * f.tile_queries), last = first + f.tile_queries - 1;
    const int key = block.key(block.first);
    if (!block.whole(key_rows) || w.visible.begin(last) > key || key + key_rows > w.visible.end(first)) {
      int begin[2], count[2];  // of the keys that a row sees
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int position = first + (row() + 8 * r) / f.packed_heads;
        begin[r] = w.visible.begin(position);
        count[r] = max(min(w.visible.end(position), block.ring ? w.plan.kept : w.keys) - begin[r], 0);
      }
#pragma unroll
      for (int i = 0; i < key_rows / 2; i += 4)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int source_row = block.first + threadIdx.x % 4 * 2 + i * 2 + e;
          const int of_row = source_row < block.limit ? block.key(source_row) : INT_MAX;
#pragma unroll
          for (int r = 0; r < 2; r++) {
            float& score = scores[i + 2 * r + e];
            const bool seen = static_cast<unsigned>(of_row - begin[r]) < static_cast<unsigned>(count[r]);
            score = !seen ? -INFINITY : f.a.scale < 0 ? -score : score;
          }
        }
    } else if (f.a.scale < 0) {
#pragma unroll
      for (int i = 0; i < key_rows / 2; i++) scores[i] = -scores[i];
    }
  }

  // Scores become exponentials; `shrink` is what the sums so far have to be multiplied by.
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = largest[r];
#pragma unroll
      for (int i = 0; i < key_rows / 2; i++)
        if (i / 2 % 2 == r) top = fmaxf(top, scores[i]);
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float base = top == -INFINITY ? 0.0f : top;
      shrink[r] = exponential(largest[r], base, f.exponent_scale);
      largest[r] = top;
      float parts_of_sum[4] = {};  // short chains of additions round less, and wait less
#pragma unroll
      for (int i = 0; i < key_rows / 2; i++) {
        if (i / 2 % 2 != r) continue;
        scores[i] = exponential(scores[i], base, f.exponent_scale);
        parts_of_sum[i / 4 % 2 * 2 + i % 2] += scores[i];
      }
      sum[r] = sum[r] * shrink[r] + ((parts_of_sum[0] + parts_of_sum[1]) + (parts_of_sum[2] + parts_of_sum[3]));
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < key_rows / 4; i++) weights[i] = pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
  }
  __device__ __forceinline__ void shrink_out() {
#pragma unroll
    for (int p = 0; p < parts; p++)
#pragma unroll
      for (int i = 0; i < part; i++) out[p][i] *= shrink[i / 2 % 2];
  }

  __device__ __forceinline__ void begin_scores(const Work& w, int block) {
    wait(shared.keys_full(stage.index), stage.parity);
    await_turn();
    hold(scores);
    fence_products();
    multiply_scores();
  }
  __device__ __forceinline__ void end_scores(const Work& w, int block) {
    hold(scores);
    release(shared.keys_empty(stage.index));
    if (block == w.end - 1) release(shared.queries_empty());
    mask(w, w.plan.block(block));
    exponentiate();
  }
  __device__ __forceinline__ void begin_values(const Stage<Sizes::stages>& of) {
    wait(shared.values_full(of.index), of.parity);
    hold_out();
    fence_products();
    multiply_values(of.index);
  }

  // All blocks of keys; there is at least one.
  __device__ __forceinline__ void walk(const Work& w) {
    wait(shared.queries_full(), query_parity);
    query_parity ^= 1;
    begin_scores(w, w.begin);
    pass_turn();
    wait_products<0>();
    end_scores(w, w.begin);
    round_weights();
    for (int block = w.begin + 1; block < w.end; block++) {
      stage.next();
      begin_scores(w, block);
      begin_values(stage.before());
      pass_turn();
      wait_products<1>();
      end_scores(w, block);
      wait_products<0>();
      hold_out();
      release(shared.values_empty(stage.before().index));
      shrink_out();
      round_weights();
    }
    begin_values(stage);
    wait_products<0>();
    hold_out();
    release(shared.values_empty(stage.index));
    stage.next();
  }

  // Out and lse of this thread's rows, or this split's share of them.
  __device__ __forceinline__ void store(const Work& w, int r) {
    const Attention& a = f.a;
    const int of_tile = row() + 8 * r, of_group = of_tile / f.packed_heads, t = threadIdx.x % 4;
    const int query = w.first_query + consumer * f.tile_queries + of_group;
    const int head = w.group * f.packed_heads + of_tile % f.packed_heads;
    const bool packed = a.cu_q != nullptr, live = of_group < f.tile_queries && query < w.queries.count;
    const int64_t token = (packed ? w.queries.first : static_cast<int64_t>(w.sequence) * a.max_q) + query;
    const int64_t at = (w.split * a.tokens + token) * a.heads + head;
    const float inverse = sum[r] > 0 ? __fdividef(1.0f, sum[r]) : 0.0f;
    const float lse = sum[r] > 0 ? largest[r] * fabsf(a.scale) + logf(sum[r]) : -INFINITY;
    if (live && t == 0 && a.splits > 1) a.split_lse[at] = lse;
    if (live && t == 0 && a.splits == 1 && a.lse)
      a.lse[lse_at(packed, a.tokens, a.heads, w.sequence, a.max_q, head, packed ? token : query)] = lse;
#pragma unroll
    for (int p = 0; p < parts; p++) {
      if (a.splits == 1) {
        store_sums(out[p], r, inverse, static_cast<T*>(a.out) + at * a.dim, p * (D / parts), a.dim, live);
        continue;
      }
#pragma unroll
      for (int i = 0; i < part; i += 4) {
        const int column = p * (D / parts) + 2 * i;
        if (live && column < a.dim)
          *reinterpret_cast<float2*>(a.split_out + at * a.dim + column + 2 * t) =
              make_float2(out[p][i + 2 * r] * inverse, out[p][i + 2 * r + 1] * inverse);
      }
    }
  }

  __device__ __forceinline__ void operator()(const Work& w) {
#pragma unroll
    for (int p = 0; p < parts; p++)
#pragma unroll
      for (int i = 0; i < part; i++) out[p][i] = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) largest[r] = -INFINITY, sum[r] = 0;
    if (w.begin < w.end) walk(w);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
      store(w, r);
    }
  }
};

// The whole of a kernel. With two warpgroups of consumers a block has all 65536 registers, 168 a thread at first; the
// producer's go to them.
template <class Consumer, int D, int kConsumers, int kInputs>
__device__ __forceinline__ void play_roles(const HopperForward& f, const char* raw) {
  const HopperShared<D, kConsumers, kInputs> shared(raw);
  const int live_rows = f.packed_heads * f.tile_queries;
  if (live_rows < 64) shared.clear_query_rows(live_rows);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  // The compiler is to see that all threads of a warp go the same way.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    if constexpr (kConsumers == 2) release_registers<24>();
    if (warp == 0) for_all_work<D, kConsumers>(f, HopperProducer<D, kConsumers, kInputs>{f, shared});
  } else {
    if constexpr (kConsumers == 2) claim_registers<240>();
    Consumer consumer(f, shared, warp >= 8);
    for_all_work<D, kConsumers>(f, consumer);
    consumer.finish();
  }
}

template <class T, int D, int kConsumers>
__global__ void __launch_bounds__(HopperTile<D, kConsumers>::threads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForward f) {
  extern __shared__ char raw[];
  play_roles<HopperConsumer<T, D, kConsumers>, D, kConsumers, 1>(f, raw);
}

template <class T, int D, int kConsumers>
int run_hopper_forward(const HopperForward& f, cudaStream_t stream) {
  using Sizes = HopperTile<D, kConsumers>;
  const auto kernel = hopper_forward_kernel<T, D, kConsumers>;
  if (const int status = allow_shared(kernel, Sizes::bytes)) return status;
  const int room = mk_cuda_multiprocessors(), grid = f.blocks > room ? room : f.blocks;
  kernel<<<grid, Sizes::threads, Sizes::bytes, stream>>>(f);
  return cudaGetLastError();
}

template <class T, int D>
int run_hopper_forward(const HopperForward& f, int consumers, cudaStream_t stream) {
  return consumers == 1 ? run_hopper_forward<T, D, 1>(f, stream) : run_hopper_forward<T, D, 2>(f, stream);
}

template <class T>
int hopper_forward(const HopperForward& f, int consumers, cudaStream_t stream) {
  if (f.a.dim <= 64) return run_hopper_forward<T, 64>(f, consumers, stream);
  if (f.a.dim <= 128) return run_hopper_forward<T, 128>(f, consumers, stream);
  return run_hopper_forward<T, 256>(f, consumers, stream);
}

}  // namespace mk::cuda

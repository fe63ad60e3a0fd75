// The forward kernels for compute capability 9.0, after FlashAttention-3 (Shah et al. 2024): one warp has the copy
// engine bring queries, keys and values; one or two warpgroups of 64 rows each multiply. The scores of the next keys
// are under way while a warpgroup takes the exponentials of these, and two warpgroups take turns, so that one
// multiplies while the other exponentiates. Blocks stay, and take one piece of work after the other, the longest first.
//
// A row of a tile is a query and a head. With `packed_heads` these are the heads that share a key head.
#pragma once
#include "cuda/attention_tile.cuh"
#include "cuda/hopper_attention.h"
#include "cuda/hopper_keys.cuh"
#include "cuda/hopper_wgmma.cuh"

namespace mk::cuda {

// kInputs: tiles of queries that a consumer has, two where their gradients come along.
template <int D, int kConsumers, int kInputs = 1>
struct HopperTile {
  static constexpr int key_rows = hopper_key_rows<D>, stages = D == 64 ? 4 : D == 128 && kConsumers == 1 ? 3 : 2;
  static constexpr int panels = D / panel_columns, query_panel = 64 * panel_row_bytes;
  static constexpr int key_panel = key_rows * panel_row_bytes;
  static constexpr int query_bytes = panels * query_panel, key_bytes = panels * key_panel;
  static constexpr int tiles = kConsumers * kInputs * query_bytes + 2 * stages * key_bytes;
  static constexpr int bytes = tile_alignment + tiles + (3 + 4 * stages) * 8;
  static constexpr int threads = 128 * (kConsumers + 1), warps = 4 * kConsumers;
  static_assert(bytes <= 227 * 1024);
};

// Shared memory: tiles of queries, keys and values, then the barriers. "Full" ones are over when a tile has come,
// "empty" ones when all warps that read it are done.
template <int D, int kConsumers, int kInputs = 1>
struct HopperShared {
  using Sizes = HopperTile<D, kConsumers, kInputs>;
  static constexpr int stages = Sizes::stages;
  uint32_t base;

  __device__ __forceinline__ explicit HopperShared(const void* raw)
      : base((shared_address(raw) + tile_alignment - 1) & ~(tile_alignment - 1u)) {}
  __device__ __forceinline__ uint32_t queries(int consumer) const { return base + consumer * Sizes::query_bytes; }
  __device__ __forceinline__ uint32_t outs(int consumer) const { return queries(kConsumers + consumer); }
  __device__ __forceinline__ uint32_t keys(int stage) const {
    return queries(kConsumers * kInputs) + stage * Sizes::key_bytes;
  }
  __device__ __forceinline__ uint32_t values(int stage) const { return keys(stages + stage); }
  __device__ __forceinline__ uint32_t barrier(int index) const { return base + Sizes::tiles + 8 * index; }
  __device__ __forceinline__ uint32_t queries_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t queries_empty() const { return barrier(1); }
  __device__ __forceinline__ uint32_t tail_full() const { return barrier(2); }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return barrier(3 + stage); }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return barrier(3 + stages + stage); }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return barrier(3 + 2 * stages + stage); }
  __device__ __forceinline__ uint32_t values_empty(int stage) const { return barrier(3 + 3 * stages + stage); }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < 3 + 4 * stages; i++) {
      const bool of_consumers = i == 1 || i >= 3 + 2 * stages;
      init_mbarrier(barrier(i), of_consumers ? Sizes::warps : 1);
    }
    fence_mbarrier_init();
  }
  // Rows of the query tiles that no box reaches, where the heads of a group do not divide 64.
  __device__ __forceinline__ void clear_query_rows(int from) const {
    const int dead = (64 - from) * 8, count = kConsumers * Sizes::panels * dead;
    for (int i = threadIdx.x; i < count; i += Sizes::threads)
      clear_16_bytes(base + i / dead * Sizes::query_panel + from * panel_row_bytes + i % dead * 16);
    fence_async_proxy();
  }
};

// A piece of work: queries of one sequence and group of heads, and the blocks of keys that one of them sees.
template <int D, int kConsumers>
struct HopperWork {
  Span queries, chunk;
  int sequence, group, split, first_query, keys;
  Visible visible;
  KeyPlan<hopper_key_rows<D>> plan;
  int begin, end;

  __device__ __forceinline__ HopperWork(const HopperForward& f, int index) {
    const Attention& a = f.a;
    const int groups = a.heads / f.packed_heads, of_tile = a.sequences * groups * a.splits;
    const int tile = f.tiles - 1 - index / of_tile;  // the last queries see most keys
    index %= of_tile;
    split = index % a.splits, index /= a.splits;
    group = index % groups, sequence = index / groups;
    queries = span_of(a.cu_q, sequence, a.max_q);
    first_query = tile * kConsumers * f.tile_queries;
    int kept = 0, oldest = 0;
    chunk = span_of(a.cu_k, sequence, a.max_k);
    if (a.ring_lens) {
      const int seen = max(a.ring_lens[sequence], 0);
      kept = min(seen, a.slots);
      oldest = seen > a.slots ? seen % a.slots : 0;
      chunk = a.k.data ? queries : Span{0, 0};
    }
    keys = kept + chunk.count;
    visible = {keys, a.window, a.causal};
    const int last_query = min(first_query + kConsumers * f.tile_queries, queries.count) - 1;
    plan = KeyPlan<hopper_key_rows<D>>(visible.begin(position(first_query)), visible.end(position(last_query)), kept,
                                       oldest, a.slots, keys);
    const int share = (plan.blocks() + a.splits - 1) / a.splits;
    begin = min(split * share, plan.blocks());
    end = live() ? min(begin + share, plan.blocks()) : begin;
  }

  __device__ __forceinline__ bool live() const { return first_query < queries.count; }
  __device__ __forceinline__ int position(int query) const { return query + keys - queries.count; }
};

// Calls f with each piece of work of this block. Every second round goes backwards, which evens out that the first
// blocks would always get the longer ones.
template <int D, int kConsumers, class F>
__device__ __forceinline__ void for_all_work(const HopperForward& f, F&& work) {
  for (int round = 0;; round++) {
    const int index = round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (index >= f.blocks) return;
    const HopperWork<D, kConsumers> w(f, index);
    if (w.live()) work(w);
  }
}

// The warp that has all tiles brought. Lane 0 gives the orders.
template <int D, int kConsumers, int kInputs>
struct HopperProducer {
  using Sizes = HopperTile<D, kConsumers, kInputs>;
  const HopperForward& f;
  HopperShared<D, kConsumers, kInputs> shared;
  Stage<Sizes::stages> stage;
  uint32_t query_parity = 0, tail_parity = 0;

  __device__ __forceinline__ void load_queries(const HopperWork<D, kConsumers>& w) const {
    const int first = (f.a.cu_q ? w.queries.first : 0) + w.first_query;
    constexpr int boxes = kConsumers * Sizes::panels;
    arrive_expecting(shared.queries_full(), kInputs * boxes * f.packed_heads * f.tile_queries * panel_row_bytes);
    for (int i = 0; i < kInputs * boxes; i++) {
      const int query = first + i % boxes / Sizes::panels * f.tile_queries;
      load_box(shared.queries(0) + i * Sizes::query_panel, i < boxes ? f.q : f.dout, shared.queries_full(),
               i % Sizes::panels * panel_columns, 0, query, w.group, f.a.cu_q ? 0 : w.sequence);
    }
  }

  __device__ __forceinline__ void load_block(const HopperWork<D, kConsumers>& w, const KeyBlock& block,
                                             const CUtensorMap& ring, const CUtensorMap& chunk, uint32_t to,
                                             uint32_t barrier) const {
    const bool packed = f.a.cu_k && !block.ring;
    const int kv_head = w.group * f.packed_heads / (f.a.heads / f.a.kv_heads);
    const int row = block.first + (packed ? w.chunk.first : 0), sequence = packed ? 0 : w.sequence;
    arrive_expecting(barrier, Sizes::key_bytes);
#pragma unroll
    for (int p = 0; p < Sizes::panels; p++)
      load_box(to + p * Sizes::key_panel, block.ring ? ring : chunk, barrier, p * panel_columns, row, kv_head,
               sequence);
  }

  // Behind the last key of a sequence lie another one's tokens, and behind those of a ring what nobody has written:
  // their weights are 0, but 0 times NaN is NaN.
  __device__ __forceinline__ void load_tail_of_values(const HopperWork<D, kConsumers>& w, const KeyBlock& block) {
    const int lane = threadIdx.x % 32, from = block.limit - block.first;
    const int dead = (Sizes::key_rows - from) * 8, to = shared.values(stage.index);
    if (lane == 0) load_block(w, block, f.v_ring, f.v, to, shared.tail_full());
    wait(shared.tail_full(), tail_parity);
    tail_parity ^= 1;
    for (int p = 0; p < Sizes::panels; p++)
      for (int i = lane; i < dead; i += 32) clear_16_bytes(to + p * Sizes::key_panel + from * panel_row_bytes + i * 16);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) arrive(shared.values_full(stage.index));
  }

  __device__ __forceinline__ void operator()(const HopperWork<D, kConsumers>& w) {
    if (w.begin == w.end) return;
    const bool first_lane = threadIdx.x % 32 == 0;
    wait(shared.queries_empty(), query_parity ^ 1);
    query_parity ^= 1;
    if (first_lane) load_queries(w);
    for (int i = w.begin; i < w.end; i++) {
      const KeyBlock block = w.plan.block(i);
      wait(shared.keys_empty(stage.index), stage.parity ^ 1);
      if (first_lane) load_block(w, block, f.k_ring, f.k, shared.keys(stage.index), shared.keys_full(stage.index));
      wait(shared.values_empty(stage.index), stage.parity ^ 1);
      const bool ends = block.first + Sizes::key_rows > block.limit;
      if (ends && (block.ring ? block.limit < f.a.slots : f.a.cu_k != nullptr))
        load_tail_of_values(w, block);
      else if (first_lane)
        load_block(w, block, f.v_ring, f.v, shared.values(stage.index), shared.values_full(stage.index));
      stage.next();
    }
  }
};

}  // namespace mk::cuda

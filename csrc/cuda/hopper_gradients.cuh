// The gradients of attention on compute capability 9.0: a block of 128 keys walks over the queries that see them, in
// five products a tile: scores, dP, dV, dK and a share of dQ. One warp has tiles brought, two warpgroups own 64 keys
// each. Statistics are read by all threads of the consumers, and each of them arrives by itself where it is done: order
// that one lane passes on for others is as good, but compute-sanitizer's racecheck does not follow it.
//
// The shares of a tile of dQ are added up in memory, in a fixed order: the last keys first, each block of keys in its
// turn. Three more warps see to that, so that no product waits for memory. A block starts with the first queries that
// see it, which is where the blocks of later keys are done already, so that hardly any waits. Blocks of later keys have
// the lower numbers, and are running before those that wait for them.
#pragma once
#include "cuda/attention_tile.cuh"
#include "cuda/hopper_attention.h"
#include "cuda/hopper_wgmma.cuh"

namespace mk::cuda {

constexpr int gradient_keys = 128;

// Where statistics and shares of dQ of a tile lie: a number of its own over all sequences.
__device__ __forceinline__ int64_t tile_slot(bool packed, int64_t first, int sequence, int max_q, int tile) {
  return (packed ? first : static_cast<int64_t>(sequence) * max_q) / gradient_queries + sequence + tile;
}

// Which tiles of queries see a block of keys, of one sequence.
struct GradientPlan {
  Span queries, keys;
  int window;
  bool causal;

  __device__ __forceinline__ GradientPlan(const AttentionBackward& a, int sequence)
      : queries(span_of(a.cu_q, sequence, a.max_q)),
        keys(span_of(a.cu_k, sequence, a.max_k)),
        window(a.window),
        causal(a.causal) {}

  __device__ __forceinline__ int offset() const { return keys.count - queries.count; }
  __device__ __forceinline__ int begin(int block) const {
    return causal ? max(block * gradient_keys - offset(), 0) / gradient_queries : 0;
  }
  __device__ __forceinline__ int end(int block) const {
    const int last_key = min((block + 1) * gradient_keys, keys.count) - 1;
    const int count = causal && window ? min(queries.count, last_key + window - offset()) : queries.count;
    return max((count + gradient_queries - 1) / gradient_queries, begin(block));
  }
  // The last block that queries of a tile see, or -1.
  __device__ __forceinline__ int last_block(int tile) const {
    const int all = (keys.count + gradient_keys - 1) / gradient_keys;
    if (!causal) return all - 1;
    const int seen = max((tile + 1) * gradient_queries + offset(), 0);
    return min((seen + gradient_keys - 1) / gradient_keys, all) - 1;
  }
  __device__ __forceinline__ int64_t slot(const AttentionBackward& a, int sequence, int tile) const {
    return tile_slot(a.cu_q != nullptr, queries.first, sequence, a.max_q, tile);
  }
};

template <int D>
struct GradientShared {
  static constexpr int panels = D / panel_columns, stages = 2, adders = 3;
  static constexpr int key_panel = gradient_keys * panel_row_bytes, query_panel = gradient_queries * panel_row_bytes;
  static constexpr int key_bytes = panels * key_panel, query_bytes = panels * query_panel;
  static constexpr int sums_bytes = gradient_queries * panel_columns * 4;  // a panel of a tile of dQ
  static constexpr int tiles = 2 * key_bytes + 2 * stages * query_bytes + 2 * key_panel + 2 * sums_bytes;
  static constexpr int statistics_bytes = stages * tile_statistics * 4;
  static constexpr int bytes = tile_alignment + tiles + statistics_bytes + (4 + 2 * stages + 2 * adders) * 8;
  static_assert(bytes <= 227 * 1024);
  uint32_t base;

  __device__ __forceinline__ explicit GradientShared(const void* raw)
      : base((shared_address(raw) + tile_alignment - 1) & ~(tile_alignment - 1u)) {}
  __device__ __forceinline__ uint32_t keys() const { return base; }
  __device__ __forceinline__ uint32_t values() const { return base + key_bytes; }
  __device__ __forceinline__ uint32_t queries(int stage) const {
    return base + 2 * key_bytes + 2 * stage * query_bytes;
  }
  __device__ __forceinline__ uint32_t outs(int stage) const { return queries(stage) + query_bytes; }
  __device__ __forceinline__ uint32_t scores(int buffer) const { return queries(stages) + buffer * key_panel; }
  __device__ __forceinline__ uint32_t sums(int consumer) const { return scores(2) + consumer * sums_bytes; }
  // Of a query of a tile: 0 the largest score, 1 the inverse sum, 2 delta.
  __device__ __forceinline__ uint32_t statistic(int stage, int which, int query) const {
    return base + tiles + (stage * tile_statistics + which * gradient_queries + query) * 4;
  }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + tiles + statistics_bytes + 8 * i; }
  __device__ __forceinline__ uint32_t keys_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t tail_full() const { return barrier(1); }
  __device__ __forceinline__ uint32_t full(int stage) const { return barrier(2 + stage); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barrier(2 + stages + stage); }
  __device__ __forceinline__ uint32_t sums_empty(int consumer) const { return barrier(2 + 2 * stages + consumer); }
  // One for each lane that adds: it may be behind or ahead of the others.
  __device__ __forceinline__ uint32_t sums_full(int consumer, int adder) const {
    return barrier(4 + 2 * stages + consumer * adders + adder);
  }
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < 2 + stages; i++) init_mbarrier(barrier(i), 1);
    for (int i = 0; i < stages; i++) init_mbarrier(empty(i), 256);
    for (int i = 0; i < 2; i++) init_mbarrier(sums_empty(i), 1);
    for (int i = 0; i < 2 * adders; i++) init_mbarrier(sums_full(0, i), 4);
    fence_mbarrier_init();
  }
};

__device__ __forceinline__ void store_shared(uint32_t at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ float2 load_shared_pair(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
  return x;
}
// A flag in memory: what is written before it is raised is there for who sees it raised.
__device__ __forceinline__ int load_flag(const int* flag) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return x;
}
__device__ __forceinline__ void raise_flag(int* flag) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(flag)) : "memory");
}

// A tile of queries of one head.
struct GradientTile {
  int head, tile;
};

// A block of keys of one key head. It walks over the tiles of one head after the other.
struct GradientWork {
  GradientPlan plan;
  int sequence, kv_head, block, first_key, begin, tiles, heads;

  __device__ __forceinline__ GradientWork(const AttentionBackward& a, int index, int blocks)
      : plan(a, index % a.sequences), sequence(index % a.sequences) {
    index /= a.sequences;
    kv_head = index % a.kv_heads;
    block = blocks - 1 - index / a.kv_heads;
    first_key = block * gradient_keys;
    begin = plan.begin(block);
    tiles = first_key < plan.keys.count ? plan.end(block) - begin : 0;
    heads = a.heads / a.kv_heads;
  }
  __device__ __forceinline__ int steps() const { return heads * tiles; }
  __device__ __forceinline__ GradientTile first() const { return {kv_head * heads, begin}; }
  __device__ __forceinline__ void advance(GradientTile& t) const {
    if (++t.tile == begin + tiles) t.tile = begin, t.head++;
  }
  __device__ __forceinline__ GradientTile at(int step) const {
    return {kv_head * heads + step / tiles, begin + step % tiles};
  }
  // Panels of dQ. Of D 128 the warpgroups have one each of every tile, of D 64 they take tiles in turns: piece 2i is
  // the first one's, piece 2i + 1 the second one's.
  __device__ __forceinline__ int pieces(int panels) const { return steps() * panels; }
};

// A lane that adds up shares of dQ, every third piece: whose turn it is and that an addition is done take longer to
// pass between multiprocessors than the products of a tile take.
template <int D>
struct GradientAdder {
  using Shared = GradientShared<D>;
  static constexpr int adders = Shared::adders;
  const HopperBackward& b;
  const GradientWork& w;
  Shared shared;
  int adder;

  __device__ __forceinline__ void run() const {
    for (int piece = adder; piece < w.pieces(Shared::panels); piece += adders) {
      const int consumer = piece % 2, panel = Shared::panels == 2 ? consumer : 0;
      const GradientTile t = w.at(piece / Shared::panels);
      const int64_t slot = w.plan.slot(b.a, w.sequence, t.tile) * b.a.heads + t.head;
      const int turn = w.plan.last_block(t.tile) - w.block;
      int* flag = b.turns + slot * 2 + panel;
      while (load_flag(flag) != turn) {
      }
      wait(shared.sums_full(consumer, adder), piece / adders / 2 % 2);
      fence_async_proxy_of_memory();
      add_floats(b.sums + (slot * Shared::panels + panel) * (Shared::sums_bytes / 4), shared.sums(consumer),
                 Shared::sums_bytes);
      wait_read();
      arrive(shared.sums_empty(consumer));
      wait_added();
      fence_async_proxy_of_memory();
      raise_flag(flag);
    }
  }
};

// The warp that has tiles brought. Rows behind the end of a packed sequence are another one's: they are multiplied by
// 0, and have to be 0 where they could be NaN.
template <int D>
struct GradientProducer {
  using Shared = GradientShared<D>;
  const HopperBackward& b;
  const GradientWork& w;
  Shared shared;
  uint32_t tail_parity = 0;

  __device__ __forceinline__ void load_keys(uint32_t barrier) const {
    const int row = w.first_key + (b.a.cu_k ? w.plan.keys.first : 0), sequence = b.a.cu_k ? 0 : w.sequence;
    arrive_expecting(barrier, 2 * Shared::key_bytes);
    for (int p = 0; p < Shared::panels; p++) {
      load_box(shared.keys() + p * Shared::key_panel, b.k, barrier, p * panel_columns, row, w.kv_head, sequence);
      load_box(shared.values() + p * Shared::key_panel, b.v, barrier, p * panel_columns, row, w.kv_head, sequence);
    }
  }
  __device__ __forceinline__ void load_queries(const GradientTile& t, int stage, uint32_t barrier) const {
    const int row = t.tile * gradient_queries + (b.a.cu_q ? w.plan.queries.first : 0);
    const int sequence = b.a.cu_q ? 0 : w.sequence;
    const int64_t slot = w.plan.slot(b.a, w.sequence, t.tile) * b.a.heads + t.head;
    arrive_expecting(barrier, 2 * Shared::query_bytes + tile_statistics * 4);
    for (int p = 0; p < Shared::panels; p++) {
      const int panel = p * Shared::query_panel;
      load_box(shared.queries(stage) + panel, b.q, barrier, p * panel_columns, 0, row, t.head, sequence);
      load_box(shared.outs(stage) + panel, b.dout, barrier, p * panel_columns, 0, row, t.head, sequence);
    }
    load_bytes(shared.statistic(stage, 0, 0), b.statistics + slot * tile_statistics, tile_statistics * 4, barrier);
  }
  // `load` brings two tiles that follow each other, of which `live` rows of `rows` are the sequence's own.
  template <class F>
  __device__ __forceinline__ void bring(bool packed, int rows, int live, uint32_t to, uint32_t barrier, const F& load) {
    const int lane = threadIdx.x % 32;
    if (!packed || live >= rows) {
      if (lane == 0) load(barrier);
      return;
    }
    if (lane == 0) load(shared.tail_full());
    wait(shared.tail_full(), tail_parity);
    tail_parity ^= 1;
    const int dead = (rows - live) * 8;
    for (int p = 0; p < 2 * Shared::panels; p++)
      for (int i = lane; i < dead; i += 32) clear_16_bytes(to + (p * rows + live) * panel_row_bytes + i * 16);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) arrive(barrier);
  }
  __device__ __forceinline__ void run() {
    Stage<Shared::stages> stage;
    if (!w.steps()) return;
    bring(b.a.cu_k != nullptr, gradient_keys, w.plan.keys.count - w.first_key, shared.keys(), shared.keys_full(),
          [&](uint32_t barrier) { load_keys(barrier); });
    GradientTile t = w.first();
    for (int step = 0; step < w.steps(); step++, w.advance(t)) {
      wait(shared.empty(stage.index), stage.parity ^ 1);
      bring(b.a.cu_q != nullptr, gradient_queries, w.plan.queries.count - t.tile * gradient_queries,
            shared.queries(stage.index), shared.full(stage.index),
            [&](uint32_t barrier) { load_queries(t, stage.index, barrier); });
      stage.next();
    }
  }
};

}  // namespace mk::cuda

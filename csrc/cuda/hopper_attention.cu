#include "cuda/attention_forward.cuh"
#include "cuda/hopper_attention.h"
#include "cuda/hopper_boxes.h"

namespace mk::cuda {
namespace {

// Heads of a group of up to this many can share a tile of 64 rows.
constexpr int most_packed_heads = 64;

int packed_heads(const Attention& a) {
  const int packed = packed_heads_of(a);
  return packed <= most_packed_heads ? packed : 1;
}
int tile_queries(const Attention& a) { return 64 / packed_heads(a); }
int consumers(const Attention& a) { return a.max_q <= tile_queries(a) ? 1 : 2; }
int64_t tiles(const Attention& a) {
  const int64_t queries = consumers(a) * tile_queries(a);
  return (a.max_q + queries - 1) / queries;
}
int64_t blocks(const Attention& a) { return tiles(a) * a.splits * (a.heads / packed_heads(a)) * a.sequences; }

Boxes of_queries(const Attention& a) { return boxes_of_queries(a, a.q, packed_heads(a), tile_queries(a)); }
Boxes of_chunk(const Attention& a, const AttentionTokens& t) {
  return boxes_of_keys(a, t, a.cu_k ? a.key_tokens : a.max_k, a.cu_k ? 1 : a.sequences);
}
Boxes of_ring(const Attention& a, const AttentionTokens& t) { return boxes_of_keys(a, t, a.slots, a.sequences); }

}  // namespace

bool hopper_applies(const Attention& a) {
  if (a.dtype == static_cast<int>(Dtype::f32) || a.dim > 256 || a.max_q < 1 || a.sequences < 1) return false;
  if (!is_hopper() || !encode_tiled() || blocks(a) > INT_MAX / 2 || !of_queries(a).fit()) return false;
  if (a.k.data && !(of_chunk(a, a.k).fit() && of_chunk(a, a.v).fit())) return false;
  if (a.ring_lens && !(of_ring(a, a.k_ring).fit() && of_ring(a, a.v_ring).fit())) return false;
  return a.k.data || a.ring_lens;
}

int hopper_splits(const Attention& a) {
  if (a.max_q > few_queries) return 1;
  int64_t keys = (a.ring_lens ? a.slots : 0) + static_cast<int64_t>(a.max_k);
  if (a.window && a.causal && keys > a.window + a.max_q) keys = a.window + a.max_q;
  // A block a multiprocessor; a split is worth its overhead from some two blocks of 128 keys on.
  const int64_t wanted = mk_cuda_multiprocessors() / blocks(a), most = keys / 256;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits > 64 ? 64 : static_cast<int>(splits);
}

int hopper_attention(const Attention& a, cudaStream_t stream) {
  HopperForward f = {};
  f.a = a;
  f.packed_heads = packed_heads(a), f.tile_queries = tile_queries(a);
  f.tiles = static_cast<int>(tiles(a)), f.blocks = static_cast<int>(blocks(a));
  f.exponent_scale = exponent_scale(a.scale);
  int status = of_queries(a).encode(&f.q, a.dtype);
  if (!status && a.k.data) status = of_chunk(a, a.k).encode(&f.k, a.dtype);
  if (!status && a.k.data) status = of_chunk(a, a.v).encode(&f.v, a.dtype);
  if (!status && a.ring_lens) status = of_ring(a, a.k_ring).encode(&f.k_ring, a.dtype);
  if (!status && a.ring_lens) status = of_ring(a, a.v_ring).encode(&f.v_ring, a.dtype);
  if (status) return status;
  return a.dtype == static_cast<int>(Dtype::bf16) ? hopper_forward_bf16(f, consumers(a), stream)
                                                  : hopper_forward_f16(f, consumers(a), stream);
}

}  // namespace mk::cuda

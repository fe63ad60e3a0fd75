#include "cuda/attention_tile.cuh"
#include "cuda/hopper_boxes.h"

namespace mk::cuda {
namespace {

constexpr int rows = gradient_queries;  // of a box of queries

Boxes of_queries(const AttentionBackward& a, const AttentionTokens& t) { return boxes_of_queries(a, t, 1, rows); }
Boxes of_keys(const AttentionBackward& a, const AttentionTokens& t) {
  return boxes_of_keys(a, t, a.cu_k ? a.key_tokens : a.max_k, a.cu_k ? 1 : a.sequences);
}

// Tiles of queries of all sequences, and one that each may begin.
int64_t slots(const AttentionBackward& a) { return (a.tokens / rows + a.sequences + 1) * a.heads; }
int64_t statistics(const AttentionBackward& a) { return slots(a) * tile_statistics; }
int64_t sums(const AttentionBackward& a) { return slots(a) * rows * (a.dim <= 64 ? 64 : 128); }

Attention forward_of(const AttentionBackward& a) {
  Attention f = {};
  f.q = a.q, f.k = a.k, f.v = a.v, f.cu_q = a.cu_q, f.cu_k = a.cu_k, f.tokens = a.tokens, f.key_tokens = a.key_tokens;
  f.sequences = a.sequences, f.heads = a.heads, f.kv_heads = a.kv_heads, f.dim = a.dim;
  f.max_q = a.max_q, f.max_k = a.max_k, f.window = a.window, f.dtype = a.dtype, f.scale = a.scale;
  f.causal = a.causal, f.splits = 1;
  return f;
}

int64_t tiles_of(int length, int of_rows) { return (static_cast<int64_t>(length) + of_rows - 1) / of_rows; }

}  // namespace

bool hopper_applies(const AttentionBackward& a) {
  if (a.dtype == static_cast<int>(Dtype::f32) || a.dim > 128 || a.max_q < 1 || a.max_k < 1) return false;
  if (!is_hopper() || !encode_tiled() || !of_queries(a, a.q).fit() || !of_queries(a, a.dout).fit()) return false;
  const int64_t blocks = tiles_of(a.max_k, hopper_key_rows<128>) * a.kv_heads * a.sequences;
  const int64_t tiles = tiles_of(a.max_q, rows) * a.heads * a.sequences;
  return of_keys(a, a.k).fit() && of_keys(a, a.v).fit() && blocks < INT_MAX / 2 && tiles < INT_MAX / 2 &&
         a.heads <= 65535;
}

int64_t hopper_scratch(const AttentionBackward& a) { return sums(a) + statistics(a) + 2 * slots(a); }

int hopper_attention_backward(const AttentionBackward& a, cudaStream_t stream) {
  HopperForward f = {};
  HopperBackward b = {};
  int status = of_queries(a, a.q).encode(&f.q, a.dtype);
  if (!status) status = of_queries(a, a.dout).encode(&f.dout, a.dtype);
  if (!status) status = of_keys(a, a.k).encode(&f.k, a.dtype);
  if (!status) status = of_keys(a, a.v).encode(&f.v, a.dtype);
  if (status) return status;
  f.a = forward_of(a), f.packed_heads = 1, f.tile_queries = rows;
  f.tiles = static_cast<int>(tiles_of(a.max_q, 2 * rows)), f.blocks = f.tiles * a.heads * a.sequences;
  f.exponent_scale = b.exponent_scale = exponent_scale(a.scale);
  f.dlse = a.dlse, f.statistics = a.scratch + sums(a), b.statistics = f.statistics;
  b.q = f.q, b.k = f.k, b.v = f.v, b.dout = f.dout, b.a = a;
  b.sums = a.scratch, b.turns = reinterpret_cast<int*>(f.statistics + statistics(a));
  // Rows behind the end of a sequence keep statistics of 0.
  status = cudaMemsetAsync(a.scratch, 0, hopper_scratch(a) * sizeof(float), stream);
  if (status) return status;
  return a.dtype == static_cast<int>(Dtype::bf16) ? hopper_backward_bf16(f, b, stream)
                                                  : hopper_backward_f16(f, b, stream);
}

}  // namespace mk::cuda

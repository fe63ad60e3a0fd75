// Attention on compute capability 9.0: tensor copy engine, asynchronous products, warps with roles.
#pragma once
#include <cuda.h>

#include "cuda/attention.h"

namespace mk::cuda {

// What a kernel is launched with. The copy engine reads the maps in place, at multiples of 64 bytes.
struct HopperForward {
  CUtensorMap q, k, v, k_ring, v_ring, dout;
  Attention a;
  int packed_heads;   // query heads that share the rows of a tile
  int tile_queries;   // of a warpgroup: 64 rows or less
  int tiles, blocks;  // of the longest sequence; of work in all
  float exponent_scale;
  // For the statistics of the gradients, which take a tile of gradients beside that of queries.
  const float* dlse;
  float* statistics;  // tile by tile, see GradientPlan
};

struct HopperBackward {
  CUtensorMap q, k, v, dout;
  AttentionBackward a;
  float exponent_scale;
  const float* statistics;
  float* sums;  // of dQ, in the order of the threads that hold them
  int* turns;   // of each tile of them: how many blocks of keys have added theirs
};

// The gradients go over the queries in tiles. Floats of a tile of one head: 64 largest scores, inverse sums, deltas.
inline constexpr int gradient_queries = 64, tile_statistics = 3 * gradient_queries;

// Whether this device and these tensors fit these kernels.
bool hopper_applies(const Attention& a);
int hopper_splits(const Attention& a);
int hopper_attention(const Attention& a, cudaStream_t stream);

int hopper_forward_bf16(const HopperForward& f, int consumers, cudaStream_t stream);
int hopper_forward_f16(const HopperForward& f, int consumers, cudaStream_t stream);

bool hopper_applies(const AttentionBackward& a);
int64_t hopper_scratch(const AttentionBackward& a);
int hopper_attention_backward(const AttentionBackward& a, cudaStream_t stream);

int hopper_backward_bf16(const HopperForward& f, const HopperBackward& b, cudaStream_t stream);
int hopper_backward_f16(const HopperForward& f, const HopperBackward& b, cudaStream_t stream);

// Rows of a box of keys or values.
template <int D>
inline constexpr int hopper_key_rows = D == 256 ? 64 : 128;

}  // namespace mk::cuda

// Rotary position embedding of queries and keys (Su et al. 2021, eq. 34), alone and with the ring write of keys and
// values; and that write alone.
#pragma once
#include "cuda/launch.h"

namespace mk::cuda {

// One of q, k and v: `heads` of dim elements a token, heads `head` elements apart.
struct RopeHeads {
  const void* from;
  RowStrides rows;
  int64_t head;
  int heads;
};

// A ring cache [sequences, slots, heads, dim].
struct RopeRing {
  void* to;
  int64_t sequence, slot, head;
};

// Tokens in order. Positions are int32 or int64, one a token; without them token i has position i % length. A position
// outside the tables of table_rows gives NaN; with rings a negative one marks an idle token, whose outputs are 0.
// Sequences end at cu[1..sequences], or hold `length` tokens each.
struct Rope {
  RopeHeads q, k, v;
  void *q_out, *k_out;  // contiguous; unused where nothing is rotated, and k is written as it is
  RopeRing k_ring, v_ring;
  RowSizes sizes;
  const float *cos, *sin;
  const void* positions;
  const int32_t* cu;
  int64_t table_rows, table_row, length, slots;
  int dim, sequences, dtype;
  bool wide_positions, rotates, adjacent, inverse;
};

}  // namespace mk::cuda

extern "C" int mk_cuda_rope(const mk::cuda::Rope& a, void* stream);

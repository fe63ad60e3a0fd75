// The gradients of attention, from q, k, v and the incoming gradients alone: the scores are computed again.
#pragma once
#include "cpu/attention.h"

namespace mk {

// Beside an AttentionSequence of one span, whose `out` takes dq. dlse has the outputs' accumulation dtype.
struct GradientSequence {
  const char *dout, *dlse;
  char *dk, *dv;  // contiguous [keys, kv_heads, dim]
};

struct AttentionGradients {
  Attention a;
  const GradientSequence* sequences;
  int64_t dout_row, dout_head, dlse_row, dlse_head;
  int64_t rows, heads;  // of a tile: queries, an even number, and query heads where the kernels take several
};

static inline bool windowed(const Attention& a) { return a.causal && a.window; }

// The most parts of one KV head.
constexpr int64_t most_parts = 64;

// Tiles that begin with the queries first, first + rows, ... before `last`.
struct GradientTiles {
  int64_t first, last;
};

// Some of the tiles of all query heads of one KV head, those of two stretches, of which the second may have none. Each
// such part has its own sums of dk and dv.
struct GradientTask {
  int64_t sequence, kv_head;
  GradientTiles tiles[2];
  char* sums;
};

struct AttentionBackwardKernels {
  struct Sizes {
    int64_t scratch_bytes, sums_bytes;
  };
  using Measure = Sizes (*)(const AttentionGradients&, const GradientTask&);
  // Of the keys `packed` are in the scratch memory already, from a task before of the same KV head without a window;
  // returns how many are now.
  using Run = int64_t (*)(const AttentionGradients&, const GradientTask&, char* scratch, int64_t packed);
  // Joins the sums of a KV head's `parts`, in order, and writes dk and dv of the keys [first, last).
  using Finish = void (*)(const AttentionGradients&, const GradientTask*, int64_t parts, int64_t first, int64_t last);
  int64_t row_unit[dtypes];    // what the queries of a tile are a multiple of
  bool several_heads[dtypes];  // whether a tile may have them
  Measure sizes[dtypes];
  Run run[dtypes];
  Finish finish[dtypes];
};

}  // namespace mk

MK_MATRIX_KERNELS(AttentionBackwardKernels, attention_backward)

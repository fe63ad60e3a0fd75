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
  int64_t rows;  // queries of a tile, even
};

// The most parts of one KV head.
constexpr int64_t most_parts = 8;

// Some of the tiles of all query heads of one KV head. Each part has its own sums of dk and dv.
struct GradientTask {
  int64_t sequence, kv_head, part, parts;
};

// Tiles of a part begin with the queries first, first + step, ... before `last`.
struct GradientTiles {
  int64_t first, last, step;
};

// With a window neighbours, which see the same keys; else every so many, since the later ones see more of them.
static inline GradientTiles tiles_of(const AttentionGradients& g, int64_t queries, int64_t part, int64_t parts) {
  if (!g.a.window) return {part * g.rows, queries, parts * g.rows};
  const int64_t tiles = (queries + g.rows - 1) / g.rows, last = (part + 1) * tiles / parts * g.rows;
  return {part * tiles / parts * g.rows, last < queries ? last : queries, g.rows};
}

struct AttentionBackwardKernels {
  struct Sizes {
    int64_t scratch_bytes, sums_bytes;  // of a task; sums of a part
  };
  using Measure = Sizes (*)(const AttentionGradients&, int64_t sequence, int64_t parts);
  using Run = void (*)(const AttentionGradients&, const GradientTask&, char* scratch, char* sums);
  // Joins the sums of all parts, `sums_bytes` apart, in order, and writes dk and dv.
  using Finish = void (*)(const AttentionGradients&, const GradientTask&, char* sums, int64_t sums_bytes);
  int64_t row_unit[dtypes];  // what the queries of a tile are a multiple of
  Measure sizes[dtypes];
  Run run[dtypes];
  Finish finish[dtypes];
};

}  // namespace mk

MK_MATRIX_KERNELS(AttentionBackwardKernels, attention_backward)

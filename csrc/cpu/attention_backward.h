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

// Neighbours, which see the same keys, with about as many scores in each part. Without a window tiles of one head are
// every so many instead, since the later ones see more keys.
static inline GradientTiles tiles_of(const AttentionGradients& g, const GradientTask& task) {
  const AttentionSequence& s = g.a.sequences[task.sequence];
  if (!g.a.window && g.heads == 1) return {task.part * g.rows, s.queries, task.parts * g.rows};
  const auto scores = [&](int64_t first) {
    const int64_t end = first + g.rows < s.queries ? first + g.rows : s.queries;
    return (end - first) * (end_visible(g.a, s, end - 1) - first_visible(g.a, s, first)) + 1;
  };
  int64_t all = 0, before = 0;
  for (int64_t first = 0; first < s.queries; first += g.rows) all += scores(first);
  GradientTiles tiles = {s.queries, s.queries, g.rows};
  for (int64_t first = 0; first < s.queries; first += g.rows) {
    const int64_t middle = 2 * before + scores(first), part = middle * task.parts / (2 * all);
    if (part >= task.part && first < tiles.first) tiles.first = first;
    if (part > task.part) {
      tiles.last = first;
      break;
    }
    before += scores(first);
  }
  return tiles;
}

struct AttentionBackwardKernels {
  struct Sizes {
    int64_t scratch_bytes, sums_bytes;  // of a task; sums of a part
  };
  using Measure = Sizes (*)(const AttentionGradients&, int64_t sequence, int64_t parts);
  using Run = void (*)(const AttentionGradients&, const GradientTask&, char* scratch, char* sums);
  // Joins the sums of all parts, `sums_bytes` apart, in order, and writes dk and dv.
  using Finish = void (*)(const AttentionGradients&, const GradientTask&, char* sums, int64_t sums_bytes);
  int64_t row_unit[dtypes];    // what the queries of a tile are a multiple of
  bool several_heads[dtypes];  // whether a tile may have them
  Measure sizes[dtypes];
  Run run[dtypes];
  Finish finish[dtypes];
};

}  // namespace mk

MK_MATRIX_KERNELS(AttentionBackwardKernels, attention_backward)

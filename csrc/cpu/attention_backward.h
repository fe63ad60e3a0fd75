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

// The tiles part, part + parts, ... of all query heads of one KV head. Each part has its own sums of dk and dv.
struct GradientTask {
  int64_t sequence, kv_head, part, parts;
};

struct AttentionBackwardKernels {
  struct Sizes {
    int64_t scratch_bytes, sums_bytes;  // of a task; sums of a part
  };
  using Measure = Sizes (*)(const AttentionGradients&, int64_t sequence);
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

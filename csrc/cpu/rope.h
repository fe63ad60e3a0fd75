// Rotary position embedding (Su et al. 2021, eq. 34).
#pragma once
#include "cpu/isa.h"

namespace mk {

// One token's heads of `dim` elements, `head_stride` apart; out is contiguous, cos and sin are the token's dim / 2.
// `past_caches` for an output no cache will hold, each half head of which starts at a whole vector; the caller fences.
struct RopeHeads {
  const void* x;
  int64_t head_stride;
  void* out;
  int64_t heads, dim;
  const void *cos, *sin;
  bool past_caches;
};

struct RopeKernels {
  // rotate[dtype][pairs are adjacent, not half a head apart][by the negative angle]
  void (*rotate[dtypes][2][2])(const RopeHeads&);
};

}  // namespace mk

MK_KERNELS(RopeKernels, rope)

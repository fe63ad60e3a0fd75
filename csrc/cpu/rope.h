// Rotary position embedding (Su et al. 2021, eq. 34).
#pragma once
#include "cpu/isa.h"

namespace mk {

// Rotates one token's heads, `head_stride` elements apart, into a contiguous out; cos and sin are the token's dim / 2.
struct RopeKernels {
  using Rotate = void (*)(const void* x, int64_t head_stride, void* out, int64_t heads, int64_t dim, const void* cos,
                          const void* sin);
  // rotate[dtype][pairs are adjacent, not half a head apart][by the negative angle]
  Rotate rotate[dtypes][2][2];
};

}  // namespace mk

MK_KERNELS(RopeKernels, rope)

// The parts of wgmma: matrices in shared memory by their descriptors, and what is under way in a warpgroup.
#pragma once
#include "block.h"

namespace emu {

// A matrix of `rows` (of M or N) by 16 of K, as a descriptor of the PTX ISA (9.7.15.5.1.2.2) places it: by its 16-byte
// pieces. Which way the distances lead is as in CUTLASS's canonical layouts (mma_traits_sm90_gmma.hpp).
class Matrix {
 public:
  Matrix(uint64_t descriptor, bool transposed, int rows)
      : start_((descriptor & 0x3fff) << 4),
        leading_((descriptor >> 16 & 0x3fff) << 4),
        stride_((descriptor >> 32 & 0x3fff) << 4),
        base_(descriptor >> 49 & 7),
        swizzle_(descriptor >> 62 ? 4 - static_cast<int>(descriptor >> 62) : 0),
        rows_(rows),
        transposed_(transposed) {}

  // As a tensor map numbers it: 0 none, 1 32 bytes, 2 64, 3 128.
  int swizzle() const { return swizzle_; }
  uint32_t start() const { return start_; }
  uint32_t base() const { return base_; }

  // f(offset in shared memory, row, k) for eight elements: of successive k, or rows where it is transposed.
  template <class F>
  void each(F f) const {
    for (int k = 0; k < 16; k += transposed_ ? 1 : 8)
      for (int row = 0; row < rows_; row += transposed_ ? 8 : 1) f(at(row, k), row, k);
  }
  void load(float* to, Element e) const;  // to[k][row]
  void check(const Actor& by, uint32_t site) const;

 private:
  uint32_t at(int row, int k) const {
    const uint32_t width = 16u << swizzle_, r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(k);
    uint32_t a = start_;
    if (!transposed_)
      a += r / 8 * stride_ + r % 8 * width + c / 8 * (swizzle_ ? 16 : leading_);
    else if (swizzle_)
      a += r / (width / 2) * leading_ + r % (width / 2) * 2 + c / 8 * stride_ + c % 8 * width;
    else
      a += r / 8 * stride_ + c / 8 * leading_ + c % 8 * 16;
    a &= 0x3ffff;
    static const uint32_t mask[] = {0, 1, 3, 7};
    return a ^ (a >> 7 & mask[swizzle_]) << 4;
  }

  uint32_t start_, leading_, stride_, base_;
  int swizzle_, rows_;
  bool transposed_;
};

}  // namespace emu

#include <algorithm>

#include "wgmma.h"

namespace emu {

namespace {

std::vector<uint32_t> seen;  // by 16 bytes: the stamp of the last matrix that had them
uint32_t stamp;

std::string bytes_of(int swizzle) { return std::to_string(swizzle ? 16 << swizzle : 0) + "-byte swizzle"; }

}  // namespace

void Matrix::load(float* to, Element e) const {
  each([&](uint32_t offset, int row, int k) {
    uint16_t v[8];
    memcpy(v, arena + offset, 16);
    for (int i = 0; i < 8; i++) {
      const int r = transposed_ ? row + i : row, c = transposed_ ? k : k + i;
      to[c * rows_ + r] = e == Element::bf16 ? wide(bf16{v[i]}) : wide(f16{v[i]});
    }
  });
}

void Matrix::check(const Actor& by, uint32_t site) const {
  if (base_) fail_at("matrix descriptor with a base offset, which is not modelled", site);
  const uint32_t pattern = 128u << swizzle_;
  if (swizzle_ && start_ % pattern >= 128)
    fail("matrix that starts " + std::to_string(start_ % pattern) + " bytes into its swizzle pattern of " +
         std::to_string(pattern) + " bytes, with a base offset of 0, at " + where(site));
  uint32_t end = 0;
  each([&](uint32_t offset, int, int) { end = std::max(end, offset + 16); });
  if (end > arena_bytes()) fail_at("matrix descriptor that leads past the end of shared memory", site);
  if (!checking) return;
  seen.resize(std::max(seen.size(), arena_bytes() / 16 + 1));
  stamp++;
  each([&](uint32_t offset, int, int) {
    if (std::exchange(seen[offset / 16], stamp) == stamp)
      fail("matrix descriptor that leads to byte " + std::to_string(offset) +
           " of shared memory twice (a wrong leading or stride offset?) at " + where(site));
    const int brought = shared_swizzle(offset);
    if (brought >= 0 && brought != swizzle_)
      fail("matrix that was brought with a " + bytes_of(brought) + ", and whose descriptor says " + bytes_of(swizzle_) +
           ", at " + where(site));
  });
  each([&](uint32_t offset, int, int) { shared_access(offset, 16, Access::read, by, site); });
}

}  // namespace emu

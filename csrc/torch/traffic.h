// Which outputs are stored past the caches.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace mk {

// A cache would not hold outputs from this size on, and a plain store first reads the line that it overwrites.
constexpr int64_t past_caches_bytes = int64_t{16} << 20;

// Whether `bytes` of output are to be stored past the caches: they are many, and all of `places`, which are addresses
// and distances in bytes, are multiples of the largest vector.
template <class... Places>
bool past_caches(int64_t bytes, Places... places) {
  return bytes >= past_caches_bytes && (((uintptr_t)places % 64 == 0) && ...);
}

// Ends the stores past the caches that other threads are to see.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mk

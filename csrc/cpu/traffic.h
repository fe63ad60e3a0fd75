// What a kernel tells memory: which bytes it reads next, and which it writes for no cache to hold.
#pragma once
#include "cpu/vec.h"

namespace mk::MK_ISA {

constexpr int64_t cache_line = 64;
constexpr int64_t fetched_row = 16 << 10;  // bytes; of several longer ones a cache would not hold the next too

// Asks for bytes ahead of their use; any address will do.
template <class T>
MK_INLINE void fetch(const T* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += cache_line) __builtin_prefetch((const char*)from + b);
}

// With kStream past the caches, to a multiple of the vector's size, and stream_fence ends it.
template <class T, bool kStream>
MK_INLINE void put(T* to, vec_of<T> v) {
  if constexpr (kStream)
    stream(to, v);
  else
    store(to, v);
}

}  // namespace mk::MK_ISA

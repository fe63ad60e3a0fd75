// What a kernel tells memory: which bytes it reads next, and which it writes for no cache to hold.
#pragma once
#include "cpu/vec.h"

namespace mk::MK_ISA {

constexpr int64_t cache_line = 64;
constexpr int64_t fetched_row = 16 << 10;  // bytes; of several longer ones a cache would not hold the next too

// A function that does no more than fetch must be MK_FETCHES: g++ takes one that is not inlined at once for one that
// does nothing, and leaves out its calls.
#define MK_FETCHES inline __attribute__((always_inline))

// What __builtin_prefetch calls locality.
constexpr int first_cache = 3, second_cache = 2;

// Asks for bytes ahead of their use; any address will do.
template <int cache = first_cache, class T>
MK_INLINE void fetch(const T* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += cache_line) __builtin_prefetch((const char*)from + b, 0, cache);
}

constexpr int64_t fetch_ahead = 4 << 10;  // bytes: beyond a page, at whose end the processor's own prefetch stops

// From the element that lies fetch_ahead on, or one row on in a shorter one, where the next row begins `stride` on.
template <class T>
MK_FETCHES void fetch_later(const T* row, int64_t i, int64_t bytes, int64_t n, int64_t stride) {
  const int64_t ahead = n < fetch_ahead / int64_t{sizeof(T)} ? n : fetch_ahead / int64_t{sizeof(T)};
  fetch(row + i + ahead + (i + ahead < n ? 0 : stride - n), bytes);
}

// With kStream past the caches, to a multiple of the vector's size.
template <class T, bool kStream>
MK_INLINE void put(T* to, vec_of<T> v) {
  if constexpr (kStream)
    stream(to, v);
  else
    store(to, v);
}

}  // namespace mk::MK_ISA

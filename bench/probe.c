/* What memory gives to a program that does nothing else: threads read, or copy, each its own part. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

typedef uint64_t v8 __attribute__((vector_size(64)));

uint64_t probe_read(const char* from, size_t bytes, int threads) {
  uint64_t total = 0;
  const ptrdiff_t lines = (ptrdiff_t)(bytes / 256);
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    v8 a = {0}, b = {0}, c = {0}, d = {0};
#pragma omp for schedule(static) nowait
    for (ptrdiff_t i = 0; i < lines; ++i) {
      const v8* p = (const v8*)(from + 256 * i);
      a += p[0], b += p[1], c += p[2], d += p[3];
    }
    a += b + c + d;
    for (int i = 0; i < 8; ++i) total += a[i];
  }
  return total;
}

/* Stores that pass the caches by, where the machine has them: a plain store first reads the line it overwrites. */
void probe_copy(char* to, const char* from, size_t bytes, int threads) {
  const ptrdiff_t lines = (ptrdiff_t)(bytes / 64);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (ptrdiff_t i = 0; i < lines; ++i) {
#if defined(__SSE2__)
      const __m128i* p = (const __m128i*)(from + 64 * i);
      __m128i* q = (__m128i*)(to + 64 * i);
      for (int j = 0; j < 4; ++j) _mm_stream_si128(q + j, _mm_loadu_si128(p + j));
#else
      memcpy(to + 64 * i, from + 64 * i, 64);
#endif
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }
}

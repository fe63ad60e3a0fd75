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

typedef float v8f __attribute__((vector_size(32)));

/* Multiplies and adds 12 vectors of eight floats `rounds` times in each thread: what registers of 256 bits allow. They
   begin with different numbers, since equal ones might be computed once. */
float probe_fma(long rounds, int threads) {
  float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const v8f by = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f}, more = by + by;
    v8f a = more, b = a + more, c = b + more, d = c + more, e = d + more, f = e + more;
    v8f g = f + more, h = g + more, i = h + more, j = i + more, k = j + more, l = k + more;
    for (long r = 0; r < rounds; ++r) {
      a = a * by + more, b = b * by + more, c = c * by + more, d = d * by + more;
      e = e * by + more, f = f * by + more, g = g * by + more, h = h * by + more;
      i = i * by + more, j = j * by + more, k = k * by + more, l = l * by + more;
    }
    a += b + c + d + e + f + g + h + i + j + k + l;
    for (int n = 0; n < 8; ++n) total += a[n];
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

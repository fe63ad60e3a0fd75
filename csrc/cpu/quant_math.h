// Vectors of codes: half words, products of pairs, lookups, and scales spread over lanes.
#pragma once
#include "cpu/arithmetic.h"
#include "cpu/quant_linear.h"

namespace mk::MK_ISA {

MK_INLINE vi set1(int32_t x) { return x + vi{}; }

namespace {

typedef int16_t vs __attribute__((vector_size(4 * MK_LANES)));
typedef uint16_t vus __attribute__((vector_size(4 * MK_LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef int16_t octet __attribute__((vector_size(16)));

MK_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// To the nearest, halves to even; |x| below 2^22.
MK_INLINE vi to_int(vf x) { return (vi)(x + round_magic) - 0x4b400000; }

MK_INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// c[i] + a[2i] b[2i] + a[2i+1] b[2i+1]
MK_INLINE vi dot_pairs(vi c, vs a, vs b) {
#if MK_BF16
  return (vi)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return c + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return c + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return c + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const vi x = (vi)a, y = (vi)b;
  return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// c[i] plus the four products of a's unsigned bytes with b's signed ones.
MK_INLINE vi dot_bytes(vi c, vi a, vi b) {
#if MK_BF16
  return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  const vs even = (vs)((vus)a & 255), odd = (vs)((vus)a >> 8);
  return dot_pairs(dot_pairs(c, even, (vs)b << 8 >> 8), odd, (vs)b >> 8);
#endif
}

#if MK_BF16
// In each block of four lanes a's low halves, then b's; within int16.
MK_INLINE vs low_halves(vi a, vi b) { return (vs)_mm512_packs_epi32((__m512i)a, (__m512i)b); }
#endif

struct Table {
  float of[16];
};

constexpr Table int4_table = {{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};
constexpr Table nf4_table = {{-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                              -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.f,
                              0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                              0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f}};

// The entry that the low four bits of each lane name.
MK_INLINE vf lookup(const Table& table, vu at) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)at, _mm512_loadu_ps(table.of));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.of), (__m256i)at);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.of + 8), (__m256i)at);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(at << 28));
#else
  vf out;
  for (int i = 0; i < lanes; i++) out[i] = table.of[at[i] & 15];
  return out;
#endif
}

// A vector's worth of bytes, each in a lane.
MK_INLINE vu bytes_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vu out;
  for (int i = 0; i < lanes; i++) out[i] = p[i];
  return out;
#endif
}

template <int parts>
MK_INLINE vf each_of(quad v) {
#if defined(__AVX512F__)
  constexpr int n = lanes / parts;
  const vi at = {0,     1 / n, 2 / n,  3 / n,  4 / n,  5 / n,  6 / n,  7 / n,
                 8 / n, 9 / n, 10 / n, 11 / n, 12 / n, 13 / n, 14 / n, 15 / n};
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)at, _mm512_castps128_ps512((__m128)v));
#elif defined(__AVX2__)
  constexpr int n = lanes / parts;
  const vi at = {0, 1 / n, 2 / n, 3 / n, 4 / n, 5 / n, 6 / n, 7 / n};
  return (vf)_mm256_permutevar8x32_ps(_mm256_castps128_ps256((__m128)v), (__m256i)at);
#else
  vf out;
  for (int i = 0; i < lanes; i++) out[i] = v[i * parts / lanes];
  return out;
#endif
}

// p[0 ... parts) over the lanes, each over as many.
template <int parts>
MK_INLINE vf spread(const float* p) {
  if constexpr (parts == 1) {
    return set1(*p);
  } else {
    // By way of a whole vector in memory the scales would wait for the stores before them.
    quad v = {p[0], p[1]};
    if constexpr (parts == 4) __builtin_memcpy(&v, p, sizeof v);
    return each_of<parts>(v);
  }
}

// Elements [first, first + piece) of a row of k, those past its end as zeros.
template <int piece, class T>
MK_INLINE void load_piece(const T* x, int64_t first, int64_t k, float* values) {
  const int64_t count = least(piece, k - first);
  for (int64_t i = 0; i < piece; i += lanes) {
    const T* const at = x + first + i;
    store(values + i, i + lanes <= count ? load(at) : i < count ? load_n(at, count - i) : vf{});
  }
}

// The largest magnitude in a piece, or -1 where int16 with a scale holds none of it: infinities, nan, or nothing but
// the tiniest numbers.
template <int piece>
MK_INLINE float largest_for_int16(const float* x) {
  vf largest = {}, nothing = {};
  for (int i = 0; i < piece; i += lanes) {
    const vf v = load(x + i);
    largest = max(magnitude(v), largest);
    nothing += v * 0.f;  // nan, where v is not finite
  }
  const float most = fold<lanes / 2>(largest, [](vf a, vf b) { return max(a, b); });
  const float zero = fold<lanes / 2>(nothing, [](vf a, vf b) { return a + b; });
  return !(most + zero <= 1e30f) || (most > 0 && most < 1e-30f) ? -1.f : most;
}

// Bytes of the codes of a row of k elements.
MK_INLINE int64_t code_bytes(Codes kind, int64_t k) { return kind == Codes::int8 ? k : (k + 31) / 32 * 16; }

// Up to one vector of results; called with a constant, so that no length is looked at for a whole one.
template <class T>
MK_INLINE void finish_some(const QuantShare& s, int64_t i, int64_t n, int64_t count, const float* sums) {
  vf v = load_n(sums, count);
  if (s.bias) v += load_n((const T*)s.bias + n, count);
  store_n((T*)s.out + i * s.out_row + n, v, count);
}

// Results of row i.
template <class T>
MK_INLINE void finish(const QuantShare& s, int64_t i, int64_t n, int64_t count, const float* sums) {
  int64_t r = 0;
  for (; r + lanes <= count; r += lanes) finish_some<T>(s, i, n + r, lanes, sums + r);
  if (r < count) finish_some<T>(s, i, n + r, count - r, sums + r);
}

}  // namespace
}  // namespace mk::MK_ISA

// One vector type for every instruction set: MK_LANES floats (4, 8 or 16) by GCC's vector extensions, so arithmetic,
// comparison and `mask ? a : b` are the operators. Overridden by intrinsics are only the conversions that the compiler
// does badly (measured against the plain form on Zen 5: bf16 2x, float16 5x) and the scaling by a power of two.
//
//   vf, vd         floats; doubles in the same number of bytes (lanes / 2)
//   vi, vu         integers of a float's lane
//   Format<T>      how T lies in memory: `raw`, the vector `vec` that arithmetic on T is done in, its `width`,
//                  decode(raw) and encode(vec), rounding to nearest even
//   load_words, store_words  any vector as it lies in memory
//   load, store    a full vector, unaligned;  load_n, store_n  the first n lanes (the others load as 0)
//   stream         store past the caches, to an address that is a multiple of the vector's size; who calls the kernel
//                  ends such stores with a fence
//   round_to<T>    to T's precision and back
//   exp            to 1 ulp or so over the whole range
//   sigmoid_divisor  1 + e^-x to 8e-6, for what is rounded to 16 bits
#pragma once
#include <cmath>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/isa.h"

#define MK_INLINE static inline __attribute__((always_inline))

namespace mk::MK_ISA {

constexpr int lanes = MK_LANES;
typedef float vf __attribute__((vector_size(4 * MK_LANES)));
typedef double vd __attribute__((vector_size(4 * MK_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * MK_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * MK_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * MK_LANES)));

MK_INLINE vf set1(float x) { return x - vf{}; }
MK_INLINE vd set1(double x) { return x - vd{}; }
MK_INLINE vu set1(uint32_t x) { return x + vu{}; }
// Of a nan and another the second operand, as in a comparison; g++ makes two to four operations of one.
MK_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
MK_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

MK_INLINE vu widen(vh h) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#elif defined(__SSE2__)
  return (vu)_mm_unpacklo_epi16(_mm_set_epi64x(0, (int64_t)h), _mm_setzero_si128());
#else
  return __builtin_convertvector(h, vu);
#endif
}

// The low halves.
MK_INLINE vh narrow(vu u) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)(u & 0xffffu), _mm256_setzero_si256());
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#elif defined(__SSE2__)
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)u, 16), 16);
  return (vh)_mm_cvtsi128_si64(_mm_packs_epi32(extended, extended));
#else
  return __builtin_convertvector(u, vh);
#endif
}

template <class T>
struct Format;

template <>
struct Format<float> {
  using raw = vf;
  using vec = vf;
  static constexpr int width = lanes;
  MK_INLINE vf decode(vf v) { return v; }
  MK_INLINE vf encode(vf v) { return v; }
};

template <>
struct Format<double> {
  using raw = vd;
  using vec = vd;
  static constexpr int width = lanes / 2;
  MK_INLINE vd decode(vd v) { return v; }
  MK_INLINE vd encode(vd v) { return v; }
};

template <>
struct Format<bf16> {
  using raw = vh;
  using vec = vf;
  static constexpr int width = lanes;
  MK_INLINE vf decode(vh h) { return (vf)(widen(h) << 16); }
  MK_INLINE vh encode(vf v) {
#if MK_BF16  // takes subnormals for 0
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return narrow(v == v ? rounded : set1(uint32_t{0x7fc0}));
#endif
  }
};

template <>
struct Format<f16> {
  using raw = vh;
  using vec = vf;
  static constexpr int width = lanes;
  MK_INLINE vf decode(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16((float16x4_t)h);
#else
    // The exponent moves from bias 15 to 127; infinities and subnormals need one step more.
    const vu u = widen(h), magnitude = u & 0x7fffu, sign = (u & 0x8000u) << 16;
    const vu normal = (magnitude << 13) + (112u << 23);
    const vf subnormal = (vf)(normal + (1u << 23)) - 6.103515625e-5f;
    const vu special = normal + (112u << 23);
    const vu bits = magnitude >= 0x7c00u ? special : magnitude < 0x400u ? (vu)subnormal : normal;
    return (vf)(bits | sign);
#endif
  }
  MK_INLINE vh encode(vf v) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (vh)vcvt_f16_f32((float32x4_t)v);
#else
    const vu u = (vu)v, sign = u & 0x80000000u, magnitude = u ^ sign;
    const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts a float16 subnormal's last bit where float32 rounds.
    const vu subnormal = (vu)((vf)magnitude + 0.5f) - (126u << 23);
    const vu special = magnitude > (255u << 23) ? set1(uint32_t{0x7e00}) : set1(uint32_t{0x7c00});
    const vu bits = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
    return narrow(bits | sign >> 16);
#endif
  }
};

template <class V, class T>
MK_INLINE V load_words(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
MK_INLINE void store_words(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
using vec_of = typename Format<T>::vec;

template <class T>
MK_INLINE vec_of<T> load(const T* p) {
  typename Format<T>::raw r;
  __builtin_memcpy(&r, p, sizeof r);
  return Format<T>::decode(r);
}

template <class T>
MK_INLINE void store(T* p, vec_of<T> v) {
  const typename Format<T>::raw r = Format<T>::encode(v);
  __builtin_memcpy(p, &r, sizeof r);
}

template <class T>
MK_INLINE vec_of<T> load_n(const T* p, int64_t n) {
  typename Format<T>::raw r = {};
  __builtin_memcpy(&r, p, n * sizeof(T));
  return Format<T>::decode(r);
}

template <class T>
MK_INLINE void store_n(T* p, vec_of<T> v, int64_t n) {
  const typename Format<T>::raw r = Format<T>::encode(v);
  __builtin_memcpy(p, &r, n * sizeof(T));
}

template <class T>
MK_INLINE void stream(T* p, vec_of<T> v) {
  const typename Format<T>::raw r = Format<T>::encode(v);
#if defined(__x86_64__)
  if constexpr (sizeof r == 8) {
    _mm_stream_si64((long long*)p, (long long)r);
#if defined(__AVX512F__)
  } else if constexpr (sizeof r == 64) {
    _mm512_stream_si512((__m512i*)p, (__m512i)r);
#endif
#if defined(__AVX2__)
  } else if constexpr (sizeof r == 32) {
    _mm256_stream_si256((__m256i*)p, (__m256i)r);
#endif
  } else {
    static_assert(sizeof r == 16);
    _mm_stream_si128((__m128i*)p, (__m128i)r);
  }
#else
  __builtin_memcpy(p, &r, sizeof r);
#endif
}

template <class T>
MK_INLINE vec_of<T> round_to(vec_of<T> v) {
  return Format<T>::decode(Format<T>::encode(v));
}

// Sums by halves: the order does not depend on how the compiler sees it.
MK_INLINE float sum(vf v) {
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

MK_INLINE double sum(vd v) {
  for (int half = lanes / 4; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

MK_INLINE float max(vf v) {
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

constexpr float round_magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// e^x = 2^n * e^f with f in [-ln2/2, ln2/2]; ln2 in two parts keeps f exact. The polynomial errs by 2e-9. The power is
// applied in two steps, so that results near overflow and subnormal ones come out right.
MK_INLINE vf exp(vf x) {
  x = x > 90.f ? set1(90.f) : x < -105.f ? set1(-105.f) : x;  // nan stays
  const vf shifted = x * 1.44269504f + round_magic, n = shifted - round_magic;
  const vf f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = 0.0013843653723597527f * f + 0.00837415549904108f;
  p = (p * f + 0.04166800156235695f) * f + 0.16666431725025177f;
  p = ((p * f + 0.49999994f) * f) * f + f + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vi power = (vi)shifted - 0x4b400000, half = power >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
#endif
}

MK_INLINE vd exp(vd x) {
  for (int i = 0; i < lanes / 2; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

// 1 + e^-x, by which the sigmoid divides, for what is rounded to 16 bits: relative error 3e-6, and up to 8e-6 where |x|
// is large, which goes into the power of two without being split. From 2^127.5 on it is infinity.
MK_INLINE vf sigmoid_divisor(vf x) {
#if defined(__AVX512DQ__)
  x *= -1.44269504f;
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0);
#else
  // To [-88.8, 88], which are infinity and 1. By the bits it takes a cycle where max and min take four, in what is one
  // long chain.
#if defined(__AVX2__)
  const __m256i low = _mm256_set1_epi32(int(0xc2b1999a)), high = _mm256_set1_epi32(0x42b00000);
  x = (vf)_mm256_min_epu32(_mm256_min_epi32((__m256i)x, high), low);
#else
  x = min(max(x, set1(-88.8f)), set1(88.f));
#endif
  constexpr float biased = round_magic + 127.f;
  const vf shifted = x * -1.44269504f + biased, f = x * -1.44269504f - (shifted - biased);
#endif
  const vf p = (((f * 0.009582852944731712f + 0.055906426161527634f) * f + 0.24024099f) * f + 0.69312418f) * f + 1.f;
#if defined(__AVX512DQ__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(x - f)) + 1.f;
#else
  return p * (vf)((vi)shifted << 23) + 1.f;
#endif
}

}  // namespace mk::MK_ISA

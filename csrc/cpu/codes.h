// int8 codes as the products take them. Every code is exact in every dtype: bfloat16 holds integers to 256.
#pragma once
#include "cpu/arithmetic.h"

namespace mk::MK_ISA {
namespace {

// A vector's worth of codes as floats.
MK_INLINE vf code_floats(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(__SSE2__)
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  const __m128i zero = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(four);
  const __m128i high = _mm_unpacklo_epi16(zero, _mm_unpacklo_epi8(zero, bytes));
  return (vf)_mm_cvtepi32_ps(_mm_srai_epi32(high, 24));
#else
  typedef int8_t codes __attribute__((vector_size(MK_LANES)));
  return __builtin_convertvector(load_words<codes>(p), vf);
#endif
}

// Codes as words, in the order of memory.
template <class M>
MK_INLINE typename M::Words row_vector(const int8_t* p) {
  if constexpr (sizeof(typename M::Scalar) == 8) {
    typename M::Words v;
    for (int i = 0; i < M::width; i++) v[i] = p[i];
    return v;
  } else if constexpr (M::step == 1) {
    return code_floats(p);
  } else {
#if MK_BF16
    return (vu)_mm512_cvtne2ps_pbh((__m512)code_floats(p + lanes), (__m512)code_floats(p));
#endif
  }
}

#if MK_BF16
// Two keys' values as pairs, the nth vector of columns; `odd` may be null for zeros.
MK_INLINE vu value_pairs(const bf16* even, const bf16* odd, int n) {
  typedef uint16_t Wide __attribute__((vector_size(64)));
  const Wide a = load_words<Wide>(even + n / 2 * 32), b = odd ? load_words<Wide>(odd + n / 2 * 32) : Wide{};
  if (n % 2)
    return (vu)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                       57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  return (vu)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
}

// A code's float has zeros where a bfloat16 ends.
MK_INLINE vu value_pairs(const int8_t* even, const int8_t* odd, int n) {
  const vu low = (vu)code_floats(even + n * lanes) >> 16;
  return odd ? low | (vu)code_floats(odd + n * lanes) : low;
}
#endif

}  // namespace
}  // namespace mk::MK_ISA

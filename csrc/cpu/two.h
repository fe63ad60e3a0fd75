// Two vectors of neighbours, read and written at once. Of 16-bit elements two fill a whole register, with AVX-512 a
// cache line, which is written past the caches much faster at once than in parts. And bf16 that stand apart, the even
// ones in one vector and the odd ones in the other, are decoded by one operation a vector, and none that moves lanes.
//
//   Two<V>    the vectors
//   RawTwo<T> how they lie in memory
//   Order     `memory`, or `apart`, which is another order for bf16 only; what is combined must have one order
//   Nans      what a nan that is rounded may be: `any`, or `short_ones`, which are bf16's and those that arithmetic
//             makes of numbers: their lower halves are 0, so that rounding does not carry out of them
//   load_two, put_two (past the caches with kStream), round_two;  load_raw, decode_two, encode_two, put_raw
#pragma once
#include "cpu/traffic.h"

namespace mk::MK_ISA {

enum class Order { memory, apart };
enum class Nans { any, short_ones };

template <class V>
struct Two {
  V a, b;

  Two operator+(Two y) const { return {a + y.a, b + y.b}; }
  Two operator*(Two y) const { return {a * y.a, b * y.b}; }
  template <class S>
  Two operator*(S y) const {
    return {a * y, b * y};
  }
};

template <class T>
using two_of = Two<vec_of<T>>;

// Elements of two vectors, but no less than a cache line.
template <class T>
constexpr int64_t line_of =
    2 * Format<T>::width * sizeof(T) > cache_line ? 2 * Format<T>::width : cache_line / int64_t{sizeof(T)};

template <class T>
struct RawTwo {
  typename Format<T>::raw a, b;
};
// The words in the order of memory.
template <>
struct RawTwo<bf16> {
  vu bits;
};

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

// How many rows lie between those in work, `some` at once, and those that are fetched meanwhile: these come next or,
// where rows are so short that memory would not answer in time, begin 8 KB on.
MK_INLINE int64_t rows_ahead(int64_t row_bytes, int64_t some) {
  const int64_t far = 8 << 10, bytes = row_bytes * some;
  return bytes && bytes < far ? far / bytes * some : some;
}

// The rows that are read later, fetched by two passes over those in work, four vectors at a time: a quarter by the
// first, which has little to compute and would wait for memory, and the rest by the second.
template <class T, int cache = first_cache, class Row>
MK_FETCHES void fetch_in_first(const Row* next, int rows, int64_t i) {
  if (i % (4 * line_of<T>) == 0)
    for (int r = 0; r < rows; r++) next[r].template fetch_at<cache>(i / 4, line_of<T>);
}
template <class T, int cache = first_cache, class Row>
MK_FETCHES void fetch_in_second(const Row* next, int rows, int64_t i, int64_t n) {
  if (line_of<T> == 2 * Format<T>::width || i % (2 * line_of<T>) == 0)
    for (int r = 0; r < rows; r++) next[r].template fetch_at<cache>((n + 3 * i) / 4, 2 * line_of<T>);
}

#if defined(__AVX512BW__)
typedef uint16_t Words __attribute__((vector_size(64)));

template <class Place>
MK_INLINE __m512i places(Place place) {
  Words w = {};
#pragma GCC unroll 32
  for (int i = 0; i < 32; i++) w[i] = uint16_t(place(i));
  return (__m512i)w;
}

// The words of one half as the upper ones of lanes.
template <int which>
MK_INLINE vf widen_half(vu bits) {
  const __m512i from = places([](int i) { return 16 * which + i / 2; });
  return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, (__m512i)bits);
}
#endif

MK_INLINE vu joined(vh a, vh b) {
#if defined(__AVX512F__)
  return (vu)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
#elif defined(__AVX2__)
  return (vu)_mm256_set_m128i((__m128i)b, (__m128i)a);
#elif defined(__SSE2__)
  return (vu)_mm_set_epi64x((int64_t)b, (int64_t)a);
#else
  return (vu)__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
}

template <int which>
MK_INLINE vh half(vu bits) {
#if defined(__AVX512F__)
  return (vh)_mm512_extracti64x4_epi64((__m512i)bits, which);
#elif defined(__AVX2__)
  return (vh)_mm256_extracti128_si256((__m256i)bits, which);
#else
  typedef uint64_t Halves __attribute__((vector_size(16)));
  return (vh)((Halves)bits)[which];
#endif
}

// A nan becomes one of short_ones.
template <class S>
MK_INLINE S with_short_nan(S x) {
  return x == x ? x : S(__builtin_nanf(""));
}

#if !MK_BF16
// Whether there may be a nan.
MK_INLINE bool may_have_nan([[maybe_unused]] Two<vf> v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v.a, (__m512)v.b, _CMP_UNORD_Q);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v.a, (__m256)v.b, _CMP_UNORD_Q));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)v.a, (__m128)v.b));
#else
  return true;
#endif
}

// What Format<bf16> rounds to, in the upper halves of the lanes.
template <Nans nans>
MK_INLINE Two<vu> rounded_above(Two<vf> v) {
  const vu a = (vu)v.a, b = (vu)v.b, nan = set1(0x7fc00000u);
  Two<vu> r = {a + 0x7fffu + ((a >> 16) & 1u), b + 0x7fffu + ((b >> 16) & 1u)};
  if (nans == Nans::any && __builtin_expect(may_have_nan(v), 0)) r = {v.a == v.a ? r.a : nan, v.b == v.b ? r.b : nan};
  return r;
}
#endif

template <class T>
MK_INLINE RawTwo<T> load_raw(const T* p) {
  using Raw = typename Format<T>::raw;
  if constexpr (is_bf16<T>)
    return {load_words<vu>(p)};
  else
    return {load_words<Raw>(p), load_words<Raw>(p + Format<T>::width)};
}

template <Order order, class T>
MK_INLINE two_of<T> decode_two(RawTwo<T> r) {
  return {Format<T>::decode(r.a), Format<T>::decode(r.b)};
}

template <Order order>
MK_INLINE Two<vf> decode_two(RawTwo<bf16> r) {
  if constexpr (order == Order::apart) {
    return {(vf)(r.bits << 16), (vf)(r.bits & 0xffff0000u)};
  } else {
#if defined(__AVX512BW__)
    return {widen_half<0>(r.bits), widen_half<1>(r.bits)};
#else
    return {Format<bf16>::decode(half<0>(r.bits)), Format<bf16>::decode(half<1>(r.bits))};
#endif
  }
}

#if MK_BF16
template <Order order, Nans nans>
MK_INLINE RawTwo<bf16> encode_bf16(Two<vf> v) {
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
  if constexpr (order == Order::memory) return {(vu)packed};
  return {(vu)_mm512_permutexvar_epi16(places([](int i) { return i / 2 + i % 2 * 16; }), packed)};
}
#else
template <Order order, Nans nans>
MK_INLINE RawTwo<bf16> encode_bf16(Two<vf> v) {
  const Two<vu> r = rounded_above<nans>(v);
  if constexpr (order == Order::apart) {
#if defined(__AVX512BW__)
    return {(vu)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(r.a >> 16), (__m512i)r.b)};
#elif defined(__AVX2__)
    return {(vu)_mm256_blend_epi16((__m256i)(r.a >> 16), (__m256i)r.b, 0xaa)};
#else
    return {r.a >> 16 | (r.b & 0xffff0000u)};
#endif
  } else {
#if defined(__AVX512BW__)
    const __m512i from = places([](int i) { return 2 * i + 1; });
    return {(vu)_mm512_permutex2var_epi16((__m512i)r.a, from, (__m512i)r.b)};
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)(r.a >> 16), (__m256i)(r.b >> 16));
    return {(vu)_mm256_permute4x64_epi64(packed, 0xd8)};
#elif defined(__SSE2__)
    return {(vu)_mm_packs_epi32((__m128i)((vi)r.a >> 16), (__m128i)((vi)r.b >> 16))};
#else
    return {joined(narrow(r.a >> 16), narrow(r.b >> 16))};
#endif
  }
}
#endif

template <class T, Order order, Nans nans>
MK_INLINE RawTwo<T> encode_two(two_of<T> v) {
  if constexpr (is_bf16<T>)
    return encode_bf16<order, nans>(v);
  else
    return {Format<T>::encode(v.a), Format<T>::encode(v.b)};
}

template <Order order, class T>
MK_INLINE two_of<T> load_two(const T* p) {
  if constexpr (order == Order::apart || (is_bf16<T> && lanes == 16))
    return decode_two<order>(load_raw(p));
  else
    return {load(p), load(p + Format<T>::width)};
}

#if !MK_BF16
// To bf16's precision: beside 1.5 * 2^16 times its power of two v's last bit that stays is the last one of a float. The
// sum has the opposite sign, so that taking it back restores that of a zero. What is subnormal stays as it is.
MK_INLINE vf rounded(vf v) {
  const vf far = (vf)((vu)v & 0x7f800000u) * 98304.f;
  return -far - (-far - v);
}
#endif

// To T's precision and back, whatever the order, of numbers below 2^111.
template <class T>
MK_INLINE two_of<T> round_two(two_of<T> v) {
  if constexpr (!is_bf16<T>) {
    return {round_to<T>(v.a), round_to<T>(v.b)};
  } else {
#if MK_BF16
    return decode_two<Order::memory>(encode_bf16<Order::memory, Nans::short_ones>(v));
#else
    return {rounded(v.a), rounded(v.b)};
#endif
  }
}

template <bool kStream, class T>
MK_INLINE void put_raw(T* to, RawTwo<T> r) {
  constexpr int w = Format<T>::width;
  if constexpr (is_bf16<T>) {
    put<float, kStream>((float*)to, (vf)r.bits);
  } else if constexpr (sizeof r == sizeof(vu)) {
    put<float, kStream>((float*)to, (vf)joined(r.a, r.b));
  } else {
    put<T, kStream>(to, r.a);
    put<T, kStream>(to + w, r.b);
  }
}

template <Order order, Nans nans, bool kStream, class T>
MK_INLINE void put_two(T* to, two_of<T> v) {
  put_raw<kStream>(to, encode_two<T, order, nans>(v));
}

}  // namespace mk::MK_ISA

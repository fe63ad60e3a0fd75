// Arithmetic of PTX that C++ has no operator for. Header only: the compiler works on translated code as on any other.
#pragma once
#include <algorithm>
#include <cfenv>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emu {

// The same bits as another type; between integers, PTX's truncation or extension.
template <class T, class U>
inline T as(U v) {
  if constexpr (std::is_same_v<T, U>) {
    return v;
  } else if constexpr (std::is_floating_point_v<T> != std::is_floating_point_v<U>) {
    if constexpr (sizeof(T) == sizeof(U)) {
      T r;
      memcpy(&r, &v, sizeof r);
      return r;
    } else if constexpr (std::is_floating_point_v<T>) {  // a literal or a wider register
      return as<T>(static_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(v));
    } else {
      return static_cast<T>(as<std::conditional_t<sizeof(U) == 4, uint32_t, uint64_t>>(v));
    }
  } else {
    return static_cast<T>(v);
  }
}

// Subnormals become zero, as with the modifier .ftz.
inline float ftz(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.f, v) : v; }
inline float sat(float v) { return v > 0.f ? std::min(v, 1.f) : 0.f; }  // NaN gives 0
inline double sat(double v) { return v > 0. ? std::min(v, 1.) : 0.; }

// ---- 16-bit formats, held as bits
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
inline float wide(bf16 v) { return as<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float wide(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return as<float>(sign | ((rest << 13) + 0x38000000u));
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
enum class Round : uint8_t { nearest, zero };
template <class T>
T narrow(float v, Round round = Round::nearest);
template <>
inline bf16 narrow<bf16>(float v, Round round) {
  const uint32_t u = as<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((round == Round::zero ? u : u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(float v, Round round) {
  const uint32_t u = as<uint32_t>(v), sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return {0x7fff};
  if (mag == 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  uint32_t r;
  if (mag < 0x38800000u) {  // subnormal: one unit is 2^-24
    const double units = std::ldexp(static_cast<double>(std::fabs(v)), 24);
    r = static_cast<uint32_t>(round == Round::zero ? std::trunc(units) : std::nearbyint(units));
  } else {
    const uint32_t base = mag - 0x38000000u;
    r = (round == Round::zero ? base : base + 0xfffu + (base >> 13 & 1)) >> 13;
    if (r >= 0x7c00u) r = round == Round::zero ? 0x7bffu : 0x7c00u;
  }
  return {static_cast<uint16_t>(sign | r)};
}
template <class T>
inline uint32_t pack(float low, float high, Round round = Round::nearest) {
  return narrow<T>(low, round).bits | static_cast<uint32_t>(narrow<T>(high, round).bits) << 16;
}
// f of the float values of 16-bit operands, rounded once; and the same on both halves of 32 bits.
template <class T, class F, class... A>
inline uint16_t map1(F f, A... a) {
  return narrow<T>(f(wide(T{static_cast<uint16_t>(a)})...)).bits;
}
template <class T, class F, class... A>
inline uint32_t map2(F f, A... a) {
  return map1<T>(f, static_cast<uint16_t>(a)...) | static_cast<uint32_t>(map1<T>(f, static_cast<uint16_t>(a >> 16)...))
                                                       << 16;
}
// Round to nearest, ties away, to 10 bits of mantissa.
inline float to_tf32(float v) {
  const uint32_t u = as<uint32_t>(v);
  return (u & 0x7f800000u) == 0x7f800000u ? v : as<float>((u + 0x1000u) & ~0x1fffu);
}

// ---- integers. Shifts beyond the width are defined in PTX.
template <class T>
inline T shl(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? T(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << n);
}
template <class T>
inline T shr(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? (a < 0 ? static_cast<T>(-1) : T(0)) : static_cast<T>(a >> n);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << n >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> n);
}
template <class T>
inline T mul_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * b) >> sizeof(T) * 8);
}
template <class T>
inline T divide(T a, T b) {  // a division by zero is undefined in PTX; on devices it gives all ones
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(a));
  }
  return a / b;
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return a % b;
}
template <class T>
inline T bit_insert(T a, T b, uint32_t at, uint32_t length) {
  if (at >= sizeof(T) * 8 || !length) return b;
  const T ones = length >= sizeof(T) * 8 ? static_cast<T>(-1) : static_cast<T>((T(1) << length) - 1);
  const T mask = static_cast<T>(ones << at);
  return static_cast<T>((b & ~mask) | (static_cast<T>(a << at) & mask));
}
template <class T>
inline T bit_extract(T a, uint32_t at, uint32_t length) {
  constexpr uint32_t bits = sizeof(T) * 8;
  at &= 0xff, length &= 0xff;
  if (!length) return 0;
  const bool negative = std::is_signed_v<T> && (a >> std::min(at + length - 1, bits - 1) & 1);
  std::make_unsigned_t<T> r = shr(static_cast<std::make_unsigned_t<T>>(a), at);
  if (length < bits) {
    const auto ones = static_cast<std::make_unsigned_t<T>>((std::make_unsigned_t<T>(1) << length) - 1);
    r = negative ? r | ~ones : r & ones;
  }
  return static_cast<T>(r);
}
inline uint32_t reverse_bits(uint32_t v) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = select >> 4 * i & 0xf;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << 8 * i;
  }
  return r;
}
// dp4a: c + the products of four bytes each.
template <class A, class B>
uint32_t dot_of_bytes(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; i++)
    c += static_cast<uint32_t>(int{static_cast<A>(a >> 8 * i)} * int{static_cast<B>(b >> 8 * i)});
  return c;
}
inline uint32_t lookup3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  if (table & 0x01) r |= ~a & ~b & ~c;
  if (table & 0x02) r |= ~a & ~b & c;
  if (table & 0x04) r |= ~a & b & ~c;
  if (table & 0x08) r |= ~a & b & c;
  if (table & 0x10) r |= a & ~b & ~c;
  if (table & 0x20) r |= a & ~b & c;
  if (table & 0x40) r |= a & b & ~c;
  if (table & 0x80) r |= a & b & c;
  return r;
}

// ---- floating point
// A float32 operation in double, rounded downwards, upwards or towards zero. Sums and products of floats are exact or
// far finer in double than one unit of float.
inline float directed(double exact, int mode) {
  const float nearest = static_cast<float>(exact);
  const bool above = static_cast<double>(nearest) > exact, below = static_cast<double>(nearest) < exact;
  if (above && (mode == FE_DOWNWARD || (mode == FE_TOWARDZERO && exact > 0)))
    return std::nextafterf(nearest, -INFINITY);
  if (below && (mode == FE_UPWARD || (mode == FE_TOWARDZERO && exact < 0))) return std::nextafterf(nearest, INFINITY);
  return nearest;
}
// min and max give the operand that is a number.
inline float minimum(float a, float b) { return std::fmin(a, b); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline double minimum(double a, double b) { return std::fmin(a, b); }
inline double maximum(double a, double b) { return std::fmax(a, b); }
template <class T>
inline std::enable_if_t<std::is_integral_v<T>, T> minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline std::enable_if_t<std::is_integral_v<T>, T> maximum(T a, T b) {
  return a > b ? a : b;
}
// With the modifier .NaN a NaN wins.
template <class T>
inline T minimum_nan(T a, T b) {
  return std::isnan(a) ? a : std::isnan(b) ? b : minimum(a, b);
}
template <class T>
inline T maximum_nan(T a, T b) {
  return std::isnan(a) ? a : std::isnan(b) ? b : maximum(a, b);
}
// A rounded float as an integer: saturates, and NaN gives 0.
template <class T, class F>
inline T to_int(F v) {
  if (std::isnan(v)) return 0;
  const F low = std::is_signed_v<T> ? -std::ldexp(F(1), sizeof(T) * 8 - 1) : F(0);
  const F high = std::ldexp(F(1), sizeof(T) * 8 - std::is_signed_v<T>);
  if (v < low) return std::is_signed_v<T> ? static_cast<T>(std::make_unsigned_t<T>(1) << (sizeof(T) * 8 - 1)) : T(0);
  if (v >= high) return std::is_signed_v<T> ? static_cast<T>(static_cast<std::make_unsigned_t<T>>(-1) >> 1) : T(-1);
  return static_cast<T>(v);
}

}  // namespace emu

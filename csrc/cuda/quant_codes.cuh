// Codes as they lie in memory, 16 bytes at a time, and what they stand for before they are scaled.
#pragma once
#include "cuda/quant_linear.h"
#include "cuda/vec.cuh"

namespace mk::cuda {

template <QuantKind kind>
constexpr bool is_bytes = kind == QuantKind::int8 || kind == QuantKind::w8a8;
template <QuantKind kind>
constexpr bool has_offset = kind == QuantKind::int4_offset;
// Elements of 16 bytes of codes; groups are whole multiples of them.
template <QuantKind kind>
constexpr int chunk_of = is_bytes<kind> ? 16 : 32;

template <QuantKind kind>
__device__ __forceinline__ int bytes_of_row(int k) {
  return is_bytes<kind> ? k : (k + 31) / 32 * 16;
}

// Dettmers et al. 2023, appendix E.
__device__ constexpr float nf4_values[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The table in shared memory: its 16 entries lie in different banks, whatever the lanes look up.
__device__ __forceinline__ void load_nf4(float (&table)[16]) {
  if (threadIdx.x < 16) table[threadIdx.x] = nf4_values[threadIdx.x];
  __syncthreads();
}

// Up to 16 bytes that are not aligned to 16, in units that they are aligned to; zeros behind them.
template <class Unit>
__device__ __forceinline__ uint4 gather(const void* from, int bytes) {
  constexpr int per_word = 4 / sizeof(Unit);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    words[i] = 0;
#pragma unroll
    for (int j = 0; j < per_word; j++) {
      const int at = i * per_word + j;
      if (at * static_cast<int>(sizeof(Unit)) < bytes)
        words[i] |= static_cast<uint32_t>(static_cast<const Unit*>(from)[at]) << (j * 8 * sizeof(Unit));
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Eight elements of x; zeros from `end` on.
template <class T, bool kWhole>
__device__ __forceinline__ void load_eight(const T* row, int k, int end, float (&values)[8]) {
  if constexpr (kWhole) {
    load_values<T, 8>(row + k, values);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) values[e] = k + e < end ? to_float(row[k + e]) : 0.0f;
  }
}

// Byte i of a word as float32, less 2 ** 23 and `centre`: 2 ** 23 + byte has the byte in its lowest bits.
__device__ __forceinline__ float byte_value(uint32_t word, int i, float centre) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)) - (8388608.0f + centre);
}

// Elements 8 s to 8 s + 7 of 16 bytes of codes.
template <QuantKind kind>
__device__ __forceinline__ void decode(const uint4& raw, int s, const float* nf4, float (&w)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t word = words[(2 * s + i / 4) % 4];
    if constexpr (is_bytes<kind>) {
      w[i] = byte_value(word ^ 0x80808080u, i % 4, 128.0f);
    } else {
      const uint32_t low = word >> (s / 2 * 4) & 0x0f0f0f0fu;
      w[i] = kind == QuantKind::nf4 ? nf4[low >> (8 * (i % 4)) & 15] : byte_value(low, i % 4, 8.0f);
    }
  }
}

// Calls f with the kind as a type; w8a8 is an invalid value here.
template <QuantKind kind_>
struct OfKind {
  static constexpr QuantKind kind = kind_;
};
template <class F>
int with_kind(int kind, const F& f) {
  switch (static_cast<QuantKind>(kind)) {
    case QuantKind::int8:
      return f(OfKind<QuantKind::int8>{});
    case QuantKind::int4:
      return f(OfKind<QuantKind::int4>{});
    case QuantKind::int4_offset:
      return f(OfKind<QuantKind::int4_offset>{});
    case QuantKind::nf4:
      return f(OfKind<QuantKind::nf4>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Whether rows can be read 16 bytes at a time.
inline bool rows_aligned(const void* first, int64_t rows, int64_t row_bytes) {
  return aligned_to_16(first) && (rows <= 1 || row_bytes % 16 == 0);
}

}  // namespace mk::cuda

// Elements as they lie in memory, moved 16 bytes at a time where they are aligned, and their values in float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/launch.h"

namespace mk::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (__is_same(T, bf16))
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// The value of x rounded to T.
template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// Two values in one 32-bit word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (__is_same(T, bf16)) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  if constexpr (__is_same(T, bf16))
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// The compiler takes a store of computed words apart into four of 4 bytes; not so this one.
__device__ __forceinline__ void store_quad(uint4* to, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// V neighbouring elements of type T: whole groups of 16 bytes, or a single element.
template <class T, int V>
struct Pack {
  static constexpr int quads = V * sizeof(T) / 16;
  static_assert(quads * 16 == V * sizeof(T));
  uint4 bits[quads];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < quads; i++) bits[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < quads; i++) store_quad(reinterpret_cast<uint4*>(to) + i, bits[i]);
  }
  __device__ __forceinline__ void get(float (&values)[V]) const {
#pragma unroll
    for (int i = 0; i < quads; i++) {
      const uint32_t words[4] = {bits[i].x, bits[i].y, bits[i].z, bits[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (sizeof(T) == 4) {
          values[4 * i + j] = __uint_as_float(words[j]);
        } else {
          const float2 pair = unpack_pair<T>(words[j]);
          values[8 * i + 2 * j] = pair.x;
          values[8 * i + 2 * j + 1] = pair.y;
        }
      }
    }
  }
  __device__ __forceinline__ void set(const float (&values)[V]) {
#pragma unroll
    for (int i = 0; i < quads; i++) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (sizeof(T) == 4)
          words[j] = __float_as_uint(values[4 * i + j]);
        else
          words[j] = pack_pair<T>(values[8 * i + 2 * j], values[8 * i + 2 * j + 1]);
      }
      bits[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

template <class T>
struct Pack<T, 1> {
  T value;

  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void get(float (&values)[1]) const { values[0] = to_float(value); }
  __device__ __forceinline__ void set(const float (&values)[1]) { value = from_float<T>(values[0]); }
};

template <class T, int V>
__device__ __forceinline__ void load_values(const T* from, float (&values)[V]) {
  Pack<T, V> pack;
  pack.load(from);
  pack.get(values);
}

template <class T, int V>
__device__ __forceinline__ void store_values(T* to, const float (&values)[V]) {
  Pack<T, V> pack;
  pack.set(values);
  pack.store(to);
}

// Offset of a row, in elements.
__device__ __forceinline__ int64_t row_offset(int64_t row, const RowSizes& sizes, const RowStrides& strides) {
  if (sizes.depth == 1) return row * strides.stride[0];
  const int64_t last = row % sizes.size2, rest = row / sizes.size2;
  if (sizes.depth == 2) return rest * strides.stride[0] + last * strides.stride[1];
  return rest / sizes.size1 * strides.stride[0] + rest % sizes.size1 * strides.stride[1] + last * strides.stride[2];
}

// Whether rows that start at `pointer` plus multiples of the strides can be read 16 bytes at a time.
inline bool aligned_to_16(const void* pointer, const RowSizes& sizes, const RowStrides& strides, int bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  for (int i = 0; i < sizes.depth; i++) aligned = aligned && strides.stride[i] * bytes % 16 == 0;
  return aligned;
}

inline bool aligned_to_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int size_of(int dtype) { return dtype == static_cast<int>(Dtype::f32) ? 4 : 2; }

// Calls f with a null pointer to the dtype's type; another dtype is an invalid value.
template <class F>
int with_type(int dtype, const F& f) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<f16*>(nullptr));
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mk::cuda

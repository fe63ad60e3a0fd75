// Tensors as the copy engine takes them: maps made by the driver.
#pragma once
#include <climits>
#include <cstdlib>

#include "cuda/hopper_attention.h"

namespace mk::cuda {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function that makes tensor maps, found at run time: nothing is linked with the driver.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

// MISTRAL_KERNELS_HOPPER=0 has the kernels for all devices run here too, to compare them.
inline bool is_hopper() {
  static const bool wanted = [] {
    const char* said = std::getenv("MISTRAL_KERNELS_HOPPER");
    return !said || *said != '0';
  }();
  int device = 0, major = 0, minor = 0;
  return wanted && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

// A tensor and its boxes, the dimension of stride 1 first.
struct Boxes {
  static constexpr int most = 5;
  const void* data;
  int rank;
  int64_t size[most], stride[most];  // in elements; the stride of a dimension of size 1 has no meaning
  int box[most];

  bool fit() const {
    for (int d = 0; d < rank; d++) {
      if (size[d] < 1 || size[d] > INT_MAX) return false;
      // Rows that overlap, expanded tensors among them, are not what the documentation allows.
      if (d && size[d] > 1 && (stride[d] < size[0] || stride[d] >= int64_t{1} << 38)) return false;
    }
    return true;
  }
  int encode(CUtensorMap* map, int dtype) const {
    cuuint64_t sizes[most], strides[most];
    cuuint32_t boxes[most], steps[most];
    for (int d = 0; d < rank; d++) {
      sizes[d] = size[d], boxes[d] = box[d], steps[d] = 1;
      if (d) strides[d - 1] = 2 * (size[d] > 1 ? stride[d] : size[0]);
    }
    const bool is_bf16 = dtype == static_cast<int>(Dtype::bf16);
    const CUresult result = encode_tiled()(
        map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank,
        const_cast<void*>(data), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
  }
};

// [sequence, group of heads, query, head of the group, column], `packed` heads a group.
template <class A>
Boxes boxes_of_queries(const A& a, const AttentionTokens& t, int packed, int box) {
  const int64_t rows = a.cu_q ? a.tokens : a.max_q, sequences = a.cu_q ? 1 : a.sequences;
  return {t.data,
          5,
          {a.dim, packed, rows, a.heads / packed, sequences},
          {1, t.head, t.row, t.head * packed, t.batch},
          {64, packed, box, 1, 1}};
}

// [sequence, head, key, column]
template <class A>
Boxes boxes_of_keys(const A& a, const AttentionTokens& t, int64_t rows, int64_t sequences) {
  const int box = a.dim > 128 ? hopper_key_rows<256> : hopper_key_rows<128>;
  return {t.data, 4, {a.dim, rows, a.kv_heads, sequences}, {1, t.row, t.head, t.batch}, {64, box, 1, 1}};
}

}  // namespace mk::cuda

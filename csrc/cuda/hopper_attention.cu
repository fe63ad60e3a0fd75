#include <climits>

#include "cuda/attention_forward.cuh"
#include "cuda/hopper_attention.h"

namespace mk::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function that makes tensor maps, found at run time: nothing is linked with the driver.
EncodeTiled encode_tiled() {
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

bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
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

// Heads of a group of up to this many can share a tile of 64 rows.
constexpr int most_packed_heads = 64;

int packed_heads(const Attention& a) {
  const int packed = packed_heads_of(a);
  return packed <= most_packed_heads ? packed : 1;
}
int tile_queries(const Attention& a) { return 64 / packed_heads(a); }
int consumers(const Attention& a) { return a.max_q <= tile_queries(a) ? 1 : 2; }
int64_t tiles(const Attention& a) {
  const int64_t queries = consumers(a) * tile_queries(a);
  return (a.max_q + queries - 1) / queries;
}
int64_t blocks(const Attention& a) { return tiles(a) * a.splits * (a.heads / packed_heads(a)) * a.sequences; }

// [sequence, group of heads, query, head of the group, column]
Boxes of_queries(const Attention& a) {
  const int packed = packed_heads(a);
  const int64_t rows = a.cu_q ? a.tokens : a.max_q, sequences = a.cu_q ? 1 : a.sequences;
  return {a.q.data,
          5,
          {a.dim, packed, rows, a.heads / packed, sequences},
          {1, a.q.head, a.q.row, a.q.head * packed, a.q.batch},
          {64, packed, tile_queries(a), 1, 1}};
}

// [sequence, head, key, column]
Boxes of_keys(const Attention& a, const AttentionTokens& t, int64_t rows, int64_t sequences) {
  const int box = a.dim > 128 ? hopper_key_rows<256> : hopper_key_rows<128>;
  return {t.data, 4, {a.dim, rows, a.kv_heads, sequences}, {1, t.row, t.head, t.batch}, {64, box, 1, 1}};
}
Boxes of_chunk(const Attention& a, const AttentionTokens& t) {
  return of_keys(a, t, a.cu_k ? a.key_tokens : a.max_k, a.cu_k ? 1 : a.sequences);
}
Boxes of_ring(const Attention& a, const AttentionTokens& t) { return of_keys(a, t, a.slots, a.sequences); }

}  // namespace

bool hopper_applies(const Attention& a) {
  if (a.dtype == static_cast<int>(Dtype::f32) || a.dim > 256 || a.max_q < 1 || a.sequences < 1) return false;
  if (!is_hopper() || !encode_tiled() || blocks(a) > INT_MAX / 2 || !of_queries(a).fit()) return false;
  if (a.k.data && !(of_chunk(a, a.k).fit() && of_chunk(a, a.v).fit())) return false;
  if (a.ring_lens && !(of_ring(a, a.k_ring).fit() && of_ring(a, a.v_ring).fit())) return false;
  return a.k.data || a.ring_lens;
}

int hopper_splits(const Attention& a) {
  if (a.max_q > few_queries) return 1;
  int64_t keys = (a.ring_lens ? a.slots : 0) + static_cast<int64_t>(a.max_k);
  if (a.window && a.causal && keys > a.window + a.max_q) keys = a.window + a.max_q;
  // A block a multiprocessor; a split is worth its overhead from some two blocks of 128 keys on.
  const int64_t wanted = mk_cuda_multiprocessors() / blocks(a), most = keys / 256;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits > 64 ? 64 : static_cast<int>(splits);
}

int hopper_attention(const Attention& a, cudaStream_t stream) {
  HopperForward f = {};
  f.a = a;
  f.packed_heads = packed_heads(a), f.tile_queries = tile_queries(a);
  f.tiles = static_cast<int>(tiles(a)), f.blocks = static_cast<int>(blocks(a));
  f.exponent_scale = exponent_scale(a.scale);
  int status = of_queries(a).encode(&f.q, a.dtype);
  if (!status && a.k.data) status = of_chunk(a, a.k).encode(&f.k, a.dtype);
  if (!status && a.k.data) status = of_chunk(a, a.v).encode(&f.v, a.dtype);
  if (!status && a.ring_lens) status = of_ring(a, a.k_ring).encode(&f.k_ring, a.dtype);
  if (!status && a.ring_lens) status = of_ring(a, a.v_ring).encode(&f.v_ring, a.dtype);
  if (status) return status;
  return a.dtype == static_cast<int>(Dtype::bf16) ? hopper_forward_bf16(f, consumers(a), stream)
                                                  : hopper_forward_f16(f, consumers(a), stream);
}

}  // namespace mk::cuda

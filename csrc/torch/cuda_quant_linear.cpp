// mistral_kernels::linear_int8, _w8a8, _int4 and _nf4 on a GPU.
#include "cuda/quant_linear.h"
#include "torch/cuda_device.h"
#include "torch/quant_linear.h"

namespace mk {
namespace {

constexpr int64_t most = INT32_MAX;     // elements of a row, and rows of codes
constexpr int64_t most_int8 = 1 << 17;  // products of int8 whose sum an int32 holds

cuda::QuantKind kind_of(Scheme scheme, bool offset) {
  switch (scheme) {
    case Scheme::int8:
      return cuda::QuantKind::int8;
    case Scheme::w8a8:
      return cuda::QuantKind::w8a8;
    case Scheme::nf4:
      return cuda::QuantKind::nf4;
    default:
      return offset ? cuda::QuantKind::int4_offset : cuda::QuantKind::int4;
  }
}

// x in int8, its rows padded to whole chunks; the memory is float32's, which there is a way to ask for.
struct RoundedRows {
  Tensor codes, scale;

  RoundedRows(const Device& device, cuda::QuantLinear& a, const Tensor& x)
      : codes(device_empty({a.m, padded(a.k) / 4}, Dtype::f32, x)), scale(device_empty({a.m}, Dtype::f32, x)) {
    auto* to = static_cast<int8_t*>(device_mutable_data(codes));
    auto* scales = static_cast<float*>(device_mutable_data(scale));
    const cuda::QuantRound r{a.x, to, scales, a.x_row, padded(a.k), a.m, a.k, a.dtype};
    check_launch(mk_cuda_quant_round(r, device.stream()), "linear_w8a8");
    a.x = to, a.x_row = r.padded, a.x_scale = scales;
  }
  static int64_t padded(int64_t k) { return k ? (k + 15) / 16 * 16 : 16; }
};

void launch(const Device& device, const cuda::QuantLinear& a, const char* op) {
  const bool few = a.m <= cuda::quant_few_rows;
  check_launch(few ? mk_cuda_quant_few(a, device.stream()) : mk_cuda_quant_tiles(a, device.stream()), op);
}

Tensor run(Scheme scheme, const char* op, const Tensor& x_in, const Tensor& codes_in, const Tensor& scale_in,
           const Maybe& offset_in, const Maybe& bias_in, int64_t group) {
  check_quantised(scheme, x_in, codes_in, scale_in, offset_in, bias_in, group);
  const Device device(x_in);
  const int64_t k = x_in.size(-1), n = codes_in.size(0), dims = x_in.dim();
  STD_TORCH_CHECK(n <= most && k <= (scheme == Scheme::w8a8 ? most_int8 : most), op, ": [", n, ", ", k,
                  "] codes are too many");
  STD_TORCH_CHECK(dims <= max_dims, "x has ", dims, " dimensions; at most ", max_dims, " are supported");
  const Tensor codes = unit_stride(codes_in), scale = contiguous(scale_in);
  const Maybe offset = offset_in ? Maybe(contiguous(*offset_in)) : std::nullopt;
  const Maybe bias = bias_in ? Maybe(contiguous(*bias_in)) : std::nullopt;
  Tensor x = unit_stride(x_in);
  if (Rows<1>({&x}, 1).runs() > 1) x = contiguous(x);
  const Rows<1> rows({&x}, 1);
  int64_t sizes[max_dims];
  for (int64_t d = 0; d < dims; d++) sizes[d] = d + 1 < dims ? x.size(d) : n;
  const Tensor y = device_empty({sizes, static_cast<size_t>(dims)}, dtype_of(x), x);
  if (!y.numel()) return y;
  cuda::QuantLinear a = {};
  a.x = device_data(x), a.codes = static_cast<const uint8_t*>(device_data(codes));
  a.scale = static_cast<const float*>(device_data(scale));
  if (offset) a.offset = static_cast<const float*>(device_data(*offset));
  if (bias) a.bias = device_data(*bias);
  a.y = device_mutable_data(y);
  a.m = rows.count(), a.n = static_cast<int>(n), a.k = static_cast<int>(k);
  a.x_row = a.m > 1 ? rows.stride(0) : 0, a.code_row = codes.stride(0);
  a.groups = static_cast<int>(scale.size(1)), a.group = group < k ? static_cast<int>(group) : 0;
  a.kind = static_cast<int>(kind_of(scheme, offset.has_value())), a.dtype = dtype_index(x);
  if (scheme == Scheme::w8a8) {
    const RoundedRows rounded(device, a, x);
    launch(device, a, op);
  } else {
    launch(device, a, op);
  }
  return y;
}

Tensor linear_int8_cuda(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group) {
  return run(Scheme::int8, "linear_int8", x, codes, scale, std::nullopt, bias, group);
}

Tensor linear_w8a8_cuda(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group) {
  return run(Scheme::w8a8, "linear_w8a8", x, codes, scale, std::nullopt, bias, group);
}

Tensor linear_int4_cuda(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe offset, Maybe bias,
                        int64_t group) {
  return run(Scheme::int4, "linear_int4", x, codes, scale, offset, bias, group);
}

Tensor linear_nf4_cuda(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group) {
  return run(Scheme::nf4, "linear_nf4", x, codes, scale, std::nullopt, bias, group);
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, MK_CUDA_KEY, m) {
  m.impl("linear_int8_cuda", mk::boxed<&mk::linear_int8_cuda>);
  m.impl("linear_w8a8_cuda", mk::boxed<&mk::linear_w8a8_cuda>);
  m.impl("linear_int4_cuda", mk::boxed<&mk::linear_int4_cuda>);
  m.impl("linear_nf4_cuda", mk::boxed<&mk::linear_nf4_cuda>);
}

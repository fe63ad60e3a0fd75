// mistral_kernels::linear_int8, _w8a8, _int4 and _nf4 on a CPU: few rows by a pass over the codes, many by torch's
// matrix product on the dequantised weight; with int8 activations any number of rows by products of int8.
#include "torch/quant_linear.h"

#include <algorithm>
#include <cmath>

#include "cpu/int8_product.h"
#include "cpu/quant_linear.h"
#include "torch/products.h"
#include "torch/work.h"

namespace mk {
namespace {

// Of the codes, what keeps a thread busy for some microseconds.
constexpr int64_t grain_bytes = int64_t{1} << 16;
// From so many rows on it pays to pack an int8 weight for a product with int8 rows.
constexpr int64_t many_int8_rows = 32;

struct Call {
  Tensor x;
  const Tensor &codes, &scale;
  const Maybe &offset, &bias;
  QuantWeight weight;
  Dtype dtype;
  int64_t rows, x_row;
};

// ---- float64: for gradcheck, without any speed ----

double scale_at(const Tensor& t, int64_t i) {
  return dtype_of(t) == Dtype::f64 ? reinterpret_cast<const double*>(data(t))[i]
                                   : static_cast<double>(reinterpret_cast<const float*>(data(t))[i]);
}

double code_at(Scheme scheme, const uint8_t* row, int64_t k) {
  static constexpr float nf4[] = {-1.f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.f};
  if (in_bytes(scheme)) return static_cast<int8_t>(row[k]);
  const int code = row[k / 32 * 16 + k % 16] >> (k / 16 % 2 * 4) & 15;
  return scheme == Scheme::int4 ? code - 8 : static_cast<double>(nf4[code]);
}

Tensor weight_in_float64(Scheme scheme, const Call& c) {
  const QuantWeight& w = c.weight;
  Tensor out = empty({w.n, w.k}, Dtype::f64);
  auto* to = reinterpret_cast<double*>(mutable_data(out));
  for (int64_t n = 0; n < w.n; n++)
    for (int64_t k = 0; k < w.k; k++) {
      const int64_t g = n * w.groups + k / w.group;
      to[n * w.k + k] = code_at(scheme, w.codes + n * w.row, k) * scale_at(c.scale, g);
      if (c.offset) to[n * w.k + k] += scale_at(*c.offset, g);
    }
  return out;
}

// x as its rounded rows stand for it.
Tensor rounded_in_float64(const Call& c) {
  Tensor out = empty({c.rows, c.weight.k}, Dtype::f64);
  auto* to = reinterpret_cast<double*>(mutable_data(out));
  for (int64_t i = 0; i < c.rows; i++) {
    const double* from = reinterpret_cast<const double*>(data(c.x)) + i * c.x_row;
    double most = 0;
    for (int64_t k = 0; k < c.weight.k; k++) most = std::isnan(from[k]) ? from[k] : std::fmax(most, std::fabs(from[k]));
    const double scale = most / 127;
    for (int64_t k = 0; k < c.weight.k; k++)
      to[i * c.weight.k + k] = scale > 0 ? std::nearbyint(from[k] / scale) * scale : scale;
  }
  return out;
}

// ---- the kernels ----

// `whole`: a thread's share is not cut into pieces with which others could help, since each begins with packing.
template <class F>
void share_outputs(const Call& c, int64_t bytes_of_row, void* out, bool whole, const F& run) {
  const Tensor along = c.bias ? contiguous(*c.bias) : c.x;
  const int64_t n = c.weight.n, groups = (n + quant_group - 1) / quant_group;
  const int64_t grain = std::max<int64_t>(1, grain_bytes / std::max<int64_t>(1, quant_group * bytes_of_row));
  const auto some = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * quant_group, count = std::min(end * quant_group, n) - first;
    run(QuantShare{c.bias ? data(along) : nullptr, out, n, first, count});
  };
  whole ? in_parallel(groups, grain, some) : in_long_pieces(groups, grain, some);
}

bool are_few(const Call& c) {
  return c.rows <= (c.dtype == Dtype::f32 ? few_quant_rows : pick(quant_linear_tiers).few_rows(c.weight));
}

// False where more rows than vectors are quick with hold something that int16 cannot.
bool multiply_rows(const Call& c, void* out) {
  thread_local Memory memory;
  const auto& kernels = pick(quant_linear_tiers);
  const int at = static_cast<int>(c.dtype);
  QuantRows rows{data(c.x), c.x_row, c.rows, memory.at_least(kernels.prepared_bytes(c.weight, c.rows)),
                 c.dtype != Dtype::f32 && c.weight.kind != Codes::nf4};
  if (!kernels.prepare[at](c.weight, rows) && rows.fixed) {
    if (c.rows > few_quant_rows) return false;
    rows.fixed = false;
    kernels.prepare[at](c.weight, rows);
  }
  share_outputs(c, c.weight.row, out, false, [&](const QuantShare& share) { kernels.run[at](c.weight, rows, share); });
  return true;
}

Tensor multiply_dequantised(const Call& c, const Tensor& x) {
  x.needs_torch();
  const auto dequantise = pick(quant_linear_tiers).dequantise[static_cast<int>(c.dtype)];
  const Tensor weight = empty({c.weight.n, c.weight.k}, c.dtype);
  in_parallel(c.weight.n, grain_rows(c.weight.k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      dequantise(c.weight, n, mutable_data(weight) + n * c.weight.k * size_of(c.dtype));
  });
  return torch_linear(x, weight, c.bias);
}

void multiply_int8(const Call& c, void* out) {
  thread_local Memory memory;
  const auto& kernels = pick(int8_product_tiers);
  const int at = static_cast<int>(c.dtype);
  const bool many = c.rows >= many_int8_rows && c.weight.k <= int64_t{1} << 17;
  const auto quantise = many ? kernels.quantise_row_of_many[at] : kernels.quantise_row[at];
  const int64_t codes_in_row = (c.weight.k + int8_row_unit - 1) / int8_row_unit * int8_row_unit;
  // Of many rows, those that are multiplied at once must not all fall into the same few lines of the caches.
  const int64_t row = many ? codes_in_row * kernels.many_code_bytes + 64 : codes_in_row;
  auto* codes = reinterpret_cast<uint8_t*>(memory.at_least(c.rows * (row + sizeof(float)) + 64));
  auto* scales = reinterpret_cast<float*>(codes + c.rows * row);
  in_parallel(c.rows, grain_rows(c.weight.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      quantise(data(c.x) + i * c.x_row * size_of(c.dtype), c.weight.k, codes + i * row, scales + i);
  });
  share_outputs(c, c.weight.row * c.rows, out, true, [&](const QuantShare& share) {
    const Int8Product product{codes, scales, row, c.rows, &c.weight, share};
    if (!many) return kernels.multiply[at](product);
    thread_local Memory panels;
    kernels.multiply_many[at](product, panels.at_least(kernels.many_memory));
  });
}

Tensor run(Scheme scheme, const Tensor& x_in, const Tensor& codes_in, const Tensor& scale_in, const Maybe& offset_in,
           const Maybe& bias, int64_t group) {
  check_quantised(scheme, x_in, codes_in, scale_in, offset_in, bias, group);
  const Tensor codes = unit_stride(codes_in), scale = contiguous(scale_in);
  const Maybe offset = offset_in ? Maybe(contiguous(*offset_in)) : std::nullopt;
  const int64_t k = x_in.size(-1), n = codes.size(0), dims = x_in.dim();
  const Dtype dtype = dtype_of(x_in);
  Tensor x = unit_stride(x_in);
  if (dims > max_dims || Rows<1>({&x}, 1).runs() > 1) x = contiguous(x);
  STD_TORCH_CHECK(dims <= max_dims, "x has ", dims, " dimensions; at most ", max_dims, " are supported");
  int64_t sizes[max_dims], rows = 1;
  for (int64_t d = 0; d < dims; d++) sizes[d] = d + 1 < dims ? x.size(d) : n;
  for (int64_t d = 0; d + 1 < dims; d++) rows *= x.size(d);
  const Codes kind = scheme == Scheme::int4 ? Codes::int4 : scheme == Scheme::nf4 ? Codes::nf4 : Codes::int8;
  const bool grouped = group && group < k;
  const QuantWeight weight{kind,
                           reinterpret_cast<const uint8_t*>(data(codes)),
                           codes.stride(0),
                           dtype == Dtype::f64 ? nullptr : reinterpret_cast<const float*>(data(scale)),
                           dtype == Dtype::f64 || !offset ? nullptr : reinterpret_cast<const float*>(data(*offset)),
                           scale.size(1),
                           grouped ? group : int64_t{1} << 40,
                           n,
                           k};
  const Call c{x, codes, scale, offset, bias, weight, dtype, rows, rows > 1 ? Rows<1>({&x}, 1).stride(0) : 0};
  if (dtype == Dtype::f64) {
    x.needs_torch();
    const Tensor flat = scheme == Scheme::w8a8 ? Tensor(torch::stable::reshape(rounded_in_float64(c), x.sizes())) : x;
    return torch_linear(flat, weight_in_float64(scheme, c), bias);
  }
  if (scheme != Scheme::w8a8 && !are_few(c)) return multiply_dequantised(c, x);
  Tensor out = empty({sizes, static_cast<size_t>(dims)}, dtype);
  if (!out.numel()) return out;
  if (scheme == Scheme::w8a8)
    multiply_int8(c, mutable_data(out));
  else if (!multiply_rows(c, mutable_data(out)))
    return multiply_dequantised(c, x);
  return out;
}

}  // namespace

Tensor linear_int8(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group) {
  return run(Scheme::int8, x, codes, scale, std::nullopt, bias, group);
}

Tensor linear_w8a8(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group) {
  return run(Scheme::w8a8, x, codes, scale, std::nullopt, bias, group);
}

Tensor linear_int4(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe offset, Maybe bias, int64_t group) {
  return run(Scheme::int4, x, codes, scale, offset, bias, group);
}

Tensor linear_nf4(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group) {
  return run(Scheme::nf4, x, codes, scale, std::nullopt, bias, group);
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::linear_int8>(m, "linear_int8");
  mk::implement<&mk::linear_w8a8>(m, "linear_w8a8");
  mk::implement<&mk::linear_int4>(m, "linear_int4");
  mk::implement<&mk::linear_nf4>(m, "linear_nf4");
}

// mistral_kernels::rms_norm, add_rms_norm and their gradients on a GPU.
#include "cuda/rms_norm.h"
#include "torch/cuda_device.h"

namespace mk {
namespace {

struct Outputs {
  Tensor y, rstd;
};

// residual and total are null for the norm alone.
Outputs run(const Device& device, Tensor x, const Tensor* residual_in, const Tensor& weight, double eps, bool model,
            Tensor* total) {
  const Dtype dtype = dtype_of(x), product = dtype_of(weight);
  const int64_t n = x.size(x.dim() - 1);
  STD_TORCH_CHECK(product == dtype || product == Dtype::f32, "weight must have x's dtype, or be float32");
  Tensor residual = residual_in ? *residual_in : x;
  Outputs out{device_empty(x.sizes(), product, x),
              device_empty({x.sizes().data(), static_cast<size_t>(x.dim() - 1)}, Dtype::f32, x)};
  if (!out.rstd.numel()) return out;
  if (!LaunchRows<2>({&x, &residual}, 1).fits) {
    x = contiguous(x);
    residual = contiguous(residual);
  }
  const LaunchRows<2> rows({&x, &residual}, 1);
  cuda::RmsNorm a = {};
  a.x = device_data(x);
  a.residual = residual_in ? device_data(residual) : nullptr;
  a.weight = device_data(weight);
  a.y = device_mutable_data(out.y);
  a.total = total ? device_mutable_data(*total) : nullptr;
  a.rstd = static_cast<float*>(device_mutable_data(out.rstd));
  a.sizes = rows.sizes, a.x_rows = rows.strides[0], a.residual_rows = rows.strides[1];
  a.n = n, a.inverse_n = 1.0 / static_cast<double>(n), a.eps = eps;
  a.dtype = static_cast<int>(dtype), a.weight_dtype = static_cast<int>(product);
  a.model_rounding = model;
  check_launch(mk_cuda_rms_norm(a, device.stream()), "rms_norm");
  return out;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool model) {
  const Device device(x);
  const Outputs out = run(device, unit_stride(x), nullptr, unit_stride(weight), eps, model, nullptr);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual_in, const Tensor& weight,
                                                double eps, bool model) {
  const Device device(x);
  const Tensor residual = unit_stride(residual_in);
  Tensor total = device_empty(x.sizes(), dtype_of(x), x);
  const Outputs out = run(device, unit_stride(x), &residual, unit_stride(weight), eps, model, &total);
  return {out.y, total, out.rstd};
}

// dtotal is null for the norm alone.
std::tuple<Tensor, Tensor> run_backward(const Tensor& dy_in, const Tensor* dtotal_in, const Tensor& x_in,
                                        const Tensor& weight_in, const Tensor& rstd_in, bool model) {
  const Device device(x_in);
  Tensor dy = unit_stride(dy_in), x = unit_stride(x_in), dtotal = dtotal_in ? unit_stride(*dtotal_in) : x;
  const Tensor weight = unit_stride(weight_in), rstd = contiguous(rstd_in);
  STD_TORCH_CHECK(dtype_of(dy) == dtype_of(weight), "dy must have the weight's dtype");
  STD_TORCH_CHECK(dtype_of(dtotal) == dtype_of(x), "dtotal must have the total's dtype");
  const int64_t n = x.size(x.dim() - 1);
  Tensor dx = device_empty(x.sizes(), dtype_of(x), x), dweight = device_empty(weight.sizes(), dtype_of(weight), x);
  if (!x.numel()) return {dx, torch::stable::zero_(dweight)};
  if (!LaunchRows<3>({&dy, &x, &dtotal}, 1).fits) {
    dy = contiguous(dy);
    x = contiguous(x);
    dtotal = contiguous(dtotal);
  }
  const LaunchRows<3> rows({&dy, &x, &dtotal}, 1);
  const int64_t groups = mk_cuda_rms_norm_groups(rows.sizes.rows, n);
  const Tensor partials = device_empty({groups, n}, Dtype::f32, x);
  cuda::RmsNormBackward a = {};
  a.dtotal = dtotal_in ? device_data(dtotal) : nullptr;
  a.dy = device_data(dy), a.x = device_data(x), a.weight = device_data(weight);
  a.rstd = static_cast<const float*>(device_data(rstd));
  a.dx = device_mutable_data(dx), a.dweight = device_mutable_data(dweight);
  a.partials = static_cast<float*>(device_mutable_data(partials));
  a.sizes = rows.sizes, a.dy_rows = rows.strides[0], a.x_rows = rows.strides[1], a.dtotal_rows = rows.strides[2];
  a.n = n, a.groups = groups, a.inverse_n = 1.0 / static_cast<double>(n);
  a.dtype = dtype_index(x), a.weight_dtype = dtype_index(weight);
  a.model_rounding = model;
  check_launch(mk_cuda_rms_norm_backward(a, device.stream()), "rms_norm_backward");
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, bool model) {
  return run_backward(dy, nullptr, x, weight, rstd, model);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const Tensor& dtotal, const Tensor& total,
                                                 const Tensor& weight, const Tensor& rstd, bool model) {
  return run_backward(dy, &dtotal, total, weight, rstd, model);
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, MK_CUDA_KEY, m) {
  m.impl("rms_norm_cuda", mk::boxed<&mk::rms_norm>);
  m.impl("add_rms_norm_cuda", mk::boxed<&mk::add_rms_norm>);
  m.impl("rms_norm_backward_cuda", mk::boxed<&mk::rms_norm_backward>);
  m.impl("add_rms_norm_backward_cuda", mk::boxed<&mk::add_rms_norm_backward>);
}

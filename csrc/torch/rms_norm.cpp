// mistral_kernels::rms_norm and add_rms_norm on a CPU.
#include "cpu/rms_norm.h"

#include "torch/ops.h"
#include "torch/traffic.h"
#include "torch/work.h"

namespace mk {
namespace {

struct Outputs {
  Tensor y, rstd;
};

// residual and total are null for the norm alone; total and y are as wide as x and as the weight.
Outputs run(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, bool model, Tensor* total) {
  on_cpu({&x, &weight});
  const Dtype dtype = dtype_of(x), product = dtype_of(weight);
  const int64_t dims = x.dim(), n = dims ? x.size(dims - 1) : 0;
  STD_TORCH_CHECK(product == dtype || (product == Dtype::f32 && dtype != Dtype::f64),
                  "weight must have x's dtype, or be float32 where x has 16 bits");
  STD_TORCH_CHECK(dims && weight.numel() == n && weight.dim() == 1, "x must be [..., N] and weight [N]");
  Outputs out{empty(x.sizes(), product), empty({x.sizes().data(), static_cast<size_t>(dims - 1)}, wide(dtype))};
  if (!out.rstd.numel()) return out;
  const Rows<2> rows({&x, residual ? residual : &x}, 1);
  const int64_t size = size_of(dtype), y_size = size_of(product), rstd_size = size_of(wide(dtype));
  const auto kernel = pick(rms_norm_tiers).run[static_cast<int>(dtype)][product != dtype][model][residual != nullptr];
  const char *from = data(x), *add = residual ? data(*residual) : nullptr, *by = data(weight);
  char *y = mutable_data(out.y), *rstd = mutable_data(out.rstd), *sum = total ? mutable_data(*total) : nullptr;
  const bool past = past_caches(rows.count() * n * y_size, y, sum, n * size, n * y_size);
  in_pieces(rows.count(), grain_rows(n), [&](int64_t begin, int64_t end, int64_t after) {
    rows.each(begin, end, [&](int64_t first, int64_t count, const int64_t* at) {
      kernel({from + at[0] * size, add ? add + at[1] * size : nullptr, by, rows.stride(0), rows.stride(1),
              y + first * n * y_size, sum ? sum + first * n * size : nullptr, rstd + first * rstd_size, count, n,
              end + after - first - count, eps, past});
    });
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool model) {
  const Outputs out = run(unit_stride(x), nullptr, unit_stride(weight), eps, model, nullptr);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_in, const Tensor& residual_in, const Tensor& weight,
                                                double eps, bool model) {
  const Tensor x = unit_stride(x_in), residual = unit_stride(residual_in);
  on_cpu({&residual});
  STD_TORCH_CHECK(dtype_of(residual) == dtype_of(x) && same_shape(x, residual),
                  "x and residual must be of one shape and dtype");
  Tensor total = empty(x.sizes(), dtype_of(x));
  const Outputs out = run(x, &residual, unit_stride(weight), eps, model, &total);
  return {out.y, total, out.rstd};
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::rms_norm>(m, "rms_norm");
  mk::implement<&mk::add_rms_norm>(m, "add_rms_norm");
}

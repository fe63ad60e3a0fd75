// mistral_kernels::rms_norm_backward and add_rms_norm_backward on a CPU.
#include "cpu/rms_norm_backward.h"

#include <algorithm>
#include <vector>

#include "torch/binding.h"
#include "torch/traffic.h"
#include "torch/work.h"

namespace mk {
namespace {

// Rows whose part of dweight is summed by one task. The shape alone decides, so results do not depend on the threads.
int64_t rows_of_part(int64_t rows) { return std::max<int64_t>(64, (rows + 1023) / 1024 * 16); }

void check(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  const Dtype dtype = dtype_of(x), product = dtype_of(weight);
  STD_TORCH_CHECK(product == dtype || (product == Dtype::f32 && dtype != Dtype::f64),
                  "weight must have x's dtype, or be float32 where x has 16 bits");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.numel() == x.size(-1), "weight must be [", x.size(-1),
                  "]");
  STD_TORCH_CHECK(dtype_of(dy) == product && dy.dim() == x.dim() && dy.numel() == x.numel(),
                  "dy must have x's shape and the weight's dtype");
  STD_TORCH_CHECK(dtype_of(rstd) == wide(dtype) && rstd.numel() * x.size(-1) == x.numel(), "rstd must hold one a row");
}

// dtotal is null for the norm alone.
std::tuple<Tensor, Tensor> run(const Tensor& dy, const Tensor* dtotal, const Tensor& x, const Tensor& weight,
                               const Tensor& rstd, bool model) {
  check(dy, x, weight, rstd);
  const Dtype dtype = dtype_of(x), product = dtype_of(weight), sums = wide(dtype);
  const int64_t n = x.size(-1), size = size_of(dtype), sum_size = size_of(sums);
  const Rows<3> rows({&x, &dy, dtotal ? dtotal : &x}, 1);
  const int64_t count = n ? rows.count() : 0, part = rows_of_part(count), parts = (count + part - 1) / part;
  Tensor dx = empty(x.sizes(), dtype), dweight = empty({n}, product), partials = empty({parts, n}, sums);
  const RmsNormBackwardKernels& kernels = pick(rms_norm_backward_tiers);
  const auto kernel = kernels.run[static_cast<int>(dtype)][product != dtype][model][dtotal != nullptr];
  const char *dy_data = data(dy), *dt_data = dtotal ? data(*dtotal) : nullptr, *x_data = data(x), *by = data(weight);
  const char* rstd_data = data(rstd);
  char *dx_data = mutable_data(dx), *sum_data = mutable_data(partials);
  const bool past = past_caches(count * n * size, dx_data, n * size);
  in_pieces(parts, std::max<int64_t>(1, grain_rows(n) / part), [&](int64_t begin, int64_t end, int64_t after) {
    std::vector<char> block(n * sum_size);
    for (int64_t p = begin; p < end; p++) {
      const int64_t start = p * part, stop = std::min(count, start + part);
      rows.each(start, stop, [&](int64_t first, int64_t some, const int64_t* at) {
        kernel({dy_data + at[1] * size_of(product), dt_data ? dt_data + at[2] * size : nullptr, x_data + at[0] * size,
                by, rstd_data + first * sum_size, rows.stride(1), rows.stride(2), rows.stride(0),
                dx_data + first * n * size, sum_data + p * n * sum_size, block.data(), some, n, first - start,
                stop - start, std::min(count, (end + after) * part) - first - some, past});
      });
    }
  });
  const auto join = kernels.join[static_cast<int>(dtype)][product != dtype];
  const char* from = data(partials);
  char* to = mutable_data(dweight);
  in_parallel((n + 63) / 64, std::max<int64_t>(1, grain_rows(parts) / 64), [&](int64_t begin, int64_t end) {
    join(from, parts, n, 64 * begin, std::min(n, 64 * end) - 64 * begin, to);
  });
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, bool model) {
  return run(unit_stride(dy), nullptr, unit_stride(x), unit_stride(weight), contiguous(rstd), model);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const Tensor& dtotal_in, const Tensor& total,
                                                 const Tensor& weight, const Tensor& rstd, bool model) {
  const Tensor dtotal = unit_stride(dtotal_in);
  STD_TORCH_CHECK(dtype_of(dtotal) == dtype_of(total) && dtotal.dim() == total.dim() && dtotal.numel() == total.numel(),
                  "dtotal must have total's shape and dtype");
  return run(unit_stride(dy), &dtotal, unit_stride(total), unit_stride(weight), contiguous(rstd), model);
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::rms_norm_backward>(m, "rms_norm_backward");
  mk::implement<&mk::add_rms_norm_backward>(m, "add_rms_norm_backward");
}

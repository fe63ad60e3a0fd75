// mistral_kernels::linear on a CPU: few rows here, more by torch's matrix product; of 16 bits by that of float32 where
// the processor multiplies no others.
#include "cpu/linear.h"

#include <algorithm>

#include "torch/products.h"
#include "torch/work.h"

namespace mk {
namespace {

// Of the weight, what keeps a thread busy for some microseconds.
constexpr int64_t grain_bytes = int64_t{1} << 16;

bool readable(const Tensor& weight) { return weight.stride(1) == 1 || weight.size(1) == 1; }

using Kernel = void (*)(const LinearRows&);

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) rows *= x.size(d);
  return rows;
}

// Elements of the weight that are widened at a time, and most results: 16 MiB each.
constexpr int64_t block_elements = int64_t{1} << 22;

// Whether torch's products of the dtype are slower than float32's: without such instructions they are scalar. [512,
// 576] by [1536, 576] on one thread of a Zen 3: 8 GFLOP/s in bfloat16, 41 with the conversions.
bool widened(Dtype dtype) {
#if MK_X86
  if (dtype == Dtype::bf16) return &pick(linear_tiers) == linear_tiers[0] || &pick(linear_tiers) == linear_tiers[1];
  return dtype == Dtype::f16 && !__builtin_cpu_supports("avx512fp16");
#else
  return false;
#endif
}

Tensor rows_from(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

// x [rows, K] by the weight [N, K], both widened to float32, a block of the weight at a time.
void multiply_widened(const Tensor& x_in, const Tensor& weight, const Maybe& bias, Tensor& out, int64_t rows) {
  const int64_t k = weight.size(1), n = weight.size(0), size = size_of(dtype_of(out));
  const int64_t most = std::max<int64_t>(64, block_elements / std::max<int64_t>({k, rows, 1})),
                words = std::min(most, n);
  Tensor x = empty({rows, k}, Dtype::f32), x_rows = torch::stable::view(contiguous(x_in), {rows, k});
  torch::stable::copy_(x, x_rows);
  const Tensor along = bias ? contiguous(*bias) : x;
  const Tensor wide = empty({words, k}, Dtype::f32), products = empty({rows * words}, Dtype::f32);
  const auto round = pick(linear_tiers).round[static_cast<int>(dtype_of(out))];
  for (int64_t first = 0; first < n; first += words) {
    const int64_t count = std::min(words, n - first);
    Tensor block = rows_from(wide, 0, count);
    torch::stable::copy_(block, rows_from(weight, first, count));
    Tensor product = torch::stable::view(rows_from(products, 0, rows * count), {rows, count});
    torch_mm(product, x, torch::stable::transpose(block, 0, 1));
    const float* from = reinterpret_cast<const float*>(data(product));
    in_parallel(rows, std::max<int64_t>(1, (int64_t{1} << 15) / count), [&](int64_t begin, int64_t end) {
      round(from + begin * count, count, bias ? data(along) + first * size : nullptr,
            mutable_data(out) + (begin * n + first) * size, n, end - begin, count);
    });
  }
}

Tensor many_rows(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  const Dtype dtype = dtype_of(weight);
  if (!widened(dtype) || dtype_of(x) != dtype || (bias && dtype_of(*bias) != dtype) || x.dim() > max_dims ||
      !weight.size(1))
    return torch_linear(x, weight, bias);
  int64_t sizes[max_dims];
  for (int64_t d = 0; d < x.dim(); d++) sizes[d] = d + 1 < x.dim() ? x.size(d) : weight.size(0);
  Tensor out = empty({sizes, static_cast<size_t>(x.dim())}, dtype);
  if (out.numel()) multiply_widened(x, weight, bias, out, rows_of(x));
  return out;
}

std::atomic<uint64_t> prepared{0};

// One product on its way; what it reads lives as long.
struct Product {
  Tensor out, x, bias;
  Kernel kernel = nullptr;  // null where torch has done it, or there is nothing to do
  LinearRows all = {};
  int64_t memory_bytes = 0;
  uint64_t id = 0;  // by which a thread knows that it has packed x

  int64_t groups() const { return kernel ? (all.count + linear_group - 1) / linear_group : 0; }

  void run(int64_t begin, int64_t end) const {
    LinearRows share = all;
    share.first = begin * linear_group;
    share.count = std::min(end * linear_group, all.count) - share.first;
    thread_local Memory memory;
    thread_local uint64_t held;
    share.packed = held == id;
    held = id;
    share.memory = memory.at_least(memory_bytes);
    kernel(share);
  }
};

Product prepare(const Tensor& x_in, const Tensor& weight, const Maybe& bias) {
  STD_TORCH_CHECK(x_in.dim() >= 1 && weight.dim() == 2 && x_in.size(-1) == weight.size(1),
                  "x must be [..., K] for a weight [N, K]");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == weight.size(0)), "bias must be [", weight.size(0),
                  "]");
  const Dtype dtype = dtype_of(weight);
  const int64_t n = weight.size(0), dims = x_in.dim(), rows = rows_of(x_in);
  const Kernel kernel = pick(linear_tiers).run[static_cast<int>(dtype)];
  if (!kernel || rows > linear_rows || dims > max_dims || !readable(weight))
    return {many_rows(x_in, weight, bias), x_in, x_in};
  STD_TORCH_CHECK(dtype_of(x_in) == dtype && (!bias || dtype_of(*bias) == dtype),
                  "x, weight and bias must be of one dtype");
  Tensor x = unit_stride(x_in);
  if (rows > 1 && Rows<1>({&x}, 1).runs() > 1) x = contiguous(x);
  int64_t sizes[max_dims];
  for (int64_t d = 0; d < dims; d++) sizes[d] = d + 1 < dims ? x.size(d) : n;
  Product p{empty({sizes, static_cast<size_t>(dims)}, dtype), x, bias ? contiguous(*bias) : x};
  if (!p.out.numel()) return p;
  p.kernel = kernel;
  p.all = {data(x),
           data(weight),
           bias ? data(p.bias) : nullptr,
           mutable_data(p.out),
           rows > 1 ? Rows<1>({&x}, 1).stride(0) : 0,
           weight.stride(0),
           n,
           rows,
           weight.size(1),
           0,
           n,
           nullptr,
           false};
  p.id = ++prepared;
  if (const auto bytes = pick(linear_tiers).memory[static_cast<int>(dtype)]) p.memory_bytes = bytes(rows, p.all.k);
  return p;
}

// All of them as one row of groups, so that no thread waits for another between two products.
void run_all(const Product* products, size_t count) {
  int64_t groups = 0, elements = 0;
  for (size_t i = 0; i < count; i++) {
    groups += products[i].groups();
    elements += products[i].groups() * products[i].all.k;
  }
  if (!groups) return;
  const int64_t group_bytes = elements / groups * linear_group * size_of(dtype_of(products[0].out));
  in_long_pieces(groups, std::max<int64_t>(1, grain_bytes / std::max<int64_t>(1, group_bytes)),
                 [&](int64_t begin, int64_t end) {
                   for (size_t i = 0; i < count && end > 0; i++) {
                     const int64_t here = products[i].groups();
                     if (begin < here) products[i].run(begin, std::min(end, here));
                     begin = std::max<int64_t>(begin - here, 0), end -= here;
                   }
                 });
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, Maybe bias) {
  const Product product = prepare(x, weight, bias);
  run_all(&product, 1);
  return product.out;
}

std::vector<Tensor> linear_all(const Tensor& x, const std::vector<LinearPart>& parts) {
  std::vector<Product> products;
  std::vector<Tensor> outs;
  products.reserve(parts.size());
  outs.reserve(parts.size());
  for (const LinearPart& part : parts) {
    products.push_back(prepare(x, *part.weight, part.bias));
    outs.push_back(products.back().out);
  }
  run_all(products.data(), products.size());
  return outs;
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) { mk::implement<&mk::linear>(m, "linear"); }

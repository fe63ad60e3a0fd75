// mistral_kernels::attention and attention_cached on a GPU.
#include <optional>

#include "cuda/attention.h"
#include "torch/cuda_device.h"

namespace mk {
namespace {

// `t` where its heads start at multiples of 16 bytes, else a copy.
Tensor aligned(const Tensor& t_in) {
  const Tensor t = unit_stride(t_in);
  const int64_t unit = 16 / size_of(dtype_of(t));
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < t.dim() - 1; d++) fits = fits && (t.size(d) <= 1 || t.stride(d) % unit == 0);
  return fits ? t : contiguous(Tensor(torch::stable::clone(t)));
}

// Strides of dimensions of size 1 are never multiplied by anything but 0.
cuda::AttentionTokens tokens_of(const Tensor& t) {
  const bool dense = t.dim() == 4;
  const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
  return {device_data(t), dense ? stride(0) : 0, stride(dense ? 1 : 0), stride(dense ? 2 : 1)};
}

// One packed token a sequence is a dense sequence of one.
cuda::AttentionTokens tokens_of_one(const Tensor& t) {
  cuda::AttentionTokens tokens = tokens_of(t);
  std::swap(tokens.batch, tokens.row);
  return tokens;
}

Tensor lse_like(const Tensor& q) {
  if (q.dim() == 3) return device_empty({q.size(1), q.size(0)}, Dtype::f32, q);
  return device_empty({q.size(0), q.size(2), q.size(1)}, Dtype::f32, q);
}

// What both ops set in the same way; `splits` and its memory are left.
cuda::Attention describe(const Tensor& q, const Tensor& k, const Tensor& out, int64_t window, double scale,
                         bool causal) {
  cuda::Attention a = {};
  a.out = device_mutable_data(out);
  a.heads = static_cast<int>(q.size(-2)), a.kv_heads = static_cast<int>(k.size(-2));
  a.dim = static_cast<int>(q.size(-1));
  a.tokens = q.dim() == 3 ? q.size(0) : q.size(0) * q.size(1);
  a.window = static_cast<int>(window), a.scale = static_cast<float>(scale), a.causal = causal;
  a.dtype = dtype_index(q);
  a.splits = 1;
  STD_TORCH_CHECK(dtype_of(k) == dtype_of(q), "q, k and v must be of one dtype");
  return a;
}

void launch(const Device& device, cuda::Attention& a, const Tensor& q, const char* op) {
  a.splits = mk_cuda_attention_splits(a);
  Tensor split_out = q, split_lse = q;
  if (a.splits > 1) {
    split_out = device_empty({a.splits, a.tokens, a.heads, a.dim}, Dtype::f32, q);
    split_lse = device_empty({a.splits, a.tokens, a.heads}, Dtype::f32, q);
    a.split_out = static_cast<float*>(device_mutable_data(split_out));
    a.split_lse = static_cast<float*>(device_mutable_data(split_lse));
  }
  check_launch(mk_cuda_attention(a, device.stream()), op);
}

const int32_t* ends_of(const Tensor& t) { return static_cast<const int32_t*>(device_data(t)); }

std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, int64_t window,
                                     double scale, bool causal, Maybe cu_q, Maybe cu_k, int64_t max_q, int64_t max_k) {
  const Device device(q_in);
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in);
  Tensor out = device_empty(q.sizes(), dtype_of(q), q), lse = lse_like(q);
  if (!q.numel()) return {out, lse};
  const bool packed = q.dim() == 3;
  const Tensor ends_q = packed ? contiguous(*cu_q) : q;
  const Tensor ends_k = packed ? contiguous(*cu_k) : q;
  cuda::Attention a = describe(q, k, out, window, scale, causal);
  a.q = tokens_of(q), a.k = tokens_of(k), a.v = tokens_of(v);
  a.lse = static_cast<float*>(device_mutable_data(lse)), a.key_tokens = packed ? k.size(0) : 0;
  a.sequences = static_cast<int>(packed ? ends_q.numel() - 1 : q.size(0));
  a.max_q = static_cast<int>(max_q), a.max_k = static_cast<int>(max_k);
  if (packed) a.cu_q = ends_of(ends_q), a.cu_k = ends_of(ends_k);
  launch(device, a, q, "attention");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_in, const Tensor& dlse_in, const Tensor& q_in,
                                                      const Tensor& k_in, const Tensor& v_in, const Tensor&,
                                                      const Tensor&, int64_t window, double scale, bool causal,
                                                      Maybe cu_q, Maybe cu_k, int64_t max_q, int64_t max_k) {
  const Device device(q_in);
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in), dout = aligned(dout_in);
  const Tensor dlse = contiguous(dlse_in);
  const Dtype dtype = dtype_of(q);
  STD_TORCH_CHECK(
      dtype_of(dout) == dtype && dtype_of(k) == dtype && dtype_of(v) == dtype && dtype_of(dlse) == Dtype::f32,
      "dout, q, k and v must be of one dtype, and dlse float32");
  Tensor dq = device_empty(q.sizes(), dtype, q), dk = device_empty(k.sizes(), dtype, k);
  Tensor dv = device_empty(v.sizes(), dtype, v);
  const bool packed = q.dim() == 3;
  if (!q.numel()) return {dq, torch::stable::zero_(dk), torch::stable::zero_(dv)};
  const Tensor ends_q = packed ? contiguous(*cu_q) : q;
  const Tensor ends_k = packed ? contiguous(*cu_k) : q;
  cuda::AttentionBackward a = {};
  a.dout = tokens_of(dout), a.q = tokens_of(q), a.k = tokens_of(k), a.v = tokens_of(v);
  a.dlse = static_cast<const float*>(device_data(dlse));
  a.dq = device_mutable_data(dq), a.dk = device_mutable_data(dk), a.dv = device_mutable_data(dv);
  if (packed) a.cu_q = ends_of(ends_q), a.cu_k = ends_of(ends_k);
  a.tokens = packed ? q.size(0) : q.size(0) * q.size(1);
  a.sequences = static_cast<int>(packed ? ends_q.numel() - 1 : q.size(0));
  a.heads = static_cast<int>(q.size(-2)), a.kv_heads = static_cast<int>(k.size(-2)),
  a.dim = static_cast<int>(q.size(-1));
  a.max_q = static_cast<int>(max_q), a.max_k = static_cast<int>(max_k), a.window = static_cast<int>(window);
  a.dtype = dtype_index(q), a.scale = static_cast<float>(scale), a.causal = causal;
  a.key_tokens = packed ? k.size(0) : 0;
  const Tensor scratch = device_empty({mk_cuda_attention_backward_scratch(a)}, Dtype::f32, q);
  a.scratch = static_cast<float*>(device_mutable_data(scratch));
  check_launch(mk_cuda_attention_backward(a, device.stream()), "attention_backward");
  return {dq, dk, dv};
}

Tensor attention_cached(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& lens_in,
                        int64_t window, double scale, Maybe k_new, Maybe v_new, Maybe cu, int64_t max_q,
                        bool batch_invariant) {
  STD_TORCH_CHECK(!batch_invariant, "the CUDA C++ kernel splits the keys by the whole batch");
  const Device device(q_in);
  const Tensor q = aligned(q_in), k = aligned(k_in), v = aligned(v_in), lens = contiguous(lens_in);
  const Tensor chunk_k = k_new ? aligned(*k_new) : q, chunk_v = v_new ? aligned(*v_new) : q;
  const Tensor ends = cu ? contiguous(*cu) : lens;
  Tensor out = device_empty(q.sizes(), dtype_of(q), q);
  if (!q.numel()) return out;
  const bool one_each = q.dim() == 3 && !cu;
  const auto of_chunk = [&](const Tensor& t) { return one_each ? tokens_of_one(t) : tokens_of(t); };
  cuda::Attention a = describe(q, k, out, window, scale, true);
  a.q = of_chunk(q), a.k_ring = tokens_of(k), a.v_ring = tokens_of(v);
  if (k_new) a.k = of_chunk(chunk_k), a.v = of_chunk(chunk_v);
  if (cu) a.cu_q = a.cu_k = ends_of(ends), a.key_tokens = a.tokens;
  a.ring_lens = ends_of(lens);
  a.sequences = static_cast<int>(k.size(0)), a.slots = static_cast<int>(k.size(1));
  a.max_q = static_cast<int>(q.dim() == 4 ? q.size(1) : cu ? max_q : 1), a.max_k = k_new ? a.max_q : 0;
  launch(device, a, q, "attention_cached");
  return out;
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, MK_CUDA_KEY, m) {
  m.impl("attention_cuda", mk::boxed<&mk::attention>);
  m.impl("attention_backward_cuda", mk::boxed<&mk::attention_backward>);
  m.impl("attention_cached_cuda", mk::boxed<&mk::attention_cached>);
}

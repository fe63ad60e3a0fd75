// mistral_kernels::rope, rope_write_kv and write_kv on a GPU.
#include <optional>

#include "cuda/rope.h"
#include "torch/cuda_device.h"

namespace mk {
namespace {

cuda::RopeHeads heads_of(const Tensor& t, const cuda::RowStrides& rows) {
  const int64_t heads = t.size(-2);
  return {device_data(t), rows, heads > 1 ? t.stride(-2) : 0, static_cast<int>(heads)};
}

void set_positions(cuda::Rope& a, const Tensor& positions, int64_t tokens) {
  STD_TORCH_CHECK(positions.numel() == tokens, "positions must hold one a token");
  a.positions = device_data(positions);
  a.wide_positions = positions.scalar_type() == ScalarType::Long;
}

void set_tables(cuda::Rope& a, const Tensor& cos, const Tensor& sin, bool adjacent, bool inverse) {
  STD_TORCH_CHECK(dtype_of(cos) == Dtype::f32 && dtype_of(sin) == Dtype::f32, "cos and sin must be float32");
  STD_TORCH_CHECK(cos.size(1) == a.dim / 2 && sin.numel() == cos.numel(), "cos and sin must be [P, ", a.dim / 2, "]");
  a.rotates = true;
  a.cos = static_cast<const float*>(device_data(cos));
  a.sin = static_cast<const float*>(device_data(sin));
  a.table_rows = cos.size(0), a.table_row = cos.size(1);
  a.adjacent = adjacent, a.inverse = inverse;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q_in, const Tensor& k_in, const Tensor& cos_in, const Tensor& sin_in,
                                Maybe positions, bool adjacent, bool inverse) {
  const Device device(q_in);
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in);
  const Tensor cos = contiguous(cos_in), sin = contiguous(sin_in);
  STD_TORCH_CHECK(dtype_of(q) == dtype_of(k), "q and k must be of one dtype");
  Tensor q_out = device_empty(q.sizes(), dtype_of(q), q), k_out = device_empty(k.sizes(), dtype_of(k), k);
  if (!q.numel() && !k.numel()) return {q_out, k_out};
  const LaunchRows<2> rows({&q, &k}, 2);
  const Tensor flat = positions ? contiguous(*positions) : cos;
  cuda::Rope a = {};
  a.q = heads_of(q, rows.strides[0]), a.k = heads_of(k, rows.strides[1]);
  a.q_out = device_mutable_data(q_out), a.k_out = device_mutable_data(k_out);
  a.sizes = rows.sizes, a.dim = static_cast<int>(q.size(-1)), a.dtype = dtype_index(q);
  a.length = q.size(-3);
  set_tables(a, cos, sin, adjacent, inverse);
  if (positions) set_positions(a, flat, rows.sizes.rows);
  check_launch(mk_cuda_rope(a, device.stream()), "rope");
  return {q_out, k_out};
}

// A cache that is written in place; one whose last dimension is not contiguous through a copy.
class Ring {
 public:
  explicit Ring(const Tensor& cache) : cache_(cache), inside_(unit_stride(cache)) {}

  cuda::RopeRing describe() const {
    const auto stride = [&](int64_t d) { return inside_.size(d) > 1 ? inside_.stride(d) : 0; };
    return {device_mutable_data(inside_), stride(0), stride(1), stride(2)};
  }

  void finish() {
    if (!inside_.is(cache_)) torch::stable::copy_(cache_, inside_);
  }

 private:
  Tensor cache_, inside_;
};

// The write of k and v; with q and its output also the rotation, into q_out and k_out.
void write(const Device& device, cuda::Rope& a, const Tensor* q, const Tensor& k, const Tensor& v,
           const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions, const Maybe& cu) {
  STD_TORCH_CHECK(dtype_of(v) == dtype_of(k) && dtype_of(k_cache) == dtype_of(k) && dtype_of(v_cache) == dtype_of(k),
                  "k, v and the caches must be of one dtype");
  const LaunchRows<3> rows({q ? q : &k, &k, &v}, 2);
  if (q) a.q = heads_of(*q, rows.strides[0]);
  a.k = heads_of(k, rows.strides[1]), a.v = heads_of(v, rows.strides[2]);
  a.sizes = rows.sizes, a.dtype = dtype_index(k);
  a.sequences = static_cast<int>(k_cache.size(0)), a.slots = k_cache.size(1);
  a.length = k.dim() == 4 ? k.size(1) : 1;
  set_positions(a, positions, rows.sizes.rows);
  const Tensor ends = cu ? contiguous(*cu) : positions;
  if (cu) a.cu = static_cast<const int32_t*>(device_data(ends));
  Ring keys(k_cache), values(v_cache);
  a.k_ring = keys.describe(), a.v_ring = values.describe();
  check_launch(mk_cuda_rope(a, device.stream()), q ? "rope_write_kv" : "write_kv");
  keys.finish();
  values.finish();
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
              Maybe cu) {
  if (!k.numel() || !k_cache.numel()) return;
  const Device device(k);
  cuda::Rope a = {};
  a.dim = static_cast<int>(k.size(-1));
  write(device, a, nullptr, unit_stride(k), unit_stride(v), k_cache, v_cache, contiguous(positions), cu);
}

std::tuple<Tensor, Tensor> rope_write_kv(const Tensor& q_in, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& positions, const Tensor& cos_in,
                                         const Tensor& sin_in, Maybe cu, bool adjacent) {
  const Device device(q_in);
  const Tensor q = unit_stride(q_in);
  const Tensor cos = contiguous(cos_in), sin = contiguous(sin_in);
  Tensor q_out = device_empty(q.sizes(), dtype_of(q), q), k_out = device_empty(k.sizes(), dtype_of(k), k);
  if (!q.numel() && !k.numel()) return {q_out, k_out};
  cuda::Rope a = {};
  a.dim = static_cast<int>(q.size(-1));
  a.q_out = device_mutable_data(q_out), a.k_out = device_mutable_data(k_out);
  set_tables(a, cos, sin, adjacent, false);
  write(device, a, &q, unit_stride(k), unit_stride(v), k_cache, v_cache, contiguous(positions), cu);
  return {q_out, k_out};
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, MK_CUDA_KEY, m) {
  m.impl("rope_cuda", mk::boxed<&mk::rope>);
  m.impl("rope_write_kv_cuda", mk::boxed<&mk::rope_write_kv>);
  m.impl("write_kv_cuda", mk::boxed<&mk::write_kv>);
}

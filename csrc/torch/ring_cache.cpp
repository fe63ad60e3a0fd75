// mistral_kernels::write_kv and rope_write_kv on a CPU; attention_cached is in attention.cpp.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kv_codes.h"
#include "torch/ops.h"
#include "torch/rope.h"
#include "torch/work.h"

namespace mk {
namespace {

// Where each token goes: the slot of its sequence, or -1 where it is idle, or older than the ring holds.
struct Target {
  int64_t sequence = -1, slot = -1;
};

// Of the tokens [begin, end) of one sequence, the last `slots` positions; the others stay as they are.
void aim(std::vector<Target>& targets, const Positions& positions, int64_t sequence, int64_t begin, int64_t end,
         int64_t slots) {
  int64_t last = -1;
  for (int64_t i = begin; i < end; i++) last = std::max(last, positions[i]);
  for (int64_t i = begin; i < end; i++) {
    const int64_t p = positions[i];
    if (p >= 0 && p > last - slots) targets[i] = {sequence, p % slots};
  }
}

// Dense [B, S] positions; or packed ones with `cu`, or one token a sequence.
std::vector<Target> targets_of(const Positions& positions, int64_t tokens, const Tensor& cache, bool packed,
                               const Maybe& cu) {
  const int64_t batch = cache.size(0), slots = cache.size(1);
  std::vector<Target> targets(tokens);
  if (cu) {
    const Tensor ends = contiguous(*cu);
    check_ends(ends, batch, tokens);
    const int32_t* at = static_cast<const int32_t*>(ends.const_data_ptr());
    for (int64_t b = 0; b < batch; b++) aim(targets, positions, b, at[b], at[b + 1], slots);
    return targets;
  }
  const int64_t length = packed ? 1 : batch ? tokens / batch : 0;
  STD_TORCH_CHECK(length * batch == tokens, "there are ", tokens, " tokens for ", batch, " sequences");
  for (int64_t b = 0; b < batch; b++) aim(targets, positions, b, b * length, (b + 1) * length, slots);
  return targets;
}

// A cache that tokens are copied into, in place, as codes where it has scales; one whose last dimension is not
// contiguous through a copy.
class Ring {
 public:
  Ring(const Tensor& cache, const Maybe& scale, Dtype dtype)
      : cache_(cache), inside_(unit_stride(cache)), size_(scale ? 1 : size_of(dtype)) {
    STD_TORCH_CHECK(cache.dim() == 4, "a cache must be [B, slots, Hkv, D]");
    sequence_ = cache_row(0), slot_ = cache_row(1), head_ = cache_row(2);
    heads_ = cache.size(2), dim_ = cache.size(3), head_bytes_ = dim_ * size_;
    to_ = mutable_data(inside_);
    if (!scale) return;
    quantise_ = pick(kv_codes_tiers).quantise[static_cast<int>(dtype)];
    scale_ = mutable_data(*scale);
    const int64_t wide_size = size_of(wide(dtype));
    scale_sequence_ = scale->stride(0) * wide_size, scale_slot_ = scale->stride(1) * wide_size;
    scale_head_ = scale->stride(2);
  }

  // `head_stride` counts elements of `from`, which are of `size` bytes.
  void put(const Target& target, const char* from, int64_t head_stride, int64_t size) const {
    char* to = to_ + target.sequence * sequence_ + target.slot * slot_;
    if (quantise_) {
      char* scale = scale_ + target.sequence * scale_sequence_ + target.slot * scale_slot_;
      return quantise_(from, head_stride, heads_, dim_, reinterpret_cast<int8_t*>(to), head_, scale, scale_head_);
    }
    head_stride *= size;
    if (head_stride == head_bytes_ && head_ == head_bytes_) {
      std::memcpy(to, from, heads_ * head_bytes_);
      return;
    }
    for (int64_t h = 0; h < heads_; h++) std::memcpy(to + h * head_, from + h * head_stride, head_bytes_);
  }

  void finish() {
    if (!inside_.is(cache_)) torch::stable::copy_(cache_, inside_);
  }

 private:
  int64_t cache_row(int64_t d) const { return inside_.stride(d) * size_; }

  Tensor cache_, inside_;
  KvCodesKernels::Quantise quantise_ = nullptr;
  char *to_, *scale_ = nullptr;
  int64_t size_, sequence_, slot_, head_, heads_, dim_, head_bytes_;
  int64_t scale_sequence_ = 0, scale_slot_ = 0, scale_head_ = 0;
};

// The caches that one call writes to.
struct Rings {
  const Tensor &k_cache, &v_cache;
  Maybe k_scale, v_scale;  // of int8 caches
};

void check(const Tensor& k, const Tensor& v, const Rings& rings, const Tensor& positions, const Maybe& cu) {
  const Tensor &k_cache = rings.k_cache, &v_cache = rings.v_cache;
  const Dtype dtype = dtype_of(k);
  if (rings.k_scale)
    check_codes(k_cache, v_cache, *rings.k_scale, *rings.v_scale, dtype);
  else
    STD_TORCH_CHECK(dtype_of(k_cache) == dtype && dtype_of(v_cache) == dtype, "the caches must be of k's dtype");
  STD_TORCH_CHECK(dtype_of(v) == dtype, "k and v must be of one dtype");
  on_cpu({&k, &v, &k_cache, &v_cache});
  STD_TORCH_CHECK(k_cache.dim() == 4 && same_shape(k_cache, v_cache) && k_cache.size(1) > 0,
                  "the caches must be equal, [B, slots, Hkv, D], with at least one slot");
  STD_TORCH_CHECK(same_shape(k, v) && k.dim() >= 3 && k.size(-2) == k_cache.size(2) && k.size(-1) == k_cache.size(3),
                  "k and v must be equal, with the heads of the caches");
  STD_TORCH_CHECK(cu ? k.dim() == 3 : k.size(0) == k_cache.size(0), "there must be ", k_cache.size(0), " sequences");
  check_positions(positions, k);
}

void write(const Tensor& k_in, const Tensor& v_in, const Rings& rings, const Tensor& positions_in, const Maybe& cu) {
  const Tensor k = unit_stride(k_in), v = unit_stride(v_in), flat = contiguous(positions_in);
  const Rows<2> rows({&k, &v}, 2);
  check(k, v, rings, positions_in, cu);
  if (!rows.count() || !rings.k_cache.numel()) return;
  const auto targets = targets_of(Positions(flat), rows.count(), rings.k_cache, k.dim() == 3, cu);
  const Dtype dtype = dtype_of(k);
  Ring keys(rings.k_cache, rings.k_scale, dtype), values(rings.v_cache, rings.v_scale, dtype);
  const char *k_from = data(k), *v_from = data(v);
  const int64_t size = size_of(dtype), k_head = k.stride(-2), v_head = v.stride(-2);
  in_pieces(rows.count(), grain_rows(k.size(-2) * k.size(-1)), [&](int64_t begin, int64_t end, int64_t) {
    rows.each(begin, end, [&](int64_t first, int64_t count, const int64_t* at) {
      for (int64_t i = 0; i < count; i++) {
        const Target& target = targets[first + i];
        if (target.slot < 0) continue;
        keys.put(target, k_from + (at[0] + i * rows.stride(0)) * size, k_head, size);
        values.put(target, v_from + (at[1] + i * rows.stride(1)) * size, v_head, size);
      }
    });
  });
  keys.finish();
  values.finish();
}

std::tuple<Tensor, Tensor> rotate_and_write(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                            const Rings& rings, const Tensor& positions_in, const Tensor& cos,
                                            const Tensor& sin, const Maybe& cu, bool adjacent) {
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  const Tensor flat = contiguous(positions_in);
  const Rotation rotation(q, k, unit_stride(cos), unit_stride(sin), adjacent, false, true);
  const Rows<3> rows({&q, &k, &v}, 2);
  check(k, v, rings, positions_in, cu);
  const Positions positions(flat);
  for (int64_t i = 0; i < rows.count(); i++) rotation.check(std::max<int64_t>(positions[i], 0));
  const auto targets = targets_of(positions, rows.count(), rings.k_cache, k.dim() == 3, cu);
  const Dtype dtype = dtype_of(k);
  Ring keys(rings.k_cache, rings.k_scale, dtype), values(rings.v_cache, rings.v_scale, dtype);
  const char* v_from = data(v);
  const int64_t size = size_of(dtype), k_head = k.size(-1), v_head = v.stride(-2);
  in_pieces(rows.count(), rotation.grain(), [&](int64_t begin, int64_t end, int64_t) {
    rows.each(begin, end, [&](int64_t first, int64_t count, const int64_t* at) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t token = first + i;
        if (positions[token] < 0) {
          rotation.clear(token);
          continue;
        }
        rotation.rotate(token, positions[token], at[0] + i * rows.stride(0), at[1] + i * rows.stride(1));
        if (targets[token].slot < 0) continue;
        keys.put(targets[token], rotation.rotated_k(token), k_head, size);
        values.put(targets[token], v_from + (at[2] + i * rows.stride(2)) * size, v_head, size);
      }
    });
  });
  keys.finish();
  values.finish();
  return {rotation.q_out, rotation.k_out};
}

}  // namespace

void check_codes(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_scale, const Tensor& v_scale,
                 Dtype dtype) {
  STD_TORCH_CHECK(is_int8(k_cache) && is_int8(v_cache) && k_cache.dim() == 4 && v_cache.dim() == 4,
                  "k_cache and v_cache must be int8, [B, slots, Hkv, D]");
  for (const Tensor* t : {&k_scale, &v_scale})
    STD_TORCH_CHECK(dtype_of(*t) == wide(dtype) && t->dim() == 3, "k_scale and v_scale must be [B, slots, Hkv] of ",
                    dtype == Dtype::f64 ? "float64" : "float32");
  for (int64_t d = 0; d < 4; d++) {
    const int64_t size = k_cache.size(d);
    STD_TORCH_CHECK(v_cache.size(d) == size && (d == 3 || (k_scale.size(d) == size && v_scale.size(d) == size)),
                    "v_cache must be as k_cache, and k_scale and v_scale as its first dimensions");
  }
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
              Maybe cu) {
  write(k, v, {k_cache, v_cache, std::nullopt, std::nullopt}, positions, cu);
}

void write_kv_int8(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& k_scale, const Tensor& v_scale, const Tensor& positions, Maybe cu) {
  write(k, v, {k_cache, v_cache, k_scale, v_scale}, positions, cu);
}

std::tuple<Tensor, Tensor> rope_write_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& positions, const Tensor& cos,
                                         const Tensor& sin, Maybe cu, bool adjacent) {
  return rotate_and_write(q, k, v, {k_cache, v_cache, std::nullopt, std::nullopt}, positions, cos, sin, cu, adjacent);
}

std::tuple<Tensor, Tensor> rope_write_kv_int8(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                              const Tensor& v_cache, const Tensor& k_scale, const Tensor& v_scale,
                                              const Tensor& positions, const Tensor& cos, const Tensor& sin, Maybe cu,
                                              bool adjacent) {
  return rotate_and_write(q, k, v, {k_cache, v_cache, k_scale, v_scale}, positions, cos, sin, cu, adjacent);
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::write_kv>(m, "write_kv");
  mk::implement<&mk::write_kv_int8>(m, "write_kv_int8");
  mk::implement<&mk::rope_write_kv>(m, "rope_write_kv");
  mk::implement<&mk::rope_write_kv_int8>(m, "rope_write_kv_int8");
}

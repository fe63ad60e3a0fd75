// mistral_kernels::rope on a CPU.
#include "torch/rope.h"

#include <cstring>

#include "torch/work.h"

namespace mk {

Rotation::Rotation(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool adjacent, bool inverse,
                   bool k_is_read)
    : q_out(empty(q.sizes(), dtype_of(q))), k_out(empty(k.sizes(), dtype_of(q))) {
  const Dtype dtype = dtype_of(q);
  const int64_t dims = q.dim();
  on_cpu({&q, &k, &cos, &sin});
  STD_TORCH_CHECK(dtype_of(k) == dtype, "q and k must be of one dtype");
  STD_TORCH_CHECK((dims == 3 || dims == 4) && k.dim() == dims && same_sizes(q, k, dims - 2) &&
                      k.size(-1) == q.size(-1) && q.size(-1) % 2 == 0,
                  "q and k must be [..., H, D] and [..., Hkv, D], with an even D");
  STD_TORCH_CHECK(dtype_of(cos) == wide(dtype) && dtype_of(sin) == wide(dtype),
                  "cos and sin must be float32, or float64 with a float64 q");
  size_ = size_of(dtype);
  dim_ = q.size(-1);
  STD_TORCH_CHECK(cos.dim() == 2 && cos.size(1) == dim_ / 2 && same_shape(cos, sin), "cos and sin must be [P, ",
                  dim_ / 2, "]");
  kernel_ = pick(rope_tiers).rotate[static_cast<int>(dtype)][adjacent][inverse];
  q_heads_ = q.size(-2), k_heads_ = k.size(-2);
  q_stride_ = q.stride(-2), k_stride_ = k.stride(-2);
  q_row_ = q_heads_ * dim_ * size_, k_row_ = k_heads_ * dim_ * size_;
  q_from_ = data(q), k_from_ = data(k), cos_ = data(cos), sin_ = data(sin);
  q_to_ = mutable_data(q_out), k_to_ = mutable_data(k_out);
  q_past_caches_ = past_caches((q_out.numel() + k_out.numel()) * size_, q_to_, k_to_, dim_ / 2 * size_);
  k_past_caches_ = q_past_caches_ && !k_is_read;
  table_rows_ = cos.size(0);
  cos_row_ = cos.stride(0) * size_of(wide(dtype)), sin_row_ = sin.stride(0) * size_of(wide(dtype));
}

void check_positions(const Tensor& positions, const Tensor& q) {
  on_cpu({&positions});
  STD_TORCH_CHECK(positions.dim() == q.dim() - 2 && same_sizes(positions, q, q.dim() - 2),
                  "positions must hold one a token");
}

void Rotation::check(int64_t position) const {
  STD_TORCH_CHECK(position >= 0 && position < table_rows_, "positions holds ", position,
                  ", but the cos/sin tables hold the positions 0 to ", table_rows_ - 1);
}

void Rotation::rotate(int64_t token, int64_t position, int64_t q_at, int64_t k_at) const {
  const char *cos = cos_ + position * cos_row_, *sin = sin_ + position * sin_row_;
  kernel_({q_from_ + q_at * size_, q_stride_, q_to_ + token * q_row_, q_heads_, dim_, cos, sin, q_past_caches_});
  kernel_({k_from_ + k_at * size_, k_stride_, k_to_ + token * k_row_, k_heads_, dim_, cos, sin, k_past_caches_});
}

void Rotation::clear(int64_t token) const {
  std::memset(q_to_ + token * q_row_, 0, q_row_);
  std::memset(k_to_ + token * k_row_, 0, k_row_);
}

namespace {

template <class Position>
void rotate_all(const Rotation& rotation, const Rows<2>& rows, const Position& position) {
  for (int64_t token = 0; token < rows.count(); token++) rotation.check(position(token));
  in_pieces(rows.count(), rotation.grain(), [&](int64_t begin, int64_t end, int64_t) {
    rows.each(begin, end, [&](int64_t first, int64_t count, const int64_t* at) {
      for (int64_t i = 0; i < count; i++)
        rotation.rotate(first + i, position(first + i), at[0] + i * rows.stride(0), at[1] + i * rows.stride(1));
    });
  });
}

std::tuple<Tensor, Tensor> rope(const Tensor& q_in, const Tensor& k_in, const Tensor& cos, const Tensor& sin,
                                std::optional<Tensor> positions, bool adjacent, bool inverse) {
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in);
  const Rotation rotation(q, k, unit_stride(cos), unit_stride(sin), adjacent, inverse, false);
  const Rows<2> rows({&q, &k}, 2);
  if (positions) {
    check_positions(*positions, q);
    const Tensor flat = contiguous(*positions);
    const Positions at(flat);
    rotate_all(rotation, rows, [&](int64_t token) { return at[token]; });
  } else {
    const int64_t length = q.size(-3);
    if (length) rotation.check(length - 1);
    rotate_all(rotation, rows, [&](int64_t token) { return token % length; });
  }
  return {rotation.q_out, rotation.k_out};
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) { mk::implement<&mk::rope>(m, "rope"); }

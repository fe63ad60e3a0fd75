// What rope and rope_write_kv share on the torch side.
#pragma once
#include <optional>

#include "cpu/rope.h"
#include "torch/binding.h"
#include "torch/traffic.h"

namespace mk {

// int32 or int64 values, read one by one.
class Positions {
 public:
  explicit Positions(const Tensor& t) : data_(data(t)), wide_(t.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(wide_ || t.scalar_type() == ScalarType::Int, "positions must be int32 or int64");
  }
  int64_t operator[](int64_t i) const {
    return wide_ ? reinterpret_cast<const int64_t*>(data_)[i] : reinterpret_cast<const int32_t*>(data_)[i];
  }

 private:
  const char* data_;
  bool wide_;
};

// Throws unless positions hold one a token of q [..., heads, D].
void check_positions(const Tensor& positions, const Tensor& q);

// The rotation of q and k [..., heads, D] of one dtype into contiguous outputs, token by token.
class Rotation {
 public:
  // `k_is_read`: rotated_k is called.
  Rotation(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool adjacent, bool inverse,
           bool k_is_read);

  // Throws where the tables do not hold the position.
  void check(int64_t position) const;
  // Token `token`, whose q and k lie q_at and k_at elements from the start.
  void rotate(int64_t token, int64_t position, int64_t q_at, int64_t k_at) const;
  // Sets the outputs of the token to 0.
  void clear(int64_t token) const;

  const char* rotated_k(int64_t token) const { return k_to_ + token * k_row_; }
  // Tokens that one thread should at least take.
  int64_t grain() const { return grain_rows((q_heads_ + k_heads_) * dim_); }

  Tensor q_out, k_out;

 private:
  void (*kernel_)(const RopeHeads&);
  const char *q_from_, *k_from_, *cos_, *sin_;
  char *q_to_, *k_to_;
  int64_t size_, dim_, q_heads_, k_heads_, q_stride_, k_stride_, q_row_, k_row_;  // rows in bytes
  int64_t table_rows_, cos_row_, sin_row_;                                        // in bytes
  bool q_past_caches_, k_past_caches_;
};

}  // namespace mk

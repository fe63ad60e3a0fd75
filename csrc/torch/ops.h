// The ops that others call on the torch side; each is as its schema in Python says.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "torch/binding.h"

namespace mk {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool model);
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, bool model);
Tensor linear(const Tensor& x, const Tensor& weight, Maybe bias);

struct LinearPart {
  const Tensor* weight;
  Maybe bias;
};

// linear of one x with each of the weights, in one go.
std::vector<Tensor> linear_all(const Tensor& x, const std::vector<LinearPart>& parts);

Tensor linear_int8(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group);
Tensor linear_w8a8(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group);
Tensor linear_int4(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe offset, Maybe bias, int64_t group);
Tensor linear_nf4(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe bias, int64_t group);
Tensor swiglu(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> rope_write_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& positions, const Tensor& cos,
                                         const Tensor& sin, Maybe cu, bool adjacent);
std::tuple<Tensor, Tensor> rope_write_kv_int8(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                              const Tensor& v_cache, const Tensor& k_scale, const Tensor& v_scale,
                                              const Tensor& positions, const Tensor& cos, const Tensor& sin, Maybe cu,
                                              bool adjacent);
Tensor attention_cached(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                        int64_t window, double scale, Maybe k_new, Maybe v_new, Maybe cu, int64_t max_q,
                        bool batch_invariant);
Tensor attention_cached_int8(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_scale,
                             const Tensor& v_scale, const Tensor& seq_lens, int64_t window, double scale, Maybe k_new,
                             Maybe v_new, Maybe cu, int64_t max_q, bool batch_invariant);

// Throws unless caches of int8 codes and their scales belong to each other, and to tokens of the dtype.
void check_codes(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_scale, const Tensor& v_scale,
                 Dtype dtype);

}  // namespace mk

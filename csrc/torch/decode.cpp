// mistral_kernels::decode_layers on a CPU: the ops of all layers one after the other, without Python between them.
#include <vector>

#include "torch/ops.h"

namespace mk {
namespace {

// In the order in which Python hands them over.
enum Weight { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3, weights_of_layer };
constexpr int biases_of_layer = 3, linears_of_layer = 7;

// The weights of one layer; those of linear layers may be codes, with scales and, for some, offsets.
struct Layer {
  const Tensor *weights, *scales;  // scales: a scale and an offset for each linear layer; null where none is quantised
  const int64_t* formats;          // likewise a scheme and a group
  const Tensor& operator[](Weight which) const { return weights[which]; }
};

enum Scheme { none, int8, w8a8, int4, nf4 };

// The place of a linear layer among them.
int place_of(Weight which) { return which < ffn_norm ? which - wq : which - w1 + 4; }

bool plain(const Layer& layer, Weight which) { return !layer.formats || layer.formats[2 * place_of(which)] == none; }

Tensor any_linear(const Tensor& x, const Layer& layer, Weight which, Maybe bias) {
  const int i = place_of(which);
  if (plain(layer, which)) return linear(x, layer[which], bias);
  const Tensor &codes = layer[which], &scale = layer.scales[2 * i], &offset = layer.scales[2 * i + 1];
  const int64_t group = layer.formats[2 * i + 1];
  switch (layer.formats[2 * i]) {
    case int8:
      return linear_int8(x, codes, scale, bias, group);
    case w8a8:
      return linear_w8a8(x, codes, scale, bias, group);
    case int4:
      return linear_int4(x, codes, scale, offset.numel() ? Maybe(offset) : std::nullopt, bias, group);
    case nf4:
      return linear_nf4(x, codes, scale, bias, group);
  }
  STD_TORCH_CHECK(false, "formats has scheme ", layer.formats[2 * i], "; it must be 0 to 4");
}

// Several linear layers of one x; in one go where all are of numbers. `biases`, where there are any, begin with that of
// wq.
std::vector<Tensor> any_linears(const Tensor& x, const Layer& layer, std::initializer_list<Weight> which,
                                const Tensor* biases) {
  const auto bias = [&](Weight w) { return biases ? Maybe(biases[w - wq]) : std::nullopt; };
  std::vector<LinearPart> parts;
  for (const Weight w : which)
    if (plain(layer, w)) parts.push_back({&layer[w], bias(w)});
  if (parts.size() == which.size()) return linear_all(x, parts);
  std::vector<Tensor> outs;
  for (const Weight w : which) outs.push_back(any_linear(x, layer, w, bias(w)));
  return outs;
}

// The tokens of t [T, heads * dim] as [T, heads, dim], or back; t is contiguous.
Tensor as_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  int64_t strides[3], stride = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= sizes.begin()[d];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), sizes.size(), sizes.begin(), strides, 0, &handle));
  return Tensor(handle);
}

struct Pass {
  const Tensor &positions, &cos, &sin, &seq_lens;
  const Maybe& cu;
  int64_t window;
  double scale, eps;
  bool adjacent;
  int64_t max_q;
};

// The caches of one layer; the scales of int8 ones, else null.
struct Rings {
  const Tensor &k_cache, &v_cache;
  const Tensor *k_scale, *v_scale;
};

// Attention reads keys by the heads of the caches: they have to fit those of the weights.
void check(const Tensor& x, const Layer& w, const Rings& rings, const Pass& pass) {
  const Tensor &k_cache = rings.k_cache, &v_cache = rings.v_cache;
  STD_TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.numel() == v_cache.numel() &&
                      k_cache.size(1) == v_cache.size(1) && k_cache.size(2) == v_cache.size(2),
                  "a layer's caches must be equal, [B, slots, Hkv, D]");
  const int64_t dim = k_cache.size(3), keys = k_cache.size(2) * dim;
  STD_TORCH_CHECK(dim > 0 && keys > 0 && w[wq].size(0) % keys == 0 && w[wk].size(0) == keys && w[wv].size(0) == keys,
                  "wq, wk and wv must have rows for H, Hkv and Hkv heads of ", dim, ", with ", keys / dim, " for Hkv");
  STD_TORCH_CHECK(rings.k_scale || (dtype_of(k_cache) == dtype_of(x) && dtype_of(v_cache) == dtype_of(x)),
                  "the caches must have x's dtype");
  STD_TORCH_CHECK(pass.seq_lens.numel() == k_cache.size(0), "seq_lens must be [", k_cache.size(0), "]");
}

Tensor attend(const Tensor& x, const Layer& w, const Tensor* biases, const Rings& rings, const Pass& pass) {
  check(x, w, rings, pass);
  const auto& [k_cache, v_cache, k_scale, v_scale] = rings;
  const int64_t tokens = x.size(0), dim = k_cache.size(3);
  const auto heads = [&](const Tensor& all) { return as_shape(all, {tokens, all.size(1) / dim, dim}); };
  const std::vector<Tensor> projected = any_linears(x, w, {wq, wk, wv}, biases);
  const Tensor q_in = heads(projected[0]), k_in = heads(projected[1]), v = heads(projected[2]);
  Tensor out;
  if (k_scale) {
    const auto [q, k] = rope_write_kv_int8(q_in, k_in, v, k_cache, v_cache, *k_scale, *v_scale, pass.positions,
                                           pass.cos, pass.sin, pass.cu, pass.adjacent);
    out = attention_cached_int8(q, k_cache, v_cache, *k_scale, *v_scale, pass.seq_lens, pass.window, pass.scale,
                                std::nullopt, std::nullopt, pass.cu, pass.max_q, true);
  } else {
    const auto [q, k] =
        rope_write_kv(q_in, k_in, v, k_cache, v_cache, pass.positions, pass.cos, pass.sin, pass.cu, pass.adjacent);
    out = attention_cached(q, k_cache, v_cache, pass.seq_lens, pass.window, pass.scale, std::nullopt, std::nullopt,
                           pass.cu, pass.max_q, true);
  }
  return any_linear(as_shape(out, {tokens, w[wq].size(0)}), w, wo, std::nullopt);
}

std::tuple<Tensor, Tensor> decode_layers(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                                         std::vector<int64_t> formats, std::vector<Tensor> biases,
                                         std::vector<Tensor> k_caches, std::vector<Tensor> v_caches,
                                         std::vector<Tensor> k_scales, std::vector<Tensor> v_scales,
                                         const Tensor& positions, const Tensor& cos, const Tensor& sin, Maybe cu,
                                         const Tensor& seq_lens, int64_t window, double scale, double eps,
                                         bool adjacent, int64_t max_q) {
  const size_t layers = k_caches.size();
  STD_TORCH_CHECK(layers && v_caches.size() == layers && weights.size() == layers * weights_of_layer &&
                      (biases.empty() || biases.size() == layers * biases_of_layer) &&
                      scales.size() == formats.size() && k_scales.size() == v_scales.size() &&
                      (k_scales.empty() || k_scales.size() == layers) &&
                      (formats.empty() || formats.size() == layers * 2 * linears_of_layer),
                  "each of ", layers, " layers needs two caches, ", int{weights_of_layer}, " weights, and ",
                  biases_of_layer, " biases or none");
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, N]");
  const Pass pass{positions, cos, sin, seq_lens, cu, window, scale, eps, adjacent, max_q};
  Tensor delta = x, residual = x, normed, unused;
  for (size_t i = 0; i < layers; i++) {
    const bool plain = formats.empty();
    const Layer w{weights.data() + i * weights_of_layer, plain ? nullptr : scales.data() + i * 2 * linears_of_layer,
                  plain ? nullptr : formats.data() + i * 2 * linears_of_layer};
    if (i)
      std::tie(normed, residual, unused) = add_rms_norm(delta, residual, w[attention_norm], eps, true);
    else
      std::tie(normed, unused) = rms_norm(x, w[attention_norm], eps, true);
    const bool codes = !k_scales.empty();
    const Rings rings{k_caches[i], v_caches[i], codes ? &k_scales[i] : nullptr, codes ? &v_scales[i] : nullptr};
    delta = attend(normed, w, biases.empty() ? nullptr : biases.data() + i * biases_of_layer, rings, pass);
    std::tie(normed, residual, unused) = add_rms_norm(delta, residual, w[ffn_norm], eps, true);
    const std::vector<Tensor> wide = any_linears(normed, w, {w1, w3}, nullptr);
    delta = any_linear(swiglu(wide[0], wide[1]), w, w2, std::nullopt);
  }
  return {delta, residual};
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) { m.impl("decode_layers", mk::boxed<&mk::decode_layers>); }

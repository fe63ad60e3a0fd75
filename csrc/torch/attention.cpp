// mistral_kernels::attention and attention_cached on a CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/kv_codes.h"
#include "torch/attention_run.h"
#include "torch/ops.h"

namespace mk {
namespace {

Tensor lse_like(const Tensor& q) {
  const Dtype dtype = wide(dtype_of(q));
  if (q.dim() == 3) return empty({q.size(1), q.size(0)}, dtype);
  return empty({q.size(0), q.size(2), q.size(1)}, dtype);
}

KeySpan span_of(const Tokens& k, const Tokens& v, int64_t b, int64_t first, int64_t count) {
  return {k.at(b, first), v.at(b, first), k.row, k.head, v.row, v.head, count};
}

// The scales of codes [B, slots, Hkv].
struct Scales {
  explicit Scales(const Tensor& t)
      : data(mk::data(t)), size(size_of(dtype_of(t))), batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)) {}
  const char* at(int64_t b, int64_t slot) const { return data + (b * batch + slot * row) * size; }

  const char* data;
  int64_t size, batch, row, head;
};

// The caches of a layer as attention reads them, with scales where they hold codes.
struct Ring {
  Ring(const Tensor& k_cache, const Tensor& v_cache, const Maybe& k_scale, const Maybe& v_scale)
      : k(k_cache), v(v_cache), slots(k_cache.size(1)) {
    if (!k_scale) return;
    k_scales.emplace(*k_scale);
    v_scales.emplace(*v_scale);
  }

  KeySpan span(int64_t b, int64_t first, int64_t count) const {
    KeySpan s = span_of(k, v, b, first, count);
    if (!k_scales) return s;
    s.k_scale = k_scales->at(b, first), s.k_scale_row = k_scales->row, s.k_scale_head = k_scales->head;
    s.v_scale = v_scales->at(b, first), s.v_scale_row = v_scales->row, s.v_scale_head = v_scales->head;
    return s;
  }

  // The ring in order of position: token p lies in slot p % slots, so that the oldest kept one follows the newest.
  void add_to(AttentionSequence& s, int64_t b, int64_t seen) const {
    const int64_t kept = std::min(seen, slots), oldest = seen > slots ? seen % slots : 0;
    s.spans[0] = span(b, oldest, kept - oldest);
    s.spans[1] = span(b, 0, oldest);
    s.keys += kept;
  }

  Tokens k, v;
  std::optional<Scales> k_scales, v_scales;
  int64_t slots;
};

// What tiles read in place of codes: numbers, rounded as the eager op rounds them, of the keys that are seen.
void dequantise(const Attention& a, AttentionSequence& s, std::vector<Tensor>& numbers) {
  const auto dequantise = pick(kv_codes_tiers).dequantise[static_cast<int>(a.dtype)];
  const int64_t size = size_of(a.dtype), scale_size = size_of(wide(a.dtype)), row = a.kv_heads * a.dim;
  int64_t begin = 0;
  const int64_t seen = first_visible(a, s, 0);
  for (KeySpan& span : s.spans) {
    const int64_t from = std::clamp<int64_t>(seen - begin, 0, span.count);
    begin += span.count;
    if (!span.k_scale) continue;
    numbers.push_back(empty({2, span.count, row}, a.dtype));
    char *k = mutable_data(numbers.back()), *v = k + span.count * row * size;
    in_parallel(span.count - from, grain_rows(row), [&](int64_t first, int64_t last) {
      for (int64_t i = from + first; i < from + last; i++) {
        dequantise(reinterpret_cast<const int8_t*>(span.k) + i * span.k_row, span.k_head,
                   span.k_scale + i * span.k_scale_row * scale_size, span.k_scale_head, a.kv_heads, a.dim,
                   k + i * row * size);
        dequantise(reinterpret_cast<const int8_t*>(span.v) + i * span.v_row, span.v_head,
                   span.v_scale + i * span.v_scale_row * scale_size, span.v_scale_head, a.kv_heads, a.dim,
                   v + i * row * size);
      }
    });
    span = {k, v, row, a.dim, row, a.dim, span.count};
  }
}

constexpr int64_t not_looked_up = INT64_MIN;  // what Python gives for the longest chunk where nobody knows it

// NaN stands for the usual one.
double scale_of(double scale, const Tensor& q) {
  return std::isnan(scale) ? std::pow(static_cast<double>(q.size(-1)), -0.5) : scale;
}

// As Python's checks say in more words.
void check(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, double scale, bool causal,
           const Maybe& cu_q, const Maybe& cu_k) {
  on_cpu({&q, &k, &v});
  const int64_t dims = cu_q ? 3 : 4;
  STD_TORCH_CHECK(dtype_of(k) == dtype_of(q) && dtype_of(v) == dtype_of(q), "q, k and v must be of one dtype");
  STD_TORCH_CHECK(
      q.dim() == dims && k.dim() == dims && same_shape(k, v) && (cu_q || q.size(0) == k.size(0)),
      "q, k and v must be [B, S, H, D] and twice [B, Sk, Hkv, D]; with cu_seqlens [T, H, D] and [Tk, Hkv, D]");
  STD_TORCH_CHECK(q.size(-1) > 0 && k.size(-1) == q.size(-1) && k.size(-2) > 0 && q.size(-2) % k.size(-2) == 0,
                  "q, k and v must have one head dimension, and q a multiple of the heads of k");
  STD_TORCH_CHECK(std::isfinite(scale) && window >= 0 && (causal || !window),
                  "scale must be finite, and a window needs causal");
  STD_TORCH_CHECK(cu_q.has_value() == cu_k.has_value(), "packed attention needs both cu_seqlens");
  if (!cu_q) return;
  STD_TORCH_CHECK(cu_q->dim() == 1 && cu_q->numel() > 0, "cu_seqlens must be [sequences + 1]");
  check_ends(*cu_q, cu_q->numel() - 1, q.size(0));
  check_ends(*cu_k, cu_q->numel() - 1, k.size(0));
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, int64_t window,
                                     double given_scale, bool causal, Maybe cu_q, Maybe cu_k, int64_t, int64_t) {
  const double scale = scale_of(given_scale, q_in);
  check(q_in, k_in, v_in, window, scale, causal, cu_q, cu_k);
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  Tensor out = empty(q.sizes(), dtype_of(q)), lse = lse_like(q);
  const bool packed = q.dim() == 3;
  const int64_t sequences = packed ? cu_q->numel() - 1 : q.size(0);
  Attention a = describe_attention(q, k, window, scale, causal);
  a.lse_head = q.size(packed ? 0 : 1);
  const Tokens tq(q), tk(k), tv(v), to(out);
  const int64_t lse_size = size_of(wide(a.dtype)), lse_batch = packed ? 1 : a.heads * a.lse_head;
  char* lse_data = mutable_data(lse);
  std::vector<int64_t> starts_q, starts_k;
  if (packed) {
    starts_q = token_starts(cu_q, sequences, q.size(0));
    starts_k = token_starts(cu_k, sequences, k.size(0));
  }
  std::vector<AttentionSequence> all(sequences);
  for (int64_t b = 0; b < sequences; b++) {
    AttentionSequence& s = all[b];
    const int64_t dense = packed ? 0 : b, first_q = packed ? starts_q[b] : 0, first_k = packed ? starts_k[b] : 0;
    s.queries = packed ? starts_q[b + 1] - first_q : q.size(1);
    s.keys = packed ? starts_k[b + 1] - first_k : k.size(1);
    s.q = tq.at(dense, first_q);
    s.out = const_cast<char*>(to.at(dense, first_q));
    s.lse = lse_data + (packed ? first_q : b * lse_batch) * lse_size;
    s.spans[0] = span_of(tk, tv, dense, first_k, s.keys);
  }
  run_attention(a, std::move(all));
  return {out, lse};
}

// The caches and the queries fit each other, and the ring holds all keys that these see, as Python's checks say in more
// words. `longest`: of the packed chunks.
void check_cached(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lens, int64_t window,
                  double scale, bool alone, const Maybe& cu, int64_t longest) {
  on_cpu({&q, &k_cache, &v_cache, &lens});
  STD_TORCH_CHECK(k_cache.dim() == 4 && same_shape(k_cache, v_cache) && k_cache.size(1) > 0,
                  "the caches must be equal, [B, slots, Hkv, D], with at least one slot");
  const int64_t batch = k_cache.size(0), slots = k_cache.size(1), heads = k_cache.size(2), dims = q.dim();
  STD_TORCH_CHECK((dims == 3 || (dims == 4 && !cu)) && (cu || q.size(0) == batch) && q.size(-1) > 0 &&
                      q.size(-1) == k_cache.size(3) && heads > 0 && q.size(-2) % heads == 0,
                  "q must be [B, S, H, D] or [T, H, D], with the caches' D and a multiple of their heads");
  STD_TORCH_CHECK(lens.scalar_type() == ScalarType::Int && lens.dim() == 1 && lens.size(0) == batch,
                  "seq_lens must be int32, [", batch, "]");
  STD_TORCH_CHECK(std::isfinite(scale) && window >= 0, "scale must be finite, and a window positive");
  if (cu) check_ends(*cu, batch, q.size(0));
  if (!alone) return;
  int64_t chunk = dims == 4 ? q.size(1) : 1;
  if (cu) {
    const std::vector<int64_t> starts = token_starts(cu, batch, q.size(0));
    chunk = 0;
    for (int64_t b = 0; b < batch; b++) chunk = std::max(chunk, starts[b + 1] - starts[b]);
    const bool known = longest != not_looked_up;
    STD_TORCH_CHECK(!known || longest >= chunk, "max_seqlen is ", longest, ", but a sequence has ", chunk);
    if (known) chunk = std::min(longest, q.size(0));
  }
  if (window && slots >= window + chunk - 1) return;
  const int32_t* seen = static_cast<const int32_t*>(lens.const_data_ptr());
  for (int64_t b = 0; b < batch; b++)
    STD_TORCH_CHECK(seen[b * lens.stride(0)] <= slots, "the ring of ", slots, " slots is too small");
}

Tensor cached(const Tensor& q_in, const Ring& ring, const Tensor& k_cache, const Tensor& lens_in, int64_t window,
              double scale, const Maybe& k_new, const Maybe& v_new, const Maybe& cu) {
  const Tensor q = unit_stride(q_in), lens = unit_stride(lens_in);
  const Tensor chunk_k = k_new ? unit_stride(*k_new) : q, chunk_v = v_new ? unit_stride(*v_new) : q;
  Tensor out = empty(q.sizes(), dtype_of(q));
  const bool packed = q.dim() == 3;
  const int64_t sequences = k_cache.size(0);
  const Attention a = describe_attention(q, k_cache, window, scale, true);
  const Tokens tq(q), tnk(chunk_k), tnv(chunk_v), to(out);
  const int32_t* seen = static_cast<const int32_t*>(lens.const_data_ptr());
  const std::vector<int64_t> starts = packed ? token_starts(cu, sequences, q.size(0)) : std::vector<int64_t>{};
  std::vector<AttentionSequence> all(sequences);
  std::vector<Tensor> numbers;
  for (int64_t b = 0; b < sequences; b++) {
    AttentionSequence& s = all[b];
    const int64_t dense = packed ? 0 : b, first = packed ? starts[b] : 0;
    s.queries = packed ? starts[b + 1] - first : q.size(1);
    s.q = tq.at(dense, first);
    s.out = const_cast<char*>(to.at(dense, first));
    ring.add_to(s, b, std::max<int64_t>(seen[b], 0));
    if (k_new) {
      s.spans[2] = span_of(tnk, tnv, dense, first, s.queries);
      s.keys += s.queries;
    }
    if (ring.k_scales && !decoded(a, s.queries)) dequantise(a, s, numbers);
  }
  run_attention(a, std::move(all));
  return out;
}

}  // namespace

// Results never depend on the rest of the batch, whether that is asked for or not.
Tensor attention_cached(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lens,
                        int64_t window, double given_scale, Maybe k_new, Maybe v_new, Maybe cu, int64_t longest, bool) {
  const double scale = scale_of(given_scale, q);
  const Dtype dtype = dtype_of(q);
  check_cached(q, k_cache, v_cache, lens, window, scale, !k_new, cu, longest);
  STD_TORCH_CHECK(dtype_of(k_cache) == dtype && dtype_of(v_cache) == dtype, "the caches must be of q's dtype");
  const Tensor k = unit_stride(k_cache), v = unit_stride(v_cache);
  return cached(q, Ring(k, v, std::nullopt, std::nullopt), k, lens, window, scale, k_new, v_new, cu);
}

Tensor attention_cached_int8(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_scale,
                             const Tensor& v_scale, const Tensor& lens, int64_t window, double given_scale, Maybe k_new,
                             Maybe v_new, Maybe cu, int64_t longest, bool) {
  const double scale = scale_of(given_scale, q);
  check_cached(q, k_cache, v_cache, lens, window, scale, !k_new, cu, longest);
  check_codes(k_cache, v_cache, k_scale, v_scale, dtype_of(q));
  const Tensor k = unit_stride(k_cache), v = unit_stride(v_cache);
  return cached(q, Ring(k, v, k_scale, v_scale), k, lens, window, scale, k_new, v_new, cu);
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  mk::implement<&mk::attention>(m, "attention");
  mk::implement<&mk::attention_cached>(m, "attention_cached");
  mk::implement<&mk::attention_cached_int8>(m, "attention_cached_int8");
}

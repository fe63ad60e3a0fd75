// mistral_kernels::attention and attention_cached on a CPU.
#include <algorithm>

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

// The ring in order of position: token p lies in slot p % slots, so that the oldest kept one follows the newest.
void add_ring(AttentionSequence& s, const Tokens& k, const Tokens& v, int64_t b, int64_t seen, int64_t slots) {
  const int64_t kept = std::min(seen, slots), oldest = seen > slots ? seen % slots : 0;
  s.spans[0] = span_of(k, v, b, oldest, kept - oldest);
  s.spans[1] = span_of(k, v, b, 0, oldest);
  s.keys += kept;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, int64_t window,
                                     double scale, bool causal, Maybe cu_q, Maybe cu_k, int64_t, int64_t) {
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

}  // namespace

// Results never depend on the rest of the batch, whether that is asked for or not.
Tensor attention_cached(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& lens_in,
                        int64_t window, double scale, Maybe k_new, Maybe v_new, Maybe cu, int64_t, bool) {
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in), lens = unit_stride(lens_in);
  const Tensor chunk_k = k_new ? unit_stride(*k_new) : q, chunk_v = v_new ? unit_stride(*v_new) : q;
  Tensor out = empty(q.sizes(), dtype_of(q));
  const bool packed = q.dim() == 3;
  const int64_t sequences = k.size(0), slots = k.size(1);
  const Attention a = describe_attention(q, k, window, scale, true);
  const Tokens tq(q), tk(k), tv(v), tnk(chunk_k), tnv(chunk_v), to(out);
  const int32_t* seen = static_cast<const int32_t*>(lens.const_data_ptr());
  const std::vector<int64_t> starts = packed ? token_starts(cu, sequences, q.size(0)) : std::vector<int64_t>{};
  std::vector<AttentionSequence> all(sequences);
  for (int64_t b = 0; b < sequences; b++) {
    AttentionSequence& s = all[b];
    const int64_t dense = packed ? 0 : b, first = packed ? starts[b] : 0;
    s.queries = packed ? starts[b + 1] - first : q.size(1);
    s.q = tq.at(dense, first);
    s.out = const_cast<char*>(to.at(dense, first));
    add_ring(s, tk, tv, b, std::max<int64_t>(seen[b], 0), slots);
    if (!k_new) continue;
    s.spans[2] = span_of(tnk, tnv, dense, first, s.queries);
    s.keys += s.queries;
  }
  run_attention(a, std::move(all));
  return out;
}

}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&mk::attention));
  m.impl("attention_cached", TORCH_BOX(&mk::attention_cached));
}

// mistral_kernels::attention_backward on a CPU.
#include "cpu/attention_backward.h"

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "torch/attention_run.h"
#include "torch/ops.h"
#include "torch/work.h"

namespace mk {
namespace {

// Tasks that keep a machine busy, where a batch has too few KV heads: the shape alone decides, and with it the order of
// the sums.
constexpr int64_t enough_tasks = most_parts;
// P and dS of a tile, in bytes, that the L2 cache mostly holds.
constexpr int64_t tile_bytes = int64_t{3} << 19;
// Rows of a tile of several heads, queries times heads: so many that the sums of dk and dv, which it loads and stores
// once, take little of its time.
constexpr int64_t stacked_rows = 256;

int64_t rows_of_tile(const Attention& a, int64_t keys, int64_t unit) {
  const int64_t seen = a.causal && a.window ? std::min(keys, a.window + tile_rows) : keys;
  const int64_t size = a.dtype == Dtype::bf16 ? 2 : a.dtype == Dtype::f64 ? 8 : 4;
  const int64_t rows = tile_bytes / (2 * size * std::max<int64_t>(seen, 1));
  return std::clamp<int64_t>(rows / unit * unit, std::max<int64_t>(unit, 24), tile_rows);
}

struct Sums {
  std::unique_ptr<Memory> memory;
  std::atomic<int64_t> left;
};

class Backward {
 public:
  Backward(AttentionGradients g, const std::vector<AttentionSequence>& sequences) : g_(g), sequences_(sequences) {
    int64_t queries = 0, keys = 0;
    for (const AttentionSequence& s : sequences_) {
      queries = std::max(queries, s.queries);
      keys = std::max(keys, s.keys);
    }
    g_.a.sequences = sequences_.data();
    dtype_ = static_cast<int>(g_.a.dtype);
    const int64_t heads = static_cast<int64_t>(sequences_.size()) * g_.a.kv_heads;
    wanted_ = heads ? (enough_tasks + heads - 1) / heads : 1;
    const int64_t unit = kernels_.row_unit[dtype_];
    g_.heads = 1;
    g_.rows = rows_of_tile(g_.a, keys, unit);
    if (!kernels_.several_heads[dtype_]) return;
    g_.heads = std::min(g_.a.heads / g_.a.kv_heads, stacked_rows / unit);
    const int64_t most = stacked_rows / g_.heads / unit * unit, share = (queries + wanted_ - 1) / wanted_;
    g_.rows = std::clamp((share + unit - 1) / unit * unit, unit, most);
  }

  void operator()() {
    for (size_t i = 0; i < sequences_.size(); i++) plan(i);
    const std::unique_ptr<Sums[]> sums(new Sums[joined_]());
    for (const Planned& p : tasks_) sums[p.sums].left++;
    share_out(tasks_.size(), work_, [&](int64_t i) { run(tasks_[i], sums[tasks_[i].sums]); });
  }

 private:
  struct Planned {
    GradientTask task;
    int64_t sums;
    AttentionBackwardKernels::Sizes bytes;
  };

  void plan(int64_t index) {
    const AttentionSequence& s = sequences_[index];
    if (!s.keys) return;
    const int64_t tiles = (s.queries + g_.rows - 1) / g_.rows, parts = std::clamp<int64_t>(tiles, 1, wanted_);
    const auto bytes = kernels_.sizes[dtype_](g_, index, parts);
    for (int64_t kv_head = 0; kv_head < g_.a.kv_heads; kv_head++, joined_++)
      for (int64_t part = 0; part < parts; part++) tasks_.push_back({{index, kv_head, part, parts}, joined_, bytes});
    work_ += 5.0 * s.queries * s.keys * g_.a.dim * g_.a.heads;
  }

  // The sums of a part lie in the thread's own memory where there is one part, else in memory that all of them share.
  void run(const Planned& p, Sums& shared) {
    static thread_local Memory memory;
    const bool alone = p.task.parts == 1;
    char* scratch = memory.at_least(p.bytes.scratch_bytes + (alone ? p.bytes.sums_bytes : 0));
    char* sums = scratch + p.bytes.scratch_bytes;
    if (!alone) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!shared.memory) shared.memory = std::make_unique<Memory>();
        sums = shared.memory->at_least(p.task.parts * p.bytes.sums_bytes);
      }
    }
    kernels_.run[dtype_](g_, p.task, scratch, sums + (alone ? 0 : p.task.part * p.bytes.sums_bytes));
    if (shared.left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    kernels_.finish[dtype_](g_, p.task, sums, p.bytes.sums_bytes);
    shared.memory.reset();
  }

  AttentionGradients g_;
  const std::vector<AttentionSequence>& sequences_;
  const AttentionBackwardKernels& kernels_ = pick(attention_backward_tiers);
  int dtype_;
  int64_t wanted_;  // parts of a KV head
  int64_t joined_ = 0;
  double work_ = 0;
  std::vector<Planned> tasks_;
  std::mutex mutex_;
};

void check(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Dtype dtype = dtype_of(q);
  STD_TORCH_CHECK(
      dtype_of(k) == dtype && dtype_of(v) == dtype && dtype_of(dout) == dtype && dtype_of(dlse) == wide(dtype),
      "q, k, v and dout must be of one dtype, and dlse of its accumulation dtype");
  STD_TORCH_CHECK(dout.dim() == q.dim() && dout.numel() == q.numel(), "dout must have q's shape");
  STD_TORCH_CHECK(dlse.numel() * q.size(-1) == q.numel() && dlse.dim() == q.dim() - 1,
                  "dlse must be [B, H, S] or [H, T]");
  STD_TORCH_CHECK(k.dim() == q.dim() && v.dim() == q.dim() && v.numel() == k.numel(), "k and v must be of one shape");
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_in, const Tensor& dlse, const Tensor& q_in,
                                                      const Tensor& k_in, const Tensor& v_in, const Tensor&,
                                                      const Tensor&, int64_t window, double scale, bool causal,
                                                      Maybe cu_q, Maybe cu_k, int64_t, int64_t) {
  check(dout_in, dlse, q_in, k_in, v_in);
  const Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in), dout = unit_stride(dout_in);
  const Dtype dtype = dtype_of(q);
  Tensor dq = empty(q.sizes(), dtype), dk = empty(k.sizes(), dtype), dv = empty(v.sizes(), dtype);
  const bool packed = q.dim() == 3;
  const int64_t sequences = packed ? cu_q->numel() - 1 : q.size(0);
  AttentionGradients g = {};
  g.a = describe_attention(q, k, window, scale, causal);
  const Tokens tq(q), tk(k), tv(v), td(dout), to(dq), tdk(dk), tdv(dv);
  g.dout_row = td.row, g.dout_head = td.head;
  g.dlse_head = dlse.stride(packed ? 0 : 1), g.dlse_row = dlse.stride(packed ? 1 : 2);
  const int64_t lse_size = size_of(wide(dtype)), lse_batch = packed ? 0 : dlse.stride(0);
  std::vector<int64_t> starts_q, starts_k;
  if (packed) {
    starts_q = token_starts(cu_q, sequences, q.size(0));
    starts_k = token_starts(cu_k, sequences, k.size(0));
    if (dk.numel()) std::memset(mutable_data(dk), 0, dk.numel() * size_of(dtype));
    if (dv.numel()) std::memset(mutable_data(dv), 0, dv.numel() * size_of(dtype));
    if (dq.numel()) std::memset(mutable_data(dq), 0, dq.numel() * size_of(dtype));
  } else if (!k.size(1) && dq.numel()) {
    std::memset(mutable_data(dq), 0, dq.numel() * size_of(dtype));
  }
  std::vector<AttentionSequence> all(sequences);
  std::vector<GradientSequence> more(sequences);
  for (int64_t b = 0; b < sequences; b++) {
    AttentionSequence& s = all[b];
    const int64_t dense = packed ? 0 : b, first_q = packed ? starts_q[b] : 0, first_k = packed ? starts_k[b] : 0;
    s.queries = packed ? starts_q[b + 1] - first_q : q.size(1);
    s.keys = packed ? starts_k[b + 1] - first_k : k.size(1);
    s.q = tq.at(dense, first_q);
    s.out = const_cast<char*>(to.at(dense, first_q));
    s.spans[0] = {tk.at(dense, first_k), tv.at(dense, first_k), tk.row, tk.head, tv.row, tv.head, s.keys};
    more[b] = {td.at(dense, first_q), data(dlse) + (b * lse_batch + first_q * g.dlse_row) * lse_size,
               const_cast<char*>(tdk.at(dense, first_k)), const_cast<char*>(tdv.at(dense, first_k))};
  }
  g.sequences = more.data();
  Backward(g, all)();
  return {dq, dk, dv};
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) { mk::implement<&mk::attention_backward>(m, "attention_backward"); }

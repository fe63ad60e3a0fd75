// mistral_kernels::attention_backward on a CPU.
#include "cpu/attention_backward.h"

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "torch/attention_run.h"
#include "torch/gradient_parts.h"
#include "torch/ops.h"
#include "torch/work.h"

namespace mk {
namespace {

// Keys whose gradients are joined at a time.
constexpr int64_t joined_keys = 64;
// Sums kept for the next call.
constexpr size_t largest_spare = size_t{64} << 20;
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

// Memory for the sums of parts that other threads join. One call gives it to the next: a fresh block costs a page
// fault every 4 KB.
class Blocks {
 public:
  std::unique_ptr<Memory> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Memory>();
    std::unique_ptr<Memory> memory = std::move(free_.back());
    free_.pop_back();
    return memory;
  }

  void give(std::unique_ptr<Memory> memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(memory));
  }

  void shrink() {
    size_t bytes = 0, kept = 0;
    while (kept < free_.size() && (bytes += free_[kept]->size()) <= largest_spare) kept++;
    free_.resize(kept);
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Memory>> free_;
};

std::atomic<Blocks*> spare{nullptr};
std::atomic<uint64_t> runs{0};

// What joins the sums of a KV head.
struct Head {
  int64_t first, count, keys;  // its tasks, one after the other
  std::atomic<int64_t> left;
  std::vector<std::unique_ptr<Memory>> sums;
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
    const int64_t parts = heads ? (gradient_cuts[0].tasks + heads - 1) / heads : 1;
    const int64_t unit = kernels_.row_unit[dtype_];
    g_.heads = 1;
    g_.rows = rows_of_tile(g_.a, keys, unit);
    if (!kernels_.several_heads[dtype_]) return;
    g_.heads = std::min(g_.a.heads / g_.a.kv_heads, stacked_rows / unit);
    const int64_t most = stacked_rows / g_.heads / unit * unit, share = (queries + parts - 1) / parts;
    g_.rows = std::clamp((share + unit - 1) / unit * unit, unit, most);
  }

  void operator()() {
    plan();
    const auto cost = [this](int64_t i) { return costs_[i]; };
    share_out_parts(even_parts(tasks_.size(), cost), work_, [this](int64_t i) { run(i); });
    join();
    blocks_->shrink();
    delete spare.exchange(blocks_.release());
  }

 private:
  void plan() {
    std::vector<GradientParts> sequences;
    double all = 1;
    for (const AttentionSequence& s : sequences_) {
      sequences.emplace_back(g_, s, !kernels_.several_heads[dtype_]);
      all += sequences.back().scores();
      work_ += 5.0 * s.queries * s.keys * g_.a.dim * g_.a.heads;
    }
    for (size_t i = 0; i < sequences_.size(); i++)
      if (sequences_[i].keys) plan(i, sequences[i], sequences[i].scores() / all);
    heads_.reset(new Head[planned_.size()]());
    for (size_t i = 0; i < planned_.size(); i++) {
      const auto [first, count] = planned_[i];
      heads_[i].first = first, heads_[i].left = heads_[i].count = count;
      heads_[i].keys = sequences_[tasks_[first].sequence].keys;
      if (count > 1) heads_[i].sums.resize(count);
    }
  }

  void plan(int64_t index, const GradientParts& sequence, double share) {
    std::vector<GradientTask> parts = sequence.cut(share);
    std::vector<double> costs;
    for (GradientTask& task : parts) {
      task.sequence = index;
      const auto bytes = kernels_.sizes[dtype_](g_, task);
      scratch_bytes_ = std::max(scratch_bytes_, bytes.scratch_bytes);
      sums_bytes_ = std::max(sums_bytes_, bytes.sums_bytes);
      costs.push_back(sequence.cost(task));
    }
    for (int64_t kv_head = 0; kv_head < g_.a.kv_heads; kv_head++) {
      for (GradientTask& task : parts) task.kv_head = kv_head;
      head_of_.insert(head_of_.end(), parts.size(), planned_.size());
      planned_.push_back({tasks_.size(), parts.size()});
      tasks_.insert(tasks_.end(), parts.begin(), parts.end());
      costs_.insert(costs_.end(), costs.begin(), costs.end());
    }
  }

  // The sums of a part lie in the thread's own memory where it is the only one.
  void run(int64_t i) {
    static thread_local Memory memory;
    GradientTask& task = tasks_[i];
    Head& head = heads_[head_of_[i]];
    const bool alone = head.count == 1;
    char* scratch = memory.at_least(scratch_bytes_ + (alone ? sums_bytes_ : 0));
    task.sums = scratch + scratch_bytes_;
    if (!alone) {
      std::unique_ptr<Memory>& block = head.sums[i - head.first];
      block = blocks_->take();
      task.sums = block->at_least(sums_bytes_);
    }
    run_packing(i, scratch);
    const int64_t done = done_.fetch_add(1, std::memory_order_relaxed) + 1;
    if (head.left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    // At the end all threads join.
    if (!alone && done + threads_ > static_cast<int64_t>(tasks_.size())) return;
    finish(head, 0, head.keys);
    release(head);
  }

  // With the keys that a task before has packed in this thread's memory.
  void run_packing(int64_t i, char* scratch) const {
    static thread_local uint64_t run;
    static thread_local int64_t head, packed;
    if (run != id_ || head != head_of_[i] || windowed(g_.a)) run = id_, head = head_of_[i], packed = 0;
    packed = kernels_.run[dtype_](g_, tasks_[i], scratch, packed);
  }

  void finish(const Head& head, int64_t first, int64_t last) const {
    kernels_.finish[dtype_](g_, tasks_.data() + head.first, head.count, first, last);
  }

  void release(Head& head) {
    for (auto& block : head.sums) blocks_->give(std::move(block));
    head.keys = 0;
  }

  // What is left when all tasks are done.
  void join() {
    std::vector<std::pair<Head*, int64_t>> pieces;
    for (size_t i = 0; i < planned_.size(); i++)
      for (int64_t key = 0; key < heads_[i].keys; key += joined_keys) pieces.push_back({&heads_[i], key});
    share_out(pieces.size(), work_, [&](int64_t i) {
      const auto [head, key] = pieces[i];
      finish(*head, key, std::min(key + joined_keys, head->keys));
    });
    for (size_t i = 0; i < planned_.size(); i++)
      if (heads_[i].keys) release(heads_[i]);
  }

  static std::unique_ptr<Blocks> take_spare() {
    std::unique_ptr<Blocks> blocks(spare.exchange(nullptr));
    return blocks ? std::move(blocks) : std::make_unique<Blocks>();
  }

  AttentionGradients g_;
  const std::vector<AttentionSequence>& sequences_;
  const AttentionBackwardKernels& kernels_ = pick(attention_backward_tiers);
  const int64_t threads_ = threads();
  int dtype_;
  int64_t scratch_bytes_ = 0, sums_bytes_ = 0;
  double work_ = 0;
  std::vector<GradientTask> tasks_;
  std::vector<double> costs_;
  std::vector<int64_t> head_of_;
  std::vector<std::pair<int64_t, int64_t>> planned_;  // of each KV head the first task, and how many
  std::unique_ptr<Head[]> heads_;
  std::unique_ptr<Blocks> blocks_ = take_spare();
  std::atomic<int64_t> done_{0};
  const uint64_t id_ = ++runs;
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

#include "torch/attention_run.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "torch/work.h"

namespace mk {
namespace {

// Memory of the call before, if it was not too large: a fresh block costs a page fault every 4 KB.
constexpr size_t largest_spare = size_t{64} << 20;
std::atomic<Memory*> spare{nullptr};

std::unique_ptr<Memory> take_spare() {
  std::unique_ptr<Memory> memory(spare.exchange(nullptr));
  return memory ? std::move(memory) : std::make_unique<Memory>();
}

void keep_spare(std::unique_ptr<Memory> memory) {
  if (memory->size() <= largest_spare) delete spare.exchange(memory.release());
}

// What packing an element of a key and of a value takes, in multiply-adds.
constexpr double packing_work = 8;
// Panels of a KV head that a thread's L2 cache holds beside a tile.
constexpr int64_t own_bytes = int64_t{1} << 19;
// Rows of a KV head for each thread that works on it, in whose products packing its keys once a thread is lost.
constexpr int64_t own_rows = 32;

std::atomic<uint64_t> runs{0};

struct Work {
  AttentionItem item;
  int64_t pieces, join,
      first_partial;  // decoded: how many items share the outputs, the counter of those done, the first
  double cost;
};

class Run {
 public:
  Run(Attention a, std::vector<AttentionSequence> sequences) : a_(a), sequences_(std::move(sequences)) {
    a_.sequences = sequences_.data();
    group_ = a_.heads / a_.kv_heads;
    dtype_ = static_cast<int>(a_.dtype);
  }

  void operator()() {
    plan();
    if (work_.empty()) return;
    memory_ = take_spare();
    tile_sizes_ = tiles_.sizes[dtype_](a_.dim, most_tile_rows_);
    const DecodeSizes decode = decoder_.sizes[dtype_](a_.dim, most_decode_rows_);
    reserve(decode);
    pack();
    scratch_bytes_ = std::max(tile_sizes_.scratch_bytes, decode.scratch_bytes);
    const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[joins_]());
    const auto one = [&](int64_t i) { run(work_[i], done.get()); };
    if (own_panels_)
      share_out_parts(even_parts(work_.size(), [this](int64_t i) { return work_[i].cost; }), total_, one);
    else
      share_out(work_.size(), total_, one);
    keep_spare(std::move(memory_));
  }

 private:
  void plan() {
    plan_packing();
    int64_t tile_items = 0;
    for (const AttentionSequence& s : sequences_)
      if (!decoded(s)) tile_items += (s.queries + tile_rows - 1) / tile_rows * a_.kv_heads;
    // Threads without work cost more than keys read from the cache once for each head.
    const bool few = tile_items < 4 * threads();
    const int64_t tile_group = few ? 1 : std::min(group_, tile_heads);
    for (size_t i = 0; i < sequences_.size(); i++) {
      AttentionSequence& s = sequences_[i];
      s.first_key = first_visible(a_, s, 0);
      s.first_panel = own_panels_ ? 0 : a_.panels;
      if (!s.queries) continue;
      if (decoded(s)) {
        plan_decode(i);
        continue;
      }
      if (!own_panels_) {
        for (int64_t p = 0; s.first_key + p * tile_sizes_.panel_keys < s.keys; p++) panels_.push_back({int64_t(i), p});
        a_.panels = panels_.size();
      }
      plan_tiles(i, tile_group);
    }
    if (work_.size() < 2) return;  // the sort would ask for memory first
    std::stable_sort(work_.begin(), work_.end(), [this](const Work& x, const Work& y) {
      const int64_t head_x = own_panels_ ? head_of(x) : 0, head_y = own_panels_ ? head_of(y) : 0;
      return head_x != head_y ? head_x < head_y : x.cost > y.cost;
    });
  }

  // Short sequences are packed by each thread that works on them: waiting until all are packed, and fetching the panels
  // from another core, takes longer.
  void plan_packing() {
    tile_sizes_ = tiles_.sizes[dtype_](a_.dim, 1);
    const int64_t key_bytes = (tile_sizes_.key_panel_bytes + tile_sizes_.value_panel_bytes) / tile_sizes_.panel_keys;
    const auto tiled = [this](const AttentionSequence& s) { return !decoded(s); };
    const int64_t heads = std::count_if(sequences_.begin(), sequences_.end(), tiled) * a_.kv_heads;
    own_panels_ = heads > 0;
    for (const AttentionSequence& s : sequences_)
      own_panels_ &=
          decoded(s) || (s.keys * key_bytes <= own_bytes && s.queries * group_ * heads >= own_rows * threads());
  }

  // A number for each KV head of each sequence.
  int64_t head_of(const Work& work) const {
    return work.item.sequence * a_.kv_heads + work.item.head / (work.pieces ? 1 : group_);
  }

  bool decoded(const AttentionSequence& s) const { return mk::decoded(a_, s.queries); }

  void add(const AttentionItem& item, int64_t pieces, int64_t first_partial, double rows, double keys) {
    work_.push_back({item, pieces, joins_, first_partial, rows * keys});
    total_ += 2 * rows * keys * a_.dim;
  }

  void plan_tiles(int64_t index, int64_t tile_group) {
    const AttentionSequence& s = sequences_[index];
    for (int64_t first = 0; first < s.queries; first += tile_rows)
      for (int64_t kv_head = 0; kv_head < a_.kv_heads; kv_head++)
        for (int64_t g = 0; g < group_; g += tile_group) {
          const int64_t heads = std::min(tile_group, group_ - g), last = std::min(first + tile_rows, s.queries);
          const int64_t rows = heads * (last - first);
          most_tile_rows_ = std::max(most_tile_rows_, rows);
          add({index, kv_head * group_ + g, heads, first, last, 0}, 0, 0, rows,
              end_visible(a_, s, last - 1) - first_visible(a_, s, first));
        }
  }

  // The pieces depend on the sequence alone, so results do not depend on the threads or on the rest of the batch.
  void plan_decode(int64_t index) {
    const AttentionSequence& s = sequences_[index];
    const int64_t begin = s.first_key, keys = s.keys - begin,
                  length = keys > 4 * piece_keys ? piece_keys : piece_keys / 2;
    const int64_t pieces = std::max<int64_t>(1, (keys + length - 1) / length), rows = s.queries * group_;
    most_decode_rows_ = std::max(most_decode_rows_, rows);
    for (int64_t head = 0; head < a_.kv_heads; head += decode_heads, joins_++) {
      const int64_t heads = std::min(decode_heads, a_.kv_heads - head), first_partial = partials_;
      for (int64_t p = 0; p < pieces; p++, partials_++) {
        const int64_t first = begin + p * length, last = std::min(first + length, s.keys);
        add({index, head, heads, first, last, partials_}, pieces, first_partial, heads * rows, last - first);
      }
    }
  }

  void reserve(const DecodeSizes& decode) {
    const auto line = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    a_.partial_bytes = line(decode.partial_bytes);
    const int64_t panels = a_.kv_heads * a_.panels;
    const int64_t keys = line(panels * tile_sizes_.key_panel_bytes),
                  values = line(panels * tile_sizes_.value_panel_bytes);
    a_.key_panels = memory_->at_least(keys + values + partials_ * a_.partial_bytes);
    a_.value_panels = a_.key_panels + keys;
    a_.partials = a_.value_panels + values;
  }

  void pack() {
    const int64_t count = panels_.size(), keys = count * a_.kv_heads * tile_sizes_.panel_keys;
    share_out(count * a_.kv_heads, packing_work * keys * a_.dim, [&](int64_t i) {
      const auto [sequence, panel] = panels_[i % count];
      tiles_.pack[dtype_](a_, sequence, i / count, panel);
    });
  }

  void run(const Work& work, std::atomic<int64_t>* done) const {
    static thread_local Memory scratch;
    char* memory = scratch.at_least(scratch_bytes_);
    if (!work.pieces) return own_panels_ ? run_packing(work, memory) : tiles_.tile[dtype_](a_, work.item, memory);
    decoder_.run[dtype_](a_, work.item, memory);
    if (done[work.join].fetch_add(1, std::memory_order_acq_rel) + 1 < work.pieces) return;
    AttentionItem first = work.item;
    first.partial = work.first_partial;
    decoder_.join[dtype_](a_, first, work.pieces);
  }

  // A tile with the thread's own panels, of which those that an earlier tile has packed are there.
  void run_packing(const Work& work, char* scratch) const {
    static thread_local Memory memory;
    static thread_local uint64_t run;
    static thread_local int64_t head, packed;
    const AttentionSequence& s = sequences_[work.item.sequence];
    const int64_t needed =
        (end_visible(a_, s, work.item.last - 1) - s.first_key + tile_sizes_.panel_keys - 1) / tile_sizes_.panel_keys;
    const int64_t all = (s.keys - s.first_key + tile_sizes_.panel_keys - 1) / tile_sizes_.panel_keys;
    Attention a = a_;
    a.key_panels = memory.at_least(all * (tile_sizes_.key_panel_bytes + tile_sizes_.value_panel_bytes));
    a.value_panels = a.key_panels + all * tile_sizes_.key_panel_bytes;
    if (run != id_ || head != head_of(work)) run = id_, head = head_of(work), packed = 0;
    for (; packed < needed; packed++) tiles_.pack[dtype_](a, work.item.sequence, work.item.head / group_, packed);
    tiles_.tile[dtype_](a, work.item, scratch);
  }

  Attention a_;
  std::vector<AttentionSequence> sequences_;
  const AttentionKernels& tiles_ = pick(attention_tiers);
  const DecodeKernels& decoder_ = pick(attention_decode_tiers);
  int64_t group_, most_tile_rows_ = 1, most_decode_rows_ = 1, joins_ = 0, partials_ = 0, scratch_bytes_ = 0;
  int dtype_;
  double total_ = 0;
  TileSizes tile_sizes_;
  bool own_panels_ = false;
  const uint64_t id_ = ++runs;
  std::vector<Work> work_;
  struct Panel {
    int64_t sequence, panel;
  };
  std::vector<Panel> panels_;
  std::unique_ptr<Memory> memory_;
};

}  // namespace

Tokens::Tokens(const Tensor& t) : data(mk::data(t)), size(is_int8(t) ? 1 : size_of(dtype_of(t))) {
  const int64_t dims = t.dim();
  batch = dims == 4 ? t.stride(0) : 0;
  row = t.stride(dims - 3);
  head = t.stride(dims - 2);
}

std::vector<int64_t> token_starts(const std::optional<Tensor>& cu, int64_t sequences, int64_t tokens) {
  std::vector<int64_t> starts(sequences + 1);
  if (!cu) {
    for (int64_t i = 0; i <= sequences; i++) starts[i] = std::min(i, tokens);
    return starts;
  }
  const Tensor ends = unit_stride(*cu);
  const int32_t* values = static_cast<const int32_t*>(ends.const_data_ptr());
  for (int64_t i = 1; i <= sequences; i++) {
    const int64_t end = i < ends.numel() ? values[i] : tokens;
    starts[i] = std::clamp(end, starts[i - 1], tokens);
  }
  return starts;
}

Attention describe_attention(const Tensor& q, const Tensor& k, int64_t window, double scale, bool causal) {
  Attention a = {};
  a.dtype = dtype_of(q);
  a.heads = q.size(-2);
  a.kv_heads = k.size(-2);
  a.dim = q.size(-1);
  const Tokens rows(q);
  a.q_row = rows.row;
  a.q_head = rows.head;
  a.out_row = a.heads * a.dim;
  a.out_head = a.dim;
  a.window = window;
  a.scale = scale;
  a.causal = causal;
  return a;
}

void run_attention(Attention a, std::vector<AttentionSequence> sequences) { Run(a, std::move(sequences))(); }

}  // namespace mk

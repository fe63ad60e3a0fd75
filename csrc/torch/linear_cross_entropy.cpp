// mistral_kernels::linear_cross_entropy and its backward on a CPU: torch's products over blocks of words, the softmax
// and the product that sums over the blocks here.
#include "cpu/linear_cross_entropy.h"

#include <cmath>
#include <vector>

#include "torch/products.h"
#include "torch/work.h"

namespace mk {
namespace {

// Logits of a block, 8 MiB of bf16, which the third-level cache holds between the passes over them. From 2^20 to 2^23
// the time is the same within 3 % ([1024, 576] by V 49152, Zen 5).
constexpr int64_t block_logits = int64_t{1} << 22;
// Words of a block, at least, where tokens are many: a product of fewer is bound by memory. But never more than an
// eighth of all words, so that the logits of all of them never exist.
constexpr int64_t least_words = 512;
// Words of packed weights of a product, 8 MiB.
constexpr int64_t packed_words = int64_t{1} << 21;

int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }
int64_t multiple(int64_t n, int64_t of) { return pieces(n, of) * of; }

// Words of a block, at most those of `chunk` tokens' logits; blocks are of about one size.
int64_t words_of_block(int64_t tokens, int64_t vocabulary, int64_t chunk) {
  int64_t most = std::max(block_logits / std::max<int64_t>(tokens, 1), std::min(least_words, vocabulary / 8));
  if (chunk && chunk < tokens)
    most = std::min(most, static_cast<int64_t>(static_cast<double>(chunk) / tokens * vocabulary));
  most = std::clamp<int64_t>(most, 1, vocabulary);
  const int64_t even = pieces(vocabulary, pieces(vocabulary, most));
  return std::min(most, multiple(even, 64));
}

// Panels of a task, where each of `down` equal strips of rows is cut into tasks of so many. Threads without a task in
// the last turn are worth narrower ones, within a tenth of the shortest time.
int64_t panels_of_task(int64_t down, int64_t panels) {
  const int64_t least = pieces(mk::threads(), down);
  const auto width = [&](int64_t across) { return pieces(panels, across); };
  const auto time = [&](int64_t across) {
    return pieces(down * pieces(panels, width(across)), mk::threads()) * width(across);
  };
  const int64_t most = std::min(panels, 4 * least);
  int64_t shortest = time(std::min(least, panels));
  for (int64_t across = least; across <= most; across++) shortest = std::min(shortest, time(across));
  int64_t across = std::min(least, panels);
  while (10 * time(across) > 11 * shortest) across++;
  return width(across);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

// Memory of one size for matrices of up to that many elements.
class Buffer {
 public:
  Buffer(int64_t elements, Dtype dtype) : flat_(empty({elements}, dtype)) {}
  Tensor as(int64_t rows, int64_t columns) const {
    return torch::stable::view(rows_of(flat_, 0, rows * columns), {rows, columns});
  }

 private:
  Tensor flat_;
};

template <class Scalar>
void add(Tensor& total, const Tensor& part) {
  Scalar* to = reinterpret_cast<Scalar*>(mutable_data(total));
  const Scalar* from = reinterpret_cast<const Scalar*>(data(part));
  in_parallel(total.numel(), grain_elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) to[i] += from[i];
  });
}

// hidden [T, N], weight [V, N] and labels [T], and the products' dtype: that of the logits as they lie in memory.
class Loss {
 public:
  Loss(const Tensor& hidden_in, const Tensor& weight_in, const Tensor& labels_in, int64_t ignore_index, int64_t chunk)
      : dtype_(dtype_of(hidden_in)),
        pairs_(dtype_ == Dtype::bf16 && kernels_.pairs),
        products_(pairs_ ? dtype_ : wide(dtype_)),
        tokens_(check(hidden_in, weight_in, labels_in)),
        n_(hidden_in.size(1)),
        vocabulary_(weight_in.size(0)),
        words_(words_of_block(tokens_, vocabulary_, chunk)),
        hidden_(closed_rows(hidden_in)),
        weight_(weight_in),
        labels_(contiguous(labels_in)),
        logits_(tokens_ * words_, products_),
        converted_(dtype_ == products_ ? 0 : words_ * n_, products_),
        ignore_index_(ignore_index) {
    if (dtype_ != products_) {
      hidden_ = empty({tokens_, n_}, products_);
      torch::stable::copy_(hidden_, hidden_in);
    }
  }

  std::tuple<Tensor, Tensor> forward() {
    std::vector<LossState> states(tokens_);
    const auto kernel = kernels_.add_losses[static_cast<int>(dtype_)];
    each_block([&](const Block& block) {
      each_row(block, [&](const LogitBlock& rows, int64_t first) { kernel(rows, states.data() + first); });
    });
    Tensor losses = empty({tokens_}, wide(dtype_)), lse = empty({tokens_}, wide(dtype_));
    if (dtype_ == Dtype::f64)
      finish<double>(states, losses, lse);
    else
      finish<float>(states, losses, lse);
    return {losses, lse};
  }

  std::tuple<Tensor, Tensor> backward(const Tensor& dlosses_in, const Tensor& lse_in, bool of_hidden, bool of_weight) {
    STD_TORCH_CHECK(dtype_of(dlosses_in) == wide(dtype_) && dtype_of(lse_in) == wide(dtype_),
                    "dlosses and lse must be of the accumulation dtype");
    STD_TORCH_CHECK(
        dlosses_in.dim() == 1 && dlosses_in.numel() == tokens_ && lse_in.dim() == 1 && lse_in.numel() == tokens_,
        "dlosses and lse must be [", tokens_, "]");
    const Tensor dlosses = contiguous(dlosses_in), lse = contiguous(lse_in);
    const int64_t size = size_of(wide(dtype_));
    const auto kernel = kernels_.gradients[static_cast<int>(dtype_)];
    Tensor dhidden = of_hidden ? empty({tokens_, n_}, dtype_) : empty({0}, dtype_);
    Tensor dweight = of_weight ? empty({vocabulary_, n_}, dtype_) : empty({0}, dtype_);
    const bool own = dtype_ == products_;
    const bool alone = words_ >= vocabulary_;  // one block: nothing to sum
    Tensor total =
        own && (alone || !pairs_) ? dhidden : empty({of_hidden ? sum_rows() : 0, sum_columns()}, wide(dtype_));
    const Buffer part(of_hidden && !alone && !pairs_ ? tokens_ * n_ : 0, products_);
    const Buffer dwords(of_weight && !own ? words_ * n_ : 0, products_);
    each_block([&](const Block& block) {
      each_row(block, [&](const LogitBlock& rows, int64_t first) {
        kernel(rows, data(lse) + first * size, data(dlosses) + first * size);
      });
      if (of_weight) {
        Tensor to = rows_of(dweight, block.first, block.words);
        Tensor out = own ? to : dwords.as(block.words, n_);
        torch_mm(out, transposed(block.logits), hidden_);
        if (!own) torch::stable::copy_(to, out);
      }
      if (!of_hidden) return;
      if (pairs_ && !alone) {
        add_pairs(total, block);
      } else if (!block.first) {
        torch_mm(total, block.logits, block.weight);
      } else {
        Tensor more = part.as(tokens_, n_);
        torch_mm(more, block.logits, block.weight);
        products_ == Dtype::f64 ? add<double>(total, more) : add<float>(total, more);
      }
    });
    if (of_hidden && !total.is(dhidden)) {
      Tensor rows = rows_of(total, 0, tokens_);
      torch::stable::copy_(dhidden, torch::stable::narrow(rows, 1, 0, n_));
    }
    return {dhidden, dweight};
  }

 private:
  struct Block {
    int64_t first, words;
    Tensor weight, logits;  // [words, N] and [T, words]
  };

  static int64_t check(const Tensor& hidden, const Tensor& weight, const Tensor& labels) {
    STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == hidden.size(1),
                    "hidden must be [T, N] and weight [V, N], V at least 1");
    STD_TORCH_CHECK(dtype_of(weight) == dtype_of(hidden), "hidden and weight must be of one dtype");
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.numel() == hidden.size(0),
                    "labels must be int64 [", hidden.size(0), "]");
    return hidden.size(0);
  }

  template <class F>
  void each_block(const F& f) {
    for (int64_t first = 0; first < vocabulary_; first += words_) {
      const int64_t words = std::min(words_, vocabulary_ - first);
      Tensor weight = rows_of(weight_, first, words);
      if (dtype_ != products_) {
        Tensor wide_weight = converted_.as(words, n_);
        torch::stable::copy_(wide_weight, weight);
        weight = wide_weight;
      }
      Tensor logits = logits_.as(tokens_, words);
      torch_mm(logits, hidden_, transposed(weight));
      f(Block{first, words, weight, logits});
    }
  }

  // f(rows of the block, the first of them) on all threads.
  template <class F>
  void each_row(const Block& block, const F& f) const {
    const int64_t size = size_of(products_);
    const auto* labels = reinterpret_cast<const int64_t*>(data(labels_));
    char* logits = mutable_data(block.logits);
    in_parallel(tokens_, grain_rows(block.words), [&](int64_t begin, int64_t end) {
      f(LogitBlock{logits + begin * block.words * size, block.words, end - begin, block.first, block.words,
                   labels + begin, ignore_index_, vocabulary_},
        begin);
    });
  }

  template <class Scalar>
  void finish(const std::vector<LossState>& states, Tensor& losses, Tensor& lse) const {
    const auto* labels = reinterpret_cast<const int64_t*>(data(labels_));
    Scalar* loss = reinterpret_cast<Scalar*>(mutable_data(losses));
    Scalar* of_row = reinterpret_cast<Scalar*>(mutable_data(lse));
    for (int64_t i = 0; i < tokens_; i++) {
      const LossState& s = states[i];
      const double exact = (std::isinf(s.top) ? 0 : s.top) + std::log(s.sum);
      const bool known = labels[i] >= 0 && labels[i] < vocabulary_;
      of_row[i] = static_cast<Scalar>(exact);
      loss[i] = labels[i] == ignore_index_ ? 0 : static_cast<Scalar>(known ? exact - s.picked : NAN);
    }
  }

  int64_t sum_rows() const { return pairs_ ? tokens_ + pair_strip - 1 : tokens_; }
  int64_t sum_columns() const { return pairs_ ? pair_columns(n_) : n_; }

  // total += block.logits . block.weight, shared out by rows, and by columns where rows are few. Every element is
  // summed in one order, however it is shared out.
  void add_pairs(Tensor& total, const Block& block) {
    if (!tokens_ || !n_) return;
    const Tensor weight = unit_stride(block.weight);
    const int64_t columns = pair_columns(n_);
    const int64_t most = std::max<int64_t>(256, packed_words / std::max<int64_t>(columns, 1) / 256 * 256) * 2;
    const int64_t row_tasks = multiple(pieces(tokens_, 510), std::min(mk::threads(), pieces(tokens_, 16 * pair_strip)));
    const int64_t rows = multiple(pieces(tokens_, row_tasks), pair_rows), down = pieces(tokens_, rows);
    const int64_t panels = pieces(columns, pair_panel);
    const int64_t each = panels_of_task(down, panels), across = pieces(panels, each), width = each * pair_panel;
    char* packed = packed_.at_least(pieces(std::min(most, block.words), 2) * columns * 4);
    for (int64_t k = 0; k < block.words; k += most) {
      const int64_t count = std::min(most, block.words - k), words = pieces(count, 2);
      const char* from = data(weight) + k * weight.stride(0) * 2;
      in_parallel(
          words, std::max<int64_t>(1, grain_elements / std::max<int64_t>(columns, 1)),
          [&](int64_t begin, int64_t end) { kernels_.pack(from, weight.stride(0), count, n_, begin, end, packed); });
      PairProduct product{data(block.logits) + k * 2,
                          block.words,
                          count,
                          packed,
                          reinterpret_cast<float*>(mutable_data(total)),
                          tokens_,
                          columns,
                          0,
                          0,
                          0,
                          0,
                          !block.first && !k};
      share_out(down * across, 1.0 * tokens_ * columns * count, [&](int64_t i) {
        PairProduct share = product;
        share.first_row = i % down * rows;
        share.last_row = std::min(tokens_, share.first_row + rows);
        share.first_column = i / down * width;
        share.last_column = std::min(columns, share.first_column + width);
        if (share.first_column < columns) kernels_.multiply(share);
      });
    }
  }

  const LinearCrossEntropyKernels& kernels_ = pick(linear_cross_entropy_tiers);
  const Dtype dtype_;
  const bool pairs_;
  const Dtype products_;
  const int64_t tokens_, n_, vocabulary_, words_;
  Tensor hidden_, weight_, labels_;
  const Buffer logits_, converted_;
  const int64_t ignore_index_;
  Memory packed_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                   int64_t ignore_index, int64_t chunk) {
  return Loss(hidden, weight, labels, ignore_index, chunk).forward();
}

std::tuple<Tensor, Tensor> backward(const Tensor& dlosses, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& labels, const Tensor& lse, int64_t ignore_index, int64_t chunk,
                                    bool of_hidden, bool of_weight) {
  return Loss(hidden, weight, labels, ignore_index, chunk).backward(dlosses, lse, of_hidden, of_weight);
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("linear_cross_entropy", mk::boxed<&mk::forward>);
  m.impl("linear_cross_entropy_backward", mk::boxed<&mk::backward>);
}

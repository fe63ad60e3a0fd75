// What the torch side of every op needs, on torch's stable ABI: the chosen kernels, dtypes, strides, outputs, threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <initializer_list>

#include "cpu/isa.h"
#include "torch/entry.h"
#include "torch/threads.h"

namespace mk {

// Index into the `<op>_tiers` tables of isa.h; chosen when the library is loaded.
extern int tier;

// An op without kernels of its own for the last tiers has its best for them.
template <class Kernels, size_t n>
const Kernels& pick(const Kernels* const (&tiers)[n]) {
  return *tiers[static_cast<size_t>(tier) < n ? tier : n - 1];
}

// Throws where the dtype is none of the four.
Dtype dtype_of(const Tensor& t);

// Whether `t` holds int8 codes.
bool is_int8(const Tensor& t);

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::f64 ? 8 : 2; }

// The dtype of statistics such as rstd.
constexpr Dtype wide(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// A new contiguous tensor, on the CPU or on the device of `like`; several times quicker than torch::stable::empty,
// which looks up an operator.
Tensor empty(IntHeaderOnlyArrayRef sizes, Dtype dtype, const Tensor* like = nullptr);

// Throws unless all are on a CPU: the dispatcher sees to that, but short calls go past it.
void on_cpu(std::initializer_list<const Tensor*> tensors);

// Throws unless these are where packed sequences start and the last one ends: int32, from 0 to `tokens`, never falling.
void check_ends(const Tensor& ends, int64_t sequences, int64_t tokens);

// Whether the first `count` sizes of both are equal.
bool same_sizes(const Tensor& a, const Tensor& b, int64_t count);

// Whether both have the same shape.
inline bool same_shape(const Tensor& a, const Tensor& b) { return a.dim() == b.dim() && same_sizes(a, b, a.dim()); }

// `t` itself where its elements lie side by side in order, else a copy of torch's.
Tensor contiguous(const Tensor& t);

// `t` itself where kernels can read it in place: its last dimension has stride 1, and it has at most max_dims.
Tensor unit_stride(const Tensor& t);

// f(begin, end) over [0, count), on several threads where each gets at least `grain`.
template <class F>
void in_parallel(int64_t count, int64_t grain, const F& f) {
  if (stays(count <= grain))
    f(int64_t{0}, count);
  else
    fork_join(count, grain, f);
}

// Elements that keep a thread busy for some microseconds, about what waking it up costs.
constexpr int64_t grain_elements = 32768;

// Rows of `n` elements that one thread should at least take.
inline int64_t grain_rows(int64_t n) { return n >= grain_elements ? 1 : grain_elements / (n ? n : 1); }

// The leading dimensions of N tensors of one leading shape, merged where all strides allow: mostly a single one is
// left. Strides and offsets count elements.
template <int N>
class Rows {
 public:
  // All but the last `inner` dimensions of the first tensor; the others have the same leading ones.
  Rows(const Tensor* const (&tensors)[N], int64_t inner) {
    const auto sizes = tensors[0]->sizes();
    const int64_t leading = static_cast<int64_t>(sizes.size()) - inner;
    for (int64_t d = 0; d < leading; d++) {
      int64_t strides[N];
      for (int i = 0; i < N; i++) strides[i] = tensors[i]->strides()[d];
      add(sizes[d], strides);
    }
  }

  int64_t count() const { return count_; }
  // Runs of rows at equal distances.
  int64_t runs() const { return dims_ ? count_ / (size_[dims_ - 1] ? size_[dims_ - 1] : 1) : 1; }
  int64_t stride(int i) const { return dims_ ? stride_[dims_ - 1][i] : 0; }
  // The merged dimensions, outermost first.
  int dims() const { return dims_; }
  int64_t size(int d) const { return size_[d]; }
  int64_t stride(int d, int i) const { return stride_[d][i]; }

  // f(first, rows, offsets) for runs of rows at equal distances, stride(i), that together are the rows [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, const F& f) const {
    const int64_t run = dims_ ? size_[dims_ - 1] : 1;
    while (begin < end) {
      const int64_t left = run - begin % run, rows = left < end - begin ? left : end - begin;
      int64_t offsets[N] = {}, rest = begin;
      for (int d = dims_ - 1; d >= 0; d--) {
        for (int i = 0; i < N; i++) offsets[i] += rest % size_[d] * stride_[d][i];
        rest /= size_[d];
      }
      f(begin, rows, offsets);
      begin += rows;
    }
  }

  // Takes the innermost merged dimension away where it has stride 1 in every tensor; returns its size, else 1.
  int64_t take_unit_stride() {
    if (!dims_) return 1;
    for (int i = 0; i < N; i++)
      if (stride_[dims_ - 1][i] != 1) return 1;
    const int64_t n = size_[--dims_];
    count_ = n ? count_ / n : 0;
    return n;
  }

 private:
  void add(int64_t size, const int64_t (&strides)[N]) {
    count_ *= size;
    if (size == 1) return;
    bool merges = dims_ > 0;
    for (int i = 0; merges && i < N; i++) merges = stride_[dims_ - 1][i] == size * strides[i];
    if (!merges) size_[dims_++] = 1;
    size_[dims_ - 1] *= size;
    for (int i = 0; i < N; i++) stride_[dims_ - 1][i] = strides[i];
  }

  int dims_ = 0;
  int64_t count_ = 1, size_[max_dims], stride_[max_dims][N];
};

inline const char* data(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline char* mutable_data(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

}  // namespace mk

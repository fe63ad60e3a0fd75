// A tensor as the ops see it: torch's, or an array that a call from Python came with or that such a call returns.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>

#include "torch/direct.h"

namespace mk {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

constexpr int max_dims = 8;

// Memory of an output with its shape.
struct Block {
  void* data;
  int64_t dims, sizes[max_dims], strides[max_dims];
  ScalarType type;
  std::shared_ptr<Block> handed_over;  // to whom it was handed over, it is itself
};

// Thrown where an array would have to be a tensor of torch's.
struct NeedsTorch {};

class Tensor {
 public:
  using Torch = torch::stable::Tensor;

  Tensor() = default;
  Tensor(Torch t)
      : torch_(std::move(t)),
        dims_(torch_->dim()),
        sizes_(torch_->sizes().data()),
        strides_(torch_->strides().data()),
        type_(torch_->scalar_type()) {}
  explicit Tensor(AtenTensorHandle handle) : Tensor(Torch(handle)) {}
  explicit Tensor(const Array& a)
      : data_(a.data), dims_(a.dims), sizes_(a.sizes), strides_(a.strides), type_(static_cast<ScalarType>(a.type)) {}
  explicit Tensor(std::shared_ptr<Block> block)
      : block_(std::move(block)),
        data_(block_->data),
        dims_(block_->dims),
        sizes_(block_->sizes),
        strides_(block_->strides),
        type_(block_->type) {}

  // For torch's functions.
  operator Torch&() const {
    needs_torch();
    return *torch_;
  }
  void needs_torch() const {
    if (!torch_) throw NeedsTorch();
  }
  AtenTensorHandle get() const { return static_cast<Torch&>(*this).get(); }
  const std::shared_ptr<Block>& block() const { return block_; }
  // Whether one is a copy of the other's handle.
  bool is(const Tensor& other) const {
    return torch_ && other.torch_ ? torch_->get() == other.torch_->get() : data_ == other.data_;
  }

  int64_t dim() const { return dims_; }
  IntHeaderOnlyArrayRef sizes() const { return {sizes_, static_cast<size_t>(dims_)}; }
  IntHeaderOnlyArrayRef strides() const { return {strides_, static_cast<size_t>(dims_)}; }
  // Negative dimensions count from the end.
  int64_t size(int64_t d) const { return sizes_[at(d)]; }
  int64_t stride(int64_t d) const { return strides_[at(d)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dims_; d++) n *= sizes_[d];
    return n;
  }
  // Whether the elements lie side by side in order.
  bool is_contiguous() const {
    int64_t stride = 1;
    bool is = true;
    for (int64_t d = dims_ - 1; d >= 0; stride *= sizes_[d--]) is &= sizes_[d] == 1 || strides_[d] == stride;
    return is || !stride;
  }
  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return !torch_ || torch_->is_cpu(); }
  const void* const_data_ptr() const { return torch_ ? torch_->const_data_ptr() : data_; }
  void* mutable_data_ptr() const { return torch_ ? torch_->mutable_data_ptr() : data_; }

 private:
  int64_t at(int64_t d) const {
    const int64_t i = d < 0 ? d + dims_ : d;
    STD_TORCH_CHECK(i >= 0 && i < dims_, "a tensor of ", dims_, " dimensions has no dimension ", d);
    return i;
  }

  mutable std::optional<Torch> torch_;
  std::shared_ptr<Block> block_;
  void* data_ = nullptr;
  int64_t dims_ = 0;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  ScalarType type_ = ScalarType::Float;
};

using Maybe = std::optional<Tensor>;

}  // namespace mk

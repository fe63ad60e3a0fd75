// All that the CUDA ops ask of a device: memory, the stream, and whether a launch went well. cuda_device.cpp answers
// for a GPU; a build without one may link its own answers, and set the key that the ops register for.
#pragma once
#include "cuda/launch.h"
#include "torch/binding.h"

#ifndef MK_CUDA_KEY
#define MK_CUDA_KEY CUDA
#endif

namespace mk {

// Makes the device of a tensor the current one for as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& t);
  ~Device();
  Device(const Device&) = delete;
  // torch's current stream on the device.
  void* stream() const;

 private:
  void* guard_;
  int32_t index_;
};

// A new contiguous tensor on the device of `like`.
Tensor device_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, Dtype dtype, const Tensor& like);
const void* device_data(const Tensor& t);
void* device_mutable_data(const Tensor& t);

// Throws where a launcher returned an error.
void check_launch(int status, const char* op);

inline int dtype_index(const Tensor& t) { return static_cast<int>(dtype_of(t)); }

// The leading dimensions of N tensors as launchers take them.
template <int N>
struct LaunchRows {
  cuda::RowSizes sizes;
  cuda::RowStrides strides[N];
  bool fits;  // in the dimensions that launchers take; if not, the tensors must be made contiguous

  LaunchRows(const Tensor* const (&tensors)[N], int64_t inner) {
    const Rows<N> rows(tensors, inner);
    fits = rows.dims() <= cuda::max_leading;
    sizes = {rows.count(), 1, 1, rows.dims() ? rows.dims() : 1};
    for (auto& s : strides) s = {};
    if (!fits) return;
    for (int d = 0; d < rows.dims(); d++)
      for (int i = 0; i < N; i++) strides[i].stride[d] = rows.stride(d, i);
    if (rows.dims() > 1) sizes.size2 = rows.size(rows.dims() - 1);
    if (rows.dims() > 2) sizes.size1 = rows.size(1);
  }
};

}  // namespace mk

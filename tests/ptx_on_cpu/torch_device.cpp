// Stands in for csrc/torch/cuda_device.cpp where the CUDA ops run on CPU tensors: memory between unreadable pages, and
// every tensor that a kernel is handed registered, element for element.
#include <torch/csrc/stable/c/shim.h>

#include "runtime/api.h"
#include "torch/cuda_device.h"

namespace mk {
namespace {

size_t element_size(const Tensor::Torch& t) { return t.element_size(); }

void hand_over(const Tensor& t, int writable) {
  emu_extent(t.const_data_ptr(), element_size(t), static_cast<int>(t.dim()), t.sizes().data(), t.strides().data(),
             writable);
}

}  // namespace

Device::Device(const Tensor&) : guard_(nullptr), index_(0) { emu_forget(); }
Device::~Device() {}
void* Device::stream() const { return nullptr; }

Tensor device_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, Dtype dtype, const Tensor&) {
  static const int32_t dtypes_of[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                      aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t strides[64], count = 1;
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = count;
    count *= sizes[d] > 1 ? sizes[d] : 1;
  }
  for (int64_t d = 0; d < dims; d++)
    if (!sizes[d]) return empty(sizes, dtype);
  void* memory = emu_allocate(static_cast<size_t>(count * size_of(dtype)));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory, dims, sizes.data(), strides, 0, dtypes_of[static_cast<int>(dtype)], aoti_torch_device_type_cpu(), -1,
      &handle, aoti_torch_layout_strided(), nullptr, 0, [](void* p, void*) { emu_free(p); }, memory));
  return Tensor(handle);
}

const void* device_data(const Tensor& t) {
  hand_over(t, 0);
  emu_written(t.const_data_ptr(), static_cast<size_t>(t.numel()) * element_size(t));
  return t.const_data_ptr();
}

void* device_mutable_data(const Tensor& t) {
  hand_over(t, 1);
  return t.mutable_data_ptr();
}

void check_launch(int status, const char* op) {
  STD_TORCH_CHECK(!status, "mistral_kernels::", op, ": the launch failed: ", mk_cuda_error(status));
}

}  // namespace mk

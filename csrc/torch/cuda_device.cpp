#include "torch/cuda_device.h"

#include <dlfcn.h>

namespace mk {
namespace {

// torch's CUDA library, and with it this function, is only there in a torch for CUDA, and is loaded under its own
// scope: it is neither linked nor found by dlsym(RTLD_DEFAULT).
using CurrentStream = int32_t (*)(int32_t, void**);

CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(found, "this torch has no CUDA library (libtorch_cuda.so), which names the current stream");
  return found;
}

}  // namespace

Device::Device(const Tensor& t) : index_(static_cast<Tensor::Torch&>(t).get_device_index()) {
  DeviceGuardHandle guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index_, &guard));
  guard_ = guard;
}

Device::~Device() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

void* Device::stream() const {
  void* stream;
  TORCH_ERROR_CODE_CHECK(current_stream()(index_, &stream));
  return stream;
}

Tensor device_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, Dtype dtype, const Tensor& like) {
  return empty(sizes, dtype, &like);
}

const void* device_data(const Tensor& t) { return t.const_data_ptr(); }
void* device_mutable_data(const Tensor& t) { return t.mutable_data_ptr(); }

void check_launch(int status, const char* op) {
  STD_TORCH_CHECK(!status, "mistral_kernels::", op, ": the launch failed: ", mk_cuda_error(status));
}

}  // namespace mk

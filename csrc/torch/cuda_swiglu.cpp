// mistral_kernels::swiglu, swiglu_packed and their gradients on a GPU.
#include "cuda/swiglu.h"
#include "torch/cuda_device.h"

namespace mk {
namespace {

void same(const Tensor& t, const Tensor& gate, const char* name) {
  STD_TORCH_CHECK(dtype_of(t) == dtype_of(gate) && t.numel() == gate.numel(), name, " must be like gate");
}

// Half `half` of the last dimension.
Tensor half_of(Tensor t, int half) {
  const int64_t n = t.size(-1) / 2;
  return torch::stable::narrow(t, -1, half * n, n);
}

// The pointers, rows and sizes of a call; dy is gate itself in a forward. Contiguous tensors are one long row.
cuda::Swiglu describe(Tensor& dy, Tensor& gate, Tensor& up, bool packed) {
  const bool flat = !packed && dy.is_contiguous() && gate.is_contiguous() && up.is_contiguous();
  if (!LaunchRows<3>({&dy, &gate, &up}, gate.dim() ? 1 : 0).fits) {
    dy = contiguous(dy);
    gate = contiguous(gate);
    up = contiguous(up);
  }
  const LaunchRows<3> rows({&dy, &gate, &up}, gate.dim() ? 1 : 0);
  cuda::Swiglu a = {};
  a.gate = device_data(gate), a.up = device_data(up);
  a.sizes = flat ? cuda::RowSizes{1, 1, 1, 1} : rows.sizes;
  a.dy_rows = rows.strides[0], a.gate_rows = rows.strides[1], a.up_rows = rows.strides[2];
  if (flat) a.dy_rows = a.gate_rows = a.up_rows = {};
  a.n = flat ? gate.numel() : gate.size(-1);
  a.out_row = packed ? 2 * a.n : a.n;
  a.dtype = dtype_index(gate);
  return a;
}

Tensor forward(const Device& device, Tensor gate, Tensor up, const Tensor& y) {
  same(up, gate, "up");
  if (!y.numel()) return y;
  Tensor dy = gate;
  cuda::Swiglu a = describe(dy, gate, up, false);
  a.y = device_mutable_data(y);
  check_launch(mk_cuda_swiglu(a, device.stream()), "swiglu");
  return y;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const Device device(gate);
  return forward(device, unit_stride(gate), unit_stride(up), device_empty(gate.sizes(), dtype_of(gate), gate));
}

Tensor swiglu_packed(const Tensor& gate_up_in) {
  const Device device(gate_up_in);
  const Tensor gate_up = unit_stride(gate_up_in), gate = half_of(gate_up, 0);
  return forward(device, gate, half_of(gate_up, 1), device_empty(gate.sizes(), dtype_of(gate), gate));
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_in, const Tensor& gate_in, const Tensor& up_in) {
  const Device device(gate_in);
  Tensor dy = unit_stride(dy_in), gate = unit_stride(gate_in), up = unit_stride(up_in);
  same(up, gate, "up");
  same(dy, gate, "dy");
  Tensor dgate = device_empty(gate.sizes(), dtype_of(gate), gate), dup = device_empty(up.sizes(), dtype_of(up), up);
  if (!gate.numel()) return {dgate, dup};
  cuda::Swiglu a = describe(dy, gate, up, false);
  a.dy = device_data(dy), a.dgate = device_mutable_data(dgate), a.dup = device_mutable_data(dup);
  check_launch(mk_cuda_swiglu_backward(a, device.stream()), "swiglu_backward");
  return {dgate, dup};
}

Tensor swiglu_packed_backward(const Tensor& dy_in, const Tensor& gate_up_in) {
  const Device device(gate_up_in);
  const Tensor gate_up = unit_stride(gate_up_in);
  Tensor dy = unit_stride(dy_in), gate = half_of(gate_up, 0), up = half_of(gate_up, 1);
  same(dy, gate, "dy");
  Tensor out = device_empty(gate_up.sizes(), dtype_of(gate_up), gate_up);
  if (!gate.numel()) return out;
  cuda::Swiglu a = describe(dy, gate, up, true);
  a.dy = device_data(dy), a.dgate = device_mutable_data(out);
  a.dup = static_cast<char*>(a.dgate) + a.n * size_of(dtype_of(gate));
  check_launch(mk_cuda_swiglu_backward(a, device.stream()), "swiglu_packed_backward");
  return out;
}

}  // namespace
}  // namespace mk

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, MK_CUDA_KEY, m) {
  m.impl("swiglu_cuda", mk::boxed<&mk::swiglu>);
  m.impl("swiglu_packed_cuda", mk::boxed<&mk::swiglu_packed>);
  m.impl("swiglu_backward_cuda", mk::boxed<&mk::swiglu_backward>);
  m.impl("swiglu_packed_backward_cuda", mk::boxed<&mk::swiglu_packed_backward>);
}

#include "torch/binding.h"

#include "torch/outputs.h"

namespace mk {
namespace {

struct TorchDtypes {
  int32_t of[dtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                        aoti_torch_dtype_float64()};
};

const TorchDtypes& torch_dtypes() {
  static const TorchDtypes all;
  return all;
}

}  // namespace

Dtype dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  for (int i = 0; i < dtypes; i++)
    if (torch_dtypes().of[i] == dtype) return static_cast<Dtype>(i);
  STD_TORCH_CHECK(false, "a tensor is of a dtype other than float32, bfloat16, float16 and float64");
}

bool is_int8(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype == aoti_torch_dtype_int8();
}

namespace {

// On a block of the pool; null where it has none.
AtenTensorHandle pooled(int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int64_t size;
  void* block = pool_take(bytes, &size);
  if (!block) return nullptr;
  const auto give = [](void* data, void* size) { pool_give(data, reinterpret_cast<intptr_t>(size)); };
  AtenTensorHandle handle;
  const AOTITorchError error =
      torch_from_blob(block, dims, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(intptr_t{size}));
  if (error) pool_give(block, size);
  TORCH_ERROR_CODE_CHECK(error);
  return handle;
}

}  // namespace

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, Dtype dtype, const Tensor* like) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t strides[64];
  STD_TORCH_CHECK(dims <= 64, "a tensor has ", dims, " dimensions; at most 64 are supported");
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device = aoti_torch_device_type_cpu(), index = 0;
  if (like) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like->get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like->get(), &index));
  }
  const int32_t type = torch_dtypes().of[static_cast<int>(dtype)];
  const int64_t bytes = stride * size_of(dtype);
  const bool large = bytes >= large_output && device == aoti_torch_device_type_cpu();
  AtenTensorHandle handle = large ? pooled(bytes, dims, sizes.data(), strides, type) : nullptr;
  if (handle) return Tensor(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides, type, device, index, &handle));
  const Tensor fresh(handle);
  if (large && fresh.numel()) advise_huge(fresh.mutable_data_ptr(), bytes);
  return fresh;
}

void on_cpu(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    int32_t device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t->get(), &device));
    STD_TORCH_CHECK(device == aoti_torch_device_type_cpu(), "all tensors must be on a CPU");
  }
}

void check_ends(const Tensor& ends, int64_t sequences, int64_t tokens) {
  on_cpu({&ends});
  STD_TORCH_CHECK(
      ends.scalar_type() == torch::headeronly::ScalarType::Int && ends.dim() == 1 && ends.numel() == sequences + 1,
      "cu_seqlens must be int32, [", sequences + 1, "]");
  const int32_t* at = static_cast<const int32_t*>(ends.const_data_ptr());
  const int64_t step = ends.stride(0);
  bool rises = at[0] == 0 && at[sequences * step] == tokens;
  for (int64_t b = 0; b < sequences; b++) rises &= at[b * step] <= at[(b + 1) * step];
  STD_TORCH_CHECK(rises, "cu_seqlens must start at 0, never fall and end at the ", tokens, " tokens");
}

bool same_sizes(const Tensor& a, const Tensor& b, int64_t count) {
  if (a.dim() < count || b.dim() < count) return false;
  const auto x = a.sizes(), y = b.sizes();
  for (int64_t d = 0; d < count; d++)
    if (x[d] != y[d]) return false;
  return true;
}

Tensor unit_stride(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims == 0 || (dims <= max_dims && (t.stride(dims - 1) == 1 || t.size(dims - 1) == 1))) return t;
  return torch::stable::contiguous(t);
}

}  // namespace mk

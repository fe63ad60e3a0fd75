#include "torch/binding.h"

#include <cstdlib>
#include <map>
#include <new>
#include <string>
#include <utility>

#include "torch/outputs.h"

namespace mk {
namespace {

thread_local bool own_memory = false;

std::map<std::string, Direct>& direct_kernels() {
  static std::map<std::string, Direct> all;
  return all;
}

constexpr ScalarType scalar_types[dtypes] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                             ScalarType::Double};

int32_t torch_dtype(Dtype dtype) {
  static const int32_t of[dtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                     aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  return of[static_cast<int>(dtype)];
}

}  // namespace

OwnMemory::OwnMemory(bool on) { own_memory = on; }
OwnMemory::~OwnMemory() { own_memory = false; }

void add_direct(const char* op, Direct kernel) { direct_kernels()[op] = kernel; }

void hand_over(const Tensor& made, Output& to) {
  to = {};
  if (made.block()) {
    const auto release = [](void* owner) { std::exchange(static_cast<Block*>(owner)->handed_over, nullptr).reset(); };
    to.array = {made.block()->data, made.dim(), made.sizes().data(), made.strides().data(),
                static_cast<int32_t>(made.scalar_type())};
    to.owner = (made.block()->handed_over = made.block()).get();
    to.release = release;
    return;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(made.get(), &handle));
  to.torch = to.owner = handle;
  to.release = [](void* owner) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(owner)); };
}

Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  for (int i = 0; i < dtypes; i++)
    if (scalar_types[i] == type) return static_cast<Dtype>(i);
  STD_TORCH_CHECK(false, "a tensor is of a dtype other than float32, bfloat16, float16 and float64");
}

bool is_int8(const Tensor& t) { return t.scalar_type() == ScalarType::Char; }

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

namespace {

// Allocates one object with `more` bytes behind it, and says where these start.
template <class T>
struct WithMore {
  using value_type = T;

  WithMore(int64_t more, char** start) : more(more), start(start) {}
  template <class U>
  WithMore(const WithMore<U>& other) : more(other.more), start(other.start) {}

  T* allocate(size_t) {
    void* memory = std::malloc(sizeof(T) + static_cast<size_t>(more));
    if (!memory) throw std::bad_alloc();
    *start = static_cast<char*>(memory) + sizeof(T);
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { std::free(memory); }

  int64_t more;
  char** start;
};

Tensor empty_block(IntHeaderOnlyArrayRef sizes, const int64_t* strides, Dtype dtype, int64_t bytes) {
  constexpr int64_t alignment = 64;
  char* start;
  const auto block = std::allocate_shared<Block>(WithMore<Block>(alignment + bytes, &start));
  block->data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(start) + alignment - 1) & -alignment);
  block->dims = static_cast<int64_t>(sizes.size());
  block->type = scalar_types[static_cast<int>(dtype)];
  for (int64_t d = 0; d < block->dims; d++) block->sizes[d] = sizes[d], block->strides[d] = strides[d];
  return Tensor(block);
}

}  // namespace

Tensor empty(IntHeaderOnlyArrayRef sizes, Dtype dtype, const Tensor* like) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t strides[64];
  STD_TORCH_CHECK(dims <= 64, "a tensor has ", dims, " dimensions; at most 64 are supported");
  int64_t stride = 1, elements = 1;
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
    elements *= sizes[d];
  }
  int32_t device = aoti_torch_device_type_cpu(), index = 0;
  if (like) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like->get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like->get(), &index));
  }
  const int64_t bytes = stride * size_of(dtype);
  const bool on_cpu = device == aoti_torch_device_type_cpu(), large = bytes >= large_output && on_cpu;
  if (own_memory && !large && on_cpu && dims <= max_dims) return empty_block(sizes, strides, dtype, bytes);
  const int32_t type = torch_dtype(dtype);
  AtenTensorHandle handle = large ? pooled(bytes, dims, sizes.data(), strides, type) : nullptr;
  if (handle) return Tensor(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides, type, device, index, &handle));
  const Tensor fresh(handle);
  if (large && elements) advise_huge(fresh.mutable_data_ptr(), bytes);
  return fresh;
}

void on_cpu(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) STD_TORCH_CHECK(t->is_cpu(), "all tensors must be on a CPU");
}

void check_ends(const Tensor& ends, int64_t sequences, int64_t tokens) {
  on_cpu({&ends});
  STD_TORCH_CHECK(ends.scalar_type() == ScalarType::Int && ends.dim() == 1 && ends.numel() == sequences + 1,
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

Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : Tensor(torch::stable::contiguous(t)); }

Tensor unit_stride(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims == 0 || (dims <= max_dims && (t.stride(dims - 1) == 1 || t.size(dims - 1) == 1))) return t;
  return contiguous(t);
}

}  // namespace mk

// For Python, by ctypes: the address of an op's kernel for calls past the dispatcher (csrc/python), or null.
extern "C" __attribute__((visibility("default"))) void* mistral_kernels_direct(const char* op) {
  const auto found = mk::direct_kernels().find(op);
  return found == mk::direct_kernels().end() ? nullptr : reinterpret_cast<void*>(found->second);
}

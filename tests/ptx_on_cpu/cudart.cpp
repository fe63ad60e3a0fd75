// Stands in for libcudart: nvcc's own host code, launchers and all, is linked with this and runs without a GPU.
// Everything is done by the time that a call returns; streams are accepted and have no meaning.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "runtime/api.h"
#include "runtime/tensor_map.h"

namespace {

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
std::map<const void*, int> dynamic_limit;
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
std::vector<Configuration> configurations;
cudaError_t last = cudaSuccess;
std::string message;

constexpr size_t kWithoutAsking = 48 * 1024;

cudaError_t error(cudaError_t code) {
  if (code != cudaSuccess) last = code;
  return code;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<void**>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  const auto found = kernels().find(host);
  if (found == kernels().end()) return error(cudaErrorInvalidDeviceFunction);
  const auto limit = dynamic_limit.find(host);
  if (shared > (limit == dynamic_limit.end() ? kWithoutAsking : static_cast<size_t>(limit->second)))
    return error(cudaErrorInvalidValue);
  const char* name = found->second.c_str();
  switch (emu_launch(name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, args, shared)) {
    case 0:
      return cudaSuccess;
    case 1:
      return error(cudaErrorInvalidConfiguration);
    case 2:
      return error(cudaErrorLaunchFailure);
    case 4:
      return error(cudaErrorNoKernelImageForDevice);
    default:
      return error(cudaErrorSymbolNotFound);
  }
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, args, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** args) {
  if (c->numAttrs) return error(cudaErrorNotSupported);
  return cudaLaunchKernel(host, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > emu_get("shared_limit")) return error(cudaErrorInvalidValue);
    dynamic_limit[host] = value;
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t code = last;
  last = cudaSuccess;
  return code;
}
cudaError_t cudaPeekAtLastError() { return last; }
// The finding itself where there is one.
const char* cudaGetErrorString(cudaError_t code) {
  const std::string number = std::to_string(static_cast<int>(code));
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      message = emu_finding();
      break;
    case cudaErrorInvalidConfiguration:
      message = "invalid configuration argument (grid or block)";
      break;
    case cudaErrorInvalidValue:
      message = "invalid argument (dynamic shared memory beyond what was asked for?)";
      break;
    case cudaErrorNoKernelImageForDevice:
      message = "no kernel image for a device of this compute capability";
      break;
    case cudaErrorSymbolNotFound:
      message = "the kernel could not be translated or compiled";
      break;
    default:
      message = "CUDA error " + number;
  }
  return message.c_str();
}
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? error(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emu_get("multiprocessors");
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emu_get("shared_limit");
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emu_get("shared_limit") + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kWithoutAsking;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emu_get("capability") / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emu_get("capability") % 10;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      return error(cudaErrorNotSupported);
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  emu_written(p, bytes);
  return cudaSuccess;
}

// The driver's function with its arguments and limits. CUDA_ERROR_NOT_SUPPORTED is this stand-in's own limit.
CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* at,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  const auto multiple = [](const void* p, uintptr_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; };
  if (!multiple(out, 64) || !multiple(at, 16) || !at || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  if (type >= sizeof bytes || interleave || fill || swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return CUDA_ERROR_NOT_SUPPORTED;
  emu::TensorMap m{};
  m.magic = emu::kTensorMap, m.rank = static_cast<uint8_t>(rank), m.type = static_cast<uint8_t>(type);
  m.element = bytes[type], m.swizzle = static_cast<uint8_t>(swizzle), m.at = static_cast<char*>(at);
  for (unsigned d = 0; d < rank; d++) {
    if (!size[d] || size[d] > uint64_t{1} << 32 || !box[d] || box[d] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (step[d] != 1) return CUDA_ERROR_NOT_SUPPORTED;
    m.size[d] = size[d], m.box[d] = static_cast<uint16_t>(box[d]);
    if (!d) continue;
    if (stride[d - 1] % 16 || stride[d - 1] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    m.stride[d - 1] = stride[d - 1];
  }
  const unsigned row = box[0] * m.element, pattern = 16u << swizzle;
  if (row % 16 || (swizzle && row > pattern)) return CUDA_ERROR_INVALID_VALUE;
  if (swizzle && row != pattern) return CUDA_ERROR_NOT_SUPPORTED;
  memset(out, 0, sizeof *out);
  memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 12000, flags, result);
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

}  // extern "C"

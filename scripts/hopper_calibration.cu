// What only hardware can tell about compute capability 9.0: the questions that the emulator of tests/ptx_on_cpu answers
// by assumption or refuses. scripts/hopper_calibration.py asks them.
#include "hopper.cuh"

namespace {

INLINE void store_word(uint32_t at, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}
INLINE uint32_t load_word(uint32_t at) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}
INLINE uint64_t describe_swizzled(uint32_t at, uint32_t base_offset) {
  return describe(at, 16, 1024, 1) | static_cast<uint64_t>(base_offset) << 49;
}
// c[64, 64], of one warpgroup
INLINE float& element(float* c, int i) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
  return c[row * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2];
}

// c += a b', one product of a[64, 16] and b[64, 16]: how does the tensor core round?
template <class T>
__global__ void __launch_bounds__(128) one_product(const uint32_t* a, const uint32_t* b, float* c) {
  __shared__ __align__(1024) uint32_t left[64 * 8], right[64 * 8];
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    const int to = i / 64 * 64 + i % 8 / 4 * 32 + i / 8 % 8 * 4 + i % 4;
    left[to] = a[i], right[to] = b[i];
  }
  fence_proxy();
  __syncthreads();
  float d[32];
#pragma unroll
  for (int i = 0; i < 32; i++) d[i] = element(c, i);
  hold(d);
  fence_products();
  multiply<0, 0>(T{}, d, describe(address(left), 128, 256, 0), describe(address(right), 128, 256, 0), 1);
  commit_products();
  wait_products<0>();
  hold(d);
#pragma unroll
  for (int i = 0; i < 32; i++) element(c, i) = d[i];
}

// c = a b' with b `shift` bytes behind where the swizzle pattern starts; `image` is shared memory as the copy left it.
__global__ void __launch_bounds__(128)
    shifted(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right, int shift,
            int base_offset, uint32_t bytes, float* c, uint32_t* image) {
  extern __shared__ unsigned char memory[];
  __shared__ uint64_t barrier_;
  const uint32_t a = (address(memory) + 1023) & ~1023u, from = a + 8192, b = from + shift, barrier = address(&barrier_);
  for (int i = threadIdx.x; i < 4096; i += 128) store_word(from + 4 * i, 0xffffffffu);
  if (threadIdx.x == 0) init(barrier, 1), fence_init();
  fence_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expecting(barrier, 8192 + bytes);
    load_box(a, &left, barrier, 0, 0);
    load_box(b, &right, barrier, 0, 0);
  }
  wait(barrier, 0);
  float d[32];
  hold(d);
  fence_products();
  for (int k = 0; k < 4; k++)
    multiply<0, 0>(__nv_bfloat16{}, d, describe_swizzled(a + 32 * k, 0), describe_swizzled(b + 32 * k, base_offset), k);
  commit_products();
  wait_products<0>();
  hold(d);
#pragma unroll
  for (int i = 0; i < 32; i++) element(c, i) = d[i];
  for (int i = threadIdx.x; i < 4096; i += 128) image[i] = load_word(from + 4 * i);
}

INLINE uint32_t phase_is_over(uint32_t barrier) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(barrier)
               : "memory");
  return done;
}

// A copy that is done before its bytes are expected. said: whether the phase was over before the arrival, after an
// arrival that expects the bytes, and the first word that came.
__global__ void early_copy(const uint32_t* x, int bytes, uint32_t* said) {
  __shared__ __align__(128) uint32_t line[1024];
  __shared__ uint64_t barrier_;
  const uint32_t barrier = address(&barrier_);
  init(barrier, 1), fence_init();
  load_row(address(line), x, bytes, barrier);
  for (const int64_t start = clock64(); clock64() - start < 1000000;) {
  }
  said[0] = phase_is_over(barrier);
  arrive_expecting(barrier, bytes);
  for (const int64_t start = clock64(); clock64() - start < 1000000;) {
  }
  said[1] = phase_is_over(barrier);
  said[2] = load_word(address(line));
}

int encode_tile(CUtensorMap* map, const void* at, uint32_t columns) {
  const uint64_t size[] = {64, 64}, stride[] = {128};
  const uint32_t box[] = {columns, 64};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, at, size, stride, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace

extern "C" int calibrate_one_product(int half, const uint32_t* a, const uint32_t* b, float* c) {
  half ? one_product<__half><<<1, 128>>>(a, b, c) : one_product<__nv_bfloat16><<<1, 128>>>(a, b, c);
  return cudaGetLastError();
}

// `columns` of b in a box: 64, or less than the swizzle is wide.
extern "C" int calibrate_shifted(const void* a, const void* b, int columns, int shift, int base_offset, float* c,
                                 uint32_t* image) {
  CUtensorMap maps[2];
  if (encode_tile(&maps[0], a, 64) || encode_tile(&maps[1], b, columns)) return cudaErrorInvalidValue;
  shifted<<<1, 128, 8192 + 16384 + 1024>>>(maps[0], maps[1], shift, base_offset, columns * 128, c, image);
  return cudaGetLastError();
}

extern "C" int calibrate_early_copy(const uint32_t* x, int bytes, uint32_t* said) {
  early_copy<<<1, 1>>>(x, bytes, said);
  return cudaGetLastError();
}

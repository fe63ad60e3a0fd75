// One set of kernels for each instruction set, and the table through which the torch side reaches the chosen one.
//
// How an op family adds itself:
//   csrc/cpu/<op>.h    a struct of function pointers over raw pointers, `struct FooKernels { ... };` in namespace mk,
//                      then `MK_KERNELS(FooKernels, foo)` at file scope, which declares `foo` once for each tier.
//   csrc/cpu/<op>.cpp  includes "cpu/vec.h" and its own header. Its functions are static or in an unnamed namespace in
//                      `namespace mk::MK_ISA`, which ends with the definition `const FooKernels foo = {...};`.
//                      setup.py compiles the file once a tier, with MK_ISA, MK_LANES, MK_BF16 and MK_AMX set.
//                      One that has kernels for the matrix unit says MK_MATRIX_KERNELS and stands in setup.py's list
//                      of them; the others serve that tier with the one before.
//   csrc/torch/<op>.cpp  includes "torch/binding.h" and calls `pick(foo_tiers).run(...)`.
//
// A file of csrc/cpu includes only <cstdint>, <cmath> and the intrinsics: an inline function of the standard library
// compiled here for AVX-512 could be the copy that the linker keeps for everyone, and stop older processors.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace mk {

// The 16-bit types are bits only; vec.h converts them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace mk

#define MK_DECLARE(type, name, isa) \
  namespace mk::isa {               \
  extern const mk::type name;       \
  }
#define MK_TIERS(type, name, ...)                              \
  namespace mk {                                               \
  inline constexpr const type* name##_tiers[] = {__VA_ARGS__}; \
  }

#ifdef MK_ISA
#define MK_KERNELS(type, name) MK_DECLARE(type, name, MK_ISA)
#define MK_MATRIX_KERNELS(type, name) MK_DECLARE(type, name, MK_ISA)
#elif MK_X86
#define MK_VECTORS(type, name)   \
  MK_DECLARE(type, name, base)   \
  MK_DECLARE(type, name, avx2)   \
  MK_DECLARE(type, name, avx512) \
  MK_DECLARE(type, name, avx512bf16)
#define MK_KERNELS(type, name) \
  MK_VECTORS(type, name)       \
  MK_TIERS(type, name, &base::name, &avx2::name, &avx512::name, &avx512bf16::name)
#define MK_MATRIX_KERNELS(type, name) \
  MK_VECTORS(type, name)              \
  MK_DECLARE(type, name, amx)         \
  MK_TIERS(type, name, &base::name, &avx2::name, &avx512::name, &avx512bf16::name, &amx::name)
#else
#define MK_KERNELS(type, name) \
  MK_DECLARE(type, name, base) \
  MK_TIERS(type, name, &base::name)
#define MK_MATRIX_KERNELS(type, name) MK_KERNELS(type, name)
#endif

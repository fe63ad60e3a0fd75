// The instruction set: the best that the processor has, chosen once; tests set others.
#include <cstring>

#include "torch/binding.h"
#if MK_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mk {
namespace {

#if MK_X86
constexpr const char* names[] = {"base", "avx2", "avx512", "avx512bf16", "amx"};
#else
constexpr const char* names[] = {"base"};
#endif
constexpr int tiers = sizeof names / sizeof *names;

// Linux gives a process the matrix unit's registers where it asks for them; from then on its threads have them too.
bool matrix_unit() {
#if MK_X86 && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && !syscall(SYS_arch_prctl, request_permission, tile_data);
#else
  return false;
#endif
}

// The features that setup.py's flags for the tier let the compiler use, and nothing less.
bool supported(int wanted) {
#if MK_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const bool each[] = {true, avx2, avx512, avx512bf16, avx512bf16 && wanted == tiers - 1 && matrix_unit()};
  return each[wanted];
#else
  return wanted == 0;
#endif
}

int best() {
  int found = tiers - 1;
  while (!supported(found)) found--;
  return found;
}

}  // namespace

int tier = best();

}  // namespace mk

// For tests, by ctypes: every set that this processor has is to be right, not only the one it would run.
extern "C" __attribute__((visibility("default"))) const char* mistral_kernels_isa() { return mk::names[mk::tier]; }

// 0, or 1 where there is no such set or the processor lacks it. Not while an op runs.
extern "C" __attribute__((visibility("default"))) int mistral_kernels_set_isa(const char* name) {
  for (int i = 0; i < mk::tiers; i++)
    if (!std::strcmp(mk::names[i], name) && mk::supported(i)) {
      mk::tier = i;
      return 0;
    }
  return 1;
}

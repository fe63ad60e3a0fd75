// What hosts call: Python by ctypes, the stand-in for libcudart, a stand-in for a torch device.
#pragma once
#include <cstddef>
#include <cstdint>

#define EMU_API extern "C" __attribute__((visibility("default")))

// ---- memory. Kernels may touch what is registered here, and nothing else.
// A tensor, sizes and strides in elements; until emu_forget.
EMU_API void emu_extent(const void* p, int64_t element, int dims, const int64_t* sizes, const int64_t* strides,
                        int writable);
EMU_API void emu_forget();
// Memory between unreadable pages, all ones (NaN), of which a kernel must write what it reads; until emu_free.
EMU_API void* emu_allocate(size_t bytes);
EMU_API void emu_free(void* p);
// The host has written there.
EMU_API void emu_written(const void* p, size_t bytes);
// Module-scope variables.
EMU_API void emu_permanent(char* p, size_t bytes, int writable);
// Bytes of the tensor at p that kernels moved since it was registered; 0 where none is.
EMU_API int emu_traffic(const void* p, uint64_t* read, uint64_t* written);

// ---- launches
struct EmuDim3 {
  unsigned x, y, z;
};
// Translates and loads a kernel when it is first launched; false where that failed.
typedef int (*EmuLoader)(const char* kernel);
EMU_API void emu_loader(EmuLoader f);
// A shared library that holds one kernel, with the source lines of its sites.
struct EmuLine {
  uint32_t site;
  const char* text;
};
EMU_API const char* emu_load(const char* path, const EmuLine* lines, int count);
EMU_API int emu_known(const char* kernel);
// 0, 1 for a bad configuration, 2 for a finding, 3 where the kernel could not be loaded, 4 where it is for a device of
// a higher compute capability.
EMU_API int emu_launch(const char* kernel, EmuDim3 grid, EmuDim3 block, void** args, size_t dynamic_shared);
EMU_API const char* emu_finding();
// "check" (1), "multiprocessors" (4), "capability" (80; 90 runs kernels for sm_90a), "shared_limit" (166912; setting
// the capability sets it too), "late" (1: copies and products are made when they are waited for; 0: at once), and
// "cut_sums" (0; 1: products of warpgroups round as an H100 does), "strict_warpgroup", "strict_fence", "war_fence",
// "init_fence" (1: the stricter reading of a rule).
EMU_API int emu_set(const char* option, int value);
EMU_API int emu_get(const char* option);
// In launches of this kernel, or of any where it is empty.
EMU_API void emu_plant(uint32_t site, int what, const char* kernel);
// How often the fault was met since it was planted.
EMU_API uint64_t emu_planted();

// ---- what the launches since emu_clear_launches did
EMU_API int emu_launches();
EMU_API const char* emu_launch_kernel(int i);
EMU_API const uint64_t* emu_launch_counts(int i);
EMU_API void emu_clear_launches();

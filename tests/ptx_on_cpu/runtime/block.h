// What the parts of the runtime share: the block that runs, its warps, its findings.
#pragma once
#include <string>

#include "emu.h"

namespace emu {

struct Warp {
  uint32_t ready = 0, alive = 0, arrived = 0;
};

struct Barrier {
  int expected = 0, got = 0;  // expected 0: all threads that have not ended
  uint32_t site = 0;
  Meeting meeting;
};

constexpr int kBarriers = 16;

struct Block {
  unsigned threads = 0, alive = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  void* scheduler_sp = nullptr;
};
extern Block block;
extern const Kernel* kernel;

// Ends the launch with a finding; what runs on a fiber does not come back.
[[noreturn]] void fail(const std::string& finding);
extern std::string finding;  // of the last launch, empty where nothing was found
// "file.cu:12 (in a call from file.cu:90)" for a site.
std::string where(uint32_t site);
std::string block_name();

// ---- schedule.cpp
void run_block(const char* params);
void pause();      // gives way to the next fiber that is ready; comes back when this one is
void sleep_now();  // not ready until somebody calls wake
void wake(Fiber& f);
using Together = void (*)(Fiber* warp, uint32_t mask);
// The last lane of `mask` to come performs `f` for all. Instructions that are `aligned` must be one and the same.
void collective(Op op, void* args, Together f, uint32_t mask, uint32_t site, bool aligned);

// ---- barrier.cpp
void thread_leaves_barriers();
void check_barriers_empty();
std::string describe_barrier(int id);

// ---- shared.cpp
void shared_start(size_t bytes);
void shared_access(size_t offset, int bytes, Access access, Fiber& by, uint32_t site);
inline bool in_arena(const void* p, size_t bytes_mapped) {
  return static_cast<size_t>(static_cast<const char*>(p) - arena) < bytes_mapped;
}
size_t arena_bytes();  // of the running kernel
size_t arena_span();   // addresses that count as meant for shared memory
void check_copies_done();

// ---- global.cpp
void global_access(const char* p, int bytes, Access access, Fiber& by, uint32_t site);
void global_start_launch();
void global_start_block();

// A memory access of another thread's making (a warp-wide instruction reads each lane's row).
void touch_by(Fiber& by, const void* p, int bytes, Access access, uint32_t site);

// What one launch did. Counted in checked runs only.
struct Counts {
  uint64_t blocks, read, written, read_once, written_once, copied, atomics, accesses, accesses16, mma_flops, mma,
      ldmatrix, ldmatrix_conflicts, barriers;
};
extern Counts counts;

}  // namespace emu

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
constexpr unsigned kMbarriers = 128;

struct Block {
  unsigned threads = 0, alive = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  void* scheduler_sp = nullptr;
};
extern Block block;
extern const Kernel* kernel;

// Who touches memory and what it is taken to know of: a thread, or hardware that works for one.
struct Actor {
  unsigned agent;
  uint32_t now;
  const Clock* thread;  // null for hardware, which has
  const Known* known = nullptr;
  bool async = false;  // through the async proxy

  bool knows(unsigned other, uint32_t when) const;
  bool fenced(Space space, unsigned other, uint32_t when) const;
};
inline Actor actor(const Fiber& f) { return {f.flat, f.clock.now(), &f.clock}; }
// "thread 5", "wgmma of warpgroup 1"
std::string agent_name(unsigned agent);

// Rules on which the text of the PTX ISA and kernels that ship differ; false is the laxer reading.
struct Strict {
  bool warpgroup = true;   // a warp's wait_group tells of its own quarter of a wgmma only
  bool fence = true;       // fence.proxy.async covers what the thread itself did, not what it knows of
  bool war_fence = true;   // an async write over what ordinary loads have read needs a proxy fence after them
  bool init_fence = true;  // copies may use an mbarrier only if its initialisation was fenced
};
extern Strict strict;
extern bool cut_sums;  // products round as an H100 does
extern bool late;  // copies land when nothing else can go on, and products are made when waited for; else both at once

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
void yield_to_others();  // like pause, but others go first: for polling
using Together = void (*)(Fiber* warp, uint32_t mask);
// The last lane of `mask` to come performs `f` for all. Instructions that are `aligned` must be one and the same.
void collective(Op op, void* args, Together f, uint32_t mask, uint32_t site, bool aligned);

// ---- barrier.cpp
void thread_leaves_barriers();
void check_barriers_empty();
std::string describe_barrier(int id);

// ---- shared.cpp
void shared_start(size_t bytes);
void shared_access(size_t offset, size_t bytes, Access access, const Actor& by, uint32_t site);
// A bulk copy that is on its way; that has landed, tagged with the phase of its mbarrier and the swizzle of its map.
void shared_copying(size_t offset, size_t bytes, const Actor& by, uint32_t site);
void shared_copied(size_t offset, size_t bytes, uint32_t when, int swizzle);
void shared_barrier(size_t offset, bool live);
int shared_swizzle(size_t offset);  // -1 where the bytes are of no tensor map
inline bool in_arena(const void* p, size_t bytes_mapped) {
  return static_cast<size_t>(static_cast<const char*>(p) - arena) < bytes_mapped;
}
size_t arena_bytes();  // of the running kernel
size_t arena_span();   // addresses that count as meant for shared memory
void check_copies_done();

// ---- global.cpp
void global_access(const char* p, int bytes, Access access, const Actor& by, uint32_t site);
void global_start_launch();
void global_start_block();

// ---- mbarrier.cpp
void mbarriers_start();
unsigned mbarrier_at(const char* p, uint32_t site);  // its number
unsigned mbarrier_for_copy(const char* p, uint32_t site);
size_t mbarrier_offset(unsigned number);
uint32_t mbarrier_next(unsigned number);  // the phase that is under way, as a clock
void mbarrier_copied(unsigned number, int64_t bytes, uint32_t site);
void mbarriers_fenced();  // the current thread has fenced
void check_mbarriers_done();
std::string describe_mbarrier(const Fiber& f);

// ---- bulk.cpp
void bulk_start();
bool bulk_deliver();  // lands the oldest copy; false where none is on its way
void check_bulk_read();
void check_bulk_done();

// ---- wgmma.cpp
void wgmma_start();
void check_wgmma_done();

// ---- registers.cpp
void registers_start();
void check_registers();
std::string describe_pool(unsigned warp);

// A memory access of another thread's making (a warp-wide instruction reads each lane's row).
void touch_by(Fiber& by, const void* p, int bytes, Access access, uint32_t site);

// What one launch did. Counted in checked runs only.
struct Counts {
  uint64_t blocks, read, written, read_once, written_once, copied, atomics, accesses, accesses16, mma_flops, mma,
      ldmatrix, ldmatrix_conflicts, barriers, wgmma, bulk_read, bulk_written, bulk_loads, bulk_stores;
};
extern Counts counts;

}  // namespace emu

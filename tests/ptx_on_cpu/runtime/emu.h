// What translated PTX calls: one fiber for each CUDA thread, one block at a time, on one OS thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arith.h"
#include "clock.h"

namespace emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class Op : uint8_t { none, barrier, shfl, vote, reduce, ldmatrix, stmatrix, mma, syncwarp };

// A cp.async on its way: issued, not waited for.
struct Copy {
  char* to;
  const char* from;
  int bytes, from_bytes, group;
  uint32_t site;
};

// A CUDA thread. `site` is the line of its last instruction that could be reported, counted from the kernel's first.
struct Fiber {
  void* sp;
  char* stack;
  Dim3 tid;
  unsigned flat, lane, warp;
  uint32_t site, mask;
  void* args;                          // of the warp-wide instruction that it waits in,
  void (*together)(Fiber*, uint32_t);  // which the last lane to come performs
  Op op;
  bool done;
  int barrier, group;
  std::vector<Copy> copies;
  Clock clock;
};

// A kernel of one translated file.
struct Kernel {
  const char* name;
  void (*run)(const char* params);
  int params;
  const int *offset, *size;
  size_t static_shared;
  int max_threads;
  struct Constant {
    char* at;
    size_t bytes;
    bool writable;
  } const* constants;  // module-scope variables; the last has a null address
};

// Faults put into a run: the instruction at one line goes wrong.
enum class Plant : int { none, skip, wait_one_less, whole_copy, swap, flip };

extern Fiber* current;
extern bool checking;
extern char* arena;            // the block's shared memory
extern uint32_t dynamic_at;    // where its dynamic part starts
extern uint32_t planted_site;  // 0: none
extern Plant planted;
extern int64_t branches_left;
extern Dim3 block_index, block_size, grid_size;

inline bool plant(Plant what, uint32_t site) { return site == planted_site && what == planted; }

// Ends the launch with a finding.
[[noreturn]] void fail_at(const char* what, uint32_t site);
[[noreturn]] void endless(uint32_t site);
inline void jump_back(uint32_t site) {
  if (--branches_left < 0) endless(site);
}

// ---- memory. A generic address is the host's.
enum class Access : uint8_t { read, write, atomic };
void touch(const void* p, int bytes, Access access, uint32_t site);
template <Access access>
inline char* at(const void* p, int bytes, uint32_t site) {
  current->site = site;
  if (checking) touch(p, bytes, access, site);
  return static_cast<char*>(const_cast<void*>(p));
}
template <class T>
inline T get(const char* p, int i = 0) {
  T r;
  memcpy(&r, p + i * static_cast<int>(sizeof(T)), sizeof(T));
  return r;
}
template <class T>
inline void set(char* p, int i, T v) {
  memcpy(p + i * static_cast<int>(sizeof(T)), &v, sizeof(T));
}
template <class T, class F>
inline T atomic(const void* p, uint32_t site, F f) {
  char* q = at<Access::atomic>(p, sizeof(T), site);
  const T old = get<T>(q);
  set<T>(q, 0, f(old));
  return old;
}
inline char* shared(uint32_t offset) { return arena + offset; }
// The offset of a generic address in shared memory.
inline uint32_t to_shared(uint64_t p) { return static_cast<uint32_t>(p - reinterpret_cast<uint64_t>(arena)); }

void cp_async(char* to, const void* from, int bytes, int from_bytes, uint32_t site);
void cp_async_commit(uint32_t site);
// Waits until at most `keep` of the youngest groups are on their way.
void cp_async_wait(int keep, uint32_t site);
void cp_async_wait_all(uint32_t site);

// ---- waiting
void bar_sync(int id, int count, uint32_t site);
void bar_arrive(int id, int count, uint32_t site);
void syncwarp(uint32_t mask, uint32_t site);

// ---- what a warp does together
enum class Shfl : uint8_t { up, down, bfly, idx };
uint32_t shfl(Shfl mode, uint32_t v, uint32_t b, uint32_t c, uint32_t mask, bool* inside, uint32_t site);
uint32_t ballot(bool p, uint32_t mask, uint32_t site);
enum class Reduce : uint8_t { add, min, max, and_, or_, xor_ };
uint32_t redux(Reduce what, bool is_signed, uint32_t v, uint32_t mask, uint32_t site);

void ldmatrix(uint32_t* r, int count, bool trans, const char* row, uint32_t site);
void stmatrix(const uint32_t* r, int count, bool trans, char* row, uint32_t site);
enum class Element : uint8_t { bf16, f16, tf32 };
// d = a b + c of shape m16n8k`k`: the products are exact and are added in order of k in float32.
void mma(Element e, int k, float* d, const uint32_t* a, const uint32_t* b, const float* c, uint32_t site);

}  // namespace emu

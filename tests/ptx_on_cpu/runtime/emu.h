// What translated PTX calls: one fiber for each CUDA thread, one block at a time, on one OS thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "arith.h"
#include "clock.h"

namespace emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class Op : uint8_t {
  none,
  barrier,
  shfl,
  vote,
  reduce,
  ldmatrix,
  stmatrix,
  mma,
  syncwarp,
  elect,
  setmaxnreg,
  registers,
  wgmma,
  mbarrier
};

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
  uint32_t fences, products, products_done;  // wgmma: fences, groups committed and waited for
  uint32_t bulk, bulk_asked, bulk_read;      // groups of bulk copies: committed, of the last copy, waited for
  uint32_t bulk_site;                        // of the last copy
  uint32_t phase;                            // of the mbarrier that it waits for
  int registers;
  // For each register that is an A operand: the group of wgmma that reads it, and the site.
  std::vector<std::pair<uint32_t, uint32_t>> reading;
};

// A kernel of one translated file.
struct Kernel {
  const char* name;
  void (*run)(const char* params);
  int params;
  const int *offset, *size;
  size_t static_shared, dynamic_align;
  int max_threads, registers, capability;  // registers a thread at launch
  bool hardware;                           // has instructions that set hardware going: mbarriers, bulk copies, wgmma
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
extern uint64_t planted_times;  // that the fault was met
extern int64_t branches_left;
extern Dim3 block_index, block_size, grid_size;

inline bool plant(Plant what, uint32_t site) {
  if (site != planted_site || what != planted) return false;
  planted_times++;
  return true;
}

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
// The same of signed bytes in 32 bits, which wrap around: k is 16 or 32.
void mma_bytes(int k, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t site);

// ---- mbarriers
void mbarrier_init(char* p, int count, uint32_t site);
void mbarrier_inval(char* p, uint32_t site);
// The state is the number of the phase that the arrival belongs to.
uint64_t mbarrier_arrive(char* p, int count, uint32_t site);
uint64_t mbarrier_expect(char* p, int64_t bytes, bool arrives, uint32_t site);
// Whether the phase is over; a waiting form comes back when it is.
bool mbarrier_parity(char* p, uint32_t parity, bool waits, uint32_t site);
bool mbarrier_state(char* p, uint64_t state, bool waits, uint32_t site);
void fence_proxy(bool shared, bool global, uint32_t site);
void fence_mbarrier_init(uint32_t site);

// ---- copies that hardware makes on its own
void tensor_load(char* to, const void* map, int rank, const int* at, char* barrier, uint32_t site);
enum class BulkOp : uint8_t { store, add, min, max };
void tensor_store(BulkOp op, const void* map, int rank, const int* at, char* from, uint32_t site);
void bulk_load(char* to, const char* from, uint32_t bytes, char* barrier, uint32_t site);
enum class BulkType : uint8_t { none, u32, s32, u64, f32, f64, f16, bf16 };
void bulk_store(BulkOp op, BulkType type, char* to, char* from, uint32_t bytes, uint32_t site);
void bulk_commit(uint32_t site);
void bulk_wait(int keep, bool read, uint32_t site);

// ---- products of a warpgroup
// d = a b + (keep ? d : 0), d of 64 by n; matrices in shared memory by their descriptors, or a of registers.
struct Wgmma {
  Element e;
  int n;
  uint32_t* operand;   // the registers that are operands of any wgmma, as bits,
  uint32_t* touched;   // and for each the fences before its last access, + 1
  const uint16_t* at;  // which of them d is in, and a
  bool a_in_registers;
  uint64_t a_at, b_at;
  bool keep;
  int scale_a, scale_b, transpose_a, transpose_b;

  int sums() const { return n / 2; }
  uint32_t& d(int i) const { return operand[at[i]]; }
  uint32_t a(int i) const { return operand[at[sums() + i]]; }
};
void wgmma(const Wgmma& w, uint32_t site);
void wgmma_fence(uint32_t site);
void wgmma_commit(uint32_t site);
void wgmma_wait(int keep, uint32_t site);
// A register whose product is under way holds a token, a signalling NaN that says which. Copies of it are tokens too.
inline bool is_token(uint32_t v) { return (v & 0xffc00000u) == 0xff800000u && v != 0xff800000u; }
uint32_t wgmma_value(uint32_t token, uint32_t site);
void fragment_written(int number, uint32_t site);
template <class T, class U>
inline void assign(T& to, U v) {
  to = as<T>(v);
}
template <class T>
inline T& settled(T& r, uint32_t site) {
  if (const auto v = as<uint32_t>(r); is_token(v)) r = as<T>(wgmma_value(v, site));
  return r;
}
// A register of sums is read, or written: a wgmma that has it next needs a fence after that.
uint32_t read_sum(uint32_t& r, uint32_t& touched, uint32_t site);
void write_sum(uint32_t& r, uint32_t& touched, uint32_t v, uint32_t site);

// ---- warps with parts to play
bool elect(uint32_t mask, uint32_t site);
void setmaxnreg(int count, bool more, uint32_t site);

}  // namespace emu

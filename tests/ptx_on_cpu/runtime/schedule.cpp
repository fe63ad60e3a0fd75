// Fibers and the order in which they run: one until it waits, then the next that is ready, its own warp first.
#include <sys/mman.h>

#include <algorithm>
#include <map>

#include "block.h"

extern "C" void emu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,%function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch,.-emu_switch
)");
#else
#error "write emu_switch for this processor: it saves the registers that a call keeps, and the stack pointer"
#endif

namespace emu {

Block block;
Fiber* current;

namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr int64_t kBranches = 200'000'000;  // backward, in one block: minutes of emulation
std::vector<char*> stacks;
const char* params;

char* stack(unsigned i) {
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(p, kGuard, PROT_NONE);
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

void end_of_thread() {
  Fiber* me = current;
  if (checking) check_copies_done(), check_bulk_read(), check_wgmma_done();
  me->done = true;
  Warp& w = block.warps[me->warp];
  w.alive &= ~(1u << me->lane), w.ready &= ~(1u << me->lane);
  block.alive--;
  thread_leaves_barriers();
  if (block.alive) return;
  check_barriers_empty();
  if (checking) check_bulk_done();
  while (bulk_deliver()) {
  }
  if (checking) check_mbarriers_done(), check_registers();
}

void leave_warp();

void entry() {
  kernel->run(params);
  end_of_thread();
  leave_warp();
  pause();
  __builtin_unreachable();
}

void* first_frame(char* bottom) {
  void** s = reinterpret_cast<void**>(bottom + kStack - 64);
#if defined(__x86_64__)
  *--s = nullptr;
  *--s = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; i++) *--s = nullptr;
#else
  s -= 20;
  std::fill(s, s + 20, nullptr);
  s[11] = reinterpret_cast<void*>(&entry);
#endif
  return s;
}

std::string waits_in(const Fiber& f) {
  static const char* const names[] = {"nothing", "a barrier", "shfl",  "vote",       "redux", "ldmatrix", "stmatrix",
                                      "mma",     "syncwarp",  "elect", "setmaxnreg", "",      "wgmma"};
  std::string s;
  switch (f.op) {
    case Op::barrier:
      s = describe_barrier(f.barrier);
      break;
    case Op::mbarrier:
      s = describe_mbarrier(f);
      break;
    case Op::registers:
      s = describe_pool(f.warp);
      break;
    default:
      s = names[static_cast<int>(f.op)];
  }
  return s + " at " + where(f.site);
}

std::string deadlock() {
  std::map<std::string, std::vector<unsigned>> groups;
  for (auto& f : block.fibers)
    if (!f.done) groups[waits_in(f)].push_back(f.flat);
  std::string m = "deadlock:";
  for (auto& [what, threads] : groups) {
    m += " " + std::to_string(threads.size()) + " threads (" + std::to_string(threads.front());
    if (threads.size() > 1) m += ".." + std::to_string(threads.back());
    m += ") wait in " + what + ";";
  }
  m.pop_back();
  return m;
}

void complete(Warp& w, Fiber* lanes, uint32_t mask, Together f) {
  f(lanes, mask);
  w.arrived &= ~mask;
  w.ready |= mask;
}

void number_agents() {
  const unsigned n = block.threads;
  agents = Agents{};
  agents.threads = agents.all = n;
  agents.proxies = kernel->hardware;
  if (!kernel->hardware) return;
  agents.source = n, agents.target = 2 * n, agents.wgmma = 3 * n;
  agents.arrival = agents.wgmma + (n + 127) / 128 * 4;
  agents.all = agents.arrival + kMbarriers;
}

// A lane that ends no longer counts in a collective that others wait in.
void leave_warp() {
  Warp& w = block.warps[current->warp];
  Fiber* lanes = &block.fibers[current->warp * 32];
  for (unsigned i = 0; w.arrived && i < 32; i++) {
    const uint32_t mask = lanes[i].mask & w.alive;
    if ((w.arrived >> i & 1) && (w.arrived & mask) == mask) complete(w, lanes, mask, lanes[i].together);
  }
}

void check_same(const Fiber* lanes, uint32_t mask, Op op, uint32_t site, bool aligned) {
  for (uint32_t left = mask; left; left &= left - 1) {
    const Fiber& f = lanes[__builtin_ctz(left)];
    if (f.op != op || (aligned && f.site != site))
      fail("lanes of a warp have come to different warp-wide instructions: " + where(site) + " and " + where(f.site));
    if ((f.mask & block.warps[f.warp].alive) != mask)
      fail("lanes of a warp name different masks at " + where(site) + " and " + where(f.site));
  }
}

}  // namespace

void wake(Fiber& f) { block.warps[f.warp].ready |= 1u << f.lane; }
void sleep_now() { block.warps[current->warp].ready &= ~(1u << current->lane); }

void pause() {
  Fiber* me = current;
  const size_t warps = block.warps.size();
  do {
    for (size_t i = 0; i < warps; i++) {
      const size_t w = (me->warp + i) % warps;
      if (!block.warps[w].ready) continue;
      current = &block.fibers[w * 32 + __builtin_ctz(block.warps[w].ready)];
      if (current != me) emu_switch(&me->sp, current->sp);
      return;
    }
  } while (bulk_deliver());
  if (block.alive) fail(deadlock());
  emu_switch(&me->sp, block.scheduler_sp);
}

void yield_to_others() {
  Fiber* me = current;
  const unsigned n = block.threads;
  for (unsigned i = 1; i < n; i++) {
    Fiber& f = block.fibers[(me->flat + i) % n];
    if (!(block.warps[f.warp].ready >> f.lane & 1)) continue;
    current = &f;
    emu_switch(&me->sp, f.sp);
    return;
  }
}

void collective(Op op, void* args, Together f, uint32_t named, uint32_t site, bool aligned) {
  Fiber* me = current;
  Warp& w = block.warps[me->warp];
  const uint32_t bit = 1u << me->lane, mask = named & w.alive;
  if (!(mask & bit)) fail("a lane is not in the mask of its own warp-wide instruction at " + where(site));
  me->op = op, me->args = args, me->together = f, me->site = site, me->mask = named;
  w.arrived |= bit;
  if ((w.arrived & mask) == mask) {
    Fiber* lanes = &block.fibers[me->warp * 32];
    check_same(lanes, mask, op, site, aligned);
    complete(w, lanes, mask, f);
  } else {
    w.ready &= ~bit;
    pause();
  }
}

void fail(const std::string& what) {
  if (finding.empty()) finding = what + " [" + block_name() + "]";
  void* dead;
  emu_switch(&dead, block.scheduler_sp);
  __builtin_unreachable();
}

void fail_at(const char* what, uint32_t site) { fail(std::string(what) + " at " + where(site)); }
void endless(uint32_t site) {
  fail("no end after " + std::to_string(kBranches) + " backward branches of one block, the last at " + where(site));
}

void run_block(const char* p) {
  params = p;
  block.alive = block.threads;
  branches_left = kBranches;
  number_agents();
  const auto nothing = std::make_shared<const Known>(agents.words(), 0);
  forget_joins();
  mbarriers_start(), bulk_start(), wgmma_start(), registers_start();
  for (auto& w : block.warps) w = Warp{};
  for (auto& b : block.barriers) b = Barrier{};
  for (unsigned i = 0; i < block.threads; i++) {
    Fiber& f = block.fibers[i];
    f.flat = i, f.lane = i % 32, f.warp = i / 32;
    f.tid = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    f.site = 0, f.mask = 0, f.args = nullptr, f.op = Op::none, f.done = false, f.barrier = 0, f.group = 0;
    f.copies.clear(), f.reading.clear();
    f.fences = f.products = f.products_done = f.bulk = f.bulk_asked = f.bulk_read = f.bulk_site = f.phase = 0;
    f.registers = kernel->registers;
    f.clock.start(i, nothing);
    f.stack = stack(i);
    f.sp = first_frame(f.stack);
    block.warps[f.warp].alive |= 1u << f.lane;
  }
  for (auto& w : block.warps) w.ready = w.alive;
  current = &block.fibers[0];
  emu_switch(&block.scheduler_sp, current->sp);
  current = nullptr;
}

}  // namespace emu

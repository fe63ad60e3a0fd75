// bar.sync, bar.arrive and bar.warp.sync. A full barrier orders all threads, a warp's the lanes of its mask.
#include "block.h"

namespace emu {

namespace {

bool waits_at(const Fiber& f, int id) {
  return !f.done && f.op == Op::barrier && f.barrier == id && !(block.warps[f.warp].ready >> f.lane & 1);
}

void release(int id) {
  Barrier& b = block.barriers[id];
  const Fiber* first = nullptr;
  for (auto& f : block.fibers) {
    if (!waits_at(f, id)) continue;
    if (!b.expected && first && first->site != f.site)
      fail("divergent __syncthreads: thread " + std::to_string(first->flat) + " at " + where(first->site) +
           " and thread " + std::to_string(f.flat) + " at " + where(f.site));
    if (!first) first = &f;
    if (checking) b.meeting.leave(f.clock);
    f.op = Op::none;
    wake(f);
  }
  counts.barriers++;
  b.got = b.expected = 0;
  b.meeting.clear();
}

// True where that was the last thread due.
bool enter(int id, int count, uint32_t site) {
  if (id < 0 || id >= kBarriers) fail_at("barrier number outside 0..15", site);
  if (count % 32 || count > static_cast<int>(block.warps.size() * 32))
    fail_at("barrier with a count that is no multiple of 32 or beyond the block", site);
  Barrier& b = block.barriers[id];
  if (b.got && b.expected != count)
    fail("barrier " + std::to_string(id) + " used with different counts at " + where(site) + " and " + where(b.site));
  b.expected = count, b.site = site, b.got++;
  if (checking) b.meeting.arrive(current->clock);
  return b.got == (count ? count : static_cast<int>(block.alive));
}

void join_lanes(Fiber* lanes, uint32_t mask) {
  if (!checking) return;
  Meeting m;
  for (uint32_t left = mask; left; left &= left - 1) m.arrive(lanes[__builtin_ctz(left)].clock);
  for (uint32_t left = mask; left; left &= left - 1) m.leave(lanes[__builtin_ctz(left)].clock);
}

}  // namespace

void bar_sync(int id, int count, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  Fiber* me = current;
  me->site = site;
  const bool last = enter(id, count, site);
  me->op = Op::barrier, me->barrier = id;
  sleep_now();
  if (last) release(id);
  pause();
}

void bar_arrive(int id, int count, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  if (!count) fail_at("bar.arrive without a count", site);
  const bool last = enter(id, count, site);
  if (checking) Meeting::pass(current->clock);
  if (last) release(id);
}

void syncwarp(uint32_t mask, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  collective(Op::syncwarp, nullptr, join_lanes, mask, site, false);
}

void thread_leaves_barriers() {
  for (int id = 0; id < kBarriers; id++) {
    Barrier& b = block.barriers[id];
    if (b.got && !b.expected && b.got == static_cast<int>(block.alive)) release(id);
  }
}

void check_barriers_empty() {
  for (int id = 0; id < kBarriers; id++)
    if (block.barriers[id].got)
      fail("the block ends with " + std::to_string(block.barriers[id].got) + " arrivals left in barrier " +
           std::to_string(id) + ", the last at " + where(block.barriers[id].site));
}

std::string describe_barrier(int id) {
  const Barrier& b = block.barriers[id];
  const int due = b.expected ? b.expected : static_cast<int>(block.alive);
  return "barrier " + std::to_string(id) + " (" + std::to_string(b.got) + " of " + std::to_string(due) + " threads)";
}

}  // namespace emu

// mbarriers: arrivals and bytes of copies that a phase waits for, and the proxy fences that copies need.
#include <map>

#include "block.h"

namespace emu {

namespace {

constexpr int64_t kMaxCount = (1 << 20) - 1;
constexpr uint64_t kPolls = 4'000'000;

struct Mbarrier {
  bool live = false, fenced = false;
  size_t at = 0;
  uint32_t phase = 0, init_clock = 0;  // phases are numbered on over initialisations
  unsigned init_thread = 0;
  int count = 0, pending = 0;
  int64_t due = 0;  // bytes; below zero while copies are ahead of what is expected
  Meeting meeting;
  Shared done;  // what is known to those who see the last phase over
};
std::vector<Mbarrier> mbarriers;
std::map<size_t, unsigned> numbers;
uint64_t polls;

size_t offset_of(const char* p, uint32_t site) {
  const auto offset = static_cast<size_t>(p - arena);
  if (offset % 8) fail_at("mbarrier at an address that is no multiple of 8", site);
  if (offset + 8 > arena_bytes()) fail_at("mbarrier out of bounds of shared memory", site);
  return offset;
}

Mbarrier& find(const char* p, uint32_t site) { return mbarriers[mbarrier_at(p, site)]; }

void check_range(const Mbarrier& m, uint32_t site) {
  if (m.due > kMaxCount || m.due < -kMaxCount) fail_at("mbarrier with more than 2^20 - 1 bytes due", site);
}

void finish_phase(Mbarrier& m) {
  if (m.pending || m.due) return;
  const auto number = static_cast<unsigned>(&m - mbarriers.data());
  m.phase++, m.pending = m.count;
  if (checking) {
    m.meeting.note(agents.arrival + number, m.phase);
    m.done = m.meeting.so_far();
  }
  for (auto& f : block.fibers) {
    if (f.done || f.op != Op::mbarrier || f.barrier != static_cast<int>(number) || m.phase <= f.phase) continue;
    f.op = Op::none;
    if (checking) f.clock.join(m.done);
    wake(f);
  }
}

void arrive(Mbarrier& m, int count, uint32_t site) {
  if (count < 1 || m.pending < count)
    fail("arrival at an mbarrier beyond its count of " + std::to_string(m.count) + " (" + std::to_string(m.due) +
         " bytes due) at " + where(site));
  if (checking) {
    m.meeting.arrive(current->clock);
    Meeting::pass(current->clock);
  }
  m.pending -= count;
  finish_phase(m);
}

bool seen_over(const Mbarrier& m) {
  if (checking) current->clock.join(m.done);
  polls = 0;
  return true;
}

bool wait(const Mbarrier& m, bool waits, uint32_t site) {
  Fiber* me = current;
  me->barrier = static_cast<int>(&m - mbarriers.data()), me->phase = m.phase, me->site = site;
  if (!waits) {
    if (++polls > kPolls) fail("no end of polling " + describe_mbarrier(*me) + " at " + where(site));
    if (polls % 64 == 0) bulk_deliver();
    yield_to_others();
    return false;
  }
  me->op = Op::mbarrier;
  sleep_now();
  pause();
  return true;
}

}  // namespace

void mbarriers_start() {
  mbarriers.clear();
  mbarriers.reserve(kMbarriers);  // references stay good
  numbers.clear();
  polls = 0;
}

unsigned mbarrier_at(const char* p, uint32_t site) {
  const auto found = numbers.find(offset_of(p, site));
  if (found == numbers.end() || !mbarriers[found->second].live)
    fail_at("mbarrier operation where none is initialised", site);
  const Mbarrier& m = mbarriers[found->second];
  if (checking && !actor(*current).knows(m.init_thread, m.init_clock))
    fail_at("mbarrier used without synchronisation with its initialisation", site);
  return found->second;
}

unsigned mbarrier_for_copy(const char* p, uint32_t site) {
  const Mbarrier& m = find(p, site);
  if (checking && strict.init_fence && !m.fenced)
    fail_at("copy to an mbarrier whose initialisation no fence.mbarrier_init or fence.proxy.async followed", site);
  return mbarrier_at(p, site);
}

size_t mbarrier_offset(unsigned number) { return mbarriers[number].at; }
uint32_t mbarrier_next(unsigned number) { return mbarriers[number].phase + 1; }

void mbarrier_copied(unsigned number, int64_t bytes, uint32_t site) {
  Mbarrier& m = mbarriers[number];
  if (!m.live) fail_at("copy ends on an mbarrier that is no longer valid", site);
  m.due -= bytes;
  check_range(m, site);
  finish_phase(m);
}

void mbarriers_fenced() {
  for (Mbarrier& m : mbarriers)
    if (m.init_thread == current->flat) m.fenced = true;
}

void check_mbarriers_done() {
  for (const Mbarrier& m : mbarriers)
    if (m.live && m.due)
      fail("the block ends with " + std::to_string(m.due) + " bytes due at the mbarrier at byte " +
           std::to_string(m.at) + " of shared memory");
}

std::string describe_mbarrier(const Fiber& f) {
  const Mbarrier& m = mbarriers[f.barrier];
  return "the mbarrier at byte " + std::to_string(m.at) + " of shared memory (phase " + std::to_string(m.phase) + ": " +
         std::to_string(m.pending) + " of " + std::to_string(m.count) + " arrivals and " + std::to_string(m.due) +
         " bytes due)";
}

void mbarrier_init(char* p, int count, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  const size_t at = offset_of(p, site);
  if (count < 1 || count > kMaxCount) fail_at("mbarrier with a count outside 1..2^20-1", site);
  if (!numbers.count(at)) {
    if (mbarriers.size() == kMbarriers) fail_at("more mbarriers than the emulator has numbers for", site);
    numbers[at] = static_cast<unsigned>(mbarriers.size());
    mbarriers.emplace_back();
  }
  Mbarrier& m = mbarriers[numbers[at]];
  if (m.live) fail_at("initialisation of a live mbarrier", site);
  const uint32_t phase = (m.phase + 1) & ~1u;
  m = Mbarrier{};
  m.live = true, m.at = at, m.phase = phase, m.count = m.pending = count, m.init_thread = current->flat;
  current->site = site;
  if (checking) {
    shared_access(at, 8, Access::write, actor(*current), site);
    shared_barrier(at, true);
    m.init_clock = current->clock.now();
    Meeting::pass(current->clock);
  }
}

void mbarrier_inval(char* p, uint32_t site) {
  Mbarrier& m = find(p, site);
  if (m.due) fail_at("mbarrier.inval with bytes due", site);
  m.live = false;
  if (!checking) return;
  shared_barrier(m.at, false);
  shared_access(m.at, 8, Access::write, actor(*current), site);
}

uint64_t mbarrier_arrive(char* p, int count, uint32_t site) {
  if (plant(Plant::skip, site)) return 0;
  Mbarrier& m = find(p, site);
  const uint64_t state = m.phase;
  arrive(m, count, site);
  return state;
}

uint64_t mbarrier_expect(char* p, int64_t bytes, bool arrives, uint32_t site) {
  if (plant(Plant::skip, site)) return 0;
  Mbarrier& m = find(p, site);
  const uint64_t state = m.phase;
  m.due += bytes;
  check_range(m, site);
  if (arrives) arrive(m, 1, site);
  return state;
}

// A phase is over where its parity is that of the phase before the present one; 1 on a fresh mbarrier.
bool mbarrier_parity(char* p, uint32_t parity, bool waits, uint32_t site) {
  if (plant(Plant::skip, site)) return true;
  const Mbarrier& m = find(p, site);
  return ((m.phase + 1) & 1) == (parity & 1) ? seen_over(m) : wait(m, waits, site);
}

bool mbarrier_state(char* p, uint64_t state, bool waits, uint32_t site) {
  if (plant(Plant::skip, site)) return true;
  const Mbarrier& m = find(p, site);
  return m.phase > state ? seen_over(m) : wait(m, waits, site);
}

void fence_proxy(bool shared, bool global, uint32_t site) {
  if (!checking || plant(Plant::skip, site)) return;
  mbarriers_fenced();
  if (strict.fence)
    current->clock.fence(shared, global);
  else
    current->clock.fence_for_all();
}

void fence_mbarrier_init(uint32_t site) {
  if (!plant(Plant::skip, site)) mbarriers_fenced();
}

}  // namespace emu

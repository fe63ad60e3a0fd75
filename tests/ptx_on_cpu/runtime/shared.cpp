// Shared memory and its shadow: for each two bytes who wrote them last and who has read them since, by vector clock.
// And cp.async: the bytes are nobody's until the thread that asked for them has waited.
#include <sys/mman.h>

#include <algorithm>

#include "block.h"

namespace emu {

char* arena;
uint32_t dynamic_at;

namespace {

constexpr size_t kCell = 2, kPage = 4096;
// Generic addresses of shared memory start at a multiple of this, as on devices, where descriptors hold the low bits.
constexpr size_t kAlign = size_t{1} << 24;
constexpr int kReaders = 3;

// Written by threads, on the way by cp.async or by a bulk copy, brought by a bulk copy, an mbarrier.
enum class State : uint8_t { none, written, atomic, in_flight, copying, copied, barrier };
struct Reader {
  uint32_t clock, site;
  uint32_t agent;
};
struct Cell {
  uint32_t clock, site, agent;
  State state;
  uint8_t readers, swizzle;  // 1 + the swizzle of the tensor map that brought the bytes
  uint32_t more;             // index into `overflow`, 0 for none
  Reader reader[kReaders];
};

std::vector<Cell> cells;
std::vector<std::vector<Reader>> overflow;
size_t bytes_;

[[noreturn]] void report(const char* kind, size_t offset, const char* how, const Actor& by, uint32_t site, int other,
                         uint32_t other_site) {
  std::string m = std::string(kind) + " on byte " + std::to_string(offset) +
                  " of shared memory: " + agent_name(by.agent) + " " + how + " at " + where(site);
  if (other >= 0) m += ", against " + agent_name(static_cast<unsigned>(other)) + " at " + where(other_site);
  fail(m);
}

const char* verb(Access a) { return a == Access::read ? "reads" : a == Access::write ? "writes" : "updates"; }

void check_write_after(const Cell& c, size_t offset, Access access, const Actor& by, uint32_t site) {
  const auto check = [&](const Reader& r) {
    if (!by.knows(r.agent, r.clock))
      report("write-after-read race", offset, verb(access), by, site, static_cast<int>(r.agent), r.site);
    if (by.async && strict.war_fence && agents.is_thread(r.agent) && !by.fenced(Space::shared, r.agent, r.clock))
      report("no fence.proxy.async between ordinary reads and a write of the async proxy", offset, verb(access), by,
             site, static_cast<int>(r.agent), r.site);
  };
  std::for_each(c.reader, c.reader + c.readers, check);
  if (c.more) std::for_each(overflow[c.more].begin(), overflow[c.more].end(), check);
}

void note_write(Cell& c, Access access, const Actor& by, uint32_t site) {
  c.readers = 0, c.swizzle = 0;
  if (c.more) overflow[c.more].clear();
  c.state = access == Access::atomic ? State::atomic : State::written;
  c.agent = by.agent, c.clock = by.now, c.site = site;
}

// Whoever is ordered after the new reader is after the old one too, its fence included.
bool covers(const Actor& by, const Reader& r) {
  if (r.agent == by.agent) return true;
  return by.knows(r.agent, r.clock) &&
         (!agents.proxies || !agents.is_thread(r.agent) || by.fenced(Space::shared, r.agent, r.clock));
}

void note_read(Cell& c, const Actor& by, uint32_t site) {
  const Reader now{by.now, site, by.agent};
  for (int i = 0; i < c.readers; i++)
    if (covers(by, c.reader[i])) {
      c.reader[i] = now;
      return;
    }
  if (c.readers < kReaders) {
    c.reader[c.readers++] = now;
    return;
  }
  if (!c.more) {
    c.more = static_cast<uint32_t>(overflow.size());
    overflow.emplace_back();
  }
  auto& list = overflow[c.more];
  const auto same = std::find_if(list.begin(), list.end(), [&](const Reader& r) { return r.agent == now.agent; });
  if (same == list.end())
    list.push_back(now);
  else
    *same = now;
}

void check_cell(const Cell& c, size_t offset, Access access, const Actor& by, uint32_t site) {
  const char* how = verb(access);
  const int writer = static_cast<int>(c.agent);
  switch (c.state) {
    case State::none:
      if (access != Access::write) report("read of uninitialised bytes", offset, how, by, site, -1, 0);
      return;
    case State::in_flight:
      report("access to bytes whose cp.async has not been waited for", offset, how, by, site, writer, c.site);
    case State::copying:
      report("access to bytes that a bulk copy is still writing", offset, how, by, site, writer, c.site);
    case State::barrier:
      report("access to an mbarrier", offset, how, by, site, writer, c.site);
    default:
      break;
  }
  if (c.state == State::atomic && access == Access::atomic) return;
  if (!by.knows(c.agent, c.clock))
    report(access == Access::read ? "read-after-write race" : "write-after-write race", offset, how, by, site, writer,
           c.site);
  if (by.async && c.state != State::copied && !by.fenced(Space::shared, c.agent, c.clock))
    report("no fence.proxy.async between an ordinary write and the async proxy", offset, how, by, site, writer, c.site);
}

void mark_in_flight(const Copy& c, uint32_t site) {
  const size_t from = static_cast<size_t>(c.to - arena) / kCell;
  for (size_t i = from; i < from + c.bytes / kCell; i++) cells[i].state = State::in_flight, cells[i].site = site;
}

void mark_landed(const Copy& c, const Fiber& by) {
  const size_t from = static_cast<size_t>(c.to - arena) / kCell;
  for (size_t i = from; i < from + c.bytes / kCell; i++)
    cells[i].state = State::written, cells[i].clock = by.clock.now();
}

}  // namespace

size_t arena_bytes() { return bytes_; }
size_t arena_span() { return kAlign; }

// The end of the block's memory touches an unreadable page.
void shared_start(size_t bytes) {
  static char* place;
  if (!place) {
    char* p =
        static_cast<char*>(mmap(nullptr, 3 * kAlign, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    place = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kAlign - 1) / kAlign * kAlign);
    arena = place;
  }
  const size_t body = (bytes + kPage - 1) / kPage * kPage;
  mprotect(place, kAlign, PROT_NONE);
  if (body) mprotect(place, body, PROT_READ | PROT_WRITE);
  memset(place, 0xff, body);
  bytes_ = bytes;
  if (!checking) return;
  cells.assign(bytes / kCell + 1, Cell{});
  overflow.assign(1, {});
}

void shared_access(size_t offset, size_t bytes, Access access, const Actor& by, uint32_t site) {
  if (offset + bytes > bytes_) report("access out of bounds", offset, verb(access), by, site, -1, 0);
  if (bytes % kCell) report("single bytes of shared memory are not modelled", offset, verb(access), by, site, -1, 0);
  for (size_t i = offset / kCell; i < (offset + bytes) / kCell; i++) {
    Cell& c = cells[i];
    check_cell(c, i * kCell, access, by, site);
    if (access == Access::read) {
      note_read(c, by, site);
    } else {
      check_write_after(c, i * kCell, access, by, site);
      note_write(c, access, by, site);
    }
  }
}

void shared_copying(size_t offset, size_t bytes, const Actor& by, uint32_t site) {
  shared_access(offset, bytes, Access::write, by, site);
  for (size_t i = offset / kCell; i < (offset + bytes) / kCell; i++) cells[i].state = State::copying;
}

void shared_copied(size_t offset, size_t bytes, uint32_t when, int swizzle) {
  for (size_t i = offset / kCell; i < (offset + bytes) / kCell; i++)
    cells[i].state = State::copied, cells[i].clock = when, cells[i].swizzle = static_cast<uint8_t>(1 + swizzle);
}

void shared_barrier(size_t offset, bool live) {
  for (size_t i = offset / kCell; i < (offset + 8) / kCell; i++)
    cells[i].state = live ? State::barrier : State::written;
}

int shared_swizzle(size_t offset) {
  const Cell& c = cells[offset / kCell];
  return c.state == State::copied ? c.swizzle - 1 : -1;
}

void cp_async(char* to, const void* from, int bytes, int from_bytes, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  if (plant(Plant::whole_copy, site)) from_bytes = bytes;
  if (from_bytes < 0 || from_bytes > bytes) fail_at("cp.async with a source size outside 0..size", site);
  const Copy c{to, static_cast<const char*>(from), bytes, from_bytes, current->group, site};
  current->site = site;
  if (checking) {
    if (from_bytes) touch(from, from_bytes, Access::read, site);
    touch(to, bytes, Access::write, site);
    counts.copied += from_bytes;
    mark_in_flight(c, site);
  }
  memset(to, 0xff, bytes);
  current->copies.push_back(c);
}

void cp_async_commit(uint32_t site) {
  if (!plant(Plant::skip, site)) current->group++;
}

void cp_async_wait(int keep, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  if (plant(Plant::wait_one_less, site)) keep++;
  Fiber& me = *current;
  const int upto = me.group - keep;
  size_t left = 0;
  for (const Copy& c : me.copies) {
    if (c.group >= upto) {
      me.copies[left++] = c;
      continue;
    }
    memcpy(c.to, c.from, c.from_bytes);
    memset(c.to + c.from_bytes, 0, c.bytes - c.from_bytes);
    if (checking) mark_landed(c, me);
  }
  me.copies.resize(left);
}

void cp_async_wait_all(uint32_t site) {
  if (plant(Plant::skip, site) || plant(Plant::wait_one_less, site)) return;
  cp_async_wait(-1, 0);
}

void check_copies_done() {
  if (!current->copies.empty())
    fail("thread " + std::to_string(current->flat) + " ends without waiting for its cp.async at " +
         where(current->copies.front().site));
}

}  // namespace emu

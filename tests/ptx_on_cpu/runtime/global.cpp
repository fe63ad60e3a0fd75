// Global memory: which addresses a kernel may touch, who touched them in this launch, and how many bytes moved.
#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <unordered_map>

#include "api.h"
#include "block.h"

namespace emu {

Counts counts;

namespace {

constexpr int kMaxDims = 8;

// A tensor: the exact elements, so that the gaps between rows of a view are out of bounds.
struct Extent {
  const char* at;
  size_t span;
  int dims;  // outermost first, the innermost in bytes
  int64_t size[kMaxDims + 1], stride[kMaxDims + 1];
  bool writable, permanent;
  uint64_t read, written;

  bool contains(const char* p, int bytes) const {
    int64_t off = p - at;
    if (off < 0 || static_cast<size_t>(off) + bytes > span) return false;
    for (int d = 0; d < dims - 1; d++) off -= std::min(off / stride[d], size[d] - 1) * stride[d];
    return off >= 0 && off + bytes <= size[dims - 1];
  }
};
std::list<Extent> extents;

// Who touched two bytes. Blocks are numbered over all launches; a number of an earlier launch says nothing.
struct Word {
  uint32_t write_block, write_clock, write_site, read_block, read_clock, read_site;
  uint16_t writer, reader;
  bool fresh;  // allocated, and never written
};
constexpr size_t kWord = 2, kPage = 4096;
constexpr uint16_t kSeveral = 0xffff;  // in place of a reader: threads of several blocks
using Page = std::vector<Word>;
std::unordered_map<uintptr_t, Page> pages;
uintptr_t last_number = ~uintptr_t{0};
Page* last_page;
uint32_t first_block = 1, this_block = 1;

Word& word(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (number != last_number) {
    Page& p = pages[number];
    if (p.empty()) p.resize(kPage / kWord);
    last_number = number, last_page = &p;
  }
  return (*last_page)[address % kPage / kWord];
}

[[noreturn]] void report(const char* kind, uintptr_t address, const Actor& by, const char* how, uint32_t site,
                         const std::string& other) {
  std::string in = "global memory";
  for (const Extent& e : extents)
    if (address >= reinterpret_cast<uintptr_t>(e.at) && address < reinterpret_cast<uintptr_t>(e.at) + e.span)
      in = "byte " + std::to_string(address - reinterpret_cast<uintptr_t>(e.at)) + " of a tensor of " +
           std::to_string(e.span) + " bytes";
  fail(std::string(kind) + " on " + in + ": " + agent_name(by.agent) + " " + how + " at " + where(site) +
       (other.empty() ? "" : ", " + other));
}

std::string against(uint32_t block_number, unsigned thread, uint32_t site) {
  std::string s = "against ";
  if (thread == kSeveral) return s + "several blocks, the last at " + where(site);
  if (block_number != this_block) s += "another block, ";
  return s + agent_name(thread) + " at " + where(site);
}

// An ordinary write of this block, which hardware on its own touches.
void check_proxy(const Word& w, uintptr_t address, const Actor& by, const char* how, uint32_t site) {
  if (by.async && agents.is_thread(w.writer) && !by.fenced(Space::global, w.writer, w.write_clock))
    report("no fence.proxy.async between an ordinary write and the async proxy", address, by, how, site,
           against(this_block, w.writer, w.write_site));
}

void check_read(const Word& w, uintptr_t address, const Actor& by, uint32_t site) {
  if (w.fresh) report("read of uninitialised bytes", address, by, "reads", site, "");
  if (w.write_block < first_block) return;
  if (w.write_block != this_block)
    report("read of what another block of the launch writes", address, by, "reads", site,
           against(w.write_block, w.writer, w.write_site));
  if (!by.knows(w.writer, w.write_clock))
    report("read-after-write race", address, by, "reads", site, against(this_block, w.writer, w.write_site));
  check_proxy(w, address, by, "reads", site);
}

void check_write(const Word& w, uintptr_t address, const Actor& by, uint32_t site) {
  if (w.write_block >= first_block) {
    if (w.write_block != this_block)
      report("write of what another block of the launch writes", address, by, "writes", site,
             against(w.write_block, w.writer, w.write_site));
    if (!by.knows(w.writer, w.write_clock))
      report("write-after-write race", address, by, "writes", site, against(this_block, w.writer, w.write_site));
    check_proxy(w, address, by, "writes", site);
  }
  if (w.read_block < first_block) return;
  if (w.read_block != this_block || w.reader == kSeveral)
    report("write of what another block of the launch reads", address, by, "writes", site,
           against(w.read_block, w.reader, w.read_site));
  if (!by.knows(w.reader, w.read_clock))
    report("write-after-read race", address, by, "writes", site, against(this_block, w.reader, w.read_site));
}

void note_read(Word& w, const Actor& by, uint32_t site) {
  const bool first = w.read_block < first_block;
  if (first) counts.read_once += kWord;
  const bool alone = first || (w.read_block == this_block && w.reader != kSeveral);
  w.read_block = this_block, w.reader = alone ? static_cast<uint16_t>(by.agent) : kSeveral;
  w.read_clock = by.now, w.read_site = site;
}

void note_write(Word& w, const Actor& by, uint32_t site) {
  if (w.write_block < first_block) counts.written_once += kWord;
  w.write_block = this_block, w.fresh = false;
  w.writer = static_cast<uint16_t>(by.agent), w.write_clock = by.now, w.write_site = site;
}

Extent& find(const char* p, int bytes, Access access, const Actor& by, uint32_t site) {
  Extent* readable = nullptr;
  for (auto e = extents.begin(); e != extents.end(); ++e)
    if (e->contains(p, bytes)) {
      readable = &*e;
      if (access != Access::read && !e->writable) continue;
      extents.splice(extents.begin(), extents, e);  // the next access is mostly of the same tensor
      return extents.front();
    }
  const char* how = access == Access::read ? "reads" : "writes";
  const std::string size = std::to_string(bytes) + " bytes";
  report(readable ? "write into an input" : "access out of bounds", reinterpret_cast<uintptr_t>(p), by, how, site,
         size);
}

void set_fresh(const void* p, size_t bytes, bool fresh) {
  const auto from = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = from; a < from + bytes; a += kWord) word(a).fresh = fresh;
}

struct Allocation {
  char* map;
  size_t mapped, bytes;
};
std::unordered_map<void*, Allocation> allocations;

void add_extent(Extent e, const int64_t* sizes, const int64_t* strides, int dims, int64_t element) {
  std::vector<std::pair<int64_t, int64_t>> d;  // stride and size in bytes, merged where one follows the other
  for (int i = 0; i < dims; i++)
    if (sizes[i] > 1 && strides[i] > 0) d.emplace_back(strides[i] * element, sizes[i]);
  std::sort(d.rbegin(), d.rend());
  int64_t inner = element;
  while (!d.empty() && d.back().first == inner) inner *= d.back().second, d.pop_back();
  e.dims = 0, e.span = inner, e.read = e.written = 0;
  for (auto [stride, size] : d) {
    e.stride[e.dims] = stride, e.size[e.dims++] = size;
    e.span += stride * (size - 1);
  }
  e.size[e.dims++] = inner;
  extents.push_front(e);
}

}  // namespace

void global_start_launch() { first_block = this_block + 1; }
void global_start_block() { this_block++; }

void global_access(const char* p, int bytes, Access access, const Actor& by, uint32_t site) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  Extent& e = find(p, bytes, access, by, site);
  if (!by.async) counts.accesses++, counts.accesses16 += bytes == 16;
  if (access == Access::atomic) {
    counts.atomics++;
    for (uintptr_t a = address; a < address + bytes; a += kWord) word(a).fresh = false;
    return;
  }
  (access == Access::read ? counts.read : counts.written) += bytes;
  if (by.async) (access == Access::read ? counts.bulk_read : counts.bulk_written) += bytes;
  (access == Access::read ? e.read : e.written) += bytes;
  if (bytes % kWord) return;  // single bytes: bounds only
  for (uintptr_t a = address; a < address + bytes; a += kWord) {
    Word& w = word(a);
    if (access == Access::read)
      check_read(w, a, by, site), note_read(w, by, site);
    else
      check_write(w, a, by, site), note_write(w, by, site);
  }
}

}  // namespace emu

using namespace emu;

void emu_extent(const void* p, int64_t element, int dims, const int64_t* sizes, const int64_t* strides, int writable) {
  Extent e{};
  e.at = static_cast<const char*>(p), e.writable = writable;
  for (int i = 0; i < dims; i++)
    if (!sizes[i]) return;
  add_extent(e, sizes, strides, dims, element);
}

void emu_forget() {
  extents.remove_if([](const Extent& e) { return !e.permanent; });
}

// The last byte touches an unreadable page, and so does the page before the first.
void* emu_allocate(size_t bytes) {
  const size_t body = (bytes + kPage - 1) / kPage * kPage, mapped = body + 2 * kPage;
  char* map = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(map, kPage, PROT_NONE);
  mprotect(map + kPage + body, kPage, PROT_NONE);
  char* p = map + kPage + body - (bytes + 15) / 16 * 16;  // torch aligns to 16 bytes at least
  memset(map + kPage, 0xff, body);
  allocations[p] = {map, mapped, bytes};
  set_fresh(p, bytes, true);
  return p;
}

void emu_free(void* p) {
  const auto found = allocations.find(p);
  if (found == allocations.end()) return;
  for (uintptr_t a = reinterpret_cast<uintptr_t>(found->second.map) / kPage, n = found->second.mapped / kPage; n--; a++)
    pages.erase(a);
  last_number = ~uintptr_t{0};
  munmap(found->second.map, found->second.mapped);
  allocations.erase(found);
}

void emu_written(const void* p, size_t bytes) {
  const auto at = static_cast<const char*>(p);
  for (const auto& [start, a] : allocations)
    if (at >= start && at < static_cast<char*>(start) + a.bytes)
      set_fresh(p, std::min(bytes, static_cast<size_t>(static_cast<char*>(start) + a.bytes - at)), false);
}

int emu_traffic(const void* p, uint64_t* read, uint64_t* written) {
  *read = *written = 0;
  int found = 0;
  for (const Extent& e : extents)
    if (e.at == p) *read += e.read, *written += e.written, found = 1;
  return found;
}

void emu_permanent(char* p, size_t bytes, int writable) {
  for (const Extent& e : extents)
    if (e.at == p && e.permanent) return;
  Extent e{};
  e.at = p, e.writable = writable, e.permanent = true;
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  add_extent(e, &size, &stride, 1, 1);
}

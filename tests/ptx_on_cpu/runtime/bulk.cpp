// Bulk copies: hardware reads or writes shared memory on its own, through the async proxy. They land in the order in
// which they were asked for, as late as can be: when nothing else can go on, or when a thread waits for them.
#include <algorithm>
#include <list>

#include "block.h"
#include "tensor_map.h"

namespace emu {

namespace {

struct Bulk {
  bool load;
  BulkOp op;
  BulkType type;
  TensorMap map;  // rank 0: none, `bytes` in a row
  int at[5];
  size_t shared;
  char* global;
  uint32_t bytes;
  unsigned barrier, thread;
  uint32_t group, site;
  std::shared_ptr<const Known> known;  // to the thread that asked, when it did
};
std::list<Bulk> under_way;

size_t swizzled(size_t offset, int mode) {
  static const int mask[] = {0, 1, 3, 7};
  return offset ^ (offset >> 7 & mask[mode]) << 4;
}

// f(offset of the row in the box, global address of its part that is inside, bytes before that part, its bytes)
template <class F>
void each_row(const Bulk& c, F f) {
  const TensorMap& m = c.map;
  if (!m.rank) return f(size_t{0}, c.global, size_t{0}, size_t{c.bytes});
  int rows = 1;
  for (int d = 1; d < m.rank; d++) rows *= m.box[d];
  const int64_t first = std::clamp<int64_t>(-static_cast<int64_t>(c.at[0]), 0, m.box[0]);
  const int64_t last = std::clamp<int64_t>(static_cast<int64_t>(m.size[0]) - c.at[0], first, m.box[0]);
  for (int row = 0; row < rows; row++) {
    int left = row;
    bool inside = last > first;
    char* p = m.at;
    for (int d = 1; d < m.rank; left /= m.box[d++]) {
      const int64_t i = int64_t{c.at[d]} + left % m.box[d];
      inside = inside && i >= 0 && i < static_cast<int64_t>(m.size[d]);
      p += i * static_cast<int64_t>(m.stride[d - 1]);
    }
    f(static_cast<size_t>(row) * m.box[0] * m.element, p + (c.at[0] + first) * m.element,
      static_cast<size_t>(first) * m.element, inside ? static_cast<size_t>(last - first) * m.element : 0);
  }
}

size_t row_bytes(const Bulk& c) { return c.map.rank ? size_t{c.map.box[0]} * c.map.element : c.bytes; }

void land_load(const Bulk& c) {
  const Actor by{agents.arrival + c.barrier, mbarrier_next(c.barrier), nullptr, c.known.get(), true};
  std::vector<char> row(row_bytes(c));
  each_row(c, [&](size_t offset, const char* from, size_t before, size_t bytes) {
    std::fill(row.begin(), row.end(), 0);
    if (bytes && checking) global_access(from, static_cast<int>(bytes), Access::read, by, c.site);
    if (bytes) memcpy(row.data() + before, from, bytes);
    for (size_t i = 0; i < row.size(); i += 16)
      memcpy(arena + swizzled(c.shared + offset + i, c.map.swizzle), row.data() + i, 16);
  });
  if (checking) shared_copied(c.shared, c.bytes, by.now, c.map.rank ? c.map.swizzle : -1);
  mbarrier_copied(c.barrier, c.bytes, c.site);
}

template <class T>
void combine(BulkOp op, char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes / sizeof(T); i++) {
    const T a = get<T>(to, static_cast<int>(i)), b = get<T>(from, static_cast<int>(i));
    set<T>(to, static_cast<int>(i),
           op == BulkOp::add   ? static_cast<T>(a + b)
           : op == BulkOp::min ? minimum(a, b)
                               : maximum(a, b));
  }
}
template <class T>
void combine_half(BulkOp op, char* to, const char* from, size_t bytes) {
  for (int i = 0; i < static_cast<int>(bytes / 2); i++) {
    const auto f = [op](float a, float b) {
      return op == BulkOp::add ? a + b : op == BulkOp::min ? minimum(a, b) : maximum(a, b);
    };
    set<uint16_t>(to, i, map1<T>(f, get<uint16_t>(to, i), get<uint16_t>(from, i)));
  }
}

void reduce(const Bulk& c, char* to, const char* from, size_t bytes) {
  switch (c.type) {
    case BulkType::u32:
      return combine<uint32_t>(c.op, to, from, bytes);
    case BulkType::s32:
      return combine<int32_t>(c.op, to, from, bytes);
    case BulkType::u64:
      return combine<uint64_t>(c.op, to, from, bytes);
    case BulkType::f32:
      return combine<float>(c.op, to, from, bytes);
    case BulkType::f64:
      return combine<double>(c.op, to, from, bytes);
    case BulkType::f16:
      return combine_half<f16>(c.op, to, from, bytes);
    case BulkType::bf16:
      return combine_half<bf16>(c.op, to, from, bytes);
    default:
      fail_at("reduction of elements that cannot be reduced", c.site);
  }
}

void land_store(const Bulk& c) {
  const Actor by{agents.target + c.thread, c.group, nullptr, c.known.get(), true};
  const Access access = c.op == BulkOp::store ? Access::write : Access::atomic;
  std::vector<char> row(row_bytes(c));
  each_row(c, [&](size_t offset, char* to, size_t before, size_t bytes) {
    for (size_t i = 0; i < row.size(); i += 16)
      memcpy(row.data() + i, arena + swizzled(c.shared + offset + i, c.map.swizzle), 16);
    if (!bytes) return;
    if (checking) global_access(to, static_cast<int>(bytes), access, by, c.site);
    if (c.op == BulkOp::store)
      memcpy(to, row.data() + before, bytes);
    else
      reduce(c, to, row.data() + before, bytes);
  });
}

void land(std::list<Bulk>::iterator place) {
  const Bulk c = *place;
  under_way.erase(place);
  c.load ? land_load(c) : land_store(c);
}

TensorMap read_map(const void* p, int rank, uint32_t site) {
  TensorMap m;
  if (reinterpret_cast<uintptr_t>(p) % 64) fail_at("tensor map at an address that is no multiple of 64", site);
  memcpy(&m, p, sizeof m);
  if (m.magic != kTensorMap) fail_at("what should be a tensor map is none", site);
  if (m.rank != rank) fail_at("tensor map of another rank than the instruction's", site);
  return m;
}

BulkType type_of(const TensorMap& m) {
  static const BulkType types[] = {BulkType::none, BulkType::none, BulkType::u32, BulkType::s32, BulkType::u64,
                                   BulkType::none, BulkType::f16,  BulkType::f32, BulkType::f64, BulkType::bf16};
  return m.type < 10 ? types[m.type] : BulkType::none;
}

Bulk with_map(const void* map, int rank, const int* at, const char* shared, uint32_t site) {
  Bulk c{};
  c.map = read_map(map, rank, site), c.shared = static_cast<size_t>(shared - arena), c.site = site;
  c.bytes = c.map.element;
  for (int d = 0; d < rank; d++) c.at[d] = at[d], c.bytes *= c.map.box[d];
  if (c.shared % 128) fail_at("box in shared memory at an address that is no multiple of 128", site);
  if (const unsigned pattern = 128u << c.map.swizzle; c.map.swizzle && c.shared % pattern)
    fail("box in shared memory at an address that is no multiple of its swizzle pattern's " + std::to_string(pattern) +
         " bytes at " + where(site));
  return c;
}

Bulk in_a_row(char* global, const char* shared, uint32_t bytes, uint32_t site) {
  Bulk c{};
  c.global = global, c.shared = static_cast<size_t>(shared - arena), c.bytes = bytes, c.site = site;
  if (c.shared % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fail_at("bulk copy with an address or a size that is no multiple of 16", site);
  return c;
}

void start_load(Bulk c, const char* barrier) {
  Fiber& me = *current;
  me.site = c.site;
  c.load = true, c.thread = me.flat, c.barrier = mbarrier_for_copy(barrier, c.site);
  if (c.shared + c.bytes > arena_bytes()) fail_at("bulk copy past the end of shared memory", c.site);
  if (checking) {
    counts.bulk_loads++;
    c.known = me.clock.snapshot();
    shared_copying(c.shared, c.bytes,
                   {agents.arrival + c.barrier, mbarrier_next(c.barrier), nullptr, c.known.get(), true}, c.site);
  }
  memset(arena + c.shared, 0xff, c.bytes);
  under_way.push_back(c);
  if (!late) land(std::prev(under_way.end()));
}

void start_store(Bulk c) {
  Fiber& me = *current;
  me.site = c.site;
  c.thread = me.flat, c.group = me.bulk + 1;
  me.bulk_asked = c.group, me.bulk_site = c.site;
  if (c.shared + c.bytes > arena_bytes()) fail_at("bulk copy past the end of shared memory", c.site);
  if (checking) {
    counts.bulk_stores++;
    c.known = me.clock.snapshot();
    shared_access(c.shared, c.bytes, Access::read, {agents.source + c.thread, c.group, nullptr, c.known.get(), true},
                  c.site);
  }
  under_way.push_back(c);
  if (!late) land(std::prev(under_way.end()));
}

}  // namespace

void bulk_start() { under_way.clear(); }

bool bulk_deliver() {
  if (under_way.empty()) return false;
  land(under_way.begin());
  return true;
}

void check_bulk_read() {
  const Fiber& me = *current;
  if (me.bulk_asked > me.bulk_read)
    fail("thread " + std::to_string(me.flat) +
         " ends before its bulk copy has read shared memory: no wait_group after " + where(me.bulk_site));
}

void check_bulk_done() {
  for (const Bulk& c : under_way)
    if (c.load) fail("the block ends while a bulk copy to shared memory is under way, asked for at " + where(c.site));
}

void tensor_load(char* to, const void* map, int rank, const int* at, char* barrier, uint32_t site) {
  if (!plant(Plant::skip, site)) start_load(with_map(map, rank, at, to, site), barrier);
}

void tensor_store(BulkOp op, const void* map, int rank, const int* at, char* from, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  Bulk c = with_map(map, rank, at, from, site);
  c.op = op, c.type = type_of(c.map);
  start_store(c);
}

void bulk_load(char* to, const char* from, uint32_t bytes, char* barrier, uint32_t site) {
  if (!plant(Plant::skip, site)) start_load(in_a_row(const_cast<char*>(from), to, bytes, site), barrier);
}

void bulk_store(BulkOp op, BulkType type, char* to, char* from, uint32_t bytes, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  Bulk c = in_a_row(to, from, bytes, site);
  c.op = op, c.type = type;
  start_store(c);
}

void bulk_commit(uint32_t site) {
  if (!plant(Plant::skip, site)) current->bulk++;
}

void bulk_wait(int keep, bool read, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  Fiber& me = *current;
  keep += plant(Plant::wait_one_less, site);
  if (me.bulk <= static_cast<uint32_t>(keep)) return;
  const uint32_t upto = me.bulk - static_cast<uint32_t>(keep);
  for (auto c = under_way.begin(); c != under_way.end();) {
    const auto next = std::next(c);
    if (!c->load && c->thread == me.flat && c->group <= upto) land(c);
    c = next;
  }
  me.bulk_read = std::max(me.bulk_read, upto);
  if (!checking) return;
  me.clock.learn(agents.source + me.flat, upto);
  if (!read) me.clock.learn(agents.target + me.flat, upto);
}

}  // namespace emu

// wgmma: products of a warpgroup that go on while its threads do. Until a thread has waited, the registers of its sums
// hold tokens; a token that is read, or overwritten, is a finding.
#include "wgmma.h"

#include <algorithm>
#include <climits>
#include <cmath>

namespace emu {

namespace {

constexpr unsigned kSums = 64, kLanes = 128;
constexpr uint32_t kVersions = 512;

// Sums under way, [64, n]. Each product on them is a new version; tokens of an earlier one are copies that are stale.
struct Sums {
  std::vector<float> v;
  int n = 0;
  uint32_t version = 0, group = 0, touched = 0, site = 0;
};
struct Product {
  unsigned sums;
  bool keep;
  uint32_t group;
  Element e;
  std::vector<float> a;  // [k][row] where it came from registers
  Matrix a_at, b_at;
  int n;
  float sign;
};
struct Group {
  unsigned arrived = 0;
  uint32_t turn = 0;
  std::vector<Product> under_way;
  Sums sums[kSums];
  std::vector<Shared> knew;  // by the threads, when `least` was made
  Known least;               // what all of them know
};
std::vector<Group> groups;

unsigned warpgroup(const Fiber& f) { return f.flat / kLanes; }
uint32_t token(unsigned sums, uint32_t version, int i) {
  return 0xff800000u | version % kVersions << 13 | sums << 7 | static_cast<uint32_t>(i);
}
unsigned sums_of(uint32_t token) { return token >> 7 & 63; }
uint32_t version_of(uint32_t token) { return token >> 13 & (kVersions - 1); }

// The fragment layout of the PTX ISA, 9.7.15.5.1.1: element i of a thread, in a matrix of n columns.
size_t place(unsigned thread, int i, int n) {
  const unsigned row = thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8;
  return size_t{row} * n + i / 4 * 8 + thread % 4 * 2 + (i & 1);
}

const Wgmma& of(const Fiber& f) { return *static_cast<const Wgmma*>(f.args); }

// A sum of 16 products and c as an H100 makes it, found to the last bit by scripts/gpu_hopper.py and in arXiv
// 2512.07004: all are cut 25 bits below the largest exponent, that of a product being the sum of its factors'; then the
// sum is cut to float32.
float cut_sum(const float* a, size_t step_a, const float* b, size_t step_b, float c) {
  int top = c == 0 ? INT_MIN : std::ilogb(c);
  for (int k = 0; k < 16; k++) {
    const float x = a[k * step_a], y = b[k * step_b];
    if (!std::isfinite(x) || !std::isfinite(y) || !std::isfinite(c)) {
      for (k = 0; k < 16; k++) c += a[k * step_a] * b[k * step_b];
      return c;
    }
    if (x != 0 && y != 0) top = std::max(top, std::ilogb(x) + std::ilogb(y));
  }
  if (top == INT_MIN) return c;
  const auto cut = [&](double v) { return std::trunc(std::ldexp(v, 25 - top)); };
  double sum = cut(c);
  for (int k = 0; k < 16; k++) sum += cut(static_cast<double>(a[k * step_a]) * b[k * step_b]);
  sum = std::ldexp(sum, top - 25);
  const auto f = static_cast<float>(sum);
  return std::fabs(f) > std::fabs(sum) ? std::nextafter(f, 0.f) : f;
}

void run(Group& g, const Product& p) {
  alignas(64) float a[16 * 64], b[16 * 256];
  if (p.a.empty())
    p.a_at.load(a, p.e);
  else
    std::copy(p.a.begin(), p.a.end(), a);
  p.b_at.load(b, p.e);
  std::vector<float>& sums = g.sums[p.sums].v;
  if (!p.keep) std::fill(sums.begin(), sums.end(), 0.f);
  if (cut_sums) {
    for (float& x : a) x *= p.sign;
    for (int i = 0; i < 64 * p.n; i++) sums[i] = cut_sum(a + i / p.n, 64, b + i % p.n, p.n, sums[i]);
    return;
  }
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < 16; k++) {
      const float x = a[k * 64 + row] * p.sign;
      float* const to = &sums[size_t{static_cast<unsigned>(row)} * p.n];
      const float* const y = b + k * p.n;
      for (int j = 0; j < p.n; j++) to[j] += x * y[j];
    }
}

void run_until(Group& g, uint32_t group) {
  size_t left = 0;
  for (size_t i = 0; i < g.under_way.size(); i++) {
    if (g.under_way[i].group <= group)
      run(g, g.under_way[i]);
    else if (left++ != i)
      g.under_way[left - 1] = std::move(g.under_way[i]);
  }
  g.under_way.erase(g.under_way.begin() + static_cast<std::ptrdiff_t>(left), g.under_way.end());
}

void check_same(const Fiber* lanes, uint32_t site) {
  const Wgmma& first = of(lanes[0]);
  for (unsigned t = 0; t < kLanes; t++) {
    const Fiber& f = lanes[t];
    const Wgmma& w = of(f);
    if (f.site != site)
      fail("threads of a warpgroup have come to different wgmma: " + where(site) + " and " + where(f.site));
    if (w.b_at != first.b_at || w.keep != first.keep || (!w.a_in_registers && w.a_at != first.a_at))
      fail_at("wgmma with descriptors or a scale-d that differ within the warpgroup", site);
    if (f.products != lanes[0].products)
      fail_at("threads of a warpgroup have committed different groups of wgmma", site);
    if (!f.fences) fail_at("first wgmma without a wgmma.fence", site);
    uint32_t touched = 0;
    for (int i = 0; i < w.sums() + (w.a_in_registers ? 4 : 0); i++) touched = std::max(touched, w.touched[w.at[i]]);
    if (touched > f.fences)
      fail_at("wgmma with a register that was written, or read as a sum, after the last wgmma.fence", site);
  }
}

// The sums whose tokens all threads hold in order; kSums where these are values.
unsigned continued(const Group& g, const Fiber* lanes, const Wgmma& first, uint32_t site) {
  if (!is_token(first.d(0))) return kSums;
  const unsigned id = sums_of(first.d(0));
  const Sums& s = g.sums[id];
  bool whole = s.n == first.n;
  for (unsigned t = 0; t < kLanes && whole; t++)
    for (int i = 0; i < first.sums() && whole; i++) whole = of(lanes[t]).d(i) == token(id, s.version, i);
  if (whole) return id;
  if (first.keep || s.group > lanes[0].products_done)
    fail_at("sums under way are used by a wgmma of another shape or order", site);
  return kSums;
}

unsigned begun(Group& g, const Fiber* lanes, const Wgmma& first, uint32_t site) {
  const auto oldest =
      std::min_element(g.sums, g.sums + kSums, [](const Sums& a, const Sums& b) { return a.touched < b.touched; });
  Sums& s = *oldest;
  if (s.group > lanes[0].products_done) fail_at("more sums under way than the emulator has numbers for", site);
  s.n = first.n;
  s.v.assign(size_t{64} * static_cast<unsigned>(first.n), 0.f);
  for (unsigned t = 0; first.keep && t < kLanes; t++)
    for (int i = 0; i < first.sums(); i++) {
      const uint32_t v = of(lanes[t]).d(i);
      if (is_token(v)) fail_at("wgmma that adds to registers of which some are under way and some are not", site);
      s.v[place(t, i, first.n)] = as<float>(v);
    }
  return static_cast<unsigned>(oldest - g.sums);
}

// A from registers: each has two elements of a row.
std::vector<float> fragments(Fiber* lanes, Element e, uint32_t group) {
  std::vector<float> a(16 * 64);
  for (unsigned t = 0; t < kLanes; t++) {
    const Wgmma& w = of(lanes[t]);
    for (int q = 0; q < 4; q++) {
      const unsigned row = t / 32 * 16 + t % 32 / 4 + (q & 1) * 8, k = t % 4 * 2 + (q >> 1) * 8;
      const uint32_t a_q = w.a(q);
      for (unsigned h = 0; h < 2; h++) {
        const auto bits = static_cast<uint16_t>(a_q >> 16 * h);
        a[(k + h) * 64 + row] = e == Element::bf16 ? wide(bf16{bits}) : wide(f16{bits});
      }
      auto& reading = lanes[t].reading;
      const size_t number = w.at[w.sums() + q];
      if (reading.size() <= number) reading.resize(number + 1);
      reading[number] = {group, lanes[t].site};
    }
  }
  return a;
}

// What every thread of the warpgroup knows: each must itself have waited for what the product reads. A thread knows
// its own without having it in its vector, so a vector that one thread alone has says nothing about that thread.
const Known& least_known(Group& g, const Fiber* lanes) {
  bool same = g.knew.size() == kLanes;
  for (unsigned t = 0; t < kLanes && same; t++) same = g.knew[t] == lanes[t].clock.known();
  if (same) return g.least;
  g.knew.clear();
  for (unsigned t = 0; t < kLanes; t++) g.knew.push_back(lanes[t].clock.known());
  g.least.assign(agents.words(), ~0u);
  for (unsigned t = 0; t < kLanes; t++) {
    if (t && g.knew[t] == g.knew[t - 1]) continue;
    const Known& k = *g.knew[t];
    const bool alone = std::count(g.knew.begin(), g.knew.end(), g.knew[t]) == 1;
    const size_t own[] = {lanes[t].flat, agents.fence(Space::shared, lanes[t].flat),
                          agents.fence(Space::global, lanes[t].flat)};
    for (size_t i = 0; i < k.size(); i++)
      if (!alone || std::find(own, own + 3, i) == own + 3) g.least[i] = std::min(g.least[i], k[i]);
  }
  return g.least;
}

void start(Group& g, Fiber* lanes, uint32_t site) {
  const Wgmma& w = of(lanes[0]);
  check_same(lanes, site);
  const uint32_t group = lanes[0].products + 1;
  const unsigned held = continued(g, lanes, w, site), id = held < kSums ? held : begun(g, lanes, w, site);
  Sums& s = g.sums[id];
  s.version++, s.group = group, s.touched = ++g.turn, s.site = site;
  Product p{id,
            w.keep,
            group,
            w.e,
            {},
            Matrix(w.a_at, w.transpose_a, 64),
            Matrix(w.b_at, w.transpose_b, w.n),
            w.n,
            static_cast<float>(w.scale_a * w.scale_b)};
  Actor by{agents.wgmma + warpgroup(lanes[0]) * 4, group, nullptr, nullptr, true};
  if (checking) by.known = &least_known(g, lanes);
  if (w.a_in_registers)
    p.a = fragments(lanes, w.e, group);
  else
    p.a_at.check(by, site);
  p.b_at.check(by, site);
  for (unsigned t = 0; t < kLanes; t++)
    for (int i = 0; i < w.sums(); i++) of(lanes[t]).d(i) = token(id, s.version, i);
  counts.wgmma++, counts.mma_flops += 2ull * 64 * 16 * static_cast<unsigned>(w.n);
  if (late)
    g.under_way.push_back(std::move(p));
  else
    run(g, p);
}

}  // namespace

void wgmma_start() {
  groups.clear();
  groups.resize((block.threads + kLanes - 1) / kLanes);
}

void check_wgmma_done() {
  const Fiber& me = *current;
  if (me.products > me.products_done)
    fail("thread " + std::to_string(me.flat) + " ends without waiting for its wgmma, the last instruction at " +
         where(me.site));
}

void wgmma(const Wgmma& w, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  Fiber* me = current;
  const unsigned number = warpgroup(*me);
  if ((number + 1) * kLanes > block.threads) fail_at("wgmma by less than a whole warpgroup", site);
  me->op = Op::wgmma, me->args = const_cast<Wgmma*>(&w), me->site = site;
  Group& g = groups[number];
  if (++g.arrived < kLanes) {
    sleep_now();
    pause();
    return;
  }
  g.arrived = 0;
  start(g, &block.fibers[number * kLanes], site);
  for (unsigned t = 0; t < kLanes; t++) {
    Fiber& f = block.fibers[number * kLanes + t];
    f.op = Op::none;
    wake(f);
  }
}

void wgmma_fence(uint32_t site) {
  if (!plant(Plant::skip, site)) current->fences++;
}
void wgmma_commit(uint32_t site) {
  if (!plant(Plant::skip, site)) current->products++;
}

void wgmma_wait(int keep, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  Fiber& me = *current;
  me.site = site;
  keep += plant(Plant::wait_one_less, site);
  if (me.products <= static_cast<uint32_t>(keep)) return;
  const uint32_t upto = me.products - static_cast<uint32_t>(keep);
  if (upto <= me.products_done) return;
  me.products_done = upto;
  run_until(groups[warpgroup(me)], upto);
  const unsigned mine = strict.warpgroup ? me.warp % 4 : 0;
  if (checking) me.clock.learn(agents.wgmma + warpgroup(me) * 4 + mine, upto);
}

uint32_t wgmma_value(uint32_t t, uint32_t site) {
  const Fiber& me = *current;
  const Sums& s = groups[warpgroup(me)].sums[sums_of(t)];
  if (s.version % kVersions != version_of(t)) fail_at("read of a copy of sums that have since changed", site);
  if (s.group > me.products_done)
    fail("read of sums before wgmma.wait_group: of group " + std::to_string(s.group) + ", waited for " +
         std::to_string(me.products_done) + ", at " + where(site) + ", against wgmma at " + where(s.site));
  return as<uint32_t>(s.v[place(me.flat % kLanes, static_cast<int>(t & 127), s.n)]);
}

uint32_t read_sum(uint32_t& r, uint32_t& touched, uint32_t site) {
  touched = current->fences + 1;
  return settled(r, site);
}

void write_sum(uint32_t& r, uint32_t& touched, uint32_t v, uint32_t site) {
  if (is_token(r)) {
    const Fiber& me = *current;
    const Sums& s = groups[warpgroup(me)].sums[sums_of(r)];
    if (s.version % kVersions == version_of(r) && s.group > me.products_done)
      fail("write of a register whose wgmma is under way at " + where(site) + ", against wgmma at " + where(s.site));
  }
  touched = current->fences + 1;
  r = v;
}

void fragment_written(int number, uint32_t site) {
  const Fiber& me = *current;
  if (static_cast<size_t>(number) >= me.reading.size() || me.reading[number].first <= me.products_done) return;
  fail("write of a register that a wgmma under way reads at " + where(site) + ", against wgmma at " +
       where(me.reading[number].second));
}

}  // namespace emu

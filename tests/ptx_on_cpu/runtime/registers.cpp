// setmaxnreg: registers that warps give back to the block's pool and take from it. And elect.sync.
#include "block.h"

namespace emu {

namespace {

int pool;
std::vector<int> claims;  // of each warp: registers it waits for

void grant() {
  for (size_t w = 0; w < claims.size(); w++) {
    if (!claims[w] || claims[w] > pool) continue;
    pool -= claims[w], claims[w] = 0;
    block.warps[w].ready |= block.warps[w].alive;
  }
}

struct Change {
  int count;
};

void change(Fiber* lanes, uint32_t mask) {
  const Fiber& first = lanes[__builtin_ctz(mask)];
  const int count = static_cast<const Change*>(first.args)->count, need = (count - first.registers) * 32;
  for (unsigned i = 0; i < 32; i++) lanes[i].registers = count;
  claims[first.warp] = need > 0 ? need : 0;
  if (need < 0) pool -= need;
  grant();
}

struct Elected {
  bool me;
};

// Which lane hardware elects is not specified; it is always the same.
void choose(Fiber* lanes, uint32_t mask) {
  for (uint32_t left = mask; left; left &= left - 1)
    static_cast<Elected*>(lanes[__builtin_ctz(left)].args)->me = left == mask;
}

}  // namespace

void registers_start() {
  pool = 0;
  claims.assign(block.warps.size(), 0);
}

void check_registers() {
  for (size_t w = 0; w < block.warps.size(); w++)
    if (block.fibers[w * 32].registers != block.fibers[w / 4 * 128].registers)
      fail("warps " + std::to_string(w / 4 * 4) + " and " + std::to_string(w) +
           " of a warpgroup have not run the same setmaxnreg");
}

std::string describe_pool(unsigned warp) {
  return "setmaxnreg.inc (" + std::to_string(pool) + " registers free, " + std::to_string(claims[warp]) + " needed)";
}

void setmaxnreg(int count, bool more, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  if (count < 24 || count > 256 || count % 8)
    fail_at("setmaxnreg with a count that is no multiple of 8 in 24..256", site);
  Fiber* me = current;
  if (more ? count < me->registers : count > me->registers)
    fail(std::string("setmaxnreg.") + (more ? "inc to less" : "dec to more") + " than the " +
         std::to_string(me->registers) + " registers of the thread at " + where(site));
  Change c{count};
  collective(Op::setmaxnreg, &c, change, ~0u, site, true);
  while (claims[me->warp]) {
    me->op = Op::registers, me->site = site;
    sleep_now();
    pause();
  }
}

bool elect(uint32_t mask, uint32_t site) {
  Elected e{false};
  collective(Op::elect, &e, choose, mask, site, false);
  return e.me;
}

}  // namespace emu

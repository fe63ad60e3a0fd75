#include "clock.h"

namespace emu {

Agents agents;

namespace {

// The last few results: the lanes of a warp, and the warps of a warpgroup, ask for the same.
struct Joined {
  Shared mine, other, result;
  unsigned agent;
  uint32_t when;
};
constexpr size_t kRemembered = 16;
std::vector<Joined> joined;
size_t next_joined;

template <class F>
Shared remembered(const Shared& mine, const Shared& other, unsigned agent, uint32_t when, F make) {
  for (const Joined& j : joined)
    if (j.mine == mine && j.other == other && j.agent == agent && j.when == when) return j.result;
  Shared result = make();
  if (*result == *mine) result = mine;
  if (joined.size() < kRemembered) joined.resize(kRemembered);
  joined[next_joined++ % kRemembered] = {mine, other, result, agent, when};
  return result;
}

}  // namespace

void forget_joins() { joined.clear(); }

Shared join_known(const Shared& mine, const Shared& other) {
  if (mine == other || !other) return mine;
  return remembered(mine, other, 0, 0, [&] {
    auto sum = std::make_shared<Known>(*mine);
    for (size_t i = 0; i < sum->size(); i++) (*sum)[i] = std::max((*sum)[i], (*other)[i]);
    return Shared(std::move(sum));
  });
}

Shared with_known(const Shared& mine, unsigned agent, uint32_t when) {
  if ((*mine)[agent] >= when) return mine;
  return remembered(mine, nullptr, agent, when, [&] {
    auto sum = std::make_shared<Known>(*mine);
    (*sum)[agent] = when;
    return Shared(std::move(sum));
  });
}

void Clock::fence_for_all() {
  known_ = remembered(known_, nullptr, ~0u, 0, [this] {
    auto sum = std::make_shared<Known>(*known_);
    for (const Space space : {Space::shared, Space::global})
      for (unsigned t = 0; t < agents.threads; t++)
        (*sum)[agents.fence(space, t)] = std::max((*sum)[agents.fence(space, t)], (*sum)[t]);
    return Shared(std::move(sum));
  });
  fence(true, true);
}

Shared Clock::snapshot() const {
  auto all = std::make_shared<Known>(*known_);
  (*all)[agent_] = own_;
  if (agents.proxies)
    for (const Space space : {Space::shared, Space::global})
      (*all)[agents.fence(space, agent_)] = fenced_[static_cast<int>(space)];
  return all;
}

}  // namespace emu

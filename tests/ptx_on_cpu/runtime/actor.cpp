// Who touches memory: what an agent knows, and its name in findings.
#include "block.h"

namespace emu {

Strict strict;
bool cut_sums;
bool late = true;

bool Actor::knows(unsigned other, uint32_t when) const {
  const auto one = [&](unsigned a) { return thread ? thread->knows(a, when) : a == agent || (*known)[a] >= when; };
  if (!agents.is_wgmma(other)) return one(other);
  const unsigned first = other - (other - agents.wgmma) % 4;
  if (agent == first || !strict.warpgroup) return one(first);
  return one(first) && one(first + 1) && one(first + 2) && one(first + 3);
}

bool Actor::fenced(Space space, unsigned other, uint32_t when) const {
  return thread ? thread->fenced(space, other, when) : (*known)[agents.fence(space, other)] >= when;
}

std::string agent_name(unsigned agent) {
  if (agents.is_thread(agent)) return "thread " + std::to_string(agent);
  if (agent >= agents.arrival)
    return "a copy for the mbarrier at byte " + std::to_string(mbarrier_offset(agent - agents.arrival));
  if (agent >= agents.wgmma) return "wgmma of warpgroup " + std::to_string((agent - agents.wgmma) / 4);
  return "a bulk copy of thread " + std::to_string((agent - agents.source) % agents.threads);
}

}  // namespace emu

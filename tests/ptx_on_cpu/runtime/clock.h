// Vector clocks: what each agent of a block knows of what the others have done.
//
// An agent is a thread, or hardware that works on its own (a tensor core, a copy engine) and takes a number beyond the
// threads'. Its accesses carry its own clock; one that another agent knows of happened before what that agent does
// next. Two accesses that neither knows of the other are unordered, whatever order this run took: a race.
//
// Hardware on its own reaches memory by another way than threads do, the async proxy. What a thread did before its
// proxy fence is fenced; that knowledge travels with the rest.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emu {

// For each agent when its last known access was; then for each thread when its last known fence was, of shared memory
// and of global memory.
using Known = std::vector<uint32_t>;
using Shared = std::shared_ptr<const Known>;
enum class Space : uint8_t { shared, global };

// The agents of a block by number. Kernels without bulk copies, mbarriers and wgmma have threads alone.
struct Agents {
  unsigned threads = 0;
  unsigned source = 0;   // + thread: reads shared memory for the bulk copies that the thread asked for,
  unsigned target = 0;   // + thread: and writes global memory for them
  unsigned wgmma = 0;    // + warp: its quarter of the products of a warpgroup
  unsigned arrival = 0;  // + mbarrier: the copies that it counts
  unsigned all = 0;
  bool proxies = false;  // whether fences are known

  size_t words() const { return all + (proxies ? 2 * threads : 0); }
  size_t fence(Space space, unsigned thread) const { return all + (space == Space::global ? threads : 0) + thread; }
  bool is_thread(unsigned agent) const { return agent < threads; }
  bool is_wgmma(unsigned agent) const { return proxies && agent >= wgmma && agent < arrival; }
};
extern Agents agents;

// Results of joins, which the threads of a warp ask for one after the other: those who knew the same still share it.
Shared join_known(const Shared& mine, const Shared& other);
Shared with_known(const Shared& mine, unsigned agent, uint32_t when);
void forget_joins();

class Clock {
 public:
  void start(unsigned agent, Shared nothing) {
    agent_ = agent, own_ = 1, fenced_[0] = fenced_[1] = 0, known_ = std::move(nothing);
  }
  unsigned agent() const { return agent_; }
  uint32_t now() const { return own_; }
  const Shared& known() const { return known_; }
  bool knows(unsigned agent, uint32_t when) const { return agent == agent_ || (*known_)[agent] >= when; }
  bool fenced(Space space, unsigned agent, uint32_t when) const {
    if (agent == agent_) return fenced_[static_cast<int>(space)] >= when;
    return (*known_)[agents.fence(space, agent)] >= when;
  }
  void fence(bool shared, bool global) {
    if (shared) fenced_[0] = own_;
    if (global) fenced_[1] = own_;
    own_++;
  }
  // Takes all that is known as fenced, whoever did it.
  void fence_for_all();
  void join(const Shared& other) { known_ = join_known(known_, other); }
  void learn(unsigned agent, uint32_t when) { known_ = with_known(known_, agent, when); }
  // All that is known, the thread's own included.
  Shared snapshot() const;

 private:
  friend class Meeting;
  unsigned agent_ = 0;
  uint32_t own_ = 0, fenced_[2] = {0, 0};
  Shared known_;  // shared by all who left one meeting: a barrier costs O(threads), not O(threads²)
};

// A point that orders: all that those who arrived knew and did is known to those who leave.
class Meeting {
 public:
  void arrive(const Clock& c) {
    if (!sum_) sum_ = std::make_shared<Known>(*c.known_);
    if (std::find(merged_.begin(), merged_.end(), c.known_) == merged_.end()) {
      for (size_t i = 0; i < sum_->size(); i++) (*sum_)[i] = std::max((*sum_)[i], (*c.known_)[i]);
      merged_.push_back(c.known_);
    }
    note(c.agent_, c.own_);
    if (!agents.proxies) return;
    for (const Space space : {Space::shared, Space::global})
      note(agents.fence(space, c.agent_), c.fenced_[static_cast<int>(space)]);
  }
  void note(size_t agent, uint32_t when) {
    if (!sum_) sum_ = std::make_shared<Known>(agents.words(), 0);
    (*sum_)[agent] = std::max((*sum_)[agent], when);
  }
  // The sum must not change once the first has left.
  void leave(Clock& c) const {
    c.known_ = sum_;
    c.own_++;
  }
  // One who goes on without waiting: what it does next is not part of the meeting.
  static void pass(Clock& c) { c.own_++; }
  // What is known so far, for those who come while others arrive again.
  Shared so_far() {
    merged_.clear();
    return std::make_shared<const Known>(*sum_);
  }
  void clear() {
    sum_.reset();
    merged_.clear();
  }

 private:
  std::shared_ptr<Known> sum_;
  std::vector<Shared> merged_;
};

}  // namespace emu

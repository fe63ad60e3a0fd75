// Vector clocks: what each agent of a block knows of what the others have done.
//
// An agent is a thread, or hardware that works on its own (a tensor core, a copy engine) and takes a number beyond the
// threads'. Its accesses carry its own clock; one that another agent knows of happened before what that agent does
// next. Two accesses that neither knows of the other are unordered, whatever order this run took: a race.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace emu {

using Known = std::vector<uint32_t>;

class Clock {
 public:
  void start(unsigned agent, std::shared_ptr<const Known> nothing) {
    agent_ = agent, own_ = 1, known_ = std::move(nothing);
  }
  uint32_t now() const { return own_; }
  bool knows(unsigned agent, uint32_t when) const { return agent == agent_ || (*known_)[agent] >= when; }

 private:
  friend class Meeting;
  unsigned agent_ = 0;
  uint32_t own_ = 0;
  std::shared_ptr<const Known>
      known_;  // shared by all who left one meeting: a barrier costs O(threads), not O(threads²)
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
    (*sum_)[c.agent_] = std::max((*sum_)[c.agent_], c.own_);
  }
  // The sum must not change once the first has left.
  void leave(Clock& c) const {
    c.known_ = sum_;
    c.own_++;
  }
  // One who goes on without waiting: what it does next is not part of the meeting.
  static void pass(Clock& c) { c.own_++; }
  void clear() {
    sum_.reset();
    merged_.clear();
  }

 private:
  std::shared_ptr<Known> sum_;
  std::vector<std::shared_ptr<const Known>> merged_;
};

}  // namespace emu

// Scratch memory, work of unequal shares on all threads, and work of equal ones by threads of unequal speed.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "torch/binding.h"
#include "torch/traffic.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mk {

// Below so many multiply-adds one thread is done before a second has woken up.
constexpr double serial_work = 2e5;

class Memory {
 public:
  ~Memory() { std::free(data_); }
  size_t size() const { return size_; }

  char* at_least(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    const size_t alignment = bytes >= 2 * huge_page ? huge_page : 64;
    size_ = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<char*>(std::aligned_alloc(alignment, size_));
    if (!data_) {
      size_ = 0;
      throw std::bad_alloc();
    }
#if defined(__linux__)
    if (alignment == huge_page) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    return data_;
  }

 private:
  static constexpr size_t huge_page = size_t{2} << 20;
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Runs f(i) for all i < count on one task a thread; each takes the next i.
template <class F>
void share_out(int64_t count, double work, const F& f) {
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
  const int64_t tasks = std::min<int64_t>(count, threads());
  if (tasks <= 1 || stays(work < serial_work))
    take(0, 1);
  else
    fork_join(tasks, 1, take);
}

// What is left of one thread's share, a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;

  // The next piece is [*begin, *stop), a quarter of what is left but at least `grain`; false where nothing is.
  bool take(int64_t grain, int64_t* begin, int64_t* stop) {
    *begin = next.load(std::memory_order_relaxed);
    do {
      if (*begin >= end) return false;
      *stop = std::min(end, *begin + std::max(grain, (end - *begin) / 4));
    } while (!next.compare_exchange_weak(*begin, *stop, std::memory_order_relaxed));
    return true;
  }
};

// [starts[p], starts[p + 1]) for each p.
inline std::vector<Share> shares_of(const std::vector<int64_t>& starts) {
  std::vector<Share> shares(starts.size() - 1);
  for (size_t p = 0; p < shares.size(); p++) shares[p].next = starts[p], shares[p].end = starts[p + 1];
  return shares;
}

// f(share) on a thread for each: of its own share, and then, to help, of the others'.
template <class F>
void with_help(std::vector<Share>& shares, const F& f) {
  const int64_t count = static_cast<int64_t>(shares.size());
  fork_join(count, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < count; i++) f(shares[(first + i) % count]);
  });
}

// Runs f(i) for all i of the parts [starts[p], starts[p + 1]), of which there are as many as threads at most: in a part
// neighbours share what a thread keeps.
template <class F>
void share_out_parts(const std::vector<int64_t>& starts, double work, const F& f) {
  std::vector<Share> shares = shares_of(starts);
  const auto run = [&](Share& share) {
    for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) f(i);
  };
  if (shares.size() <= 1 || stays(work < serial_work))
    for (Share& share : shares) run(share);
  else
    with_help(shares, run);
}

// Where each thread's part of `count` items starts, and where the last ends: parts of equal cost.
template <class Cost>
std::vector<int64_t> even_parts(int64_t count, const Cost& cost) {
  const int64_t wanted = std::min(count, threads());
  double all = 0, before = 0;
  for (int64_t i = 0; i < count; i++) all += cost(i);
  std::vector<int64_t> starts{0};
  for (int64_t i = 0; i < count && static_cast<int64_t>(starts.size()) < wanted; before += cost(i++))
    if (before * wanted >= all * starts.size()) starts.push_back(i);
  starts.push_back(count);
  return starts;
}

// f(begin, end, after) for pieces of [0, count), each of at least `grain` but the last of a share, of which `after`
// more come next. Cores get unequal parts of what memory gives, by a tenth and more: each thread works through a share
// of its own, which its cache may know from the op before, and then helps. Stores of f past the caches end here.
template <class F>
void in_pieces(int64_t count, int64_t grain, const F& f) {
  const int64_t tasks = std::min(threads(), (count + grain - 1) / grain);
  if (tasks <= 1 || count < 2 * tasks * grain) {  // over before one could help
    in_parallel(count, grain, [&](int64_t begin, int64_t end) {
      f(begin, end, 0);
      stream_fence();
    });
    return;
  }
  std::vector<int64_t> starts;
  for (int64_t i = 0; i <= tasks; i++) starts.push_back(i * count / tasks);
  std::vector<Share> shares = shares_of(starts);
  with_help(shares, [&](Share& share) {
    for (int64_t begin, end; share.take(grain, &begin, &end);) f(begin, end, share.end - end);
    stream_fence();
  });
}

// f(begin, end) for pieces of [0, count), each of at least `grain`; longer ones where there are many, for an f that
// takes some time to begin.
template <class F>
void in_long_pieces(int64_t count, int64_t grain, const F& f) {
  constexpr int64_t longer = 4;
  if (count < 2 * longer * grain * threads()) return in_parallel(count, grain, f);
  in_pieces(count, longer * grain, [&](int64_t begin, int64_t end, int64_t) { f(begin, end); });
}

}  // namespace mk

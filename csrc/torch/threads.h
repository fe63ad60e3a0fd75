// Tasks on all of torch's threads. They are OpenMP's, and ThreadSanitizer does not know what orders these: in its build
// each call starts threads of its own, however little there is to do and whatever torch's number of threads is.
#pragma once
#include <algorithm>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#else
#include <torch/csrc/stable/ops.h>
#endif

namespace mk {

#if defined(__SANITIZE_THREAD__)

inline int64_t threads() { return 3; }

template <class F>
void fork_join(int64_t count, int64_t, const F& f) {
  std::vector<std::thread> running;
  const int64_t share = (count + threads() - 1) / threads();
  for (int64_t begin = 0; begin < count; begin += share)
    running.emplace_back([&f, begin, end = std::min(begin + share, count)] { f(begin, end); });
  for (std::thread& t : running) t.join();
}

// Whether to stay on the calling thread.
inline bool stays(bool) { return false; }

#else

inline int64_t threads() { return torch::stable::get_num_threads(); }

// f(begin, end) over [0, count), each call at least `grain` of it.
template <class F>
void fork_join(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, f);
}

// Whether to stay on the calling thread, where the work is `small`.
inline bool stays(bool small) { return small; }

#endif

}  // namespace mk

#include "torch/outputs.h"

#include <cstdlib>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mk {
namespace {

constexpr int64_t huge_page = int64_t{2} << 20;

struct Block {
  void* data;
  int64_t size;
};

// Free blocks of all threads, the last given back at the end.
class Pool {
 public:
  void set_limit(int64_t limit) {
    const std::lock_guard<std::mutex> guard(lock_);
    limit_ = limit;
    shrink();
  }

  int64_t held() {
    const std::lock_guard<std::mutex> guard(lock_);
    return held_;
  }

  // The smallest free block of at most an eighth more than `bytes`, else a new one; null where the pool is off.
  Block take(int64_t bytes) {
    const int64_t size = (bytes + huge_page - 1) / huge_page * huge_page;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      if (size > limit_) return {nullptr, 0};
      size_t best = free_.size();
      for (size_t i = free_.size(); i-- > 0;)
        if (free_[i].size >= size && free_[i].size <= size + size / 8 &&
            (best == free_.size() || free_[i].size < free_[best].size))
          best = i;
      if (best < free_.size()) {
        const Block found = free_[best];
        free_.erase(free_.begin() + static_cast<int64_t>(best));
        held_ -= found.size;
        return found;
      }
    }
    void* data = std::aligned_alloc(huge_page, static_cast<size_t>(size));
    if (data) advise_huge(data, size);
    return {data, size};
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(block);
    held_ += block.size;
    shrink();
  }

  std::mutex& lock() { return lock_; }

 private:
  // Frees those that lay unused longest.
  void shrink() {
    size_t out = 0;
    for (; held_ > limit_; out++) {
      held_ -= free_[out].size;
      std::free(free_[out].data);
    }
    free_.erase(free_.begin(), free_.begin() + static_cast<int64_t>(out));
  }

  std::mutex lock_;
  std::vector<Block> free_;
  int64_t limit_ = pool_limit, held_ = 0;
};

// Never destroyed: tensors may outlive the statics of this library. A fork waits for the lock, so that the child does
// not inherit it locked.
Pool& pool() {
  static Pool& all = *[] {
    auto* made = new Pool;
#if defined(__linux__)
    pthread_atfork([] { pool().lock().lock(); }, [] { pool().lock().unlock(); }, [] { pool().lock().unlock(); });
#endif
    return made;
  }();
  return all;
}

}  // namespace

void advise_huge(void* data, int64_t bytes) {
#if defined(__linux__)
  // The whole pages around it: the allocator's own header before the data is no reason to lose the first 2 MB.
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t start = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void* pool_take(int64_t bytes, int64_t* size) {
  const Block block = pool().take(bytes);
  *size = block.size;
  return block.data;
}

void pool_give(void* block, int64_t size) { pool().give({block, size}); }

}  // namespace mk

// For Python, by ctypes.
extern "C" __attribute__((visibility("default"))) void mistral_kernels_set_output_pool(int64_t limit) {
  mk::pool().set_limit(limit);
}

extern "C" __attribute__((visibility("default"))) int64_t mistral_kernels_output_pool_held() {
  return mk::pool().held();
}

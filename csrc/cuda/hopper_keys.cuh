// In which blocks keys are visited: those in the ring by slot, whatever the order of their positions, then those of the
// chunk. So a block is always one box, also where the ring wraps.
#pragma once
#include <cstdint>

namespace mk::cuda {

// Rows of a source from `first` on.
struct KeyBlock {
  int first, limit;  // limit: rows of the source that hold keys
  int shift, wrap;   // row + shift is the index of the key; where that is negative, `wrap` more
  bool ring;

  __device__ __forceinline__ int key(int row) const {
    const int key = row + shift;
    return key < 0 ? key + wrap : key;
  }
  // Whether `count` rows hold keys one after the other.
  __device__ __forceinline__ bool whole(int count) const {
    return first + count <= limit && (first + shift >= 0 || first + count - 1 + shift < 0);
  }
};

template <int rows>
struct KeyPlan {
  int kept, oldest, slots, keys;
  int ring_first, ring_count, wrapped, chunk_first, chunk_count;  // in blocks

  __device__ __forceinline__ KeyPlan() {}
  // Of the keys [begin, end), of which the first `kept` are in the ring.
  __device__ __forceinline__ KeyPlan(int begin, int end, int kept_, int oldest_, int slots_, int keys_)
      : kept(kept_), oldest(oldest_), slots(slots_), keys(keys_) {
    ring_first = ring_count = wrapped = chunk_first = chunk_count = 0;
    const int ring_end = min(end, kept), chunk_begin = max(begin, kept);
    if (begin < ring_end) {
      const bool all_wrapped = oldest + begin >= slots;
      const int from = oldest + begin - (all_wrapped ? slots : 0), to = oldest + ring_end - (all_wrapped ? slots : 0);
      ring_first = from / rows;
      ring_count = blocks_to(min(to, slots)) - ring_first;
      // The block with the oldest key may hold the newest too: it is visited once.
      wrapped = min(blocks_to(max(to - slots, 0)), ring_first);
    }
    if (chunk_begin < end) {
      chunk_first = (chunk_begin - kept) / rows;
      chunk_count = blocks_to(end - kept) - chunk_first;
    }
  }

  __device__ __forceinline__ int blocks() const { return ring_count + wrapped + chunk_count; }
  __device__ __forceinline__ KeyBlock block(int i) const {
    if (i < ring_count) return {(ring_first + i) * rows, kept, -oldest, slots, true};
    i -= ring_count;
    if (i < wrapped) return {i * rows, kept, -oldest, slots, true};
    return {(chunk_first + i - wrapped) * rows, keys - kept, kept, 0, false};
  }

 private:
  static __device__ __forceinline__ int blocks_to(int row) { return (row + rows - 1) / rows; }
};

}  // namespace mk::cuda

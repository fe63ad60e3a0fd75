// Memory of large outputs.
//
// Fresh memory costs more than most ops on it: a page fault takes about 1 us for 4 KB, and glibc gives blocks over
// 32 MB back to the kernel each time. Large outputs are blocks that are kept and used again, up to a limit. torch's
// stable ABI has tensors on foreign memory only with storages that cannot be resized: who needs to turns the pool off,
// and outputs are torch's own memory, as those beyond the limit are. For either pages of 2 MB are asked for.
#pragma once
#include <cstdint>

namespace mk {

constexpr int64_t large_output = int64_t{2} << 20;  // from which on fresh pages take longer than a call
constexpr int64_t pool_limit = int64_t{512} << 20;  // until another is set

// Asks for huge pages.
void advise_huge(void* data, int64_t bytes);

// A block of at least `bytes` to be given back by `pool_give(block, *size)`; null where the pool is off or has no
// memory.
void* pool_take(int64_t bytes, int64_t* size);
void pool_give(void* block, int64_t size);

}  // namespace mk

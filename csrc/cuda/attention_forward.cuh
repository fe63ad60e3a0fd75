// The forward kernels for 16-bit inputs, and the sum over splits. A block of four warps takes a tile of queries and
// walks over the keys that any of them sees, in blocks of key_rows; keys and values have two buffers each, so that a
// copy is under way during every product.
//
// A row of the tile is a query and a head. With `packed_heads` these are the heads that share a key head, so that a
// tile reads each key once for all of them. Where 16 rows hold all queries, the warps share these and split the keys of
// each block (kDecode).
#pragma once
#include "cuda/attention_tile.cuh"

namespace mk::cuda {

// The block of keys is smaller where the sums of a tile fill the registers.
template <int D, bool kDecode>
struct ForwardTile {
  static constexpr int rows = kDecode ? 16 : 64;
  static constexpr int key_rows = D == 256 && !kDecode ? 32 : 64;
  static constexpr int warp_keys = kDecode ? key_rows / 4 : key_rows;
  static constexpr int bytes = (rows + 4 * key_rows) * D * 2;
};

// What a block works on.
template <class T>
struct ForwardWork {
  Span queries, chunk;                   // of the whole tensors, and the keys behind the ring
  int kept, oldest;                      // keys in the ring, and the slot of the first
  int keys, sequence, split, first_row;  // first_row: of the tile
  int packed_heads, head, kv_head;
  bool packed;
  Visible visible;

  __device__ __forceinline__ ForwardWork(const Attention& a, int rows, int packed_heads_)
      : packed_heads(packed_heads_), packed(a.cu_q != nullptr) {
    const int tiles = (a.max_q * packed_heads + rows - 1) / rows;
    int index = blockIdx.x;
    // The last queries see most keys: their tiles come first, so that no long one starts when the others are done.
    first_row = (tiles - 1 - index % tiles) * rows;
    index /= tiles;
    split = index % a.splits;
    sequence = index / a.splits;
    head = blockIdx.y * packed_heads;
    kv_head = head / (a.heads / a.kv_heads);
    queries = span_of(a.cu_q, sequence, a.max_q);
    kept = oldest = 0;
    if (a.ring_lens) {
      const int seen = max(a.ring_lens[sequence], 0);
      kept = min(seen, a.slots);
      oldest = seen > a.slots ? seen % a.slots : 0;
      chunk = a.k.data ? queries : Span{0, 0};
    } else {
      chunk = span_of(a.cu_k, sequence, a.max_k);
    }
    keys = kept + chunk.count;
    visible = {keys, a.window, a.causal};
  }

  __device__ __forceinline__ int rows() const { return queries.count * packed_heads; }
  __device__ __forceinline__ int position(int row) const { return row / packed_heads + keys - queries.count; }
  __device__ __forceinline__ int head_of(int row) const { return head + row % packed_heads; }
};

// Keys or values: the ring in order of position, then the chunk.
template <class T>
struct ForwardKeys {
  Rows<T> ring, chunk;
  int kept, oldest, slots, keys;

  __device__ __forceinline__ ForwardKeys(const AttentionTokens& in_ring, const AttentionTokens& behind,
                                         const ForwardWork<T>& w, const Attention& a)
      : ring(in_ring, w.sequence, false, 0, w.kv_head),
        chunk(behind, w.sequence, a.cu_k != nullptr, w.chunk.first, w.kv_head),
        kept(w.kept),
        oldest(w.oldest),
        slots(a.slots),
        keys(w.keys) {}

  __device__ __forceinline__ const T* at(int j) const {
    if (j >= keys) return nullptr;
    if (j >= kept) return chunk.at(j - kept);
    const int slot = oldest + j;
    return ring.at(slot < slots ? slot : slot - slots);
  }
};

// Rows g and g + 8 of a warp's 16: largest score, sum of exponentials, and their products with the values.
template <int D>
struct Running {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[D / 8][4] = {};

  // Scores of the next keys; they become their exponentials.
  template <int n>
  __device__ __forceinline__ void add(float (&s)[n][4], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = largest[r];
#pragma unroll
      for (int i = 0; i < n; i++) top = fmaxf(top, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float base = top == -INFINITY ? 0.0f : top, shrink = exponential(largest[r], base, scale);
      largest[r] = top;
      float parts_of_sum[2] = {};  // short chains of additions round less, and wait less
#pragma unroll
      for (int i = 0; i < D / 8; i++) out[i][2 * r] *= shrink, out[i][2 * r + 1] *= shrink;
#pragma unroll
      for (int i = 0; i < n; i++)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; e++) {
          s[i][e] = exponential(s[i][e], base, scale);
          parts_of_sum[e % 2] += s[i][e];
        }
      sum[r] = sum[r] * shrink + (parts_of_sum[0] + parts_of_sum[1]);
    }
  }

  // Each lane has summed its own columns.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
  }
};

// Hides the scores not seen of 16 rows and 8 n keys from `key`.
template <class T, int n>
__device__ __forceinline__ void mask_scores(float (&s)[n][4], const ForwardWork<T>& w, bool negative, int key,
                                            int first_position, int last_position, const int (&position)[2]) {
  const bool all_seen = w.visible.begin(last_position) <= key && key + 8 * n <= w.visible.end(first_position);
  const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const bool seen = all_seen || w.visible.sees(position[e / 2], column + 8 * i + e % 2);
      s[i][e] = !seen ? -INFINITY : negative ? -s[i][e] : s[i][e];
    }
}

// Writes 16 rows of the tile from `row` on: out and lse, or this split's share of them.
template <class T, int D>
__device__ __forceinline__ void store_rows(const Attention& a, const ForwardWork<T>& w, const Running<D>& run,
                                           Tile<T, D> stage, int row) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t first_token = w.packed ? w.queries.first : static_cast<int64_t>(w.sequence) * a.max_q;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int of_tile = row + g + 8 * r, of_sequence = w.first_row + of_tile;
    const float inverse = run.sum[r] > 0 ? 1.0f / run.sum[r] : 0.0f;
    const float lse = run.sum[r] > 0 ? run.largest[r] * fabsf(a.scale) + logf(run.sum[r]) : -INFINITY;
    const bool live = of_sequence < w.rows();
    const int query = of_sequence / w.packed_heads, head = w.head_of(of_sequence);
    const int64_t out_row = (first_token + query) * a.heads + head;
    if (a.splits > 1) {
      const int64_t at = w.split * a.tokens * a.heads + out_row;
      if (live && t == 0) a.split_lse[at] = lse;
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        if (live && 8 * i < a.dim)
          *reinterpret_cast<float2*>(a.split_out + at * a.dim + 8 * i + 2 * t) =
              make_float2(run.out[i][2 * r] * inverse, run.out[i][2 * r + 1] * inverse);
      continue;
    }
    if (live && t == 0 && a.lse) {
      const int token = w.packed ? w.queries.first + query : query;
      a.lse[lse_at(w.packed, a.tokens, a.heads, w.sequence, a.max_q, head, token)] = lse;
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++)
      *reinterpret_cast<uint32_t*>(stage.at(of_tile, i) + 4 * t) =
          pack_pair<T>(run.out[i][2 * r] * inverse, run.out[i][2 * r + 1] * inverse);
  }
  if (a.splits > 1) return;
  __syncwarp();
  for (int index = lane; index < 16 * (D / 8); index += 32) {
    const int of_tile = row + index / (D / 8), chunk = index % (D / 8), of_sequence = w.first_row + of_tile;
    if (of_sequence >= w.rows() || 8 * chunk >= a.dim) continue;
    const int64_t out_row = (first_token + of_sequence / w.packed_heads) * a.heads + w.head_of(of_sequence);
    *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + out_row * a.dim + 8 * chunk) =
        *reinterpret_cast<const uint4*>(stage.at(of_tile, chunk));
  }
}

// Adds up what the four warps found of the same 16 rows, into the first warp's registers.
template <int D>
__device__ __forceinline__ void join_warps(Running<D>& run, float scale, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int values = D / 2 + 4;  // of a lane, one warp's after the other: lanes next to each other
  if (warp) {
    float* mine = shared + (warp - 1) * values * 32 + lane;
#pragma unroll
    for (int r = 0; r < 2; r++) mine[r * 32] = run.largest[r], mine[(2 + r) * 32] = run.sum[r];
#pragma unroll
    for (int i = 0; i < D / 2; i++) mine[(4 + i) * 32] = run.out[i / 4][i % 4];
  }
  __syncthreads();
  if (warp) return;
#pragma unroll
  for (int other = 0; other < 3; other++) {
    const float* theirs = shared + other * values * 32 + lane;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float top = fmaxf(run.largest[r], theirs[r * 32]), base = top == -INFINITY ? 0.0f : top;
      const float mine = exponential(run.largest[r], base, scale);
      const float other_share = exponential(theirs[r * 32], base, scale);
      run.largest[r] = top;
      run.sum[r] = run.sum[r] * mine + theirs[(2 + r) * 32] * other_share;
#pragma unroll
      for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; e++)
          run.out[i][e] = run.out[i][e] * mine + theirs[(4 + 4 * i + e) * 32] * other_share;
    }
  }
}

template <class T, int D, bool kDecode>
__global__ void __launch_bounds__(attention_threads) attention_kernel(const Attention a, const int packed_heads) {
  using Sizes = ForwardTile<D, kDecode>;
  constexpr int rows = Sizes::rows, key_rows = Sizes::key_rows, n = Sizes::warp_keys / 8;
  constexpr int tile_bytes = key_rows * D * 2;
  extern __shared__ __align__(128) char shared[];
  const ForwardWork<T> w(a, rows, packed_heads);
  if (w.first_row >= w.rows()) return;
  const Tile<T, D> queries{shared};
  char *key_buffers = shared + rows * D * 2, *value_buffers = key_buffers + 2 * tile_bytes;
  const auto key_tile = [&](int block) { return Tile<T, D>{key_buffers + (block & 1) * tile_bytes}; };
  const auto value_tile = [&](int block) { return Tile<T, D>{value_buffers + (block & 1) * tile_bytes}; };
  const ForwardKeys<T> keys(a.k_ring, a.k, w, a), values(a.v_ring, a.v, w, a);
  const int last_row = min(w.first_row + rows, w.rows()) - 1;
  int begin = max(w.visible.begin(w.position(w.first_row)), 0) / key_rows;
  int end = max((w.visible.end(w.position(last_row)) + key_rows - 1) / key_rows, begin);
  if (a.splits > 1) {
    const int share = (end - begin + a.splits - 1) / a.splits;
    begin = min(begin + w.split * share, end);
    end = min(begin + share, end);
  }
  const auto load_block = [&](Tile<T, D> to, const ForwardKeys<T>& from, int block) {
    if (block < end)
      load_tile<T, D, key_rows>(to, a.dim, a.q.data, [&](int row) { return from.at(block * key_rows + row); });
    commit_copies();
  };
  load_tile<T, D, rows>(queries, a.dim, a.q.data, [&](int row) -> const T* {
    const int of_sequence = w.first_row + row;
    if (of_sequence >= w.rows()) return nullptr;
    return Rows<T>(a.q, w.sequence, w.packed, w.queries.first, w.head_of(of_sequence)).at(of_sequence / packed_heads);
  });
  load_block(key_tile(begin), keys, begin);
  load_block(value_tile(begin), values, begin);
  const int warp = threadIdx.x / 32, row = kDecode ? 0 : warp * 16, key_offset = kDecode ? warp * (key_rows / 4) : 0;
  const int own_row = w.first_row + row + threadIdx.x % 32 / 4;
  const int position[2] = {w.position(own_row), w.position(own_row + 8)};
  const int first_position = w.position(w.first_row + row), last_position = w.position(w.first_row + row + 15);
  const float scale = exponent_scale(a.scale);
  Running<D> run;
  for (int block = begin; block < end; block++) {
    wait_copies<1>();
    __syncthreads();  // the keys are there, and the block before is done with: its buffers take the next
    load_block(key_tile(block + 1), keys, block + 1);
    float s[n][4];
    product_of_rows<T, D, n>(s, queries, row, key_tile(block), key_offset);
    mask_scores<T, n>(s, w, a.scale < 0, block * key_rows + key_offset, first_position, last_position, position);
    run.add(s, scale);
    wait_copies<1>();
    __syncthreads();  // the values are there
    load_block(value_tile(block + 1), values, block + 1);
    add_product<T, D, n>(run.out, s, value_tile(block), key_offset);
  }
  wait_copies<0>();
  __syncthreads();  // all buffers are done with, the queries too where there was no key
  run.finish();
  if constexpr (kDecode) {
    join_warps(run, scale, reinterpret_cast<float*>(key_buffers));
    if (warp) return;
  }
  store_rows<T, D>(a, w, run, queries, row);
}

template <class T, int D, bool kDecode>
int run_forward(const Attention& a, int packed_heads, cudaStream_t stream) {
  constexpr int rows = ForwardTile<D, kDecode>::rows, bytes = ForwardTile<D, kDecode>::bytes;
  const auto kernel = attention_kernel<T, D, kDecode>;
  if (const int status = allow_shared(kernel, bytes)) return status;
  const int64_t tiles = (static_cast<int64_t>(a.max_q) * packed_heads + rows - 1) / rows;
  const dim3 grid(tiles * a.splits * a.sequences, a.heads / packed_heads);
  kernel<<<grid, attention_threads, bytes, stream>>>(a, packed_heads);
  return cudaGetLastError();
}

// Up to so many queries, the heads of a group share a tile: fewer rows of the tensor cores idle, and each key is read
// once.
constexpr int few_queries = 64;

inline int packed_heads_of(const Attention& a) { return a.max_q <= few_queries ? a.heads / a.kv_heads : 1; }
inline bool decodes(const Attention& a) { return static_cast<int64_t>(a.max_q) * packed_heads_of(a) <= 16; }

template <class T>
int attention_forward(const Attention& a, cudaStream_t stream) {
  return with_width(a.dim, [&](auto width) -> int {
    constexpr int D = decltype(width)::value;
    const int packed_heads = packed_heads_of(a);
    return decodes(a) ? run_forward<T, D, true>(a, packed_heads, stream)
                      : run_forward<T, D, false>(a, packed_heads, stream);
  });
}

int attention_forward_bf16(const Attention& a, cudaStream_t stream);
int attention_forward_f16(const Attention& a, cudaStream_t stream);
int attention_forward_f32(const Attention& a, cudaStream_t stream);

}  // namespace mk::cuda

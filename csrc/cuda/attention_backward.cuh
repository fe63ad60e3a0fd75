// The gradients for 16-bit inputs, without atomic additions: a kernel whose blocks own queries, and one whose blocks
// own keys. With P = exp(S − lse): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − delta), dQ = scale · dS K, dK = scale · dSᵀ Q, where
// delta = rowsum(P ∘ dO Vᵀ) − dlse.
//
// The softmax and delta are those of these very scores, from a first walk over the keys, and not from the forward's
// output and lse: where scores are large or alike, their roundings would not cancel in dS, and leave no digit right.
#pragma once
#include "cuda/attention_tile.cuh"

namespace mk::cuda {

template <class T>
struct BackwardWork {
  Span queries, keys;
  int sequence, first;  // first: query or key of the tile
  bool packed;
  Visible visible;

  // Tiles of `rows` of at most `longest` tokens a sequence; the last come first where `reverse`.
  __device__ __forceinline__ BackwardWork(const AttentionBackward& a, int rows, int longest, bool reverse)
      : packed(a.cu_q != nullptr) {
    const int tiles = (longest + rows - 1) / rows, tile = blockIdx.x % tiles;
    first = (reverse ? tiles - 1 - tile : tile) * rows;
    sequence = blockIdx.x / tiles;
    queries = span_of(a.cu_q, sequence, a.max_q);
    keys = span_of(a.cu_k, sequence, a.max_k);
    visible = {keys.count, a.window, a.causal};
  }

  __device__ __forceinline__ int offset() const { return keys.count - queries.count; }
  __device__ __forceinline__ Rows<T> of_queries(const AttentionTokens& t, int head) const {
    return {t, sequence, packed, queries.first, head};
  }
  __device__ __forceinline__ Rows<T> of_keys(const AttentionTokens& t, int head) const {
    return {t, sequence, packed, keys.first, head};
  }
  __device__ __forceinline__ int64_t statistic(const AttentionBackward& a, int head, int query) const {
    return lse_at(packed, a.tokens, a.heads, sequence, a.max_q, head, packed ? queries.first + query : query);
  }
};

// Of a query: the largest score, 1 / the sum of the exponentials, and delta. While they are gathered, the sum itself
// and that of the exponentials' products with dP.
struct Statistics {
  float largest = -INFINITY, sum = 0, delta = 0;

  __device__ __forceinline__ void add(float score, float dp, float scale) {
    if (score > largest) {
      const float shrink = exponential(largest, score, scale);
      sum *= shrink, delta *= shrink;
      largest = score;
    }
    if (score == -INFINITY) return;
    const float e = exponential(score, largest, scale);
    sum += e;
    delta += e * dp;
  }
  // With those of other keys of the query, `lanes` away.
  __device__ __forceinline__ void join(int lanes, float scale) {
    const float top = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    const float mine = top == -INFINITY ? 0.0f : exponential(largest, top, scale);
    sum *= mine, delta *= mine;
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
    largest = top;
  }
  __device__ __forceinline__ void finish(float dlse) {
    sum = sum > 0 ? 1.0f / sum : 0.0f;
    delta = delta * sum - dlse;
  }
  __device__ __forceinline__ void store(float* to, int64_t at, int64_t count) const {
    to[at] = largest, to[count + at] = sum, to[2 * count + at] = delta;
  }
};

// Writes a warp's 16 rows times `scale`, by way of the rows that it owns of a tile; the first goes to `to`.
template <class T, int D>
__device__ __forceinline__ void store_gradient(const float (&c)[D / 8][4], float scale, Tile<T, D> stage, int row,
                                               T* to, int64_t pitch, int rows, int dim) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < D / 8; i++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      *reinterpret_cast<uint32_t*>(stage.at(row + g + 8 * r, i) + 4 * t) =
          pack_pair<T>(c[i][2 * r] * scale, c[i][2 * r + 1] * scale);
  __syncwarp();
  for (int index = lane; index < 16 * (D / 8); index += 32) {
    const int of_tile = index / (D / 8), chunk = index % (D / 8);
    if (of_tile < rows && 8 * chunk < dim)
      *reinterpret_cast<uint4*>(to + of_tile * pitch + 8 * chunk) =
          *reinterpret_cast<const uint4*>(stage.at(row + of_tile, chunk));
  }
  __syncwarp();
}

template <int D>
struct QueryTile {
  static constexpr int rows = 64, key_rows = D == 256 ? 16 : D == 128 ? 32 : 64;
  static constexpr int bytes = (2 * rows + 4 * key_rows) * D * 2;
};

// dQ and delta of 64 queries of one head, in two walks over their keys.
template <class T, int D>
__global__ void __launch_bounds__(attention_threads) query_gradient_kernel(const AttentionBackward a) {
  constexpr int rows = QueryTile<D>::rows, key_rows = QueryTile<D>::key_rows, n = key_rows / 8;
  constexpr int tile_bytes = key_rows * D * 2;
  extern __shared__ __align__(128) char shared[];
  const BackwardWork<T> w(a, rows, a.max_q, true);
  if (w.first >= w.queries.count) return;
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), count = w.queries.count;
  const Tile<T, D> queries{shared}, outs{shared + rows * D * 2};
  char* buffers = shared + 2 * rows * D * 2;
  const Rows<T> q = w.of_queries(a.q, head), dout = w.of_queries(a.dout, head);
  const Rows<T> k = w.of_keys(a.k, kv_head), v = w.of_keys(a.v, kv_head);
  const int last = min(w.first + rows, count) - 1;
  const int begin = w.visible.begin(w.first + w.offset()) / key_rows;
  const int end = max((w.visible.end(last + w.offset()) + key_rows - 1) / key_rows, begin), blocks = end - begin;
  const auto key_tile = [&](int i) { return Tile<T, D>{buffers + (i & 1) * 2 * tile_bytes}; };
  const auto value_tile = [&](int i) { return Tile<T, D>{buffers + (i & 1) * 2 * tile_bytes + tile_bytes}; };
  const auto first_key = [&](int i) { return (begin + (i < blocks ? i : i - blocks)) * key_rows; };
  const auto load_block = [&](int i) {
    if (i < 2 * blocks) {
      const int first = first_key(i);
      const auto live = [&](int row) { return first + row < w.keys.count; };
      load_tile<T, D, key_rows>(key_tile(i), a.dim, a.q.data,
                                [&](int row) { return live(row) ? k.at(first + row) : nullptr; });
      load_tile<T, D, key_rows>(value_tile(i), a.dim, a.q.data,
                                [&](int row) { return live(row) ? v.at(first + row) : nullptr; });
    }
    commit_copies();
  };
  const auto of_query = [&](const Rows<T>& t) {
    return [&](int row) { return w.first + row < count ? t.at(w.first + row) : nullptr; };
  };
  load_tile<T, D, rows>(queries, a.dim, a.q.data, of_query(q));
  load_tile<T, D, rows>(outs, a.dim, a.q.data, of_query(dout));
  load_block(0);
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4, own = w.first + warp * 16 + threadIdx.x % 32 / 4;
  Statistics of_row[2];
  float dq[D / 8][4] = {};
  const float scale = exponent_scale(a.scale);
  const auto finish_statistics = [&] {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      of_row[r].join(1, scale);
      of_row[r].join(2, scale);
      if (own + 8 * r >= count) continue;
      const int64_t at = w.statistic(a, head, own + 8 * r);
      of_row[r].finish(a.dlse[at]);
      if (t == 0) of_row[r].store(a.scratch, at, a.tokens * a.heads);
    }
  };
  if (!blocks) finish_statistics();
  for (int i = 0; i < 2 * blocks; i++) {
    load_block(i + 1);
    wait_copies<1>();
    __syncthreads();  // the block is there
    float s[n][4], dp[n][4];
    product_of_rows<T, D, n>(s, queries, warp * 16, key_tile(i), 0);
    product_of_rows<T, D, n>(dp, outs, warp * 16, value_tile(i), 0);
    const int key = first_key(i) + 2 * t;
#pragma unroll
    for (int j = 0; j < n; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool seen = w.visible.sees(own + e / 2 * 8 + w.offset(), key + 8 * j + e % 2);
        const float score = !seen ? -INFINITY : a.scale < 0 ? -s[j][e] : s[j][e];
        Statistics& row = of_row[e / 2];
        if (i < blocks)
          row.add(score, dp[j][e], scale);
        else
          s[j][e] = seen ? exponential(score, row.largest, scale) * row.sum * (dp[j][e] - row.delta) : 0.0f;
      }
    if (i >= blocks) add_product<T, D, n>(dq, s, key_tile(i), 0);
    if (i == blocks - 1) finish_statistics();
    __syncthreads();  // the block is done with
  }
  wait_copies<0>();
  __syncthreads();
  const int64_t token = (w.packed ? w.queries.first : static_cast<int64_t>(w.sequence) * a.max_q) + w.first + warp * 16;
  store_gradient<T, D>(dq, a.scale, queries, warp * 16, static_cast<T*>(a.dq) + (token * a.heads + head) * a.dim,
                       static_cast<int64_t>(a.heads) * a.dim, count - w.first - warp * 16, a.dim);
}

template <int D>
struct KeyTile {
  static constexpr int rows = 64, query_rows = D >= 128 ? 16 : 32;
  static constexpr int bytes = (2 * rows + 4 * query_rows) * D * 2;
};

// dK and dV of 64 keys of one key head, over all queries that see them, of all heads that share it. Where the sums of
// both would not fit in the registers, a launch each.
template <class T, int D, bool kKeys, bool kValues>
__global__ void __launch_bounds__(attention_threads) key_gradient_kernel(const AttentionBackward a) {
  constexpr int rows = KeyTile<D>::rows, query_rows = KeyTile<D>::query_rows, n = query_rows / 8;
  constexpr int tile_bytes = query_rows * D * 2;
  extern __shared__ __align__(128) char shared[];
  const BackwardWork<T> w(a, rows, a.max_k, false);
  const int keys = w.keys.count, kv_head = blockIdx.y, group = a.heads / a.kv_heads, offset = w.offset();
  if (w.first >= keys) return;
  const Tile<T, D> key_tile{shared}, value_tile{shared + rows * D * 2};
  char* buffers = shared + 2 * rows * D * 2;
  const auto query_tile = [&](int i) { return Tile<T, D>{buffers + (i & 1) * 2 * tile_bytes}; };
  const auto out_tile = [&](int i) { return Tile<T, D>{buffers + (i & 1) * 2 * tile_bytes + tile_bytes}; };
  const int last = min(w.first + rows, keys) - 1;
  const int first_seen = a.causal ? max(w.first - offset, 0) : 0;
  const int end_seen = a.causal && a.window ? min(w.queries.count, last + a.window - offset) : w.queries.count;
  const int begin = first_seen / query_rows, blocks = max((end_seen + query_rows - 1) / query_rows - begin, 0);
  const auto load_block = [&](int i) {
    if (i < group * blocks) {
      const int head = kv_head * group + i / blocks, first = (begin + i % blocks) * query_rows;
      const Rows<T> q = w.of_queries(a.q, head), dout = w.of_queries(a.dout, head);
      const auto live = [&](int row) { return first + row < w.queries.count; };
      load_tile<T, D, query_rows>(query_tile(i), a.dim, a.q.data,
                                  [&](int row) { return live(row) ? q.at(first + row) : nullptr; });
      load_tile<T, D, query_rows>(out_tile(i), a.dim, a.q.data,
                                  [&](int row) { return live(row) ? dout.at(first + row) : nullptr; });
    }
    commit_copies();
  };
  const Rows<T> k = w.of_keys(a.k, kv_head), v = w.of_keys(a.v, kv_head);
  const auto of_key = [&](const Rows<T>& t) {
    return [&](int row) { return w.first + row < keys ? t.at(w.first + row) : nullptr; };
  };
  load_tile<T, D, rows>(key_tile, a.dim, a.q.data, of_key(k));
  if constexpr (kKeys) load_tile<T, D, rows>(value_tile, a.dim, a.q.data, of_key(v));
  load_block(0);
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4, own = w.first + warp * 16 + threadIdx.x % 32 / 4;
  const float scale = exponent_scale(a.scale);
  const int64_t count = a.tokens * a.heads;
  float dk[kKeys ? D / 8 : 1][4] = {}, dv[kValues ? D / 8 : 1][4] = {};
  for (int i = 0; i < group * blocks; i++) {
    load_block(i + 1);
    const int head = kv_head * group + i / blocks, query = (begin + i % blocks) * query_rows + 2 * t;
    const float* statistics = a.scratch + w.statistic(a, head, 0);
    const auto at_query = [&](int which, int j, int e) {
      return statistics[which * count + min(query + 8 * j + e % 2, w.queries.count - 1)];
    };
    wait_copies<1>();
    __syncthreads();  // the block is there
    float s[n][4];
    product_of_rows<T, D, n>(s, key_tile, warp * 16, query_tile(i), 0);
#pragma unroll
    for (int j = 0; j < n; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int of_sequence = query + 8 * j + e % 2;
        const bool seen = of_sequence < w.queries.count && w.visible.sees(of_sequence + offset, own + e / 2 * 8);
        const float score = a.scale < 0 ? -s[j][e] : s[j][e];
        s[j][e] = seen ? exponential(score, at_query(0, j, e), scale) * at_query(1, j, e) : 0.0f;
      }
    if constexpr (kValues) add_product<T, D, n>(dv, s, out_tile(i), 0);
    if constexpr (kKeys) {
      float dp[n][4];
      product_of_rows<T, D, n>(dp, value_tile, warp * 16, out_tile(i), 0);
#pragma unroll
      for (int j = 0; j < n; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] *= dp[j][e] - at_query(2, j, e);
      add_product<T, D, n>(dk, s, query_tile(i), 0);
    }
    __syncthreads();  // the block is done with
  }
  wait_copies<0>();
  __syncthreads();
  const int64_t token = (w.packed ? w.keys.first : static_cast<int64_t>(w.sequence) * a.max_k) + w.first + warp * 16;
  const int64_t at = (token * a.kv_heads + kv_head) * a.dim, pitch = static_cast<int64_t>(a.kv_heads) * a.dim;
  const int live = keys - w.first - warp * 16;
  if constexpr (kKeys)
    store_gradient<T, D>(dk, a.scale, key_tile, warp * 16, static_cast<T*>(a.dk) + at, pitch, live, a.dim);
  if constexpr (kValues)
    store_gradient<T, D>(dv, 1.0f, key_tile, warp * 16, static_cast<T*>(a.dv) + at, pitch, live, a.dim);
}

template <class T, int D, bool kKeys, bool kValues>
int run_key_gradient(const AttentionBackward& a, cudaStream_t stream) {
  constexpr int rows = KeyTile<D>::rows, bytes = KeyTile<D>::bytes;
  const auto kernel = key_gradient_kernel<T, D, kKeys, kValues>;
  if (const int status = allow_shared(kernel, bytes)) return status;
  const dim3 grid((a.max_k + rows - 1) / rows * static_cast<int64_t>(a.sequences), a.kv_heads);
  kernel<<<grid, attention_threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
int attention_backward(const AttentionBackward& a, cudaStream_t stream) {
  return with_width(a.dim, [&](auto width) -> int {
    constexpr int D = decltype(width)::value, rows = QueryTile<D>::rows, bytes = QueryTile<D>::bytes;
    const auto kernel = query_gradient_kernel<T, D>;
    if (const int status = allow_shared(kernel, bytes)) return status;
    if (a.max_q) {
      const dim3 grid((a.max_q + rows - 1) / rows * static_cast<int64_t>(a.sequences), a.heads);
      kernel<<<grid, attention_threads, bytes, stream>>>(a);
      if (const int status = cudaGetLastError()) return status;
    }
    if (!a.max_k) return cudaSuccess;
    if constexpr (D < 256) return run_key_gradient<T, D, true, true>(a, stream);
    if (const int status = run_key_gradient<T, 256, false, true>(a, stream)) return status;
    return run_key_gradient<T, 256, true, false>(a, stream);
  });
}

int attention_backward_bf16(const AttentionBackward& a, cudaStream_t stream);
int attention_backward_f16(const AttentionBackward& a, cudaStream_t stream);
int attention_backward_f32(const AttentionBackward& a, cudaStream_t stream);

}  // namespace mk::cuda

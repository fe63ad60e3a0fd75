// Sliding-window attention with grouped heads by FlashAttention-2 (Dao 2023, algorithm 1), over whole sequences and
// over a ring cache with the chunk behind it, and its gradients.
#pragma once
#include "cuda/launch.h"

namespace mk::cuda {

// Tokens [B, S, heads, D] or, with ends of sequences, [T, heads, D]; strides count elements.
struct AttentionTokens {
  const void* data;
  int64_t batch, row, head;
};

// The outputs are contiguous; lse is [B, H, S] or [H, T]. A head's query i of a sequence with S queries and Sk keys
// stands at position i + Sk - S; with a window it sees the last `window` keys up to there (0: all of them).
//
// With ring_lens the keys of sequence b are those that its ring keeps, of ring_lens[b] tokens the last `slots` at most
// in slots p % slots, and behind them those of k and v, one a query, where these are given.
struct Attention {
  AttentionTokens q, k, v, k_ring, v_ring;
  void* out;
  float* lse;
  // Of each split of the keys, for each token and head: the sum over its keys, and its lse; then they are combined.
  float *split_out, *split_lse;
  const int32_t *cu_q, *cu_k, *ring_lens;
  int64_t tokens, key_tokens;  // in all: of q, and of packed k
  int sequences, heads, kv_heads, dim, max_q, max_k, slots, window, splits, dtype;
  float scale;
  bool causal;
};

struct AttentionBackward {
  AttentionTokens dout, q, k, v;
  const float* dlse;   // contiguous, like the forward's lse
  void *dq, *dk, *dv;  // contiguous
  float* scratch;      // mk_cuda_attention_backward_scratch says how much: [3][tokens][heads], but for Hopper
  const int32_t *cu_q, *cu_k;
  int64_t tokens, key_tokens;  // in all: of q, and of packed k
  int sequences, heads, kv_heads, dim, max_q, max_k, window, dtype;
  float scale;
  bool causal;
};

}  // namespace mk::cuda

extern "C" {
// Into how many splits the keys of this call should be cut, so that all multiprocessors have work.
int mk_cuda_attention_splits(const mk::cuda::Attention& a);
int mk_cuda_attention(const mk::cuda::Attention& a, void* stream);
// Floats of scratch that the gradients need.
int64_t mk_cuda_attention_backward_scratch(const mk::cuda::AttentionBackward& a);
int mk_cuda_attention_backward(const mk::cuda::AttentionBackward& a, void* stream);
}

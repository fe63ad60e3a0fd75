// What attention and attention_cached share on the torch side: how tensors become sequences, and the run over these.
#pragma once
#include <optional>
#include <vector>

#include "cpu/attention.h"
#include "torch/binding.h"

namespace mk {

// Tokens of a dense [B, S, heads, D] or packed [T, heads, D] tensor, or codes of these. Offsets and strides count
// elements.
struct Tokens {
  explicit Tokens(const Tensor& t);
  // Where token `i` of sequence `b` lies, in a packed tensor simply token `i`.
  const char* at(int64_t b, int64_t i) const { return data + (b * batch + i * row) * size; }

  const char* data;
  int64_t size, batch, row, head;
};

// Where the sequences of a packed tensor start and where the last ends; never outside the tensor, whatever `cu` says.
// Without `cu` there is one token a sequence.
std::vector<int64_t> token_starts(const std::optional<Tensor>& cu, int64_t sequences, int64_t tokens);

// What all sequences have in common; q and out are dense or packed.
Attention describe_attention(const Tensor& q, const Tensor& k, int64_t window, double scale, bool causal);

// Fills the outputs of all sequences, of which the first key and panel are set here, and the panels and partials of
// `a`.
void run_attention(Attention a, std::vector<AttentionSequence> sequences);

}  // namespace mk

// The cross entropy of a block of words for all tokens, and the product that sums over such blocks.
//
// Blocks of words, not of tokens: dweight of a block's words is then one product over all tokens, rounded once, and
// what has to be summed in float32 is dhidden, T N elements in the place of V N.
#pragma once
#include "cpu/isa.h"

namespace mk {

// Logits of the words first ... first + words of each row, `row` elements apart.
struct LogitBlock {
  void* logits;
  int64_t row, rows, first, words;
  const int64_t* labels;
  int64_t ignore_index, vocabulary;
};

// Of the words so far: the largest logit, the sum of exp(logit - largest), and the label's logit. A largest one that is
// infinite is taken as 0 in the sum.
struct LossState {
  double top = -__builtin_inf(), sum = 0, picked = 0;
};

// A product of bf16 in pairs along k: out[r][c] += a[r] . b[., c], or = where `fresh`. `b` as pack() lays it out, `out`
// in float32 with rows of pair_columns(n), readable and writable for a strip less one row behind the last.
struct PairProduct {
  const void* a;
  int64_t a_row, k;
  const void* b;
  float* out;
  int64_t rows, columns;  // of out
  int64_t first_row, last_row, first_column, last_column;
  bool fresh;
};

struct LinearCrossEntropyKernels {
  using AddLosses = void (*)(const LogitBlock&, LossState*);
  // The logits become dlosses * (softmax - one_hot), rounded to the dtype.
  using Gradients = void (*)(const LogitBlock&, const void* lse, const void* dlosses);
  // Rows [2 * first, 2 * last) of b, contiguous along n, of k rows in all.
  using Pack = void (*)(const void* b, int64_t b_row, int64_t k, int64_t n, int64_t first, int64_t last, void* packed);
  using Multiply = void (*)(const PairProduct&);
  AddLosses add_losses[dtypes];
  Gradients gradients[dtypes];
  // Whether bf16 is multiplied in pairs. Logits of bf16 then lie in bf16; otherwise those of 16 bits lie in float32 and
  // are rounded where they are read, since 16-bit products are slower than float32's where the processor has none: of
  // float16, torch's do 4 to 50 GFLOP/s, and float32's 210 (Zen 5, 2 cores, [256, 576] by [576, 4096]).
  bool pairs;
  Pack pack;          // null without pairs
  Multiply multiply;  // null without pairs
};

constexpr int64_t pair_strip = 6;    // rows computed together
constexpr int64_t pair_rows = 48;    // whole strips, and whole registers of a matrix unit
constexpr int64_t pair_panel = 64;   // columns computed together
constexpr int64_t pair_vector = 16;  // rows of `out` and panels are multiples of it

static constexpr int64_t pair_columns(int64_t n) { return (n + pair_vector - 1) / pair_vector * pair_vector; }

}  // namespace mk

MK_MATRIX_KERNELS(LinearCrossEntropyKernels, linear_cross_entropy)

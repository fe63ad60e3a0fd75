#include "cpu/linear_cross_entropy.h"

#include "cpu/arithmetic.h"
#include "cpu/matrix.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t sum_words = 1024;  // sums in the logits' own precision are no longer than this

// Logits of T as they lie in memory: as T, or in float32 that is yet to be rounded.
template <class T, class In>
struct Logits {
  using Scalar = In;
  using Vec = vec_of<In>;
  static constexpr int width = Format<In>::width;
  MK_INLINE Vec rounded(Vec v) {
    if constexpr (sizeof(In) == sizeof(T))
      return v;
    else
      return round_to<T>(v);
  }
  MK_INLINE Vec read(const In* p) { return rounded(load(p)); }
  MK_INLINE Vec read_n(const In* p, int64_t n) { return rounded(load_n(p, n)); }
  MK_INLINE void write(In* p, Vec v) { store(p, rounded(v)); }
  MK_INLINE void write_n(In* p, Vec v, int64_t n) { store_n(p, rounded(v), n); }
};

template <class V>
MK_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
MK_INLINE auto total(V v) {
  return fold<sizeof(V) / sizeof(v[0]) / 2>(v, [](auto a, auto b) { return a + b; });
}

// Both passes over a stretch of words run in the first-level cache. NaN among the logits makes the sum NaN, whatever
// the largest is then.
template <class L>
void add_words(const typename L::Scalar* x, int64_t n, LossState& state) {
  using Vec = typename L::Vec;
  constexpr int w = L::width;
  const int64_t whole = round_down(n, w);
  Vec last = {};
  if (whole < n) {
    last = L::read_n(x + whole, n - whole);
    for (int i = int(n - whole); i < w; i++) last[i] = -INFINITY;
  } else {
    last = last - INFINITY;
  }
  Vec top = last;
  for (int64_t i = 0; i < whole; i += w) top = larger(top, L::read(x + i));
  const double block = fold<w / 2>(top, [](auto a, auto b) { return larger(a, b); });
  const double highest = block > state.top ? block : state.top;
  const double base = __builtin_isinf(highest) ? 0 : highest, before = __builtin_isinf(state.top) ? 0 : state.top;
  const auto subtract = (decltype(top[0] + 0))base;
  Vec sum = exp(last - subtract);
  for (int64_t i = 0; i < whole; i += w) sum += exp(L::read(x + i) - subtract);
  const double factor = state.sum == 0 ? 0 : __builtin_exp(before - base);
  state.top = highest;
  state.sum = state.sum * factor + total(sum);
}

template <class T, class In>
void add_losses(const LogitBlock& b, LossState* states) {
  using L = Logits<T, In>;
  for (int64_t r = 0; r < b.rows; r++) {
    const In* x = (const In*)b.logits + r * b.row;
    LossState state = states[r];
    for (int64_t i = 0; i < b.words; i += sum_words) add_words<L>(x + i, least(sum_words, b.words - i), state);
    const int64_t label = b.labels[r] - b.first;
    if (label >= 0 && label < b.words) state.picked = L::read_n(x + label, 1)[0];
    states[r] = state;
  }
}

template <class L>
MK_INLINE void fill_row(typename L::Scalar* x, int64_t n, typename L::Vec v) {
  int64_t i = 0;
  for (; i + L::width <= n; i += L::width) L::write(x + i, v);
  if (i < n) L::write_n(x + i, v, n - i);
}

// The label's own element is the small difference of two numbers where the model is sure, and is computed as such.
template <class T, class In>
void gradients(const LogitBlock& b, const void* lse_in, const void* dlosses) {
  using L = Logits<T, In>;
  using Vec = typename L::Vec;
  using Scalar = decltype(Vec{}[0] + 0);
  for (int64_t r = 0; r < b.rows; r++) {
    In* x = (In*)b.logits + r * b.row;
    const int64_t label = b.labels[r], at = label - b.first;
    if (label == b.ignore_index || label < 0 || label >= b.vocabulary) {
      fill_row<L>(x, b.words, label == b.ignore_index ? Vec{} : Vec{} + NAN);
      continue;
    }
    const Scalar lse = ((const Scalar*)lse_in)[r], dloss = ((const Scalar*)dlosses)[r];
    const bool here = at >= 0 && at < b.words;
    const double own = here ? L::read_n(x + at, 1)[0] : 0;
    int64_t i = 0;
    for (; i + L::width <= b.words; i += L::width) L::write(x + i, exp(L::read(x + i) - lse) * dloss);
    if (i < b.words) L::write_n(x + i, exp(L::read_n(x + i, b.words - i) - lse) * dloss, b.words - i);
    if (here) L::write_n(x + at, Vec{} + Scalar(__builtin_expm1(own - lse) * dloss), 1);
  }
}

#if MK_BF16

using M = PairsBf16;
static_assert(pair_vector == M::width && pair_panel % pair_vector == 0);
constexpr int panel_vectors = pair_panel / pair_vector;
constexpr int64_t panel_words = 128;  // along k: 32 KiB of a panel, which stay in the first-level cache

template <int>
struct Vectors {};

// f(column, how many vectors) over the columns of each panel.
template <class F>
MK_INLINE void each_panel(int64_t first, int64_t last, F f) {
  int64_t c = first;
  for (; c + pair_panel <= last; c += pair_panel) f(c, Vectors<panel_vectors>());
  if (c + 2 * pair_vector <= last) {
    f(c, Vectors<2>());
    c += 2 * pair_vector;
  }
  if (c < last) f(c, Vectors<1>());
}

MK_INLINE vu raw(const bf16* p, int64_t n) {
  vh h = {};
  __builtin_memcpy(&h, p, most(0, least(n, lanes)) * sizeof *p);
  return widen(h);
}

// A panel of columns c on lies at word c * words, and is [words][its columns].
void pack(const void* b, int64_t b_row, int64_t k, int64_t n, int64_t first, int64_t last, void* packed) {
  const int64_t words = round_up(k, 2) / 2;
  for (int64_t w = first; w < last; w++) {
    const bf16 *even = (const bf16*)b + 2 * w * b_row, *odd = 2 * w + 1 < k ? even + b_row : nullptr;
    each_panel(0, pair_columns(n), [&]<int NV>(int64_t c, Vectors<NV>) {
      M::Word* to = (M::Word*)packed + c * words + w * NV * lanes;
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int64_t at = c + v * lanes;
        if (at + lanes <= n)
          store_words(to + v * lanes,
                      widen(load_words<vh>(even + at)) | (odd ? widen(load_words<vh>(odd + at)) << 16 : vu{}));
        else
          store_words(to + v * lanes, raw(even + at, n - at) | (odd ? raw(odd + at, n - at) << 16 : vu{}));
      }
    });
  }
}

using Strip = const bf16* [pair_strip];

template <int NV>
__attribute__((noinline)) void strip(const Strip& rows, int64_t steps, const M::Word* b, float* out, int64_t out_row,
                                     bool fresh) {
  M::Vec c[pair_strip][NV] = {};
  const bf16* a[pair_strip];
#pragma GCC unroll 6
  for (int r = 0; r < pair_strip; r++) a[r] = rows[r];
  for (int64_t k = 0; k < steps; k++) {
    M::Words y[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) y[v] = load_words<M::Words>(b + (k * NV + v) * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < pair_strip; r++) {
      M::Words x = M::splat(load_words<M::Word>(a[r] + 2 * k));
      asm("" : "+v"(x));  // in a register once: as a memory operand it is loaded for each vector of the row
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) M::multiply_add(c[r][v], x, y[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < pair_strip; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      float* to = out + r * out_row + v * lanes;
      store_words(to, fresh ? c[r][v] : load_words<M::Vec>(to) + c[r][v]);
    }
}

// Of the last words, where k is odd, the second element is not a's.
void copy_rows(const Strip& rows, int64_t count, bf16 (*to)[2 * panel_words]) {
  for (int r = 0; r < pair_strip; r++) {
    __builtin_memcpy(to[r], rows[r], count * sizeof(bf16));
    to[r][count] = {0};
  }
}

// Of the rows from `first_row` on the products of the words [first, last).
void multiply_by_vectors(const PairProduct& p, int64_t first_row, int64_t first, int64_t last) {
  const int64_t words = round_up(p.k, 2) / 2;
  for (int64_t k = first; k < last; k += panel_words) {
    const int64_t steps = least(panel_words, last - k);
    const bool odd = 2 * (k + steps) > p.k;
    each_panel(p.first_column, p.last_column, [&]<int NV>(int64_t c, Vectors<NV>) {
      for (int64_t row = first_row; row < p.last_row; row += pair_strip) {
        Strip rows;  // past the last row the last once more
        bf16 copy[pair_strip][2 * panel_words];
        for (int r = 0; r < pair_strip; r++) rows[r] = (const bf16*)p.a + least(row + r, p.rows - 1) * p.a_row + 2 * k;
        if (odd) {
          copy_rows(rows, p.k - 2 * k, copy);
          for (int r = 0; r < pair_strip; r++) rows[r] = copy[r];
        }
        strip<NV>(rows, steps, (const M::Word*)p.b + c * words + k * NV * lanes, p.out + row * p.columns + c, p.columns,
                  p.fresh && k == 0);
      }
    });
  }
}

#if MK_AMX

template <int MT, int NV>
MK_INLINE void multiply_rows(const PairProduct& p, int64_t row, const M::Word* b, int64_t k, int64_t steps, int64_t c) {
  constexpr int NT = NV == 1 ? 1 : 2;
  const bf16* a = (const bf16*)p.a + row * p.a_row + 2 * k;
#pragma GCC unroll 2
  for (int v = 0; v < NV; v += NT)
    multiply_matrices<false, MT, NT>(a, p.a_row * 2, {b + v * lanes, NV * 64, 64, matrix_words * NV * 64},
                                     steps / matrix_words, p.out + row * p.columns + c + v * lanes, p.columns * 4,
                                     p.fresh && k == 0);
}

// The rows before `last_row` and the words before `last`, both whole registers.
void multiply_by_matrices(const PairProduct& p, int64_t last_row, int64_t last) {
  const Matrices matrices;
  const int64_t words = round_up(p.k, 2) / 2;
  for (int64_t k = 0; k < last; k += panel_words) {
    const int64_t steps = least(panel_words, last - k);
    each_panel(p.first_column, p.last_column, [&]<int NV>(int64_t c, Vectors<NV>) {
      const M::Word* b = (const M::Word*)p.b + c * words + k * NV * lanes;
      int64_t row = p.first_row;
      for (; row + 2 * matrix_rows <= last_row; row += 2 * matrix_rows) multiply_rows<2, NV>(p, row, b, k, steps, c);
      if (row < last_row) multiply_rows<1, NV>(p, row, b, k, steps, c);
    });
  }
}

void multiply(const PairProduct& p) {
  // Of an odd last word the second element is not a's.
  const int64_t words = round_up(p.k, 2) / 2, whole = round_down(p.k / 2, matrix_words);
  const int64_t last_row = p.first_row + round_down(p.last_row - p.first_row, matrix_rows);
  multiply_by_matrices(p, last_row, whole);
  multiply_by_vectors(p, last_row, 0, whole);
  multiply_by_vectors(p, p.first_row, whole, words);
}

#else

void multiply(const PairProduct& p) { multiply_by_vectors(p, p.first_row, 0, round_up(p.k, 2) / 2); }

#endif

using Bf16Logits = bf16;

#else

constexpr LinearCrossEntropyKernels::Pack pack = nullptr;
constexpr LinearCrossEntropyKernels::Multiply multiply = nullptr;
using Bf16Logits = float;

#endif

}  // namespace

const LinearCrossEntropyKernels linear_cross_entropy = {
    {add_losses<float, float>, add_losses<bf16, Bf16Logits>, add_losses<f16, float>, add_losses<double, double>},
    {gradients<float, float>, gradients<bf16, Bf16Logits>, gradients<f16, float>, gradients<double, double>},
    MK_BF16,
    pack,
    multiply,
};

}  // namespace mk::MK_ISA

// x by rows of int4 codes with the instruction that multiplies unsigned bytes by signed ones.
#pragma once
#include "cpu/quant_digits.h"

#if MK_BF16

namespace mk::MK_ISA {
namespace {

// Adds up blocks of four lanes until there are m vectors.
template <int m, int n, class V>
MK_INLINE void add_blocks(V (&t)[n], V (&out)[m]) {
  if constexpr (n == m) {
    for (int i = 0; i < m; i++) out[i] = t[i];
  } else {
    V u[n / 2];
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; i++)
      u[i] = joined(
          t[2 * i], t[2 * i + 1], [](V& a, V& b, auto order) { take_turns(a, b, order); },
          [](V a, V b) { return a + b; });
    add_blocks<m>(u, out);
  }
}

// x's digits of one piece, as they are multiplied by the low halves of 64 bytes and by the high ones.
struct ByteDigits {
  vi high[2], low[2];
  explicit ByteDigits(const char* p)
      : high{load_words<vi>(p), load_words<vi>(p + 128)}, low{load_words<vi>(p + 64), load_words<vi>(p + 192)} {}
};

// Of four rows' 64 bytes the sums over each block of four lanes; lane i of a block is row i.
MK_INLINE vi four_rows(const uint8_t* codes, int64_t row, int64_t ahead, const ByteDigits& x) {
  const vu half = set1(0x0f0f0f0fu);
  // 128 products of 15 by -128 are within int16 in each lane: pairs of rows share a vector, and neighbours are added.
  const vs ones = vs{} + int16_t{1}, high_digit = vs{} + int16_t{256};
  vi pairs[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    vi high[2], low[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const uint8_t* const at = codes + (2 * h + i) * row;
      __builtin_prefetch(at + ahead, 0, 2);
      const vu w = load_words<vu>(at);
      const vi a = (vi)(w & half), b = (vi)(w >> 4 & half);
      high[i] = dot_bytes(dot_bytes(vi{}, a, x.high[0]), b, x.high[1]);
      low[i] = dot_bytes(dot_bytes(vi{}, a, x.low[0]), b, x.low[1]);
    }
    pairs[h] = dot_pairs(dot_pairs(vi{}, low_halves(low[0], low[1]), ones), low_halves(high[0], high[1]), high_digit);
  }
  const vi even =
      __builtin_shufflevector(pairs[0], pairs[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
  const vi odd = __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  return even + odd;
}

// out[r] = x . weight[n + r] for r < 16; past `count` anything.
template <int groups>
__attribute__((noinline)) void byte_dots(const QuantWeight& w, const DigitLayout& l, const char* x, int64_t n,
                                         int64_t count, float* out) {
  alignas(64) uint8_t copy[outputs * 64];
  GroupScales scales(w, n, count, groups);
  // A lane's row, and its group of the piece.
  vi at;
  for (int i = 0; i < lanes; i++) at[i] = (i / (4 * groups) * 4 + i % 4) * groups + i / 4 % groups;
  vf acc[groups] = {};
  for (int64_t c = 0; c < l.pieces; c++, x += l.piece) {
    go_to(scales, c);
    const CodeRows codes = code_rows<64>(w, n, count, c, copy);
    const ByteDigits digits(x);
    vi four[4], sums[groups];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++)
      four[q] = four_rows(codes.first + 4 * q * codes.row, codes.row, outputs * w.row, digits);
    add_blocks<groups>(four, sums);
    const SumsOfX of_x(l, x);
#pragma GCC unroll 4
    for (int u = 0; u < groups; u++) {
      add_scaled(acc[u], sums[u], of_x, groups == 1 ? load(scales.scale) : permuted(at, scales.scale + u * lanes));
      if (w.offset) acc[u] += of_x.sums * (groups == 1 ? load(scales.offset) : permuted(at, scales.offset + u * lanes));
    }
  }
  vf all[1];
  add_blocks<1>(acc, all);
  store(out, all[0]);
}

template <class T>
void run_bytes(const QuantWeight& w, const QuantRows& rows, const QuantShare& share, const DigitLayout& l) {
  constexpr decltype(&byte_dots<1>) of[] = {byte_dots<1>, byte_dots<2>, nullptr, byte_dots<4>};
  for (int64_t n = share.first; n < share.first + share.count; n += outputs) {
    const int64_t count = least(outputs, share.first + share.count - n);
    for (int64_t i = 0; i < rows.rows; i++) {
      float sums[outputs];
      of[l.groups - 1](w, l, rows.memory + i * l.block, n, count, sums);
      finish_digits<T>(w, share, i, n, count, sums);
    }
  }
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

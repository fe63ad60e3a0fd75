// x for products of bytes: an element is 256 times a signed byte and another one, which are summed by themselves. The
// sums of a group of the weight are whole numbers, exact in int32; they meet the group's scale, and the one of x, as
// one float. Whichever unit forms them and however many rows of x there are, a row's results are the same.
//
// A "piece" is 128 elements of a row in two steps of 64: of int4 codes the low and the high halves of 64 bytes, of
// int8 codes one half after the other. 16 rows of the weight are taken at once.
#pragma once
#include "cpu/quant_math.h"

#if MK_BF16

namespace mk::MK_ISA {
namespace {

constexpr int64_t byte_piece = 128, outputs = 16;
constexpr float byte_units = 127 * 257;  // the largest that two signed bytes hold

// How x lies in memory: for each block of rows of x and each piece of it digits in words of four bytes, and three
// vectors that go with the sums.
struct DigitLayout {
  int64_t groups, rows;  // of the weight in a piece, of x in a block
  bool matrix;
  int64_t blocks, pieces;
  int64_t word, step, digit, x_row, group;  // words from one of these to the next
  int64_t start, unit, sums, piece, block;  // bytes: to the three vectors, and from one of these to the next

  // With `matrix` as right factors, [step][word][digit][row][group]: a group's columns have zeros where the piece's
  // other groups are. Else as vectors of words, [step][digit][word].
  DigitLayout(const QuantWeight& w, int64_t x_rows, bool as_matrix)
      : groups(w.group < byte_piece ? byte_piece / w.group : 1), rows(1), matrix(as_matrix) {
    while (matrix && rows < x_rows && rows * groups < 8) rows *= 2;
    blocks = (x_rows + rows - 1) / rows;
    pieces = (w.k + byte_piece - 1) / byte_piece;
    digit = matrix ? rows * groups : lanes;
    word = matrix ? 2 * digit : 1;
    step = matrix ? lanes * word : 2 * lanes;
    x_row = matrix ? groups : 0;
    group = matrix ? 1 : 0;
    start = 2 * step * 4;
    unit = start + 64;
    sums = unit + 64;
    piece = sums + 64;
    block = piece * pieces;
  }
  // Whether a lane of the sums belongs to this row of the block, and its group.
  bool has(int64_t lane, int64_t row) const { return !matrix || lane / groups % rows == row; }
  int64_t group_of(int64_t lane) const { return (matrix ? lane : lane / 4) % groups; }
};

// The digits of one piece of a row. False where int16 cannot hold it.
template <bool half_bytes>
bool digits_of(const float* x, const DigitLayout& l, int64_t row, char* to) {
  const float most = largest_for_int16<byte_piece>(x);
  if (most < 0) return false;
  const float per_unit = most > 0 ? byte_units / most : 0.f, unit = most / byte_units;
  typedef int8_t bytes __attribute__((vector_size(MK_LANES)));
  int32_t digits[2][byte_piece / 4];
  vi parts[4] = {};
  for (int i = 0; i < byte_piece; i += lanes) {
    const vi v = to_int(load(x + i) * per_unit), high = (v + 128) >> 8;
    store_words(digits[0] + i / 4, __builtin_convertvector(high, bytes));
    store_words(digits[1] + i / 4, __builtin_convertvector(v - (high << 8), bytes));
    parts[i / 32] += v;
  }
  int32_t* const words = (int32_t*)to + row * l.x_row;
  for (int64_t i = 0; i < byte_piece / 4; i++) {
    const int64_t step = half_bytes ? i / 4 % 2 : i / lanes, word = half_bytes ? i / 8 * 4 + i % 4 : i % lanes;
    int32_t* const at = words + step * l.step + word * l.word + i * l.groups / 32 * l.group;
    at[0] = digits[0][i];
    at[l.digit] = digits[1][i];
  }
  int32_t sums[4];
  for (int64_t g = 0; g < l.groups; g++) {
    vi sum = {};
    for (int64_t i = g * 4 / l.groups; i < (g + 1) * 4 / l.groups; i++) sum += parts[i];
    sums[g] = fold<lanes / 2>(sum, [](vi a, vi b) { return a + b; });
  }
  for (int64_t i = 0; i < lanes; i++) {
    if (!l.has(i, row)) continue;
    const int32_t sum = sums[l.group_of(i)];
    ((int32_t*)(to + l.start))[i] = half_bytes ? -8 * sum : 0;
    ((float*)(to + l.unit))[i] = unit;
    ((float*)(to + l.sums))[i] = (float)sum * unit;
  }
  return true;
}

template <class T>
bool prepare_digits(const QuantWeight& w, const QuantRows& rows, const DigitLayout& l) {
  // Columns of no row, and of other groups.
  if (l.matrix && (l.groups > 1 || rows.rows % l.rows)) __builtin_memset(rows.memory, 0, l.block * l.blocks);
  for (int64_t i = 0; i < rows.rows; i++) {
    const T* const x = (const T*)rows.x + i * rows.x_row;
    for (int64_t c = 0; c < l.pieces; c++) {
      float values[byte_piece];
      load_piece<byte_piece>(x, c * byte_piece, w.k, values);
      char* const to = rows.memory + i / l.rows * l.block + c * l.piece;
      if (!(w.kind == Codes::int8 ? digits_of<false>(values, l, i % l.rows, to)
                                  : digits_of<true>(values, l, i % l.rows, to)))
        return false;
    }
  }
  return true;
}

// ---- the weight's side: 16 rows of it ----

// Where a piece's codes lie, or a copy of them where there are fewer rows or codes than a whole piece has.
struct CodeRows {
  const uint8_t* first;
  int64_t row;
};

__attribute__((noinline)) void copy_codes(const uint8_t* from, int64_t row, int64_t rows, int64_t bytes, int64_t left,
                                          uint8_t* to) {
  __builtin_memset(to, 0, outputs * bytes);
  for (int64_t r = 0; r < rows; r++) __builtin_memcpy(to + r * bytes, from + r * row, least(bytes, left));
}

template <int64_t bytes>
MK_INLINE CodeRows code_rows(const QuantWeight& w, int64_t n, int64_t count, int64_t c, uint8_t* copy) {
  const int64_t left = code_bytes(w.kind, w.k) - c * bytes;
  const uint8_t* const at = w.codes + n * w.row + c * bytes;
  // What follows a row's end in memory is multiplied by zeros.
  if (count == outputs && (left >= bytes || (w.n - n - outputs) * w.row + left >= bytes)) return {at, w.row};
  copy_codes(at, w.row, count, bytes, left, copy);
  return {copy, bytes};
}

// Of t[i] the units of `unit` lanes, turned: t[i] is then the units i of all.
template <int unit, int half, int n>
MK_INLINE void turn_units(vf (&t)[n]) {
#pragma GCC unroll 16
  for (int i = 0; i < n; i++)
    if (!(i & half / unit)) exchange<half>(t[i], t[i + half / unit], typename Count<lanes>::type());
  if constexpr (half > unit) turn_units<unit, half / 2>(t);
}

// 16 rows' scales as [piece][row][group of the piece], for 16 groups of which `left` are there: others are zeros. Past
// `count` rows the last once more.
template <int groups>
__attribute__((noinline)) void turn_scales(const float* from, int64_t row, int64_t count, int64_t left,
                                           const float* end, float* to) {
  constexpr int n = lanes / groups;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int i = 0; i < groups; i++) {
    vf t[n];
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) {
      const float* const at = from + least(i * n + r, count - 1) * row;
      if (left >= lanes)
        t[r] = load(at);
      else if (end - at >= lanes)
        t[r] = lane < (int32_t)left ? load(at) : vf{};
      else
        t[r] = load_n(at, left);
    }
    turn_units<groups, lanes / 2>(t);
#pragma GCC unroll 16
    for (int c = 0; c < n; c++) store(to + (c * groups + i) * lanes, t[c]);
  }
}

// The scales, and offsets, of 16 rows along the pieces; those of the piece before stay where they were.
struct GroupScales {
  const QuantWeight& weight;
  const int64_t n, count, groups;  // the first row and how many there are; groups of a piece
  const int64_t in_group;          // pieces
  const float *scale, *offset;
  // Twice the scales of 16 groups, twice the offsets, and what a vector reads past the last.
  alignas(64) float turned[4 * lanes * lanes + lanes];
  GroupScales(const QuantWeight& w, int64_t first, int64_t rows, int64_t of_piece)
      : weight(w),
        n(first),
        count(rows),
        groups(of_piece),
        in_group(w.group > byte_piece ? w.group / byte_piece : 1),
        scale(turned),
        offset(turned + 2 * lanes * lanes) {}
};

// The one scale of a row comes at the end: x in int16 is within 1e30, so that its products with codes overflow in no
// row.
MK_INLINE bool scaled_at_end(const QuantWeight& w) { return w.groups == 1 && !w.offset; }

void turn(const GroupScales& s, const float* from, int64_t first, float* to) {
  const QuantWeight& w = s.weight;
  constexpr decltype(&turn_scales<1>) of[] = {turn_scales<1>, turn_scales<2>, nullptr, turn_scales<4>};
  of[s.groups - 1](from + s.n * w.groups + first, w.groups, s.count, w.groups - first, from + w.n * w.groups, to);
}

// To piece c, which is 0 or follows the one before.
MK_INLINE void go_to(GroupScales& s, int64_t c) {
  if (scaled_at_end(s.weight)) {
    for (int i = 0; !c && i < lanes; i++) s.turned[i] = 1;
    return;
  }
  if (s.in_group > 1 && c % s.in_group) return;
  const int64_t first = c / s.in_group * s.groups, at = first % lanes * lanes;
  float* const scale = s.turned + first / lanes % 2 * lanes * lanes;
  float* const offset = scale + 2 * lanes * lanes;
  s.scale = scale + at, s.offset = offset + at;
  if (at) return;
  turn(s, s.weight.scale, first, scale);
  if (s.weight.offset) turn(s, s.weight.offset, first, offset);
}

MK_INLINE vf permuted(vi at, const float* p) {
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)at, (__m512)load(p));
}

// What x adds to the sums of a piece: minus 8 times its own sums, for int4's eights, its unit, and its sums as floats,
// which offsets multiply.
struct SumsOfX {
  vi start;
  vf unit, sums;
  SumsOfX(const DigitLayout& l, const char* piece)
      : start(load_words<vi>(piece + l.start)),
        unit(load((const float*)(piece + l.unit))),
        sums(load((const float*)(piece + l.sums))) {}
};

// Results of row i from the sums of its products.
template <class T>
MK_INLINE void finish_digits(const QuantWeight& w, const QuantShare& share, int64_t i, int64_t n, int64_t count,
                             float* sums) {
  if (scaled_at_end(w))
    for (int64_t r = 0; r < count; r++) sums[r] *= w.scale[n + r];
  finish<T>(share, i, n, count, sums);
}

// A group's sum times its scale, to a sum of floats: the same operations wherever the sums come from.
MK_INLINE void add_scaled(vf& acc, vi sum, const SumsOfX& x, vf scale) {
  acc += to_float(sum + x.start) * (scale * x.unit);
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

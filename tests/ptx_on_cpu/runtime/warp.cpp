// What the lanes of a warp do together: shuffles, votes, matrix fragments. None of it orders memory.
#include "block.h"

namespace emu {

namespace {

template <class A>
A& args(const Fiber* lanes, int i) {
  return *static_cast<A*>(lanes[i].args);
}
template <class F>
void each(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

struct ShflArgs {
  Shfl mode;
  uint32_t v, b, c, out, site;
  bool inside;
};

void do_shfl(Fiber* lanes, uint32_t mask) {
  each(mask, [&](int lane) {
    auto& a = args<ShflArgs>(lanes, lane);
    const int b = a.b & 31, clamp = a.c & 31, segment = a.c >> 8 & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    int from = a.mode == Shfl::up     ? lane - b
               : a.mode == Shfl::down ? lane + b
               : a.mode == Shfl::bfly ? lane ^ b
                                      : first | (b & ~segment);
    a.inside = a.mode == Shfl::up ? from >= last : from <= last;
    if (!a.inside) from = lane;
    if (!(mask >> from & 1))
      fail("lane " + std::to_string(lane) + " takes the value of lane " + std::to_string(from) +
           ", which does not take part, at " + where(a.site));
    a.out = args<ShflArgs>(lanes, from).v;
  });
}

struct VoteArgs {
  bool p;
  uint32_t out;
};

void do_vote(Fiber* lanes, uint32_t mask) {
  uint32_t all = 0;
  each(mask, [&](int i) { all |= static_cast<uint32_t>(args<VoteArgs>(lanes, i).p) << i; });
  each(mask, [&](int i) { args<VoteArgs>(lanes, i).out = all; });
}

struct ReduxArgs {
  Reduce what;
  bool is_signed;
  uint32_t v;
};

uint32_t reduce(const ReduxArgs& a, uint32_t x, uint32_t y) {
  const bool less = a.is_signed ? static_cast<int32_t>(x) < static_cast<int32_t>(y) : x < y;
  switch (a.what) {
    case Reduce::add:
      return x + y;
    case Reduce::min:
      return less ? x : y;
    case Reduce::max:
      return less ? y : x;
    case Reduce::and_:
      return x & y;
    case Reduce::or_:
      return x | y;
    default:
      return x ^ y;
  }
}

void do_redux(Fiber* lanes, uint32_t mask) {
  const ReduxArgs first = args<ReduxArgs>(lanes, __builtin_ctz(mask));
  uint32_t sum = first.v;
  each(mask & (mask - 1), [&](int i) { sum = reduce(first, sum, args<ReduxArgs>(lanes, i).v); });
  each(mask, [&](int i) { args<ReduxArgs>(lanes, i).v = sum; });
}

struct MatrixArgs {
  uint32_t* r;
  int count;
  bool trans;
  char* row;
};

// Two rows of one 8x8 matrix in the same four banks of 32 take turns.
void count_conflicts(Fiber* lanes, int matrices) {
  for (int m = 0; m < matrices; m++) {
    unsigned banks = 0;
    for (int i = 0; i < 8; i++) banks |= 1u << ((args<MatrixArgs>(lanes, m * 8 + i).row - arena) / 16 & 7);
    counts.ldmatrix_conflicts += 8 - __builtin_popcount(banks);
  }
}

void need_whole_warp(uint32_t mask, const Fiber& f) {
  if (mask != ~0u)
    fail_at("instruction of a whole warp with lanes that have ended, or a block of part of a warp", f.site);
}

void do_ldmatrix(Fiber* lanes, uint32_t mask) {
  const auto a = args<MatrixArgs>(lanes, __builtin_ctz(mask));
  need_whole_warp(mask, lanes[__builtin_ctz(mask)]);
  uint16_t m[4][8][8];
  if (checking) counts.ldmatrix++, count_conflicts(lanes, a.count);
  for (int i = 0; i < 8 * a.count; i++) {
    const char* row = args<MatrixArgs>(lanes, i).row;
    if (checking) touch_by(lanes[i], row, 16, Access::read, lanes[i].site);
    memcpy(m[i / 8][i % 8], row, 16);
  }
  for (int t = 0; t < 32; t++)
    for (int q = 0; q < a.count; q++) {
      const int r = t / 4, c = 2 * (t % 4);
      const uint32_t low = a.trans ? m[q][c][r] : m[q][r][c], high = a.trans ? m[q][c + 1][r] : m[q][r][c + 1];
      args<MatrixArgs>(lanes, t).r[q] = low | high << 16;
    }
}

void do_stmatrix(Fiber* lanes, uint32_t mask) {
  const auto a = args<MatrixArgs>(lanes, __builtin_ctz(mask));
  need_whole_warp(mask, lanes[__builtin_ctz(mask)]);
  uint16_t m[4][8][8];
  for (int t = 0; t < 32; t++)
    for (int q = 0; q < a.count; q++) {
      const int r = t / 4, c = 2 * (t % 4);
      const uint32_t v = args<MatrixArgs>(lanes, t).r[q];
      (a.trans ? m[q][c][r] : m[q][r][c]) = static_cast<uint16_t>(v);
      (a.trans ? m[q][c + 1][r] : m[q][r][c + 1]) = static_cast<uint16_t>(v >> 16);
    }
  for (int i = 0; i < 8 * a.count; i++) {
    char* row = args<MatrixArgs>(lanes, i).row;
    if (checking) touch_by(lanes[i], row, 16, Access::write, lanes[i].site);
    memcpy(row, m[i / 8][i % 8], 16);
  }
}

struct MmaArgs {
  Element e;
  int k;
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

// Element i of the k that one register pair of a thread holds: 32-bit registers hold two 16-bit elements or one tf32.
float element(Element e, uint32_t v, int half) {
  if (e == Element::tf32) return as<float>(v & ~0x1fffu);
  const auto bits = static_cast<uint16_t>(v >> 16 * half);
  return e == Element::bf16 ? wide(bf16{bits}) : wide(f16{bits});
}

// The fragment layouts of the PTX ISA, 9.7.14: registers come in groups of 4 columns of threads, `per` elements each.
void do_mma(Fiber* lanes, uint32_t mask) {
  need_whole_warp(mask, lanes[__builtin_ctz(mask)]);
  const auto first = args<MmaArgs>(lanes, 0);
  const int per = first.e == Element::tf32 ? 1 : 2, steps = first.k / (4 * per);
  float A[16][16], B[16][8], C[16][8];
  for (int t = 0; t < 32; t++) {
    const auto& x = args<MmaArgs>(lanes, t);
    const int g = t / 4, q = t % 4;
    for (int s = 0; s < steps; s++)
      for (int h = 0; h < per; h++) {
        const int k = s * 4 * per + q * per + h;
        A[g][k] = element(x.e, x.a[2 * s], h);
        A[g + 8][k] = element(x.e, x.a[2 * s + 1], h);
        B[k][g] = element(x.e, x.b[s], h);
      }
    for (int i = 0; i < 4; i++) C[g + i / 2 * 8][2 * q + i % 2] = x.c[i];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < first.k; k++)
      for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
  for (int t = 0; t < 32; t++)
    for (int i = 0; i < 4; i++) args<MmaArgs>(lanes, t).d[i] = C[t / 4 + i / 2 * 8][2 * (t % 4) + i % 2];
  counts.mma++;
  counts.mma_flops += 2ull * 16 * 8 * first.k;
}

struct MmaBytesArgs {
  int k;
  uint32_t* d;
  const uint32_t *a, *b, *c;
};

int32_t byte_of(uint32_t v, int i) { return static_cast<int8_t>(v >> 8 * i); }

// Registers hold four neighbours of a row; those of 16 elements belong together.
void do_mma_bytes(Fiber* lanes, uint32_t mask) {
  need_whole_warp(mask, lanes[__builtin_ctz(mask)]);
  const int depth = args<MmaBytesArgs>(lanes, 0).k;
  int32_t A[16][32], B[32][8];
  uint32_t C[16][8];
  for (int t = 0; t < 32; t++) {
    const auto& x = args<MmaBytesArgs>(lanes, t);
    const int g = t / 4, q = t % 4;
    for (int s = 0; s < depth / 16; s++)
      for (int h = 0; h < 4; h++) {
        const int k = 16 * s + 4 * q + h;
        A[g][k] = byte_of(x.a[2 * s], h);
        A[g + 8][k] = byte_of(x.a[2 * s + 1], h);
        B[k][g] = byte_of(x.b[s], h);
      }
    for (int i = 0; i < 4; i++) C[g + i / 2 * 8][2 * q + i % 2] = x.c[i];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < 8; j++) C[i][j] += static_cast<uint32_t>(A[i][k] * B[k][j]);
  for (int t = 0; t < 32; t++)
    for (int i = 0; i < 4; i++) args<MmaBytesArgs>(lanes, t).d[i] = C[t / 4 + i / 2 * 8][2 * (t % 4) + i % 2];
  counts.mma++;
  counts.mma_flops += 2ull * 16 * 8 * depth;
}

// The registers of an A operand with the middle two exchanged, or the two that there are.
const uint32_t* swap_operand(const uint32_t* a, int n, uint32_t (&to)[4]) {
  for (int i = 0; i < n; i++) to[i] = a[i];
  std::swap(to[n == 4 ? 1 : 0], to[n == 4 ? 2 : 1]);
  return to;
}

}  // namespace

uint32_t shfl(Shfl mode, uint32_t v, uint32_t b, uint32_t c, uint32_t mask, bool* inside, uint32_t site) {
  ShflArgs a{mode, v, b, c, 0, site, false};
  collective(Op::shfl, &a, do_shfl, mask, site, false);
  if (inside) *inside = a.inside;
  return a.out;
}

uint32_t ballot(bool p, uint32_t mask, uint32_t site) {
  VoteArgs a{p, 0};
  collective(Op::vote, &a, do_vote, mask, site, false);
  return a.out;
}

uint32_t redux(Reduce what, bool is_signed, uint32_t v, uint32_t mask, uint32_t site) {
  ReduxArgs a{what, is_signed, v};
  collective(Op::reduce, &a, do_redux, mask, site, false);
  return a.v;
}

void ldmatrix(uint32_t* r, int count, bool trans, const char* row, uint32_t site) {
  MatrixArgs a{r, count, trans != plant(Plant::flip, site), const_cast<char*>(row)};
  collective(Op::ldmatrix, &a, do_ldmatrix, ~0u, site, true);
}

void stmatrix(const uint32_t* r, int count, bool trans, char* row, uint32_t site) {
  MatrixArgs a{const_cast<uint32_t*>(r), count, trans != plant(Plant::flip, site), row};
  collective(Op::stmatrix, &a, do_stmatrix, ~0u, site, true);
}

void mma(Element e, int k, float* d, const uint32_t* a, const uint32_t* b, const float* c, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  uint32_t swapped[4];
  if (plant(Plant::swap, site)) a = swap_operand(a, k * (e == Element::tf32 ? 2 : 1) / 4, swapped);
  MmaArgs x{e, k, d, a, b, c};
  collective(Op::mma, &x, do_mma, ~0u, site, true);
}

void mma_bytes(int k, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t site) {
  if (plant(Plant::skip, site)) return;
  uint32_t swapped[4];
  if (plant(Plant::swap, site)) a = swap_operand(a, k / 8, swapped);
  MmaBytesArgs x{k, d, a, b, c};
  collective(Op::mma, &x, do_mma_bytes, ~0u, site, true);
}

}  // namespace emu

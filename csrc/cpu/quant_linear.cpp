// x by rows of codes. A "piece" is 8 * lanes elements of a row: one vector of int4 or NF4 codes, two of int8. Codes
// stay in the order of memory, and x is put in the order in which a vector of codes comes apart by shifts.
#include "cpu/quant_linear.h"

#include "cpu/quant_bytes.h"
#include "cpu/quant_math.h"
#include "cpu/quant_matrix.h"

namespace mk::MK_ISA {
namespace {

constexpr int piece = 8 * lanes, together = lanes == 16 ? 8 : 4;

int64_t pieces_of(int64_t k) { return (k + piece - 1) / piece; }

// ---- x as the kernels take it ----

// Of each row: the pieces (16 or 32 bits an element), what int4's eights take away or what offsets multiply, scales.
struct Prepared {
  const int16_t* halves;
  const float* floats;
  const int32_t* start;  // minus 8 times the sums over the elements of each lane
  const float *sums, *scale;
};

struct Layout {
  int64_t pieces, sums, scale, row;  // offsets in bytes
  explicit Layout(int64_t k)
      : pieces(pieces_of(k)),
        sums(pieces * piece * int64_t{sizeof(float)}),
        scale(sums + pieces * lanes * 8),
        row(round_up(scale + pieces * 4, 64)) {}
  Prepared at(char* memory, int64_t i) const {
    const char* p = memory + i * row;
    const auto* const start = (const int32_t*)(p + sums);
    return {(const int16_t*)p, (const float*)p, start, (const float*)(start + pieces * lanes),
            (const float*)(p + scale)};
  }
};

// Whether x in int16 is taken as two bytes: where a product of bytes has a sign on one side only that must be x's.
constexpr bool in_digits(Codes kind) { return kind == Codes::int4 ? MK_BF16 : kind == Codes::int8 && MK_AMX; }

#if MK_BF16

// One row of x by int4 codes is as quick without the matrix unit.
DigitLayout digit_layout(const QuantWeight& w, int64_t rows) {
  return DigitLayout(w, rows, MK_AMX && (rows > 1 || w.kind == Codes::int8));
}

#endif

int64_t prepared_bytes(const QuantWeight& w, int64_t rows) {
  int64_t bytes = Layout(w.k).row * rows;
#if MK_BF16
  const DigitLayout l = digit_layout(w, rows);
  if (bytes < l.block * l.blocks) bytes = l.block * l.blocks;
#endif
  return bytes;
}

// Elements of even places and of odd ones: what the low and the high bytes of half words are multiplied by. Of a block
// of half-byte codes they are those of its first half, and so on for its second.
template <bool half_bytes>
MK_INLINE void order_halves(const int16_t* from, int16_t* to) {
  for (int t = 0; t < piece / 16; t++) {
    const auto a = load_words<octet>(from + 16 * t), b = load_words<octet>(from + 16 * t + 8);
    const octet even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    const octet odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
    constexpr int row = 2 * lanes, in_vector = lanes / 4;
    int16_t* at = half_bytes ? to + t % 2 * row + t / 2 * 8 : to + t / in_vector * 2 * row + t % in_vector * 8;
    store_words(at, even);
    store_words(at + (half_bytes ? 2 : 1) * row, odd);
  }
}

// Elements by their place in words of four bytes, likewise.
template <bool half_bytes>
MK_INLINE void order_floats(const float* from, float* to) {
  for (int t = 0; t < piece / 16; t++) {
    quad q[4];
    for (int i = 0; i < 4; i++) q[i] = load_words<quad>(from + 16 * t + 4 * i);
    const quad a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5), b = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5);
    const quad c = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7), d = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    const quad out[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                         __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
    constexpr int in_vector = lanes / 4;
    float* at = half_bytes ? to + t % 2 * lanes + t / 2 * 4 : to + t / in_vector * 4 * lanes + t % in_vector * 4;
    for (int i = 0; i < 4; i++) store_words(at + i * (half_bytes ? 2 : 1) * lanes, out[i]);
  }
}

MK_INLINE void sum_lanes(const int16_t* from, int32_t* start, float* sums, float scale) {
  vi total = {};
  for (int v = 0; v < 4; v++) total = dot_pairs(total, load_words<vs>(from + v * 2 * lanes), vs{} + int16_t{1});
  store_words(start, total * -8);
  store(sums, to_float(total) * scale);
}

template <bool half_bytes>
MK_INLINE bool prepare_halves(const float* x, int16_t* to, int32_t* start, float* sums, float* scale) {
  const float most = largest_for_int16<piece>(x);
  if (most < 0) return false;
  const float per_unit = most > 0 ? 32767.f / most : 0.f;
  int16_t rounded[piece];
  for (int i = 0; i < piece; i += lanes) store_words(rounded + i, narrow((vu)to_int(load(x + i) * per_unit)));
  order_halves<half_bytes>(rounded, to);
  *scale = most / 32767.f;
  if (half_bytes) sum_lanes(to, start, sums, *scale);
  return true;
}

template <bool half_bytes>
MK_INLINE void prepare_floats(const float* x, float* to, float* sums) {
  order_floats<half_bytes>(x, to);
  vf total = {};
  for (int v = 0; v < 8; v++) total += load(to + v * lanes);
  store(sums, total);
}

template <class T, bool half_bytes>
bool prepare_row(const T* x, int64_t k, bool fixed, const Prepared& p) {
  for (int64_t c = 0; c * piece < k; c++) {
    float values[piece];
    load_piece<piece>(x, c * piece, k, values);
    if (!fixed)
      prepare_floats<half_bytes>(values, (float*)p.floats + c * piece, (float*)p.sums + c * lanes);
    else if (!prepare_halves<half_bytes>(values, (int16_t*)p.halves + c * piece, (int32_t*)p.start + c * lanes,
                                         (float*)p.sums + c * lanes, (float*)p.scale + c))
      return false;
  }
  return true;
}

template <class T>
bool prepare(const QuantWeight& w, const QuantRows& rows) {
#if MK_BF16
  if (rows.fixed && in_digits(w.kind)) return prepare_digits<T>(w, rows, digit_layout(w, rows.rows));
#endif
  const Layout layout(w.k);
  for (int64_t i = 0; i < rows.rows; i++) {
    const T* x = (const T*)rows.x + i * rows.x_row;
    const Prepared p = layout.at(rows.memory, i);
    if (!(w.kind == Codes::int8 ? prepare_row<T, false>(x, w.k, rows.fixed, p)
                                : prepare_row<T, true>(x, w.k, rows.fixed, p)))
      return false;
  }
  return true;
}

// ---- one piece of x by one of codes ----

// `vectors` of codes in a piece; each times its part of x is one vector of sums, which a scale multiplies.
template <Codes kind, bool fixed>
struct Product {
  static constexpr int vectors = kind == Codes::int8 ? 2 : 1;

  // Of int8 codes by x in int16, added to a sum.
  MK_INLINE vi add(vi sum, const uint8_t* codes, const Prepared& p, int64_t c, int v) {
    const int16_t* x = p.halves + c * piece + v * 4 * lanes;
    const vs w = load_words<vs>(codes);
    return dot_pairs(dot_pairs(sum, w << 8 >> 8, load_words<vs>(x)), w >> 8, load_words<vs>(x + 2 * lanes));
  }

  MK_INLINE vf of(const uint8_t* codes, const Prepared& p, int64_t c, int v) {
    if constexpr (fixed && kind == Codes::int8) {
      return to_float(add(vi{}, codes, p, c, v));
    } else if constexpr (fixed) {
      const int16_t* x = p.halves + c * piece + v * 4 * lanes;
      const vs w = load_words<vs>(codes);
      const auto part = [&](int i) __attribute__((always_inline)) { return load_words<vs>(x + i * 2 * lanes); };
      vi sum = load_words<vi>(p.start + c * lanes);
      sum = dot_pairs(sum, w & 15, part(0));
      sum = dot_pairs(sum, w >> 4 & 15, part(1));
      sum = dot_pairs(sum, w >> 8 & 15, part(2));
      return to_float(dot_pairs(sum, (vs)((vus)w >> 12), part(3)));
    } else {
      const float* x = p.floats + c * piece + v * 4 * lanes;
      vf sum[2] = {};
      if constexpr (kind == Codes::int8) {
        const vi w = load_words<vi>(codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i % 2] += to_float(w << (24 - 8 * i) >> 24) * load(x + i * lanes);
      } else {
        const vu w = load_words<vu>(codes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
          sum[i % 2] += lookup(kind == Codes::int4 ? int4_table : nf4_table, w >> 4 * i) * load(x + i * lanes);
      }
      return sum[0] + sum[1];
    }
  }
};

// Adds one piece of `together` rows; a row has `per_piece` scales for it, or 0 where its one scale comes at the end.
template <Codes kind, bool fixed, int per_piece, bool with_offset>
MK_INLINE void add_piece(const Prepared& p, int64_t c, const uint8_t* const* codes, const float* const* scale,
                         const float* const* offset, vf* sums) {
  using P = Product<kind, fixed>;
  constexpr int parts = per_piece > P::vectors ? per_piece / P::vectors : 1;
#pragma GCC unroll 8
  for (int r = 0; r < together; r++) {
    if constexpr (fixed && kind == Codes::int8 && per_piece <= 1) {
      vf by = set1(p.scale[c]);
      if constexpr (per_piece) by *= *scale[r];
      sums[r] += to_float(P::add(P::add(vi{}, codes[r], p, c, 0), codes[r] + 4 * lanes, p, c, 1)) * by;
      continue;
    }
#pragma GCC unroll 2
    for (int v = 0; v < P::vectors; v++) {
      if constexpr (!per_piece) {
        sums[r] += P::of(codes[r] + v * 4 * lanes, p, c, v) * p.scale[c];
        continue;
      }
      const int at = v * per_piece / P::vectors;
      vf by = spread<parts>(scale[r] + at);
      if constexpr (fixed) by *= p.scale[c];
      sums[r] += P::of(codes[r] + v * 4 * lanes, p, c, v) * by;
      if constexpr (with_offset) sums[r] += spread<parts>(offset[r] + at) * load(p.sums + c * lanes);
    }
  }
}

// The last piece of a row, where less than a whole one is left. What follows in memory is multiplied by zeros; where
// nothing follows the codes are copied, and scales are, since those of another row need not be finite.
template <Codes kind, bool fixed, int per_piece, bool with_offset>
MK_INLINE void add_rest(const QuantWeight& w, const Prepared& p, int64_t c, const uint8_t* const* codes,
                        const float* const* scale, const float* const* offset, vf* sums) {
  constexpr int bytes = Product<kind, fixed>::vectors * 4 * lanes;
  uint8_t copied[together][bytes];
  float scales[2][together][4];
  const uint8_t* from[together];
  const float *by[together], *more[together];
  const int64_t row_bytes = code_bytes(kind, w.k);
  const uint8_t* const end = w.codes + (w.n - 1) * w.row + row_bytes;
  const int64_t at = w.group >= piece ? c * piece / w.group : c * per_piece, have = least(per_piece, w.groups - at);
  for (int r = 0; r < together; r++) {
    from[r] = codes[r] + c * bytes, by[r] = scale[r] + at, more[r] = with_offset ? offset[r] + at : nullptr;
    if (end - from[r] < bytes) {
      __builtin_memset(copied[r], 0, bytes);
      __builtin_memcpy(copied[r], from[r], row_bytes - c * bytes);
      from[r] = copied[r];
    }
    if (per_piece <= 1) continue;
    for (int j = 0; j < per_piece; j++) {
      scales[0][r][j] = j < have ? by[r][j] : 0.f;
      if (with_offset) scales[1][r][j] = j < have ? more[r][j] : 0.f;
    }
    by[r] = scales[0][r], more[r] = scales[1][r];
  }
  add_piece<kind, fixed, per_piece, with_offset>(p, c, from, by, more, sums);
}

// out[r] = x . weight[n + r] for r < together; past `count` the last row once more.
template <Codes kind, bool fixed, int per_piece, bool with_offset>
__attribute__((noinline)) void dots(const QuantWeight& w, const Prepared& p, int64_t n, int64_t count, float* out) {
  constexpr int bytes = Product<kind, fixed>::vectors * 4 * lanes;
  const uint8_t *codes[together], *from[together];
  const float *scale[together], *offset[together] = {}, *by[together], *more[together] = {};
  for (int r = 0; r < together; r++) {
    const int64_t row = n + least(r, count - 1);
    codes[r] = w.codes + row * w.row;
    scale[r] = w.scale + row * w.groups;
    if (with_offset) offset[r] = w.offset + row * w.groups;
  }
  vf sums[together] = {};
  const int64_t whole = w.k / piece, in_group = w.group >= piece ? least(w.group / piece, w.k + 1) : 1;
  for (int64_t c = 0, g = 0; c < whole; g++)
    for (int64_t end = least(whole, c + in_group); c < end; c++) {
#pragma GCC unroll 8
      for (int r = 0; r < together; r++) {
        from[r] = codes[r] + c * bytes;
      // The rows that follow: a row is mostly shorter than what the processor's own prefetching takes to see it.
#pragma GCC unroll 2
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from[r] + together * w.row + line, 0, 2);
        by[r] = scale[r] + g * per_piece;
        if constexpr (with_offset) more[r] = offset[r] + g * per_piece;
      }
      add_piece<kind, fixed, per_piece, with_offset>(p, c, from, by, more, sums);
    }
  if (whole * piece < w.k) add_rest<kind, fixed, per_piece, with_offset>(w, p, whole, codes, scale, offset, sums);
  constexpr int at_once = together < lanes ? together : lanes;
  for (int r = 0; r < together; r += at_once) {
    vf t[at_once];
    for (int j = 0; j < at_once; j++) t[j] = sums[r + j];
    const vf all = sum_each(t);
    for (int j = 0; j < at_once; j++) out[r + j] = per_piece ? all[j] : all[j] * *scale[r + j];
  }
}

using Dots = void (*)(const QuantWeight&, const Prepared&, int64_t, int64_t, float*);

template <Codes kind, bool fixed, bool with_offset>
Dots by_groups(const QuantWeight& w) {
  const int64_t per_piece = w.group >= piece ? 1 : piece / w.group;
  // x in int16 is within 1e30, so that codes times x overflow in no row; any other x needs its scale at once.
  if constexpr (fixed && !with_offset)
    if (w.groups == 1) return dots<kind, fixed, 0, with_offset>;
  if (per_piece == 1) return dots<kind, fixed, 1, with_offset>;
  if constexpr (piece >= 64)
    if (per_piece == 2) return dots<kind, fixed, 2, with_offset>;
  if constexpr (piece >= 128) return dots<kind, fixed, 4, with_offset>;
  return nullptr;
}

template <bool fixed>
Dots dots_of(const QuantWeight& w) {
  if constexpr (!fixed || !in_digits(Codes::int8))
    if (w.kind == Codes::int8) return by_groups<Codes::int8, fixed, false>(w);
  if constexpr (!fixed || !in_digits(Codes::int4))
    if (w.kind == Codes::int4)
      return w.offset ? by_groups<Codes::int4, fixed, true>(w) : by_groups<Codes::int4, fixed, false>(w);
  return by_groups<Codes::nf4, false, false>(w);
}

#if MK_BF16

template <class T>
void run_digits(const QuantWeight& w, const QuantRows& rows, const QuantShare& share) {
  const DigitLayout l = digit_layout(w, rows.rows);
#if MK_AMX
  if (l.matrix) return run_matrix<T>(w, rows, share, l);
#endif
  run_bytes<T>(w, rows, share, l);
}

#endif

template <class T>
void run(const QuantWeight& w, const QuantRows& rows, const QuantShare& share) {
#if MK_BF16
  if (rows.fixed && in_digits(w.kind)) return run_digits<T>(w, rows, share);
#endif
  const Layout layout(w.k);
  const Dots dot = rows.fixed ? dots_of<true>(w) : dots_of<false>(w);
  for (int64_t n = share.first; n < share.first + share.count; n += quant_group)
    for (int64_t i = 0; i < rows.rows; i++) {
      const int64_t count = least(quant_group, share.first + share.count - n);
      float sums[quant_group];
      for (int r = 0; r < count; r += together)
        dot(w, layout.at(rows.memory, i), n + r, least(together, count - r), sums + r);
      finish<T>(share, i, n, count, sums);
    }
}

// The matrix unit takes more, the fewer columns a row has. Of 17 rows by a weight of 14336 x 4096 that is a quarter of
// the time, of 48 less than half.
int64_t few_rows(const QuantWeight& w) {
  if (!MK_AMX || !in_digits(w.kind) || w.group < 64) return few_quant_rows;
  return w.group < 128 ? 24 : 48;
}

// ---- the weight itself, for torch's matrix product ----

// 32 elements, of which `count` are there.
template <Codes kind, class T>
MK_INLINE void dequantise_block(const uint8_t* bytes, float scale, float offset, int64_t count, T* to) {
  for (int i = 0; i < 32; i += lanes) {
    vf v;
    if constexpr (kind == Codes::int8) {
      v = to_float((vi)bytes_at(bytes + i) << 24 >> 24) * scale;
    } else {
      const vu code = bytes_at(bytes + i % 16) >> (i < 16 ? 0 : 4);
      v = lookup(kind == Codes::int4 ? int4_table : nf4_table, code) * scale;
      if constexpr (kind == Codes::int4) v += offset;
    }
    if (i + lanes <= count)
      store(to + i, v);
    else if (i < count)
      store_n(to + i, v, count - i);
  }
}

template <Codes kind, class T>
void dequantise_row(const QuantWeight& w, int64_t row, T* to) {
  const uint8_t* codes = w.codes + row * w.row;
  const float *scale = w.scale + row * w.groups, *offset = w.offset ? w.offset + row * w.groups : nullptr;
  constexpr int bytes = kind == Codes::int8 ? 32 : 16;
  for (int64_t k = 0; k < w.k; k += 32, codes += bytes) {
    const int64_t g = k / w.group, count = least(32, w.k - k);
    const float zero = offset ? offset[g] : 0.f;
    if (count == 32 || kind != Codes::int8) {
      dequantise_block<kind, T>(codes, scale[g], zero, count, to + k);
    } else {
      uint8_t copied[32] = {};
      __builtin_memcpy(copied, codes, count);
      dequantise_block<kind, T>(copied, scale[g], zero, count, to + k);
    }
  }
}

template <class T>
void dequantise(const QuantWeight& w, int64_t row, void* to) {
  if (w.kind == Codes::int8)
    dequantise_row<Codes::int8>(w, row, (T*)to);
  else if (w.kind == Codes::int4)
    dequantise_row<Codes::int4>(w, row, (T*)to);
  else
    dequantise_row<Codes::nf4>(w, row, (T*)to);
}

}  // namespace

const QuantLinearKernels quant_linear = {
    few_rows,
    prepared_bytes,
    {prepare<float>, prepare<bf16>, prepare<f16>, nullptr},
    {run<float>, run<bf16>, run<f16>, nullptr},
    {dequantise<float>, dequantise<bf16>, dequantise<f16>, nullptr},
};

}  // namespace mk::MK_ISA

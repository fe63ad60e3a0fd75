// Rows of int8 by rows of int8. Of few rows neither is packed, since both lie along k: a tile of vectors of sums takes
// a load of each row for as many products as the tile has, and is added up across lanes once a block of k. Of many rows
// the weight is put in panels, so that lanes are outputs.
#include "cpu/int8_product.h"

#include "cpu/matrix.h"
#include "cpu/quant_math.h"

namespace mk::MK_ISA {
namespace {

constexpr int tile_rows = lanes == 16 ? 6 : 2, tile_outputs = 4;
// 12 rows of x by 2048 stay in the first-level cache while 64 rows of codes come by from the second.
constexpr int64_t most_rows = 12, most_outputs = 64, block = 2048;
using Sums = int64_t[most_rows][tile_outputs];

MK_INLINE vi some_codes(const uint8_t* p, int64_t count) {
  vi v = {};
  __builtin_memcpy(&v, p, count < 4 * lanes ? count : 4 * lanes);
  return v;
}

// sums[i][r] += x[i] . w[r] over `count` bytes; x is readable to the next multiple of a vector.
template <int rows>
__attribute__((noinline)) void tile(const uint8_t* x, int64_t x_row, const uint8_t* const* w, int64_t count,
                                    int64_t (*sums)[tile_outputs]) {
  vi c[rows][tile_outputs] = {};
  const auto step = [&](int64_t at, auto load_w) __attribute__((always_inline)) {
    vi b[tile_outputs];
#pragma GCC unroll 4
    for (int r = 0; r < tile_outputs; r++) b[r] = load_w(w[r] + at);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const vi a = load_words<vi>(x + i * x_row + at);
#pragma GCC unroll 4
      for (int r = 0; r < tile_outputs; r++) c[i][r] = dot_bytes(c[i][r], a, b[r]);
    }
  };
  int64_t at = 0;
  for (; at + 4 * lanes <= count; at += 4 * lanes) step(at, [](const uint8_t* p) { return load_words<vi>(p); });
  if (at < count) step(at, [=](const uint8_t* p) { return some_codes(p, count - at); });
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    const vi all = sum_each(c[i]);
#pragma GCC unroll 4
    for (int r = 0; r < tile_outputs; r++) sums[i][r] += all[r];
  }
}

int64_t sum_codes(const uint8_t* w, int64_t count) {
  const vi ones = set1(0x01010101);
  vi c = {};
  int64_t at = 0;
  for (; at + 4 * lanes <= count; at += 4 * lanes) c = dot_bytes(c, ones, load_words<vi>(w + at));
  if (at < count) c = dot_bytes(c, ones, some_codes(w + at, count - at));
  return fold<lanes / 2>(c, [](vi a, vi b) { return a + b; });
}

void tiles(const Int8Product& a, int64_t first, int64_t rows, int64_t at, const uint8_t* const* w, int64_t count,
           int64_t (*sums)[tile_outputs]) {
  constexpr decltype(&tile<1>) of[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  for (int64_t i = 0; i < rows; i += tile_rows)
    of[least(tile_rows, rows - i) - 1](a.x + (first + i) * a.x_row + at, a.x_row, w, count, sums + i);
}

// The products of one group's columns [begin, end).
void multiply_group(const Int8Product& a, int64_t first, int64_t rows, int64_t n, int64_t count, int64_t begin,
                    int64_t end, Sums* sums) {
  const QuantWeight& weight = *a.weight;
  for (int64_t k = begin; k < end; k += block)
    for (int64_t r = 0; r < count; r += tile_outputs) {
      const uint8_t* w[tile_outputs];
      for (int j = 0; j < tile_outputs; j++) w[j] = weight.codes + (n + least(r + j, count - 1)) * weight.row + k;
      tiles(a, first, rows, k, w, least(block, end - k), sums[r / tile_outputs]);
    }
}

// Up to most_rows by most_outputs, into floats. `of_codes` is the sum of each row of codes, where it is one group.
void multiply_block(const Int8Product& a, int64_t first, int64_t rows, int64_t n, int64_t count,
                    const int64_t* of_codes, float (*out)[most_outputs]) {
  const QuantWeight& weight = *a.weight;
  for (int64_t g = 0; g < weight.groups; g++) {
    const int64_t begin = g * weight.group, end = weight.groups == 1 ? weight.k : least(weight.k, begin + weight.group);
    Sums sums[most_outputs / tile_outputs] = {};
    multiply_group(a, first, rows, n, count, begin, end, sums);
    for (int64_t r = 0; r < count; r++) {
      const int64_t sum =
          weight.groups == 1 ? of_codes[r] : sum_codes(weight.codes + (n + r) * weight.row + begin, end - begin);
      const float scale = weight.scale[(n + r) * weight.groups + g];
      for (int64_t i = 0; i < rows; i++) {
        const float product =
            (float)(sums[r / tile_outputs][i][r % tile_outputs] - 128 * sum);  // of codes: x has 128 more
        out[i][r] += product * a.x_scale[first + i] * scale;
      }
    }
  }
}

template <class T>
void multiply(const Int8Product& a) {
  const int64_t last = a.share.first + a.share.count;
  for (int64_t n = a.share.first; n < last; n += most_outputs) {
    const int64_t count = least(most_outputs, last - n);
    int64_t of_codes[most_outputs];
    for (int64_t r = 0; r < count && a.weight->groups == 1; r++)
      of_codes[r] = sum_codes(a.weight->codes + (n + r) * a.weight->row, a.weight->k);
    for (int64_t first = 0; first < a.rows; first += most_rows) {
      const int64_t rows = least(most_rows, a.rows - first);
      float out[most_rows][most_outputs] = {};
      multiply_block(a, first, rows, n, count, of_codes, out);
      for (int64_t i = 0; i < rows; i++) finish<T>(a.share, first + i, n, count, out[i]);
    }
  }
}

// ---- many rows ----

// A word is what a lane multiplies at once: four bytes, or where no instruction takes bytes, two half words. A panel
// has the words of tile_vectors * lanes outputs side by side, one step of k after the other.
#if MK_BF16
constexpr int64_t in_word = 4;
#else
constexpr int64_t in_word = 2;
#endif
constexpr int many_rows = 6, tile_vectors = lanes == 16 ? 4 : 2;  // 24 or 12 registers of sums
constexpr int64_t panel_outputs = tile_vectors * lanes, panels = most_outputs / panel_outputs;
#if MK_AMX
// Sums stay in registers for so many codes a row. A panel and so many rows of x are in the second-level cache.
constexpr int64_t many_block = 4096, most_many = 256, row_unit = 2 * matrix_rows;
#else
// A panel of so many codes a row stays in the first-level cache, and so many rows of x, which come by once for each
// panel, in the second.
constexpr int64_t many_block = 512, most_many = lanes == 16 ? 384 : 192, row_unit = many_rows;
#endif

// Where a panel has a step of one of its vectors: the matrix unit takes one vector's steps in one piece.
constexpr int64_t panel_steps = many_block / in_word;
constexpr int64_t place(int64_t step, int64_t v) { return MK_AMX ? v * panel_steps + step : step * tile_vectors + v; }

struct Many {
  vi panel[panels][panel_steps * tile_vectors];
  int32_t sums[most_many][most_outputs];
  float out[most_many][most_outputs];
  int32_t of_codes[most_outputs];
  float scale[most_outputs];
};

// sums[i][...] += the products of `steps` words of `rows` rows of x with a panel's.
template <int rows>
__attribute__((noinline)) void many_tile(const uint8_t* x, int64_t x_row, const vi* panel, int64_t steps,
                                         int32_t (*sums)[most_outputs]) {
  vi c[rows][tile_vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; v++) c[i][v] = load_words<vi>(sums[i] + v * lanes);
  int64_t s = 0;
  do {  // at least one: where none is possible the compiler keeps the sums in memory beside it
    vi w[tile_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; v++) w[v] = panel[place(s, v)];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      int32_t word;
      __builtin_memcpy(&word, x + i * x_row + s * 4, sizeof word);
      const vi a = set1(word);
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; v++) {
        if constexpr (in_word == 4)
          c[i][v] = dot_bytes(c[i][v], a, w[v]);
        else
          c[i][v] = dot_pairs(c[i][v], (vs)a, (vs)w[v]);
      }
    }
  } while (++s < steps);
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; v++) store_words(sums[i] + v * lanes, c[i][v]);
}

// The words of one row of codes that a vector holds; past `count` codes zeros.
MK_INLINE vi row_words(const uint8_t* codes, int64_t count) {
  constexpr int64_t needed = in_word * lanes;
  if constexpr (in_word == 4) {
    return count >= needed ? load_words<vi>(codes) : some_codes(codes, count);
  } else {
    typedef int8_t some __attribute__((vector_size(2 * MK_LANES)));
    some c = {};
    if (count >= needed)
      c = load_words<some>(codes);
    else
      __builtin_memcpy(&c, codes, count);
#if defined(__AVX512BW__)
    return (vi)_mm512_cvtepi8_epi16((__m256i)c);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16((__m128i)c);
#else
    return (vi) __builtin_convertvector(c, vs);
#endif
  }
}

// The codes [k, k + count) of the outputs [n, n + outputs), in the order of the panels; further outputs, and codes up
// to a whole vector of words, are zeros.
void pack(const QuantWeight& w, int64_t n, int64_t outputs, int64_t k, int64_t count, Many& m) {
  const int64_t steps = (count + in_word - 1) / in_word;
  for (int64_t r = 0; r < most_outputs; r += lanes) {
    vi sum[2] = {load_words<vi>(m.of_codes + r)};
    for (int64_t s = 0; s < steps; s += lanes) {
      const int64_t at = s * in_word;
      vi t[lanes];
      const auto read = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
        t[i] = row_words(w.codes + (n + r + i) * w.row + k + at, left);
      };
      if (r + lanes <= outputs && at + in_word * lanes <= count) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; i++) read(i, in_word * lanes);
      } else {
        for (int64_t i = 0; i < lanes; i++) t[i] = vi{};
        for (int64_t i = 0; i < lanes && r + i < outputs; i++) read(i, count - at);
      }
      transpose(t);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; i++) {
        m.panel[r / panel_outputs][place(s + i, r % panel_outputs / lanes)] = t[i];
        if constexpr (in_word == 4) sum[i % 2] = dot_bytes(sum[i % 2], set1(0x01010101), t[i]);
      }
    }
    store_words(m.of_codes + r, sum[0] + sum[1]);
  }
}

#if MK_AMX

// sums += the products of 16 MT rows of x with a panel's 64 outputs.
template <int MT>
void matrix_rows_of(const uint8_t* x, int64_t x_row, const vi* panel, int64_t steps, int32_t (*sums)[most_outputs]) {
  constexpr int64_t row = sizeof *panel;
  for (int v = 0; v < tile_vectors; v += 2)
    multiply_matrices<true, MT, 2>(x, x_row, {panel + place(0, v), row, panel_steps * row, matrix_words * row}, steps,
                                   sums[0] + v * lanes, sizeof sums[0], false);
}

// The rows from the first one on that the matrix unit takes, by sixteens; how many that were. It takes 64 codes of x at
// once, which must not lie behind x's last row.
int64_t matrix_tiles(const uint8_t* x, int64_t x_row, int64_t left, int64_t rows, int64_t count, const vi* panel,
                     int32_t (*sums)[most_outputs]) {
  const int64_t steps = (count + 63) / 64;
  if (steps * 64 > left) return 0;
  const Matrices matrices;
  int64_t i = 0;
  for (; i + 2 * matrix_rows <= rows; i += 2 * matrix_rows)
    matrix_rows_of<2>(x + i * x_row, x_row, panel, steps, sums + i);
  if (i + matrix_rows > rows) return i;
  matrix_rows_of<1>(x + i * x_row, x_row, panel, steps, sums + i);
  return i + matrix_rows;
}

#endif

void many_tiles(const Int8Product& a, int64_t first, int64_t rows, int64_t outputs, int64_t k, int64_t count, Many& m) {
  constexpr decltype(&many_tile<1>) of[] = {many_tile<1>, many_tile<2>, many_tile<3>,
                                            many_tile<4>, many_tile<5>, many_tile<6>};
  const int64_t steps = (count + in_word - 1) / in_word;
  const int64_t at = k * 4 / in_word;
  const uint8_t* x = a.x + first * a.x_row + at;
  for (int64_t p = 0; p * panel_outputs < outputs; p++) {
    const auto sums = [&](int64_t i) { return (int32_t (*)[most_outputs])(m.sums[i] + p * panel_outputs); };
    int64_t i = 0;
#if MK_AMX
    i = matrix_tiles(x, a.x_row, a.x_row - at, rows, count, m.panel[p], sums(0));
#endif
    for (; i < rows; i += many_rows)
      of[least(many_rows, rows - i) - 1](x + i * a.x_row, a.x_row, m.panel[p], steps, sums(i));
  }
}

// The sums of group g, scaled, are added to `out`, which the last one writes; they begin anew.
template <class T>
void add_group(const Int8Product& a, int64_t first, int64_t rows, int64_t n, int64_t outputs, int64_t g, Many& m) {
  for (int64_t r = 0; r < outputs; r++) m.scale[r] = a.weight->scale[(n + r) * a.weight->groups + g];
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t r = 0; r < most_outputs; r += lanes) {
      vi sum = load_words<vi>(m.sums[i] + r);
      store_words(m.sums[i] + r, vi{});
      if constexpr (in_word == 4) sum -= load_words<vi>(m.of_codes + r) * 128;  // x has 128 more
      const vf before = g ? load(m.out[i] + r) : vf{};
      store(m.out[i] + r, before + to_float(sum) * a.x_scale[first + i] * load(m.scale + r));
    }
    if (g + 1 == a.weight->groups) finish<T>(a.share, first + i, n, outputs, m.out[i]);
  }
  __builtin_memset(m.of_codes, 0, sizeof m.of_codes);
}

template <class T>
void many_block_of(const Int8Product& a, int64_t first, int64_t rows, int64_t n, int64_t outputs, Many& m) {
  const QuantWeight& w = *a.weight;
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t begin = g * w.group, end = w.groups == 1 ? w.k : least(w.k, begin + w.group);
    for (int64_t k = begin; k < end; k += many_block) {
      const int64_t count = least(many_block, end - k);
      pack(w, n, outputs, k, count, m);
      many_tiles(a, first, rows, outputs, k, count, m);
    }
    add_group<T>(a, first, rows, n, outputs, g, m);
  }
}

template <class T>
void multiply_many(const Int8Product& a, char* memory) {
  Many& m = *(Many*)memory;
  __builtin_memset(m.sums, 0, sizeof m.sums);
  __builtin_memset(m.of_codes, 0, sizeof m.of_codes);
  __builtin_memset(m.scale, 0, sizeof m.scale);
  // Blocks of x are about equally long: a short one would hardly pay for the panels.
  const int64_t blocks = (a.rows + most_many - 1) / most_many, last = a.share.first + a.share.count;
  const int64_t block_rows = round_up((a.rows + blocks - 1) / blocks, row_unit);
  for (int64_t first = 0; first < a.rows; first += block_rows)
    for (int64_t n = a.share.first; n < last; n += most_outputs)
      many_block_of<T>(a, first, least(block_rows, a.rows - first), n, least(most_outputs, last - n), m);
}

// ---- x ----

// codes = round(x / scale), plus 128 where they are bytes, with scale = max|x| / 127; a scale that is not finite where
// x is not.
template <class T, class Code>
void quantise_row(const void* from, int64_t k, uint8_t* codes, float* scale) {
  typedef Code words __attribute__((vector_size(sizeof(Code) * MK_LANES)));
  constexpr int32_t zero_code = sizeof(Code) == 1 ? 128 : 0;
  const T* x = (const T*)from;
  vf largest = {}, nothing = {};
  for (int64_t i = 0; i < k; i += lanes) {
    const vf v = i + lanes <= k ? load(x + i) : load_n(x + i, k - i);
    largest = max(magnitude(v), largest);
    nothing += v * 0.f;  // nan, where v is not finite
  }
  const float most = fold<lanes / 2>(largest, [](vf a, vf b) { return max(a, b); });
  const float zero = fold<lanes / 2>(nothing, [](vf a, vf b) { return a + b; });
  const bool finite = zero == 0;
  *scale = finite ? most / 127.f : __builtin_nanf("");
  const float by = finite ? *scale : 0.f;
  for (int64_t i = 0; i < round_up(k, int8_row_unit); i += lanes) {
    const int64_t count = k - i;
    const vf v = count >= lanes ? load(x + i) : load_n(x + i, count > 0 ? count : 0);
    const vi code = by > 0 ? to_int(v / by) + zero_code : set1(zero_code);
    store_words((Code*)codes + i, __builtin_convertvector(code, words));
  }
}

#if MK_BF16
using ManyCode = uint8_t;
#else
using ManyCode = int16_t;
#endif

}  // namespace

const Int8ProductKernels int8_product = {
    sizeof(ManyCode),
    sizeof(Many),
    {quantise_row<float, uint8_t>, quantise_row<bf16, uint8_t>, quantise_row<f16, uint8_t>, nullptr},
    {quantise_row<float, ManyCode>, quantise_row<bf16, ManyCode>, quantise_row<f16, ManyCode>, nullptr},
    {multiply<float>, multiply<bf16>, multiply<f16>, nullptr},
    {multiply_many<float>, multiply_many<bf16>, multiply_many<f16>, nullptr},
};

}  // namespace mk::MK_ISA

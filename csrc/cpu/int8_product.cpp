// Rows of int8 by rows of int8. Both lie along k, so neither is packed: a tile of vectors of sums takes a load of each
// row for as many products as the tile has, and is added up across lanes once a block of k.
#include "cpu/int8_product.h"

#include "cpu/quant_math.h"

namespace mk::MK_ISA {
namespace {

typedef uint8_t bytes __attribute__((vector_size(MK_LANES)));

constexpr int tile_rows = lanes == 16 ? 6 : 2, tile_outputs = 4;
constexpr int64_t most_rows = 96, block = 4096;  // of x at a time: 400 KB, which the second-level cache keeps

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

void sum_codes(const uint8_t* const* w, int64_t count, int64_t* sums) {
  const vi ones = set1(0x01010101);
  for (int r = 0; r < tile_outputs; r++) {
    vi c = {};
    int64_t at = 0;
    for (; at + 4 * lanes <= count; at += 4 * lanes) c = dot_bytes(c, ones, load_words<vi>(w[r] + at));
    if (at < count) c = dot_bytes(c, ones, some_codes(w[r] + at, count - at));
    sums[r] += fold<lanes / 2>(c, [](vi a, vi b) { return a + b; });
  }
}

void tiles(const Int8Product& a, int64_t first, int64_t rows, int64_t at, const uint8_t* const* w, int64_t count,
           int64_t (*sums)[tile_outputs]) {
  constexpr decltype(&tile<1>) of[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  for (int64_t i = 0; i < rows; i += tile_rows)
    of[least(tile_rows, rows - i) - 1](a.x + (first + i) * a.x_row + at, a.x_row, w, count, sums + i);
}

// One block of rows by up to tile_outputs outputs, into floats of `quant_group` a row.
void multiply_block(const Int8Product& a, int64_t first, int64_t rows, int64_t n, int64_t count, float* out) {
  const QuantWeight& weight = *a.weight;
  for (int64_t g = 0; g < weight.groups; g++) {
    const int64_t begin = g * weight.group, end = weight.groups == 1 ? weight.k : least(weight.k, begin + weight.group);
    int64_t sums[most_rows][tile_outputs] = {}, of_codes[tile_outputs] = {};
    for (int64_t k = begin; k < end; k += block) {
      const uint8_t* w[tile_outputs];
      for (int r = 0; r < tile_outputs; r++) w[r] = weight.codes + (n + least(r, count - 1)) * weight.row + k;
      const int64_t some = least(block, end - k);
      tiles(a, first, rows, k, w, some, sums);
      sum_codes(w, some, of_codes);
    }
    for (int64_t i = 0; i < rows; i++)
      for (int64_t r = 0; r < count; r++) {
        const float product = (float)(sums[i][r] - 128 * of_codes[r]);
        out[i * quant_group + r] += product * a.x_scale[first + i] * weight.scale[(n + r) * weight.groups + g];
      }
  }
}

template <class T>
void multiply(const Int8Product& a) {
  const int64_t last = a.share.first + a.share.count;
  for (int64_t first = 0; first < a.rows; first += most_rows) {
    const int64_t rows = least(most_rows, a.rows - first);
    for (int64_t n = a.share.first; n < last; n += quant_group) {
      float out[most_rows * quant_group] = {};
      const int64_t count = least(quant_group, last - n);
      for (int64_t r = 0; r < count; r += tile_outputs)
        multiply_block(a, first, rows, n + r, least(tile_outputs, count - r), out + r);
      for (int64_t i = 0; i < rows; i++) finish<T>(a.share, first + i, n, count, out + i * quant_group);
    }
  }
}

// codes = round(x / scale) + 128 with scale = max|x| / 127; a scale that is not finite where x is not.
template <class T>
void quantise_row(const void* from, int64_t k, uint8_t* codes, float* scale) {
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
    const vi code = by > 0 ? to_int(v / by) + 128 : set1(128);
    store_words(codes + i, __builtin_convertvector(code, bytes));
  }
}

}  // namespace

const Int8ProductKernels int8_product = {
    {quantise_row<float>, quantise_row<bf16>, quantise_row<f16>, nullptr},
    {multiply<float>, multiply<bf16>, multiply<f16>, nullptr},
};

}  // namespace mk::MK_ISA

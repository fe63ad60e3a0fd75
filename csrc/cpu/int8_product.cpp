// Rows of int8 by rows of int8. Both lie along k, so neither is packed: a tile of vectors of sums takes a load of each
// row for as many products as the tile has, and is added up across lanes once a block of k.
#include "cpu/int8_product.h"

#include "cpu/quant_math.h"

namespace mk::MK_ISA {
namespace {

typedef uint8_t bytes __attribute__((vector_size(MK_LANES)));

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

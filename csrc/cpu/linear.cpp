#include "cpu/linear.h"

#include "cpu/arithmetic.h"

namespace mk::MK_ISA {
namespace {

constexpr int group = linear_group;
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int most_rows = 2;  // of x at a time, with 4 of the weight: 16 registers hold their sums
#else
constexpr int most_rows = 4;
#endif

// sums[i][r] += x[i] . weight[r] over k elements, for MR rows of x and NR of the weight. A function of its own: inlined
// into a loop, what the sums across lanes permute by takes the registers of the products.
template <class T, int MR, int NR>
__attribute__((noinline)) void dots(const T* x, int64_t x_row, const T* const* weight, int64_t k, int64_t ahead,
                                    float (*sums)[group]) {
  using M = typename ArithmeticOf<T>::type;
  constexpr int reads = read_vectors<M, T>, unit = M::width * M::step * reads;
  typename M::Vec c[MR][NR] = {};
  const T *from[MR], *by[NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) from[i] = x + i * x_row;
#pragma GCC unroll 8
  for (int r = 0; r < NR; r++) by[r] = weight[r];
  const auto step = [&](auto read) __attribute__((always_inline)) {
    typename M::Words a[MR][reads];
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) read(from[i], a[i]);
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) {
      typename M::Words b[reads];
      read(by[r], b);
#pragma GCC unroll 2
      for (int v = 0; v < reads; v++)
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) M::multiply_add(c[i][r], a[i][v], b[v]);
    }
  };
  int64_t at = 0;
  for (; at + unit <= k; at += unit) {
    step([at](const T* p, auto& out) { row_vectors<M, T>(p + at, out); });
    if constexpr (MR > 1)
#pragma GCC unroll 8
      for (int r = 0; r < NR; r++) __builtin_prefetch(by[r] + at + ahead, 0, 2);
  }
  if (at < k) step([at, k](const T* p, auto& out) { row_vectors<M, T>(p + at, k - at, out); });
  constexpr int together = NR < M::width ? NR : M::width;
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int r = 0; r < NR; r += together) {
      typename M::Vec t[together];
#pragma GCC unroll 8
      for (int j = 0; j < together; j++) t[j] = c[i][r + j];
      const typename M::Vec all = sum_each(t);
#pragma GCC unroll 8
      for (int j = 0; j < together; j++) sums[i][r + j] += all[j];
    }
}

template <class T>
MK_INLINE void some_dots(int64_t rows, const T* x, int64_t x_row, const T* const* weight, int64_t k, int64_t ahead,
                         float (*sums)[group]) {
  if (rows == 1)
    dots<T, 1, 4>(x, x_row, weight, k, ahead, sums);
  else if (rows == 2)
    dots<T, 2, 4>(x, x_row, weight, k, ahead, sums);
  else if (rows == 3)
    dots<T, 3, 4>(x, x_row, weight, k, ahead, sums);
  else
    dots<T, 4, 4>(x, x_row, weight, k, ahead, sums);
}

template <class T>
MK_INLINE void all_dots(int64_t rows, const T* x, int64_t x_row, const T* const* weight, int64_t k, int64_t ahead,
                        float (*sums)[group]) {
  if (rows == 1) return dots<T, 1, group>(x, x_row, weight, k, ahead, sums);
  for (int64_t half = 0; half < group; half += 4)
    for (int64_t i = 0; i < rows; i += most_rows)
      some_dots(least(most_rows, rows - i), x + i * x_row, x_row, weight + half, k, i ? 0 : ahead,
                (float (*)[group])(sums[i] + half));
}

// Up to one vector of results of each row; called with constants, so that no length is looked at for a whole group.
template <class T>
MK_INLINE void finish(const LinearRows& a, int64_t n, int64_t r, int64_t count, const float (*sums)[group]) {
  for (int64_t i = 0; i < a.rows; i++) {
    vf v = load_n(sums[i] + r, count);
    if (a.bias) v += load_n((const T*)a.bias + n + r, count);
    store_n((T*)a.out + i * a.out_row + n + r, v, count);
  }
}

// Blocks of k keep float32 sums short, and are the same for any number of rows: a row is what it is alone.
template <class T>
void run(const LinearRows& a) {
  constexpr int64_t block = ArithmeticOf<T>::type::step == 2 ? 4096 : 1024;
  for (int64_t n = a.first; n < a.first + a.count; n += group) {
    const int64_t count = least(group, a.first + a.count - n);
    float sums[linear_rows][group] = {};
    for (int64_t k = 0; k < a.k; k += block) {
      const T* weight[group];  // past the last row the last once more
      for (int64_t r = 0; r < group; r++) weight[r] = (const T*)a.weight + (n + least(r, count - 1)) * a.weight_row + k;
      all_dots(a.rows, (const T*)a.x + k, a.x_row, weight, least(block, a.k - k), group * a.weight_row, sums);
    }
    constexpr int some = lanes < group ? lanes : group;
    for (int64_t r = 0; r < count; r += some) {
      if (count - r >= some)
        finish<T>(a, n, r, some, sums);
      else
        finish<T>(a, n, r, count - r, sums);
    }
  }
}

template <class T>
void round_rows(const float* from, int64_t from_row, const void* bias, void* out, int64_t out_row, int64_t rows,
                int64_t count) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t n = 0; n < count; n += lanes) {
      const int64_t some = least(lanes, count - n);
      vf v = load_n(from + i * from_row + n, some);
      if (bias) v += load_n((const T*)bias + n, some);
      store_n((T*)out + i * out_row + n, v, some);
    }
}

}  // namespace

const LinearKernels linear = {{run<float>, run<bf16>, run<f16>, nullptr},
                              {nullptr, round_rows<bf16>, round_rows<f16>, nullptr}};

}  // namespace mk::MK_ISA

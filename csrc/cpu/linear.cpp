#include "cpu/linear.h"

#include "cpu/arithmetic.h"
#include "cpu/matrix.h"

namespace mk::MK_ISA {
namespace {

constexpr int group = 8;  // outputs computed together
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

#if MK_AMX

// ---- by the matrix unit ----
//
// 16 rows of the weight are a left factor as they lie in memory; x, whose rows are the columns of the right one, is
// packed. A product takes as long for one row as for 16, which is less than memory takes to deliver the weight.

constexpr int64_t step_elements = 2 * matrix_words;  // of k
constexpr int64_t chains = 4;                        // sums along k that do not wait for one another
constexpr int64_t steps_ahead = 6;                   // a step's weights are fetched so many before their use
constexpr int64_t longest = chains * 4096;           // of k: float32 sums as short as those of dots

int64_t matrix_steps(int64_t k) { return (k + step_elements - 1) / step_elements; }

// The packed x, and a vector that is written past it.
int64_t matrix_memory(int64_t rows, int64_t k) { return (matrix_steps(k) * rows + 1) * matrix_words * 4; }

// x as [words of k][rows], with zeros past k. What a vector writes past the rows is written over.
void pack(const LinearRows& a) {
  uint32_t* to = (uint32_t*)a.memory;
  for (int64_t k = 0; k < a.k; k += step_elements) {
    vu t[lanes] = {};
    for (int64_t i = 0; i < a.rows; i++) {
      const bf16* from = (const bf16*)a.x + i * a.x_row + k;
      t[i] = k + step_elements <= a.k ? row_vector<PairsBf16>(from) : row_vector<PairsBf16>(from, a.k - k);
    }
    transpose(t);
    for (int64_t w = 0; w < matrix_words; w++, to += a.rows) store_words(to, t[w]);
  }
}

// A left or right factor: where it begins, and bytes from one row of its register to the next.
struct Factor {
  const void* first;
  int64_t row;
};

template <int chain>
MK_INLINE void multiply_step(Factor weight, Factor x) {
  static_assert(chain < 4);
  _tile_loadd(4, weight.first, weight.row);
  _tile_loadd(6, x.first, x.row);
  if constexpr (chain == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (chain == 1) _tile_dpbf16ps(1, 4, 6);
  if constexpr (chain == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (chain == 3) _tile_dpbf16ps(3, 4, 6);
}

// The last elements of the rows, fewer than a step's: no row is read past its end.
MK_INLINE void multiply_rest(const bf16* weight, int64_t weight_row, int64_t count, int64_t elements, Factor x) {
  alignas(64) vu rest[matrix_rows] = {};
  for (int64_t r = 0; r < count; r++) rest[r] = row_vector<PairsBf16>(weight + r * weight_row, elements);
  asm volatile("" ::: "memory");
  multiply_step<chains - 1>({rest, 64}, x);
}

// sums[r] += x's rows . weight[r] over k elements, for `count` rows of the weight. `next` is what comes after them.
MK_INLINE void matrix_dots(const bf16* weight, const bf16* next, int64_t weight_row, int64_t count, Factor x, int64_t k,
                           vf (&sums)[matrix_rows]) {
  const int64_t whole = k / step_elements, x_step = matrix_words * x.row;
  const auto x_at = [&](int64_t s) { return Factor{(const char*)x.first + s * x_step, x.row}; };
  const auto step = [&]<int chain>(int64_t s, Registers<chain>) __attribute__((always_inline)) {
    const int64_t later = s + steps_ahead;
    const bf16* ahead = later < whole ? weight + later * step_elements : next + (later - whole) * step_elements;
    fetch_rows(ahead, weight_row);
    multiply_step<chain>({weight + s * step_elements, weight_row * (int64_t)sizeof(bf16)}, x_at(s));
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  asm volatile("" ::: "memory");  // as in multiply_matrices
  int64_t s = 0;
  for (; s + chains <= whole; s += chains) {
    step(s, Registers<0>());
    step(s + 1, Registers<1>());
    step(s + 2, Registers<2>());
    step(s + 3, Registers<3>());
  }
  for (; s < whole; s++) step(s, Registers<0>());
  if (s * step_elements < k)
    multiply_rest(weight + s * step_elements, weight_row, count, k - s * step_elements, x_at(s));
  alignas(64) float chain[chains][matrix_rows][matrix_rows];
  _tile_stored(0, chain[0], sizeof chain[0][0]);
  _tile_stored(1, chain[1], sizeof chain[0][0]);
  _tile_stored(2, chain[2], sizeof chain[0][0]);
  _tile_stored(3, chain[3], sizeof chain[0][0]);
  asm volatile("" ::: "memory");
#pragma GCC unroll 16
  for (int64_t r = 0; r < matrix_rows; r++)
    sums[r] += (load(chain[0][r]) + load(chain[1][r])) + (load(chain[2][r]) + load(chain[3][r]));
}

// Up to 16 outputs of all rows. The registers have `count` rows and a.rows columns: what they lack of sums is anything.
MK_INLINE void matrix_group(const LinearRows& a, int64_t n, int64_t count) {
  const bf16 *weight = (const bf16*)a.weight + n * a.weight_row, *after = weight + matrix_rows * a.weight_row;
  const int64_t x_word = a.rows * 4;
  vf sums[matrix_rows] = {};
  for (int64_t k = 0; k < a.k; k += longest) {
    const int64_t some = least(longest, a.k - k);
    matrix_dots(weight + k, k + some < a.k ? weight + k + some : after, a.weight_row, count,
                {a.memory + k / 2 * x_word, x_word}, some, sums);
  }
  transpose(sums);
  const vf bias = a.bias ? load_n((const bf16*)a.bias + n, count) : vf{};
  for (int64_t i = 0; i < a.rows; i++)
    store_n((bf16*)a.out + i * a.out_row + n, a.bias ? sums[i] + bias : sums[i], count);
}

void run_matrices(const LinearRows& a) {
  if (!a.packed) pack(a);
  const int64_t last = a.first + a.count, whole = a.first + round_down(a.count, matrix_rows);
  if (whole > a.first) {
    const Matrices matrices(matrix_rows, a.rows);
    for (int64_t n = a.first; n < whole; n += matrix_rows) matrix_group(a, n, matrix_rows);
  }
  if (whole < last) {
    const Matrices matrices(last - whole, a.rows);
    matrix_group(a, whole, last - whole);
  }
}

constexpr auto run_bf16 = run_matrices;
constexpr int64_t (*memory_bf16)(int64_t, int64_t) = matrix_memory;

#else

constexpr auto run_bf16 = run<bf16>;
constexpr int64_t (*memory_bf16)(int64_t, int64_t) = nullptr;

#endif

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

const LinearKernels linear = {{run<float>, run_bf16, run<f16>, nullptr},
                              {nullptr, memory_bf16, nullptr, nullptr},
                              {nullptr, round_rows<bf16>, round_rows<f16>, nullptr}};

}  // namespace mk::MK_ISA

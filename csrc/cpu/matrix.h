// Products by the matrix unit that Intel's server processors have since Sapphire Rapids (AMX). It has eight registers
// of 16 rows of 64 bytes. A block of up to 32 x 32 results takes four of them, and a step along k, of 16 words, two
// for the left factor and two for the right one.
#pragma once
#include "cpu/vec.h"

#if MK_AMX

namespace mk::MK_ISA {
namespace {

constexpr int64_t matrix_rows = 16;   // of a register, and its columns of 4 bytes
constexpr int64_t matrix_words = 16;  // along k

// While it lives, all eight registers are whole ones on this thread, or have so many rows of the left factor and so
// many columns of the right one. Then they are configured as before: oneDNN, which torch calls, does not look whether
// its own configuration is still there.
class Matrices {
 public:
  explicit Matrices(int64_t rows = matrix_rows, int64_t columns = matrix_rows) {
    _tile_storeconfig(before_);
    const Configuration now(rows, columns);
    asm volatile("" ::"m"(now));  // the compiler knows of the first word only that it is read
    _tile_loadconfig(&now);
  }
  ~Matrices() {
    if (before_[0])
      _tile_loadconfig(before_);
    else
      _tile_release();
  }
  Matrices(const Matrices&) = delete;

 private:
  // Four registers of results, two of the left factor and two of the right one.
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    Configuration(int64_t left_rows, int64_t columns) {
      for (int i = 0; i < 8; i++) {
        row_bytes[i] = i == 4 || i == 5 ? 64 : 4 * columns;
        rows[i] = i < 6 ? left_rows : matrix_rows;
      }
    }
  };
  alignas(64) uint8_t before_[64];
};

// A right factor: bytes from one of its 16 words to the next, from 16 columns to the next 16, and from a step to the
// next. What fills a register lies best in one piece: its lines then come from the second-level cache in their order.
struct Right {
  const void* first;
  int64_t row, next, step;
};

// A left factor: bytes from one of its rows to the next, from 16 rows to the next 16, and from a step to the next.
struct Left {
  const void* first;
  int64_t row, next, step;
};

constexpr int64_t matrix_block = matrix_words * matrix_rows;  // words of a register

// The intrinsics put their numbers into the text of an instruction, which no template parameter can become.
#define MK_MULTIPLY(c, a, b) \
  if constexpr (bytes)       \
    _tile_dpbusd(c, a, b);   \
  else                       \
    _tile_dpbf16ps(c, a, b);

// c = or, where not `fresh`, += a . b for 16 MT rows of a and 16 NT columns of b, over `steps` times 16 words.
//   a  rows of words, or in the second form such rows a_row bytes apart, whose steps lie side by side
//   b  [words][columns]; a word is two bf16, or four bytes (of a unsigned, of b signed)
//   c  [rows][columns] of float or int32, the rows c_row bytes apart
// The unit takes subnormal bf16 for 0, and rounds each sum to nearest even.
// between() runs after each product: the unit is busy for 16 cycles then, and vectors have something to do.
template <bool bytes, int MT, int NT, class Between>
MK_INLINE void multiply_matrices(Left a, Right b, int64_t steps, void* c, int64_t c_row, bool fresh, Between between) {
  const char *a0 = (const char*)a.first, *a1 = a0 + a.next, *b0 = (const char*)b.first, *b1 = b0 + b.next;
  char *c0 = (char*)c, *c2 = c0 + matrix_rows * c_row;
  asm volatile("" ::: "memory");  // the compiler does not know that a register's load reads memory
  if (fresh) {
    _tile_zero(0);
    if constexpr (NT == 2) _tile_zero(1);
    if constexpr (MT == 2) _tile_zero(2);
    if constexpr (MT == 2 && NT == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, c0, c_row);
    if constexpr (NT == 2) _tile_loadd(1, c0 + 64, c_row);
    if constexpr (MT == 2) _tile_loadd(2, c2, c_row);
    if constexpr (MT == 2 && NT == 2) _tile_loadd(3, c2 + 64, c_row);
  }
  for (int64_t s = 0; s < steps; s++, a0 += a.step, a1 += a.step, b0 += b.step, b1 += b.step) {
    _tile_loadd(4, a0, a.row);
    _tile_loadd(6, b0, b.row);
    MK_MULTIPLY(0, 4, 6)
    between();
    if constexpr (NT == 2) {
      _tile_loadd(7, b1, b.row);
      MK_MULTIPLY(1, 4, 7)
      between();
    }
    if constexpr (MT == 2) {
      _tile_loadd(5, a1, a.row);
      MK_MULTIPLY(2, 5, 6)
      between();
    }
    if constexpr (MT == 2 && NT == 2) {
      MK_MULTIPLY(3, 5, 7)
      between();
    }
  }
  _tile_stored(0, c0, c_row);
  if constexpr (NT == 2) _tile_stored(1, c0 + 64, c_row);
  if constexpr (MT == 2) _tile_stored(2, c2, c_row);
  if constexpr (MT == 2 && NT == 2) _tile_stored(3, c2 + 64, c_row);
  asm volatile("" ::: "memory");
}

#undef MK_MULTIPLY

template <bool bytes, int MT, int NT>
MK_INLINE void multiply_matrices(Left a, Right b, int64_t steps, void* c, int64_t c_row, bool fresh) {
  multiply_matrices<bytes, MT, NT>(a, b, steps, c, c_row, fresh, [] {});
}

template <bool bytes, int MT, int NT>
MK_INLINE void multiply_matrices(const void* a, int64_t a_row, Right b, int64_t steps, void* c, int64_t c_row,
                                 bool fresh) {
  multiply_matrices<bytes, MT, NT>(Left{a, a_row, matrix_rows * a_row, 64}, b, steps, c, c_row, fresh);
}

// Asks for what a register of sixteen rows, `row` elements apart, will be loaded from.
template <class T>
MK_INLINE void fetch_rows(const T* first, int64_t row) {
#pragma GCC unroll 16
  for (int64_t r = 0; r < matrix_rows; r++) __builtin_prefetch(first + r * row);
}

// A product whose result nobody reads. The unit falls asleep when it has not multiplied for some 900 cycles, and then
// takes 700 to wake up; while it multiplies, and for 200 cycles after, vectors multiply and compare at half their rate,
// so that one of these every 600 cycles or so costs least. Measured on Emerald Rapids.
MK_INLINE void keep_awake() { _tile_dpbf16ps(3, 5, 7); }

template <int>
struct Registers {};

// f(column, how many registers) over all columns, which are a multiple of 16.
template <class F>
MK_INLINE void each_registers(int64_t columns, F f) {
  int64_t c = 0;
  for (; c + 2 * matrix_rows <= columns; c += 2 * matrix_rows) f(c, Registers<2>());
  if (c < columns) f(c, Registers<1>());
}

}  // namespace
}  // namespace mk::MK_ISA

#endif

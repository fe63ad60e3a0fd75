#include "cpu/rms_norm.h"

#include "cpu/two.h"

namespace mk::MK_ISA {
namespace {

// What is normalised: x, or with kAdd the rounded x + residual.
template <class T, bool kAdd>
struct Row {
  const T *x, *residual;

  vec_of<T> at(int64_t i) const {
    if constexpr (kAdd)
      return round_to<T>(load(x + i) + load(residual + i));
    else
      return load(x + i);
  }

  vec_of<T> at(int64_t i, int64_t n) const {
    if constexpr (kAdd)
      return round_to<T>(load_n(x + i, n) + load_n(residual + i, n));
    else
      return load_n(x + i, n);
  }

  template <Order order>
  RawTwo<T> two(int64_t i) const {
    if constexpr (kAdd)
      return encode_two<T, order, Nans::short_ones>(load_two<order>(x + i) + load_two<order>(residual + i));
    else
      return load_raw(x + i);
  }

  template <int cache>
  MK_FETCHES void fetch_at(int64_t i, int64_t count) const {
    fetch<cache>(x + i, count * sizeof(T));
    if constexpr (kAdd) fetch<cache>(residual + i, count * sizeof(T));
  }
};

// Sum of squares; with kAdd `total` takes the row, and `copy` where it is not null. Float partial sums of at most 64
// terms, which are summed in double, keep the error within float's rounding for any n.
template <class T, bool kAdd, bool kStream, Order order>
MK_INLINE double sum_of_squares(Row<T, kAdd> row, Row<T, kAdd> next, T* total, T* copy, int64_t n) {
  constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  double whole = 0;
  V part[4] = {};
  const auto add_part = [&] { whole += sum((part[0] + part[1]) + (part[2] + part[3])); };
  const auto add_two = [&](int64_t i, V& a, V& b) {
    const RawTwo<T> r = row.template two<order>(i);
    if constexpr (kAdd) put_raw<kStream>(total + i, r);
    if constexpr (kAdd && kStream)
      if (copy) put_raw<false>(copy + i, r);
    const two_of<T> v = decode_two<order>(r);
    a += v.a * v.a, b += v.b * v.b;
  };
  int64_t i = 0;
  while (i + 4 * w <= n) {
    const int64_t end = n - i < 256 * w ? n : i + 256 * w;
    for (; i + 4 * w <= end; i += 4 * w) {
      fetch_in_first<T>(&next, 1, i);
      add_two(i, part[0], part[1]);
      add_two(i + 2 * w, part[2], part[3]);
    }
    if (i + 4 * w > n) break;
    add_part();
    for (V& p : part) p = V{};
  }
  for (; i + w <= n; i += w) {
    const V v = row.at(i);
    if constexpr (kAdd) put<T, kStream>(total + i, v);
    if constexpr (kAdd && kStream)
      if (copy) store(copy + i, v);
    part[0] += v * v;
  }
  if (i < n) {
    const V v = row.at(i, n - i);
    if constexpr (kAdd) store_n(total + i, v, n - i);
    if constexpr (kAdd && kStream)
      if (copy) store_n(copy + i, v, n - i);
    part[1] += v * v;
  }
  add_part();
  return whole;
}

template <class T, bool kModel, class S>
MK_INLINE vec_of<T> scaled(vec_of<T> v, S rstd, vec_of<T> by) {
  v *= rstd;
  return (kModel ? round_to<T>(v) : v) * by;
}

template <class T, class W, bool kModel, bool kStream, Order order, class S>
MK_INLINE void put_scaled(W* y, RawTwo<T> x, S rstd, two_of<T> by) {
  two_of<T> v = decode_two<order>(x) * rstd;
  if constexpr (kModel) v = round_two<T>(v);
  put_two<order, Nans::short_ones, kStream>(y, v * by);
}

// y of rows that share the decoding of the weight. A row's cache line is stored at once.
template <class T, class W, bool kModel, bool kStream, Order order, int kRows, class Source, class Next, class S>
MK_INLINE void scale(const Source (&row)[kRows], const Next (&next)[kRows], const S (&rstd)[kRows], const W* weight,
                     W* y, int64_t n) {
  constexpr int w = Format<T>::width;
  const auto put_product = [&](int r, int64_t i, two_of<T> by) {
    put_scaled<T, W, kModel, kStream, order>(y + r * n + i, row[r].template two<order>(i), rstd[r], by);
  };
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    fetch_in_second<T>(next, kRows, i, n);
    const two_of<T> by = load_two<order>(weight + i), more = load_two<order>(weight + i + 2 * w);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r++) {
      put_product(r, i, by);
      put_product(r, i + 2 * w, more);
    }
  }
#pragma GCC unroll 1
  for (int r = 0; r < kRows; r++) {
    W* to = y + r * n;
    int64_t j = i;
    for (; j + w <= n; j += w) put<W, kStream>(to + j, scaled<T, kModel>(row[r].at(j), rstd[r], load(weight + j)));
    if (const int64_t left = n - j; left)
      store_n(to + j, scaled<T, kModel>(row[r].at(j, left), rstd[r], load_n(weight + j, left)), left);
  }
}

// While some rows are in work those after them are fetched: the processor's own prefetch ends with a row, and the
// second pass, which finds the row in a cache, would leave memory idle. A sum that is stored past the caches is also
// kept in one.
template <class T, class W, bool kModel, bool kAdd, bool kStream, int kRows>
MK_INLINE void some_rows(const RmsNormRows& a, int64_t first, T* kept) {
  using S = decltype(sum(vec_of<T>{}));
  constexpr Order order = sizeof(T) == sizeof(W) ? Order::apart : Order::memory;
  const bool fits = a.n * int64_t{sizeof(T)} <= fetched_row, keeps = kAdd && kStream && fits;
  const int64_t last = a.rows + a.follow - 1, ahead = rows_ahead(a.n * int64_t{sizeof(T)}, kRows);
  const auto row_at = [&](int64_t r) {
    return Row<T, kAdd>{static_cast<const T*>(a.x) + r * a.x_stride,
                        kAdd ? static_cast<const T*>(a.residual) + r * a.residual_stride : nullptr};
  };
  Row<T, kAdd> row[kRows], next[kRows];
  Row<T, false> total[kRows];
  S rstd[kRows];
#pragma GCC unroll 1
  for (int r = 0; r < kRows; r++) {
    const int64_t at = first + r, after = at + ahead < last ? at + ahead : last;
    row[r] = row_at(at), next[r] = row_at(fits ? after : at);
    T* sums = kAdd ? static_cast<T*>(a.total) + at * a.n : nullptr;
    total[r] = {kStream ? kept : sums, nullptr};
    const double squares = sum_of_squares<T, kAdd, kStream, order>(row[r], next[r], sums, keeps ? kept : nullptr, a.n);
    rstd[r] = S(1 / __builtin_sqrt(squares / double(a.n) + a.eps));
    static_cast<S*>(a.rstd)[at] = rstd[r];
    rstd[r] = with_short_nan(rstd[r]);
  }
  const W* weight = static_cast<const W*>(a.weight);
  W* y = static_cast<W*>(a.y) + first * a.n;
  if (kAdd && (!kStream || keeps))
    scale<T, W, kModel, kStream, order>(total, next, rstd, weight, y, a.n);
  else
    scale<T, W, kModel, kStream, order>(row, next, rstd, weight, y, a.n);
}

// y of x, and the sum of squares of `next`, the row after it, behind which another one lies `stride` on.
template <class T, class W, bool kModel, bool kStream, Order order, class S>
MK_INLINE double scale_and_sum(const T* x, const T* next, int64_t stride, S rstd, const W* weight, W* y, int64_t n) {
  constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  double whole = 0;
  V part[4] = {};
  const auto add_part = [&] { whole += sum((part[0] + part[1]) + (part[2] + part[3])); };
  const auto two = [&](int64_t i, V& a, V& b) {
    const two_of<T> v = load_two<order>(next + i);
    a += v.a * v.a, b += v.b * v.b;
    put_scaled<T, W, kModel, kStream, order>(y + i, load_raw(x + i), rstd, load_two<order>(weight + i));
  };
  int64_t i = 0;
  while (i + 4 * w <= n) {
    const int64_t end = n - i < 256 * w ? n : i + 256 * w;
    for (; i + 4 * w <= end; i += 4 * w) {
      fetch_later(next, i, 4 * w * sizeof(T), n, stride);
      two(i, part[0], part[1]);
      two(i + 2 * w, part[2], part[3]);
    }
    if (i + 4 * w > n) break;
    add_part();
    for (V& p : part) p = V{};
  }
  for (; i + w <= n; i += w) {
    const V v = load(next + i);
    part[0] += v * v;
    put<W, kStream>(y + i, scaled<T, kModel>(load(x + i), rstd, load(weight + i)));
  }
  if (const int64_t left = n - i; left) {
    const V v = load_n(next + i, left);
    part[1] += v * v;
    store_n(y + i, scaled<T, kModel>(load_n(x + i, left), rstd, load_n(weight + i, left)), left);
  }
  add_part();
  return whole;
}

// Each row's products together with the next one's sum.
template <class T, class W, bool kModel, bool kStream>
__attribute__((noinline)) void overlapped_rows(const RmsNormRows& a) {
  using S = decltype(sum(vec_of<T>{}));
  constexpr Order order = sizeof(T) == sizeof(W) ? Order::apart : Order::memory;
  const T* x = static_cast<const T*>(a.x);
  const W* weight = static_cast<const W*>(a.weight);
  W* y = static_cast<W*>(a.y);
  const auto row = [](const T* x) { return Row<T, false>{x, nullptr}; };
  const auto to_next = [&](int64_t r) { return r + 1 < a.rows + a.follow ? a.x_stride : 0; };
  double squares = sum_of_squares<T, false, kStream, order>(row(x), row(x + to_next(0)), nullptr, nullptr, a.n);
  for (int64_t r = 0; r < a.rows; r++, x += a.x_stride, y += a.n) {
    const S rstd = S(1 / __builtin_sqrt(squares / double(a.n) + a.eps)), by = with_short_nan(rstd);
    static_cast<S*>(a.rstd)[r] = rstd;
    if (const T* next = x + to_next(r); r + 1 < a.rows)
      squares = scale_and_sum<T, W, kModel, kStream, order>(x, next, to_next(r + 1), by, weight, y, a.n);
    else
      scale<T, W, kModel, kStream, order, 1>({row(x)}, {row(next)}, {by}, weight, y, a.n);
  }
}

// Of short rows of 16-bit elements two at a time: one's sum hides how long it takes to come from the other's to its
// rstd. Of longer ones, too, as long as the first cache holds two and the next two. Vectors of few lanes take so many
// operations that these must go on while memory answers: there they alternate with the next row's sum.
template <bool kAdd>
constexpr int64_t paired_row = kAdd         ? 4 << 10
                               : lanes < 16 ? 2 << 10
                                            : 8 << 10;  // bytes

template <class T, class W, bool kModel, bool kAdd, bool kStream>
void run_rows(const RmsNormRows& a) {
  alignas(64) T kept[kAdd && kStream ? fetched_row / sizeof(T) : 1];
  const int64_t bytes = a.n * int64_t{sizeof(T)};
  int64_t r = 0;
  if constexpr (sizeof(T) == 2 && !(kAdd && kStream))
    if (bytes <= paired_row<kAdd>)
      for (; r + 2 <= a.rows; r += 2) some_rows<T, W, kModel, kAdd, kStream, 2>(a, r, kept);
  if constexpr (sizeof(T) == 2 && !kAdd && lanes < 16)
    if (bytes > paired_row<kAdd> && bytes <= fetched_row && a.rows) return overlapped_rows<T, W, kModel, kStream>(a);
  for (; r < a.rows; r++) some_rows<T, W, kModel, kAdd, kStream, 1>(a, r, kept);
}

template <class T, class W, bool kModel, bool kAdd>
void run(const RmsNormRows& a) {
  if (a.past_caches)
    run_rows<T, W, kModel, kAdd, true>(a);
  else
    run_rows<T, W, kModel, kAdd, false>(a);
}

}  // namespace

#define MK_ADD(T, W, model) {run<T, W, model, false>, run<T, W, model, true>}
#define MK_MODEL(T, W) {MK_ADD(T, W, false), MK_ADD(T, W, (sizeof(T) == 2))}
const RmsNormKernels rms_norm = {{
    {MK_MODEL(float, float), {}},
    {MK_MODEL(bf16, bf16), MK_MODEL(bf16, float)},
    {MK_MODEL(f16, f16), MK_MODEL(f16, float)},
    {MK_MODEL(double, double), {}},
}};

}  // namespace mk::MK_ISA

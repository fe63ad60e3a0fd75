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

  MK_FETCHES void fetch_at(int64_t i, int64_t count) const {
    fetch(x + i, count * sizeof(T));
    if constexpr (kAdd) fetch(residual + i, count * sizeof(T));
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
      if (fetches_at<T>(i)) next.fetch_at(i / 2, line_of<T>);
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

template <class T, class W, bool kModel, bool kStream, Order order, class Source, class Next, class S>
MK_INLINE void scale(Source row, Next next, S rstd, const W* weight, W* y, int64_t n) {
  constexpr int w = Format<T>::width;
  const auto product = [&](vec_of<T> v, vec_of<T> by) {
    v *= rstd;
    return (kModel ? round_to<T>(v) : v) * by;
  };
  const auto put_product = [&](int64_t i) {
    two_of<T> v = decode_two<order>(row.template two<order>(i)) * rstd;
    if constexpr (kModel) v = round_two<T>(v);
    put_two<order, Nans::short_ones, kStream>(y + i, v * load_two<order>(weight + i));
  };
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    if (fetches_at<T>(i)) next.fetch_at((n + i) / 2, line_of<T>);
    put_product(i);
    put_product(i + 2 * w);
  }
  for (; i + w <= n; i += w) put<W, kStream>(y + i, product(row.at(i), load(weight + i)));
  if (i < n) store_n(y + i, product(row.at(i, n - i), load_n(weight + i, n - i)), n - i);
}

// While one row is in work the next is fetched, its front half by the first pass and the rest by the second: the
// processor's own prefetch ends with a row, and the second pass, which finds the row in a cache, would leave memory
// idle. A sum that is stored past the caches is also kept in one.
template <class T, class W, bool kModel, bool kAdd, bool kStream>
void run_rows(const RmsNormRows& a) {
  using S = decltype(sum(vec_of<T>{}));
  constexpr Order order = sizeof(T) == sizeof(W) ? Order::apart : Order::memory;
  alignas(64) T kept[kAdd && kStream ? fetched_row / sizeof(T) : 1];
  const bool keeps = kAdd && kStream && a.n * int64_t{sizeof(T)} <= fetched_row;
  Row<T, kAdd> row = {static_cast<const T*>(a.x), static_cast<const T*>(a.residual)};
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t r = 0; r < a.rows; r++) {
    Row<T, kAdd> next = row;
    if (r + 1 < a.rows) next.x += a.x_stride, next.residual += kAdd ? a.residual_stride : 0;
    const Row<T, kAdd> fetched = a.n * int64_t{sizeof(T)} <= fetched_row ? next : row;
    T* total = kAdd ? static_cast<T*>(a.total) + r * a.n : nullptr;
    const double squares = sum_of_squares<T, kAdd, kStream, order>(row, fetched, total, keeps ? kept : nullptr, a.n);
    const S rstd = S(1 / __builtin_sqrt(squares / double(a.n) + a.eps));
    static_cast<S*>(a.rstd)[r] = rstd;
    W* y = static_cast<W*>(a.y) + r * a.n;
    const auto scale_it = [&](auto source) {
      scale<T, W, kModel, kStream, order>(source, fetched, with_short_nan(rstd), weight, y, a.n);
    };
    if (kAdd && (!kStream || keeps))
      scale_it(Row<T, false>{kStream ? kept : total, nullptr});
    else
      scale_it(row);
    row = next;
  }
  if constexpr (kStream) stream_fence();
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

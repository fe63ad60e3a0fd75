#include "cpu/rms_norm_backward.h"

#include "cpu/two.h"

namespace mk::MK_ISA {
namespace {

constexpr int64_t block_rows = 16;  // summed alone before they are added to the rest: short sums err less
// In work at once. float32 has so few operations that the sums of dweight, loaded and stored for all rows at once,
// weigh; of 16-bit elements two rows and the next two are what the first cache holds more of.
template <class T>
constexpr int some_rows = sizeof(T) == 2 ? 2 : 4;

// The order of the columns in work, and of dweight's sums as far as they are in work four vectors at once.
template <class T, class W>
constexpr Order order = sizeof(T) == sizeof(W) ? Order::apart : Order::memory;
template <class T, class W>
constexpr Nans nans = sizeof(T) == sizeof(W) ? Nans::short_ones : Nans::any;  // of dx
template <class T>
constexpr int64_t ordered(int64_t n) {
  return n / (4 * Format<T>::width) * (4 * Format<T>::width);
}

// One row's inputs; dtotal may be null.
template <class T, class W>
struct Row {
  const T* x;
  const W* dy;
  const T* dtotal;

  template <int cache>
  MK_FETCHES void fetch_at(int64_t i, int64_t count) const {
    fetch<cache>(x + i, count * sizeof(T));
    fetch<cache>(dy + i, count * sizeof(W));
    if (dtotal) fetch<cache>(dtotal + i, count * sizeof(T));
  }
};

// The sum of x * dy * weight of each row. Float partial sums of at most 64 terms are summed in double, as in the
// forward. Two rows share the decoding of the weight.
template <class T, class W, int kRows>
__attribute__((noinline)) void dots(const Row<T, W>* row, const Row<T, W>* next, const W* weight, int64_t n,
                                    double* whole) {
  constexpr int w = Format<T>::width;
  constexpr Order o = order<T, W>;
  using V = vec_of<T>;
  V part[kRows][4] = {};
  const auto add_parts = [&] {
    for (int r = 0; r < kRows; r++) {
      V(&p)[4] = part[r];
      whole[r] += sum((p[0] + p[1]) + (p[2] + p[3]));
    }
  };
  for (int r = 0; r < kRows; r++) whole[r] = 0;
  int64_t i = 0;
  while (i + 4 * w <= n) {
    const int64_t end = n - i < 256 * w ? n : i + 256 * w;
    for (; i + 4 * w <= end; i += 4 * w) {
      fetch_in_first<T, second_cache>(next, kRows, i);
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2) {
        const two_of<T> by = load_two<o>(weight + i + j * w);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; r++) {
          const two_of<T> v = load_two<o>(row[r].x + i + j * w), d = load_two<o>(row[r].dy + i + j * w) * by;
          part[r][j] += v.a * d.a, part[r][j + 1] += v.b * d.b;
        }
      }
    }
    if (i + 4 * w > n) break;
    add_parts();
    for (auto& p : part)
      for (V& v : p) v = V{};
  }
  for (int r = 0; r < kRows; r++) {
    const T* x = row[r].x;
    const W* dy = row[r].dy;
    int64_t j = i;
    for (; j + w <= n; j += w) part[r][0] += load(x + j) * (load(dy + j) * load(weight + j));
    if (const int64_t left = n - j; left)
      part[r][1] += load_n(x + j, left) * (load_n(dy + j, left) * load_n(weight + j, left));
  }
  add_parts();
}

// What rows of the same length give: dx, and in their order their addition to dweight.
template <class T, class W, bool kModel, bool kTotal, int kRows>
struct Gradients {
  static constexpr int w = Format<T>::width;
  using V = vec_of<T>;
  using S = decltype(sum(V{}));
  Row<T, W> row[kRows], next[kRows];
  S rstd[kRows], mean[kRows];
  T* dx[kRows];
  const W* weight;
  S* dweight;
  int64_t n;

  V gradient(int r, V normed, V rounded, V d, V by, V& sum) const {
    sum += d * rounded;
    return (d * by - normed * mean[r]) * rstd[r];
  }

  V value(int r, V x, V d, V by, V& sum) const {
    const V normed = x * rstd[r];
    return gradient(r, normed, kModel ? round_to<T>(normed) : normed, d, by, sum);
  }

  template <bool kStream>
  void columns(int64_t i) const {
    V sum = load(dweight + i);
    const V by = load(weight + i);
#pragma GCC unroll 1
    for (int r = 0; r < kRows; r++) {
      V out = value(r, load(row[r].x + i), load(row[r].dy + i), by, sum);
      if constexpr (kTotal) out += load(row[r].dtotal + i);
      put<T, kStream>(dx[r] + i, out);
    }
    store(dweight + i, sum);
  }

  // The sums of dweight are loaded and stored once for all rows. A row's cache line is stored at once.
  template <bool kStream>
  void more_columns(int64_t i) const {
    constexpr Order o = order<T, W>;
    constexpr int parts = line_of<T> == 2 * w ? 1 : 2;
    RawTwo<T> out[kRows][parts];
    for (int p = 0; p < parts; p++, i += 2 * w) {
      two_of<T> sum = {load(dweight + i), load(dweight + i + w)};
      const two_of<T> by = load_two<o>(weight + i);
      for (int r = 0; r < kRows; r++) {
        const two_of<T> normed = load_two<o>(row[r].x + i) * rstd[r], d = load_two<o>(row[r].dy + i);
        const two_of<T> rounded = kModel ? round_two<T>(normed) : normed;
        two_of<T> dx = {gradient(r, normed.a, rounded.a, d.a, by.a, sum.a),
                        gradient(r, normed.b, rounded.b, d.b, by.b, sum.b)};
        if constexpr (kTotal) dx = dx + load_two<o>(row[r].dtotal + i);
        out[r][p] = encode_two<T, o, nans<T, W>>(dx);
      }
      store(dweight + i, sum.a);
      store(dweight + i + w, sum.b);
    }
    i -= 2 * parts * w;
    for (int r = 0; r < kRows; r++)
      for (int p = 0; p < parts; p++) put_raw<kStream>(dx[r] + i + 2 * p * w, out[r][p]);
  }

  void last_columns(int64_t i) const {
    const int64_t left = n - i;
    V sum = load_n(dweight + i, left);
    const V by = load_n(weight + i, left);
#pragma GCC unroll 1
    for (int r = 0; r < kRows; r++) {
      V out = value(r, load_n(row[r].x + i, left), load_n(row[r].dy + i, left), by, sum);
      if constexpr (kTotal) out += load_n(row[r].dtotal + i, left);
      store_n(dx[r] + i, out, left);
    }
    store_n(dweight + i, sum, left);
  }

  template <bool kStream>
  void all_columns() const {
    int64_t i = 0;
    for (; i + 4 * w <= n; i += 4 * w) {
      fetch_in_second<T, second_cache>(next, kRows, i, n);
      more_columns<kStream>(i);
      if constexpr (line_of<T> == 2 * w) more_columns<kStream>(i + 2 * w);
    }
    for (; i + w <= n; i += w) columns<kStream>(i);
    if (i < n) last_columns(i);
  }
};

// While some rows are in work those after them are fetched: the processor's own prefetch ends with a row, and the
// second pass, which finds its rows in a cache, would leave memory idle. They go into the second cache: the first has
// no room for them beside the rows in work, the weight and the sums.
template <class T, class W, bool kModel, bool kTotal, int kRows, class S>
void add_rows(const RmsNormGradients& a, int64_t first, S* dweight) {
  const bool fetches = a.n * int64_t{sizeof(T)} <= fetched_row;
  const int64_t last = a.rows + a.follow - 1, ahead = rows_ahead(a.n * int64_t{sizeof(T)}, kRows);
  const auto row_at = [&](int64_t r) {
    return Row<T, W>{static_cast<const T*>(a.x) + r * a.x_stride, static_cast<const W*>(a.dy) + r * a.dy_stride,
                     kTotal ? static_cast<const T*>(a.dtotal) + r * a.dtotal_stride : nullptr};
  };
  Gradients<T, W, kModel, kTotal, kRows> g;
  g.weight = static_cast<const W*>(a.weight), g.dweight = dweight, g.n = a.n;
  for (int r = 0; r < kRows; r++) {
    const int64_t at = first + r, next = !fetches ? at : at + ahead < last ? at + ahead : last;
    g.row[r] = row_at(at), g.next[r] = row_at(next);
    g.rstd[r] = with_short_nan(static_cast<const S*>(a.rstd)[at]);
    g.dx[r] = static_cast<T*>(a.dx) + at * a.n;
  }
  constexpr int some = kRows < 2 ? 1 : 2;
  for (int r = 0; r < kRows; r += some) {
    double dot[some];
    dots<T, W, some>(g.row + r, g.next + r, g.weight, a.n, dot);
    for (int j = 0; j < some; j++) g.mean[r + j] = S(double(g.rstd[r + j]) * dot[j] / double(a.n));
  }
  if (a.past_caches)
    g.template all_columns<true>();
  else
    g.template all_columns<false>();
}

// to += from, which becomes 0.
template <class S>
MK_INLINE void move_sums(S* to, S* from, int64_t n) {
  constexpr int w = Format<S>::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(to + i, load(to + i) + load(from + i));
  for (; i < n; i++) to[i] += from[i];
  __builtin_memset(from, 0, n * sizeof(S));
}

template <class T, class W, bool kModel, bool kTotal>
void run(const RmsNormGradients& a) {
  using S = decltype(sum(vec_of<T>{}));
  S *whole = static_cast<S*>(a.dweight), *block = static_cast<S*>(a.block);
  if (a.at == 0) {
    __builtin_memset(whole, 0, a.n * sizeof(S));
    __builtin_memset(block, 0, a.n * sizeof(S));
  }
  for (int64_t r = 0; r < a.rows;) {
    const int64_t in_block = block_rows - (a.at + r) % block_rows;
    if (in_block >= some_rows<T> && a.rows - r >= some_rows<T>) {
      add_rows<T, W, kModel, kTotal, some_rows<T>>(a, r, block);
      r += some_rows<T>;
    } else {
      add_rows<T, W, kModel, kTotal, 1>(a, r, block);
      r++;
    }
    if (const int64_t done = a.at + r; done % block_rows == 0 || done == a.of) move_sums(whole, block, a.n);
  }
}

template <class T, class W>
void join(const void* partials, int64_t parts, int64_t n, int64_t first, int64_t count, void* dweight) {
  using S = decltype(sum(vec_of<T>{}));
  constexpr int w = Format<T>::width;
  const S* from = static_cast<const S*>(partials);
  W* to = static_cast<W*>(dweight);
  for (int64_t i = first, end = first + count; i < end; i += 2 * w) {
    const int64_t some = end - i < 2 * w ? end - i : 2 * w;
    double sums[2 * w] = {};
    for (int64_t p = 0; p < parts; p++)
      for (int64_t j = 0; j < some; j++) sums[j] += from[p * n + i + j];
    two_of<T> v = {};
    for (int j = 0; j < w; j++) v.a[j] = sums[j], v.b[j] = sums[w + j];
    if (i < ordered<T>(n)) {
      put_two<order<T, W>, Nans::any, false>(to + i, v);
    } else {
      store_n(to + i, v.a, some < w ? some : w);
      if (some > w) store_n(to + i + w, v.b, some - w);
    }
  }
}

}  // namespace

#define MK_TOTAL(T, W, model) {run<T, W, model, false>, run<T, W, model, true>}
#define MK_MODEL(T, W) {MK_TOTAL(T, W, false), MK_TOTAL(T, W, (sizeof(T) == 2))}
const RmsNormBackwardKernels rms_norm_backward = {
    {
        {MK_MODEL(float, float), {}},
        {MK_MODEL(bf16, bf16), MK_MODEL(bf16, float)},
        {MK_MODEL(f16, f16), MK_MODEL(f16, float)},
        {MK_MODEL(double, double), {}},
    },
    {
        {join<float, float>, nullptr},
        {join<bf16, bf16>, join<bf16, float>},
        {join<f16, f16>, join<f16, float>},
        {join<double, double>, nullptr},
    },
};

}  // namespace mk::MK_ISA

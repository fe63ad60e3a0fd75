// From a function on mk::Tensor to what torch registers and to what csrc/python calls past the dispatcher.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch/tensor.h"

namespace mk {

// As long as it lives, outputs that this thread makes have memory of their own, but for large ones.
class OwnMemory {
 public:
  explicit OwnMemory(bool on);
  ~OwnMemory();
  OwnMemory(const OwnMemory&) = delete;
};

// Lets Python find the kernel of an op.
void add_direct(const char* op, Direct kernel);
// Throws where `made` is neither torch's nor memory of its own.
void hand_over(const Tensor& made, Output& to);

namespace entry {

using Torch = torch::stable::Tensor;

// An argument or result of torch's in place of ours, and back.
template <class T>
struct As {
  using Type = T;
  static const T& ours(const T& x) { return x; }
  static const T& torchs(const T& x) { return x; }
};
template <>
struct As<Tensor> {
  using Type = Torch;
  static Tensor ours(const Torch& t) { return t; }
  static Torch torchs(const Tensor& t) { return t; }
};
template <>
struct As<Maybe> {
  using Type = std::optional<Torch>;
  static Maybe ours(const Type& t) { return t ? Maybe(*t) : std::nullopt; }
};
template <>
struct As<std::vector<Tensor>> {
  using Type = std::vector<Torch>;
  static std::vector<Tensor> ours(const Type& t) { return {t.begin(), t.end()}; }
};
template <class... T>
struct As<std::tuple<T...>> {
  using Type = std::tuple<typename As<T>::Type...>;
  static Type torchs(const std::tuple<T...>& all) {
    return std::apply([](const T&... x) { return Type(As<T>::torchs(x)...); }, all);
  }
};

template <class T>
struct Take;
template <>
struct Take<Tensor> {
  static Tensor from(const Argument& a) { return Tensor(*a.array); }
};
template <>
struct Take<Maybe> {
  static Maybe from(const Argument& a) { return a.array ? Maybe(*a.array) : std::nullopt; }
};
template <>
struct Take<double> {
  static double from(const Argument& a) { return a.number; }
};
template <>
struct Take<int64_t> {
  static int64_t from(const Argument& a) { return a.integer; }
};
template <>
struct Take<bool> {
  static bool from(const Argument& a) { return a.integer != 0; }
};

template <class... T>
void give(const std::tuple<T...>& made, Output* outputs) {
  std::apply(
      [outputs](const T&... t) {
        int i = 0;
        (hand_over(t, outputs[i++]), ...);
      },
      made);
}
inline void give(const Tensor& made, Output* outputs) { hand_over(made, outputs[0]); }

template <auto f>
struct Entry;
template <class R, class... A, R (*f)(A...)>
struct Entry<f> {
  static typename As<R>::Type boxed(typename As<std::decay_t<A>>::Type... arguments) {
    if constexpr (std::is_void_v<R>)
      f(As<std::decay_t<A>>::ours(arguments)...);
    else
      return As<R>::torchs(f(As<std::decay_t<A>>::ours(arguments)...));
  }

  static bool direct(const Argument* arguments, Output* outputs, bool own_memory) {
    const OwnMemory scope(own_memory);
    try {
      call(arguments, outputs, std::index_sequence_for<A...>());
    } catch (const NeedsTorch&) {
      return false;
    }
    return true;
  }

 private:
  template <size_t... i>
  static void call(const Argument* arguments, Output* outputs, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<R>)
      f(Take<std::decay_t<A>>::from(arguments[i])...);
    else
      give(f(Take<std::decay_t<A>>::from(arguments[i])...), outputs);
  }
};

template <>
struct As<void> {
  using Type = void;
};

}  // namespace entry

// What torch registers for an op.
template <auto f>
constexpr auto boxed = TORCH_BOX(&entry::Entry<f>::boxed);

// Makes f the kernel of an op on the CPU, for torch and for calls past its dispatcher.
template <auto f>
void implement(torch::stable::detail::StableLibrary& library, const char* op) {
  library.impl(op, boxed<f>);
  add_direct(op, &entry::Entry<f>::direct);
}

}  // namespace mk

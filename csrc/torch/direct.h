// How csrc/python hands a call to a kernel past torch's dispatcher, in one process and of one build.
#pragma once
#include <cstdint>

namespace mk {

// A strided tensor on the CPU, as long as what it was taken from. Strides count elements.
struct Array {
  void* data;
  int64_t dims;
  const int64_t *sizes, *strides;
  int32_t type;  // torch's number for the dtype
};

struct Argument {
  const Array* array;  // of a tensor; null where it is None
  double number;       // NaN of a float that may be None and is
  int64_t integer;     // of an int or a bool
};

// An output with what gives it back: memory of its own, or a tensor of torch's.
struct Output {
  Array array;
  void* owner;
  void (*release)(void* owner);
  void* torch;  // an AtenTensorHandle, which is then the owner too; null for memory
};

// Returns false, before any work, where the kernel would need torch's functions; throws where it refuses the arguments.
// `own_memory`: outputs that are not large have memory of their own, which is quicker than torch's.
using Direct = bool (*)(const Argument* arguments, Output* outputs, bool own_memory);

}  // namespace mk

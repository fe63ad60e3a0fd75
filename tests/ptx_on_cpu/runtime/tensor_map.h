// What the stand-in for cuTensorMapEncodeTiled writes into the 128 bytes of a CUtensorMap.
#pragma once
#include <cstdint>

namespace emu {

constexpr uint32_t kTensorMap = 0x50414d54;

struct TensorMap {
  uint32_t magic;
  uint8_t rank, type, element, swizzle;  // type and swizzle as the driver numbers them; bytes of an element
  char* at;
  uint64_t size[5], stride[4];  // elements, innermost first; bytes, from the second
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128, "");

}  // namespace emu

// float16 and bfloat16 to float32 and back, in integer arithmetic without branches, so that a compiler can vectorise
// a loop over them for any instruction set. Rounding is to nearest even; a NaN stays a NaN.
#pragma once

#include <bit>
#include <cstdint>

#if defined(_MSC_VER)
#define FORGEDIT_INLINE __forceinline
#else
#define FORGEDIT_INLINE inline __attribute__((always_inline))
#endif

namespace forgedit {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

FORGEDIT_INLINE float to_float(float x) { return x; }

FORGEDIT_INLINE float to_float(Bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

FORGEDIT_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fffu;
  // Placed under float32's exponent the value is 2^-112 of what it says, subnormals included.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  return std::bit_cast<float>((magnitude >= 0x7c00u ? special : finite) | sign);
}

FORGEDIT_INLINE void from_float(float x, float& out) { out = x; }

FORGEDIT_INLINE void from_float(float x, Bfloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FORGEDIT_INLINE void from_float(float x, Float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 adding 0.5 puts the last place at 2^-24, float16's smallest step: the addition rounds.
  const uint32_t half = std::bit_cast<uint32_t>(0.5f);
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - half;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  out.bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u));
}

}  // namespace forgedit

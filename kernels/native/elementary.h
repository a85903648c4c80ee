// Elementary functions in float32, without branches or calls, so that a loop over them vectorises for any instruction
// set.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "half.h"

namespace forgedit {

// x, its magnitude brought down to `limit`, a NaN's too. On the bits: where floats are compared, a compiler that must
// heed NaN makes branches of it, and runs all of them.
FORGEDIT_INLINE float smaller_magnitude(float x, float limit) {
  const int32_t bits = std::bit_cast<int32_t>(x), magnitude = bits & 0x7fffffff;
  return std::bit_cast<float>(std::min(magnitude, std::bit_cast<int32_t>(limit)) | (bits ^ magnitude));
}

// Makes e^x of x in [-87, 87], within 2 units in the last place; of a float, or with the vector extension of GCC and
// Clang of many, Bits being unsigned integers of the same form.
// e^x = 2^n * e^r with n the nearest whole number to x / ln 2 (adding 1.5 * 2^23 rounds to it, and leaves it in the
// last bits) and r = x - n * ln 2, with ln 2 in two parts (Cody & Waite 1980) so that n times the first is exact. e^r =
// 1 + r + r^2 * P(r), P the minimax fit, in relative error, on [-ln 2 / 2, ln 2 / 2], made as geglu's is: weighted
// least squares at 400 Chebyshev points, Lawson's weights, 100 rounds. Its error is at most 3.1e-9.
template <typename Bits = uint32_t, typename Float = float>
FORGEDIT_INLINE void exponential(Float& x) {
  const Float shifted = x * 1.44269504f + 0x1.8p23f;
  const Float n = shifted - 0x1.8p23f;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const Float p = 0.499999935f + r * (0.166665207f + r * (0.0416683874f + r * (0.0083687099f + r * 0.00138146124f)));
  x = __builtin_bit_cast(Float, (__builtin_bit_cast(Bits, shifted) << 23) + 0x3f800000u) * (1.0f + (r + r * r * p));
}

}  // namespace forgedit

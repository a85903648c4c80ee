// Adam over many tensors: the moments, the float32 masters and their 16-bit copy in one pass.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "half.h"
#include "instruction_sets.h"

namespace forgedit {

// One tensor: `count` contiguous elements of each part, none overlapping another. `copy` may be null.
// size: lr / (1 - beta1^t)
struct AdamTensor {
  float* param;
  const void* gradient;
  float* moment;
  float* square;
  void* copy;
  size_t count;
  float size;
};

// root: sqrt(1 - beta2^t); new1, new2: 1 - beta1, 1 - beta2; keep2: beta2; least: of 8-bit moments alone, the share of
// m^2 that v counts as at least
struct AdamSettings {
  float root, new1, keep2, new2, eps;
  float least = 0.0f;
};

FORGEDIT_INLINE float adam_moment(const AdamSettings& s, float m, float g) { return m + s.new1 * (g - m); }

FORGEDIT_INLINE float adam_square(const AdamSettings& s, float v, float g) { return s.keep2 * v + s.new2 * g * g; }

FORGEDIT_INLINE float adam_change(const AdamSettings& s, float size, float m, float v) {
  return size * m / (__builtin_sqrtf(v) / s.root + s.eps);
}

// gradient: float32 or bfloat16; copy: bfloat16, float16 or none.
// Every element is computed alone: `threads` does not change a bit of the result.
// Throws std::invalid_argument for another dtype, or if this processor lacks `instruction_set`.
void adam(const std::vector<AdamTensor>& tensors, const AdamSettings& settings, Dtype gradient,
          std::optional<Dtype> copy, int threads, const std::string& instruction_set);

}  // namespace forgedit

// Adam with its moments in 8 bits: codes of a map, and a scale for each block of 256 elements.
#pragma once

#include <cstdint>

#include "adam.h"

namespace forgedit {

inline constexpr size_t kQuantBlock = 256;

// values: of the 256 codes; midpoints: for each code of a magnitude, counted from 0, that between it and the one below.
struct QuantMap {
  const float *values, *midpoints;
};

// As AdamTensor; the codes of m and v, and for each block their largest magnitudes.
struct Adam8bitTensor {
  float* param;
  const void* gradient;
  uint8_t *moment, *square;
  float *moment_scale, *square_scale;
  void* copy;
  size_t count;
  float size;
};

// Every block is computed alone: `threads` does not change a bit of the result. Throws as adam() does.
void adam8bit(const std::vector<Adam8bitTensor>& tensors, const AdamSettings& settings, const QuantMap& moments,
              const QuantMap& squares, Dtype gradient, std::optional<Dtype> copy, int threads,
              const std::string& instruction_set);

}  // namespace forgedit

// GroupNorm of x + shift over channels-last pictures, then SiLU.
#pragma once

#include <cstddef>
#include <string>

#include "instruction_sets.h"

namespace forgedit {

// Every array contiguous and of one dtype, float32 or bfloat16; computed in float32 and rounded once.
struct GroupNorm {
  const void* x;       // [batch, pixels, channels]
  const void* weight;  // [channels]
  const void* bias;    // [channels]
  const void* shift;   // a row of channels for each picture, `shift_stride` elements apart; null for none
  void* out;           // as x, apart from it
  size_t batch, pixels, channels, groups, shift_stride;
  float eps;
  bool silu;
};

// Each picture is computed alone: neither the batch nor `threads` changes a bit of it.
// Throws std::invalid_argument if this processor lacks `instruction_set`.
void group_norm_silu(const GroupNorm& op, Dtype dtype, int threads, const std::string& instruction_set);

}  // namespace forgedit

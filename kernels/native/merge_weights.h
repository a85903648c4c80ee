// The forgetting merge over many tensors: out = keep * tuned + (1 - keep) * original.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "instruction_sets.h"

namespace forgedit {

// One tensor: `count` contiguous elements. `out` may be `original` or `tuned` itself, and must not overlap them
// otherwise.
struct MergeTensor {
  const void* original;
  const void* tuned;
  void* out;
  size_t count;
};

// Computes in float32 and rounds once, to nearest even. At keep 0 and 1 copies bits.
// Every element is computed alone, so neither `threads` nor `instruction_set` changes a bit of the result.
// Throws std::invalid_argument if this processor lacks `instruction_set`.
void merge_weights(const std::vector<MergeTensor>& tensors, Dtype dtype, double keep, int threads,
                   const std::string& instruction_set);

}  // namespace forgedit

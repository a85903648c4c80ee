// Attention of short sequences in float32: softmax(scale * q @ k.T) @ v per head.
#pragma once

#include <cstddef>
#include <string>

#include "instruction_sets.h"

namespace forgedit {

// Tokens by heads by `dim` columns, for each of a batch; strides in elements, 1 along the columns.
struct Heads {
  const float* first;
  size_t batch_stride, token_stride, head_stride;
};

struct Attention {
  Heads q, k, v;
  float* out;  // [batch, queries, heads, dim], contiguous, apart from the others
  size_t batch, heads, queries, keys, dim;
  float scale;
};

// What `dim` must be a multiple of, and at most.
inline constexpr size_t kDimUnit = 16, kDimMost = 160;

// Each head is computed alone: neither the batch nor `threads` changes a bit of it.
// Throws std::invalid_argument for another dim or no keys, or if this processor lacks `instruction_set`.
void attention(const Attention& op, int threads, const std::string& instruction_set);

}  // namespace forgedit

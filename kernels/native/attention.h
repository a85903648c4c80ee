// Attention of short sequences, softmax(scale * q @ k.T) @ v per head, and its gradients; float32 or bfloat16, computed
// in float32.
#pragma once

#include <cstddef>
#include <string>

#include "instruction_sets.h"

namespace forgedit {

// Tokens by heads by `dim` columns, for each of a batch; strides in elements, 1 along the columns.
struct Heads {
  const void* first;
  size_t batch_stride, token_stride, head_stride;
};

struct Attention {
  Heads q, k, v;
  void* out;     // [batch, queries, heads, dim], contiguous, apart from the others
  float* stats;  // [batch, heads, 2, queries], takes each query's largest scaled score, and the sum of its weights
                 // e^(score - largest), which the gradients need; null if not wanted
  size_t batch, heads, queries, keys, dim;
  float scale;
};

struct AttentionBackward {
  Heads q, k, v;
  const void* dout;    // [batch, queries, heads, dim], contiguous
  const float* stats;  // as Attention left them
  void* dq;            // contiguous as q is shaped; null if not wanted
  void *dk, *dv;       // [batch, keys, heads, dim], contiguous; both null if not wanted
  size_t batch, heads, queries, keys, dim;
  float scale;
};

// What `dim` must be a multiple of, and at most.
inline constexpr size_t kDimUnit = 16, kDimMost = 160;

// Each head is computed alone: neither the batch nor `threads` changes a bit of it.
// Throws std::invalid_argument for another dim or no keys, or if this processor lacks `instruction_set`.
void attention(const Attention& op, Dtype dtype, int threads, const std::string& instruction_set);

void attention_backward(const AttentionBackward& op, Dtype dtype, int threads, const std::string& instruction_set);

}  // namespace forgedit

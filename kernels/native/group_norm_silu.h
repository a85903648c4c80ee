// GroupNorm of x + shift over channels-last pictures, then SiLU; and its gradients.
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
  float* stats;        // [batch, 2, groups]: takes the means of x + shift and 1 / sqrt(variance + eps); null for none
  size_t batch, pixels, channels, groups, shift_stride;
  float eps;
  bool silu;
};

// Each picture is computed alone: neither the batch nor `threads` changes a bit of it.
// Throws std::invalid_argument if this processor lacks `instruction_set`.
void group_norm_silu(const GroupNorm& op, Dtype dtype, int threads, const std::string& instruction_set);

// Shapes as above, all float32; dout: the gradient of out, stats: as written above.
struct GroupNormBackward {
  const float *dout, *x, *weight, *bias, *shift, *stats;
  float* dx;               // as x, apart from it and from dout
  float* dshift;           // [batch, channels], one for each picture
  float *dweight, *dbias;  // [channels]
  size_t batch, pixels, channels, groups, shift_stride;
  bool silu;
};

// `threads` does not change a bit: what the pictures give to dweight and dbias is added in their order.
// Throws std::invalid_argument if this processor lacks `instruction_set`.
void group_norm_silu_backward(const GroupNormBackward& op, int threads, const std::string& instruction_set);

}  // namespace forgedit

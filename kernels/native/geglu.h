// The gate of a GEGLU feed-forward, out = value * gelu(gate), the gelu exact (with erf); and its gradient.
#pragma once

#include <cstddef>
#include <string>

#include "instruction_sets.h"

namespace forgedit {

// product: `rows` rows of 2 * `features`, the values and then the gates; out: `rows` rows of `features`, apart from it.
// float32 or bfloat16; computed in float32 and rounded once. Neither `threads` nor the split of rows changes a bit.
// Throws std::invalid_argument for another dtype, or if this processor lacks `instruction_set`.
void geglu(const void* product, void* out, size_t rows, size_t features, Dtype dtype, int threads,
           const std::string& instruction_set);

// dout: the gradient of out; dproduct, written: that of product, apart from both. The rest as above.
// dvalue = dout * gelu(gate), dgate = dout * value * (Phi(gate) + gate * Phi'(gate)), Phi the normal distribution.
void geglu_backward(const void* product, const void* dout, void* dproduct, size_t rows, size_t features, Dtype dtype,
                    int threads, const std::string& instruction_set);

}  // namespace forgedit

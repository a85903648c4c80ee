// Registers of floats by name, for the loops that a compiler does not vectorise by itself.
#pragma once

#include <cstdint>

#include "half.h"

namespace forgedit {

// A register of floats. Without the vector extension it is one float, and the same code runs.
template <int LANES>
struct Register {
#if defined(__GNUC__) || defined(__clang__)
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
  typedef float InMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
  static constexpr int kLanes = LANES;
#else
  using Floats = float;
  using Bits = uint32_t;
  using InMemory = float;
  static constexpr int kLanes = 1;
#endif
};

// The register's worth of floats that begin at `place`. By its own type: an `auto&` would forget
// that it need not be aligned.
template <int LANES>
FORGEDIT_INLINE typename Register<LANES>::InMemory& lanes_at(float* place) {
  return *reinterpret_cast<typename Register<LANES>::InMemory*>(place);
}

template <int LANES>
FORGEDIT_INLINE const typename Register<LANES>::InMemory& lanes_at(const float* place) {
  return *reinterpret_cast<const typename Register<LANES>::InMemory*>(place);
}

}  // namespace forgedit

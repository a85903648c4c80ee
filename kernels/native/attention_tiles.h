// What attention and its gradients share: a tile of queries lies transposed, so that scores have the keys as rows and
// the queries as columns, and the softmax over keys goes down whole registers.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "register.h"

namespace forgedit {

constexpr size_t kKeys = 96;    // of a block, whose keys, values and weights stay in the first-level cache
constexpr int kMostLanes = 16;  // the widest register's
constexpr int kMostRows = 8;    // of a product
constexpr size_t kTile = 2 * kMostLanes;

// One head's tokens, in float.
struct Tokens {
  const float* first;
  size_t stride;

  const float* operator[](size_t token) const { return first + token * stride; }
};

// They are read where they lie; bfloat16's first go to `space`.
template <typename T>
FORGEDIT_INLINE Tokens tokens_of(const Heads& x, size_t batch, size_t head, size_t count, size_t dim,
                                 std::vector<float>& space) {
  const T* first = static_cast<const T*>(x.first) + batch * x.batch_stride + head * x.head_stride;
  if constexpr (std::is_same_v<T, float>) {
    return {first, x.token_stride};
  } else {
    space.resize(count * dim);
    float* wide = space.data();
    for (size_t token = 0; token < count; ++token) {
      FORGEDIT_WIDE
      for (size_t d = 0; d < dim; ++d) wide[token * dim + d] = to_float(first[token * x.token_stride + d]);
    }
    return {wide, dim};
  }
}

// out[token][d] = scale * sums[token][d], rounded.
template <typename T>
FORGEDIT_INLINE void write_tokens(const float* sums, float scale, T* out, size_t stride, size_t count, size_t dim) {
  for (size_t token = 0; token < count; ++token) {
    FORGEDIT_WIDE
    for (size_t d = 0; d < dim; ++d) from_float(sums[token * dim + d] * scale, out[token * stride + d]);
  }
}

// tile[d][n] = scale * tokens[first + n][d]; columns past `count` repeat the last.
template <size_t TILE>
FORGEDIT_INLINE void transpose(const Tokens& tokens, size_t first, size_t count, size_t dim, float scale, float* tile) {
  for (size_t n = 0; n < TILE; ++n) {
    const float* token = tokens[first + std::min(n, count - 1)];
    for (size_t d = 0; d < dim; ++d) tile[d * TILE + n] = token[d] * scale;
  }
}

// acc[r][j] = sum over i of rows[r][i * row_step] * columns[i * column_step + j lanes]: ROWS x COLUMNS registers.
template <int LANES, int ROWS, int COLUMNS>
FORGEDIT_INLINE void product(const float* const* rows, size_t row_step, const float* columns, size_t column_step,
                             size_t steps, typename Register<LANES>::Floats (&acc)[ROWS][COLUMNS]) {
  using R = Register<LANES>;
  for (auto& row : acc) {
    for (auto& sum : row) sum = typename R::Floats{};
  }
  for (size_t i = 0; i < steps; ++i) {
    typename R::Floats column[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) column[j] = lanes_at<LANES>(columns + i * column_step + j * R::kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const float factor = rows[r][i * row_step];
      for (int j = 0; j < COLUMNS; ++j) acc[r][j] += factor * column[j];
    }
  }
}

// acc[r][j] = the products of ROWS keys with a transposed tile of queries, from key m on; past the last it repeats.
template <int LANES, int ROWS, int COLUMNS>
FORGEDIT_INLINE void scores(const Tokens& keys, size_t m, size_t end, const float* tile, size_t dim,
                            typename Register<LANES>::Floats (&acc)[ROWS][COLUMNS]) {
  const float* rows[ROWS];
  for (size_t r = 0; r < ROWS; ++r) rows[r] = keys[std::min(m + r, end - 1)];
  product<LANES>(rows, 1, tile, COLUMNS * Register<LANES>::kLanes, dim, acc);
}

// sums[r][d] = keep[r] * sums[r][d] + sum over i < steps of weights[r * row + i * step] * columns[i][d], of `count`
// rows; no `keep` is 1. Weights are read up to ROWS rows further.
template <int LANES, int ROWS>
FORGEDIT_INLINE void add_weighted(const float* weights, size_t row, size_t step, const Tokens& columns, size_t steps,
                                  size_t dim, size_t count, const float* keep, float* sums) {
  constexpr int wide = LANES == 16 ? 1 : 2;
  typename Register<LANES>::Floats part[ROWS][wide];
  const float* rows[ROWS];
  for (size_t n = 0; n < count; n += ROWS) {
    for (size_t r = 0; r < ROWS; ++r) rows[r] = weights + (n + r) * row;
    for (size_t d = 0; d < dim; d += wide * Register<LANES>::kLanes) {
      product<LANES>(rows, step, columns.first + d, columns.stride, steps, part);
      for (size_t r = 0; r < ROWS && n + r < count; ++r) {
        for (int j = 0; j < wide; ++j) {
          typename Register<LANES>::InMemory& place =
              lanes_at<LANES>(sums + (n + r) * dim + d + j * Register<LANES>::kLanes);
          place = (keep ? place * keep[n + r] : place) + part[r][j];
        }
      }
    }
  }
}

// Runs `run(begin, end)` over the heads of the batch. products: as long as queries, keys and columns multiplied, by one
// head. Throws std::invalid_argument for a shape that is not served.
template <typename Op, typename Run>
void split_heads(const Op& op, size_t products, int threads, Run run) {
  if (op.dim == 0 || op.dim % kDimUnit || op.dim > kDimMost || op.keys == 0) {
    throw std::invalid_argument("dim must be a multiple of 16 up to 160 and keys at least 1, got " +
                                std::to_string(op.dim) + " and " + std::to_string(op.keys));
  }
  // A thread costs tens of microseconds, about as much as two million multiplications.
  const size_t least = (size_t{1} << 21) / std::max<size_t>(products * op.queries * op.keys * op.dim, 1) + 1;
  split(op.batch * op.heads, least, threads, run);
}

}  // namespace forgedit

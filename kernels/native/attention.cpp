#include "attention.h"

#include <limits>

#include "elementary.h"
#include "register.h"

namespace forgedit {
namespace {

constexpr size_t kKeys = 96;    // of a block, whose keys, values and weights stay in the first-level cache
constexpr int kMostLanes = 16;  // the widest register's
constexpr size_t kTile = 2 * kMostLanes;

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

// One head's queries [first, first + count), count at most COLUMNS registers of lanes. Scores lie with the keys as rows
// and the queries as columns, so that the softmax over keys goes down whole registers.
template <int LANES, int ROWS, int COLUMNS>
FORGEDIT_INLINE void attend_queries(const float* q, const float* k, const float* v, float* out, const Attention& op,
                                    size_t first, size_t count) {
  using R = Register<LANES>;
  using Floats = typename R::Floats;
  constexpr size_t tile = COLUMNS * R::kLanes;
  alignas(64) float queries[kDimMost * kTile], weights[(kKeys + ROWS) * kTile], sums[kTile * kDimMost], rescale[kTile];
  const float* rows[ROWS];
  Floats acc[ROWS][COLUMNS], top[COLUMNS], total[COLUMNS];

  for (size_t n = 0; n < tile; ++n) {
    const float* query = q + (first + std::min(n, count - 1)) * op.q.token_stride;
    for (size_t d = 0; d < op.dim; ++d) queries[d * tile + n] = query[d] * op.scale;
  }
  for (int j = 0; j < COLUMNS; ++j) {
    top[j] = Floats{} - std::numeric_limits<float>::infinity();
    total[j] = Floats{};
  }
  // Blocks of nearly equal size.
  const size_t blocks = (op.keys + kKeys - 1) / kKeys;
  for (size_t block = 0; block < blocks; ++block) {
    const size_t begin = op.keys * block / blocks, keys = op.keys * (block + 1) / blocks - begin;
    Floats new_top[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) new_top[j] = top[j];
    for (size_t m = 0; m < keys; m += ROWS) {
      for (size_t r = 0; r < ROWS; ++r) rows[r] = k + (begin + std::min(m + r, keys - 1)) * op.k.token_stride;
      product<LANES>(rows, 1, queries, tile, op.dim, acc);
      for (int r = 0; r < ROWS; ++r) {  // those past the last key repeat it, and are not read
        for (int j = 0; j < COLUMNS; ++j) {
          lanes_at<LANES>(weights + (m + r) * tile + j * R::kLanes) = acc[r][j];
          new_top[j] = new_top[j] > acc[r][j] ? new_top[j] : acc[r][j];
        }
      }
    }
    for (int j = 0; j < COLUMNS; ++j) {
      Floats sum{};
      for (size_t m = 0; m <= keys; ++m) {  // the last: by how much the old sums shrink
        auto& place = lanes_at<LANES>((m < keys ? weights + m * tile : rescale) + j * R::kLanes);
        Floats weight = (m < keys ? Floats{place} : top[j]) - new_top[j];
        weight = weight < -87.0f ? Floats{} - 87.0f : weight;
        exponential<typename R::Bits>(weight);
        place = weight;
        sum += m < keys ? weight : total[j] * weight;
      }
      total[j] = sum;
      top[j] = new_top[j];
    }
    for (size_t n = 0; n < count; n += ROWS) {
      for (size_t r = 0; r < ROWS; ++r) rows[r] = weights + std::min(n + r, tile - 1);
      constexpr int wide = LANES == 16 ? 1 : 2;
      for (size_t d = 0; d < op.dim; d += wide * R::kLanes) {
        Floats part[ROWS][wide];
        product<LANES>(rows, tile, v + begin * op.v.token_stride + d, op.v.token_stride, keys, part);
        for (size_t r = 0; r < ROWS && n + r < tile; ++r) {
          for (int j = 0; j < wide; ++j) {
            auto& place = lanes_at<LANES>(sums + (n + r) * op.dim + d + j * R::kLanes);
            place = block ? place * rescale[n + r] + part[r][j] : part[r][j];
          }
        }
      }
    }
  }
  for (int j = 0; j < COLUMNS; ++j) lanes_at<LANES>(rescale + j * R::kLanes) = total[j];
  for (size_t n = 0; n < count; ++n) {
    const float inverse = 1.0f / rescale[n];
    float* row = out + (first + n) * op.heads * op.dim;
    FORGEDIT_WIDE
    for (size_t d = 0; d < op.dim; ++d) row[d] = sums[n * op.dim + d] * inverse;
  }
}

template <int LANES, int ROWS>
FORGEDIT_INLINE void attend(const Attention& op, size_t begin, size_t end) {
  for (size_t index = begin; index < end; ++index) {
    const size_t batch = index / op.heads, head = index % op.heads;
    const auto at = [&](const Heads& x) { return x.first + batch * x.batch_stride + head * x.head_stride; };
    const float *q = at(op.q), *k = at(op.k), *v = at(op.v);
    float* out = op.out + (batch * op.queries * op.heads + head) * op.dim;
    constexpr size_t lanes = Register<LANES>::kLanes;
    for (size_t first = 0; first < op.queries; first += 2 * lanes) {
      const size_t left = op.queries - first;
      if (left > lanes) {
        attend_queries<LANES, ROWS, 2>(q, k, v, out, op, first, std::min(left, 2 * lanes));
      } else {
        attend_queries<LANES, ROWS, 1>(q, k, v, out, op, first, left);
      }
    }
  }
}

void attend_baseline(const Attention& op, size_t begin, size_t end) { attend<4, 4>(op, begin, end); }

FORGEDIT_AVX2 void attend_avx2(const Attention& op, size_t begin, size_t end) { attend<8, 4>(op, begin, end); }

FORGEDIT_AVX512 void attend_avx512(const Attention& op, size_t begin, size_t end) { attend<16, 8>(op, begin, end); }

}  // namespace

void attention(const Attention& op, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, attend_baseline, attend_avx2, attend_avx512);
  if (op.dim == 0 || op.dim % kDimUnit || op.dim > kDimMost || op.keys == 0) {
    throw std::invalid_argument("dim must be a multiple of 16 up to 160 and keys at least 1, got " +
                                std::to_string(op.dim) + " and " + std::to_string(op.keys));
  }
  // A thread costs tens of microseconds, about as much as a million multiplications.
  const size_t least = (size_t{1} << 20) / std::max<size_t>(op.queries * op.keys * op.dim, 1) + 1;
  split(op.batch * op.heads, least, threads, [&](size_t begin, size_t end) { run(op, begin, end); });
}

}  // namespace forgedit

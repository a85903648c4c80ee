#include "attention.h"

#include <limits>

#include "attention_tiles.h"
#include "elementary.h"

namespace forgedit {
namespace {

// One head's queries [first, first + count), count at most COLUMNS registers of lanes; stats: of the head, or null.
template <int LANES, int ROWS, int COLUMNS, typename T>
FORGEDIT_INLINE void attend_queries(const Attention& op, const Tokens& q, const Tokens& k, const Tokens& v, T* out,
                                    float* stats, size_t first, size_t count) {
  using R = Register<LANES>;
  using Floats = typename R::Floats;
  constexpr size_t tile = COLUMNS * R::kLanes;
  alignas(64) float queries[kDimMost * kTile], weights[(kKeys + kMostRows) * kTile + kMostRows], sums[kTile * kDimMost],
      rescale[kTile];
  Floats acc[ROWS][COLUMNS], top[COLUMNS], total[COLUMNS];

  transpose<tile>(q, first, count, op.dim, op.scale, queries);
  std::fill(sums, sums + count * op.dim, 0.0f);
  for (int j = 0; j < COLUMNS; ++j) {
    top[j] = Floats{} - std::numeric_limits<float>::infinity();
    total[j] = Floats{};
  }
  // Blocks of nearly equal size.
  const size_t blocks = (op.keys + kKeys - 1) / kKeys;
  for (size_t block = 0; block < blocks; ++block) {
    const size_t begin = op.keys * block / blocks, end = op.keys * (block + 1) / blocks, keys = end - begin;
    Floats new_top[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) new_top[j] = top[j];
    for (size_t m = 0; m < keys; m += ROWS) {
      scores<LANES>(k, begin + m, end, queries, op.dim, acc);
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
        typename R::InMemory& place = lanes_at<LANES>((m < keys ? weights + m * tile : rescale) + j * R::kLanes);
        Floats weight = (m < keys ? Floats{place} : top[j]) - new_top[j];
        weight = weight < -87.0f ? Floats{} - 87.0f : weight;
        exponential<typename R::Bits>(weight);
        place = weight;
        sum += m < keys ? weight : total[j] * weight;
      }
      total[j] = sum;
      top[j] = new_top[j];
    }
    add_weighted<LANES, ROWS>(weights, 1, tile, {v[begin], v.stride}, keys, op.dim, count, rescale, sums);
  }
  float *tops = queries, *totals = rescale;  // nobody reads the queries any more
  for (int j = 0; j < COLUMNS; ++j) {
    lanes_at<LANES>(tops + j * R::kLanes) = top[j];
    lanes_at<LANES>(totals + j * R::kLanes) = total[j];
  }
  for (size_t n = 0; n < count; ++n) {
    write_tokens(sums + n * op.dim, 1.0f / totals[n], out + (first + n) * op.heads * op.dim, 0, 1, op.dim);
  }
  if (stats) {
    std::copy(tops, tops + count, stats + first);
    std::copy(totals, totals + count, stats + op.queries + first);
  }
}

template <int LANES, int ROWS, typename T>
FORGEDIT_INLINE void attend(const Attention& op, size_t begin, size_t end) {
  std::vector<float> space[3];
  for (size_t index = begin; index < end; ++index) {
    const size_t batch = index / op.heads, head = index % op.heads;
    const Tokens q = tokens_of<T>(op.q, batch, head, op.queries, op.dim, space[0]);
    const Tokens k = tokens_of<T>(op.k, batch, head, op.keys, op.dim, space[1]);
    const Tokens v = tokens_of<T>(op.v, batch, head, op.keys, op.dim, space[2]);
    T* out = static_cast<T*>(op.out) + (batch * op.queries * op.heads + head) * op.dim;
    float* stats = op.stats ? op.stats + index * 2 * op.queries : nullptr;
    constexpr size_t lanes = Register<LANES>::kLanes;
    for (size_t first = 0; first < op.queries; first += 2 * lanes) {
      const size_t left = op.queries - first;
      if (left > lanes) {
        attend_queries<LANES, ROWS, 2>(op, q, k, v, out, stats, first, std::min(left, 2 * lanes));
      } else {
        attend_queries<LANES, ROWS, 1>(op, q, k, v, out, stats, first, left);
      }
    }
  }
}

template <int LANES, int ROWS>
FORGEDIT_INLINE void attend_any(const Attention& op, Dtype dtype, size_t begin, size_t end) {
  dtype == Dtype::kFloat32 ? attend<LANES, ROWS, float>(op, begin, end) : attend<LANES, ROWS, Bfloat16>(op, begin, end);
}

void attend_baseline(const Attention& op, Dtype dtype, size_t begin, size_t end) {
  attend_any<4, 4>(op, dtype, begin, end);
}

FORGEDIT_AVX2 void attend_avx2(const Attention& op, Dtype dtype, size_t begin, size_t end) {
  attend_any<8, 4>(op, dtype, begin, end);
}

FORGEDIT_AVX512 void attend_avx512(const Attention& op, Dtype dtype, size_t begin, size_t end) {
  attend_any<16, 8>(op, dtype, begin, end);
}

}  // namespace

void attention(const Attention& op, Dtype dtype, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, attend_baseline, attend_avx2, attend_avx512);
  split_heads(op, 2, threads, [&](size_t begin, size_t end) { run(op, dtype, begin, end); });
}

}  // namespace forgedit

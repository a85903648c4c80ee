#include "attention_tiles.h"
#include "elementary.h"

namespace forgedit {
namespace {

// One head: what is read, what its tiles of queries write in turn, and the gradients of its keys and values so far,
// [keys, dim], before the scale.
struct Head {
  Tokens q, k, v, dout;
  const float* stats;
  float *weights, *dscores;  // [keys, tile]
  float *dk, *dv;            // null if not wanted
};

struct alignas(4 * kMostLanes) Line {
  float lanes[kMostLanes];
};

// Queries [first, first + count), count at most COLUMNS registers of lanes: with weights p = e^(score - top) / total
// and a gradient dp of each, dout @ v.T, the gradient of a score is p * (dp - delta), delta = sum of p * dp over the
// keys. Dao (arXiv 2205.14135, appendix B) takes out . dout for it, which one pass over the keys allows; made of the
// very dp, its rounding cancels theirs.
template <int LANES, int ROWS, int COLUMNS, typename T>
FORGEDIT_INLINE void differentiate_queries(const AttentionBackward& op, const Head& head, T* dq, size_t first,
                                           size_t count) {
  using R = Register<LANES>;
  using Floats = typename R::Floats;
  constexpr size_t tile = COLUMNS * R::kLanes;
  alignas(64) float queries[kDimMost * kTile], douts[kDimMost * kTile], sums[kTile * kDimMost], tops[kTile],
      inverses[kTile];
  Floats acc[ROWS][COLUMNS], delta[COLUMNS];

  transpose<tile>(head.q, first, count, op.dim, op.scale, queries);
  transpose<tile>(head.dout, first, count, op.dim, 1.0f, douts);
  std::fill(sums, sums + count * op.dim, 0.0f);
  for (size_t n = 0; n < tile; ++n) {
    const size_t token = first + std::min(n, count - 1);
    tops[n] = head.stats[token];
    inverses[n] = 1.0f / head.stats[op.queries + token];
  }
  for (size_t m = 0; m < op.keys; m += ROWS) {  // rows past the last key repeat it, and are not added
    scores<LANES>(head.k, m, op.keys, queries, op.dim, acc);
    for (int r = 0; r < ROWS; ++r) {
      for (int j = 0; j < COLUMNS; ++j) {
        Floats weight = acc[r][j] - lanes_at<LANES>(tops + j * R::kLanes);
        weight = weight < -87.0f ? Floats{} - 87.0f : weight;
        exponential<typename R::Bits>(weight);
        lanes_at<LANES>(head.weights + (m + r) * tile + j * R::kLanes) =
            weight * lanes_at<LANES>(inverses + j * R::kLanes);
      }
    }
    scores<LANES>(head.v, m, op.keys, douts, op.dim, acc);
    for (int r = 0; r < ROWS; ++r) {
      for (int j = 0; j < COLUMNS; ++j) lanes_at<LANES>(head.dscores + (m + r) * tile + j * R::kLanes) = acc[r][j];
    }
  }
  for (int j = 0; j < COLUMNS; ++j) {
    delta[j] = Floats{};
    for (size_t at = j * R::kLanes; at < op.keys * tile; at += tile) {
      delta[j] += lanes_at<LANES>(head.weights + at) * lanes_at<LANES>(head.dscores + at);
    }
    for (size_t at = j * R::kLanes; at < op.keys * tile; at += tile) {
      typename R::InMemory& place = lanes_at<LANES>(head.dscores + at);
      place = lanes_at<LANES>(head.weights + at) * (place - delta[j]);
    }
  }
  const Tokens own_q{head.q[first], head.q.stride}, own_dout{head.dout[first], head.dout.stride};
  for (size_t begin = 0; begin < op.keys; begin += kKeys) {
    const size_t keys = std::min(kKeys, op.keys - begin), done = begin * op.dim;
    const float *weights = head.weights + begin * tile, *dscores = head.dscores + begin * tile;
    if (dq) {
      add_weighted<LANES, ROWS>(dscores, 1, tile, {head.k[begin], head.k.stride}, keys, op.dim, count, nullptr, sums);
    }
    if (head.dk) {
      add_weighted<LANES, ROWS>(dscores, tile, 1, own_q, count, op.dim, keys, nullptr, head.dk + done);
      add_weighted<LANES, ROWS>(weights, tile, 1, own_dout, count, op.dim, keys, nullptr, head.dv + done);
    }
  }
  const size_t stride = op.heads * op.dim;
  if (dq) write_tokens(sums, op.scale, dq + first * stride, stride, count, op.dim);
}

template <int LANES, int ROWS, typename T>
FORGEDIT_INLINE void differentiate(const AttentionBackward& op, size_t begin, size_t end) {
  const size_t stride = op.heads * op.dim, padded = (op.keys + 2 * kMostRows) * kTile;
  std::vector<float> space[4], gradients(op.dk ? 2 * op.keys * op.dim : 0);
  std::vector<Line> tiles(2 * padded / kMostLanes);
  const Heads dout{op.dout, op.queries * stride, stride, op.dim};
  float* dk = op.dk ? gradients.data() : nullptr;
  float* dv = op.dk ? dk + op.keys * op.dim : nullptr;
  for (size_t index = begin; index < end; ++index) {
    const size_t batch = index / op.heads, at = index % op.heads;
    const Head head{tokens_of<T>(op.q, batch, at, op.queries, op.dim, space[0]),
                    tokens_of<T>(op.k, batch, at, op.keys, op.dim, space[1]),
                    tokens_of<T>(op.v, batch, at, op.keys, op.dim, space[2]),
                    tokens_of<T>(dout, batch, at, op.queries, op.dim, space[3]),
                    op.stats + index * 2 * op.queries,
                    tiles.data()->lanes,
                    tiles.data()->lanes + padded,
                    dk,
                    dv};
    T* dq = op.dq ? static_cast<T*>(op.dq) + batch * op.queries * stride + at * op.dim : nullptr;
    std::fill(gradients.begin(), gradients.end(), 0.0f);
    constexpr size_t lanes = Register<LANES>::kLanes;
    for (size_t first = 0; first < op.queries; first += 2 * lanes) {
      const size_t left = op.queries - first;
      if (left > lanes) {
        differentiate_queries<LANES, ROWS, 2>(op, head, dq, first, std::min(left, 2 * lanes));
      } else {
        differentiate_queries<LANES, ROWS, 1>(op, head, dq, first, left);
      }
    }
    if (op.dk) {
      const size_t place = batch * op.keys * stride + at * op.dim;
      write_tokens(dk, op.scale, static_cast<T*>(op.dk) + place, stride, op.keys, op.dim);
      write_tokens(dv, 1.0f, static_cast<T*>(op.dv) + place, stride, op.keys, op.dim);
    }
  }
}

template <int LANES, int ROWS>
FORGEDIT_INLINE void differentiate_any(const AttentionBackward& op, Dtype dtype, size_t begin, size_t end) {
  dtype == Dtype::kFloat32 ? differentiate<LANES, ROWS, float>(op, begin, end)
                           : differentiate<LANES, ROWS, Bfloat16>(op, begin, end);
}

void differentiate_baseline(const AttentionBackward& op, Dtype dtype, size_t begin, size_t end) {
  differentiate_any<4, 4>(op, dtype, begin, end);
}

FORGEDIT_AVX2 void differentiate_avx2(const AttentionBackward& op, Dtype dtype, size_t begin, size_t end) {
  differentiate_any<8, 4>(op, dtype, begin, end);
}

FORGEDIT_AVX512 void differentiate_avx512(const AttentionBackward& op, Dtype dtype, size_t begin, size_t end) {
  differentiate_any<16, 8>(op, dtype, begin, end);
}

}  // namespace

void attention_backward(const AttentionBackward& op, Dtype dtype, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, differentiate_baseline, differentiate_avx2, differentiate_avx512);
  split_heads(op, 5, threads, [&](size_t begin, size_t end) { run(op, dtype, begin, end); });
}

}  // namespace forgedit

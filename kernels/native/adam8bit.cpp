#include "adam8bit.h"

#include <type_traits>

#include "elementary.h"
#include "spans.h"

namespace forgedit {
namespace {

// The slope of decade i's line, 0.9 * 10^(i - 6) wide: see adam8bit.py. All lines at 0 have 8/9 of their first code.
constexpr float kSlopes[7] = {1e6f / 0.9f,   2e5f / 0.9f,   4e4f / 0.9f, 8e3f / 0.9f,
                              1.6e3f / 0.9f, 320.0f / 0.9f, 64.0f / 0.9f};

// The largest magnitude; on the bits, as a maximum of floats that heeds NaN does not vectorise. A NaN is larger yet.
FORGEDIT_INLINE float largest(const float* x, size_t count) {
  int32_t most = 0;
  for (size_t i = 0; i < count; ++i) most = std::max(most, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(most);
}

// The nearest code of x / divisor. The magnitude's place on the concave curve through the decades is the least of their
// lines; rounded up a little it is the code or the next, and one midpoint says which.
template <bool SIGNED>
FORGEDIT_INLINE uint8_t nearest(float x, float divisor, const QuantMap& map) {
  const float scaled = smaller_magnitude(x / divisor, 1.0f);  // a NaN becomes 1: codes stay inside the map
  const float magnitude = std::bit_cast<float>(std::bit_cast<int32_t>(scaled) & 0x7fffffff);
  const float first = SIGNED ? 1.0f : 2.0f;
  int32_t least = 0x7f000000;  // positive floats are ordered as their bits are
  for (int i = 0; i < 7; ++i) {
    const float line = first * (static_cast<float>(1 << i) * (8.0f / 9.0f) + kSlopes[i] * magnitude);
    least = std::min(least, std::bit_cast<int32_t>(line));
  }
  int32_t code = static_cast<int32_t>(std::bit_cast<float>(least) + (SIGNED ? 0.3f : -0.7f));
  code -= magnitude < map.midpoints[code] ? 1 : 0;
  if constexpr (SIGNED) return static_cast<uint8_t>(scaled < 0.0f ? 127 - std::min(code, 127) : 127 + code);
  return static_cast<uint8_t>(code);
}

template <bool SIGNED>
FORGEDIT_INLINE void quantize(const float* x, size_t count, const QuantMap& map, uint8_t* codes, float* scale) {
  const float most = largest(x, count);
  *scale = most;
  const float divisor = most > 0.0f ? most : 1.0f;
  const QuantMap local = map;
  FORGEDIT_WIDE
  for (size_t i = 0; i < count; ++i) codes[i] = nearest<SIGNED>(x[i], divisor, local);
}

template <typename Gradient, typename Copy>
FORGEDIT_INLINE void update_blocks(const Adam8bitTensor& tensor, const AdamSettings& settings, const QuantMap& moments,
                                   const QuantMap& squares, size_t begin, size_t end) {
  const AdamSettings s = settings;
  const float size = tensor.size;
  alignas(64) float m[kQuantBlock], v[kQuantBlock];
  for (size_t block = begin; block < end; ++block) {
    const size_t first = block * kQuantBlock, count = std::min(kQuantBlock, tensor.count - first);
    const Gradient* gradient = static_cast<const Gradient*>(tensor.gradient) + first;
    float* param = tensor.param + first;
    uint8_t *moment = tensor.moment + first, *square = tensor.square + first;
    const float m_scale = tensor.moment_scale[block], v_scale = tensor.square_scale[block];
    const float *m_values = moments.values, *v_values = squares.values;
    FORGEDIT_WIDE
    for (size_t i = 0; i < count; ++i) {
      const float g = to_float(gradient[i]);
      m[i] = adam_moment(s, m_values[moment[i]] * m_scale, g);
      v[i] = adam_square(s, v_values[square[i]] * v_scale, g);
      param[i] -= adam_change(s, size, m[i], std::max(v[i], s.least * m[i] * m[i]));
    }
    if constexpr (!std::is_void_v<Copy>) {
      Copy* copy = static_cast<Copy*>(tensor.copy) + first;
      FORGEDIT_WIDE
      for (size_t i = 0; i < count; ++i) from_float(param[i], copy[i]);
    }
    quantize<true>(m, count, moments, moment, tensor.moment_scale + block);
    quantize<false>(v, count, squares, square, tensor.square_scale + block);
  }
}

template <typename Gradient>
FORGEDIT_INLINE void update_copy(const Adam8bitTensor& tensor, const AdamSettings& settings, const QuantMap& moments,
                                 const QuantMap& squares, std::optional<Dtype> copy, size_t begin, size_t end) {
  if (!copy) return update_blocks<Gradient, void>(tensor, settings, moments, squares, begin, end);
  if (*copy == Dtype::kBfloat16) {
    return update_blocks<Gradient, Bfloat16>(tensor, settings, moments, squares, begin, end);
  }
  update_blocks<Gradient, Float16>(tensor, settings, moments, squares, begin, end);
}

FORGEDIT_INLINE void update(const Adam8bitTensor& tensor, const AdamSettings& settings, const QuantMap& moments,
                            const QuantMap& squares, Dtype gradient, std::optional<Dtype> copy, size_t begin,
                            size_t end) {
  if (gradient == Dtype::kFloat32) {
    return update_copy<float>(tensor, settings, moments, squares, copy, begin, end);
  }
  update_copy<Bfloat16>(tensor, settings, moments, squares, copy, begin, end);
}

void update_baseline(const Adam8bitTensor& tensor, const AdamSettings& settings, const QuantMap& moments,
                     const QuantMap& squares, Dtype gradient, std::optional<Dtype> copy, size_t begin, size_t end) {
  update(tensor, settings, moments, squares, gradient, copy, begin, end);
}

FORGEDIT_AVX2 void update_avx2(const Adam8bitTensor& tensor, const AdamSettings& settings, const QuantMap& moments,
                               const QuantMap& squares, Dtype gradient, std::optional<Dtype> copy, size_t begin,
                               size_t end) {
  update(tensor, settings, moments, squares, gradient, copy, begin, end);
}

FORGEDIT_AVX512 void update_avx512(const Adam8bitTensor& tensor, const AdamSettings& settings, const QuantMap& moments,
                                   const QuantMap& squares, Dtype gradient, std::optional<Dtype> copy, size_t begin,
                                   size_t end) {
  update(tensor, settings, moments, squares, gradient, copy, begin, end);
}

}  // namespace

void adam8bit(const std::vector<Adam8bitTensor>& tensors, const AdamSettings& settings, const QuantMap& moments,
              const QuantMap& squares, Dtype gradient, std::optional<Dtype> copy, int threads,
              const std::string& instruction_set) {
  const auto run = choose(instruction_set, update_baseline, update_avx2, update_avx512);
  if (gradient == Dtype::kFloat16 || copy == Dtype::kFloat32) {
    throw std::invalid_argument("gradients must be float32 or bfloat16, copies bfloat16 or float16");
  }
  std::vector<size_t> blocks;
  size_t total = 0;
  for (const auto& tensor : tensors) {
    blocks.push_back((tensor.count + kQuantBlock - 1) / kQuantBlock);
    total += blocks.back();
  }
  // A thread costs about as much as 32 blocks.
  split(total, 32, threads, [&](size_t begin, size_t end) {
    visit_spans(blocks, begin, end, [&](size_t tensor, size_t low, size_t high) {
      run(tensors[tensor], settings, moments, squares, gradient, copy, low, high);
    });
  });
}

}  // namespace forgedit

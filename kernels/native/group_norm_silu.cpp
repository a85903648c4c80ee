#include "group_norm_silu.h"

#include <cmath>
#include <vector>

#include "elementary.h"
#include "half.h"

namespace forgedit {
namespace {

// Adds ROWS pixels' deviations from `center`, and their squares, to each channel's sums. The short sums of ROWS first:
// fewer stores, and errors that grow with pixels / ROWS.
template <int ROWS, typename T>
FORGEDIT_INLINE void add_rows(const T* x, size_t channels, const float* center, float* sum, float* squares) {
  FORGEDIT_WIDE
  for (size_t c = 0; c < channels; ++c) {
    float part = 0, part_squares = 0;
    for (int row = 0; row < ROWS; ++row) {
      const float apart = to_float(x[row * channels + c]) - center[c];
      part += apart;
      part_squares += apart * apart;
    }
    sum[c] += part;
    squares[c] += part_squares;
  }
}

template <typename T>
FORGEDIT_INLINE void add_picture(const T* x, size_t pixels, size_t channels, const float* center, float* sum,
                                 float* squares) {
  std::fill(sum, sum + channels, 0.0f);
  std::fill(squares, squares + channels, 0.0f);
  size_t row = 0;
  for (; row + 8 <= pixels; row += 8) add_rows<8>(x + row * channels, channels, center, sum, squares);
  for (; row < pixels; ++row) add_rows<1>(x + row * channels, channels, center, sum, squares);
}

template <bool SILU, typename T>
FORGEDIT_INLINE void write_rows(const T* x, T* out, size_t pixels, size_t channels, const float* center,
                                const float* scale, const float* bias) {
  for (size_t row = 0; row < pixels; ++row) {
    FORGEDIT_WIDE
    for (size_t c = 0; c < channels; ++c) {
      const float y = (to_float(x[row * channels + c]) - center[c]) * scale[c] + bias[c];
      float inverse = smaller_magnitude(-y, 87.0f);
      exponential(inverse);
      from_float(SILU ? y / (1.0f + inverse) : y, out[row * channels + c]);
    }
  }
}

template <typename T>
FORGEDIT_INLINE void normalise(const GroupNorm& op, size_t begin, size_t end) {
  const size_t channels = op.channels, width = channels / op.groups;
  const double count = static_cast<double>(op.pixels) * static_cast<double>(width);
  std::vector<float> rows(6 * channels);
  float *shift = rows.data(), *center = shift + channels, *scale = center + channels, *bias = scale + channels,
        *sum = bias + channels, *squares = sum + channels;
  for (size_t c = 0; c < channels; ++c) bias[c] = to_float(static_cast<const T*>(op.bias)[c]);

  for (size_t picture = begin; picture < end; ++picture) {
    const T* x = static_cast<const T*>(op.x) + picture * op.pixels * channels;
    for (size_t c = 0; op.shift && c < channels; ++c) {
      shift[c] = to_float(static_cast<const T*>(op.shift)[picture * op.shift_stride + c]);
    }
    // The first pass finds the means; the second, of deviations from them, the variances, and what the means lacked
    // (Chan, Golub & LeVeque 1983, the corrected two-pass algorithm).
    std::fill(center, center + channels, 0.0f);
    add_picture(x, op.pixels, channels, center, sum, squares);
    for (size_t first = 0; first < channels; first += width) {
      double total = 0;
      for (size_t c = first; c < first + width; ++c) total += sum[c] + static_cast<double>(op.pixels) * shift[c];
      for (size_t c = first; c < first + width; ++c) center[c] = static_cast<float>(total / count - shift[c]);
    }
    add_picture(x, op.pixels, channels, center, sum, squares);
    for (size_t first = 0; first < channels; first += width) {
      double lack = 0, total = 0;
      for (size_t c = first; c < first + width; ++c) lack += sum[c], total += squares[c];
      lack /= count;
      const double rstd = 1.0 / std::sqrt(total / count - lack * lack + op.eps);
      for (size_t c = first; c < first + width; ++c) {
        center[c] += static_cast<float>(lack);
        scale[c] = static_cast<float>(rstd * to_float(static_cast<const T*>(op.weight)[c]));
      }
    }
    T* out = static_cast<T*>(op.out) + picture * op.pixels * channels;
    if (op.silu) {
      write_rows<true>(x, out, op.pixels, channels, center, scale, bias);
    } else {
      write_rows<false>(x, out, op.pixels, channels, center, scale, bias);
    }
  }
}

FORGEDIT_INLINE void normalise_any(const GroupNorm& op, Dtype dtype, size_t begin, size_t end) {
  dtype == Dtype::kFloat32 ? normalise<float>(op, begin, end) : normalise<Bfloat16>(op, begin, end);
}

void normalise_baseline(const GroupNorm& op, Dtype dtype, size_t begin, size_t end) {
  normalise_any(op, dtype, begin, end);
}

FORGEDIT_AVX2 void normalise_avx2(const GroupNorm& op, Dtype dtype, size_t begin, size_t end) {
  normalise_any(op, dtype, begin, end);
}

FORGEDIT_AVX512 void normalise_avx512(const GroupNorm& op, Dtype dtype, size_t begin, size_t end) {
  normalise_any(op, dtype, begin, end);
}

}  // namespace

void group_norm_silu(const GroupNorm& op, Dtype dtype, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, normalise_baseline, normalise_avx2, normalise_avx512);
  // A thread costs tens of microseconds, about as much as 64 Ki elements.
  const size_t least = (size_t{1} << 16) / std::max<size_t>(op.pixels * op.channels, 1) + 1;
  split(op.batch, least, threads, [&](size_t begin, size_t end) { run(op, dtype, begin, end); });
}

}  // namespace forgedit

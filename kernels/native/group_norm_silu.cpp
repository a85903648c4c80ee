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
      if (op.stats) {
        float* stats = op.stats + picture * 2 * op.groups + first / width;
        stats[0] = static_cast<float>(static_cast<double>(center[first]) + shift[first] + lack);
        stats[op.groups] = static_cast<float>(rstd);
      }
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

// Pixels whose gradients are added up in float, before they join a double: errors do not grow with the map.
constexpr size_t kShortSum = 16;

// `elements` of the gradients before the SiLU, dz; adds them, and them times the normalised x, to each channel's sums.
template <bool SILU>
FORGEDIT_INLINE void undo_silu(const GroupNormBackward& op, const float* x, const float* dout, size_t elements,
                               const float* center, const float* rstd, float* dz, float* sum, float* dots) {
  const float *weight = op.weight, *bias = op.bias;
  for (size_t row = 0; row < elements; row += op.channels) {
    FORGEDIT_WIDE
    for (size_t c = 0; c < op.channels; ++c) {
      const float normed = (x[row + c] - center[c]) * rstd[c];
      float gradient = dout[row + c];
      if (SILU) {
        const float y = normed * weight[c] + bias[c];
        float inverse = smaller_magnitude(-y, 87.0f);
        exponential(inverse);
        const float gate = 1.0f / (1.0f + inverse);
        gradient *= gate * (1.0f + y * (inverse * gate));
      }
      dz[row + c] = gradient;
      sum[c] += gradient;
      dots[c] += gradient * normed;
    }
  }
}

// dz to dx, in place: dx = dz * scale - (x - center) * slope - constant. Adds it to each channel's sum.
FORGEDIT_INLINE void undo_norm(const GroupNormBackward& op, const float* x, size_t elements, const float* center,
                               const float* scale, const float* slope, const float* constant, float* dx, float* sum) {
  for (size_t row = 0; row < elements; row += op.channels) {
    FORGEDIT_WIDE
    for (size_t c = 0; c < op.channels; ++c) {
      const float gradient = dx[row + c] * scale[c] - (x[row + c] - center[c]) * slope[c] - constant[c];
      dx[row + c] = gradient;
      sum[c] += gradient;
    }
  }
}

// Adds short sums to long ones, and clears them for the next.
FORGEDIT_INLINE void join(float* parts, double* sums, size_t count) {
  for (size_t i = 0; i < count; ++i) sums[i] += parts[i];
  std::fill(parts, parts + count, 0.0f);
}

// sums: [batch, 2, channels], zeros; takes what each picture gives to dbias and dweight.
FORGEDIT_INLINE void differentiate(const GroupNormBackward& op, double* sums, size_t begin, size_t end) {
  const size_t channels = op.channels, width = channels / op.groups, all = op.pixels * channels;
  const size_t tile = kShortSum * channels;
  const double count = static_cast<double>(op.pixels) * static_cast<double>(width);
  std::vector<float> rows(7 * channels);
  std::vector<double> dx_sums(channels);
  float *center = rows.data(), *rstd = center + channels, *scale = rstd + channels, *slope = scale + channels,
        *constant = slope + channels, *parts = constant + channels;
  for (size_t picture = begin; picture < end; ++picture) {
    const float *x = op.x + picture * all, *dout = op.dout + picture * all;
    const float* stats = op.stats + picture * 2 * op.groups;
    float* dx = op.dx + picture * all;
    double* sum = sums + picture * 2 * channels;
    for (size_t c = 0; c < channels; ++c) {
      center[c] = stats[c / width] - (op.shift ? op.shift[picture * op.shift_stride + c] : 0.0f);
      rstd[c] = stats[op.groups + c / width];
    }
    for (size_t at = 0; at < all; at += tile) {
      const size_t elements = std::min(tile, all - at);
      if (op.silu) {
        undo_silu<true>(op, x + at, dout + at, elements, center, rstd, dx + at, parts, parts + channels);
      } else {
        undo_silu<false>(op, x + at, dout + at, elements, center, rstd, dx + at, parts, parts + channels);
      }
      join(parts, sum, 2 * channels);
    }
    for (size_t first = 0; first < channels; first += width) {
      double total = 0, along = 0;  // of the normalised x's gradients; and times the normalised x
      for (size_t c = first; c < first + width; ++c) {
        total += op.weight[c] * sum[c];
        along += op.weight[c] * sum[channels + c];
      }
      for (size_t c = first; c < first + width; ++c) {
        scale[c] = rstd[c] * op.weight[c];
        slope[c] = static_cast<float>(along / count * rstd[c] * rstd[c]);
        constant[c] = static_cast<float>(total / count * rstd[c]);
      }
    }
    std::fill(dx_sums.begin(), dx_sums.end(), 0.0);
    for (size_t at = 0; at < all; at += tile) {
      undo_norm(op, x + at, std::min(tile, all - at), center, scale, slope, constant, dx + at, parts);
      join(parts, dx_sums.data(), channels);
    }
    for (size_t c = 0; c < channels; ++c) op.dshift[picture * channels + c] = static_cast<float>(dx_sums[c]);
  }
}

void differentiate_baseline(const GroupNormBackward& op, double* sums, size_t begin, size_t end) {
  differentiate(op, sums, begin, end);
}

FORGEDIT_AVX2 void differentiate_avx2(const GroupNormBackward& op, double* sums, size_t begin, size_t end) {
  differentiate(op, sums, begin, end);
}

FORGEDIT_AVX512 void differentiate_avx512(const GroupNormBackward& op, double* sums, size_t begin, size_t end) {
  differentiate(op, sums, begin, end);
}

}  // namespace

void group_norm_silu(const GroupNorm& op, Dtype dtype, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, normalise_baseline, normalise_avx2, normalise_avx512);
  // A thread costs tens of microseconds, about as much as 64 Ki elements.
  const size_t least = (size_t{1} << 16) / std::max<size_t>(op.pixels * op.channels, 1) + 1;
  split(op.batch, least, threads, [&](size_t begin, size_t end) { run(op, dtype, begin, end); });
}

void group_norm_silu_backward(const GroupNormBackward& op, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, differentiate_baseline, differentiate_avx2, differentiate_avx512);
  std::vector<double> sums(op.batch * 2 * op.channels);
  const size_t least = (size_t{1} << 15) / std::max<size_t>(op.pixels * op.channels, 1) + 1;  // twice the work
  split(op.batch, least, threads, [&](size_t begin, size_t end) { run(op, sums.data(), begin, end); });
  for (size_t c = 0; c < op.channels; ++c) {
    double bias = 0, weight = 0;
    for (size_t picture = 0; picture < op.batch; ++picture) {
      bias += sums[picture * 2 * op.channels + c];
      weight += sums[(picture * 2 + 1) * op.channels + c];
    }
    op.dbias[c] = static_cast<float>(bias);
    op.dweight[c] = static_cast<float>(weight);
  }
}

}  // namespace forgedit

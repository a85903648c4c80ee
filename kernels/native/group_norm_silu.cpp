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

// `elements` of the gradients before the SiLU, dz; adds to each channel's sums: of dz, of dz times the normalised x,
// and of the normalised x.
template <bool SILU>
FORGEDIT_INLINE void undo_silu(const GroupNormBackward& op, const float* x, const float* dout, size_t elements,
                               const float* center, const float* rstd, float* dz, float* sums) {
  const size_t channels = op.channels;
  const float *weight = op.weight, *bias = op.bias;
  float *dots = sums + channels, *normed_sums = dots + channels;
  for (size_t row = 0; row < elements; row += channels) {
    FORGEDIT_WIDE
    for (size_t c = 0; c < channels; ++c) {
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
      sums[c] += gradient;
      dots[c] += gradient * normed;
      normed_sums[c] += normed;
    }
  }
}

// dz to dx, in place: dx = dz * scale - (x - center) * slope - constant.
FORGEDIT_INLINE void undo_norm(const GroupNormBackward& op, const float* x, const float* center, const float* scale,
                               const float* slope, const float* constant, float* dx) {
  for (size_t row = 0; row < op.pixels * op.channels; row += op.channels) {
    FORGEDIT_WIDE
    for (size_t c = 0; c < op.channels; ++c) {
      dx[row + c] = dx[row + c] * scale[c] - (x[row + c] - center[c]) * slope[c] - constant[c];
    }
  }
}

// sums: [batch, 3, channels], zeros; takes what each picture gives to dbias and dweight, and the normalised x's sums.
FORGEDIT_INLINE void differentiate(const GroupNormBackward& op, double* sums, size_t begin, size_t end) {
  const size_t channels = op.channels, width = channels / op.groups, all = op.pixels * channels;
  const double pixels = static_cast<double>(op.pixels), count = pixels * static_cast<double>(width);
  std::vector<float> rows(8 * channels);
  float *center = rows.data(), *rstd = center + channels, *scale = rstd + channels, *slope = scale + channels,
        *constant = slope + channels, *parts = constant + channels;
  for (size_t picture = begin; picture < end; ++picture) {
    const float *x = op.x + picture * all, *dout = op.dout + picture * all;
    const float* stats = op.stats + picture * 2 * op.groups;
    float *dx = op.dx + picture * all, *dshift = op.dshift + picture * channels;
    double *sum = sums + picture * 3 * channels, *dots = sum + channels, *normed = dots + channels;
    for (size_t first = 0; first < channels; first += width) {
      const float mean = stats[first / width], inverse = stats[op.groups + first / width];
      for (size_t c = first; c < first + width; ++c) {
        center[c] = mean - (op.shift ? op.shift[picture * op.shift_stride + c] : 0.0f);
        rstd[c] = inverse;
      }
    }
    for (size_t at = 0; at < all; at += kShortSum * channels) {
      const size_t elements = std::min(kShortSum * channels, all - at);
      std::fill(parts, parts + 3 * channels, 0.0f);
      if (op.silu) {
        undo_silu<true>(op, x + at, dout + at, elements, center, rstd, dx + at, parts);
      } else {
        undo_silu<false>(op, x + at, dout + at, elements, center, rstd, dx + at, parts);
      }
      for (size_t i = 0; i < 3 * channels; ++i) sum[i] += parts[i];
    }
    for (size_t first = 0; first < channels; first += width) {
      double mean = 0, along = 0;  // of the normalised x's gradients; and of them times the normalised x
      for (size_t c = first; c < first + width; ++c) {
        mean += op.weight[c] * sum[c];
        along += op.weight[c] * dots[c];
      }
      mean /= count;
      along /= count;
      for (size_t c = first; c < first + width; ++c) {
        scale[c] = rstd[c] * op.weight[c];
        slope[c] = static_cast<float>(along * rstd[c] * rstd[c]);
        constant[c] = static_cast<float>(mean * rstd[c]);
        // dx's sum, from sums in double: constant's rounding would come in `pixels` times
        dshift[c] = static_cast<float>((op.weight[c] * sum[c] - mean * pixels - along * normed[c]) * rstd[c]);
      }
    }
    undo_norm(op, x, center, scale, slope, constant, dx);
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
  std::vector<double> sums(std::max<size_t>(op.batch, 1) * 3 * op.channels);
  const size_t least = (size_t{1} << 15) / std::max<size_t>(op.pixels * op.channels, 1) + 1;  // twice the work
  split(op.batch, least, threads, [&](size_t begin, size_t end) { run(op, sums.data(), begin, end); });
  for (size_t picture = 1; picture < op.batch; ++picture) {
    for (size_t i = 0; i < 2 * op.channels; ++i) sums[i] += sums[picture * 3 * op.channels + i];
  }
  for (size_t c = 0; c < op.channels; ++c) {
    op.dbias[c] = static_cast<float>(sums[c]);
    op.dweight[c] = static_cast<float>(sums[op.channels + c]);
  }
}

}  // namespace forgedit

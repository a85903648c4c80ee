#include "geglu.h"

#include "elementary.h"
#include "half.h"

namespace forgedit {
namespace {

// The normal distribution: Phi(x) = 1/2 + x * P(x^2) / Q(x^2) on |x| <= 5.4, past which Phi is 0 or 1 to float32's last
// place. P / Q is the minimax fit, in Phi's absolute error, of (Phi(sqrt t) - 1/2) / sqrt t on [0, 5.4^2]: weighted
// least squares of P - Q * f at 600 Chebyshev points, the weights divided by Q and turned to the largest error (Lawson)
// for 150 rounds. Its error in Phi is at most 5.5e-9; all coefficients are positive, so that nothing cancels, and in
// float32 Phi is within 1.5e-7. That of a NaN is 0 or 1.
FORGEDIT_INLINE float normal_distribution(float x) {
  const float t = smaller_magnitude(x * x, 29.16f);
  const float p =
      0.398942232f +
      t * (0.0333722569f + t * (0.00465085311f + t * (0.000164322031f + t * (6.36002596e-06f + t * 2.33867397e-08f))));
  const float q = 1.0f + t * (0.250317931f +
                              t * (0.0283787046f + t * (0.00185898342f + t * (7.24003112e-05f + t * 1.2165915e-06f))));
  return 0.5f + smaller_magnitude(x * (p / q), 0.5f);  // past the limit x * P / Q exceeds 1/2
}

// x * Phi'(x), which is 0 to float32's last place past 13. What x * 0 adds is torch's NaN for an infinite x or a NaN.
FORGEDIT_INLINE float times_density(float x) {
  const float within = smaller_magnitude(x, 13.0f);
  float density = -0.5f * within * within;
  exponential(density);
  return within * (0.398942280f * density) + x * 0.0f;
}

// What one pass reads and writes, as geglu and geglu_backward take it; dout is null for the former.
struct Pass {
  const void* product;
  const void* dout;
  void* result;
  size_t rows, features;
  Dtype dtype;
};

template <typename T>
FORGEDIT_INLINE void forward_rows(const Pass& pass, size_t begin, size_t end) {
  const size_t features = pass.features;
  for (size_t row = begin; row < end; ++row) {
    const T* value = static_cast<const T*>(pass.product) + row * 2 * features;
    const T* gate = value + features;
    T* result = static_cast<T*>(pass.result) + row * features;
    FORGEDIT_WIDE
    for (size_t i = 0; i < features; ++i) {
      const float x = to_float(gate[i]);
      from_float(to_float(value[i]) * (x * normal_distribution(x)), result[i]);
    }
  }
}

template <typename T>
FORGEDIT_INLINE void backward_rows(const Pass& pass, size_t begin, size_t end) {
  const size_t features = pass.features;
  for (size_t row = begin; row < end; ++row) {
    const T* value = static_cast<const T*>(pass.product) + row * 2 * features;
    const T* gate = value + features;
    const T* dout = static_cast<const T*>(pass.dout) + row * features;
    T* dvalue = static_cast<T*>(pass.result) + row * 2 * features;
    T* dgate = dvalue + features;
    FORGEDIT_WIDE
    for (size_t i = 0; i < features; ++i) {
      const float x = to_float(gate[i]), dy = to_float(dout[i]), phi = normal_distribution(x);
      from_float(dy * (x * phi), dvalue[i]);
      from_float(dy * to_float(value[i]) * (phi + times_density(x)), dgate[i]);
    }
  }
}

FORGEDIT_INLINE void any_rows(const Pass& pass, size_t begin, size_t end) {
  const bool backward = pass.dout != nullptr;
  if (pass.dtype == Dtype::kFloat32) {
    backward ? backward_rows<float>(pass, begin, end) : forward_rows<float>(pass, begin, end);
  } else {
    backward ? backward_rows<Bfloat16>(pass, begin, end) : forward_rows<Bfloat16>(pass, begin, end);
  }
}

void baseline_rows(const Pass& pass, size_t begin, size_t end) { any_rows(pass, begin, end); }

FORGEDIT_AVX2 void avx2_rows(const Pass& pass, size_t begin, size_t end) { any_rows(pass, begin, end); }

FORGEDIT_AVX512 void avx512_rows(const Pass& pass, size_t begin, size_t end) { any_rows(pass, begin, end); }

void run(const Pass& pass, int threads, const std::string& instruction_set) {
  const auto rows = choose(instruction_set, baseline_rows, avx2_rows, avx512_rows);
  // A thread costs tens of microseconds, about as much as 64 Ki elements.
  const size_t least = (size_t{1} << 16) / std::max<size_t>(pass.features, 1) + 1;
  split(pass.rows, least, threads, [&](size_t begin, size_t end) { rows(pass, begin, end); });
}

}  // namespace

void geglu(const void* product, void* out, size_t rows, size_t features, Dtype dtype, int threads,
           const std::string& instruction_set) {
  run({product, nullptr, out, rows, features, dtype}, threads, instruction_set);
}

void geglu_backward(const void* product, const void* dout, void* dproduct, size_t rows, size_t features, Dtype dtype,
                    int threads, const std::string& instruction_set) {
  run({product, dout, dproduct, rows, features, dtype}, threads, instruction_set);
}

}  // namespace forgedit

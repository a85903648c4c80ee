#include "geglu.h"

#include "elementary.h"
#include "half.h"

namespace forgedit {
namespace {

// gelu(x) = x * Phi(x) with the normal distribution Phi(x) = 1/2 + x * P(x^2) / Q(x^2) on |x| <= 5.4, past which Phi is
// 0 or 1 to float32's last place. P / Q is the minimax fit, in Phi's absolute error, of (Phi(sqrt t) - 1/2) / sqrt t
// on [0, 5.4^2]: weighted least squares of P - Q * f at 600 Chebyshev points, the weights divided by Q and turned to
// the largest error (Lawson) for 150 rounds. Its error in Phi is at most 5.5e-9; all coefficients are positive, so that
// nothing cancels, and in float32 Phi is within 1.5e-7. At -infinity 0 * infinity gives NaN, as torch does.
FORGEDIT_INLINE float gelu(float x) {
  const float t = smaller_magnitude(x * x, 29.16f);
  const float p =
      0.398942232f +
      t * (0.0333722569f + t * (0.00465085311f + t * (0.000164322031f + t * (6.36002596e-06f + t * 2.33867397e-08f))));
  const float q = 1.0f + t * (0.250317931f +
                              t * (0.0283787046f + t * (0.00185898342f + t * (7.24003112e-05f + t * 1.2165915e-06f))));
  return x * (0.5f + smaller_magnitude(x * (p / q), 0.5f));  // past the limit x * P / Q exceeds 1/2
}

template <typename T>
FORGEDIT_INLINE void geglu_rows(const void* product, void* out, size_t begin, size_t end, size_t features) {
  for (size_t row = begin; row < end; ++row) {
    const T* value = static_cast<const T*>(product) + row * 2 * features;
    const T* gate = value + features;
    T* result = static_cast<T*>(out) + row * features;
    FORGEDIT_WIDE
    for (size_t i = 0; i < features; ++i) from_float(to_float(value[i]) * gelu(to_float(gate[i])), result[i]);
  }
}

FORGEDIT_INLINE void geglu_any(const void* product, void* out, size_t begin, size_t end, size_t features, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    geglu_rows<float>(product, out, begin, end, features);
  } else {
    geglu_rows<Bfloat16>(product, out, begin, end, features);
  }
}

void geglu_baseline(const void* product, void* out, size_t begin, size_t end, size_t features, Dtype dtype) {
  geglu_any(product, out, begin, end, features, dtype);
}

FORGEDIT_AVX2 void geglu_avx2(const void* product, void* out, size_t begin, size_t end, size_t features, Dtype dtype) {
  geglu_any(product, out, begin, end, features, dtype);
}

FORGEDIT_AVX512 void geglu_avx512(const void* product, void* out, size_t begin, size_t end, size_t features,
                                  Dtype dtype) {
  geglu_any(product, out, begin, end, features, dtype);
}

}  // namespace

void geglu(const void* product, void* out, size_t rows, size_t features, Dtype dtype, int threads,
           const std::string& instruction_set) {
  const auto run = choose(instruction_set, geglu_baseline, geglu_avx2, geglu_avx512);
  // A thread costs tens of microseconds, about as much as 64 Ki elements.
  const size_t least = (size_t{1} << 16) / std::max<size_t>(features, 1) + 1;
  split(rows, least, threads, [&](size_t begin, size_t end) { run(product, out, begin, end, features, dtype); });
}

}  // namespace forgedit

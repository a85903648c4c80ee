#include "adam.h"

#include <type_traits>

#include "spans.h"

namespace forgedit {
namespace {

template <typename Gradient, typename Copy>
FORGEDIT_INLINE void update_elements(const AdamTensor& tensor, const AdamSettings& settings, size_t begin, size_t end) {
  const AdamSettings s = settings;
  const float size = tensor.size;
  const Gradient* gradient = static_cast<const Gradient*>(tensor.gradient);
  Copy* copy = static_cast<Copy*>(tensor.copy);  // of void: not asked for
  float *param = tensor.param, *moment = tensor.moment, *square = tensor.square;
  FORGEDIT_WIDE
  for (size_t i = begin; i < end; ++i) {
    const float g = to_float(gradient[i]);
    const float m = adam_moment(s, moment[i], g), v = adam_square(s, square[i], g);
    const float p = param[i] - adam_change(s, size, m, v);
    moment[i] = m;
    square[i] = v;
    param[i] = p;
    if constexpr (!std::is_void_v<Copy>) from_float(p, copy[i]);
  }
}

template <typename Gradient>
FORGEDIT_INLINE void update_copy(const AdamTensor& tensor, const AdamSettings& settings, std::optional<Dtype> copy,
                                 size_t begin, size_t end) {
  if (!copy) return update_elements<Gradient, void>(tensor, settings, begin, end);
  if (*copy == Dtype::kBfloat16) return update_elements<Gradient, Bfloat16>(tensor, settings, begin, end);
  update_elements<Gradient, Float16>(tensor, settings, begin, end);
}

FORGEDIT_INLINE void update(const AdamTensor& tensor, const AdamSettings& settings, Dtype gradient,
                            std::optional<Dtype> copy, size_t begin, size_t end) {
  if (gradient == Dtype::kFloat32) return update_copy<float>(tensor, settings, copy, begin, end);
  update_copy<Bfloat16>(tensor, settings, copy, begin, end);
}

void update_baseline(const AdamTensor& tensor, const AdamSettings& settings, Dtype gradient, std::optional<Dtype> copy,
                     size_t begin, size_t end) {
  update(tensor, settings, gradient, copy, begin, end);
}

FORGEDIT_AVX2 void update_avx2(const AdamTensor& tensor, const AdamSettings& settings, Dtype gradient,
                               std::optional<Dtype> copy, size_t begin, size_t end) {
  update(tensor, settings, gradient, copy, begin, end);
}

FORGEDIT_AVX512 void update_avx512(const AdamTensor& tensor, const AdamSettings& settings, Dtype gradient,
                                   std::optional<Dtype> copy, size_t begin, size_t end) {
  update(tensor, settings, gradient, copy, begin, end);
}

}  // namespace

void adam(const std::vector<AdamTensor>& tensors, const AdamSettings& settings, Dtype gradient,
          std::optional<Dtype> copy, int threads, const std::string& instruction_set) {
  const auto run = choose(instruction_set, update_baseline, update_avx2, update_avx512);
  if (gradient == Dtype::kFloat16 || copy == Dtype::kFloat32) {
    throw std::invalid_argument("gradients must be float32 or bfloat16, copies bfloat16 or float16");
  }
  std::vector<size_t> counts;
  size_t total = 0;
  for (const auto& tensor : tensors) {
    counts.push_back(tensor.count);
    total += tensor.count;
  }
  // A thread costs about as much as 16 Ki elements.
  split(total, size_t{1} << 14, threads, [&](size_t begin, size_t end) {
    visit_spans(counts, begin, end, [&](size_t tensor, size_t low, size_t high) {
      run(tensors[tensor], settings, gradient, copy, low, high);
    });
  });
}

}  // namespace forgedit

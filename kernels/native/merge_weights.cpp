#include "merge_weights.h"

#include <algorithm>
#include <cstring>

#include "half.h"

namespace forgedit {
namespace {

// `out` may be `original` or `tuned`: each element is read before it is written, so the loop may still go wide.
template <typename T>
FORGEDIT_INLINE void merge_elements(const T* original, const T* tuned, T* out, size_t count, float keep, float forget) {
  FORGEDIT_WIDE
  for (size_t i = 0; i < count; ++i) {
    from_float(keep * to_float(tuned[i]) + forget * to_float(original[i]), out[i]);
  }
}

FORGEDIT_INLINE void merge_span(const MergeTensor& span, Dtype dtype, float keep, float forget) {
  switch (dtype) {
    case Dtype::kFloat32:
      return merge_elements(static_cast<const float*>(span.original), static_cast<const float*>(span.tuned),
                            static_cast<float*>(span.out), span.count, keep, forget);
    case Dtype::kBfloat16:
      return merge_elements(static_cast<const Bfloat16*>(span.original), static_cast<const Bfloat16*>(span.tuned),
                            static_cast<Bfloat16*>(span.out), span.count, keep, forget);
    case Dtype::kFloat16:
      return merge_elements(static_cast<const Float16*>(span.original), static_cast<const Float16*>(span.tuned),
                            static_cast<Float16*>(span.out), span.count, keep, forget);
  }
}

void merge_baseline(const MergeTensor& span, Dtype dtype, float keep, float forget) {
  merge_span(span, dtype, keep, forget);
}

FORGEDIT_AVX2 void merge_avx2(const MergeTensor& span, Dtype dtype, float keep, float forget) {
  merge_span(span, dtype, keep, forget);
}

FORGEDIT_AVX512 void merge_avx512(const MergeTensor& span, Dtype dtype, float keep, float forget) {
  merge_span(span, dtype, keep, forget);
}

// The elements [begin, end) of all tensors laid end to end.
template <typename Visit>
void visit_range(const std::vector<MergeTensor>& tensors, size_t item_bytes, size_t begin, size_t end, Visit visit) {
  size_t start = 0;
  for (const auto& tensor : tensors) {
    if (start >= end) return;
    const size_t stop = start + tensor.count;
    const size_t low = std::max(begin, start), high = std::min(end, stop);
    if (low < high) {
      const size_t offset = (low - start) * item_bytes;
      visit(MergeTensor{static_cast<const char*>(tensor.original) + offset,
                        static_cast<const char*>(tensor.tuned) + offset, static_cast<char*>(tensor.out) + offset,
                        high - low});
    }
    start = stop;
  }
}

}  // namespace

void merge_weights(const std::vector<MergeTensor>& tensors, Dtype dtype, double keep, int threads,
                   const std::string& instruction_set) {
  const auto merge = choose(instruction_set, merge_baseline, merge_avx2, merge_avx512);
  const size_t item_bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  // As torch does: the scalars are rounded to float32 once, the difference taken in double.
  const float keep_scale = static_cast<float>(keep), forget_scale = static_cast<float>(1.0 - keep);
  size_t total = 0;
  for (const auto& tensor : tensors) total += tensor.count;

  const auto run = [&](size_t begin, size_t end) {
    visit_range(tensors, item_bytes, begin, end, [&](const MergeTensor& span) {
      if (keep == 0.0 || keep == 1.0) {
        std::memmove(span.out, keep == 0.0 ? span.original : span.tuned, span.count * item_bytes);
      } else {
        merge(span, dtype, keep_scale, forget_scale);
      }
    });
  };
  // A thread costs about as much as 64 Ki elements.
  split(total, size_t{1} << 16, threads, run);
}

}  // namespace forgedit

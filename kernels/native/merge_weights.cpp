#include "merge_weights.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <stdexcept>

#include "half.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FORGEDIT_X86 1
#endif

// `out` may be `original` or `tuned`: each element is read before it is written, so a loop may still go wide.
#if defined(__clang__)
#define FORGEDIT_WIDE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FORGEDIT_WIDE _Pragma("GCC ivdep")
#else
#define FORGEDIT_WIDE
#endif

namespace forgedit {
namespace {

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

using MergeSpan = void (*)(const MergeTensor&, Dtype, float, float);

void merge_baseline(const MergeTensor& span, Dtype dtype, float keep, float forget) {
  merge_span(span, dtype, keep, forget);
}

#ifdef FORGEDIT_X86
__attribute__((target("avx2"))) void merge_avx2(const MergeTensor& span, Dtype dtype, float keep, float forget) {
  merge_span(span, dtype, keep, forget);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void merge_avx512(const MergeTensor& span, Dtype dtype, float keep,
                                                                       float forget) {
  merge_span(span, dtype, keep, forget);
}
#endif

MergeSpan choose(const std::string& name) {
  const auto sets = instruction_sets();
  if (std::find(sets.begin(), sets.end(), name) == sets.end()) {
    std::string message = "instruction set '" + name + "' does not run on this processor; expected one of:";
    for (const auto& set : sets) message += " " + set;
    throw std::invalid_argument(message);
  }
#ifdef FORGEDIT_X86
  if (name == "avx512") return merge_avx512;
  if (name == "avx2") return merge_avx2;
#endif
  return merge_baseline;
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

std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets{"baseline"};
#ifdef FORGEDIT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) sets.emplace_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    sets.emplace_back("avx512");
  }
#endif
  return sets;
}

void merge_weights(const std::vector<MergeTensor>& tensors, Dtype dtype, double keep, int threads,
                   const std::string& instruction_set) {
  const MergeSpan merge = choose(instruction_set);
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
  // A thread costs about as much as 64 Ki elements: a small merge stays on the caller's thread.
  const size_t workers = std::clamp<size_t>(total >> 16, 1, static_cast<size_t>(std::max(threads, 1)));
  const size_t share = total / workers;
  std::vector<std::future<void>> others;  // joined when it goes out of scope
  for (size_t i = 1; i < workers; ++i) {
    others.push_back(std::async(std::launch::async, run, share * i, i + 1 == workers ? total : share * (i + 1)));
  }
  run(0, workers == 1 ? total : share);
}

}  // namespace forgedit

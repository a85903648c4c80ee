// What the ops share: one body compiled for several instruction sets, the choice among them, and the split over
// threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <future>
#include <stdexcept>
#include <string>
#include <vector>

// A function so marked is compiled for that instruction set, with all that is inlined into it.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FORGEDIT_X86 1
#define FORGEDIT_AVX2 __attribute__((target("avx2,fma")))
#define FORGEDIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define FORGEDIT_AVX2
#define FORGEDIT_AVX512
#endif

// The loop's iterations are independent, whatever the compiler thinks of its pointers.
#if defined(__clang__)
#define FORGEDIT_WIDE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FORGEDIT_WIDE _Pragma("GCC ivdep")
#else
#define FORGEDIT_WIDE
#endif

namespace forgedit {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

// The instruction sets compiled in that this processor runs, from the plainest to the widest.
std::vector<std::string> instruction_sets();

// The function of the instruction set `name`. Throws std::invalid_argument if this processor lacks it.
template <typename Function>
Function choose(const std::string& name, Function baseline, Function avx2, Function avx512) {
  const auto sets = instruction_sets();
  if (std::find(sets.begin(), sets.end(), name) == sets.end()) {
    std::string message = "instruction set '" + name + "' does not run on this processor; expected one of:";
    for (const auto& set : sets) message += " " + set;
    throw std::invalid_argument(message);
  }
  return name == "avx512" ? avx512 : name == "avx2" ? avx2 : baseline;
}

// Runs `run(begin, end)` over [0, count), shared among at most `threads` threads, each with at least `least` of them.
template <typename Run>
void split(size_t count, size_t least, int threads, Run run) {
  const size_t workers = std::clamp<size_t>(count / least, 1, static_cast<size_t>(std::max(threads, 1)));
  const size_t share = count / workers;
  std::vector<std::future<void>> others;  // joined when it goes out of scope
  for (size_t i = 1; i < workers; ++i) {
    others.push_back(std::async(std::launch::async, run, share * i, i + 1 == workers ? count : share * (i + 1)));
  }
  run(0, workers == 1 ? count : share);
}

}  // namespace forgedit

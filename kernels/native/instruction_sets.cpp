#include "instruction_sets.h"

namespace forgedit {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets{"baseline"};
#ifdef FORGEDIT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.emplace_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.emplace_back("avx512");
  }
#endif
  return sets;
}

}  // namespace forgedit

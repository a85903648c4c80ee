// Many tensors taken as one long row of items, so that threads share the items and not the tensors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace forgedit {

// Calls visit(tensor, low, high) for the items [begin, end) of all tensors laid end to end, `low` and `high` counted
// from the tensor's own start; counts: items of each tensor.
template <typename Visit>
void visit_spans(const std::vector<size_t>& counts, size_t begin, size_t end, Visit visit) {
  size_t start = 0;
  for (size_t tensor = 0; tensor < counts.size() && start < end; ++tensor) {
    const size_t low = std::max(begin, start), high = std::min(end, start + counts[tensor]);
    if (low < high) visit(tensor, low - start, high - start);
    start += counts[tensor];
  }
}

}  // namespace forgedit

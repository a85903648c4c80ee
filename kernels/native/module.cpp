// The Python face of the native ops. Tensors come as addresses: forgedit_kernels validates them and keeps them alive,
// and a DLPack capsule for each of a UNet's thousand tensors would cost more than a small merge itself.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "merge_weights.h"

namespace nb = nanobind;

namespace {

forgedit::Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return forgedit::Dtype::kFloat32;
  if (name == "bfloat16") return forgedit::Dtype::kBfloat16;
  if (name == "float16") return forgedit::Dtype::kFloat16;
  throw std::invalid_argument("unknown dtype '" + name + "'; expected one of: float32, bfloat16, float16");
}

void merge_weights(const std::vector<uintptr_t>& original, const std::vector<uintptr_t>& tuned,
                   const std::vector<uintptr_t>& out, const std::vector<size_t>& counts, const std::string& dtype,
                   double keep, int threads, const std::string& instruction_set) {
  if (tuned.size() != original.size() || out.size() != original.size() || counts.size() != original.size()) {
    throw std::invalid_argument("original, tuned, out and counts must have the same length");
  }
  std::vector<forgedit::MergeTensor> tensors;
  tensors.reserve(original.size());
  for (size_t i = 0; i < original.size(); ++i) {
    tensors.push_back({reinterpret_cast<const void*>(original[i]), reinterpret_cast<const void*>(tuned[i]),
                       reinterpret_cast<void*>(out[i]), counts[i]});
  }
  const forgedit::Dtype parsed = parse_dtype(dtype);
  nb::gil_scoped_release release;
  forgedit::merge_weights(tensors, parsed, keep, threads, instruction_set);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("instruction_sets", &forgedit::instruction_sets,
        "Instruction sets this processor runs, from the plainest to the widest.");
  m.def("merge_weights", &merge_weights, nb::arg("original"), nb::arg("tuned"), nb::arg("out"), nb::arg("counts"),
        nb::kw_only(), nb::arg("dtype"), nb::arg("keep"), nb::arg("threads"), nb::arg("instruction_set"),
        "Merge tensors given by address and element count.");
}

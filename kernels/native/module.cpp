// The Python face of the native ops. Tensors come as addresses: forgedit_kernels validates them and keeps them alive,
// and a DLPack capsule for each of a UNet's thousand tensors would cost more than a small merge itself.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <stdexcept>

#include "adam.h"
#include "adam8bit.h"
#include "attention.h"
#include "geglu.h"
#include "group_norm_silu.h"
#include "merge_weights.h"

namespace nb = nanobind;

namespace {

forgedit::Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return forgedit::Dtype::kFloat32;
  if (name == "bfloat16") return forgedit::Dtype::kBfloat16;
  if (name == "float16") return forgedit::Dtype::kFloat16;
  throw std::invalid_argument("unknown dtype '" + name + "'; expected one of: float32, bfloat16, float16");
}

// Of the ops that compute in float32 what oneDNN too computes on the CPU: no float16.
forgedit::Dtype parse_wide_dtype(const std::string& name) {
  const forgedit::Dtype dtype = parse_dtype(name);
  if (dtype == forgedit::Dtype::kFloat16) {
    throw std::invalid_argument("dtype float16 has no native kernel here; expected one of: float32, bfloat16");
  }
  return dtype;
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
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
    tensors.push_back(
        {pointer<const void>(original[i]), pointer<const void>(tuned[i]), pointer<void>(out[i]), counts[i]});
  }
  const forgedit::Dtype parsed = parse_dtype(dtype);
  nb::gil_scoped_release release;
  forgedit::merge_weights(tensors, parsed, keep, threads, instruction_set);
}

void geglu(uintptr_t product, uintptr_t out, size_t rows, size_t features, const std::string& dtype, int threads,
           const std::string& instruction_set) {
  const forgedit::Dtype parsed = parse_wide_dtype(dtype);
  nb::gil_scoped_release release;
  forgedit::geglu(pointer<const void>(product), pointer<void>(out), rows, features, parsed, threads, instruction_set);
}

void geglu_backward(uintptr_t product, uintptr_t dout, uintptr_t dproduct, size_t rows, size_t features,
                    const std::string& dtype, int threads, const std::string& instruction_set) {
  const forgedit::Dtype parsed = parse_wide_dtype(dtype);
  nb::gil_scoped_release release;
  forgedit::geglu_backward(pointer<const void>(product), pointer<const void>(dout), pointer<void>(dproduct), rows,
                           features, parsed, threads, instruction_set);
}

void require_whole_groups(size_t groups, size_t channels) {
  if (groups == 0 || channels % groups) {
    throw std::invalid_argument("groups must divide the channels, got " + std::to_string(groups) + " and " +
                                std::to_string(channels));
  }
}

void group_norm_silu(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t shift, uintptr_t out, uintptr_t stats,
                     size_t batch, size_t pixels, size_t channels, size_t groups, size_t shift_stride, float eps,
                     bool silu, const std::string& dtype, int threads, const std::string& instruction_set) {
  const forgedit::Dtype parsed = parse_wide_dtype(dtype);
  require_whole_groups(groups, channels);
  const forgedit::GroupNorm op{pointer<const void>(x),
                               pointer<const void>(weight),
                               pointer<const void>(bias),
                               pointer<const void>(shift),
                               pointer<void>(out),
                               pointer<float>(stats),
                               batch,
                               pixels,
                               channels,
                               groups,
                               shift_stride,
                               eps,
                               silu};
  nb::gil_scoped_release release;
  forgedit::group_norm_silu(op, parsed, threads, instruction_set);
}

void group_norm_silu_backward(uintptr_t dout, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t shift,
                              uintptr_t stats, uintptr_t dx, uintptr_t dshift, uintptr_t dweight, uintptr_t dbias,
                              size_t batch, size_t pixels, size_t channels, size_t groups, size_t shift_stride,
                              bool silu, int threads, const std::string& instruction_set) {
  require_whole_groups(groups, channels);
  const forgedit::GroupNormBackward op{pointer<const float>(dout),
                                       pointer<const float>(x),
                                       pointer<const float>(weight),
                                       pointer<const float>(bias),
                                       pointer<const float>(shift),
                                       pointer<const float>(stats),
                                       pointer<float>(dx),
                                       pointer<float>(dshift),
                                       pointer<float>(dweight),
                                       pointer<float>(dbias),
                                       batch,
                                       pixels,
                                       channels,
                                       groups,
                                       shift_stride,
                                       silu};
  nb::gil_scoped_release release;
  forgedit::group_norm_silu_backward(op, threads, instruction_set);
}

using Strides = std::array<size_t, 3>;

forgedit::Heads heads_at(uintptr_t first, const Strides& strides) {
  return {pointer<const void>(first), strides[0], strides[1], strides[2]};
}

void attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t stats, const Strides& q_strides,
               const Strides& k_strides, const Strides& v_strides, size_t batch, size_t heads, size_t queries,
               size_t keys, size_t dim, float scale, const std::string& dtype, int threads,
               const std::string& instruction_set) {
  const forgedit::Dtype parsed = parse_wide_dtype(dtype);
  const forgedit::Attention op{heads_at(q, q_strides),
                               heads_at(k, k_strides),
                               heads_at(v, v_strides),
                               pointer<void>(out),
                               pointer<float>(stats),
                               batch,
                               heads,
                               queries,
                               keys,
                               dim,
                               scale};
  nb::gil_scoped_release release;
  forgedit::attention(op, parsed, threads, instruction_set);
}

void attention_backward(uintptr_t dout, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t stats, uintptr_t dq,
                        uintptr_t dk, uintptr_t dv, const Strides& q_strides, const Strides& k_strides,
                        const Strides& v_strides, size_t batch, size_t heads, size_t queries, size_t keys, size_t dim,
                        float scale, const std::string& dtype, int threads, const std::string& instruction_set) {
  const forgedit::Dtype parsed = parse_wide_dtype(dtype);
  const forgedit::AttentionBackward op{heads_at(q, q_strides),
                                       heads_at(k, k_strides),
                                       heads_at(v, v_strides),
                                       pointer<const void>(dout),
                                       pointer<const float>(stats),
                                       pointer<void>(dq),
                                       pointer<void>(dk),
                                       pointer<void>(dv),
                                       batch,
                                       heads,
                                       queries,
                                       keys,
                                       dim,
                                       scale};
  nb::gil_scoped_release release;
  forgedit::attention_backward(op, parsed, threads, instruction_set);
}

// Addresses of param, gradient, moment, square and copy, then the count.
using AdamRow = std::array<uintptr_t, 6>;

std::optional<forgedit::Dtype> parse_copy(const std::string& name) {
  return name.empty() ? std::nullopt : std::optional(parse_dtype(name));
}

void require_equal(size_t rows, size_t sizes) {
  if (rows != sizes) throw std::invalid_argument("table and sizes must have the same length");
}

void adam(const std::vector<AdamRow>& table, const std::vector<float>& sizes, float root, float new1, float keep2,
          float new2, float eps, const std::string& gradient, const std::string& copy, int threads,
          const std::string& instruction_set) {
  require_equal(table.size(), sizes.size());
  std::vector<forgedit::AdamTensor> tensors;
  tensors.reserve(table.size());
  for (size_t i = 0; i < table.size(); ++i) {
    const AdamRow& row = table[i];
    tensors.push_back({pointer<float>(row[0]), pointer<const void>(row[1]), pointer<float>(row[2]),
                       pointer<float>(row[3]), pointer<void>(row[4]), row[5], sizes[i]});
  }
  const forgedit::Dtype parsed = parse_dtype(gradient);
  const auto parsed_copy = parse_copy(copy);
  nb::gil_scoped_release release;
  forgedit::adam(tensors, {root, new1, keep2, new2, eps}, parsed, parsed_copy, threads, instruction_set);
}

// Addresses of param, gradient, the codes of moment and square, their scales, and copy, then the count.
using Adam8bitRow = std::array<uintptr_t, 8>;

void adam8bit(const std::vector<Adam8bitRow>& table, const std::vector<float>& sizes,
              const std::array<uintptr_t, 4>& maps, float root, float new1, float keep2, float new2, float eps,
              float least, const std::string& gradient, const std::string& copy, int threads,
              const std::string& instruction_set) {
  require_equal(table.size(), sizes.size());
  std::vector<forgedit::Adam8bitTensor> tensors;
  tensors.reserve(table.size());
  for (size_t i = 0; i < table.size(); ++i) {
    const Adam8bitRow& row = table[i];
    tensors.push_back({pointer<float>(row[0]), pointer<const void>(row[1]), pointer<uint8_t>(row[2]),
                       pointer<uint8_t>(row[3]), pointer<float>(row[4]), pointer<float>(row[5]), pointer<void>(row[6]),
                       row[7], sizes[i]});
  }
  const forgedit::QuantMap moments{pointer<const float>(maps[0]), pointer<const float>(maps[1])};
  const forgedit::QuantMap squares{pointer<const float>(maps[2]), pointer<const float>(maps[3])};
  const forgedit::Dtype parsed = parse_dtype(gradient);
  const auto parsed_copy = parse_copy(copy);
  nb::gil_scoped_release release;
  forgedit::adam8bit(tensors, {root, new1, keep2, new2, eps, least}, moments, squares, parsed, parsed_copy, threads,
                     instruction_set);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("instruction_sets", &forgedit::instruction_sets,
        "Instruction sets this processor runs, from the plainest to the widest.");
  m.def("merge_weights", &merge_weights, nb::arg("original"), nb::arg("tuned"), nb::arg("out"), nb::arg("counts"),
        nb::kw_only(), nb::arg("dtype"), nb::arg("keep"), nb::arg("threads"), nb::arg("instruction_set"),
        "Merge tensors given by address and element count.");
  m.def("adam", &adam, nb::arg("table"), nb::arg("sizes"), nb::kw_only(), nb::arg("root"), nb::arg("new1"),
        nb::arg("keep2"), nb::arg("new2"), nb::arg("eps"), nb::arg("gradient"), nb::arg("copy"), nb::arg("threads"),
        nb::arg("instruction_set"),
        "One Adam update; table: addresses of param, gradient, moment, square, copy (0 for none), and the count.");
  m.def("adam8bit", &adam8bit, nb::arg("table"), nb::arg("sizes"), nb::arg("maps"), nb::kw_only(), nb::arg("root"),
        nb::arg("new1"), nb::arg("keep2"), nb::arg("new2"), nb::arg("eps"), nb::arg("least"), nb::arg("gradient"),
        nb::arg("copy"), nb::arg("threads"), nb::arg("instruction_set"),
        "The same with 8-bit moments; table: addresses of param, gradient, the codes of moment and square, their "
        "scales, copy, and the count; maps: values and midpoints of the moments' map, then of the squares'.");
  m.def("geglu", &geglu, nb::arg("product"), nb::arg("out"), nb::kw_only(), nb::arg("rows"), nb::arg("features"),
        nb::arg("dtype"), nb::arg("threads"), nb::arg("instruction_set"),
        "out [rows, features] = value * gelu(gate) of product [rows, 2 * features]; float32 or bfloat16.");
  m.def("geglu_backward", &geglu_backward, nb::arg("product"), nb::arg("dout"), nb::arg("dproduct"), nb::kw_only(),
        nb::arg("rows"), nb::arg("features"), nb::arg("dtype"), nb::arg("threads"), nb::arg("instruction_set"),
        "dproduct [rows, 2 * features] of geglu, for dout [rows, features]; float32 or bfloat16.");
  m.def("group_norm_silu", &group_norm_silu, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("shift"),
        nb::arg("out"), nb::arg("stats") = 0, nb::kw_only(), nb::arg("batch"), nb::arg("pixels"), nb::arg("channels"),
        nb::arg("groups"), nb::arg("shift_stride"), nb::arg("eps"), nb::arg("silu"), nb::arg("dtype"),
        nb::arg("threads"), nb::arg("instruction_set"),
        "GroupNorm of x + shift over x [batch, pixels, channels], then SiLU; float32 or bfloat16; shift 0 for none; "
        "stats float32 [batch, 2, groups]: takes means and 1 / standard deviations.");
  m.def("group_norm_silu_backward", &group_norm_silu_backward, nb::arg("dout"), nb::arg("x"), nb::arg("weight"),
        nb::arg("bias"), nb::arg("shift"), nb::arg("stats"), nb::arg("dx"), nb::arg("dshift"), nb::arg("dweight"),
        nb::arg("dbias"), nb::kw_only(), nb::arg("batch"), nb::arg("pixels"), nb::arg("channels"), nb::arg("groups"),
        nb::arg("shift_stride"), nb::arg("silu"), nb::arg("threads"), nb::arg("instruction_set"),
        "Its gradients in float32, dshift [batch, channels] one for each picture.");
  m.def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("stats") = 0,
        nb::kw_only(), nb::arg("q_strides"), nb::arg("k_strides"), nb::arg("v_strides"), nb::arg("batch"),
        nb::arg("heads"), nb::arg("queries"), nb::arg("keys"), nb::arg("dim"), nb::arg("scale"), nb::arg("dtype"),
        nb::arg("threads"), nb::arg("instruction_set"),
        "Attention of float32 or bfloat16 tokens; strides in elements along the batch, the tokens and the heads; stats "
        "float32 [batch, heads, 2, queries]: takes each query's largest score and the sum of its weights.");
  m.def("attention_backward", &attention_backward, nb::arg("dout"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
        nb::arg("stats"), nb::arg("dq"), nb::arg("dk"), nb::arg("dv"), nb::kw_only(), nb::arg("q_strides"),
        nb::arg("k_strides"), nb::arg("v_strides"), nb::arg("batch"), nb::arg("heads"), nb::arg("queries"),
        nb::arg("keys"), nb::arg("dim"), nb::arg("scale"), nb::arg("dtype"), nb::arg("threads"),
        nb::arg("instruction_set"),
        "Its gradients, contiguous and in the tokens' dtype; 0 for a dq, or for dk and dv, not wanted.");
}

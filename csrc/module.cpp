// Python bindings of bagel_rt._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "decode.h"
#include "plan.h"
#ifdef BAGEL_RT_EMULATE
#include "cuda_on_host.h"
#endif

namespace py = pybind11;

namespace {

// bagel_rt.runtime.plan.Segment: mode, gen, key_start, visible, write.
using PySegment = std::tuple<std::string, py::array_t<bool, py::array::c_style | py::array::forcecast>, std::int64_t,
                             std::int64_t, std::int64_t>;

py::tuple build_plan(const std::vector<PySegment>& py_segments, std::int64_t block_q) {
  std::vector<bagel_rt::Segment> segments;
  segments.reserve(py_segments.size());
  for (const auto& [mode, gen, key_start, visible, write] : py_segments) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(gen.data());
    segments.push_back({mode == "causal", bytes, gen.size(), key_start, visible, write});
  }
  const bagel_rt::RowCounts counts = bagel_rt::count_rows(segments);
  py::array_t<std::int64_t> order(counts.total), slots(counts.total);
  py::array_t<std::int32_t> limits(counts.total);
  const std::vector<bagel_rt::Block> blocks = bagel_rt::build_plan(
      segments, counts, block_q, {order.mutable_data(), limits.mutable_data(), slots.mutable_data()});

  const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(blocks.size()), 7};
  py::array_t<std::int32_t> table(shape, reinterpret_cast<const std::int32_t*>(blocks.data()));
  return py::make_tuple(counts.gen, order, limits, slots, table);
}

#if defined(BAGEL_RT_CUDA) || defined(BAGEL_RT_EMULATE)

void bind_kernels(py::module_& module) {
  using bagel_rt::QkvArgs;
  using bagel_rt::GemvArgs;
  // module_local: the tests load a second build of this module, with the kernels as host code.
  py::class_<GemvArgs>(module, "GemvArgs", py::module_local())
      .def(py::init([](bool is_bfloat16, std::uintptr_t x, std::uintptr_t norm, std::uintptr_t w, std::int64_t x_stride,
                       std::int64_t w_stride, int B, int K, int N,
                       float eps) { return GemvArgs{is_bfloat16, x, norm, w, x_stride, w_stride, B, K, N, eps}; }));
  py::class_<QkvArgs>(module, "QkvArgs", py::module_local())
      .def(py::init([](int Hq, int Hkv, int D, std::uintptr_t bias, std::uintptr_t qk_norm, std::uintptr_t cosines,
                       std::uintptr_t sines, std::uintptr_t slots, std::uintptr_t q, std::uintptr_t k_cache,
                       std::uintptr_t v_cache, std::int64_t S, std::int64_t k_slot_stride, std::int64_t k_head_stride,
                       std::int64_t v_slot_stride, std::int64_t v_head_stride) {
        return QkvArgs{Hq, Hkv,     D,       bias, qk_norm,       cosines,       sines,         slots,
                       q,  k_cache, v_cache, S,    k_slot_stride, k_head_stride, v_slot_stride, v_head_stride};
      }));
  module.def("cuda_error", &bagel_rt::cuda_error);
  module.def("norm_shared_bytes", &bagel_rt::norm_shared_bytes);
  module.def("decode_linear", &bagel_rt::decode_linear);
  module.def("decode_qkv", &bagel_rt::decode_qkv);
  using bagel_rt::DecodeAttentionArgs;
  using bagel_rt::LogitsArgs;
  py::class_<DecodeAttentionArgs>(module, "DecodeAttentionArgs", py::module_local())
      .def(py::init([](bool is_bfloat16, int B, int Hq, int Hkv, int D, std::uintptr_t q, std::uintptr_t k,
                       std::uintptr_t v, std::uintptr_t out, std::int64_t q_row, std::int64_t q_head,
                       std::int64_t k_slot, std::int64_t k_head, std::int64_t v_slot, std::int64_t v_head,
                       std::uintptr_t starts, std::uintptr_t lengths, bool wide_starts, bool wide_lengths,
                       float scale_log2) {
        return DecodeAttentionArgs{is_bfloat16, B,           Hq,           Hkv,       D,      q,      k,      v,
                                   out,         q_row,       q_head,       k_slot,    k_head, v_slot, v_head, starts,
                                   lengths,     wide_starts, wide_lengths, scale_log2};
      }));
  py::class_<LogitsArgs>(module, "LogitsArgs", py::module_local())
      .def(py::init([](bool is_bfloat16, int rows, int columns, std::uintptr_t logits, std::int64_t row_stride) {
        return LogitsArgs{is_bfloat16, rows, columns, logits, row_stride};
      }));
  module.def("decode_attention", &bagel_rt::decode_attention);
  module.def("sample", &bagel_rt::sample);
}

#endif

#ifdef BAGEL_RT_EMULATE
constexpr bool EMULATED = true;
#else
constexpr bool EMULATED = false;
#endif

#ifdef BAGEL_RT_CUDA
constexpr bool HAS_CUDA = true;
#else
constexpr bool HAS_CUDA = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Planner and decode kernels of bagel_rt.";
  module.attr("has_cuda") = HAS_CUDA;
  module.attr("emulated") = EMULATED;
#if defined(BAGEL_RT_CUDA) || defined(BAGEL_RT_EMULATE)
  bind_kernels(module);
#endif
#ifdef BAGEL_RT_EMULATE
  module.def(
      "set_schedule", [](unsigned seed) { cuda_on_host::schedule = seed; },
      "Seed of the order of blocks and threads; 0 for the default order.");
  module.def(
      "set_pending_writes",
      [](const std::vector<std::pair<std::uintptr_t, std::size_t>>& spans) {
        cuda_on_host::pending_writes.clear();
        for (const auto& [begin, bytes] : spans) {
          cuda_on_host::pending_writes.push_back({reinterpret_cast<void*>(begin), bytes});
        }
      },
      "(address, bytes) of memory that the previous kernel is still writing when the next kernels start.");
#endif
  module.def("build_plan", &build_plan, py::arg("segments"), py::arg("block_q"),
             "bagel_rt.runtime.plan.build_plan for segments it has checked: (G, order, limits, slots, blocks).");
}

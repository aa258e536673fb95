// Python bindings of bagel_rt._C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"

namespace py = pybind11;

namespace {

// bagel_rt.plan.Segment: mode, gen, key_start, visible, write.
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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of bagel_rt.";
  module.def("build_plan", &build_plan, py::arg("segments"), py::arg("block_q"),
             "bagel_rt.plan.build_plan for segments it has checked: (G, order, limits, slots, blocks).");
}

// greedynas_ext._plan: the path plan for Python. It is no operation on tensors, so pybind11 binds it.
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "path_plan.h"

namespace py = pybind11;
using greedynas::PathPlan;
using greedynas::Traversal;

namespace {

using PathArray = py::array_t<int64_t, py::array::c_style>;
using IndexArray = py::array_t<int32_t>;

PathPlan make_plan(const PathArray& paths) {
  if (paths.ndim() != 2) {
    throw py::value_error("paths: expected [m, layers], got " + std::to_string(paths.ndim()) + " dimensions");
  }
  const int64_t* data = paths.data();
  const int64_t rows = paths.shape(0), columns = paths.shape(1);
  py::gil_scoped_release release;
  return PathPlan(data, rows, columns);
}

IndexArray nodes_array(const PathPlan& plan) {
  IndexArray array({static_cast<py::ssize_t>(plan.nodes().size()), py::ssize_t{3}});
  auto view = array.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < view.shape(0); ++i) {
    const auto& node = plan.nodes()[i];
    view(i, 0) = node.layer;
    view(i, 1) = node.op;
    view(i, 2) = node.parent;
  }
  return array;
}

IndexArray steps_array(const PathPlan& plan, Traversal traversal) {
  std::optional<std::vector<greedynas::PathStep>> steps;
  {
    py::gil_scoped_release release;
    steps = plan.steps(traversal);
  }
  IndexArray array({static_cast<py::ssize_t>(steps->size()), py::ssize_t{2}});
  auto view = array.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < view.shape(0); ++i) {
    view(i, 0) = (*steps)[i].node;
    view(i, 1) = (*steps)[i].frees_parent;
  }
  return array;
}

}  // namespace

PYBIND11_MODULE(_plan, module, py::mod_gil_not_used()) {
  module.doc() = "Prefix sharing: which operations a set of paths needs, and in which order to run them.";
  py::native_enum<Traversal>(module, "Traversal", "enum.Enum")
      .value("DEPTH_FIRST", Traversal::kDepthFirst)
      .value("LAYER_BY_LAYER", Traversal::kLayerByLayer)
      .finalize();
  py::class_<PathPlan>(module, "PathPlan")
      .def(py::init(&make_plan), py::arg("paths").noconvert(), "paths: int64 [m, layers], C-contiguous.")
      .def_property_readonly("num_paths", &PathPlan::num_paths)
      .def_property_readonly("num_layers", &PathPlan::num_layers)
      .def_property_readonly("nodes", &nodes_array,
                             "int32 [nodes, 3]: layer, operation, parent (-1: the stem's output).")
      .def_property_readonly(
          "leaf_of_path",
          [](const PathPlan& plan) {
            return IndexArray(static_cast<py::ssize_t>(plan.leaf_of_path().size()),
                              plan.leaf_of_path().data());
          },
          "int32 [m]: the node at which each path ends.")
      .def("steps", &steps_array, py::arg("traversal"),
           "int32 [nodes, 2]: node, and whether its parent's output is free after it.")
      .def("peak_bytes", &PathPlan::peak_bytes, py::arg("traversal"), py::arg("output_bytes"),
           py::call_guard<py::gil_scoped_release>(),
           "Most bytes of outputs alive at once; output_bytes: the stem's, then one node's of each layer.");
}

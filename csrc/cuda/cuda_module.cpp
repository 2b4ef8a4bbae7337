// greedynas_ext._cuda as a Python module: evaluation of chains, of single choice blocks and of units on a
// GPU, and the kernels one by one. Addresses come from tensors that the caller keeps alive until the stream
// has done its work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "chain.h"
#include "chain_rows.h"
#include "kernels_module.h"
#include "mixed_op.h"
#include "unit.h"

namespace py = pybind11;
using namespace greedynas;
using namespace greedynas::cuda;

namespace {

template <typename T>
T* address(intptr_t value) {
  return reinterpret_cast<T*>(value);
}

Precision precision_of(const std::string& name) {
  if (name == "fp32") return Precision::kFloat32;
  if (name == "bf16") return Precision::kBFloat16;
  if (name == "fp16") return Precision::kHalf;
  throw std::invalid_argument("precision: expected fp32, bf16 or fp16, got " + name);
}

// Arguments have been checked (greedynas_ext/ops_cuda.py).
std::unique_ptr<MixedOp> mixed_op_from(const std::vector<int64_t>& op_table,
                                       const std::vector<double>& bn_eps, intptr_t weights,
                                       const std::vector<std::array<int64_t, 3>>& nodes,
                                       const std::array<int64_t, 3>& sizes, bool known,
                                       const std::string& precision) {
  MixedOpBlock block{{}, bn_eps, address<const float>(weights)};
  block.operations.resize(op_table.size() / kOperationFields);
  std::memcpy(block.operations.data(), op_table.data(), block.operations.size() * sizeof(ChoiceOperation));
  std::vector<MixedOpNode> all;
  for (const auto& [input, op, place] : nodes) all.push_back({input, op, place});
  return make_mixed_op(block, all, sizes[0], sizes[1], sizes[2], known, precision_of(precision));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "Evaluation of supernet chains by fused CUDA kernels.";
  py::module_ kernels = module.def_submodule("kernels", "The kernels one by one (csrc/cuda/kernels.h).");
  bind_kernels(kernels);
  py::enum_<Statistics>(module, "Statistics", py::module_local())
      .value("BATCH", Statistics::kBatch)
      .value("CAPTURE", Statistics::kCapture)
      .value("RUNNING", Statistics::kRunning)
      .value("CONSTANTS", Statistics::kConstants);
  py::class_<ChainEvaluation>(module, "ChainEvaluation", py::module_local())
      .def(py::init([](const Rows& rows, const Doubles& eps, int64_t stem_blocks, const Steps& nodes,
                       int64_t classifier_weight, int64_t classifier_bias, int64_t classes,
                       const std::string& precision) {
             return make_chain_evaluation(
                 chain_source(rows, eps, stem_blocks, nodes, classifier_weight, classifier_bias, classes),
                 precision_of(precision));
           }),
           py::arg("rows").noconvert(), py::arg("eps").noconvert(), py::arg("stem_blocks"),
           py::arg("nodes").noconvert(), py::arg("classifier_weight"), py::arg("classifier_bias"),
           py::arg("classes"), py::arg("precision"))
      .def_property_readonly("packed_bytes", &ChainEvaluation::packed_bytes)
      .def(
          "pack",
          [](ChainEvaluation& e, intptr_t memory, intptr_t stream) {
            e.pack(address<void>(memory), address<CUstream_st>(stream));
          },
          py::arg("memory"), py::arg("stream"))
      .def(
          "needed_bytes",
          [](const ChainEvaluation& e, const Steps& steps, int64_t count, int64_t height, int64_t width,
             Statistics statistics) {
            return e.needed_bytes(steps_from(steps), count, height, width, statistics);
          },
          py::arg("steps"), py::arg("count"), py::arg("height"), py::arg("width"), py::arg("statistics"))
      .def(
          "start",
          [](ChainEvaluation& e, const Steps& steps, intptr_t images, std::array<int64_t, 3> sizes,
             std::array<int64_t, 4> strides, intptr_t targets, double label_smoothing, intptr_t image_losses,
             intptr_t correct, intptr_t status, Statistics statistics, intptr_t memory, intptr_t stream) {
            Batch batch{};
            batch.images = address<const float>(images);
            batch.count = sizes[0];
            batch.height = sizes[1];
            batch.width = sizes[2];
            std::copy(strides.begin(), strides.end(), batch.strides);
            batch.targets = address<const int64_t>(targets);
            batch.label_smoothing = label_smoothing;
            batch.image_losses = address<float>(image_losses);
            batch.correct = address<int64_t>(correct);
            batch.status = address<int>(status);
            e.start(steps_from(steps), batch, statistics, address<void>(memory),
                    address<CUstream_st>(stream));
          },
          py::arg("steps"), py::arg("images"), py::arg("sizes"), py::arg("strides"), py::arg("targets"),
          py::arg("label_smoothing"), py::arg("image_losses"), py::arg("correct"), py::arg("status"),
          py::arg("statistics"), py::arg("memory"), py::arg("stream"))
      .def_property_readonly("kernels", &ChainEvaluation::kernels)
      .def("next_stage", &ChainEvaluation::next_stage, "The stage of what comes next, or -1.")
      .def("advance", &ChainEvaluation::advance,
           "Launches what comes next; its stage, or -1 when nothing was left.");
  py::class_<MixedOp>(module, "MixedOp", py::module_local())
      .def(py::init(&mixed_op_from), py::arg("op_table"), py::arg("bn_eps"), py::arg("weights"),
           py::arg("nodes"), py::arg("sizes"), py::arg("known"), py::arg("precision"))
      .def_property_readonly("bytes", &MixedOp::bytes)
      .def(
          "run",
          [](MixedOp& self, intptr_t inputs, intptr_t outputs, intptr_t statistics, intptr_t used_statistics,
             int64_t statistics_width, intptr_t memory, intptr_t stream) {
            self.run({address<const void>(inputs), address<void>(outputs), address<const float>(statistics),
                      address<float>(used_statistics), statistics_width},
                     address<void>(memory), address<CUstream_st>(stream));
          },
          py::arg("inputs"), py::arg("outputs"), py::arg("statistics"), py::arg("used_statistics"),
          py::arg("statistics_width"), py::arg("memory"), py::arg("stream"));
  py::class_<UnitEvaluation>(module, "UnitEvaluation", py::module_local())
      .def(py::init([](const Rows& rows, const Doubles& eps, const Rows& branches, int64_t in_channels,
                       int64_t out_channels, const std::string& precision) {
             return make_unit_evaluation(unit_source(rows, eps, branches, in_channels, out_channels),
                                         precision_of(precision));
           }),
           py::arg("rows").noconvert(), py::arg("eps").noconvert(), py::arg("branches").noconvert(),
           py::arg("in_channels"), py::arg("out_channels"), py::arg("precision"))
      .def_property_readonly("packed_bytes", &UnitEvaluation::packed_bytes)
      .def_property_readonly("statistics_size", &UnitEvaluation::statistics_size)
      .def(
          "pack",
          [](UnitEvaluation& e, intptr_t memory, intptr_t stream) {
            e.pack(address<void>(memory), address<CUstream_st>(stream));
          },
          py::arg("memory"), py::arg("stream"))
      .def("needed_bytes", &UnitEvaluation::needed_bytes, py::arg("count"), py::arg("height"),
           py::arg("width"), py::arg("statistics"))
      .def(
          "run",
          [](UnitEvaluation& e, intptr_t input, std::array<int64_t, 3> sizes, intptr_t output, intptr_t kept,
             Statistics statistics, intptr_t memory, intptr_t stream) {
            e.run({address<const void>(input), sizes[0], sizes[1], sizes[2], address<void>(output),
                   address<float>(kept)},
                  statistics, address<void>(memory), address<CUstream_st>(stream));
          },
          py::arg("input"), py::arg("sizes"), py::arg("output"), py::arg("kept"), py::arg("statistics"),
          py::arg("memory"), py::arg("stream"));
}

// greedynas_ext._ops as a Python module: evaluation of chains and of units. Addresses come from tensors that
// the caller keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "capability.h"
#include "chain.h"
#include "chain_rows.h"
#include "memory_cache.h"
#include "torch_threads.h"
#include "unit.h"

namespace py = pybind11;
using namespace greedynas;
using namespace greedynas::cpu;

namespace {

Precision precision_of(const std::string& name) {
  if (name == "fp64") return Precision::kFloat64;
  return name == "bf16" ? Precision::kBFloat16 : Precision::kFloat32;
}

std::unique_ptr<ChainEvaluation> make_evaluation(const Rows& rows, const Doubles& eps, int64_t stem_blocks,
                                                 const Steps& nodes, int64_t classifier_weight,
                                                 int64_t classifier_bias, int64_t classes,
                                                 const std::string& precision) {
  const ChainSource source =
      chain_source(rows, eps, stem_blocks, nodes, classifier_weight, classifier_bias, classes);
  return make_chain_evaluation(source, precision_of(precision));
}

std::unique_ptr<UnitEvaluation> make_unit(const Rows& rows, const Doubles& eps, const Rows& branches,
                                          int64_t in_channels, int64_t out_channels,
                                          const std::string& precision) {
  return make_unit_evaluation(unit_source(rows, eps, branches, in_channels, out_channels),
                              precision_of(precision));
}

}  // namespace

PYBIND11_MODULE(_ops, module, py::mod_gil_not_used()) {
  module.doc() = "Evaluation of supernet chains, and of single units, by fused CPU kernels.";
  py::enum_<Statistics>(module, "Statistics", py::module_local())
      .value("BATCH", Statistics::kBatch)
      .value("CAPTURE", Statistics::kCapture)
      .value("RUNNING", Statistics::kRunning)
      .value("CONSTANTS", Statistics::kConstants);
  module.attr("STAGE_PARTS") = kStagePartNames;
  module.def("machine_capability", [] { return capability_name(machine_capability()); });
  module.def("used_capability", [] { return capability_name(used_capability()); });
  module.def("capability_reason", &capability_reason);
  module.def("bf16_kernels", &bf16_kernels_name);
  module.def(
      "release_memory", [] { return MemoryCache::instance().release(); },
      "Frees working memory that is kept between evaluations; how many bytes.");
  py::class_<ChainEvaluation>(module, "ChainEvaluation")
      .def(py::init(&make_evaluation), py::arg("rows").noconvert(), py::arg("eps").noconvert(),
           py::arg("stem_blocks"), py::arg("nodes").noconvert(), py::arg("classifier_weight"),
           py::arg("classifier_bias"), py::arg("classes"), py::arg("precision"))
      .def(
          "pack", [](ChainEvaluation& e) { e.pack(kTorchParallelFor); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "needed_bytes",
          [](const ChainEvaluation& e, const Steps& steps, int64_t count, int64_t height, int64_t width,
             Statistics statistics) {
            return e.needed_bytes(steps_from(steps), count, height, width, statistics, torch_threads());
          },
          py::arg("steps"), py::arg("count"), py::arg("height"), py::arg("width"), py::arg("statistics"))
      .def(
          "start",
          [](ChainEvaluation& e, const Steps& steps, int64_t images, std::array<int64_t, 3> sizes,
             std::array<int64_t, 4> strides, int64_t targets, double label_smoothing, int64_t image_losses,
             int64_t correct, Statistics statistics) {
            Batch batch{};
            batch.images = reinterpret_cast<const void*>(static_cast<intptr_t>(images));
            batch.count = sizes[0];
            batch.height = sizes[1];
            batch.width = sizes[2];
            std::copy(strides.begin(), strides.end(), batch.strides);
            batch.targets = reinterpret_cast<const int64_t*>(static_cast<intptr_t>(targets));
            batch.label_smoothing = label_smoothing;
            batch.image_losses = reinterpret_cast<void*>(static_cast<intptr_t>(image_losses));
            batch.correct = reinterpret_cast<int64_t*>(static_cast<intptr_t>(correct));
            batch.threads = torch_threads();
            e.start(steps_from(steps), batch, statistics);
          },
          py::arg("steps"), py::arg("images"), py::arg("sizes"), py::arg("strides"), py::arg("targets"),
          py::arg("label_smoothing"), py::arg("image_losses"), py::arg("correct"), py::arg("statistics"))
      .def(
          "advance", [](ChainEvaluation& e, double seconds) { return e.advance(seconds, kTorchParallelFor); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "Works for about that many seconds; whether all is done.")
      .def_property_readonly("times",
                             [](const ChainEvaluation& e) {
                               std::vector<std::tuple<double, int64_t, int64_t, PartSeconds>> result;
                               for (const auto& t : e.times())
                                 result.emplace_back(t.seconds, t.calls, t.bytes, t.parts);
                               return result;
                             })
      .def_property_readonly("kernels", &ChainEvaluation::kernels);
  py::class_<UnitEvaluation>(module, "UnitEvaluation")
      .def(py::init(&make_unit), py::arg("rows").noconvert(), py::arg("eps").noconvert(),
           py::arg("branches").noconvert(), py::arg("in_channels"), py::arg("out_channels"),
           py::arg("precision"))
      .def(
          "pack", [](UnitEvaluation& e) { e.pack(kTorchParallelFor); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "needed_bytes",
          [](const UnitEvaluation& e, int64_t count, int64_t height, int64_t width, bool wide,
             Statistics statistics) {
            return e.needed_bytes(count, height, width, wide, statistics, torch_threads());
          },
          py::arg("count"), py::arg("height"), py::arg("width"), py::arg("wide"), py::arg("statistics"))
      .def(
          "run",
          [](UnitEvaluation& e, int64_t input, bool wide, std::array<int64_t, 3> sizes,
             std::array<int64_t, 4> strides, int64_t output, int64_t values, Statistics statistics) {
            const auto pointer = [](int64_t address) {
              return reinterpret_cast<void*>(static_cast<intptr_t>(address));
            };
            UnitBatch batch{pointer(input), wide, sizes[0],        sizes[1],
                            sizes[2],       {},   pointer(output), pointer(values),
                            torch_threads()};
            std::copy(strides.begin(), strides.end(), batch.strides);
            e.run(batch, statistics, kTorchParallelFor);
          },
          py::arg("input"), py::arg("wide"), py::arg("sizes"), py::arg("strides"), py::arg("output"),
          py::arg("values"), py::arg("statistics"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("statistics_size", &UnitEvaluation::statistics_size)
      .def_property_readonly("kernels", &UnitEvaluation::kernels);
}

// greedynas_ext._ops as a Python module: evaluation of chains. Addresses come from tensors that the caller
// keeps alive.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "capability.h"
#include "chain.h"
#include "memory_cache.h"
#include "torch_threads.h"

namespace py = pybind11;
using namespace greedynas;
using namespace greedynas::cpu;

namespace {

using Rows = py::array_t<int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Steps = py::array_t<int32_t, py::array::c_style>;

const ParallelFor kParallelFor = torch_parallel_for_units;

// Columns of a row that describes an operation, in the order of greedynas_ext/fused.py.
OperationSource operation_from(const int64_t* row, const double* eps) {
  int64_t column = 0;
  const auto next = [&] { return row[column++]; };
  const auto pointer = [&] { return reinterpret_cast<const void*>(static_cast<intptr_t>(row[column++])); };
  OperationSource o;
  o.kind = next();
  o.in_channels = next();
  o.hidden_channels = next();
  o.out_channels = next();
  o.kernel = next();
  o.stride = next();
  o.activation = next();
  o.se_channels = next();
  o.se_gate = next();
  o.residual = next();
  o.expand = pointer();
  o.depthwise = pointer();
  o.se_reduce_weight = pointer();
  o.se_reduce_bias = pointer();
  o.se_expand_weight = pointer();
  o.se_expand_bias = pointer();
  o.project = pointer();
  for (int stage = 0; stage < kBatchNormStages; ++stage) {
    auto& norm = o.batch_norms[stage];
    norm.gamma = pointer();
    norm.beta = pointer();
    norm.mean = pointer();
    norm.variance = pointer();
    norm.eps = eps[stage];
  }
  return o;
}

constexpr int64_t kColumns = 10 + 7 + 4 * kBatchNormStages;

std::unique_ptr<ChainEvaluation> make_evaluation(const Rows& rows, const Doubles& eps, int64_t stem_blocks,
                                                 const Steps& nodes, int64_t classifier_weight,
                                                 int64_t classifier_bias, int64_t classes,
                                                 const std::string& precision) {
  if (rows.ndim() != 2 || rows.shape(1) != kColumns || eps.ndim() != 2 || eps.shape(0) != rows.shape(0) ||
      eps.shape(1) != kBatchNormStages || nodes.ndim() != 2 || nodes.shape(1) != 3 ||
      rows.shape(0) < stem_blocks + 2) {
    throw std::invalid_argument("rows, eps, nodes: expected [R, 29], [R, 3] and [nodes, 3]");
  }
  ChainSource source;
  const int64_t num_operations = rows.shape(0) - stem_blocks - 2;
  for (int64_t r = 0; r < rows.shape(0); ++r) {
    const OperationSource o = operation_from(rows.data(r), eps.data(r));
    if (r == 0) {
      source.stem = o;
    } else if (r == 1) {
      source.head = o;
    } else if (r < 2 + stem_blocks) {
      source.stem_blocks.push_back(o);
    } else {
      source.operations.push_back(o);
    }
  }
  for (int64_t n = 0; n < nodes.shape(0); ++n) {
    const int32_t* node = nodes.data(n);
    if (node[1] < 0 || node[1] >= num_operations || node[2] >= n)
      throw std::invalid_argument("nodes: bad row");
    source.nodes.push_back({node[0], node[1], node[2]});
  }
  source.classifier_weight = reinterpret_cast<const void*>(static_cast<intptr_t>(classifier_weight));
  source.classifier_bias = reinterpret_cast<const void*>(static_cast<intptr_t>(classifier_bias));
  source.classes = classes;
  Precision p = Precision::kFloat32;
  if (precision == "fp64") p = Precision::kFloat64;
  if (precision == "bf16") p = Precision::kBFloat16;
  return make_chain_evaluation(source, p);
}

std::vector<PathStep> steps_from(const Steps& steps) {
  std::vector<PathStep> result;
  for (py::ssize_t i = 0; i < steps.shape(0); ++i)
    result.push_back({steps.data(i)[0], steps.data(i)[1] != 0});
  return result;
}

}  // namespace

PYBIND11_MODULE(_ops, module, py::mod_gil_not_used()) {
  module.doc() = "Evaluation of supernet chains by fused CPU kernels.";
  py::enum_<Statistics>(module, "Statistics")
      .value("BATCH", Statistics::kBatch)
      .value("CAPTURE", Statistics::kCapture)
      .value("RUNNING", Statistics::kRunning)
      .value("CONSTANTS", Statistics::kConstants);
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
          "pack", [](ChainEvaluation& e) { e.pack(kParallelFor); }, py::call_guard<py::gil_scoped_release>())
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
          "advance", [](ChainEvaluation& e, double seconds) { return e.advance(seconds, kParallelFor); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "Works for about that many seconds; whether all is done.")
      .def_property_readonly("times",
                             [](const ChainEvaluation& e) {
                               std::vector<std::tuple<double, int64_t, int64_t>> result;
                               for (const auto& t : e.times())
                                 result.emplace_back(t.seconds, t.calls, t.bytes);
                               return result;
                             })
      .def_property_readonly("kernels", &ChainEvaluation::kernels);
}

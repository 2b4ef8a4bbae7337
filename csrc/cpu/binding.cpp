// From tensors to raw pointers: the CPU implementations of the ops. Nothing else under cpu/ knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "mixed_op.h"
#include "path_cross_entropy.h"
#include "select_top_k.h"
#include "torch_threads.h"

namespace greedynas::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(sizes, type);
}

LogitsType logits_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return LogitsType::kFloat64;
    case ScalarType::BFloat16:
      return LogitsType::kBFloat16;
    case ScalarType::Half:
      return LogitsType::kFloat16;
    default:
      return LogitsType::kFloat32;
  }
}

std::tuple<Tensor, Tensor, Tensor> path_cross_entropy_op(const Tensor& logits, const Tensor& targets,
                                                         double label_smoothing) {
  check_path_cross_entropy(logits, targets, label_smoothing);
  const int64_t paths = logits.size(0), images = logits.size(1), classes = logits.size(2);
  const Tensor dense_targets = torch::stable::contiguous(targets);
  const auto* target_values = dense_targets.const_data_ptr<int64_t>();
  check_range("path_cross_entropy", "targets", target_values, images, classes, "C");
  const LogitsType type = logits_type(logits.scalar_type());
  const ScalarType value_type = type == LogitsType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor losses = empty({paths}, value_type);
  Tensor image_losses = empty({paths, images}, value_type);
  Tensor correct = empty({paths}, ScalarType::Long);
  const PathCrossEntropy arguments{logits.const_data_ptr(),
                                   type,
                                   paths,
                                   images,
                                   classes,
                                   logits.stride(0),
                                   logits.stride(1),
                                   logits.stride(2),
                                   target_values,
                                   label_smoothing,
                                   correct.mutable_data_ptr<int64_t>()};
  if (type == LogitsType::kFloat64) {
    path_cross_entropy(arguments, losses.mutable_data_ptr<double>(), image_losses.mutable_data_ptr<double>(),
                       kTorchParallelFor);
  } else {
    path_cross_entropy(arguments, losses.mutable_data_ptr<float>(), image_losses.mutable_data_ptr<float>(),
                       kTorchParallelFor);
  }
  return {losses, image_losses, correct};
}

Tensor select_top_k_op(const Tensor& losses, int64_t k) {
  check_select_top_k(losses, k);
  const Tensor dense = torch::stable::contiguous(losses);
  Tensor selected = empty({k}, ScalarType::Long);
  auto* indices = selected.mutable_data_ptr<int64_t>();
  if (dense.scalar_type() == ScalarType::Double) {
    select_top_k(dense.const_data_ptr<double>(), dense.numel(), k, indices);
  } else {
    select_top_k(dense.const_data_ptr<float>(), dense.numel(), k, indices);
  }
  return selected;
}

template <typename T>
void run_mixed_op(const ChoiceBlock& block, const Tensor& inputs, const Tensor& input_index,
                  const Tensor& op_index, const Tensor& weights, const std::optional<Tensor>& statistics,
                  Tensor& outputs, Tensor& used_statistics) {
  const MixedOp<T> arguments{inputs.const_data_ptr<T>(),
                             inputs.size(1),
                             inputs.size(2),
                             inputs.size(3),
                             inputs.size(4),
                             input_index.const_data_ptr<int64_t>(),
                             op_index.const_data_ptr<int64_t>(),
                             op_index.size(0),
                             weights.const_data_ptr<T>(),
                             block.operations.data(),
                             static_cast<int64_t>(block.operations.size()),
                             block.bn_eps.data(),
                             statistics ? statistics->const_data_ptr<T>() : nullptr,
                             block.statistics_width,
                             outputs.mutable_data_ptr<T>(),
                             used_statistics.mutable_data_ptr<T>(),
                             torch_threads()};
  mixed_op(arguments, kTorchParallelFor);
}

std::tuple<Tensor, Tensor> mixed_op_op(const Tensor& inputs, const Tensor& input_index,
                                       const Tensor& op_index, const Tensor& weights,
                                       const std::vector<int64_t>& op_table,
                                       const std::vector<double>& bn_eps,
                                       const std::optional<Tensor>& statistics) {
  const ChoiceBlock block =
      check_mixed_op(inputs, input_index, op_index, weights, op_table, bn_eps, statistics);
  const Tensor dense_input_index = torch::stable::contiguous(input_index);
  const Tensor dense_op_index = torch::stable::contiguous(op_index);
  const auto* operations = dense_op_index.const_data_ptr<int64_t>();
  const int64_t nodes = op_index.size(0);
  check_range("mixed_op", "input_index", dense_input_index.const_data_ptr<int64_t>(), nodes, inputs.size(0),
              "B");
  check_range("mixed_op", "op_index", operations, nodes, static_cast<int64_t>(block.operations.size()), "O");
  const int64_t images = inputs.size(1), height = inputs.size(2), width = inputs.size(3);
  if (!statistics) check_value_counts(block, operations, nodes, images, height, width);
  std::optional<Tensor> dense_statistics;
  if (statistics) dense_statistics = torch::stable::contiguous(*statistics);
  const ScalarType type = inputs.scalar_type();
  Tensor outputs = empty(
      {nodes, images, ceil_div(height, block.stride), ceil_div(width, block.stride), block.out_channels},
      type);
  Tensor used_statistics = empty({nodes, block.statistics_width}, type);
  const auto run = type == ScalarType::Double ? run_mixed_op<double> : run_mixed_op<float>;
  run(block, torch::stable::contiguous(inputs), dense_input_index, dense_op_index,
      torch::stable::contiguous(weights), dense_statistics, outputs, used_statistics);
  return {outputs, used_statistics};
}

}  // namespace
}  // namespace greedynas::cpu

STABLE_TORCH_LIBRARY_IMPL(greedynas, CPU, library) {
  library.impl("path_cross_entropy", TORCH_BOX(&greedynas::cpu::path_cross_entropy_op));
  library.impl("select_top_k", TORCH_BOX(&greedynas::cpu::select_top_k_op));
  library.impl("mixed_op", TORCH_BOX(&greedynas::cpu::mixed_op_op));
}

// Chains, steps and units from the arrays in which Python hands them over (greedynas_ext/rows.py). Addresses
// come from tensors that the caller keeps alive.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "chain_source.h"
#include "unit_source.h"

namespace greedynas {

using Rows = pybind11::array_t<int64_t, pybind11::array::c_style>;
using Doubles = pybind11::array_t<double, pybind11::array::c_style>;
using Steps = pybind11::array_t<int32_t, pybind11::array::c_style>;

// Columns of a row that describes an operation, in the order of greedynas_ext/rows.py.
inline OperationSource operation_from(const int64_t* row, const double* eps) {
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
  o.depthwise_activation = next();
  o.project_activation = next();
  o.se_channels = next();
  o.se_gate = next();
  o.residual = next();
  o.pooling = next();
  o.unnormalised = next();
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

inline constexpr int64_t kColumns = 14 + 7 + 4 * kBatchNormStages;

inline ChainSource chain_source(const Rows& rows, const Doubles& eps, int64_t stem_blocks, const Steps& nodes,
                                int64_t classifier_weight, int64_t classifier_bias, int64_t classes) {
  if (rows.ndim() != 2 || rows.shape(1) != kColumns || eps.ndim() != 2 || eps.shape(0) != rows.shape(0) ||
      eps.shape(1) != kBatchNormStages || nodes.ndim() != 2 || nodes.shape(1) != 3 ||
      rows.shape(0) < stem_blocks + 2) {
    throw std::invalid_argument("rows, eps, nodes: expected [R, 33], [R, 3] and [nodes, 3]");
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
  return source;
}

// Each branch: how many of the operations in `rows`, which stand in the order of the branches, it has; first,
// step and number of the channels that it reads, and of those that it writes; the activation of what it
// reads.
inline constexpr int64_t kBranchColumns = 8;

inline UnitSource unit_source(const Rows& rows, const Doubles& eps, const Rows& branches, int64_t in_channels,
                              int64_t out_channels) {
  if (rows.ndim() != 2 || rows.shape(1) != kColumns || eps.ndim() != 2 || eps.shape(0) != rows.shape(0) ||
      eps.shape(1) != kBatchNormStages || branches.ndim() != 2 || branches.shape(1) != kBranchColumns) {
    throw std::invalid_argument("rows, eps, branches: expected [R, 33], [R, 3] and [branches, 8]");
  }
  UnitSource unit;
  unit.in_channels = in_channels;
  unit.out_channels = out_channels;
  int64_t operation = 0;
  for (int64_t b = 0; b < branches.shape(0); ++b) {
    const int64_t* row = branches.data(b);
    BranchSource branch{{row[1], row[2], row[3]}, {row[4], row[5], row[6]}, {}, row[7]};
    if (row[0] < 0 || row[0] > rows.shape(0) - operation)
      throw std::invalid_argument("branches: expected as many operations as there are rows");
    for (int64_t i = 0; i < row[0]; ++i, ++operation)
      branch.operations.push_back(operation_from(rows.data(operation), eps.data(operation)));
    unit.branches.push_back(std::move(branch));
  }
  check_unit(unit);
  return unit;
}

inline std::vector<PathStep> steps_from(const Steps& steps) {
  std::vector<PathStep> result;
  for (pybind11::ssize_t i = 0; i < steps.shape(0); ++i)
    result.push_back({steps.data(i)[0], steps.data(i)[1] != 0});
  return result;
}

}  // namespace greedynas

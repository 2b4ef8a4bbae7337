// Every op's argument checks, once, for all backends. A failed check throws std::invalid_argument, which
// reaches Python as a ValueError; its text names the op, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "choice_block.h"

namespace greedynas {

void check_path_cross_entropy(const torch::stable::Tensor& logits,   // [m, N, C]
                              const torch::stable::Tensor& targets,  // [N]
                              double label_smoothing);

void check_select_top_k(const torch::stable::Tensor& losses,  // [m]
                        int64_t k);

// A parsed op_table, every offset of it checked against the size of `weights`.
struct ChoiceBlock {
  std::vector<ChoiceOperation> operations;
  std::vector<std::array<double, kBatchNormStages>> bn_eps;
  int64_t out_channels;
  int64_t stride;
  int64_t statistics_width;  // S
};

ChoiceBlock check_mixed_op(const torch::stable::Tensor& inputs,       // [B, N, H, W, C]
                           const torch::stable::Tensor& input_index,  // [P]
                           const torch::stable::Tensor& op_index,     // [P]
                           const torch::stable::Tensor& weights,
                           const std::vector<int64_t>& op_table,                     // [O * kOperationFields]
                           const std::vector<double>& bn_eps,                        // [O * 3]
                           const std::optional<torch::stable::Tensor>& statistics);  // [P, S]

// The checks below read values, so a backend calls them where those values lie on the host.

// Each of `values` in [0, bound), else an error naming the first that is not.
void check_range(const char* op, const char* argument, const int64_t* values, int64_t count, int64_t bound,
                 const char* bound_name);

// Batch statistics of a single value per channel are refused, as torch does.
void check_value_counts(const ChoiceBlock& block, const int64_t* op_index, int64_t nodes, int64_t images,
                        int64_t height, int64_t width);

}  // namespace greedynas

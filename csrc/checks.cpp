#include "checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace greedynas {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

// A tensor as the messages show it: "float32 [7, 3]".
std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

bool is_any_of(const Tensor& tensor, std::initializer_list<ScalarType> types) {
  return std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end();
}

bool is_vector(const Tensor& tensor, ScalarType type) {
  return tensor.dim() == 1 && tensor.scalar_type() == type;
}

void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  check(tensor.device() == other.device(), op, ": ", name, " should be on the device of ", other_name);
}

}  // namespace

void check_path_cross_entropy(const Tensor& logits, const Tensor& targets, double label_smoothing) {
  constexpr auto op = "path_cross_entropy";
  check(logits.dim() == 3 && is_any_of(logits, {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16,
                                                ScalarType::Half}),
        op, ": logits should be float64, float32, bfloat16 or float16 [m, N, C], got ", describe(logits));
  check(logits.size(1) > 0 && logits.size(2) > 0, op,
        ": logits should be of at least one image and one class (dimensions 1 and 2), got ",
        describe(logits));
  check(is_vector(targets, ScalarType::Long) && targets.size(0) == logits.size(1), op,
        ": targets should be int64 [N=", logits.size(1), "], got ", describe(targets));
  check(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing should be in [0, 1], got ",
        label_smoothing);
  check_same_device(op, "targets", targets, "logits", logits);
}

void check_select_top_k(const Tensor& losses, int64_t k) {
  constexpr auto op = "select_top_k";
  check(losses.dim() == 1 && is_any_of(losses, {ScalarType::Double, ScalarType::Float}), op,
        ": losses should be float64 or float32 [m], got ", describe(losses));
  check(k >= 0 && k <= losses.size(0), op, ": k should be in [0, m=", losses.size(0), "], got ", k);
}

void check_range(const char* op, const char* argument, const int64_t* values, int64_t count, int64_t bound,
                 const char* bound_name) {
  for (int64_t i = 0; i < count; ++i) {
    check(values[i] >= 0 && values[i] < bound, op, ": ", argument, " should be in [0, ", bound_name, "=",
          bound, "), got ", values[i], " at position ", i);
  }
}

namespace {

constexpr auto kMixedOp = "mixed_op";

// Checks one row of op_table and says how wide a row of statistics it needs.
class OperationCheck {
 public:
  OperationCheck(const ChoiceOperation& operation, int64_t index, int64_t weights_size)
      : operation_(operation), index_(index), weights_size_(weights_size) {}

  int64_t statistics_width() {
    const auto& o = operation_;
    require(o.in_channels > 0 && o.out_channels > 0, "in_channels and out_channels should be positive");
    require(o.stride > 0, "stride should be positive, got ", o.stride);
    for (const int64_t activation : {o.activation, o.depthwise_activation, o.project_activation})
      require(activation >= kLinear && activation <= kSilu, "unknown activation code ", activation);
    require(o.residual == 0 || (o.residual == 1 && o.stride == 1 && o.in_channels == o.out_channels),
            "residual should be 0, or 1 where the operation keeps the shape, got ", o.residual);
    switch (o.kind) {
      case kIdentity:
        require(o.stride == 1 && o.in_channels == o.out_channels, "a plain identity should keep the shape");
        break;
      case kConvBn:
        require(o.kernel == 1, "kernel should be 1 in a convolution with BatchNorm, got ", o.kernel);
        pointwise("project_weight", o.project_weight, o.in_channels, o.out_channels);
        batch_norm("project", o.project_bn, o.project_statistics, o.out_channels);
        break;
      case kInvertedBottleneck:
        inverted_bottleneck();
        break;
      default:
        require(false, "unknown kind ", o.kind);
    }
    return statistics_width_;
  }

 private:
  template <typename... Parts>
  void require(bool condition, const Parts&... parts) const {
    check(condition, kMixedOp, ": op_table: operation ", index_, ": ", parts...);
  }

  void section(const char* name, int64_t offset, int64_t size) const {
    require(offset >= 0 && offset % kLanes == 0 && size <= weights_size_ && offset <= weights_size_ - size,
            name, " should be a multiple of ", kLanes, " with ", size, " elements after it in weights [",
            weights_size_, "], got ", offset);
  }

  void pointwise(const char* name, int64_t offset, int64_t in, int64_t out) const {
    section(name, offset, in * padded(out));
  }

  void batch_norm(const char* name, int64_t offset, int64_t statistics, int64_t channels) {
    section(name, offset, 2 * padded(channels));
    require(statistics >= 0 && statistics % kLanes == 0 && statistics < (int64_t{1} << 40), name,
            "_statistics should be a multiple of ", kLanes, ", got ", statistics);
    statistics_width_ = std::max(statistics_width_, statistics + 2 * padded(channels));
  }

  void inverted_bottleneck() {
    const auto& o = operation_;
    const int64_t hidden = o.hidden_channels;
    require(hidden > 0, "hidden_channels should be positive, got ", hidden);
    require(o.kernel > 0 && o.kernel % 2 == 1, "kernel should be odd, got ", o.kernel);
    require(o.se_gate == kHsigmoid || o.se_gate == kSigmoid, "unknown se_gate code ", o.se_gate);
    if (o.expand_weight != kNone) {
      pointwise("expand_weight", o.expand_weight, o.in_channels, hidden);
      batch_norm("expand", o.expand_bn, o.expand_statistics, hidden);
    } else {
      require(hidden == o.in_channels, "hidden_channels should equal in_channels=", o.in_channels,
              " without an expand stage, got ", hidden);
    }
    section("depthwise_weight", o.depthwise_weight, o.kernel * o.kernel * padded(hidden));
    batch_norm("depthwise", o.depthwise_bn, o.depthwise_statistics, hidden);
    require(o.se_channels >= 0, "se_channels should not be negative, got ", o.se_channels);
    if (o.se_channels > 0) {
      pointwise("se_reduce_weight", o.se_reduce_weight, hidden, o.se_channels);
      section("se_reduce_bias", o.se_reduce_bias, padded(o.se_channels));
      pointwise("se_expand_weight", o.se_expand_weight, o.se_channels, hidden);
      section("se_expand_bias", o.se_expand_bias, padded(hidden));
    }
    pointwise("project_weight", o.project_weight, hidden, o.out_channels);
    batch_norm("project", o.project_bn, o.project_statistics, o.out_channels);
  }

  const ChoiceOperation& operation_;
  int64_t index_;
  int64_t weights_size_;
  int64_t statistics_width_ = 0;
};

ChoiceBlock parse_choice_block(const std::vector<int64_t>& op_table, const std::vector<double>& bn_eps,
                               int64_t in_channels, int64_t weights_size) {
  const auto entries = static_cast<int64_t>(op_table.size());
  check(entries > 0 && entries % kOperationFields == 0, kMixedOp, ": op_table should hold ", kOperationFields,
        " entries for each of at least one operation, got ", entries);
  const int64_t count = entries / kOperationFields;
  check(static_cast<int64_t>(bn_eps.size()) == count * kBatchNormStages, kMixedOp, ": bn_eps should hold ",
        count * kBatchNormStages, " values (3 for each operation), got ", bn_eps.size());
  ChoiceBlock block{std::vector<ChoiceOperation>(count), {}, 0, 0, 0};
  std::memcpy(block.operations.data(), op_table.data(), op_table.size() * sizeof(int64_t));
  for (int64_t o = 0; o < count; ++o) {
    const auto& operation = block.operations[o];
    const double* eps = bn_eps.data() + o * kBatchNormStages;
    for (int64_t stage = 0; stage < kBatchNormStages; ++stage) {
      check(std::isfinite(eps[stage]) && eps[stage] >= 0, kMixedOp,
            ": bn_eps should be finite and not negative, got ", eps[stage], " for operation ", o);
    }
    block.bn_eps.push_back({eps[0], eps[1], eps[2]});
    block.statistics_width =
        std::max(block.statistics_width, OperationCheck(operation, o, weights_size).statistics_width());
    check(operation.in_channels == in_channels, kMixedOp, ": inputs should have C=", operation.in_channels,
          " channels for operation ", o, ", got ", in_channels);
    check(operation.out_channels == block.operations[0].out_channels &&
              operation.stride == block.operations[0].stride,
          kMixedOp, ": op_table: operation ", o, " should have the output shape of operation 0 (",
          block.operations[0].out_channels, " channels, stride ", block.operations[0].stride, "), got ",
          operation.out_channels, " channels, stride ", operation.stride);
  }
  block.out_channels = block.operations[0].out_channels;
  block.stride = block.operations[0].stride;
  return block;
}

}  // namespace

ChoiceBlock check_mixed_op(const Tensor& inputs, const Tensor& input_index, const Tensor& op_index,
                           const Tensor& weights, const std::vector<int64_t>& op_table,
                           const std::vector<double>& bn_eps, const std::optional<Tensor>& statistics) {
  check(inputs.dim() == 5 && is_any_of(inputs, {ScalarType::Double, ScalarType::Float}), kMixedOp,
        ": inputs should be float64 or float32, or on a GPU bfloat16 or float16, [B, N, H, W, C], got ",
        describe(inputs));
  for (int64_t d = 1; d < 5; ++d) {
    check(inputs.size(d) > 0, kMixedOp, ": inputs should be empty in no dimension but the first, got ",
          describe(inputs));
  }
  check(is_vector(input_index, ScalarType::Long), kMixedOp, ": input_index should be int64 [P], got ",
        describe(input_index));
  check(is_vector(op_index, ScalarType::Long) && op_index.size(0) == input_index.size(0), kMixedOp,
        ": op_index should be int64 [P=", input_index.size(0), "] as input_index is, got ",
        describe(op_index));
  check(is_vector(weights, inputs.scalar_type()), kMixedOp, ": weights should be ",
        dtype_name(inputs.scalar_type()), " [size] as inputs are, got ", describe(weights));
  check_same_device(kMixedOp, "input_index", input_index, "inputs", inputs);
  check_same_device(kMixedOp, "op_index", op_index, "inputs", inputs);
  check_same_device(kMixedOp, "weights", weights, "inputs", inputs);
  ChoiceBlock block = parse_choice_block(op_table, bn_eps, inputs.size(4), weights.numel());
  if (statistics) {
    check(statistics->dim() == 2 && statistics->scalar_type() == inputs.scalar_type() &&
              statistics->size(0) == input_index.size(0) && statistics->size(1) == block.statistics_width,
          kMixedOp, ": statistics should be ", dtype_name(inputs.scalar_type()), " [P=", input_index.size(0),
          ", S=", block.statistics_width, "], got ", describe(*statistics));
    check_same_device(kMixedOp, "statistics", *statistics, "inputs", inputs);
  }
  return block;
}

void check_value_counts(const ChoiceBlock& block, const int64_t* op_index, int64_t nodes, int64_t images,
                        int64_t height, int64_t width) {
  for (int64_t p = 0; p < nodes; ++p) {
    const auto& operation = block.operations[op_index[p]];
    if (operation.kind == kIdentity) continue;
    const int64_t out_height = (height + operation.stride - 1) / operation.stride;
    const int64_t out_width = (width + operation.stride - 1) / operation.stride;
    // The strided side is the smaller one, so it decides for the expand stage too.
    check(images * out_height * out_width > 1, kMixedOp,
          ": Expected more than 1 value per channel in batch mode, got one image of ", out_height, "x",
          out_width, " after operation ", op_index[p], " (node ", p, "); give statistics, or more images");
  }
}

}  // namespace greedynas

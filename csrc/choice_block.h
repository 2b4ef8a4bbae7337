// A packed choice block: what every backend reads, and greedynas_ext/packing.py writes. No torch, no device.
//
// A choice block holds O alternative operations of one layer. Its parts:
//   op_table    int64 [O, kOperationFields], on the host: row o is ChoiceOperation o, member by member
//   bn_eps      double [O, 3], on the host: eps of the BatchNorms after expand, depthwise and project
//   weights     one flat buffer of the activations' type; op_table holds offsets into it, in elements
//   statistics  [P, S], optional: constants for BatchNorm, one row per node (one operation run on one input);
//               the same layout for running and recalibrated statistics and, as output, the batch's
//
// Inside `weights` channels are the fastest dimension, as in the NHWC activations they meet: a vector of
// output channels comes from one broadcast input channel times one contiguous piece of a row of weights.
//   pointwise (expand, project, squeeze-excitation)   [in][padded(out)]
//   depthwise                                         [kernel * kernel][padded(channels)]
//   BatchNorm                                         gamma [padded(C)], then beta [padded(C)]
//   bias                                              [padded(C)]
//   BatchNorm in a row of `statistics`                mean [padded(C)], then biased variance [padded(C)]
//
// Rows are padded with zeros to kLanes channels, so kernels run whole vectors without masks. Sections begin
// at multiples of kSectionAlignment elements: 64 bytes for 16-bit types, 128 for float.
#pragma once

#include <cstddef>
#include <cstdint>

namespace greedynas {

inline constexpr int64_t kLanes = 16;
inline constexpr int64_t kSectionAlignment = 32;
inline constexpr int64_t kNone = -1;  // the offset of a section that the operation does not have

constexpr int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// Convolutions have no biases; the depthwise one is padded by kernel / 2. Each stage has its own act.
//   kIdentity            output = input
//   kConvBn              strided 1x1 convolution, BN, act: of the sections only the project_* ones
//   kInvertedBottleneck  [expand, BN, act,] depthwise, BN, act, [squeeze-excitation,] project, BN, act
//                        [, + input]
enum Kind : int64_t { kIdentity = 0, kConvBn = 1, kInvertedBottleneck = 2 };

enum Activation : int64_t { kLinear = 0, kRelu = 1, kRelu6 = 2, kHswish = 3, kSilu = 4 };

enum Gate : int64_t { kHsigmoid = 0, kSigmoid = 1 };

// The columns of op_table, in order. An offset is kNone where the section is absent.
struct ChoiceOperation {
  int64_t kind;  // Kind
  int64_t in_channels;
  int64_t hidden_channels;  // == in_channels without an expand stage; 0 unless an inverted bottleneck
  int64_t out_channels;
  int64_t kernel;  // of the depthwise convolution, odd; 1 for the other kinds. Padding is kernel / 2.
  int64_t stride;
  int64_t activation;            // Activation; after expand, or of a kConvBn's output
  int64_t depthwise_activation;  // kLinear, as the next, unless an inverted bottleneck
  int64_t project_activation;
  int64_t se_channels;  // width of the squeeze, 0 without squeeze-excitation
  int64_t se_gate;      // Gate
  int64_t residual;     // 1 if the input is added to the output
  int64_t expand_weight;
  int64_t expand_bn;
  int64_t expand_statistics;
  int64_t depthwise_weight;
  int64_t depthwise_bn;
  int64_t depthwise_statistics;
  int64_t se_reduce_weight;
  int64_t se_reduce_bias;
  int64_t se_expand_weight;
  int64_t se_expand_bias;
  int64_t project_weight;
  int64_t project_bn;
  int64_t project_statistics;
};

inline constexpr int64_t kOperationFields = 25;
static_assert(sizeof(ChoiceOperation) == kOperationFields * sizeof(int64_t));

// Which of an operation's BatchNorms, and its place in a row of bn_eps.
enum BatchNormStage : int64_t { kExpandBn = 0, kDepthwiseBn = 1, kProjectBn = 2, kBatchNormStages = 3 };

}  // namespace greedynas

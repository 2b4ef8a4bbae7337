// What the time of a stage of an evaluation is spent on.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

namespace greedynas::cpu {

enum StagePart : int64_t {
  kStatisticsPart,  // of the batch, and what BatchNorm makes of them
  kExpandDepthwisePart,
  kSqueezeExcitePart,
  kProjectPart,
  kFinishPart,       // the last BatchNorm, the residual, moments
  kBlockPart,        // an inverted bottleneck whose statistics are known
  kConvolutionPart,  // dense or strided
  kStageParts
};

inline constexpr std::array<const char*, kStageParts> kStagePartNames{
    "statistics", "expand and depthwise", "squeeze-excitation", "project", "finish", "block", "convolution"};

using PartSeconds = std::array<double, kStageParts>;

inline double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Adds the time since the last lap, or since it was made, to a part; without a place for it, does nothing.
class PartWatch {
 public:
  explicit PartWatch(PartSeconds* seconds) : seconds_(seconds), since_(seconds ? steady_seconds() : 0) {}

  void lap(StagePart part) {
    if (!seconds_) return;
    const double now = steady_seconds();
    (*seconds_)[part] += now - since_;
    since_ = now;
  }

 private:
  PartSeconds* seconds_;
  double since_;
};

}  // namespace greedynas::cpu

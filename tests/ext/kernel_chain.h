// Whole chains: a small random supernet with every kind of operation, in double. Neither the number of
// threads nor the traversal changes a bit, and captured statistics give what the batch's give.
#pragma once

#include <deque>
#include <thread>

#include "cpu/chain.h"
#include "kernel_reference.h"
#include "path_plan.h"
#include "thread_team.h"

namespace reference {

class RandomChain {
 public:
  static constexpr int64_t kImages = 6, kHeight = 11, kWidth = 9, kClasses = 7;

  RandomChain() : paths_{0, 0, 0, 0, 1, 1, 1, 2, 0, 2, 1, 1, 1, 2, 1}, plan_(paths_.data(), 5, 3) {
    source_.stem = conv(3, 8, 3, 2, kHswish);
    source_.stem_blocks = {bottleneck(8, 8, 8, 3, 1, kRelu6, 0, kHsigmoid)};
    // Three alternatives of each of three layers; the second layer's last one is the identity.
    const std::vector<std::vector<OperationSource>> layers{
        {bottleneck(8, 24, 12, 3, 2, kRelu6, 0, kHsigmoid),
         bottleneck(8, 33, 12, 5, 2, kHswish, 5, kHsigmoid), conv(8, 12, 1, 2, kRelu)},
        {bottleneck(12, 40, 12, 7, 1, kSilu, 3, kSigmoid), bottleneck(12, 12, 12, 3, 1, kRelu, 0, kHsigmoid),
         identity(12)},
        {bottleneck(12, 36, 17, 5, 1, kLinear, 4, kSigmoid), conv(12, 17, 1, 1, kSilu),
         conv(12, 17, 1, 1, kLinear)},
    };
    for (const auto& layer : layers)
      source_.operations.insert(source_.operations.end(), layer.begin(), layer.end());
    source_.nodes = plan_.nodes();
    for (PathNode& node : source_.nodes) node.op += 3 * node.layer;
    source_.head = conv(17, 35, 1, 1, kHswish);
    source_.classifier_weight = random(kClasses * 35, 0.5);
    source_.classifier_bias = random(kClasses, 1);
    source_.classes = kClasses;
    images_ = random(kImages * 3 * kHeight * kWidth, 1);
    for (int64_t i = 0; i < kImages; ++i) targets_.push_back(i % kClasses);
  }

  std::unique_ptr<ChainEvaluation> make(int team) const {
    auto evaluation = make_chain_evaluation(source_, Precision::kFloat64);
    evaluation->pack(threads(team));
    return evaluation;
  }

  // The losses of all images and the numbers of correct ones. `seconds`: of each piece of work.
  std::vector<double> run(ChainEvaluation& evaluation, Statistics statistics, Traversal traversal, int team,
                          double seconds = 1e9) const {
    int64_t leaves = 0;
    for (const PathNode& node : source_.nodes) leaves += node.layer == 2;
    Output<double> losses(leaves * kImages);
    std::vector<int64_t> correct(leaves, -1);
    const bool captures = statistics == Statistics::kCapture;
    const Batch batch{images_,
                      kImages,
                      kHeight,
                      kWidth,
                      {3 * kHeight * kWidth, kHeight * kWidth, kWidth, 1},
                      captures ? nullptr : targets_.data(),
                      0.1,
                      captures ? nullptr : losses.data(),
                      captures ? nullptr : correct.data(),
                      team};
    evaluation.start(plan_.steps(traversal), batch, statistics);
    while (!evaluation.advance(seconds, threads(team))) {
    }
    losses.check_guard("chain");
    std::vector<double> result(losses.data(), losses.data() + leaves * kImages);
    result.insert(result.end(), correct.begin(), correct.end());
    for (const double value : result) {
      if (!captures && !(value >= 0 && value < 1e6)) fail("chain: a loss is " + std::to_string(value));
    }
    return result;
  }

 private:
  const double* random(int64_t size, double scale, double offset = 0) {
    std::vector<double>& values = memory_.emplace_back(size);
    for (double& x : values) x = offset + scale * normal();
    return values.data();
  }
  const double* weights(int64_t out, int64_t in) {
    return random(out * in, 1 / std::sqrt(static_cast<double>(in)));
  }

  BatchNormSource batch_norm(int64_t channels) {
    std::vector<double>& variance = memory_.emplace_back(channels);
    for (double& x : variance) x = 0.5 + std::abs(normal());
    BatchNormSource bn;
    bn.variance = variance.data();
    bn.gamma = random(channels, 0.2, 1);
    bn.beta = random(channels, 0.5);
    bn.mean = random(channels, 0.5);
    bn.eps = 1e-5;
    return bn;
  }

  OperationSource conv(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t activation) {
    OperationSource o;
    o.kind = kConvBn;
    o.in_channels = in;
    o.out_channels = out;
    o.kernel = kernel;
    o.stride = stride;
    o.activation = activation;
    o.project = weights(out, in * kernel * kernel);
    o.batch_norms[kProjectBn] = batch_norm(out);
    return o;
  }

  OperationSource identity(int64_t channels) {
    OperationSource o;
    o.in_channels = o.out_channels = channels;
    return o;
  }

  OperationSource bottleneck(int64_t in, int64_t hidden, int64_t out, int64_t kernel, int64_t stride,
                             int64_t activation, int64_t se, int64_t gate) {
    OperationSource o;
    o.kind = kInvertedBottleneck;
    o.in_channels = in;
    o.hidden_channels = hidden;
    o.out_channels = out;
    o.kernel = kernel;
    o.stride = stride;
    o.activation = activation;
    o.se_channels = se;
    o.se_gate = gate;
    o.residual = stride == 1 && in == out;
    if (hidden != in) {
      o.expand = weights(hidden, in);
      o.batch_norms[kExpandBn] = batch_norm(hidden);
    }
    o.depthwise = weights(hidden, kernel * kernel);
    o.batch_norms[kDepthwiseBn] = batch_norm(hidden);
    if (se > 0) {
      o.se_reduce_weight = weights(se, hidden);
      o.se_reduce_bias = random(se, 0.5);
      o.se_expand_weight = weights(hidden, se);
      o.se_expand_bias = random(hidden, 0.5);
    }
    o.project = weights(out, hidden);
    o.batch_norms[kProjectBn] = batch_norm(out);
    return o;
  }

  std::deque<std::vector<double>> memory_;
  std::vector<int64_t> paths_;
  PathPlan plan_;
  ChainSource source_;
  const double* images_;
  std::vector<int64_t> targets_;
};

inline void same_bits(const std::string& what, const std::vector<double>& a, const std::vector<double>& b) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) != 0) fail("chain: " + what);
}

inline void close(const std::string& what, const std::vector<double>& a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    check("chain: " + what, at({static_cast<int64_t>(i)}), a[i], {b[i], 1e-9L});
}

inline void chain_cases() {
  constexpr auto kDeep = Traversal::kDepthFirst, kWide = Traversal::kLayerByLayer;
  const RandomChain chain;
  const auto one = chain.make(1);
  const std::vector<double> batch = chain.run(*one, Statistics::kBatch, kDeep, 1);
  const std::vector<double> running = chain.run(*one, Statistics::kRunning, kDeep, 1);
  chain.run(*one, Statistics::kCapture, kDeep, 1);
  const std::vector<double> constants = chain.run(*one, Statistics::kConstants, kDeep, 1);
  // Other sums than those of the batch, in double.
  close("captured statistics give the losses of the batch's", constants, batch);
  bool differs = false;
  for (std::size_t i = 0; i < batch.size(); ++i) differs = differs || std::abs(batch[i] - running[i]) > 1e-3;
  if (!differs) fail("chain: running statistics give the losses of the batch's");
  for (const int team : {2, 3}) {
    const auto evaluation = chain.make(team);
    same_bits("threads change the batch's losses", chain.run(*evaluation, Statistics::kBatch, kDeep, team),
              batch);
    same_bits("threads change running losses", chain.run(*evaluation, Statistics::kRunning, kWide, team),
              running);
    chain.run(*evaluation, Statistics::kCapture, kWide, team);
    same_bits("threads change captured losses", chain.run(*evaluation, Statistics::kConstants, kDeep, team),
              constants);
  }
  same_bits("layer by layer differs", chain.run(*one, Statistics::kBatch, kWide, 1), batch);
  same_bits("node by node differs", chain.run(*one, Statistics::kBatch, kDeep, 1, 0), batch);
}

}  // namespace reference

// Whole chains: a small random supernet with every kind of operation, in every precision. Neither the number
// of threads nor the traversal nor the pieces of work change a bit, captured statistics give what the batch's
// give, and lower precisions give about the losses of double. GREEDYNAS_CPU_CAPABILITY says which kernels
// run.
#pragma once

#include "cpu/chain.h"
#include "cpu/thread_team.h"
#include "kernel_operations.h"
#include "kernel_reference.h"
#include "path_plan.h"

namespace reference {

// The same numbers whatever C is: all of them are floats.
template <typename C>
class RandomChain : RandomOperations<C> {
  using RandomOperations<C>::bottleneck, RandomOperations<C>::conv, RandomOperations<C>::identity,
      RandomOperations<C>::random;

 public:
  static constexpr int64_t kImages = 23, kHeight = 19, kWidth = 15, kClasses = 7, kPaths = 7,
                           kAlternatives = 4;

  explicit RandomChain(Precision precision)
      : precision_(precision),
        paths_{0, 0, 0, 0, 1, 1, 1, 2, 0, 2, 1, 1, 1, 2, 1, 3, 3, 3, 2, 3, 2},
        plan_(paths_.data(), kPaths, 3) {
    engine.seed(5);
    distribution.reset();
    source_.stem = conv(3, 8, 3, 2, kHswish);
    // The first block reads the stem's convolution as it is; the second one adds its input.
    source_.stem_blocks = {bottleneck(8, 8, 10, 3, 1, kRelu6, 0, kHsigmoid),
                           bottleneck(10, 20, 10, 5, 1, kHswish, 0, kHsigmoid)};
    // Alternatives of each of three layers. Maps have one and two blocks of 32 channels. Kernels of 9 and
    // strides of 3 have no loops of their own.
    const std::vector<std::vector<OperationSource>> layers{
        {bottleneck(10, 24, 34, 3, 2, kRelu6, 0, kHsigmoid),
         bottleneck(10, 33, 34, 5, 2, kHswish, 5, kHsigmoid), conv(10, 34, 1, 2, kRelu),
         bottleneck(10, 10, 34, 7, 2, kRelu6, 0, kHsigmoid)},
        {bottleneck(34, 70, 34, 7, 1, kSilu, 3, kSigmoid), bottleneck(34, 34, 34, 3, 1, kRelu, 0, kHsigmoid),
         identity(34), bottleneck(34, 40, 34, 9, 1, kRelu6, 0, kHsigmoid)},
        {bottleneck(34, 36, 17, 5, 1, kLinear, 4, kSigmoid), conv(34, 17, 1, 1, kSilu),
         conv(34, 17, 1, 1, kLinear), bottleneck(34, 66, 17, 3, 3, kRelu, 0, kHsigmoid)},
    };
    for (const auto& layer : layers)
      source_.operations.insert(source_.operations.end(), layer.begin(), layer.end());
    source_.nodes = plan_.nodes();
    for (PathNode& node : source_.nodes) node.op += kAlternatives * node.layer;
    source_.head = conv(17, 35, 1, 1, kHswish);
    source_.classifier_weight = random(kClasses * 35, 0.5);
    source_.classifier_bias = random(kClasses, 1);
    source_.classes = kClasses;
    images_ = random(kImages * 3 * kHeight * kWidth, 1);
    for (int64_t i = 0; i < kImages; ++i) targets_.push_back(i % kClasses);
  }

  std::unique_ptr<ChainEvaluation> make(const ThreadTeam& team) const {
    auto evaluation = make_chain_evaluation(source_, precision_);
    evaluation->pack(team);
    return evaluation;
  }

  // The losses of all images, leaf by leaf, and the numbers of correct ones. `seconds`: of each piece of
  // work. `around(work)` has to call work(), the evaluation and nothing else.
  template <typename Around>
  std::vector<double> run(ChainEvaluation& evaluation, Statistics statistics, Traversal traversal,
                          const ThreadTeam& team, double seconds, const Around& around) const {
    int64_t leaves = 0;
    for (const PathNode& node : source_.nodes) leaves += node.layer == 2;
    Output<C> losses(leaves * kImages);
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
                      team.size()};
    const std::vector<PathStep> steps = plan_.steps(traversal);
    around([&] {
      evaluation.start(steps, batch, statistics);
      while (!evaluation.advance(seconds, team)) {
      }
    });
    losses.check_guard("chain");
    std::vector<double> result(losses.data(), losses.data() + leaves * kImages);
    result.insert(result.end(), correct.begin(), correct.end());
    for (const double value : result) {
      if (!captures && !(value >= 0 && value < 1e6)) fail("chain: a loss is " + std::to_string(value));
    }
    return result;
  }

  std::vector<double> run(ChainEvaluation& evaluation, Statistics statistics, Traversal traversal,
                          const ThreadTeam& team, double seconds = 1e9) const {
    return run(evaluation, statistics, traversal, team, seconds, [](const auto& work) { work(); });
  }

 private:
  Precision precision_;
  std::vector<int64_t> paths_;
  PathPlan plan_;
  ChainSource source_;
  const C* images_;
  std::vector<int64_t> targets_;
};

// What RandomChain::run returns.
using Losses = std::vector<double>;

inline void same_bits(const std::string& what, const Losses& a, const Losses& b) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) != 0) fail("chain: " + what);
}

// The losses of each leaf, the end of a path.
inline void close(const std::string& what, const Losses& a, const Losses& b, Real tolerance) {
  constexpr int64_t kImages = RandomChain<double>::kImages;
  for (int64_t leaf = 0; leaf < RandomChain<double>::kPaths; ++leaf) {
    Real mean = 0, expected = 0;
    for (int64_t i = leaf * kImages; i < (leaf + 1) * kImages; ++i) {
      mean += a[i] / kImages;
      expected += b[i] / kImages;
    }
    check("chain: " + what, at({leaf}), static_cast<double>(mean), {expected, tolerance});
  }
}

struct ChainResults {
  std::string kernels;
  Losses batch, running, constants;
};

// `tolerance`: between the batch's statistics and the same ones captured, with which other sums are formed.
template <typename C>
ChainResults chain_case(Precision precision, Real tolerance) {
  constexpr auto kDeep = Traversal::kDepthFirst, kWide = Traversal::kLayerByLayer;
  const RandomChain<C> chain(precision);
  const ThreadTeam single(1);
  const auto one = chain.make(single);
  const std::string name = std::string(one->kernels()) + ", ";
  const Losses batch = chain.run(*one, Statistics::kBatch, kDeep, single);
  const Losses running = chain.run(*one, Statistics::kRunning, kDeep, single);
  chain.run(*one, Statistics::kCapture, kDeep, single);
  const Losses constants = chain.run(*one, Statistics::kConstants, kDeep, single);
  close(name + "captured statistics give the losses of the batch's", constants, batch, tolerance);
  bool differs = false;
  for (std::size_t i = 0; i < batch.size(); ++i) differs = differs || std::abs(batch[i] - running[i]) > 1e-3;
  if (!differs) fail("chain: " + name + "running statistics give the losses of the batch's");
  for (const int threads : {2, 3}) {
    const ThreadTeam team(threads);
    const auto evaluation = chain.make(team);
    same_bits(name + "threads change the batch's losses",
              chain.run(*evaluation, Statistics::kBatch, kDeep, team), batch);
    same_bits(name + "threads change running losses",
              chain.run(*evaluation, Statistics::kRunning, kWide, team), running);
    chain.run(*evaluation, Statistics::kCapture, kWide, team);
    same_bits(name + "threads change captured losses",
              chain.run(*evaluation, Statistics::kConstants, kDeep, team), constants);
    same_bits(name + "threads and traversals change the batch's losses",
              chain.run(*evaluation, Statistics::kBatch, kWide, team, 0), batch);
  }
  same_bits(name + "layer by layer differs", chain.run(*one, Statistics::kBatch, kWide, single), batch);
  same_bits(name + "node by node differs", chain.run(*one, Statistics::kBatch, kDeep, single, 0), batch);
  same_bits(name + "running losses differ node by node",
            chain.run(*one, Statistics::kRunning, kWide, single, 0), running);
  return {one->kernels(), batch, running, constants};
}

inline void chain_cases() {
  const ChainResults exact = chain_case<double>(Precision::kFloat64, 1e-9L);
  // What roundings cost over a whole chain is not derived: some times what was seen, 1e-7 and 4e-3.
  const Real in_float = 1e-6L, in_bfloat16 = 2e-2L;
  const auto compare = [&](const ChainResults& results, Real tolerance) {
    const std::string what = results.kernels + ": the losses of double, with ";
    close(what + "the batch's statistics", results.batch, exact.batch, tolerance);
    close(what + "running statistics", results.running, exact.running, tolerance);
    close(what + "captured statistics", results.constants, exact.constants, tolerance);
  };
  const ChainResults single = chain_case<float>(Precision::kFloat32, in_float);
  compare(single, in_float);
  const ChainResults half = chain_case<float>(Precision::kBFloat16, in_bfloat16);
  compare(half, in_bfloat16);
  std::printf("chains: %s, %s, %s\n", exact.kernels.c_str(), single.kernels.c_str(), half.kernels.c_str());
}

}  // namespace reference

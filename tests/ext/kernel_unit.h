// Units (unit_source.h) with themselves, in every precision: the number of threads changes no bit, captured
// statistics give what the batch's give, lower precisions give about the output of double, and nothing is
// written behind the output. GREEDYNAS_CPU_CAPABILITY says which kernels run.
#pragma once

#include "cpu/thread_team.h"
#include "cpu/unit.h"
#include "cpu/weights.h"
#include "kernel_operations.h"
#include "kernel_reference.h"

namespace reference {

// One that splits, branches and lets channels of the branches take turns; and one in a row that begins with
// a dense convolution, has another inside and ends in rows of whole vectors. Both pool.
template <typename C>
UnitSource random_unit(RandomOperations<C>& random, bool branches) {
  if (!branches) {
    return {19,
            32,
            {{{0, 1, 19},
              {0, 1, 32},
              {random.conv(19, 23, 3, 2, kSilu), random.conv(23, 17, 5, 1, kRelu),
               random.bottleneck(17, 17, 34, 7, 1, kLinear, 3, kSigmoid), random.pool(34, 5, 1, kMean, true),
               random.conv(34, 32, 1, 1, kLinear)},
              kHswish}}};
  }
  OperationSource first = random.bottleneck(20, 40, 24, 5, 1, kHswish, 0, kHsigmoid);
  first.depthwise_activation = kLinear;
  first.project_activation = kRelu;
  return {34,
          58,
          {{{1, 2, 10}, {0, 1, 10}, {}},
           {{0, 1, 33}, {10, 2, 24}, {random.conv(33, 20, 3, 1, kRelu), first}},
           {{2, 3, 8},
            {11, 2, 24},
            {random.bottleneck(8, 8, 24, 3, 1, kRelu6, 0, kHsigmoid), random.separable(24, 24, 5, 1),
             random.pool(24, 3, 1, kMaximum, false)},
            kRelu}}};
}

struct UnitCase {
  bool branches, wide;
  Statistics statistics;
  int threads;
};

// The output; of T are what comes and goes.
template <typename T, typename C>
std::vector<double> unit_output(Precision precision, const UnitCase& c, std::vector<C>& kept) {
  constexpr int64_t kImages = 5, kHeight = 13, kWidth = 11;
  engine.seed(7);
  distribution.reset();
  RandomOperations<C> random;
  const UnitSource source = random_unit(random, c.branches);
  const int64_t channels = source.in_channels, size = kImages * kHeight * kWidth * channels;
  std::vector<C> wide(size);
  std::vector<T> narrow;
  for (C& x : wide) {
    narrow.push_back(round_to(static_cast<C>(static_cast<float>(normal())), static_cast<T*>(nullptr)));
    x = static_cast<C>(value_of(narrow.back()));
  }
  const auto evaluation = make_unit_evaluation(source, precision);
  const ThreadTeam team(c.threads);
  evaluation->pack(team);
  kept.resize(evaluation->statistics_size());
  const int64_t stride = source.stride();
  const int64_t out_size =
      kImages * ceil_div(kHeight, stride) * ceil_div(kWidth, stride) * source.out_channels;
  Output<T> output(out_size);
  const void* input = c.wide ? static_cast<const void*>(wide.data()) : narrow.data();
  const UnitBatch batch{
      input,         c.wide,      kImages,
      kHeight,       kWidth,      {kHeight * kWidth * channels, 1, kWidth * channels, channels},
      output.data(), kept.data(), c.threads};
  evaluation->run(batch, c.statistics, team);
  output.check_guard("unit");
  std::vector<double> result;
  for (int64_t i = 0; i < out_size; ++i) result.push_back(output[i]);
  return result;
}

inline void near(const std::string& what, const std::vector<double>& a, const std::vector<double>& b,
                 double tolerance) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= tolerance * (1 + std::abs(b[i]))))
      fail("unit: " + what + ": " + std::to_string(a[i]) + " for " + std::to_string(b[i]));
  }
}

// `tolerance`: to the output of double; a half of it to that of the same precision in another way.
template <typename T, typename C>
void unit_case(Precision precision, bool branches, bool wide, double tolerance) {
  std::vector<double> exact_kept;
  for (const Statistics statistics : {Statistics::kBatch, Statistics::kRunning, Statistics::kCapture}) {
    std::vector<C> kept;
    const auto output = unit_output<T, C>(precision, {branches, wide, statistics, 1}, kept);
    const auto exact =
        unit_output<double, double>(Precision::kFloat64, {branches, true, statistics, 1}, exact_kept);
    near("the output of double", output, exact, tolerance);
    if (unit_output<T, C>(precision, {branches, wide, statistics, 3}, kept) != output)
      fail("unit: threads change the output");
    if (statistics != Statistics::kCapture) continue;
    near("captured statistics",
         unit_output<T, C>(precision, {branches, wide, Statistics::kConstants, 2}, kept), output,
         tolerance / 2);
  }
}

inline void unit_cases() {
  for (const bool branches : {true, false}) {
    unit_case<double, double>(Precision::kFloat64, branches, true, 1e-10);
    unit_case<float, float>(Precision::kFloat32, branches, false, 1e-4);
    if (*bf16_kernels_name() == '\0') continue;
    // Numbers alike in both kinds of bfloat16; 0.15 of values of 1 and more after a dozen roundings of 0.4%.
    for (const bool wide : {true, false})
      unit_case<BFloat16, float>(Precision::kBFloat16, branches, wide, 0.15);
  }
}

}  // namespace reference

// One row of logits (a path, an image) is read once into a buffer of doubles; its largest value, the sum of
// exponentials and, for smoothing, the sum of logits follow from there. All arithmetic is in double: it costs
// little beside the network that made the logits, and leaves one rounding in each output.
#include "path_cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace greedynas::cpu {
namespace {

constexpr int64_t kChunk = 64;        // images per unit of work and per partial sum
constexpr int64_t kExponential = 16;  // multiplications that take as long as one exponential

struct Float64 {
  using Stored = double;
  static double value(double x) { return x; }
};

struct Float32 {
  using Stored = float;
  static double value(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static double value(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  using Stored = uint16_t;
  static double value(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int mantissa = bits & 1023;
    double magnitude;
    if (exponent == 31) {
      magnitude =
          mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      magnitude = std::ldexp(mantissa, -24);
    } else {
      magnitude = std::ldexp(1024 + mantissa, exponent - 25);
    }
    return bits >> 15 ? -magnitude : magnitude;
  }
};

// Memory of a thread that stays allocated from call to call.
template <typename V>
V* at_least(std::vector<V>& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

struct ChunkSums {
  double loss;
  int64_t correct;
};

struct ImageResult {
  double loss;
  bool correct;
};

// As torch.argmax: the first of the largest values, NaN being larger than all.
int64_t argmax(const double* row, int64_t classes) {
  int64_t best = 0;
  for (int64_t c = 0; c < classes; ++c) {
    if (std::isnan(row[c])) return c;
    if (row[c] > row[best]) best = c;
  }
  return best;
}

ImageResult image_loss(const double* row, int64_t classes, int64_t target, double label_smoothing) {
  const int64_t best = argmax(row, classes);
  double exponentials = 0;
  double gaps = 0;  // sum of (largest - logit); differences first, so that large logits do not cancel
  for (int64_t c = 0; c < classes; ++c) {
    const double gap = row[best] - row[c];
    exponentials += std::exp(-gap);
    gaps += gap;
  }
  const double log_sum = std::log(exponentials);
  double loss = row[best] - row[target] + log_sum;
  if (label_smoothing > 0) {  // not a branch to save work: 0 * inf would be NaN where torch has none
    const auto n = static_cast<double>(classes);
    loss = (1 - label_smoothing) * loss + label_smoothing / n * (gaps + n * log_sum);
  }
  return {loss, best == target};
}

template <typename Type, typename Value>
void run(const PathCrossEntropy& a, Value* losses, Value* image_losses, const ParallelFor& parallel_for) {
  const auto* logits = static_cast<const typename Type::Stored*>(a.logits);
  const int64_t chunks = ceil_div(a.images, kChunk);
  thread_local std::vector<ChunkSums> sums_memory;
  ChunkSums* sums = at_least(sums_memory, a.paths * chunks);
  const int64_t chunk_work = kChunk * a.classes * kExponential;
  parallel_for(a.paths * chunks, chunk_work, [&](int64_t begin, int64_t end) {
    thread_local std::vector<double> row_memory;
    double* row = at_least(row_memory, a.classes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t path = unit / chunks;
      const int64_t first = unit % chunks * kChunk;
      const int64_t last = std::min(first + kChunk, a.images);
      ChunkSums sum{};
      for (int64_t image = first; image < last; ++image) {
        const auto* source = logits + path * a.path_stride + image * a.image_stride;
        for (int64_t c = 0; c < a.classes; ++c) row[c] = Type::value(source[c * a.class_stride]);
        const ImageResult result = image_loss(row, a.classes, a.targets[image], a.label_smoothing);
        image_losses[path * a.images + image] = static_cast<Value>(result.loss);
        sum.loss += result.loss;
        sum.correct += result.correct;
      }
      sums[unit] = sum;
    }
  });
  for (int64_t path = 0; path < a.paths; ++path) {
    ChunkSums total{};
    for (int64_t unit = path * chunks; unit < (path + 1) * chunks; ++unit) {
      total.loss += sums[unit].loss;
      total.correct += sums[unit].correct;
    }
    losses[path] = static_cast<Value>(total.loss / static_cast<double>(a.images));
    a.correct[path] = total.correct;
  }
}

}  // namespace

template <>
void path_cross_entropy<double>(const PathCrossEntropy& arguments, double* losses, double* image_losses,
                                const ParallelFor& parallel_for) {
  run<Float64>(arguments, losses, image_losses, parallel_for);
}

template <>
void path_cross_entropy<float>(const PathCrossEntropy& arguments, float* losses, float* image_losses,
                               const ParallelFor& parallel_for) {
  switch (arguments.type) {
    case LogitsType::kBFloat16:
      return run<BFloat16>(arguments, losses, image_losses, parallel_for);
    case LogitsType::kFloat16:
      return run<Float16>(arguments, losses, image_losses, parallel_for);
    default:
      return run<Float32>(arguments, losses, image_losses, parallel_for);
  }
}

}  // namespace greedynas::cpu

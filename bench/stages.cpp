// How near the stages of an inverted bottleneck come to what one core can do: built and run by stages.py.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "block_kernels.h"
#include "buffer.h"
#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace greedynas;
using namespace greedynas::cpu;

constexpr int kRounds = 7;

double median_seconds(const std::function<void()>& work) {
  std::vector<double> seconds;
  work();
  for (int round = 0; round < kRounds; ++round) {
    const auto since = std::chrono::steady_clock::now();
    work();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[kRounds / 2];
}

// Multiply-accumulates a second from registers, in 1e9: this file is compiled for the machine it runs on.
typedef float Vector __attribute__((vector_size(GREEDYNAS_BENCH_VECTOR_BYTES)));

double fma_ceiling() {
  constexpr int kSums = 12, kLoops = 20000000;
  Vector a[kSums], b = Vector{} + 0.5f, c = Vector{} + 0.25f;
  for (Vector& sum : a) sum = Vector{} + 1.f;
  const double seconds = median_seconds([&] {
    Vector sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = a[i];
    for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * b + c;
    }
    for (int i = 0; i < kSums; ++i) a[i] = sums[i];
  });
  return double{kLoops} * kSums * (sizeof(Vector) / sizeof(float)) / seconds / 1e9;
}

#if defined(__AMX_BF16__) && defined(__AVX512FP16__)
#define GREEDYNAS_BENCH_AMX

// Likewise in half precision.
double half_fma_ceiling() {
  constexpr int kSums = 12, kLoops = 20000000;
  __m512h a[kSums], b = _mm512_set1_ph(0.5f), c = _mm512_set1_ph(0.25f);
  for (__m512h& sum : a) sum = _mm512_set1_ph(1.f);
  const double seconds = median_seconds([&] {
    __m512h sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = a[i];
    for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ph(sums[i], b, c);
    }
    for (int i = 0; i < kSums; ++i) a[i] = sums[i];
  });
  return double{kLoops} * kSums * 32 / seconds / 1e9;
}

// Likewise of matrix tiles of bfloat16.
double tile_ceiling() {
  constexpr int kLoops = 4000000;
  alignas(64) uint8_t configuration[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  const double seconds = median_seconds([&] {
    for (int loop = 0; loop < kLoops; ++loop) {
      asm volatile(
          "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
          "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
    }
  });
  asm volatile("tilerelease");
  return double{kLoops} * 4 * 16 * 16 * 32 / seconds / 1e9;
}
#endif

// Bytes a second that a core reads from memory, in 1e9.
double read_ceiling() {
  constexpr int64_t kFloats = 64 << 20;
  const Buffer<float> memory = make_buffer<float>(kFloats);
  std::fill_n(memory.get(), kFloats, 1.f);
  volatile float sink = 0;
  const double seconds = median_seconds([&] {
    Vector sums[8] = {};
    constexpr int64_t kLanesEach = sizeof(Vector) / sizeof(float);
    for (int64_t i = 0; i < kFloats; i += 8 * kLanesEach) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        Vector value;
        std::memcpy(&value, memory.get() + i + j * kLanesEach, sizeof value);
        sums[j] += value;
      }
    }
    for (const Vector& sum : sums) sink = sink + sum[0];
  });
  return kFloats * sizeof(float) / seconds / 1e9;
}

struct Block {
  int64_t images, side, in, hidden, out, kernel, stride;
};

template <typename T>
void fill(T* values, int64_t count, std::mt19937& engine) {
  std::uniform_real_distribution<float> draw(-1.f, 1.f);
  for (int64_t i = 0; i < count; ++i) {
    const float value = draw(engine);
    if constexpr (sizeof(T) == 2) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      values[i] = {static_cast<uint16_t>(bits >> 16)};
    } else {
      values[i] = value;
    }
  }
}

// In GMAC/s and GB/s.
struct Ceilings {
  double products;  // of pointwise convolutions
  double depthwise;
  double moments;  // products for the second moments
  double read;
};

template <typename T>
void measure(const Kernels<T>& k, const Block& b, const Ceilings& ceilings) {
  using C = Compute<T>;
  std::mt19937 engine(0);
  const int64_t side = ceil_div(b.side, b.stride), pixels = side * side;
  const SlabCut cut(b.images, pixels);
  const auto make = [&](int64_t count) {
    Buffer<T> buffer = make_buffer<T>(count);
    fill(buffer.get(), count, engine);
    return buffer;
  };
  const Buffer<T> in = make((b.images * b.side * b.side + kSlackRows) * row_channels<T>(b.in));
  const Buffer<T> expand = make(row_channels<T>(b.hidden) * row_channels<T>(b.in + 1)),
                  project = make(row_channels<T>(b.out) * row_channels<T>(b.hidden + 1));
  const Buffer<T> middle = make(b.images * pixels * row_channels<T>(b.hidden));
  const Buffer<T> out = make((b.images * pixels + kSlackRows) * row_channels<T>(b.out));
  const Buffer<T> residual = make((b.images * pixels + kSlackRows) * row_channels<T>(b.out));
  const int64_t width = std::max(row_channels<T>(b.hidden), row_channels<T>(b.out));
  std::vector<C> scale(width, C(0.5)), shift(width, C(0.1)), pilot(width, C(0.3));
  std::vector<C> depthwise(row_channels<T>(b.hidden) * b.kernel * b.kernel, C(0.2));
  std::vector<C> factor(width, C(1));
  const Buffer<uint16_t> halves = make_buffer<uint16_t>(static_cast<int64_t>(depthwise.size()));
  if (kTiled<T>)
    k.to_halves(reinterpret_cast<const float*>(depthwise.data()), static_cast<int64_t>(depthwise.size()),
                halves.get());
  const int64_t blocks = ceil_div(cut.images * pixels, kBlockPixels);
  std::vector<double> partials(
      3 * (cut.slabs * row_channels<T>(b.hidden) + cut.slabs * blocks * row_channels<T>(b.out)));
  std::vector<double> gram(row_channels<T>(b.out) * (row_channels<T>(b.out) + 1));
  const double middle_bytes = static_cast<double>(b.images * pixels * row_channels<T>(b.hidden)) * sizeof(T);

  const ExpandDepthwise<T> e{in.get(),
                             b.images,
                             b.side,
                             b.side,
                             b.in,
                             expand.get(),
                             scale.data(),
                             shift.data(),
                             kRelu6,
                             depthwise.data(),
                             b.hidden,
                             b.kernel,
                             b.stride,
                             cut.images,
                             kTiled<T> ? halves.get() : nullptr,
                             factor.data(),
                             middle.get(),
                             0,
                             partials.data(),
                             middle_bytes >= (kTiled<T> ? 64 : 16) << 20};
  const ProjectInput<T> from{middle.get(), 0,      cut.images, b.images,  pixels,       scale.data(),
                             shift.data(), kRelu6, nullptr,    kTiled<T>, factor.data()};
  const PointwiseOutput<T> to{project.get(), b.hidden, b.out,   out.get(),      nullptr,
                              nullptr,       kLinear,  nullptr, partials.data()};
  const FinishMap<T> f{out.get(),    out.get(), b.images * pixels, b.out,       scale.data(),
                       shift.data(), kLinear,   residual.get(),    pilot.data()};
  const double expanding = median_seconds(
      [&] { k.expand_depthwise(e, 0, cut.slabs * ceil_div(row_channels<T>(b.hidden), k.group_width)); });
  const double projecting = median_seconds([&] {
    for (int64_t slab = 0; slab < cut.slabs; ++slab) {
      const int64_t images = std::min(cut.images, b.images - slab * cut.images);
      k.project(from, to, slab, 0, ceil_div(images * pixels, kBlockPixels));
    }
  });
  const double finishing = median_seconds([&] {
    k.finish(f, 0, ceil_div(b.images * pixels, kGramPixels), gram.data() + row_channels<T>(b.out),
             gram.data());
  });

  const double giga = 1e-9 * static_cast<double>(b.images);
  const double expand_floor =
      giga * static_cast<double>(b.side * b.side * b.in * b.hidden) / ceilings.products +
      giga * static_cast<double>(pixels * b.hidden * b.kernel * b.kernel) / ceilings.depthwise;
  const double project_floor = giga * static_cast<double>(pixels * b.hidden * b.out) / ceilings.products;
  const double gram_floor = giga * static_cast<double>(pixels * b.out * (b.out + 1) / 2) / ceilings.moments;
  const double map_floor =
      giga * static_cast<double>(3 * pixels * row_channels<T>(b.out)) * sizeof(T) / ceilings.read;
  std::printf(
      "%-12s %3ldx%-3ld %3ld->%4ld->%3ld k%ld s%ld  %8.2f ms %3.0f%%  %8.2f ms %3.0f%% (read %3.0f%%)  %7.2f "
      "ms %3.0f%%\n",
      k.name, b.side, b.side, b.in, b.hidden, b.out, b.kernel, b.stride, 1e3 * expanding,
      100 * expand_floor / expanding, 1e3 * projecting, 100 * project_floor / projecting,
      100 * 1e-9 * middle_bytes / ceilings.read / projecting, 1e3 * finishing,
      100 * std::max(gram_floor, map_floor) / finishing);
}

}  // namespace

int main() {
  const double fma = fma_ceiling(), read = read_ceiling();
  std::printf("one core: %.0f GMAC/s float32 from registers, %.1f GB/s read from memory\n", fma, read);
#ifdef GREEDYNAS_BENCH_AMX
  double half = 0, tiles = 0;
  if (used_capability() == kAmx) {
    half = half_fma_ceiling();
    tiles = tile_ceiling();
    std::printf("          %.0f GMAC/s half precision from registers, %.0f GMAC/s bf16 matrix tiles\n", half,
                tiles);
  }
#endif
  std::printf(
      "percent of the ceiling: products and depthwise; products (of it, reading its input); moments or "
      "memory\n");
  const Block blocks[] = {{16, 112, 16, 96, 32, 3, 2},  {16, 56, 32, 192, 32, 3, 1},
                          {16, 56, 32, 192, 32, 7, 1},  {32, 28, 40, 240, 40, 5, 1},
                          {32, 14, 80, 480, 80, 3, 1},  {32, 14, 96, 288, 96, 7, 1},
                          {32, 7, 192, 1152, 192, 5, 1}};
  for (const Block& block : blocks)
    measure(kernels_for<float>(used_capability()), block, {fma, fma, fma, read});
  if (machine_has_avx512_bf16() && used_capability() >= kAvx512) {
    for (const Block& block : blocks) measure(bf16_kernels(), block, {2 * fma, fma, fma, read});
  }
#ifdef GREEDYNAS_BENCH_AMX
  if (used_capability() != kAmx) return 0;
  for (const Block& block : blocks) measure(tiled_kernels(), block, {tiles, half, tiles, read});
#endif
}

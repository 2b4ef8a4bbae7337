// How near the stages of an inverted bottleneck come to what the cores can do, built and run by stages.py:
// stages THREADS prints JSON, the ceilings in the first line, then a line for each kernels and block.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "block_runner.h"
#include "buffer.h"
#include "capability.h"
#include "thread_team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace greedynas;
using namespace greedynas::cpu;

constexpr int kRounds = 7;

double median_seconds(const FunctionRef<void()>& work) {
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

// Of work() in every thread at once.
double median_seconds(const ThreadTeam& team, const FunctionRef<void()>& work) {
  return median_seconds([&] { team(team.size(), 0, [&](int64_t, int64_t) { work(); }); });
}

// Multiply-accumulates a second of all threads, from registers, in 1e9: this file is compiled for the machine
// it runs on.
typedef float Vector __attribute__((vector_size(GREEDYNAS_BENCH_VECTOR_BYTES)));

double fma_ceiling(const ThreadTeam& team) {
  constexpr int kSums = 12, kLoops = 20000000;
  const Vector b = Vector{} + 0.5f, c = Vector{} + 0.25f;
  const double seconds = median_seconds(team, [&] {
    Vector sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i)
      sums[i] = Vector{} + (1.f + i);  // different: one chain must not stand for all
    for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * b + c;
    }
    Vector total = sums[0];
#pragma GCC unroll 12
    for (int i = 1; i < kSums; ++i) total += sums[i];
    volatile float sink = total[0];
    static_cast<void>(sink);
  });
  return static_cast<double>(team.size()) * kLoops * kSums * (sizeof(Vector) / sizeof(float)) / seconds / 1e9;
}

#if defined(__AMX_BF16__) && defined(__AVX512FP16__)
#define GREEDYNAS_BENCH_AMX

// Likewise in half precision.
double half_fma_ceiling(const ThreadTeam& team) {
  constexpr int kSums = 12, kLoops = 20000000;
  const __m512h b = _mm512_set1_ph(0.5f), c = _mm512_set1_ph(0.25f);
  const double seconds = median_seconds(team, [&] {
    __m512h sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ph(1.f + i);
    for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ph(sums[i], b, c);
    }
    __m512h total = sums[0];
#pragma GCC unroll 12
    for (int i = 1; i < kSums; ++i) total = _mm512_add_ph(total, sums[i]);
    volatile float sink = static_cast<float>(_mm512_cvtsh_h(total));
    static_cast<void>(sink);
  });
  return static_cast<double>(team.size()) * kLoops * kSums * 32 / seconds / 1e9;
}

// Likewise of matrix tiles of bfloat16.
double tile_ceiling(const ThreadTeam& team) {
  constexpr int kLoops = 4000000;
  alignas(64) uint8_t configuration[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  const double seconds = median_seconds(team, [&] {
    asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
    for (int loop = 0; loop < kLoops; ++loop) {
      asm volatile(
          "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
          "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
    }
    asm volatile("tilerelease");
  });
  return static_cast<double>(team.size()) * kLoops * 4 * 16 * 16 * 32 / seconds / 1e9;
}
#endif

// Bytes a second that all threads read from memory, in 1e9.
double read_ceiling(const ThreadTeam& team) {
  constexpr int64_t kFloats = 64 << 20, kStep = 8 * (sizeof(Vector) / sizeof(float));
  const Buffer<float> memory = make_buffer<float>(kFloats);
  std::fill_n(memory.get(), kFloats, 1.f);
  const double seconds = median_seconds([&] {
    team(kFloats / kStep, 0, [&](int64_t begin, int64_t end) {
      Vector sums[8] = {};
      for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          Vector value;
          std::memcpy(&value, memory.get() + i * kStep + j * (kStep / 8), sizeof value);
          sums[j] += value;
        }
      }
      Vector total = sums[0];
#pragma GCC unroll 8
      for (int i = 1; i < 8; ++i) total += sums[i];
      volatile float sink = total[0];
      static_cast<void>(sink);
    });
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
struct Ceiling {
  const char* name;
  double rate;
};
struct Ceilings {
  Ceiling products;  // of pointwise convolutions
  Ceiling depthwise;
  Ceiling moments;  // products for the second moments
  Ceiling memory;
};

struct Floor {
  Ceiling ceiling;
  double giga;  // multiply-accumulates or bytes
};

// Floors are the least seconds that the ceilings allow.
void print_stage(const char* name, double seconds, const std::vector<Floor>& floors, const char* end) {
  std::printf("\"%s\": {\"seconds\": %.4e, \"floors\": [", name, seconds);
  const char* separator = "";
  for (const Floor& floor : floors) {
    std::printf("%s[\"%s\", %.4e]", separator, floor.ceiling.name, floor.giga / floor.ceiling.rate);
    separator = ", ";
  }
  std::printf("]}%s", end);
}

template <typename T>
void measure(const ThreadTeam& team, const Kernels<T>& k, const Block& b, const Ceilings& ceilings) {
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
  std::vector<double> gram(kMostSegments * row_channels<T>(b.out) * (row_channels<T>(b.out) + 1));
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
                             middle_bytes >= kStreamedBytes<T>};
  const ProjectInput<T> from{middle.get(), 0,      cut.images, b.images,  pixels,       scale.data(),
                             shift.data(), kRelu6, nullptr,    kTiled<T>, factor.data()};
  const PointwiseOutput<T> to{project.get(), b.hidden, b.out,   out.get(),      nullptr,
                              nullptr,       kLinear,  nullptr, partials.data()};
  const FinishMap<T> f{out.get(),    out.get(), b.images * pixels, b.out,       scale.data(),
                       shift.data(), kLinear,   residual.get(),    pilot.data()};
  const int64_t groups = ceil_div(row_channels<T>(b.hidden), k.group_width);
  const double expanding = median_seconds([&] {
    team(cut.slabs * groups, 0, [&](int64_t begin, int64_t end) { k.expand_depthwise(e, begin, end); });
  });
  const double projecting = median_seconds([&] {
    for_blocks(cut, b.images, pixels, 0, team,
               [&](int64_t slab, int64_t first, int64_t last) { k.project(from, to, slab, first, last); });
  });
  const double finishing = median_seconds([&] { finish_everywhere(k, f, gram.data(), team); });

  const double giga = 1e-9 * static_cast<double>(b.images);
  const double expand_products = giga * static_cast<double>(b.side * b.side * b.in * b.hidden),
               depthwise_products = giga * static_cast<double>(pixels * b.hidden * b.kernel * b.kernel),
               project_products = giga * static_cast<double>(pixels * b.hidden * b.out),
               gram_products = giga * static_cast<double>(pixels * b.out * (b.out + 1) / 2);
  const double in_bytes = giga * static_cast<double>(b.side * b.side * row_channels<T>(b.in)) * sizeof(T),
               out_bytes = giga * static_cast<double>(pixels * row_channels<T>(b.out)) * sizeof(T);
  std::printf(
      "{\"kernels\": \"%s\", \"images\": %ld, \"side\": %ld, \"in\": %ld, \"hidden\": %ld, \"out\": %ld, "
      "\"kernel\": %ld, \"stride\": %ld, \"stages\": {",
      k.name, b.images, b.side, b.in, b.hidden, b.out, b.kernel, b.stride);
  print_stage("expand_depthwise", expanding,
              {{ceilings.products, expand_products},
               {ceilings.depthwise, depthwise_products},
               {ceilings.memory, in_bytes + 1e-9 * middle_bytes}},
              ", ");
  print_stage("project", projecting,
              {{ceilings.products, project_products}, {ceilings.memory, 1e-9 * middle_bytes + out_bytes}},
              ", ");
  print_stage("finish", finishing, {{ceilings.moments, gram_products}, {ceilings.memory, 3 * out_bytes}},
              "}}\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc == 2 ? std::atoi(argv[1]) : 0;
  if (threads < 1) {
    std::fprintf(stderr, "usage: stages THREADS\n");
    return 2;
  }
  const ThreadTeam team(threads);
  const Ceiling fma{"fp32 FMA", fma_ceiling(team)}, memory{"memory", read_ceiling(team)};
  std::printf("{\"%s\": %.1f, \"%s\": %.2f", fma.name, fma.rate, memory.name, memory.rate);
#ifdef GREEDYNAS_BENCH_AMX
  Ceiling half{"fp16 FMA", 0}, tiles{"bf16 tiles", 0};
  if (used_capability() == kAmx) {
    half.rate = half_fma_ceiling(team);
    tiles.rate = tile_ceiling(team);
    std::printf(", \"%s\": %.1f, \"%s\": %.1f", half.name, half.rate, tiles.name, tiles.rate);
  }
#endif
  const bool has_bf16 = machine_has_avx512_bf16() && used_capability() >= kAvx512;
  const Ceiling bf16{"bf16 products", 2 * fma.rate};
  if (has_bf16) std::printf(", \"%s\": %.1f", bf16.name, bf16.rate);
  std::printf("}\n");
  const Block blocks[] = {{16, 112, 16, 96, 32, 3, 2},  {16, 56, 32, 192, 32, 3, 1},
                          {16, 56, 32, 192, 32, 7, 1},  {32, 28, 40, 240, 40, 5, 1},
                          {32, 14, 80, 480, 80, 3, 1},  {32, 14, 96, 288, 96, 7, 1},
                          {32, 7, 192, 1152, 192, 5, 1}};
  for (const Block& block : blocks)
    measure(team, kernels_for<float>(used_capability()), block, {fma, fma, fma, memory});
  if (has_bf16) {
    for (const Block& block : blocks) measure(team, bf16_kernels(), block, {bf16, fma, fma, memory});
  }
#ifdef GREEDYNAS_BENCH_AMX
  if (used_capability() != kAmx) return 0;
  for (const Block& block : blocks) measure(team, tiled_kernels(), block, {tiles, half, tiles, memory});
#endif
}

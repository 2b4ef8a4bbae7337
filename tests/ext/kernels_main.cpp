// Compares every kernel of every instruction set that this machine has with plain loops (kernel_cases_*.h),
// on random values rounded to the type in which they are stored, and whole chains (kernel_chain.h) and units
// (kernel_unit.h) with themselves. Built plainly and with sanitizers by test_kernels.py. --quick: fewer
// shapes; --chains: nothing but the chains and units.
#include <string_view>

#include "cpu/capability.h"
#include "kernel_cases_depthwise.h"
#include "kernel_cases_halves.h"
#include "kernel_cases_maps.h"
#include "kernel_cases_packing.h"
#include "kernel_cases_pointwise.h"
#include "kernel_cases_project.h"
#include "kernel_chain.h"
#include "kernel_unit.h"

namespace {

using namespace reference;

// With groups of two vectors the edges lie at 16, 32 and 48 channels at most; tiles have 32, and two groups
// of them meet at 64.
template <typename T>
int64_t some_channels() {
  if (kTiled<T>) return pick<int64_t>({1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65});
  return pick<int64_t>({1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 49});
}
int64_t any_activation() { return whole(kLinear, kSilu); }
bool coin() { return engine() % 2 == 0; }

// What kTiled kernels have that others lack: half precision.
void half_cases(const Kernels<TiledBFloat16>& k, bool quick) {
  const auto exact_activation = [] { return whole(kLinear, kRelu6); };
  // Outputs are computed in pairs of rows and tiles of 4, 7 or 8 columns, inputs in tiles of 32 pixels.
  for (const int64_t kernel : {3, 5, 7}) {
    for (const int64_t stride : {1, 2}) {
      for (const int64_t out_width :
           {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 21, 28, 31, 32, 33}) {
        if (quick && out_width % 7 > 1) continue;
        for (const Values values : {Values::kRandom, Values::kWhole}) {
          const int64_t width = out_width * stride - (stride == 2 && coin() ? 1 : 0);
          half_depthwise_case(
              k,
              {pick<int64_t>({1, 2, 3}), pick<int64_t>({1, 2, 3, 4, 5, 6, 9}), width,
               pick<int64_t>({1, 2, 31, 32, 33, 65}), pick<int64_t>({1, 31, 32, 33, 65}), kernel, stride,
               pick<int64_t>({1, 2, 3}), values == Values::kWhole ? exact_activation() : any_activation(),
               coin(), true, coin(), coin(), pick({1e-5, 1.0, 1e5}), pick({0.0, 0.0, 30.0, 300.0})},
              values);
        }
      }
      // Taller than the ring of rows, with tiles that reach over many of them, and enough pixels for sums to
      // be moved on; tiles that begin and end with a row, and that are full at the end of a slab.
      for (const bool expands : {false, true}) {
        half_depthwise_case(
            k, {2, 67, 1, 3, 33, kernel, stride, 2, exact_activation(), expands, true, false, false, 1, 0},
            Values::kWhole);
        half_depthwise_case(
            k, {3, 35, 3, 35, 31, kernel, stride, 2, exact_activation(), expands, true, coin(), true, 1, 0},
            Values::kWhole);
        half_depthwise_case(
            k, {2, 41, 29, 2, 32, kernel, stride, 2, any_activation(), expands, true, false, coin(), 1, 30},
            Values::kRandom);
        half_depthwise_case(
            k, {2, 37, 23, 2, 32, kernel, stride, 2, any_activation(), expands, true, false, false, 1, 0},
            Values::kUneven);
        for (const int64_t height : {3, 4}) {
          half_depthwise_case(k,
                              {2, height, 8, 64, 64, kernel, stride, pick<int64_t>({1, 2}),
                               exact_activation(), expands, true, coin(), false, 1, 0},
                              Values::kWhole);
        }
      }
      for (const int64_t activation : {kLinear, kRelu, kRelu6, kHswish, kSilu}) {
        half_depthwise_case(
            k, {2, 9, 17, 3, 33, kernel, stride, 2, activation, coin(), true, coin(), coin(), 1, 0},
            Values::kNotFinite);
      }
    }
  }
  // As the driver cuts a batch.
  const SlabCut cut(11, 98);
  half_depthwise_case(k, {11, 14, 7, 3, 33, 3, 1, cut.images, kHswish, true, true, false, true, 1, 0},
                      Values::kRandom);

  for (const int64_t activation : {kLinear, kRelu, kRelu6, kHswish, kSilu}) {
    for (const bool gates : {false, true}) {
      for (int64_t i = 0; i < (quick ? 2 : 8); ++i) {
        // Panels of 32 pixels.
        const int64_t image_pixels =
            pick<int64_t>({1, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 191, 192, 193, 200});
        DepthwiseOutputCase s{pick<int64_t>({1, 2, 3, 5}),
                              image_pixels,
                              some_channels<TiledBFloat16>(),
                              pick<int64_t>({1, 2, 3}),
                              activation,
                              gates,
                              coin(),
                              i % 4 != 3};
        squeeze_case<TiledBFloat16>(k, s);
        // Without factors of rows weights have less room.
        const bool rows = coin();
        project_case<TiledBFloat16>(k, s,
                                    {some_channels<TiledBFloat16>(), kLinear, coin(), coin(),
                                     rows ? pick({1e-5, 1.0, 1e5}) : 1.0, false, rows});
        s.values = Values::kNotFinite;
        project_case<TiledBFloat16>(
            k, s, {some_channels<TiledBFloat16>(), kLinear, false, coin(), 1, false, coin()});
        if (activation > kRelu6) continue;
        s.values = Values::kWhole;
        project_case<TiledBFloat16>(
            k, s, {some_channels<TiledBFloat16>(), kLinear, coin(), coin(), 1, true, coin()});
      }
    }
  }
  for (const int64_t count : {16, 32, 48, 9 * 32, 4096}) to_halves_case(k, count);
  for (const int64_t rows : {1, 15, 16, 17, 31, 32, 33, 65}) {
    for (const int64_t columns : {1, 2, 15, 16, 17, 31, 32, 33, 64, 65})
      packing_case(k, {rows, columns, pick<int64_t>({0, 3}), coin(), coin()});
  }
}

// One below, at and above the edges of everything that the kernels cut in pieces.
template <typename T>
void all_cases(const Kernels<T>& k, bool quick) {
  cases = 0;
  const auto often = [&](int64_t all, int64_t few) { return quick ? few : all; };
  const auto channels = [] { return some_channels<T>(); };
  const auto activation = [] { return any_activation(); };
  const auto weight_scale = [] { return pick({1e-5, 1.0, 1e5}); };
  const auto row_factors = [] { return kTiled<T> && coin(); };

  // Outputs are computed in tiles of 4, 7, 8 or 14 columns, inputs in tiles of 6 or 12 pixels.
  for (const int64_t kernel : {3, 5, 7}) {
    for (const int64_t stride : {1, 2}) {
      for (const int64_t out_width : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 21, 22, 28, 29}) {
        if (quick && out_width % 7 > 1) continue;
        const int64_t images = pick<int64_t>({1, 2, 3}),
                      width = out_width * stride - (stride == 2 && coin() ? 1 : 0);
        expand_depthwise_case<T>(
            k, {images, pick<int64_t>({1, 2, 3, 5, 6, 9}), width, pick<int64_t>({1, 2, 3, 7, 16, 17}),
                pick<int64_t>({1, 15, 16, 17, 32, 33}), kernel, stride, pick<int64_t>({1, 2, 3}),
                activation(), coin(), true, coin(), coin(), weight_scale(), pick({0.0, 0.0, 30.0, 300.0})});
      }
      // Taller than the ring of rows, and without a pending map.
      expand_depthwise_case<T>(k,
                               {2, 31, 3, 5, 18, kernel, stride, 2, kSilu, true, true, false, false, 1, 0});
      expand_depthwise_case<T>(
          k, {3, 23, 2, 5, 34, kernel, stride, 2, kLinear, false, false, coin(), true, 1, 30});
      expand_depthwise_case<T>(
          k, {2, 4, 5, 5, 34, kernel, stride, 1, kRelu6, false, true, coin(), false, 1e5, 0});
    }
  }
  // Kernels and strides without loops of their own; some strides leave rows out.
  for (const int64_t kernel : {1, 3, 7, 9, 11}) {
    for (const int64_t stride : {1, 2, 3, 4}) {
      if (stride < 3 && (kernel == 3 || kernel == 7)) continue;
      const int64_t width = pick<int64_t>({1, 4, 5, 14, 17});
      expand_depthwise_case<T>(k, {2, pick<int64_t>({1, 4, 13}), width, 3, 33, kernel, stride, 2,
                                   activation(), coin(), true, coin(), coin(), 1, 0});
    }
  }
  // Slabs of an odd number of pixels and of groups of half a width: the second begins within a cache line.
  expand_depthwise_case<T>(k, {3, 3, 5, 5, 33, 3, 1, 1, kRelu, true, true, false, true, 1, 0});
  // As the driver cuts a batch.
  const SlabCut cut(11, 98);
  expand_depthwise_case<T>(k, {11, 14, 7, 3, 33, 3, 1, cut.images, kHswish, true, true, false, true, 1, 0});

  for (int64_t i = 0; i < often(30, 6); ++i) {
    // Panels of 48 pixels, blocks of 192, and some sizes between.
    const int64_t image_pixels = pick<int64_t>({1, 4, 11, 12, 13, 47, 48, 49, 95, 191, 192, 193, 200});
    const int64_t images = pick<int64_t>({1, 2, 3, 5});
    const DepthwiseOutputCase s{images,       image_pixels, channels(), pick<int64_t>({1, 2, 3}),
                                activation(), i % 2 == 0,   i % 3 == 0};
    project_case<T>(k, s, {channels(), kLinear, i / 2 % 2 == 0, coin(), weight_scale(), false, kTiled<T>});
    squeeze_case<T>(k, s);
  }
  squeeze_case<T>(k, {2, 129, 33, 1, kHswish, false, true});

  for (int64_t i = 0; i < often(30, 6); ++i) {
    const StridedCase s{pick<int64_t>({1, 2, 3}),
                        pick<int64_t>({1, 2, 7, 8, 11}),
                        pick<int64_t>({1, 3, 8, 9, 13}),
                        channels(),
                        pick<int64_t>({1, 2, 3}),
                        pick({0.0, 30.0, 300.0}),
                        false,
                        false};
    strided_case<T>(k, s,
                    {channels(), activation(), i % 2 == 0, coin(), weight_scale(), false, row_factors()});
  }
  for (const int64_t kind : {kLinear, kRelu, kRelu6, kHswish, kSilu}) {
    // An even depth: with an odd one padding, 0 * infinity = NaN, is a factor of bf16 products as well.
    strided_case<T>(k, {1, 5, 9, 6, 1, 0, true, false}, {33, kind, false, false, 1});
    strided_case<T>(k, {1, 5, 9, 1 + k.depth_multiple, 2, 0, true, false}, {3, kind, false, true, 1});
  }
  strided_case<T>(k, {2, 15, 13, 17, 1, 30, false, true}, {33, kLinear, true, false, 1});

  for (const int64_t kernel : {1, 3, 5, 7}) {
    for (const int64_t stride : {1, 2, 3}) {
      for (const bool nhwc : {false, true}) {
        const PatchCase s{pick<int64_t>({1, 2}),
                          pick<int64_t>({1, 2, 9, 14}),
                          pick<int64_t>({1, 5, 10, 15, 16, 17, 33, 34}),
                          pick<int64_t>({1, 2, 3, 7, 8, 17, 35}),
                          kernel,
                          stride,
                          nhwc};
        patches_case<T>(k, s, {pick<int64_t>({1, 8, 17, 33}), activation(), coin(), coin(), weight_scale()});
      }
    }
  }

  for (int64_t i = 0; i < often(40, 10); ++i) {
    const bool maps = i % 4 != 3;
    finish_case<T>(
        k, {pick<int64_t>({1, 2, 49, 255, 256, 257, 300, 513}), pick<int64_t>({1, 8, 9, 16, 17, 33}), i % 5,
            maps, !maps || coin(), maps && coin(), coin(), pick({0.0, 30.0, 300.0}), coin()});
  }
  // Tiles of 32 pixels and one to three blocks of 32 channels; more units than are added up in float.
  for (const int64_t pixels : {31, 32, 33, 287, 1023, 1025, 2600}) {
    if (!kTiled<T>) break;
    for (const double mean : {0.0, 30.0, 300.0}) {
      const bool maps = coin();
      finish_case<T>(k, {pixels, pixels > 400 ? 33 : pick<int64_t>({31, 32, 33, 64, 65, 96}), activation(),
                         maps, true, maps && coin(), coin(), mean, mean > 0 || coin()});
    }
  }

  for (const double ratio : {0.0, 30.0, 300.0}) {
    for (const int64_t depth : {1, 2, 3, 4, 5, 16, 17, 33}) {
      pointwise_moments_case<T>(k, depth, channels(), ratio, weight_scale());
    }
  }

  for (int64_t i = 0; i < often(40, 12); ++i) {
    linear_case<T>(k, pick<int64_t>({1, 2, 3, 5, 6, 7, 13}), pick<int64_t>({1, 2, 17, 40}), channels(), i % 4,
                   coin(), i / 4 % 2 == 0, i % 3 == 0 ? 3 : 0);
  }

  // Images of fewer pixels than a tile, so that several of them share one.
  for (const int64_t image_pixels : {1, 2, 4, 5, 6, 7, 9, 11, 12, 13, 31, 32, 33, 49, 65}) {
    head_pool_case<T>(k, {pick<int64_t>({1, 3, 5, 7}), image_pixels, pick<int64_t>({1, 2, 7, 16, 17, 33}),
                          channels(), pick<int64_t>({1, 2, 4}), activation(), weight_scale()});
  }

  if constexpr (kTiled<T>) half_cases(k, quick);

  const char* type = sizeof(T) == 8 ? "double" : (sizeof(T) == 4 ? "float" : "BFloat16");
  if (kTiled<T>) type = "TiledBFloat16";
  std::printf("%s, %s: %lld cases\n", k.name, type, static_cast<long long>(cases));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view argument = argc > 1 ? argv[1] : "";
  const bool quick = argument == "--quick";
  if (argument != "--chains") {
    for (const Capability capability : {kPortable, kAvx2, kAvx512}) {
      if (capability > machine_capability()) continue;
      all_cases<float>(kernels_for<float>(capability), quick);
      all_cases<double>(kernels_for<double>(capability), quick);
    }
    if (machine_has_avx512_bf16()) all_cases<BFloat16>(bf16_kernels(), quick);
    if (machine_capability() == kAmx) all_cases<TiledBFloat16>(tiled_kernels(), quick);
  }
  chain_cases();
  unit_cases();
  std::puts("all as expected");
  return 0;
}

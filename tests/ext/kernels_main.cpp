// Compares every kernel of every instruction set that this machine has with plain loops (kernel_cases.h), on
// random values rounded to the type in which they are stored, and whole chains with themselves
// (kernel_chain.h). Built plainly and with sanitizers by test_kernels.py. --quick: fewer shapes.
#include <string_view>

#include "cpu/capability.h"
#include "kernel_cases.h"
#include "kernel_chain.h"

namespace {

using namespace reference;

// One below, at and above the edges of everything that the kernels cut in pieces.
template <typename T>
void all_cases(const Kernels<T>& k, bool quick) {
  cases = 0;
  const auto often = [&](int64_t all, int64_t few) { return quick ? few : all; };
  // With groups of two vectors the edges lie at 16, 32 and 48 channels at most.
  const auto channels = [] { return pick<int64_t>({1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 49}); };
  const auto activation = [] { return static_cast<int64_t>(engine() % 5); };
  const auto coin = [] { return engine() % 2 == 0; };
  const auto weight_scale = [] { return pick({1e-5, 1.0, 1e5}); };

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
    project_case<T>(k, s, {channels(), kLinear, i / 2 % 2 == 0, coin(), weight_scale()});
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
    strided_case<T>(k, s, {channels(), activation(), i % 2 == 0, coin(), weight_scale()});
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
                          pick<int64_t>({1, 5, 10, 15}),
                          pick<int64_t>({1, 2, 3}),
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
            maps, !maps || coin(), maps && coin(), coin(), pick({0.0, 30.0, 300.0})});
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
  for (const int64_t image_pixels : {1, 2, 4, 5, 6, 7, 9, 11, 12, 13, 49}) {
    head_pool_case<T>(k, {pick<int64_t>({1, 3, 5, 7}), image_pixels, pick<int64_t>({1, 2, 7, 16, 17, 33}),
                          channels(), pick<int64_t>({1, 2, 4}), activation(), weight_scale()});
  }

  const char* type = sizeof(T) == 8 ? "double" : (sizeof(T) == 4 ? "float" : "BFloat16");
  std::printf("%s, %s: %lld cases\n", k.name, type, static_cast<long long>(cases));
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string_view(argv[1]) == "--quick";
  for (const Capability capability : {kPortable, kAvx2, kAvx512}) {
    if (capability > machine_capability()) continue;
    all_cases<float>(kernels_for<float>(capability), quick);
    all_cases<double>(kernels_for<double>(capability), quick);
  }
  if (machine_has_avx512_bf16()) all_cases<BFloat16>(bf16_kernels(), quick);
  chain_cases();
  std::puts("all as expected");
  return 0;
}

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "block_kernels.h"
#include "buffer.h"
#include "instruction_levels.h"
#include "kernel_tables.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define GREEDYNAS_VECTOR_BYTES 32
#define GREEDYNAS_LEVEL GREEDYNAS_AVX2
#define GREEDYNAS_LEVEL_NAME "avx2"

namespace greedynas::cpu::avx2 {
#include "kernels/all.h"
}  // namespace greedynas::cpu::avx2

#pragma GCC pop_options

namespace greedynas::cpu {
constinit const Kernels<float> kAvx2Float = avx2::make_kernels<float>();
constinit const Kernels<double> kAvx2Double = avx2::make_kernels<double>();
}  // namespace greedynas::cpu
#endif

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
// gcc 12 takes the undefined operand of its own unmasked intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")

#define GREEDYNAS_VECTOR_BYTES 64
#define GREEDYNAS_LEVEL GREEDYNAS_AVX512
#define GREEDYNAS_LEVEL_NAME "avx512"

namespace greedynas::cpu::avx512 {
#include "kernels/all.h"
}  // namespace greedynas::cpu::avx512

#pragma GCC pop_options

namespace greedynas::cpu {
constinit const Kernels<float> kAvx512Float = avx512::make_kernels<float>();
constinit const Kernels<double> kAvx512Double = avx512::make_kernels<double>();
}  // namespace greedynas::cpu
#endif

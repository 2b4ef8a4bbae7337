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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")

#define GREEDYNAS_VECTOR_BYTES 64
#define GREEDYNAS_LEVEL GREEDYNAS_AVX512
#define GREEDYNAS_LEVEL_NAME "avx512_bf16"
#define GREEDYNAS_BF16 BFloat16

namespace greedynas::cpu::avx512_bf16 {
#include "kernels/all.h"
}  // namespace greedynas::cpu::avx512_bf16

#pragma GCC pop_options

namespace greedynas::cpu {
constinit const Kernels<BFloat16> kAvx512Bf16 = avx512_bf16::make_kernels<BFloat16>();
}  // namespace greedynas::cpu
#endif

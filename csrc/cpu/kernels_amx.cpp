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
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512fp16,amx-tile,amx-bf16,avx2,fma,prefer-vector-width=512")

#define GREEDYNAS_VECTOR_BYTES 64
#define GREEDYNAS_LEVEL GREEDYNAS_AVX512
#define GREEDYNAS_LEVEL_NAME "amx"
#define GREEDYNAS_BF16 TiledBFloat16
#define GREEDYNAS_AMX

namespace greedynas::cpu::amx {
#include "kernels/all.h"
}  // namespace greedynas::cpu::amx

#pragma GCC pop_options

namespace greedynas::cpu {
constinit const Kernels<TiledBFloat16> kAmxTiled = amx::make_kernels<TiledBFloat16>();
}  // namespace greedynas::cpu
#endif

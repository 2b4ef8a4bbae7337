// The tables of all instruction sets; those that the build's architecture does not have are missing.
#pragma once

#include "block_kernels.h"

namespace greedynas::cpu {

extern const Kernels<float> kPortableFloat, kAvx2Float, kAvx512Float;
extern const Kernels<double> kPortableDouble, kAvx2Double, kAvx512Double;
extern const Kernels<BFloat16> kAvx512Bf16;
extern const Kernels<TiledBFloat16> kAmxTiled;

}  // namespace greedynas::cpu

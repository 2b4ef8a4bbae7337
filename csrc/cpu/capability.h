// Which instruction set the kernels use: the best that the machine has, or a lower one that
// GREEDYNAS_CPU_CAPABILITY names.
#pragma once

#include <string>

#include "block_kernels.h"

namespace greedynas::cpu {

enum Capability { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* capability_name(Capability capability);

// The best of this machine that Linux lets this process use, whatever the environment says.
Capability machine_capability();

// What is used, read from the environment once. Throws std::invalid_argument for an unknown name, and for a
// capability that the machine does not have.
Capability used_capability();

// One line for people: what is used, and why.
std::string capability_reason();

bool machine_has_avx512_bf16();

template <typename T>
const Kernels<T>& kernels_for(Capability capability);

// The kernels that precision bf16 uses, or "": it computes in float.
const char* bf16_kernels_name();
const Kernels<BFloat16>& bf16_kernels();        // where machine_has_avx512_bf16()
const Kernels<TiledBFloat16>& tiled_kernels();  // where machine_capability() == kAmx

}  // namespace greedynas::cpu

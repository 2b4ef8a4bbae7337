// Which instruction set the kernels use: the best that the machine has, or a lower one that
// GREEDYNAS_CPU_CAPABILITY names.
#pragma once

#include <string>

#include "block_kernels.h"

namespace greedynas::cpu {

enum Capability { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* capability_name(Capability capability);

// The best of this machine, whatever the environment says.
Capability machine_capability();

// What is used, read from the environment once. Throws std::invalid_argument for an unknown name, and for a
// capability that the machine does not have.
Capability used_capability();

// One line for people: what is used, and why.
std::string capability_reason();

bool machine_has_avx512_bf16();

template <typename T>
const Kernels<T>& kernels_for(Capability capability);

// Whether products of BFloat16 are computed as such; else precision bf16 computes in float.
bool bf16_available();
const Kernels<BFloat16>& bf16_kernels();

}  // namespace greedynas::cpu

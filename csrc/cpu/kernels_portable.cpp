#include <algorithm>
#include <cmath>
#include <cstdint>

#include "block_kernels.h"
#include "buffer.h"
#include "instruction_levels.h"
#include "kernel_tables.h"

#define GREEDYNAS_VECTOR_BYTES 16
#define GREEDYNAS_LEVEL GREEDYNAS_PORTABLE
#define GREEDYNAS_LEVEL_NAME "portable"

namespace greedynas::cpu::portable {
#include "kernels/all.h"
}  // namespace greedynas::cpu::portable

namespace greedynas::cpu {
constinit const Kernels<float> kPortableFloat = portable::make_kernels<float>();
constinit const Kernels<double> kPortableDouble = portable::make_kernels<double>();
}  // namespace greedynas::cpu

#include "capability.h"

#include <cstdlib>
#include <stdexcept>

#include "kernel_tables.h"

namespace greedynas::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
constexpr auto kVariable = "GREEDYNAS_CPU_CAPABILITY";

std::string requested() {
  const char* value = std::getenv(kVariable);
  return value == nullptr ? "" : value;
}

}  // namespace

const char* capability_name(Capability capability) { return kNames[capability]; }

Capability machine_capability() {
#if defined(__x86_64__)
  // The library's own check includes whether the operating system saves the registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

bool machine_has_avx512_bf16() {
#if defined(__x86_64__)
  return machine_capability() == kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

namespace {

Capability choose_capability() {
  const std::string name = requested();
  if (name.empty()) return machine_capability();
  for (const Capability capability : {kPortable, kAvx2, kAvx512}) {
    if (name != kNames[capability]) continue;
    if (capability > machine_capability()) {
      throw std::invalid_argument(std::string(kVariable) + ": this machine has at most " +
                                  kNames[machine_capability()] + ", got " + name);
    }
    return capability;
  }
  throw std::invalid_argument(std::string(kVariable) + ": expected one of portable, avx2, avx512, got " +
                              name);
}

}  // namespace

Capability used_capability() {
  static const Capability capability = choose_capability();  // tried again as long as it throws
  return capability;
}

std::string capability_reason() {
  const std::string best = kNames[machine_capability()];
  const std::string bf16 = machine_has_avx512_bf16() ? " with bf16 products" : "";
  if (requested().empty()) return "the best that this machine has (" + best + bf16 + ")";
  return std::string(kVariable) + "=" + requested() + "; this machine has " + best + bf16;
}

template <>
const Kernels<float>& kernels_for<float>(Capability capability) {
#if defined(__x86_64__)
  if (capability == kAvx512) return kAvx512Float;
  if (capability == kAvx2) return kAvx2Float;
#endif
  return kPortableFloat;
}

template <>
const Kernels<double>& kernels_for<double>(Capability capability) {
#if defined(__x86_64__)
  if (capability == kAvx512) return kAvx512Double;
  if (capability == kAvx2) return kAvx2Double;
#endif
  return kPortableDouble;
}

bool bf16_available() { return used_capability() == kAvx512 && machine_has_avx512_bf16(); }

const Kernels<BFloat16>& bf16_kernels() {
#if defined(__x86_64__)
  return kAvx512Bf16;
#else
  throw std::logic_error("no bf16 kernels in this build");
#endif
}

}  // namespace greedynas::cpu

#include "capability.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernel_tables.h"

namespace greedynas::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};
constexpr auto kVariable = "GREEDYNAS_CPU_CAPABILITY";

std::string requested() {
  const char* value = std::getenv(kVariable);
  return value == nullptr ? "" : value;
}

// The errno with which Linux refuses this process the matrix tiles' registers, or 0. They are asked for once,
// for all threads.
int tiles_refusal() {
#if defined(__linux__) && defined(__x86_64__)
  static const int refusal = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
  }();
  return refusal;
#else
  return ENOSYS;
#endif
}

bool processor_has_amx() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("avx512fp16") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

const char* capability_name(Capability capability) { return kNames[capability]; }

Capability machine_capability() {
#if defined(__x86_64__)
  // The library's own check includes whether the operating system saves the registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return processor_has_amx() && tiles_refusal() == 0 ? kAmx : kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

bool machine_has_avx512_bf16() {
#if defined(__x86_64__)
  return machine_capability() >= kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

namespace {

Capability choose_capability() {
  const std::string name = requested();
  if (name.empty()) return machine_capability();
  for (const Capability capability : {kPortable, kAvx2, kAvx512, kAmx}) {
    if (name != kNames[capability]) continue;
    if (capability > machine_capability()) {
      throw std::invalid_argument(std::string(kVariable) + ": this machine has at most " +
                                  kNames[machine_capability()] + ", got " + name);
    }
    return capability;
  }
  throw std::invalid_argument(std::string(kVariable) + ": expected one of portable, avx2, avx512, amx, got " +
                              name);
}

}  // namespace

Capability used_capability() {
  static const Capability capability = choose_capability();  // tried again as long as it throws
  return capability;
}

std::string capability_reason() {
  std::string best = kNames[machine_capability()];
  if (machine_capability() == kAvx512 && machine_has_avx512_bf16()) best += " with bf16 products";
  if (machine_capability() < kAmx && processor_has_amx())
    best += "; it has amx too, but was refused it: " + std::string(std::strerror(tiles_refusal()));
  if (requested().empty()) return "the best that this machine has (" + best + ")";
  return std::string(kVariable) + "=" + requested() + "; this machine has " + best;
}

template <>
const Kernels<float>& kernels_for<float>([[maybe_unused]] Capability capability) {
#if defined(__x86_64__)
  if (capability >= kAvx512) return kAvx512Float;
  if (capability == kAvx2) return kAvx2Float;
#endif
  return kPortableFloat;
}

template <>
const Kernels<double>& kernels_for<double>([[maybe_unused]] Capability capability) {
#if defined(__x86_64__)
  if (capability >= kAvx512) return kAvx512Double;
  if (capability == kAvx2) return kAvx2Double;
#endif
  return kPortableDouble;
}

const char* bf16_kernels_name() {
  if (used_capability() == kAmx) return tiled_kernels().name;
  if (used_capability() == kAvx512 && machine_has_avx512_bf16()) return bf16_kernels().name;
  return "";
}

const Kernels<BFloat16>& bf16_kernels() {
#if defined(__x86_64__)
  return kAvx512Bf16;
#else
  throw std::logic_error("no bf16 kernels in this build");
#endif
}

const Kernels<TiledBFloat16>& tiled_kernels() {
#if defined(__x86_64__)
  return kAmxTiled;
#else
  throw std::logic_error("no AMX kernels in this build");
#endif
}

}  // namespace greedynas::cpu

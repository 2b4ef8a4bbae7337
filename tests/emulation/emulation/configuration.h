// What an emulated device is like, and in which order its threads run.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <string>

namespace emu {

// In which order the threads of a block run between two points where they wait, and the blocks of a grid. A
// kernel that is right gives the same in all of them.
enum class Order : int { kForward, kReverse, kRandom, kUnknown };

// Tests find it in the built module by its name, as members of these types in this order.
struct Config {
  Order order = Order::kForward;
  unsigned seed = 1;          // of kRandom
  bool stop_at_error = true;  // or go on and report all errors that a launch made
  std::size_t max_static_shared = 48 * 1024;
  std::size_t max_shared = 99 * 1024;  // of sm_86 and sm_89, the least of all devices since sm_80
  int arch = 800;                      // as __CUDA_ARCH__
  int multiprocessors = 4;
  int last_blocks = 0;  // if not 0, only that many of a grid are run, the last ones
};

// EMULATION_ORDER is forward, reverse or random; EMULATION_SEED is a number. What is wrong there is reported
// by the first launch: this runs while the module is loaded.
inline Config config_from_environment() {
  Config config;
  if (const char* order = std::getenv("EMULATION_ORDER")) {
    const std::string name = order;
    config.order = name == "forward"   ? Order::kForward
                   : name == "reverse" ? Order::kReverse
                   : name == "random"  ? Order::kRandom
                                       : Order::kUnknown;
  }
  if (const char* seed = std::getenv("EMULATION_SEED")) {
    char* end = nullptr;
    config.seed = static_cast<unsigned>(std::strtoul(seed, &end, 10));
    if (end == seed || *end) config.order = Order::kUnknown;
  }
  return config;
}

inline Config cfg = config_from_environment();

}  // namespace emu

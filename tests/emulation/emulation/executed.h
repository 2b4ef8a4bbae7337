// Which kernels have been launched, so that tests can say which have not.
#pragma once

#include <cstddef>
#include <iterator>
#include <set>
#include <utility>

#include "configuration.h"

namespace emu {

// With the architecture that the device had.
inline std::set<std::pair<const void*, int>> executed;

inline void note_executed(const void* kernel) { executed.emplace(kernel, cfg.arch); }

}  // namespace emu

// Python calls them by name (tests/emulation/launches.py): how many there are, one of them, and none any
// more.
extern "C" {
__attribute__((used, weak)) std::size_t emulation_executed_count() { return emu::executed.size(); }
__attribute__((used, weak)) const void* emulation_executed_kernel(std::size_t i, int* arch) {
  auto each = emu::executed.begin();
  std::advance(each, static_cast<std::ptrdiff_t>(i));
  *arch = each->second;
  return each->first;
}
__attribute__((used, weak)) void emulation_forget_executed() { emu::executed.clear(); }
}

// A ParallelFor on threads of its own, for programs without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace greedynas::cpu {

inline ParallelFor threads(int count) {
  return [count](int64_t units, int64_t, const RangeBody& body) {
    std::vector<std::thread> team;
    const int64_t share = ceil_div(units, count);
    for (int64_t begin = 0; begin < units; begin += share) {
      team.emplace_back([&body, begin, end = std::min(begin + share, units)] { body(begin, end); });
    }
    for (std::thread& member : team) member.join();
  };
}

}  // namespace greedynas::cpu

// How kernels run loops in parallel without knowing torch: the caller brings the loop.
#pragma once

#include <cstdint>
#include <functional>

namespace greedynas::cpu {

// body(begin, end) works on a range of units. Results never depend on how the units are split into ranges:
// whatever is summed over units is first stored per unit and then added in the order of the units.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;

// Calls body on disjoint ranges that cover [0, units), and returns when all are done. unit_work is about how
// many multiplications a unit takes, so that little work need not be spread.
using ParallelFor = std::function<void(int64_t units, int64_t unit_work, const RangeBody& body)>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace greedynas::cpu

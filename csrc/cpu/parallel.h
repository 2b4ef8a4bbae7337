// How kernels run loops in parallel without knowing torch: the caller brings the loop.
#pragma once

#include <cstdint>

namespace greedynas::cpu {

template <typename Signature>
class FunctionRef;

// What is called when this is, held by reference: it has to live as long. Unlike std::function this never
// allocates.
template <typename Result, typename... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  template <typename Callable>
  FunctionRef(const Callable& callable)
      : callable_(&callable), call_([](const void* called, Arguments... arguments) -> Result {
          return (*static_cast<const Callable*>(called))(arguments...);
        }) {}

  Result operator()(Arguments... arguments) const { return call_(callable_, arguments...); }

 private:
  const void* callable_;
  Result (*call_)(const void*, Arguments...);
};

// body(begin, end) works on a range of units. Results never depend on how the units are split into ranges:
// whatever is summed over units is first stored per unit and then added in the order of the units.
using RangeBody = FunctionRef<void(int64_t begin, int64_t end)>;

// Calls body on disjoint ranges that cover [0, units), and returns when all are done. unit_work is about how
// many multiplications a unit takes, so that little work need not be spread.
using ParallelFor = FunctionRef<void(int64_t units, int64_t unit_work, const RangeBody& body)>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace greedynas::cpu

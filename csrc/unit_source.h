// A unit as it is given to the engine: branches that each read some channels of a map, run operations one
// after the other, and write some channels of the output, as in ShuffleNetV2. Splits, shuffles and
// concatenations are in which channels these are.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "operation_source.h"

namespace greedynas {

// `count` of a map's channels: first, first + step, ...
struct Channels {
  int64_t first = 0, step = 1, count = 0;

  int64_t last() const { return first + (count - 1) * step; }
};

struct BranchSource {
  Channels reads, writes;
  std::vector<OperationSource> operations;  // no identities; none at all: the channels as they are
  int64_t activation = kLinear;             // of what is read, before the first operation

  int64_t stride() const {
    int64_t stride = 1;
    for (const OperationSource& o : operations) stride *= o.stride;
    return stride;
  }
};

struct UnitSource {
  int64_t in_channels = 0, out_channels = 0;
  std::vector<BranchSource> branches;

  int64_t stride() const { return branches[0].stride(); }
};

// Throws std::invalid_argument where branches do not fit together.
inline void check_unit(const UnitSource& unit) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("unit: expected " + what);
  };
  require(!unit.branches.empty(), "a branch");
  std::vector<char> written(unit.out_channels, 0);
  for (const BranchSource& b : unit.branches) {
    const auto inside = [](const Channels& c, int64_t channels) {
      return c.count > 0 && c.step > 0 && c.first >= 0 && c.last() < channels;
    };
    require(inside(b.reads, unit.in_channels) && inside(b.writes, unit.out_channels),
            "channels of the input and of the output");
    int64_t channels = b.reads.count;
    for (const OperationSource& o : b.operations) {
      require(o.kind != kIdentity && o.in_channels == channels, "operations that fit together");
      require(o.kind != kPool || (o.out_channels == channels && o.kernel % 2 == 1),
              "pooling of odd windows that keeps the channels");
      channels = o.out_channels;
    }
    require(channels == b.writes.count && b.stride() == unit.stride(), "branches of one shape");
    require(b.activation == kLinear || !b.operations.empty(), "an operation after the activation");
    for (int64_t c = 0; c < b.writes.count; ++c) {
      char& once = written[b.writes.first + c * b.writes.step];
      require(once == 0, "each output channel from one branch");
      once = 1;
    }
  }
  for (const char once : written) require(once == 1, "each output channel from a branch");
}

}  // namespace greedynas

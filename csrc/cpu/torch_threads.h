// torch's threads for kernels that do not know torch.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace greedynas::cpu {

// A ParallelFor on ATen's pool. The first exception of a thread is thrown again where the loop was called.
struct TorchParallelFor {
  void operator()(int64_t units, int64_t unit_work, const RangeBody& body) const;
};
inline constexpr TorchParallelFor kTorchParallelFor{};

// torch.get_num_threads()
int64_t torch_threads();

}  // namespace greedynas::cpu

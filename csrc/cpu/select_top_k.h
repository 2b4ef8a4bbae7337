// The k paths of lowest loss.
#pragma once

#include <cstdint>

namespace greedynas::cpu {

// Writes the indices of the k lowest of losses [count] to selected [k], lowest first; NaN comes after
// everything, and equal losses (0.0 and -0.0 too) stand in the order of their indices. 0 <= k <= count.
template <typename Value>
void select_top_k(const Value* losses, int64_t count, int64_t k, int64_t* selected);

}  // namespace greedynas::cpu

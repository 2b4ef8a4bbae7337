#include "select_top_k.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace greedynas::cpu {

template <typename Value>
void select_top_k(const Value* losses, int64_t count, int64_t k, int64_t* selected) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto comes_before = [losses](int64_t a, int64_t b) {
    const bool a_is_nan = std::isnan(losses[a]);
    const bool b_is_nan = std::isnan(losses[b]);
    if (a_is_nan != b_is_nan) return b_is_nan;
    if (losses[a] < losses[b]) return true;
    if (losses[b] < losses[a]) return false;
    return a < b;
  };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), comes_before);
  std::copy_n(order.begin(), k, selected);
}

template void select_top_k<float>(const float*, int64_t, int64_t, int64_t*);
template void select_top_k<double>(const double*, int64_t, int64_t, int64_t*);

}  // namespace greedynas::cpu

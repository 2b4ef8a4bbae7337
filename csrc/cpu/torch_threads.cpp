#include "torch_threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>

namespace greedynas::cpu {

void TorchParallelFor::operator()(int64_t units, int64_t unit_work, const RangeBody& body) const {
  constexpr int64_t kWorthAThread = 1 << 17;  // multiplications: about as long as it takes to wake a thread
  struct Context {
    const RangeBody& body;
    std::mutex mutex;
    std::exception_ptr error;
  } context{body, {}, nullptr};
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, unit_work));
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    auto& c = *static_cast<Context*>(opaque);
    try {
      c.body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(c.mutex);
      if (!c.error) c.error = std::current_exception();
    }
  };
  if (torch_parallel_for(0, units, grain, run, &context) != 0)
    throw std::runtime_error("torch_parallel_for failed");
  if (context.error) std::rethrow_exception(context.error);
}

int64_t torch_threads() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) throw std::runtime_error("torch_get_num_threads failed");
  return threads;
}

}  // namespace greedynas::cpu

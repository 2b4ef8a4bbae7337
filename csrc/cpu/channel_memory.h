// Memory for what an operation keeps of its channels while it runs: statistics, affine maps, pilots.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace greedynas::cpu {

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Hands out pieces of memory of somebody else, which is on a cache line's boundary. Nothing is taken back:
// another one of these on the same memory begins anew.
class ChannelMemory {
 public:
  ChannelMemory(char* memory, int64_t bytes) : memory_(memory), left_(bytes) {}

  // Zeros.
  template <typename V>
  std::span<V> take(int64_t count) {
    const int64_t bytes = whole_lines(count * int64_t{sizeof(V)});
    if (bytes > left_) throw std::logic_error("channel memory is too small");
    auto* values = reinterpret_cast<V*>(memory_);
    std::fill_n(values, count, V{});
    memory_ += bytes;
    left_ -= bytes;
    return {values, static_cast<std::size_t>(count)};
  }

 private:
  char* memory_;
  int64_t left_;
};

}  // namespace greedynas::cpu

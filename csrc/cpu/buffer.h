// Uninitialised working memory of a kernel call, on a cache line's boundary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace greedynas::cpu {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> make_buffer(int64_t size) {
  constexpr std::size_t kLine = 64;
  const std::size_t bytes = (static_cast<std::size_t>(size) * sizeof(T) + kLine - 1) / kLine * kLine;
  auto* memory = static_cast<T*>(std::aligned_alloc(kLine, std::max(bytes, kLine)));
  if (memory == nullptr) throw std::bad_alloc();
#ifdef GREEDYNAS_POISON  // sanitizer builds: what is read before it was written shows up as NaN in the result
  std::fill_n(memory, size, std::numeric_limits<T>::quiet_NaN());
#endif
  return Buffer<T>(memory);
}

}  // namespace greedynas::cpu

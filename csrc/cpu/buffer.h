// Uninitialised working memory, on a cache line's boundary; in huge pages where it is large.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace greedynas::cpu {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> make_buffer(int64_t size) {
  const std::size_t wanted = static_cast<std::size_t>(size) * sizeof(T);
  constexpr std::size_t kHugePage = 2 << 20;
  const std::size_t alignment = wanted >= 2 * kHugePage ? kHugePage : 64;
  const std::size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  auto* memory = static_cast<T*>(std::aligned_alloc(alignment, std::max(bytes, alignment)));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)  // fewer page faults and misses of the address cache; where it is not to be had, no
                        // harm
  if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
#ifdef GREEDYNAS_POISON  // sanitizer builds: what is read before it was written shows up as NaN in the result
  std::memset(static_cast<void*>(memory), 0xff, bytes);  // a NaN in every floating type
#endif
  return Buffer<T>(memory);
}

}  // namespace greedynas::cpu

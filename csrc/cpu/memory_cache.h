// Large buffers that outlive the evaluation that used them, so that the next one does not wait for pages.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "buffer.h"

namespace greedynas::cpu {

struct Memory {
  Buffer<char> data;
  int64_t bytes = 0;
};

class MemoryCache {
 public:
  static constexpr int64_t kMostBytes = int64_t{1} << 30;  // kept in all

  static MemoryCache& instance() {
    static auto* cache = new MemoryCache;  // never destroyed: threads may end after it otherwise
    return *cache;
  }

  // At least that many bytes, and not many times more.
  Memory take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto m = free_.begin(); m != free_.end(); ++m) {
        if (m->bytes >= bytes && m->bytes / 4 <= bytes && (best == free_.end() || m->bytes < best->bytes))
          best = m;
      }
      if (best != free_.end()) {
        Memory memory = std::move(*best);
        free_.erase(best);
        kept_ -= memory.bytes;
        return memory;
      }
    }
    return {make_buffer<char>(bytes), bytes};
  }

  void give_back(Memory memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (memory.bytes > kMostBytes) return;
    while (kept_ + memory.bytes > kMostBytes) {  // the oldest go
      kept_ -= free_.front().bytes;
      free_.erase(free_.begin());
    }
    kept_ += memory.bytes;
    free_.push_back(std::move(memory));
  }

  // Frees what is kept; returns how many bytes that were.
  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.clear();
    return std::exchange(kept_, 0);
  }

 private:
  std::mutex mutex_;
  std::vector<Memory> free_;
  int64_t kept_ = 0;
};

// A piece of the cache's memory for the lifetime of its owner.
class CachedMemory {
 public:
  CachedMemory() = default;
  CachedMemory(const CachedMemory&) = delete;
  CachedMemory& operator=(const CachedMemory&) = delete;
  ~CachedMemory() { drop(); }

  // What was in it is lost where it has to grow.
  char* at_least(int64_t bytes) {
    if (bytes > memory_.bytes) {
      drop();
      memory_ = MemoryCache::instance().take(bytes);
    }
    return memory_.data.get();
  }

  char* get() const { return memory_.data.get(); }

 private:
  void drop() {
    if (memory_.bytes > 0) MemoryCache::instance().give_back(std::move(memory_));
    memory_ = {};
  }

  Memory memory_;
};

}  // namespace greedynas::cpu

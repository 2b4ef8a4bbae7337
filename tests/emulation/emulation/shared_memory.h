// A block's shared memory: filled with NaN, so that what is read before it is written shows in the results,
// and with bytes that are nobody's behind every variable, so that the address sanitizer sees where it ends.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>

#include "thread.h"

namespace emu {

class SharedMemory {
 public:
  // For the next block. The memory is another one each time as far as sanitizers know.
  void begin(std::size_t dynamic_bytes) {
    capacity_ = (cfg.max_shared + kRedZonesBytes + kAlignment - 1) / kAlignment * kAlignment;
    memory_ = static_cast<char*>(std::aligned_alloc(kAlignment, capacity_));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_, kUnwritten, capacity_);
    poison(memory_, capacity_);
    used_ = static_bytes_ = 0;
    variables_.clear();
    dynamic_bytes_ = dynamic_bytes;
    dynamic_ = dynamic_bytes ? take(dynamic_bytes) : nullptr;
  }
  void end() {
    unpoison(memory_, capacity_);
    std::free(memory_);
    memory_ = nullptr;
  }

  unsigned char* dynamic() const { return dynamic_; }

  // The variable that `key` stands for: all threads of a block get the same one.
  void* variable(const void* key, std::size_t bytes) {
    Unwatched unwatched;
    const auto found = variables_.find(key);
    if (found != variables_.end()) return found->second;
    static_bytes_ += bytes;
    if (static_bytes_ > cfg.max_static_shared) {
      fail("variables in shared memory take " + std::to_string(static_bytes_) + " bytes, of " +
           std::to_string(cfg.max_static_shared));
    }
    if (static_bytes_ + dynamic_bytes_ > cfg.max_shared) {
      fail("the block takes " + std::to_string(static_bytes_ + dynamic_bytes_) +
           " bytes of shared memory, of " + std::to_string(cfg.max_shared));
    }
    return variables_[key] = take(bytes);
  }

  const void* memory() const { return memory_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t static_bytes() const { return static_bytes_; }
  bool contains(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= memory_ && p < memory_ + capacity_;
  }

 private:
  static constexpr std::size_t kAlignment = 128;
  static constexpr std::size_t kRedZone = 128;              // behind a variable
  static constexpr std::size_t kRedZonesBytes = 64 * 1024;  // of all, and alignment
  static constexpr int kUnwritten = 0xff;                   // NaN of every floating-point type

  unsigned char* take(std::size_t bytes) {
    const std::size_t offset = (used_ + kAlignment - 1) / kAlignment * kAlignment;
    if (offset + bytes + kRedZone > capacity_) fail_for_good("shared memory is used up");
    used_ = offset + bytes + kRedZone;
    unpoison(memory_ + offset, bytes);
    return reinterpret_cast<unsigned char*>(memory_ + offset);
  }

  char* memory_ = nullptr;
  std::size_t capacity_ = 0, used_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0;
  unsigned char* dynamic_ = nullptr;
  std::map<const void*, void*> variables_;
};

inline SharedMemory shared_memory;

}  // namespace emu

#define GREEDYNAS_SHARED(Type, name, ...)                           \
  static const char emulation_key_##name = 0;                       \
  using EmulationType_##name = Type __VA_ARGS__;                    \
  EmulationType_##name& name = *static_cast<EmulationType_##name*>( \
      emu::shared_memory.variable(&emulation_key_##name, sizeof(EmulationType_##name)))
#define GREEDYNAS_DYNAMIC_SHARED(name) unsigned char* name = emu::shared_memory.dynamic()

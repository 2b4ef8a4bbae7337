// CUDA threads, the block that is being executed, and what happens when a thread does something wrong.
//
// One block is executed at a time, each of its threads a fiber. The first error abandons the block: its
// threads are unwound where they wait, and the launch throws what went wrong.
#pragma once

#include <cstddef>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "configuration.h"
#include "fibers.h"
#include "language.h"

namespace emu {

using Place = std::source_location;  // of an operation in a kernel

inline bool same_line(const Place& a, const Place& b) {
  return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}
inline std::string to_string(const Place& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

// A copy from global to shared memory that its thread has not waited for.
struct PendingCopy {
  void* shared;
  const void* global;
  int group;
};

struct Thread : Fiber {
  uint3 index{};
  unsigned linear = 0;              // x fastest; its warp is linear / 32
  Place place;                      // where it last waited
  bool fenced = false;              // whether what it wrote may be seen by those who see its atomics
  std::vector<PendingCopy> copies;  // the oldest first
  int copy_group = 0;               // that the next copy belongs to

  unsigned lane() const { return linear % warpSize; }
};

inline std::vector<Thread> threads;  // more than the block has where an earlier one had more
inline unsigned thread_count, threads_alive;
inline uint3 block_index{};
inline dim3 block_size, grid_size;
inline const char* kernel_name = "";

// Of the thread that runs; not for the scheduler.
inline Thread& current() { return static_cast<Thread&>(*running); }

// What a thread throws to end itself, so that its stack is unwound.
struct Abandoned {};
inline bool abandoning = false;  // every thread is to end, wherever it continues
inline std::vector<std::string> errors;

inline void record(const std::string& what) {
  const auto text = [](const uint3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  errors.push_back(std::string(kernel_name) + " block " + text(block_index) +
                   (running ? " thread " + text(current().index) : "") + ": " + what);
}

// An error after which the thread can go on, if that is asked for (Config::stop_at_error).
inline void fail(const std::string& what) {
  Unwatched unwatched;
  record(what);
  if (cfg.stop_at_error) throw Abandoned{};
}
[[noreturn]] inline void fail_for_good(const std::string& what) {
  Unwatched unwatched;
  record(what);
  abandoning = true;
  throw Abandoned{};
}

// Until another thread, or the barrier, makes this one ready.
inline void wait(Fiber::State state, const Place& place) {
  current().place = place;
  suspend(state);
  if (abandoning) throw Abandoned{};
}

// Throws what the launch found.
inline void throw_errors() {
  constexpr std::size_t kMost = 10;
  if (errors.empty()) return;
  std::string text = "emulation: ";
  for (std::size_t i = 0; i < errors.size() && i < kMost; ++i) text += (i ? "\n" : "") + errors[i];
  if (errors.size() > kMost) text += "\nand " + std::to_string(errors.size() - kMost) + " more";
  errors.clear();
  throw std::runtime_error(text);
}

}  // namespace emu

#define threadIdx (emu::current().index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)

// Launches: every block of the grid, one after another, is executed to its end.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "barrier.h"
#include "executed.h"
#include "shared_memory.h"
#include "thread.h"
#include "warp.h"

namespace emu {

inline std::function<void()> kernel_call;  // what each thread does
inline char launch_token;                  // releases what threads did to the host that launched them
inline std::vector<void*> ended_handles;   // of the thread sanitizer

// A thread's whole life.
EMULATION_UNINSTRUMENTED inline void run_thread() {
  begin();
  try {
    kernel_call();
    if (!current().copies.empty()) fail("the thread ended with asynchronous copies it had not waited for");
  } catch (const Abandoned&) {
    abandoning = true;
  } catch (...) {
    record("the kernel threw an exception");
    abandoning = true;
  }
  {
    Unwatched unwatched;
    --threads_alive;
    barrier.open_if_complete();
  }
  release(&launch_token);  // not to other blocks
  finish();
}

// Unwinds what has been started and is not done.
inline void abandon_threads() {
  abandoning = true;
  for (unsigned i = 0; i < thread_count; ++i) {
    if (threads[i].state != Fiber::State::kDone && threads[i].started) resume(threads[i]);
    threads[i].state = Fiber::State::kDone;
  }
}

inline void report_deadlock() {
  for (unsigned i = 0; i < thread_count; ++i) {
    if (threads[i].state == Fiber::State::kDone) continue;
    running = &threads[i];
    record("deadlock: " + std::to_string(threads_alive) + " threads wait, this one at " +
           to_string(threads[i].place));
    running = nullptr;
    return;
  }
}

// Continues threads, in the order asked for, until all have ended.
inline void schedule(std::mt19937& random) {
  std::vector<unsigned> order(thread_count);
  std::iota(order.begin(), order.end(), 0u);
  if (cfg.order == Order::kReverse) std::reverse(order.begin(), order.end());
  while (threads_alive) {
    if (cfg.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (unsigned i : order) {
      if (threads[i].state != Fiber::State::kReady) continue;
      trace::enter(i, threads[i].stack.bottom(), Stack::kBytes);
      resume(threads[i]);
      trace::leave();
      if (abandoning) return abandon_threads();
      progress = true;
    }
    if (!progress) {
      report_deadlock();
      return abandon_threads();
    }
  }
}

inline void destroy_ended_handles() {
  for (void* handle : ended_handles) SanitizedContext::destroy_handle(handle);
  ended_handles.clear();
}

inline void run_block(const uint3& index, std::size_t dynamic_bytes) {
  block_index = index;
  thread_count = threads_alive = block_size.x * block_size.y * block_size.z;
  if (threads.size() < thread_count) threads.resize(thread_count);
  shared_memory.begin(dynamic_bytes);
  barrier.begin();
  begin_warps();
  trace::begin_block(thread_count, shared_memory.memory(), shared_memory.capacity(), threads.data(),
                     threads.size() * sizeof(Thread));
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    thread.linear = i;
    thread.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    thread.fenced = false;
    thread.copies.clear();
    thread.copy_group = 0;
    prepare(thread, run_thread);
  }
  static std::mt19937 random;
  random.seed(cfg.seed + index.x * 7919 + index.y * 104729);
  schedule(random);
  trace::end_block(shared_memory.static_bytes());
  if (kThreadSanitizer) {
    // Kept for a while, so that its reports can show where the other thread was.
    constexpr std::size_t kMost = 4096;
    for (unsigned i = 0; i < thread_count; ++i) {
      ended_handles.push_back(threads[i].context.sanitized.handle);
    }
    if (ended_handles.size() > kMost) destroy_ended_handles();
  }
  shared_memory.end();
}

// What a device refuses; empty if it does not.
inline std::string refusal(std::size_t dynamic_bytes) {
  const dim3 &grid = grid_size, &block = block_size;
  if (cfg.order == Order::kUnknown) {
    return "EMULATION_ORDER has to be forward, reverse or random, and EMULATION_SEED a number";
  }
  if (!block.x || !block.y || !block.z || block.z > 64 ||
      static_cast<std::size_t>(block.x) * block.y * block.z > 1024) {
    return "a block of no thread, or of too many";
  }
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
    return "a grid of no block, or of too many";
  }
  if (dynamic_bytes > cfg.max_shared) {
    return "the launch asks for " + std::to_string(dynamic_bytes) + " bytes of shared memory, of " +
           std::to_string(cfg.max_shared);
  }
  return {};
}

template <typename Kernel, typename... Arguments>
void launch(const char* name, Kernel kernel, dim3 grid, dim3 block, std::size_t dynamic_bytes,
            Arguments... arguments) {
  {
    Unwatched unwatched;
    kernel_name = name;
    grid_size = grid;
    block_size = block;
    const std::string refused = refusal(dynamic_bytes);
    if (!refused.empty()) throw std::runtime_error("emulation: " + std::string(name) + ": " + refused);
    note_executed(reinterpret_cast<const void*>(kernel));
    errors.clear();
    abandoning = false;
    scheduler.sanitized.take_handle_of_current();
    const auto call = [=] { kernel(arguments...); };
    kernel_call = std::cref(call);
    trace::begin_launch(name, grid, block, dynamic_bytes, &call, sizeof call);
    std::vector<std::size_t> order(static_cast<std::size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (cfg.last_blocks && order.size() > static_cast<std::size_t>(cfg.last_blocks)) {
      order.erase(order.begin(), order.end() - cfg.last_blocks);
    }
    if (cfg.order == Order::kReverse) std::reverse(order.begin(), order.end());
    if (cfg.order == Order::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937(cfg.seed));
    for (std::size_t i : order) {
      run_block({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                 static_cast<unsigned>(i / grid.x / grid.y)},
                dynamic_bytes);
      if (abandoning) break;
    }
    trace::end_launch();
    acquire(&launch_token);
    destroy_ended_handles();
  }
  throw_errors();
}

}  // namespace emu

#define GREEDYNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), emu::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__))

namespace greedynas::cuda {

// Of the emulated device.
inline int multiprocessors() { return emu::cfg.multiprocessors; }
inline bool since_sm80() { return emu::cfg.arch >= 800; }
inline int shared_bytes_per_block() { return static_cast<int>(emu::cfg.max_shared); }

}  // namespace greedynas::cuda

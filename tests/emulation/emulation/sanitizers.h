// What gcc's sanitizers are told about emulated threads. Without a sanitizer all of it is empty.
//
// The address sanitizer hears of every change of stacks, and which bytes of shared memory are nobody's. The
// thread sanitizer takes every fiber for a thread; what orders them is what orders CUDA threads (barriers,
// fences before atomics, the end of a launch), never the switch from one to the next, so it sees races that
// the order of this run hides. A tracing build has the calls of -fsanitize=thread, too, and no sanitizer
// behind them.
#pragma once

#include <cstddef>

#include "trace.h"

#if defined(__SANITIZE_THREAD__) && !defined(EMULATION_TRACE)
#define EMULATION_THREAD_SANITIZER
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(EMULATION_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// The emulator's own code, where it changes stacks or looks at memory that is nobody's.
#define EMULATION_UNINSTRUMENTED __attribute__((no_sanitize("address", "thread", "undefined")))

namespace emu {

#if defined(EMULATION_THREAD_SANITIZER)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

// While one lives, nobody looks at this fiber's accesses: the emulator's bookkeeping is shared by all
// threads, and in truth there is only one.
class Unwatched {
 public:
#if defined(EMULATION_THREAD_SANITIZER)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() { trace::pause(); }
  ~Unwatched() { trace::unpause(); }
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// What was done before release() happened before what is done after acquire() of the same address.
inline void release([[maybe_unused]] void* token) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_release(token);
#endif
}
inline void acquire([[maybe_unused]] void* token) {
#if defined(EMULATION_THREAD_SANITIZER)
  __tsan_acquire(token);
#endif
}

inline void poison([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(memory, bytes);
#endif
}
inline void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
}

// How the sanitizers know one flow of control: of the address sanitizer, its stack; of the thread sanitizer,
// its handle.
struct SanitizedContext {
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* handle = nullptr;

  // Around a change of stacks: the last words on the old one, the first ones on the new one. `for_good`: the
  // old one is never continued.
  EMULATION_UNINSTRUMENTED void leave_for([[maybe_unused]] const SanitizedContext& next,
                                          [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, next.stack, next.stack_bytes);
#elif defined(EMULATION_THREAD_SANITIZER)
    __tsan_switch_to_fiber(next.handle, __tsan_switch_to_fiber_no_sync);
#endif
  }
  EMULATION_UNINSTRUMENTED void arrive_from([[maybe_unused]] SanitizedContext& left) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &left.stack, &left.stack_bytes);
#endif
  }

  // Only the thread sanitizer has handles.
  void create_handle() {
#if defined(EMULATION_THREAD_SANITIZER)
    handle = __tsan_create_fiber(0);
#endif
  }
  void take_handle_of_current() {
#if defined(EMULATION_THREAD_SANITIZER)
    handle = __tsan_get_current_fiber();
#endif
  }
  static void destroy_handle([[maybe_unused]] void* handle) {
#if defined(EMULATION_THREAD_SANITIZER)
    __tsan_destroy_fiber(handle);
#endif
  }
};

}  // namespace emu

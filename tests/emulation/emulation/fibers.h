// Fibers: flows of control with stacks of their own, that take turns on one thread of the machine.
//
// The scheduler runs on the stack that called it, and continues one fiber after another; a fiber runs until
// it suspends itself or ends. So nothing is ever interrupted, and a run can be repeated exactly.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "sanitizers.h"

#if !defined(__x86_64__)
#error "the emulation of CUDA changes stacks by hand, and knows x86-64 only"
#endif

// Stores the stack pointer to *left, and goes on where the stack `next` was left. A function call preserves
// no other registers than these; all fibers share the modes of floating-point arithmetic.
extern "C" void emulation_change_stacks(void** left, void* next);
asm(R"(
.pushsection .text
.weak emulation_change_stacks
.type emulation_change_stacks,@function
emulation_change_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_change_stacks,.-emulation_change_stacks
.popsection
)");

namespace emu {

// Memory for a fiber's frames. The lowest page is a guard: overflow is a fault and corrupts nothing.
class Stack {
 public:
  static constexpr std::size_t kBytes = 256 * 1024;
  static constexpr std::size_t kGuardBytes = 4096;

  Stack() = default;
  Stack(Stack&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  Stack& operator=(Stack&& other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Stack() { unmap(); }

  // Before a new fiber. What ran here before must not look like a race with it, nor be poisoned.
  void renew() {
    if (kThreadSanitizer) unmap();
    if (!memory_) {
      void* memory =
          mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
      mprotect(memory_, kGuardBytes, PROT_NONE);
    }
    unpoison(memory_ + kGuardBytes, kBytes - kGuardBytes);
  }
  char* bottom() const { return memory_; }
  char* top() const { return memory_ + kBytes; }

 private:
  void unmap() {
    if (memory_) munmap(memory_, kBytes);
    memory_ = nullptr;
  }

  char* memory_ = nullptr;
};

struct Context {
  void* stack_pointer = nullptr;
  SanitizedContext sanitized;
};

struct Fiber {
  enum class State : std::uint8_t { kReady, kAtBarrier, kInWarp, kDone };

  Context context;
  Stack stack;
  State state = State::kDone;
  bool started = false;
};

inline Context scheduler;
inline Fiber* running = nullptr;

EMULATION_UNINSTRUMENTED __attribute__((noinline)) inline void change_contexts(Context& from, Context& to,
                                                                               bool for_good = false) {
  from.sanitized.leave_for(to.sanitized, for_good);
  emulation_change_stacks(&from.stack_pointer, to.stack_pointer);
  // Again here. Fibers arrive from the scheduler alone, whose stack the address sanitizer tells us then.
  SanitizedContext other;
  from.sanitized.arrive_from(&from == &scheduler ? other : scheduler.sanitized);
}

// Makes a fiber that begins with `entry`, which must end with finish().
EMULATION_UNINSTRUMENTED inline void prepare(Fiber& fiber, void (*entry)()) {
  fiber.stack.renew();
  // As emulation_change_stacks leaves a stack: six registers and an address to return to; and no frame above,
  // at an offset that makes the alignment that of a called function.
  void** slot = reinterpret_cast<void**>(fiber.stack.top() - 64);
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber.context.stack_pointer = slot;
  fiber.context.sanitized = {fiber.stack.bottom(), Stack::kBytes};
  fiber.context.sanitized.create_handle();
  fiber.state = Fiber::State::kReady;
  fiber.started = false;
}

// The scheduler's side: runs a fiber until it suspends itself or ends.
EMULATION_UNINSTRUMENTED inline void resume(Fiber& fiber) {
  running = &fiber;
  fiber.started = true;
  change_contexts(scheduler, fiber.context);
  running = nullptr;
}

// A fiber's side: the first thing it does, waiting, and the last thing.
EMULATION_UNINSTRUMENTED inline void begin() { running->context.sanitized.arrive_from(scheduler.sanitized); }
EMULATION_UNINSTRUMENTED inline void suspend(Fiber::State state) {
  running->state = state;
  change_contexts(running->context, scheduler);
}
[[noreturn]] EMULATION_UNINSTRUMENTED inline void finish() {
  running->state = Fiber::State::kDone;
  change_contexts(running->context, scheduler, true);
  std::abort();
}

}  // namespace emu

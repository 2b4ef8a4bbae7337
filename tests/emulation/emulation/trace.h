// What a tracing build is told of emulated threads, to count what they do with memory (trace/trace.cpp). In
// other builds all of it is empty.
#pragma once

#include <cstddef>

#include "language.h"

namespace emu {

// What lanes of a warp do together.
enum class WarpOperation { kBarrier, kExchange, kProduct, kMatrices };

}  // namespace emu

#if defined(EMULATION_TRACE)
#define EMULATION_HOOK(...) void __VA_ARGS__;
#else
#define EMULATION_HOOK(...) \
  inline void __VA_ARGS__ {}
#endif

namespace emu::trace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

// A kernel's arguments are constant memory, which is not counted.
EMULATION_HOOK(begin_launch(const char* kernel, const dim3& grid, const dim3& block,
                            std::size_t dynamic_bytes, const void* arguments, std::size_t argument_bytes))
EMULATION_HOOK(end_launch())
// `states`: what the emulator knows of its threads, their indices among it.
EMULATION_HOOK(begin_block(unsigned threads, const void* shared, std::size_t shared_bytes, const void* states,
                           std::size_t state_bytes))
EMULATION_HOOK(end_block(std::size_t static_bytes))

// A thread goes on; it waits or ends. Its stack is not counted.
EMULATION_HOOK(enter(unsigned thread, const void* stack, std::size_t stack_bytes))
EMULATION_HOOK(leave())

// In between, the running thread's accesses are the emulator's own. They nest.
EMULATION_HOOK(pause())
EMULATION_HOOK(unpause())

// All threads of the block have come; all lanes of `mask` have.
EMULATION_HOOK(barrier())
EMULATION_HOOK(warp_operation(WarpOperation operation, unsigned warp, unsigned mask))

// What the running thread does that is no plain access: a copy of 16 bytes, its row of ldmatrix, an atomic
// operation.
EMULATION_HOOK(async_copy(const void* shared, const void* global))
EMULATION_HOOK(matrix_row(const void* row))
EMULATION_HOOK(atomic(const void* address, std::size_t bytes))

#pragma GCC diagnostic pop
#undef EMULATION_HOOK

struct Paused {
  Paused() { pause(); }
  ~Paused() { unpause(); }
  Paused(const Paused&) = delete;
  Paused& operator=(const Paused&) = delete;
};

}  // namespace emu::trace

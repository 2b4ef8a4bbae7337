// The memory traffic of emulated kernels, counted. In a tracing build (emulation_build.py) the compiler calls
// a function before every access, those of the thread sanitizer, whose names are defined here; the emulator
// says what else happens (emulation/trace.h).
//
// What is counted are the accesses of g++, not those of nvcc: it leaves out what it has in registers, too,
// but not always the same. Vectors are accessed as a whole. There are no caches, and no time.
//
// In the built module or program, for whoever counts (emulation_trace.py):
//   emulation_trace_start()   forgets names and counts, and counts from now on
//   emulation_trace_name()    gives a range of global memory a name; it begins at a multiple of 32 bytes
//   emulation_trace_stop()    what was counted, as JSON: a list of launches
#include "tracer.h"

namespace emu::trace {
namespace {

Tracer tracer;

}  // namespace

void begin_launch(const char* kernel, const dim3& grid, const dim3& block, std::size_t dynamic_bytes,
                  const void* arguments, std::size_t argument_bytes) {
  tracer.begin_launch(kernel, grid, block, dynamic_bytes, {arguments, argument_bytes});
}
void end_launch() { tracer.end_launch(); }
void begin_block(unsigned threads, const void* shared, std::size_t shared_bytes, const void* states,
                 std::size_t state_bytes) {
  tracer.begin_block(threads, {shared, shared_bytes}, {states, state_bytes});
}
void end_block(std::size_t static_bytes) { tracer.end_block(static_bytes); }
void enter(unsigned thread, const void* stack, std::size_t bytes) { tracer.enter(thread, {stack, bytes}); }
void leave() { tracer.leave(); }
void pause() { tracer.pause(); }
void unpause() { tracer.unpause(); }
void barrier() { tracer.barrier(); }
void warp_operation(WarpOperation operation, unsigned warp, unsigned mask) {
  tracer.warp_operation(operation, warp, mask);
}
void async_copy(const void* shared, const void* global) {
  tracer.async_copy(shared, global, __builtin_return_address(0));
}
void matrix_row(const void* row) { tracer.access(row, 16, Kind::kMatrix, __builtin_return_address(0)); }
void atomic(const void* address, std::size_t bytes) {
  tracer.access(address, bytes, Kind::kAtomic, __builtin_return_address(0));
}

}  // namespace emu::trace

extern "C" {

void emulation_trace_start() { emu::trace::tracer.start(); }
// False if the range is empty, overlaps another one, or begins in the middle of a sector.
bool emulation_trace_name(const char* name, const void* start, std::size_t bytes) {
  return emu::trace::tracer.name(name, start, bytes);
}
// Until the next call.
const char* emulation_trace_stop() {
  static std::string json;
  json = emu::trace::tracer.stop();
  return json.c_str();
}

// ---- what the compiler calls

void __tsan_init() {}
void __tsan_func_entry(void* call_pc) { emu::trace::tracer.call(call_pc); }
void __tsan_func_exit() { emu::trace::tracer.end_call(); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESS(name, bytes, kind)                                                                   \
  void __tsan_##name(void* address) {                                                               \
    emu::trace::tracer.access(address, bytes, emu::trace::Kind::kind, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)                                \
  ACCESS(read##bytes, bytes, kLoad)                    \
  ACCESS(write##bytes, bytes, kStore)                  \
  ACCESS(unaligned_read##bytes, bytes, kLoad)          \
  ACCESS(unaligned_write##bytes, bytes, kStore)        \
  ACCESS(volatile_read##bytes, bytes, kLoad)           \
  ACCESS(volatile_write##bytes, bytes, kStore)         \
  ACCESS(unaligned_volatile_read##bytes, bytes, kLoad) \
  ACCESS(unaligned_volatile_write##bytes, bytes, kStore)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, std::size_t bytes) {
  emu::trace::tracer.access(address, bytes, emu::trace::Kind::kLoad, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t bytes) {
  emu::trace::tracer.access(address, bytes, emu::trace::Kind::kStore, __builtin_return_address(0));
}

// Atomic operations, in place of which the compiler calls these. Those of kernels are counted where the
// emulator makes them (emulation/atomics.h); what else is atomic is the standard library's.
#define FETCH(bits, name)                                                                 \
  std::uint##bits##_t __tsan_atomic##bits##_fetch_##name(volatile std::uint##bits##_t* p, \
                                                         std::uint##bits##_t v, int) {    \
    return __atomic_fetch_##name(p, v, __ATOMIC_SEQ_CST);                                 \
  }
#define EXCHANGE_IF_EQUAL(bits, strength, is_weak)                                                       \
  int __tsan_atomic##bits##_compare_exchange_##strength(                                                 \
      volatile std::uint##bits##_t* p, std::uint##bits##_t* expected, std::uint##bits##_t v, int, int) { \
    return __atomic_compare_exchange_n(p, expected, v, is_weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);     \
  }
#define ATOMICS(bits)                                                                                        \
  std::uint##bits##_t __tsan_atomic##bits##_load(const volatile std::uint##bits##_t* p, int) {               \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                          \
  void __tsan_atomic##bits##_store(volatile std::uint##bits##_t* p, std::uint##bits##_t v, int) {            \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                          \
  std::uint##bits##_t __tsan_atomic##bits##_exchange(volatile std::uint##bits##_t* p, std::uint##bits##_t v, \
                                                     int) {                                                  \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  EXCHANGE_IF_EQUAL(bits, strong, false)                                                                     \
  EXCHANGE_IF_EQUAL(bits, weak, true)                                                                        \
  FETCH(bits, add)                                                                                           \
  FETCH(bits, sub)                                                                                           \
  FETCH(bits, and)                                                                                           \
  FETCH(bits, or)                                                                                            \
  FETCH(bits, xor)
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"

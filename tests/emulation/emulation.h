// CUDA on the host: every CUDA thread is a fiber on ONE OS thread (ASan / UBSan / TSan aware).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#include <sys/mman.h>
#if defined(__SANITIZE_THREAD__) && !defined(EMU_PROF)
#define EMU_TSAN 1
#endif
#ifdef EMU_PROF   // -fsanitize=thread hooks recorded by emu_prof.cpp, no libtsan
#include "emu_prof.h"
#define EMU_P(...) __VA_ARGS__
#define EMU_PNOSAN __attribute__((no_sanitize("thread"), no_sanitize_coverage, noinline))
#define EMU_LAMBDA __attribute__((no_sanitize("thread"), no_sanitize_coverage))
struct EmuPause { EMU_PNOSAN EmuPause() { emu_prof_pause(1); } EMU_PNOSAN ~EmuPause() { emu_prof_pause(0); } };  // emulator bookkeeping (nests at most as release inside sync)
#define EMU_PINL __attribute__((always_inline)) inline
#else
#define EMU_P(...)
#define EMU_PNOSAN
#define EMU_LAMBDA
#define EMU_PINL
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define EMU_UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define EMU_POISON(p, n) ((void)0)
#define EMU_UNPOISON(p, n) ((void)0)
#endif
#ifdef EMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned); void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned); void* __tsan_get_current_fiber();
void __tsan_acquire(void*); void __tsan_release(void*);
}
extern "C" { void AnnotateIgnoreReadsBegin(const char*, int); void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int); void AnnotateIgnoreWritesEnd(const char*, int); }
struct EmuQuiet {  // hides the emulator's own bookkeeping from the race detector
  EmuQuiet() { AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0); }
  ~EmuQuiet() { AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0); }
};
#define EMU_ACQ(p) __tsan_acquire((void*)(p))
#define EMU_REL(p) __tsan_release((void*)(p))
#else
struct EmuQuiet { EmuQuiet() {} ~EmuQuiet() {} };
#define EMU_ACQ(p) ((void)0)
#define EMU_REL(p) ((void)0)
#endif
#ifdef EMU_PROF
#define EMU_NOSAN __attribute__((no_sanitize("thread"), no_sanitize_coverage, noinline))
#else
#define EMU_NOSAN __attribute__((no_sanitize("address", "thread", "undefined"), noinline))
#endif
#define __global__
#define __device__
#define __host__
#ifdef EMU_PROF
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __launch_bounds__(...)
#define __grid_constant__
using cudaStream_t = struct CUstream_st*;

#define __align__(n) alignas(n)
#define EMU_LOC int line = __builtin_LINE(), const char* file = __builtin_FILE()

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
#ifdef EMU_PROF  // copies are one wide access (SRA would split them into scalars)
struct alignas(8) float2 { float x, y; float2(float a, float b) : x(a), y(b) {}
  typedef float R __attribute__((vector_size(8), may_alias)); float2() = default;
  EMU_PINL float2(const float2& o) { *(R*)this = *(const R*)&o; }
  EMU_PINL float2& operator=(const float2& o) { *(R*)this = *(const R*)&o; return *this; } };
struct alignas(16) float4 { float x, y, z, w; float4(float a, float b, float c, float d) : x(a), y(b), z(c), w(d) {}
  typedef float R __attribute__((vector_size(16), may_alias)); float4() = default;
  EMU_PINL float4(const float4& o) { *(R*)this = *(const R*)&o; }
  EMU_PINL float4& operator=(const float4& o) { *(R*)this = *(const R*)&o; return *this; } };
#else
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
#endif
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static constexpr int warpSize = 32;

namespace emu {
enum class Order { Forward, Reverse, Random };
struct Config {
  Order order = Order::Forward; unsigned seed = 1; bool abort_on_error = true;
  size_t max_static_smem = 48 * 1024, max_smem = 99 * 1024;   // sm_86/89 opt-in limit: the tightest of sm_80+
};
inline Config cfg;
inline std::vector<std::string> errors;
inline uint64_t n_switch, n_threads, n_barriers;
enum State : uint8_t { READY, WAIT_BLOCK, WAIT_WARP, DONE };
struct PendingCopy { void* dst; const void* src; int group; };
struct Fiber {
  void* sp = nullptr; char* stack = nullptr; uint3 tid{}; unsigned lin = 0; State st = DONE;
  int line = 0; const char* file = ""; bool fenced = false;
  std::vector<PendingCopy> pend; int group = 0;
  void *asan_fake = nullptr, *tsan = nullptr;
};
struct Coll { unsigned mask = 0, arrived = 0; int line = 0; uint64_t gen = 0; alignas(16) unsigned char v[2][32][32]; unsigned part[2]; };
struct Warp { Coll c[32]; };
inline constexpr size_t kStack = 256 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber* cur = nullptr;
inline uint3 block_idx{}; inline dim3 block_dim, grid_dim;
inline unsigned bar_arrived, alive; inline int bar_line; inline const char* bar_file; inline uint64_t bar_gen; inline char bar_token[2];
inline char* arena = nullptr; inline size_t arena_used, arena_cap, dyn_size; inline char* dyn_ptr;
inline std::map<const void*, void*> shared_vars;
inline std::function<void()> body; inline char launch_token; inline std::vector<void*> dead;
inline void* main_sp; inline void *main_asan, *main_tsan; inline const void* main_bottom; inline size_t main_size;
inline const char* kname = "";

EMU_NOSAN inline void fail(const std::string& m) {
  char pre[160]; snprintf(pre, sizeof pre, "[cuda_emu] %s block(%u,%u,%u) thread(%u,%u,%u): ", kname, block_idx.x, block_idx.y,
                          block_idx.z, cur ? cur->tid.x : 0, cur ? cur->tid.y : 0, cur ? cur->tid.z : 0);
  errors.push_back(pre + m); fprintf(stderr, "%s%s\n", pre, m.c_str());
  if (cfg.abort_on_error) abort();
}
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.weak emu_switch
.type emu_switch,@function
emu_switch:
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
.size emu_switch,.-emu_switch
)");
EMU_NOSAN inline void to_main(bool dying) {
  Fiber* f = cur; (void)dying;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(dying ? nullptr : &f->asan_fake, main_bottom, main_size);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(main_tsan, 1);
#endif
  emu_switch(&f->sp, main_sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(f->asan_fake, &main_bottom, &main_size);
#endif
}
EMU_NOSAN inline void to_fiber(Fiber* f) {
  cur = f; ++n_switch; EMU_P(emu_prof_fiber(f->lin, f->stack, f->stack + kStack));
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&main_asan, f->stack, kStack);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(f->tsan, 1);
#endif
  emu_switch(&main_sp, f->sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(main_asan, nullptr, nullptr);
#endif
  cur = nullptr; EMU_P(emu_prof_fiber(-1, nullptr, nullptr));
}
EMU_NOSAN inline void release_barrier() {
  EMU_P(EmuPause pz;) ++bar_gen; ++n_barriers; bar_arrived = 0; EMU_P(emu_prof_barrier());
  for (auto& f : fibers) if (f.st == WAIT_BLOCK) f.st = READY;
}
EMU_NOSAN inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  body();
  {
    EmuQuiet q; if (!cur->pend.empty()) fail("thread exited with cp.async copies not waited for");
    cur->st = DONE; --alive;
  if (alive && bar_arrived == alive) release_barrier();  // exited threads no longer count (Volta+ behaviour)
  }
  EMU_REL(&launch_token);  // end of kernel: visible to the host, not to other blocks
  to_main(true); abort();
}
EMU_NOSAN inline void init_fiber(Fiber& f) {
#ifdef EMU_TSAN
  if (f.stack) { munmap(f.stack, kStack); f.stack = nullptr; }  // a reused stack would look like a race between blocks
#endif
  if (!f.stack) {  // lowest page is a guard page: kernel stack overflow faults instead of corrupting
    f.stack = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(f.stack, 4096, PROT_NONE);
  }
  EMU_UNPOISON(f.stack + 4096, kStack - 4096);
  void** s = (void**)(f.stack + kStack - 64);
  *--s = nullptr; *--s = (void*)fiber_main;
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  f.sp = s; f.st = READY; f.pend.clear(); f.group = 0; f.fenced = false; f.asan_fake = nullptr;
#ifdef EMU_TSAN
  f.tsan = __tsan_create_fiber(0);
#endif
}
EMU_NOSAN inline void* carve(size_t n) {
  size_t off = (arena_used + 127) / 128 * 128;
  if (off + n + 128 > arena_cap) { fail("shared memory exhausted"); abort(); }
  arena_used = off + n + 128;  // 128-byte red zone after every shared variable
  EMU_UNPOISON(arena + off, n);
  return arena + off;
}
inline size_t smem_payload;
template <class T> EMU_NOSAN inline T* shared(const void* key) {
  EmuQuiet q; EMU_P(EmuPause pz;) auto it = shared_vars.find(key);
  if (it != shared_vars.end()) return (T*)it->second;
  smem_payload += sizeof(T);
  if (smem_payload > cfg.max_static_smem) fail("static shared memory above 48 KiB");
  if (smem_payload + dyn_size > cfg.max_smem) fail("shared memory above the device limit");
  void* p = carve(sizeof(T)); shared_vars[key] = p; return (T*)p;
}
EMU_NOSAN inline void sync_threads(int line, const char* file) {
  EMU_P(EmuPause pz;) EmuQuiet q; Fiber* f = cur; f->line = line; f->file = file;
  if (bar_arrived && (bar_line != line || strcmp(bar_file, file)))
    fail("barrier divergence: this thread is at " + std::string(file) + ":" + std::to_string(line) + ", others at line " + std::to_string(bar_line));
  bar_line = line; bar_file = file;
  [[maybe_unused]] uint64_t g = bar_gen; EMU_REL(&bar_token[g & 1]);  // one token per generation: no edge from a later phase
  if (++bar_arrived == alive) release_barrier();
  else { f->st = WAIT_BLOCK; to_main(false); }
  EMU_ACQ(&bar_token[g & 1]);
}
// Warp rendezvous of the lanes in `mask`; returns the slot that holds all lanes' values.
EMU_NOSAN inline unsigned char (*collect(unsigned mask, const void* v, size_t n, bool fence, int line, const char* file, unsigned* part))[32] {
  EMU_P(EmuPause pz;) EmuQuiet q; Fiber* f = cur; unsigned lane = f->lin & 31; Warp& w = warps[f->lin >> 5];
  f->line = line; f->file = file;
  if (!(mask >> lane & 1)) fail("warp op at line " + std::to_string(line) + ": calling lane is not in its mask");
  Coll& c = w.c[mask ? __builtin_ctz(mask) : 0];
  if (c.arrived && (c.mask != mask || c.line != line))
    fail("warp divergence: lanes in different *_sync ops, lines " + std::to_string(c.line) + " and " + std::to_string(line));
  uint64_t g = c.gen; c.mask = mask; c.line = line; c.arrived |= 1u << lane;
  if (n) memcpy(c.v[g & 1][lane], v, n);
  if (fence) EMU_REL(c.v[g & 1]);
  if (c.arrived == mask) {
    c.part[g & 1] = mask; c.arrived = 0; ++c.gen;
    EMU_P(unsigned live = 0; for (unsigned l = 0, b = f->lin & ~31u; l < 32 && b + l < fibers.size(); ++l) if (fibers[b + l].st != DONE) live |= 1u << l;
          emu_prof_warp_op(f->lin >> 5, n ? 1 : 0, (mask & live) == live);)
    for (unsigned l = 0, b = f->lin & ~31u; l < 32 && b + l < fibers.size(); ++l)
      if ((mask >> l & 1) && fibers[b + l].st == WAIT_WARP) fibers[b + l].st = READY;
  } else { f->st = WAIT_WARP; while (c.gen == g) { f->st = WAIT_WARP; to_main(false); } }
  if (fence) EMU_ACQ(c.v[g & 1]);
  *part = c.part[g & 1];
  return c.v[g & 1];
}
EMU_NOSAN inline void run_block(uint3 bi) {
  EmuQuiet q; block_idx = bi; unsigned n = block_dim.x * block_dim.y * block_dim.z;
  if (fibers.size() != n) { for (auto& f : fibers) if (f.stack) munmap(f.stack, kStack); fibers.clear(); fibers.resize(n); }
  warps.assign((n + 31) / 32, Warp{});
  arena_cap = cfg.max_smem + 64 * 1024; arena = (char*)aligned_alloc(128, (arena_cap + 127) / 128 * 128);
  arena_used = 0; smem_payload = 0; shared_vars.clear();
  memset(arena, 0xFF, arena_cap);  // NaN poison: finds reads before writes
  EMU_POISON(arena, arena_cap);
  dyn_ptr = dyn_size ? (char*)carve(dyn_size) : nullptr;
  bar_arrived = 0; alive = n; n_threads += n;
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = fibers[i]; f.lin = i;
    f.tid = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    init_fiber(f);
  }
  static std::mt19937 rng; rng.seed(cfg.seed + block_idx.x * 7919 + block_idx.y * 104729);
  std::vector<unsigned> ord(n); std::iota(ord.begin(), ord.end(), 0u);
  if (cfg.order == Order::Reverse) std::reverse(ord.begin(), ord.end());
  EMU_P(emu_prof_block_begin(n, arena, arena + arena_cap, fibers.data(), fibers.data() + n));
  while (alive) {
    if (cfg.order == Order::Random) std::shuffle(ord.begin(), ord.end(), rng);
    bool progress = false;
    for (unsigned i : ord) if (fibers[i].st == READY) { to_fiber(&fibers[i]); progress = true; }
    if (!progress) {
      for (auto& f : fibers) if (f.st != DONE) { cur = &f; break; }
      fail("DEADLOCK: " + std::to_string(alive) + " threads wait; first one at " + cur->file + ":" + std::to_string(cur->line)); abort();
    }
  }
#ifdef EMU_TSAN
  for (auto& f : fibers) dead.push_back(f.tsan);  // kept (up to a limit) so reports can show the other thread's stack
  if (dead.size() > 4096) { for (void* t : dead) __tsan_destroy_fiber(t); dead.clear(); }
#endif
  EMU_P(emu_prof_block_end());
  EMU_UNPOISON(arena, arena_cap); free(arena);
}
template <class F, class... A> void launch(const char* name, F k, dim3 g, dim3 b, size_t smem, A... a) {
  EmuQuiet q; kname = name; grid_dim = g; block_dim = b; dyn_size = smem;
  if (size_t(b.x) * b.y * b.z > 1024 || b.z > 64) { fail("block larger than 1024 threads"); return; }
  if (!b.x || !b.y || !b.z || !g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535) { fail("invalid grid/block size"); return; }
  if (smem > cfg.max_smem) { fail("dynamic shared memory above the device limit"); return; }
#ifdef EMU_TSAN
  main_tsan = __tsan_get_current_fiber();
#endif
  EMU_P(emu_prof_launch_begin(name, g.x * g.y * g.z, b.x * b.y * b.z));
  body = [=]() EMU_LAMBDA { k(a...); };
  size_t nb = size_t(g.x) * g.y * g.z; std::vector<size_t> ord(nb); std::iota(ord.begin(), ord.end(), size_t(0));
  if (cfg.order == Order::Reverse) std::reverse(ord.begin(), ord.end());
  if (cfg.order == Order::Random) { std::mt19937 r(cfg.seed); std::shuffle(ord.begin(), ord.end(), r); }
  for (size_t i : ord) run_block({unsigned(i % g.x), unsigned(i / g.x % g.y), unsigned(i / g.x / g.y)});
  EMU_P(emu_prof_launch_end());
  EMU_ACQ(&launch_token);
#ifdef EMU_TSAN
  for (void* t : dead) __tsan_destroy_fiber(t);
  dead.clear();
#endif
}
template <class T> EMU_PNOSAN inline T get_lane(unsigned char (*s)[32], unsigned part, unsigned src, int line) {
  if (!(part >> (src & 31) & 1)) fail("shuffle at line " + std::to_string(line) + " reads a lane outside the mask");
  EmuQuiet q; T r; memcpy(&r, s[src & 31], sizeof(T)); return r;
}
template <class T> EMU_NOSAN inline T shfl(unsigned m, T v, unsigned src, int line, const char* file) {
  unsigned part; auto s = collect(m, &v, sizeof v, false, line, file, &part); return get_lane<T>(s, part, src, line);
}
}  // namespace emu

#define threadIdx (emu::cur->tid)
#define blockIdx (emu::block_idx)
#define blockDim (emu::block_dim)
#define gridDim (emu::grid_dim)
#define GREEDYNAS_SHARED(T, name, ...)                                 \
  static const char emu_key_##name = 0;                          \
  using emu_t_##name = T __VA_ARGS__;                            \
  emu_t_##name& name = *emu::shared<emu_t_##name>(&emu_key_##name)
#define GREEDYNAS_DYNAMIC_SHARED(name) unsigned char* name = reinterpret_cast<unsigned char*>(emu::dyn_ptr)
#define GREEDYNAS_LAUNCH(k, grid, block, smem, stream, ...) ((void)(stream), emu::launch(#k, k, grid, block, smem, __VA_ARGS__))

inline void __syncthreads(EMU_LOC) { emu::sync_threads(line, file); }
inline void __syncwarp(unsigned m = ~0u, EMU_LOC) { unsigned p; emu::collect(m, nullptr, 0, true, line, file, &p); }
inline void __threadfence() { EmuQuiet q; emu::cur->fenced = true; }
inline void __threadfence_block() { EmuQuiet q; emu::cur->fenced = true; }
inline unsigned emu_lane() { return emu::cur->lin & 31; }
template <class T> T __shfl_sync(unsigned m, T v, int src, int w = 32, EMU_LOC) { unsigned l = emu_lane(); return emu::shfl(m, v, (l & ~(w - 1)) | (src & (w - 1)), line, file); }
template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, EMU_LOC) { unsigned l = emu_lane(), s = l ^ x; if (s / w > l / w) s = l; return emu::shfl(m, v, s, line, file); }
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, EMU_LOC) { unsigned l = emu_lane(); return emu::shfl(m, v, (l % w) + d < unsigned(w) ? l + d : l, line, file); }
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, EMU_LOC) { unsigned l = emu_lane(); return emu::shfl(m, v, (l % w) >= d ? l - d : l, line, file); }
EMU_PNOSAN inline unsigned __ballot_sync(unsigned m, int pred, EMU_LOC) {
  EmuQuiet q; unsigned p, r = 0; auto s = emu::collect(m, &pred, sizeof pred, false, line, file, &p);
  for (int i = 0; i < 32; ++i) { int v; memcpy(&v, s[i], 4); if ((p >> i & 1) && v) r |= 1u << i; } return r;
}
inline int __any_sync(unsigned m, int p, EMU_LOC) { return __ballot_sync(m, p, line, file) != 0; }
inline int __all_sync(unsigned m, int p, EMU_LOC) { return __ballot_sync(m, p, line, file) == m; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> T __ldg(const T* p) { return *p; }
// Atomics: relaxed; a preceding __threadfence() makes them a release for the race detector.
template <class T, class F> EMU_PNOSAN T emu_rmw(T* p, F f) {
  EMU_P(emu_prof_access(p, sizeof(T), 2, __builtin_return_address(0)));
  using U = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  static_assert(sizeof(T) == sizeof(U)); U *q = (U*)p, o = __atomic_load_n(q, __ATOMIC_RELAXED), n; T ov, nv;
  bool fenced; { EmuQuiet quiet; fenced = emu::cur->fenced; }
  if (fenced) EMU_REL(p);
  do { memcpy(&ov, &o, sizeof o); nv = f(ov); memcpy(&n, &nv, sizeof n); } while (!__atomic_compare_exchange_n(q, &o, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (fenced) EMU_ACQ(p);
  return ov;
}
template <class T> EMU_PINL T atomicAdd(T* p, std::type_identity_t<T> v) { return emu_rmw(p, [=](T o) { return T(o + v); }); }
template <class T> EMU_PINL T atomicMax(T* p, std::type_identity_t<T> v) { return emu_rmw(p, [=](T o) { return std::max(o, v); }); }
template <class T> EMU_PINL T atomicMin(T* p, std::type_identity_t<T> v) { return emu_rmw(p, [=](T o) { return std::min(o, v); }); }
template <class T> EMU_PINL T atomicExch(T* p, std::type_identity_t<T> v) { return emu_rmw(p, [=](T) { return v; }); }
template <class T> EMU_PINL T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) { return emu_rmw(p, [=](T o) { return o == c ? v : o; }); }
// cp.async: the copy lands only at the wait (the latest legal moment); until then dst holds NaN poison.
EMU_PNOSAN inline void copy_async16(void* dst, const void* src) {
  EMU_P(emu_prof_access(src, 16, 0, __builtin_return_address(0)); emu_prof_access(dst, 16, 1, (char*)__builtin_return_address(0) + 1);)
  if ((uintptr_t)dst % 16 || (uintptr_t)src % 16) emu::fail("cp.async: address not 16-byte aligned");
  memset(dst, 0xFF, 16); volatile char c = *((const char*)src + 15); (void)c;
  EMU_P(EmuPause pz;) EmuQuiet q; emu::cur->pend.push_back({dst, src, emu::cur->group});
}
EMU_PNOSAN inline void commit_async() { EmuQuiet q; ++emu::cur->group; }
template <int N> EMU_PNOSAN void wait_async() {
  EMU_P(EmuPause pz;)
  for (;;) {  // oldest first; the list itself is hidden from the race detector, the copy is not
    emu::PendingCopy c; { EmuQuiet q; auto& p = emu::cur->pend; if (p.empty() || p[0].group >= emu::cur->group - N) break; c = p[0]; p.erase(p.begin()); }
    memcpy(c.dst, c.src, 16);
  }
}
// ---- 16-bit tensor-core fragments, ldmatrix and half2: layouts from the PTX ISA (see the nvcc side)
EMU_PNOSAN inline float emu_bf16(unsigned u) { u <<= 16; float f; memcpy(&f, &u, 4); return f; }
EMU_PNOSAN inline float emu_f16(unsigned u) { uint16_t s = uint16_t(u); _Float16 h; memcpy(&h, &s, 2); return float(h); }
template <float (*CVT)(unsigned)> EMU_PNOSAN inline void emu_mma_16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line, const char* file) {
  EMU_P(if (emu_lane() == 0) emu_prof_mma(1);)
  unsigned part, mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  EmuQuiet q; auto s = emu::collect(~0u, mine, 24, false, line, file, &part);
  auto word = [&](unsigned l, unsigned i) EMU_LAMBDA { unsigned u; memcpy(&u, s[l] + 4 * i, 4); return u; };
  const unsigned g = emu_lane() >> 2, t = emu_lane() & 3;
  for (int h = 0; h < 2; ++h)          // rows g, g+8
    for (int e = 0; e < 2; ++e) {      // columns 2t, 2t+1
      float sum = c[2 * h + e];
      for (unsigned k = 0; k < 16; ++k) {
        const unsigned kt = (k & 7) >> 1, sh = 16 * (k & 1);
        sum += CVT(word(4 * g + kt, (k >> 3) * 2 + h) >> sh & 0xffff) * CVT(word(4 * (2 * t + e) + kt, 4 + (k >> 3)) >> sh & 0xffff);
      }
      c[2 * h + e] = sum;
    }
}
inline void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMU_LOC) { emu_mma_16816<emu_bf16>(c, a, b0, b1, line, file); }
inline void multiply_bf16_first(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMU_LOC) { c[0] = c[1] = c[2] = c[3] = 0.f; emu_mma_16816<emu_bf16>(c, a, b0, b1, line, file); }
inline void multiply_f16_first(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMU_LOC) { c[0] = c[1] = c[2] = c[3] = 0.f; emu_mma_16816<emu_f16>(c, a, b0, b1, line, file); }
inline void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMU_LOC) { emu_mma_16816<emu_f16>(c, a, b0, b1, line, file); }
EMU_PNOSAN inline void load_matrices(unsigned (&r)[4], const void* row, EMU_LOC) {
  EMU_P(emu_prof_access(row, 16, 0, __builtin_return_address(0)); if (emu_lane() == 0) emu_prof_ldmatrix();)
  const void* p[4]; const unsigned l = emu_lane();
  {
    EmuQuiet q; unsigned part;
    if ((uintptr_t)row % 16) emu::fail("ldmatrix: row address not 16-byte aligned");
    if ((char*)row < emu::arena || (char*)row >= emu::arena + emu::arena_cap) emu::fail("ldmatrix: not a shared-memory address");
    auto s = emu::collect(~0u, &row, sizeof row, false, line, file, &part);
    for (int i = 0; i < 4; ++i) memcpy(&p[i], s[8 * i + (l >> 2)], sizeof(void*));
  }
  for (int i = 0; i < 4; ++i) r[i] = ((const unsigned*)p[i])[l & 3];  // instrumented: ASan and TSan see the read
}
EMU_PNOSAN inline void load_matrices_transposed(unsigned (&r)[4], const void* row, EMU_LOC) {
  EMU_P(emu_prof_access(row, 16, 0, __builtin_return_address(0)); if (emu_lane() == 0) emu_prof_ldmatrix();)
  const void* p[4]; const void* q2[4]; const unsigned l = emu_lane();
  {
    EmuQuiet q; unsigned part;
    if ((uintptr_t)row % 16) emu::fail("ldmatrix: row address not 16-byte aligned");
    if ((char*)row < emu::arena || (char*)row >= emu::arena + emu::arena_cap) emu::fail("ldmatrix: not a shared-memory address");
    auto s = emu::collect(~0u, &row, sizeof row, false, line, file, &part);
    for (int i = 0; i < 4; ++i) { memcpy(&p[i], s[8 * i + 2 * (l & 3)], sizeof(void*)); memcpy(&q2[i], s[8 * i + 2 * (l & 3) + 1], sizeof(void*)); }
  }
  for (int i = 0; i < 4; ++i) r[i] = unsigned(((const uint16_t*)p[i])[l >> 2]) | unsigned(((const uint16_t*)q2[i])[l >> 2]) << 16;  // element of column g of rows 2t, 2t+1
}
#ifdef EMU_PROF  // copies are one 4-byte access
struct alignas(4) __half2 { _Float16 x, y; typedef unsigned R __attribute__((may_alias)); __half2() = default; __half2(_Float16 a, _Float16 b) : x(a), y(b) {}
  EMU_PINL __half2(const __half2& o) { *(R*)this = *(const R*)&o; }
  EMU_PINL __half2& operator=(const __half2& o) { *(R*)this = *(const R*)&o; return *this; } };
#else
struct alignas(4) __half2 { _Float16 x, y; };
#endif
inline uint16_t emu_bits(_Float16 h) { uint16_t u; memcpy(&u, &h, 2); return u; }
inline __half2 __floats2half2_rn(float a, float b) { return {_Float16(a), _Float16(b)}; }
inline __half2 __float2half2_rn(float a) { return {_Float16(a), _Float16(a)}; }
inline float2 __half22float2(__half2 h) { return float2{float(h.x), float(h.y)}; }
inline _Float16 emu_hfma(_Float16 a, _Float16 b, _Float16 c) { return _Float16(double(a) * double(b) + double(c)); }  // one rounding (the double sum is exact but for extreme exponents)
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {emu_hfma(a.x, b.x, c.x), emu_hfma(a.y, b.y, c.y)}; }
inline _Float16 emu_hmax(_Float16 a, _Float16 b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline _Float16 emu_hmin(_Float16 a, _Float16 b) { return a != a ? a : b != b ? b : a < b ? a : b; }
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {emu_hmax(a.x, b.x), emu_hmax(a.y, b.y)}; }
inline __half2 __hmin2_nan(__half2 a, __half2 b) { return {emu_hmin(a.x, b.x), emu_hmin(a.y, b.y)}; }
inline unsigned pack_half(float lo, float hi) { return unsigned(emu_bits(_Float16(lo))) | unsigned(emu_bits(_Float16(hi))) << 16; }
inline unsigned pack_half_relu(float lo, float hi) { return pack_half(lo < 0.f ? 0.f : lo, hi < 0.f ? 0.f : hi); }
inline unsigned emu_round_bf16(float f) { unsigned u; memcpy(&u, &f, 4); return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16; }
inline unsigned pack_bf16(float lo, float hi) { return emu_round_bf16(lo) | emu_round_bf16(hi) << 16; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline _Float16 __float2half_rn(float f) { return _Float16(f); }
using __half = _Float16;
inline unsigned short __half_as_ushort(_Float16 h) { uint16_t u; memcpy(&u, &h, 2); return u; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline int multiprocessors() { return 4; }
inline int shared_bytes_per_block() { return int(emu::cfg.max_smem); }
inline float __expf(float x) { return std::exp(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __saturatef(float x) { return x != x ? 0.f : x < 0.f ? 0.f : x > 1.f ? 1.f : x; }
inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
inline float __half2float(__half h) { return float(h); }
inline __half __ushort_as_half(unsigned short u) { __half h; memcpy(&h, &u, 2); return h; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline float __low2float(__half2 h) { return float(h.x); }
inline float __high2float(__half2 h) { return float(h.y); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {_Float16(float(a.x) + float(b.x)), _Float16(float(a.y) + float(b.y))}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {_Float16(float(a.x) - float(b.x)), _Float16(float(a.y) - float(b.y))}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {_Float16(float(a.x) * float(b.x)), _Float16(float(a.y) * float(b.y))}; }
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float __fdividef(float a, float b) { return a / b; }
inline long min(long a, long b) { return a < b ? a : b; }  // without these int64_t would become int
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned subtract_bf16(unsigned a, unsigned b) { return pack_bf16(emu_bf16(a & 0xffff) - emu_bf16(b & 0xffff), emu_bf16(a >> 16) - emu_bf16(b >> 16)); }

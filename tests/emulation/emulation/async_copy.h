// Copies from global to shared memory that a thread does not wait for (cp.async). A copy lands when its
// thread waits for it, the latest moment there is; until then NaN lies there.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared_memory.h"
#include "thread.h"

namespace emu {

inline bool aligned16(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

}  // namespace emu

namespace greedynas::cuda {

inline void copy_async16(void* shared, const void* global) {
  if (!emu::aligned16(shared) || !emu::aligned16(global)) {
    emu::fail("an asynchronous copy's address is no multiple of 16 bytes");
  }
  {
    emu::Unwatched unwatched;
    if (emu::cfg.arch < 800) emu::fail("an asynchronous copy needs compute capability 8.0");
    if (!emu::shared_memory.contains(shared)) emu::fail("an asynchronous copy is not to shared memory");
  }
  emu::trace::async_copy(shared, global);
  const emu::trace::Paused paused;
  // Sanitizers see both ends here, where the mistake is, and again where the copy lands.
  std::memset(shared, 0xff, 16);
  [[maybe_unused]] const volatile char last = static_cast<const char*>(global)[15];
  emu::Unwatched unwatched;
  emu::current().copies.push_back({shared, global, emu::current().copy_group});
}

inline void commit_async() {
  emu::Unwatched unwatched;
  ++emu::current().copy_group;
}

// Until at most kPending groups of this thread's copies are on the way.
template <int kPending>
void wait_async() {
  std::size_t done = 0;
  while (true) {
    emu::PendingCopy copy;
    {
      emu::Unwatched unwatched;
      const emu::Thread& thread = emu::current();
      if (done == thread.copies.size() || thread.copies[done].group >= thread.copy_group - kPending) break;
      copy = thread.copies[done++];
    }
    const emu::trace::Paused paused;
    std::memcpy(copy.shared, copy.global, 16);
  }
  emu::Unwatched unwatched;
  auto& copies = emu::current().copies;
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace greedynas::cuda

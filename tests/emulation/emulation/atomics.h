// Atomic operations and fences. Atomics are relaxed: they order nothing but themselves, except after a fence.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "thread.h"

namespace emu {

// *address = update(*address); what was there before. Every atomic operation goes through here.
template <typename T, typename Update>
T atomic_update(T* address, Update update) {
  using Word = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  static_assert(sizeof(T) == sizeof(Word));
  trace::atomic(address, sizeof(T));
  const trace::Paused paused;
  bool fenced;
  {
    Unwatched unwatched;
    fenced = current().fenced;
  }
  if (fenced) release(address);
  Word* word = reinterpret_cast<Word*>(address);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T value;
  do {
    std::memcpy(&value, &before, sizeof before);
    const T updated = update(value);
    std::memcpy(&after, &updated, sizeof after);
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (fenced) acquire(address);
  return value;
}

}  // namespace emu

inline void __threadfence() {
  emu::Unwatched unwatched;
  emu::current().fenced = true;
}
inline void __threadfence_block() { __threadfence(); }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emu::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emu::atomic_update(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emu::atomic_update(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emu::atomic_update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emu::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

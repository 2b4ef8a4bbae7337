// __syncthreads(): no thread of the block goes on before all have come.
#pragma once

#include <cstdint>
#include <memory>

#include "thread.h"

namespace emu {

class Barrier {
 public:
  void begin() {
    arrived_ = 0;
    // On the heap, so that the thread sanitizer forgets what earlier blocks released here: a barrier orders
    // the threads of its own block alone.
    tokens_ = std::make_unique<Tokens>();
  }

  void come(const Place& place) {
    Unwatched unwatched;
    if (arrived_ && !same_line(place, place_)) {
      fail("barrier divergence: this thread is at " + to_string(place) + ", others at " + to_string(place_));
    }
    place_ = place;
    // Two tokens by turns: with one, those who are late at this barrier would seem to have waited for what
    // others did on their way to the next one.
    char* token = &tokens_->of_generation[generation_ % 2];
    release(token);
    ++arrived_;
    if (!open_if_complete()) wait(Fiber::State::kAtBarrier, place);
    acquire(token);
  }

  // Also after a thread has ended: the others no longer wait for it, as on devices since sm_70.
  bool open_if_complete() {
    if (arrived_ == 0 || arrived_ != threads_alive) return false;
    trace::barrier();
    ++generation_;
    arrived_ = 0;
    for (unsigned i = 0; i < thread_count; ++i) {
      if (threads[i].state == Fiber::State::kAtBarrier) threads[i].state = Fiber::State::kReady;
    }
    return true;
  }

 private:
  struct Tokens {
    char of_generation[2];
  };

  unsigned arrived_ = 0;
  std::uint64_t generation_ = 0;
  Place place_;  // of those who have come
  std::unique_ptr<Tokens> tokens_;
};

inline Barrier barrier;

}  // namespace emu

inline void __syncthreads(emu::Place place = emu::Place::current()) { emu::barrier.come(place); }

// A ParallelFor on threads of its own, for programs without torch.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"

namespace greedynas::cpu {

// The caller's thread is one of them. A thread has the same share of equal loops, and keeps what it has
// allocated for itself. Bodies must not throw.
class ThreadTeam {
 public:
  explicit ThreadTeam(int size) {
    for (int member = 1; member < size; ++member) others_.emplace_back([this, member] { serve(member); });
  }
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;
  ~ThreadTeam() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    begins_.notify_all();
    for (std::thread& other : others_) other.join();
  }

  int64_t size() const { return static_cast<int64_t>(others_.size()) + 1; }

  void operator()(int64_t units, int64_t, const RangeBody& body) const {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = {&body, units};
      ++loops_;
      working_ = others_.size();
    }
    begins_.notify_all();
    work({&body, units}, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  struct Loop {
    const RangeBody* body;
    int64_t units;
  };

  void work(const Loop& loop, int64_t member) const {
    const int64_t begin = member * loop.units / size(), end = (member + 1) * loop.units / size();
    if (begin < end) (*loop.body)(begin, end);
  }

  void serve(int64_t member) const {
    for (int64_t served = 0;; ++served) {
      Loop loop;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        begins_.wait(lock, [&] { return ends_ || loops_ > served; });
        if (loops_ == served) return;
        loop = loop_;
      }
      work(loop, member);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--working_ == 0) done_.notify_one();
    }
  }

  mutable std::mutex mutex_;
  mutable std::condition_variable begins_, done_;
  mutable Loop loop_{};
  mutable int64_t loops_ = 0;  // so far
  mutable std::size_t working_ = 0;
  bool ends_ = false;
  std::vector<std::thread> others_;
};

}  // namespace greedynas::cpu

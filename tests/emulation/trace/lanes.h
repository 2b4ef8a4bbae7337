// From what threads do, one after another, to requests of warps.
//
// A thread's accesses are kept until its block, or its whole warp, meets. Then the accesses that lanes make
// at the same place go together, always those that come first in the program: as if diverged lanes waited
// where branches join. For that, code must lie in the order of its source (-fno-reorder-blocks). A lane that
// leaves out the last access of a loop's turn is taken to be a turn ahead: what is counted are as many
// requests.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "counts.h"

namespace emu::trace {

// Chains of calls, by numbers: 0 is a kernel itself.
class CallPaths {
 public:
  CallPaths() { paths_.push_back({}); }

  // Where `path` has called, from `pc` on.
  std::uint32_t longer(std::uint32_t path, std::uint64_t pc) {
    Path& parent = paths_[path];
    if (parent.last_pc == pc) return parent.last_child;  // mostly the same again
    const auto [place, fresh] = children_.try_emplace({path, pc}, static_cast<std::uint32_t>(paths_.size()));
    parent.last_pc = pc;
    parent.last_child = place->second;
    if (fresh) {
      std::vector<std::uint64_t> calls = parent.calls;
      calls.push_back(pc);
      paths_.push_back({std::move(calls), 0, 0});
    }
    return place->second;
  }
  const std::vector<std::uint64_t>& calls(std::uint32_t path) const { return paths_[path].calls; }

  // Whether `a` is at an earlier place of the program than `b`.
  bool before(const Access& a, const Access& b) const {
    if (a.path == b.path) return a.pc < b.pc;
    const std::vector<std::uint64_t>&x = calls(a.path), &y = calls(b.path);
    std::size_t i = 0;
    while (i < x.size() && i < y.size() && x[i] == y[i]) ++i;
    return (i < x.size() ? x[i] : a.pc) < (i < y.size() ? y[i] : b.pc);
  }

 private:
  struct Path {
    std::vector<std::uint64_t> calls;
    std::uint64_t last_pc = 0;
    std::uint32_t last_child = 0;
  };
  std::vector<Path> paths_;
  std::map<std::pair<std::uint32_t, std::uint64_t>, std::uint32_t> children_;
};

struct Lane {
  std::vector<Access> accesses;
  std::size_t next = 0;  // of those to be grouped
  std::uint32_t path = 0;
  std::vector<std::uint32_t> outer_paths;
  unsigned paused = 0;

  void call(CallPaths& paths, std::uint64_t pc) {
    outer_paths.push_back(path);
    path = paths.longer(path, pc);
  }
  void end_call() {
    if (outer_paths.empty()) return;
    path = outer_paths.back();
    outer_paths.pop_back();
  }
};

// Calls `request(accesses, lanes, count)` for every request of a warp's lanes. Those of one place may still
// differ in kind, size or buffer, where a pointer may point to several; they are apart then.
template <typename Request>
void group_lanes(Lane* lanes, unsigned count, const CallPaths& paths, const Request& request) {
  const Access* together[32];
  std::uint8_t of_lane[32];
  while (true) {
    unsigned size = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (lanes[i].next == lanes[i].accesses.size()) continue;
      const Access& access = lanes[i].accesses[lanes[i].next];
      if (size > 0 && (access.pc != together[0]->pc || access.path != together[0]->path)) {
        if (!paths.before(access, *together[0])) continue;
        size = 0;
      }
      together[size] = &access;
      of_lane[size++] = static_cast<std::uint8_t>(i);
    }
    if (size == 0) break;
    for (unsigned i = 0; i < size; ++i) ++lanes[of_lane[i]].next;
    std::uint32_t done = 0;
    for (unsigned i = 0; i < size; ++i) {
      if (done >> i & 1) continue;
      const Access& first = *together[i];
      const Access* alike[32];
      std::uint8_t alike_lane[32];
      unsigned alike_count = 0;
      for (unsigned j = i; j < size; ++j) {
        const Access& other = *together[j];
        if (other.kind != first.kind || other.bytes != first.bytes || other.buffer != first.buffer) continue;
        done |= 1u << j;
        alike[alike_count] = &other;
        alike_lane[alike_count++] = of_lane[j];
      }
      request(alike, alike_lane, alike_count);
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    lanes[i].accesses.clear();
    lanes[i].next = 0;
  }
}

}  // namespace emu::trace

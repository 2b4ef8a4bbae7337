// Where maps lie in one piece of memory, decided before any of them is computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace greedynas {

class Arena {
 public:
  // The first gap that is large enough.
  int64_t allocate(int64_t bytes) {
    constexpr int64_t kLine = 64;
    bytes = (bytes + kLine - 1) / kLine * kLine;
    int64_t offset = 0;
    auto place = used_.begin();
    for (; place != used_.end() && place->offset - offset < bytes; ++place)
      offset = place->offset + place->bytes;
    used_.insert(place, {offset, bytes});
    size_ = std::max(size_, offset + bytes);
    return offset;
  }

  void release(int64_t offset) {
    used_.erase(std::find_if(used_.begin(), used_.end(), [&](const Piece& p) { return p.offset == offset; }));
  }

  int64_t size() const { return size_; }

 private:
  struct Piece {
    int64_t offset, bytes;
  };
  std::vector<Piece> used_;  // in order of their offsets
  int64_t size_ = 0;
};

}  // namespace greedynas

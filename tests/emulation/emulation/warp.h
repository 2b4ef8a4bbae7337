// Operations of the lanes of a warp with each other: __syncwarp, shuffles, votes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "thread.h"

namespace emu {

// What each lane has brought to an operation.
struct LaneValues {
  static constexpr std::size_t kBytes = 48;
  alignas(16) unsigned char of_lane[warpSize][kBytes];

  template <typename T>
  T get(unsigned lane) const {
    T value;
    std::memcpy(&value, of_lane[lane], sizeof value);
    return value;
  }
};

// Where lanes meet. By turns two sets of values: a lane that is late still reads those of its operation while
// others already bring theirs to the next one.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  Place place;
  std::uint64_t generation = 0;
  LaneValues values[2];
};

// Parts of a warp may be at different operations at once; a part is known by its lowest lane.
struct Warp {
  Meeting of_lowest_lane[warpSize];
};

inline std::vector<Warp> warps;

inline void begin_warps() {
  const std::size_t count = (thread_count + warpSize - 1) / warpSize;
  // The thread sanitizer gets other memory: what an earlier block released there orders nothing here.
  if (kThreadSanitizer) std::vector<Warp>().swap(warps);
  if (warps.size() < count) warps.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    for (Meeting& meeting : warps[i].of_lowest_lane) meeting.arrived = 0;
  }
}

// Waits for all lanes of `mask`; what each of them has brought. A barrier orders: what lanes did before is
// seen by all of them after. Others promise nothing of the kind.
inline const LaneValues& meet(unsigned mask, const void* value, std::size_t bytes, WarpOperation operation,
                              const Place& place) {
  Unwatched unwatched;
  const bool orders = operation == WarpOperation::kBarrier;
  const unsigned lane = current().lane(), first = current().linear - lane;
  if (!(mask >> lane & 1)) fail(to_string(place) + ": the mask of a warp's operation lacks the lane itself");
  Meeting& meeting = warps[first / warpSize].of_lowest_lane[mask ? std::countr_zero(mask) : 0];
  if (meeting.arrived && (meeting.mask != mask || !same_line(meeting.place, place))) {
    fail("warp divergence: this lane is at " + to_string(place) + ", others at " + to_string(meeting.place) +
         (meeting.mask != mask ? ", with another mask" : ""));
  }
  const std::uint64_t generation = meeting.generation;
  LaneValues& values = meeting.values[generation % 2];
  meeting.mask = mask;
  meeting.place = place;
  meeting.arrived |= 1u << lane;
  if (bytes) std::memcpy(values.of_lane[lane], value, bytes);
  if (orders) release(&values);
  if (meeting.arrived == mask) {
    trace::warp_operation(operation, first / warpSize, mask);
    meeting.arrived = 0;
    ++meeting.generation;
    for (unsigned i = 0; i < warpSize && first + i < thread_count; ++i) {
      Thread& other = threads[first + i];
      if ((mask >> i & 1) && other.state == Fiber::State::kInWarp) other.state = Fiber::State::kReady;
    }
  } else {
    // A lane in two overlapping masks may be woken by the wrong one.
    while (meeting.generation == generation) wait(Fiber::State::kInWarp, place);
  }
  if (orders) acquire(&values);
  return values;
}

// The value that lane `source` has brought.
template <typename T>
T shuffle(unsigned mask, const T& value, unsigned source, const Place& place) {
  static_assert(sizeof(T) <= LaneValues::kBytes);
  const LaneValues& values = meet(mask, &value, sizeof value, WarpOperation::kExchange, place);
  if (!(mask >> source % warpSize & 1))
    fail(to_string(place) + ": a shuffle reads a lane that is not in its mask");
  Unwatched unwatched;
  return values.get<T>(source % warpSize);
}

}  // namespace emu

inline void __syncwarp(unsigned mask = ~0u, emu::Place place = emu::Place::current()) {
  emu::meet(mask, nullptr, 0, emu::WarpOperation::kBarrier, place);
}
// Shuffles within `width` lanes; what would be beyond them is the lane's own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emu::Place place = emu::Place::current()) {
  const unsigned lane = emu::current().lane();
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  emu::Place place = emu::Place::current()) {
  const unsigned lane = emu::current().lane(), source = lane ^ bits;
  return emu::shuffle(mask, value, source / width > lane / width ? lane : source, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                   emu::Place place = emu::Place::current()) {
  const unsigned lane = emu::current().lane();
  return emu::shuffle(mask, value, lane % width + by < static_cast<unsigned>(width) ? lane + by : lane,
                      place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                 emu::Place place = emu::Place::current()) {
  const unsigned lane = emu::current().lane();
  return emu::shuffle(mask, value, lane % width >= by ? lane - by : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, emu::Place place = emu::Place::current()) {
  const emu::LaneValues& values = emu::meet(mask, &vote, sizeof vote, emu::WarpOperation::kExchange, place);
  emu::Unwatched unwatched;
  unsigned votes = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((mask >> lane & 1) && values.get<int>(lane)) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int vote, emu::Place place = emu::Place::current()) {
  return __ballot_sync(mask, vote, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, emu::Place place = emu::Place::current()) {
  return __ballot_sync(mask, vote, place) == mask;
}

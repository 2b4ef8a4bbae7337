// Feature maps of a batch, and the memory that operations on them work in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_kernels.h"
#include "channel_memory.h"
#include "operation_source.h"
#include "pilot.h"
#include "statistics.h"

namespace greedynas::cpu {

struct Shape {
  int64_t height, width, channels;

  int64_t pixels() const { return height * width; }
  Shape after(const OperationSource& op) const {
    return {ceil_div(height, op.stride), ceil_div(width, op.stride), op.out_channels};
  }
};

template <typename T>
struct Map {
  T* data = nullptr;  // with kSlackRows behind it where anything reads it
  Shape shape{};
  MapMoments<Compute<T>> moments{};  // null where nobody asks for them
  // Where a map without moments is finished that is not to be finished in place, and elements from one pixel
  // to the next there.
  T* finished = nullptr;
  int64_t finished_stride = 0;
};

template <typename T>
int64_t map_elements(int64_t images, const Shape& shape) {
  return (images * shape.pixels() + kSlackRows) * row_channels<T>(shape.channels);
}

// What lies behind a map is read in whole tiles; it only has to be there and be no trap.
template <typename T>
void clear_slack(const Map<T>& map, int64_t images) {
  const int64_t stride = row_channels<T>(map.shape.channels);
  std::fill_n(map.data + images * map.shape.pixels() * stride, kSlackRows * stride, T{});
}

inline constexpr int64_t kMostSegments = 8;  // of a map, whose products `finish` sums up separately

inline int64_t segments_of(int64_t pixels) { return std::min(kMostSegments, ceil_div(pixels, kGramPixels)); }

template <typename T>
struct Workspace {
  using C = Compute<T>;
  T* depthwise;
  double *partials, *segments;
  C* gates;  // means, then gates
  C* squeezed;
  char* channels;  // for ChannelMemory
  int64_t channel_bytes;
  // With known statistics there are this many parts of everything, each for a thread's slab.
  int64_t parts, depthwise_part, gates_part, squeezed_part;
};

// How many elements of each kind operations on `images` images need, `threads` working at once.
template <typename T>
struct WorkspaceNeeds {
  int64_t images, threads;
  bool of_batch;  // whether statistics are those of the batch
  int64_t depthwise = 0, partials = 0, segments = 0, gates = 0, squeezed = 0;
  int64_t channel_bytes = 0, pilot_bytes = 0;

  void consider(const OperationSource& o, const Shape& in) {
    if (o.kind == kIdentity) return;
    consider_channels(o);
    const Shape out = in.after(o);
    const SlabCut cut(images, out.pixels());
    const int64_t at_once = of_batch ? images : cut.images;
    depthwise = std::max(depthwise, at_once * out.pixels() * row_channels<T>(o.hidden_channels));
    gates = std::max(gates, o.se_channels ? 2 * at_once * row_channels<T>(o.hidden_channels) : 0);
    squeezed = std::max(squeezed, at_once * padded(o.se_channels));
    if (!of_batch) return;
    const int64_t blocks = std::max(cut.slabs * ceil_div(cut.images * out.pixels(), kBlockPixels),
                                    ceil_div(images * out.pixels(), kBlockPixels));
    partials = std::max({partials, cut.slabs * 3 * row_channels<T>(o.hidden_channels),
                         blocks * 3 * row_channels<T>(o.out_channels)});
  }

  // Moments and an affine map of each BatchNorm; of the hidden channels those of two, and a factor.
  void consider_channels(const OperationSource& o) {
    const int64_t values = 9 * row_channels<T>(o.hidden_channels) + 4 * row_channels<T>(o.out_channels);
    channel_bytes = std::max(channel_bytes, values * int64_t{sizeof(Compute<T>)});
  }

  void consider_affine(int64_t channels) {
    channel_bytes = std::max(channel_bytes, 2 * row_channels<T>(channels) * int64_t{sizeof(Compute<T>)});
  }

  void consider_moments(const Shape& shape) {
    const int64_t stride = row_channels<T>(shape.channels);
    segments = std::max(segments, segments_of(images * shape.pixels()) * stride * (stride + 1));
    // A pilot and the pixels that it is from: as they are, finished, and what is added; join_gram's shift.
    const int64_t pixel = 3 * kPilotPixels * int64_t{sizeof(T)};
    pilot_bytes =
        std::max(pilot_bytes, stride * (pixel + int64_t{sizeof(Compute<T>)} + int64_t{sizeof(double)}));
  }
};

// Offsets in bytes of a workspace, from `begin` on.
template <typename T>
struct WorkspaceLayout {
  using C = Compute<T>;
  WorkspaceNeeds<T> needs;
  int64_t parts, depthwise, partials, segments, gates, squeezed, channels, channel_bytes, end;

  WorkspaceLayout() = default;
  WorkspaceLayout(const WorkspaceNeeds<T>& of, int64_t begin)
      : needs(of),
        parts(of.of_batch ? 1 : std::max<int64_t>(1, std::min(of.threads, of.images))),
        end(begin) {
    // Multiples of 64 elements, of whatever size.
    for (int64_t* count : {&needs.depthwise, &needs.gates, &needs.squeezed}) *count = whole_lines(*count);
    depthwise = add(parts * needs.depthwise, sizeof(T));
    partials = add(needs.partials, sizeof(double));
    segments = add(needs.segments, sizeof(double));
    gates = add(parts * needs.gates, sizeof(C));
    squeezed = add(parts * needs.squeezed, sizeof(C));
    // Of two operations: the stem's convolution is finished by the block that reads it.
    channel_bytes = 2 * needs.channel_bytes + needs.pilot_bytes;
    channels = add(channel_bytes, 1);
  }

  int64_t add(int64_t count, int64_t size) {
    const int64_t offset = end;
    end += whole_lines(count * size);
    return offset;
  }

  Workspace<T> at(char* base) const {
    return {reinterpret_cast<T*>(base + depthwise),
            reinterpret_cast<double*>(base + partials),
            reinterpret_cast<double*>(base + segments),
            reinterpret_cast<C*>(base + gates),
            reinterpret_cast<C*>(base + squeezed),
            base + channels,
            channel_bytes,
            parts,
            needs.depthwise,
            needs.gates,
            needs.squeezed};
  }
};

}  // namespace greedynas::cpu

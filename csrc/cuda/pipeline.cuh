// A product's depth comes in chunks. A pipeline of stages brings chunks of both operands to shared memory, a
// few ahead of the one that is multiplied, across the borders of tiles; a matrix that fits stays there.
#pragma once

#include <algorithm>
#include <cstddef>

#include "device.h"

namespace greedynas::cuda {

// How a block divides its shared memory: stages of pixels, then slots of weights (one a chunk where all of
// them fit, else one a stage), then what else the kernel needs.
struct PipelinePlan {
  int stages, weight_slots;
  std::size_t bytes;
};

// As many blocks a multiprocessor as leave place for three stages. `most` blocks are enough.
inline PipelinePlan plan_pipeline(int chunks, std::size_t pixel_bytes, std::size_t weight_bytes,
                                  std::size_t other_bytes, int most) {
  const auto plan = [&](int stages, int slots) {
    return PipelinePlan{stages, slots, stages * pixel_bytes + slots * weight_bytes + other_bytes};
  };
  const std::size_t all = shared_bytes_per_block();
  for (int blocks = most; blocks > 0; --blocks) {
    const std::size_t limit = (all + 1024) / blocks - 1024;  // of each block 1 KB is the system's
    for (const bool resident : {true, false}) {
      for (int stages = 4; stages > 2; --stages) {
        const PipelinePlan p = plan(stages, resident ? std::max(chunks, 1) : stages);
        if (p.bytes <= limit) return p;
      }
    }
  }
  return plan(2, 2);
}

// Runs `tiles` tiles of `chunks` chunks through the stages:
//   load_pixels(tile, chunk, stage), load_weights(chunk, slot)   start copies
//   finish_pixels(tile, chunk, stage)   once this thread's own copies are there, before others read them
//   multiply(chunk, stage, slot)
//   finish_tile(tile)   while copies for the next one are on the way
// Where pixels wait in registers, in between, there are two stages.
template <typename LoadPixels, typename LoadWeights, typename FinishPixels, typename Multiply,
          typename FinishTile>
__device__ __forceinline__ void run_pipeline(int tiles, int chunks, int stages, int weight_slots,
                                             const LoadPixels& load_pixels, const LoadWeights& load_weights,
                                             const FinishPixels& finish_pixels, const Multiply& multiply,
                                             const FinishTile& finish_tile) {
  const bool resident = chunks <= weight_slots;
  int next_tile = 0, next_chunk = 0;
  const auto load = [&](int stage) {
    if (next_tile < tiles) {
      load_pixels(next_tile, next_chunk, stage);
      if (!resident || next_tile == 0) load_weights(next_chunk, resident ? next_chunk : stage);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        ++next_tile;
      }
    }
    commit_copies();
  };
  for (int stage = 0; stage + 1 < stages; ++stage) load(stage);
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (stages == 2) {
        wait_for_copies<0>();
      } else if (stages == 3) {
        wait_for_copies<1>();
      } else {
        wait_for_copies<2>();
      }
      finish_pixels(tile, chunk, stage);
      __syncthreads();  // the stage is filled, and the one before has been read
      load(stage == 0 ? stages - 1 : stage - 1);
      multiply(chunk, stage, resident ? chunk : stage);
      if (++stage == stages) stage = 0;
    }
    finish_tile(tile);
  }
}

}  // namespace greedynas::cuda

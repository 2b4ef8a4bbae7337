// A CUDA runtime without a device: what the host side of kernels calls, and no more.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace recorded {

// Of the device that there would be; the latter of a block.
extern int multiprocessors, shared_bytes;

// Called for every launch. `symbol`: the kernel's mangled name.
void launch(const std::string& symbol, dim3 grid, dim3 block, void** arguments, std::size_t shared);

}  // namespace recorded

// CUDA on the host, for tests: what csrc/cuda/device.h has from nvcc, it has from here elsewhere.
//
// Every CUDA thread is a fiber on one thread of the machine, and runs until it has to wait for others. So a
// kernel's results can be compared with those of plain code, in several orders of its threads; and mistakes
// that a device may pass over are errors: the launch throws std::runtime_error, "emulation: ...". Built with
// the address or the thread sanitizer, which are told about fibers, more mistakes are found;
// tests/emulation/test_emulator.py says which are found by what. A tracing build counts what kernels do with
// memory (trace/trace.cpp). It knows nothing of time.
//
// In the environment, EMULATION_ORDER (forward, reverse, random) and EMULATION_SEED choose the order.
#pragma once

#include "emulation/arithmetic.h"
#include "emulation/async_copy.h"
#include "emulation/atomics.h"
#include "emulation/barrier.h"
#include "emulation/half.h"
#include "emulation/language.h"
#include "emulation/launch.h"
#include "emulation/shared_memory.h"
#include "emulation/tensor_core.h"
#include "emulation/thread.h"
#include "emulation/warp.h"

// The second evaluation of a chain (kernel_chain.h) allocates nothing, in any precision and with any
// statistics and number of threads, and gives the bits of the first. Built and run by test_kernels.py.
#include "allocation_count.h"
#include "cpu/buffer.h"
#include "kernel_chain.h"

namespace {

using namespace reference;

const char* name_of(Statistics statistics) {
  switch (statistics) {
    case Statistics::kBatch:
      return "the batch's";
    case Statistics::kCapture:
      return "captures";
    case Statistics::kRunning:
      return "running";
    default:
      return "captured";
  }
}

// How much the counter counts during `work()`.
template <typename Work>
int64_t allocated(const Work& work) {
  const int64_t before = allocations;
  work();
  return allocations - before;
}

void check_counter() {
  std::unique_ptr<int> one;
  std::vector<int> many;
  if (allocated([&] { one = std::make_unique<int>(1); }) != 1)
    fail("a number is not counted as one allocation");
  if (allocated([&] { many.resize(1000); }) != 1) fail("a vector is not counted as one allocation");
#if defined(__GLIBC__)
  Buffer<char> buffer;
  if (allocated([&] { buffer = make_buffer<char>(1000); }) != 1) fail("a buffer is not counted");
#endif
  int64_t elsewhere = 0;
  std::thread([&] { elsewhere = allocated([&] { many.resize(100000); }); }).join();
  if (elsewhere != 1) fail("another thread's vector is not counted as one allocation");
}

template <typename C>
std::string chain_case(Precision precision) {
  const RandomChain<C> chain(precision);
  std::string kernels;
  for (const int threads : {1, 2, 3}) {
    const ThreadTeam team(threads);
    const auto evaluation = chain.make(team);
    kernels = evaluation->kernels();
    for (const auto statistics :
         {Statistics::kBatch, Statistics::kRunning, Statistics::kCapture, Statistics::kConstants}) {
      for (const auto traversal : {Traversal::kDepthFirst, Traversal::kLayerByLayer}) {
        const std::string what =
            kernels + ", " + std::to_string(threads) + " threads, statistics: " + name_of(statistics) + ": ";
        int64_t count = -1;
        const auto counted = [&](const auto& work) { count = allocated(work); };
        const Losses first = chain.run(*evaluation, statistics, traversal, team);
        for (const double seconds : {1e9, 0.0}) {  // all at once, and node by node
          const Losses again = chain.run(*evaluation, statistics, traversal, team, seconds, counted);
          if (count != 0) fail(what + std::to_string(count) + " allocations in a later evaluation");
          if (statistics != Statistics::kCapture)
            same_bits(what + "a later evaluation differs", again, first);
        }
      }
    }
  }
  return kernels;
}

}  // namespace

int main() {
  check_counter();
  const std::string exact = chain_case<double>(Precision::kFloat64);
  const std::string single = chain_case<float>(Precision::kFloat32);
  const std::string half = chain_case<float>(Precision::kBFloat16);
  std::printf("no allocations: %s, %s, %s\n", exact.c_str(), single.c_str(), half.c_str());
  return 0;
}

// How the CUDA kernels would be launched on a device, without one: the host side of csrc/cuda as nvcc
// compiles it, linked with a runtime (recorded_runtime.cpp) that hands launches over instead of launching
// anything.
//
// Usage: record_launches MULTIPROCESSORS SHARED_BYTES < CASES
// A line of CASES is the name of a function of kernels.h and numbers (see `cases`); for each, a line of JSON
// is printed: {"launches": [...]} or {"error": "..."}. Addresses are never followed.
#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "choice_block.h"
#include "expand_depthwise_tiling.h"
#include "finish_map.cuh"
#include "kernels.h"
#include "recorded_runtime.h"

namespace cuda = greedynas::cuda;
using Map = cuda::BFloat16;  // what is modelled

namespace {

std::vector<std::string> launches;

// What the model has to know of a launch beyond its grid: the plan, as the kernel is told.
std::string plan_of(const std::string& symbol, void** arguments) {
  std::ostringstream out;
  const auto number = [&](int at) { return *static_cast<const int*>(arguments[at]); };
  if (symbol.find("expand_depthwise_kernel") != std::string::npos) {
    const auto& shape = *static_cast<const cuda::expand::Shape*>(arguments[1]);
    const auto& tiling = *static_cast<const cuda::expand::Tiling*>(arguments[2]);
    const auto& layout = *static_cast<const cuda::expand::Layout*>(arguments[3]);
    out << "\"group\": " << shape.group << ", \"images\": " << tiling.images << ", \"rows\": " << tiling.rows
        << ", \"cols\": " << tiling.cols << ", \"step\": " << tiling.step
        << ", \"ring_bytes\": " << layout.x - layout.ring
        << ", \"places\": " << (layout.sums - layout.place) / 4 << ", \"groups_per_block\": " << number(4)
        << ", \"group_blocks\": " << number(5);
  } else if (symbol.find("moments_kernel") != std::string::npos) {
    const auto& cut = *static_cast<const cuda::MomentsCut*>(arguments[1]);
    out << "\"chunk\": " << cut.chunk << ", \"chunks\": " << cut.chunks
        << ", \"block_tiles\": " << cut.block_tiles << ", \"window_pairs\": " << cut.window_pairs()
        << ", \"floats\": " << cut.floats();
  } else if (symbol.find("project_kernelI") != std::string::npos) {
    out << "\"passes\": " << number(1) << ", \"stages\": " << number(2)
        << ", \"weight_slots\": " << number(3);
  } else if (symbol.find("strided_conv_kernel") != std::string::npos) {
    out << "\"passes\": " << number(2) << ", \"stages\": " << number(3)
        << ", \"weight_slots\": " << number(4);
  } else if (symbol.find("stem_conv_kernel") != std::string::npos) {
    out << "\"depth\": " << number(2) << ", \"passes\": " << number(3) << ", \"weight_slots\": " << number(4);
  } else if (symbol.find("head_pool_kernel") != std::string::npos) {
    out << "\"images_each\": " << number(1) << ", \"stages\": " << number(2)
        << ", \"weight_slots\": " << number(3);
  }
  return out.str();
}

template <typename V>
V* somewhere() {
  return reinterpret_cast<V*>(256);
}

template <typename Node>
void launch(void (*function)(const cuda::Group<Node>&, cuda::Stream), const Node& node) {
  cuda::Group<Node> group{};
  group.nodes[0] = node;
  group.count = 1;
  function(group, nullptr);
}

cuda::PointwiseOutput<Map> output(int channels, bool mapped) {
  cuda::PointwiseOutput<Map> out{};
  out.y = somewhere<Map>();
  out.channels = channels;
  if (mapped) {
    out.affine = somewhere<float>();
  } else {
    out.partials = somewhere<float>();
  }
  return out;
}

using Numbers = std::vector<int>;
struct Case {
  std::size_t numbers;
  std::function<void(const Numbers&)> run;
};

const std::map<std::string, Case> cases{
    // images height width in hidden kernel stride activation
    {"expand_depthwise",
     {8,
      [](const Numbers& n) {
        cuda::ExpandDepthwise<Map> node{};
        node.partials = somewhere<float>();
        node.images = n[0], node.height = n[1], node.width = n[2], node.in_channels = n[3];
        node.hidden_channels = n[4], node.kernel = n[5], node.stride = n[6], node.activation = n[7];
        launch(cuda::expand_depthwise<Map>, node);
      }}},
    // pixels, pixels of an image, hidden, channels, mapped, activation
    {"project",
     {6,
      [](const Numbers& n) {
        cuda::Project<Map> node{};
        node.pixels = n[0], node.image_pixels = n[1], node.hidden_channels = n[2];
        node.out = output(n[3], n[4] != 0);
        node.activation = n[5];
        launch(cuda::project<Map>, node);
      }}},
    // pixels channels residual moments activation
    {"finish_map",
     {5,
      [](const Numbers& n) {
        cuda::FinishMap<Map> node{};
        node.affine = somewhere<float>();
        node.residual = n[2] ? somewhere<Map>() : nullptr;
        node.mean = node.covariance = n[3] ? somewhere<float>() : nullptr;
        node.pixels = n[0], node.channels = n[1], node.activation = n[4];
        launch(cuda::finish_map<Map>, node);
      }}},
    // images height width in channels stride mapped
    {"strided_conv",
     {7,
      [](const Numbers& n) {
        cuda::StridedConv<Map> node{};
        node.images = n[0], node.height = n[1], node.width = n[2], node.in_channels = n[3];
        node.out = output(n[4], n[6] != 0);
        node.stride = n[5];
        launch(cuda::strided_conv<Map>, node);
      }}},
    // images height width in channels kernel stride mapped
    {"stem_conv",
     {8,
      [](const Numbers& n) {
        cuda::StemConv<Map> node{};
        node.images_count = n[0], node.height = n[1], node.width = n[2], node.in_channels = n[3];
        node.out = output(n[4], n[7] != 0);
        node.kernel = n[5], node.stride = n[6];
        cuda::stem_conv(node, nullptr);
      }}},
    // images, pixels of an image, in, channels, activation
    {"head_pool",
     {5,
      [](const Numbers& n) {
        cuda::HeadPool<Map> node{};
        node.images = n[0], node.image_pixels = n[1], node.in_channels = n[2], node.channels = n[3];
        node.activation = n[4];
        launch(cuda::head_pool<Map>, node);
      }}},
    // rows depth channels
    {"linear",
     {3,
      [](const Numbers& n) {
        cuda::Linear node{};
        node.rows = n[0], node.depth = node.in_stride = n[1], node.channels = node.out_stride = n[2];
        launch(cuda::linear, node);
      }}},
    // images, pixels of an image, channels, activation
    {"squeeze",
     {4,
      [](const Numbers& n) {
        cuda::Squeeze<cuda::StoredOf<Map>> node{};
        node.images = n[0], node.image_pixels = n[1], node.channels = n[2], node.activation = n[3];
        launch(cuda::squeeze<cuda::StoredOf<Map>>, node);
      }}},
    // in channels
    {"pointwise_affine",
     {2,
      [](const Numbers& n) {
        cuda::PointwiseAffine<Map> node{};
        node.in_channels = n[0], node.channels = n[1];
        launch(cuda::pointwise_affine<Map>, node);
      }}},
    // units channels
    {"norm_affine",
     {2,
      [](const Numbers& n) {
        cuda::NormAffine node{};
        node.partials = somewhere<float>();
        node.units = n[0], node.channels = n[1];
        launch(cuda::norm_affine, node);
      }}},
};

void run(const std::string& line) {
  std::istringstream in(line);
  std::string name;
  in >> name;
  Numbers numbers;
  for (int number; in >> number;) numbers.push_back(number);
  const Case& found = cases.at(name);
  if (numbers.size() != found.numbers) {
    throw std::invalid_argument(name + ": expected " + std::to_string(found.numbers) + " numbers, got " +
                                std::to_string(numbers.size()));
  }
  found.run(numbers);
}

}  // namespace

namespace recorded {

void launch(const std::string& symbol, dim3 grid, dim3 block, void** arguments, std::size_t shared) {
  std::ostringstream out;
  out << "{\"symbol\": \"" << symbol << "\", \"grid\": [" << grid.x << ", " << grid.y << ", " << grid.z
      << "], \"threads\": " << block.x * block.y * block.z << ", \"dynamic_shared\": " << shared
      << ", \"plan\": {" << plan_of(symbol, arguments) << "}}";
  launches.push_back(out.str());
}

}  // namespace recorded

int main(int count, char** arguments) {
  if (count != 3) {
    std::fputs("usage: record_launches MULTIPROCESSORS SHARED_BYTES < CASES\n", stderr);
    return 2;
  }
  recorded::multiprocessors = std::stoi(arguments[1]);
  recorded::shared_bytes = std::stoi(arguments[2]);
  for (std::string line; std::getline(std::cin, line);) {
    launches.clear();
    try {
      run(line);
      std::string all;
      for (const std::string& launch : launches) all += (all.empty() ? "" : ", ") + launch;
      std::cout << "{\"launches\": [" << all << "]}\n";
    } catch (const std::exception& error) {
      std::cout << "{\"error\": \"" << error.what() << "\"}\n";
    }
  }
}

// The kernels one by one, for tests and benchmarks: a struct of kernels.h is a Python class whose addresses
// are integers, and a launch takes a list of them and a stream. What is a template on the type of maps is in
// a submodule for each type: bf16 and fp16.
#include "kernels_module.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace greedynas::cuda {
namespace {

template <typename T>
T* address(intptr_t value) {
  return reinterpret_cast<T*>(value);
}

// Sets members by their names, so that a call says what it passes.
template <typename Struct>
class Fields {
 public:
  Fields(py::module_& module, const char* name) : class_(module, name, py::module_local()) {
    class_.def(py::init([cls = class_](const py::kwargs& values) {
      py::object self = py::cast(Struct{});
      for (const auto& item : values) {
        if (!py::hasattr(self, item.first)) {
          throw std::invalid_argument("no member " + py::str(item.first).cast<std::string>());
        }
        py::setattr(self, item.first, item.second);
      }
      return self.cast<Struct>();
    }));
  }
  template <typename Member>
  Fields& operator()(const char* name, Member Struct::* member) {
    if constexpr (std::is_pointer_v<Member>) {
      class_.def_property(
          name, [member](const Struct& s) { return reinterpret_cast<intptr_t>(s.*member); },
          [member](Struct& s, intptr_t value) { s.*member = address<std::remove_pointer_t<Member>>(value); });
    } else if constexpr (std::is_array_v<Member>) {
      class_.def_property(
          name,
          [member](const Struct& s) {
            return std::vector<int64_t>(std::begin(s.*member), std::end(s.*member));
          },
          [member](Struct& s, const std::array<int64_t, std::extent_v<Member>>& value) {
            std::copy(value.begin(), value.end(), s.*member);
          });
    } else {
      class_.def_readwrite(name, member);
    }
    return *this;
  }

 private:
  py::class_<Struct> class_;
};

template <typename Node>
void launch(py::module_& module, const char* name, void (*function)(const Group<Node>&, Stream)) {
  module.def(
      name,
      [function](const std::vector<Node>& nodes, intptr_t stream) {
        if (nodes.empty() || nodes.size() > kMaxNodes) {
          throw std::invalid_argument("nodes: expected 1 to " + std::to_string(kMaxNodes) + ", got " +
                                      std::to_string(nodes.size()));
        }
        Group<Node> group{};
        std::copy(nodes.begin(), nodes.end(), group.nodes);
        group.count = static_cast<int>(nodes.size());
        function(group, reinterpret_cast<Stream>(stream));
      },
      py::arg("nodes"), py::arg("stream") = 0);
}

template <typename Arguments>
void launch(py::module_& module, const char* name, void (*function)(const Arguments&, Stream)) {
  module.def(
      name,
      [function](const Arguments& arguments, intptr_t stream) {
        function(arguments, reinterpret_cast<Stream>(stream));
      },
      py::arg("arguments"), py::arg("stream") = 0);
}

#define MEMBER(name) (#name, &S::name)

void bind_untyped(py::module_& module) {
  {
    using S = BatchNorm;
    Fields<S>(module, "BatchNorm") MEMBER(gamma) MEMBER(beta) MEMBER(factor) MEMBER(eps);
  }
  {
    using S = NormAffine;
    Fields<S>(module, "NormAffine") MEMBER(partials) MEMBER(mean) MEMBER(variance) MEMBER(stored_factor)
        MEMBER(affine) MEMBER(keep) MEMBER(norm) MEMBER(units) MEMBER(channels) MEMBER(activation);
    launch(module, "norm_affine", norm_affine);
  }
  {
    using S = Linear;
    Fields<S>(module, "Linear") MEMBER(input) MEMBER(weight) MEMBER(bias) MEMBER(output) MEMBER(rows)
        MEMBER(depth) MEMBER(in_stride) MEMBER(channels) MEMBER(out_stride) MEMBER(activation);
    launch(module, "linear", linear);
  }
  {
    using S = PathCrossEntropy;
    Fields<S>(module, "PathCrossEntropy") MEMBER(logits) MEMBER(targets) MEMBER(image_losses) MEMBER(correct)
        MEMBER(status) MEMBER(paths) MEMBER(images) MEMBER(classes) MEMBER(label_smoothing);
    launch(module, "path_cross_entropy", path_cross_entropy);
  }
  {
    using S = SelectTopK;
    Fields<S>(module, "SelectTopK") MEMBER(losses) MEMBER(indices) MEMBER(count) MEMBER(k);
    launch(module, "select_top_k", select_top_k);
  }
  {
    using S = PackNorm;
    Fields<S>(module, "PackNorm") MEMBER(gamma) MEMBER(beta) MEMBER(packed_gamma) MEMBER(packed_beta)
        MEMBER(factor) MEMBER(channels);
    launch(module, "pack_norms", pack_norms);
  }
}

template <typename T>
void bind_of_maps(py::module_& module) {
  {
    using S = PointwiseAffine<T>;
    Fields<S>(module, "PointwiseAffine") MEMBER(mean) MEMBER(covariance) MEMBER(weight) MEMBER(stored_factor)
        MEMBER(affine) MEMBER(keep) MEMBER(norm) MEMBER(in_channels) MEMBER(channels) MEMBER(activation);
    launch<PointwiseAffine<T>>(module, "pointwise_affine", pointwise_affine);
  }
  {
    using S = FinishMap<T>;
    Fields<S>(module, "FinishMap") MEMBER(map) MEMBER(affine) MEMBER(residual) MEMBER(mean) MEMBER(covariance)
        MEMBER(partials) MEMBER(pixels) MEMBER(channels) MEMBER(activation);
    module.def("finish_map_floats", finish_map_floats<T>, py::arg("pixels"), py::arg("channels"));
    launch<FinishMap<T>>(module, "finish_map", finish_map);
  }
  {
    using S = ExpandDepthwise<T>;
    Fields<S>(module, "ExpandDepthwise") MEMBER(x) MEMBER(expand) MEMBER(affine) MEMBER(depthwise) MEMBER(d)
        MEMBER(partials) MEMBER(images) MEMBER(height) MEMBER(width) MEMBER(in_channels)
            MEMBER(hidden_channels) MEMBER(kernel) MEMBER(stride) MEMBER(activation);
    module.def("expand_depthwise_units", expand_depthwise_units<T>, py::arg("node"));
    launch<ExpandDepthwise<T>>(module, "expand_depthwise", expand_depthwise);
  }
  {
    using S = PointwiseOutput<T>;
    Fields<S>(module, "PointwiseOutput") MEMBER(y) MEMBER(partials) MEMBER(affine) MEMBER(residual)
        MEMBER(channels) MEMBER(activation);
    module.def("pointwise_units", pointwise_units<T>, py::arg("pixels"));
  }
  {
    using S = Project<T>;
    Fields<S>(module, "Project") MEMBER(d) MEMBER(affine) MEMBER(gates) MEMBER(weight) MEMBER(out)
        MEMBER(pixels) MEMBER(image_pixels) MEMBER(hidden_channels) MEMBER(activation);
    launch<Project<T>>(module, "project", project);
  }
  {
    using S = StridedConv<T>;
    Fields<S>(module, "StridedConv") MEMBER(x) MEMBER(weight) MEMBER(out) MEMBER(images) MEMBER(height)
        MEMBER(width) MEMBER(in_channels) MEMBER(stride);
    launch<StridedConv<T>>(module, "strided_conv", strided_conv);
  }
  {
    using S = StemConv<T>;
    Fields<S>(module, "StemConv") MEMBER(images) MEMBER(strides) MEMBER(weight) MEMBER(out)
        MEMBER(images_count) MEMBER(height) MEMBER(width) MEMBER(in_channels) MEMBER(kernel) MEMBER(stride);
    launch(module, "stem_conv", stem_conv<T>);
  }
  {
    using S = HeadPool<T>;
    Fields<S>(module, "HeadPool") MEMBER(x) MEMBER(weight) MEMBER(affine) MEMBER(pooled) MEMBER(images)
        MEMBER(image_pixels) MEMBER(in_channels) MEMBER(channels) MEMBER(activation);
    launch<HeadPool<T>>(module, "head_pool", head_pool);
  }
  {
    using S = PackPointwise<T>;
    Fields<S>(module, "PackPointwise") MEMBER(weight) MEMBER(packed) MEMBER(stored_factor) MEMBER(rows)
        MEMBER(in_channels) MEMBER(taps) MEMBER(packed_columns) MEMBER(pitch);
    launch<PackPointwise<T>>(module, "pack_pointwise", pack_pointwise);
  }
}

// Sources are given as tuples, in the order of ChannelSource's members.
template <typename From, typename To>
void bind_arrange_channels(py::module_& module, const char* name) {
  using Source = std::array<int64_t, 7>;
  module.def(
      name,
      [](const std::vector<Source>& sources, intptr_t out, int out_row, int activation, int64_t pixels,
         intptr_t stream) {
        if (sources.size() > std::size_t{kMaxSources})
          throw std::invalid_argument("sources: expected at most " + std::to_string(kMaxSources));
        ArrangeChannels<From, To> a{};
        for (const auto& [map, row, first, step, count, to_first, to_step] : sources) {
          const auto number = [](int64_t value) { return static_cast<int>(value); };
          a.sources[a.count++] = {
              address<const From>(map), number(row),    number(first), number(step), number(count),
              number(to_first),         number(to_step)};
        }
        a.out = address<To>(out);
        a.out_row = out_row;
        a.activation = activation;
        a.pixels = pixels;
        arrange_channels(a, reinterpret_cast<Stream>(stream));
      },
      py::arg("sources"), py::arg("out"), py::arg("out_row"), py::arg("activation"), py::arg("pixels"),
      py::arg("stream") = 0);
}

template <typename T>
void bind_of_units(py::module_& module) {
  bind_arrange_channels<T, T>(module, "arrange_channels");
  {
    using S = DepthwiseConv<T>;
    Fields<S>(module, "DepthwiseConv") MEMBER(x) MEMBER(affine) MEMBER(weight) MEMBER(stored_factor) MEMBER(y)
        MEMBER(images) MEMBER(height) MEMBER(width) MEMBER(channels) MEMBER(kernel) MEMBER(stride)
            MEMBER(activation);
    launch(module, "depthwise_conv", depthwise_conv<T>);
  }
  {
    using S = Pool<T>;
    Fields<S>(module, "Pool") MEMBER(x) MEMBER(affine) MEMBER(y) MEMBER(partials) MEMBER(images)
        MEMBER(height) MEMBER(width) MEMBER(channels) MEMBER(kernel) MEMBER(stride) MEMBER(pooling)
            MEMBER(activation);
    launch(module, "pool", pool<T>);
  }
}

// What several types of maps share.
template <typename Stored>
void bind_of_stored(py::module_& module) {
  {
    using S = Squeeze<Stored>;
    Fields<S>(module, "Squeeze") MEMBER(d) MEMBER(affine) MEMBER(factor) MEMBER(pooled) MEMBER(images)
        MEMBER(image_pixels) MEMBER(channels) MEMBER(activation);
    launch<Squeeze<Stored>>(module, "squeeze", squeeze);
  }
  {
    using S = PackDepthwise<Stored>;
    Fields<S>(module, "PackDepthwise") MEMBER(weight) MEMBER(before_factor) MEMBER(packed)
        MEMBER(stored_factor) MEMBER(channels) MEMBER(taps) MEMBER(pitch);
    launch<PackDepthwise<Stored>>(module, "pack_depthwise", pack_depthwise);
  }
  {
    using S = PackProject<Stored>;
    Fields<S>(module, "PackProject") MEMBER(weight) MEMBER(column_factor) MEMBER(packed) MEMBER(stored_factor)
        MEMBER(rows) MEMBER(columns) MEMBER(pitch);
    launch<PackProject<Stored>>(module, "pack_project", pack_project);
  }
}

}  // namespace

void bind_kernels(py::module_& module) {
  bind_untyped(module);
  py::module_ floats = module.def_submodule("fp32", "For maps in single precision.");
  bind_of_stored<float>(floats);
  bind_of_maps<float>(floats);
  bind_of_units<float>(floats);
  py::module_ halves = module.def_submodule("fp16", "For maps in half precision.");
  bind_of_stored<Half>(halves);
  py::module_ bfloat16 = module.def_submodule("bf16", "For maps in bfloat16.");
  for (const char* name :
       {"Squeeze", "squeeze", "PackDepthwise", "pack_depthwise", "PackProject", "pack_project"}) {
    bfloat16.attr(name) = halves.attr(name);
  }
  bind_of_maps<Half>(halves);
  bind_of_units<Half>(halves);
  bind_arrange_channels<Half, float>(halves, "widen_channels");
  bind_of_maps<BFloat16>(bfloat16);
  bind_of_units<BFloat16>(bfloat16);
  bind_arrange_channels<BFloat16, float>(bfloat16, "widen_channels");
}

}  // namespace greedynas::cuda

// The table of one instruction set's kernels; a constant, so that nothing of it runs where it is not
// supported.

template <typename T>
constexpr Kernels<T> make_kernels() {
  using C = Compute<T>;
  Kernels<T> kernels{};
  kernels.name = GREEDYNAS_LEVEL_NAME;
  kernels.group_width = kGroupWidth<C>;
  kernels.depth_multiple = packed_depth<T>(1);
  kernels.expand_depthwise = &expand_depthwise<T>;
  kernels.project = &project<T>;
  kernels.strided = &strided<T>;
  kernels.patches = &patches<T>;
  kernels.finish = &finish<T>;
  kernels.pointwise_moments = &pointwise_moments<T>;
  kernels.squeeze = &squeeze<T>;
  kernels.linear = &linear<C>;
  kernels.head_pool = &head_pool<T>;
  return kernels;
}

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
  kernels.pool = &pool<T>;
  kernels.finish = &finish<T>;
  kernels.pointwise_moments = &pointwise_moments<T>;
  kernels.squeeze = &squeeze<T>;
  kernels.linear = &linear<C>;
  kernels.head_pool = &head_pool<T>;
#ifdef GREEDYNAS_AMX
  kernels.expand_depthwise = &expand_depthwise_tiles;
  kernels.squeeze = &squeeze_tiles;
  kernels.finish = &finish_tiles;
  kernels.head_pool = &head_pool_tiles;
  kernels.project = &project_tiles;
  kernels.patches = &patches_tiles;
  kernels.to_halves = &to_halves;
  kernels.pack_tiles = &pack_tiles;
  kernels.largest_of_rows = &largest_of_rows;
#endif
  return kernels;
}

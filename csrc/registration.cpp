// The schemas of all ops, whatever the backend; greedynas_ext/ops.py documents them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(greedynas, library) {
  library.def(
      "path_cross_entropy(Tensor logits, Tensor targets, float label_smoothing=0.0)"
      " -> (Tensor losses, Tensor image_losses, Tensor correct)");
  library.def("select_top_k(Tensor losses, int k) -> Tensor");
  library.def(
      "mixed_op(Tensor inputs, Tensor input_index, Tensor op_index, Tensor weights, int[] op_table,"
      " float[] bn_eps, Tensor? statistics=None) -> (Tensor outputs, Tensor used_statistics)");
}

// Every operator's schema: the library's table of contents. Python (pyreg/ops) adds fake, autograd and vmap rules.
#include <torch/csrc/stable/library.h>

#define PYREG_DEFINE(library, variable) STABLE_TORCH_LIBRARY(library, variable)

PYREG_DEFINE(PYREG_LIBRARY, library) {
  // StableMax: csrc/stablemax, pyreg/ops/stablemax.py
  library.def("stablemax(Tensor input, int dim, ScalarType dtype) -> Tensor");
  library.def("stablemax_backward(Tensor grad_output, Tensor input, int dim) -> Tensor");
  library.def("log_stablemax(Tensor input, int dim, ScalarType dtype) -> Tensor");
  library.def("log_stablemax_backward(Tensor grad_output, Tensor input, int dim) -> Tensor");
  library.def(
      "stablemax_cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType loss_dtype) -> (Tensor loss, Tensor saved)");
  library.def(
      "stablemax_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor saved, "
      "int reduction, int ignore_index, float label_smoothing) -> Tensor");
  library.def(
      "stablemax_cross_entropy_with_gradient(Tensor input, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing, ScalarType loss_dtype) -> (Tensor loss, Tensor saved, Tensor "
      "grad_input)");
  library.def(
      "stablemax_cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType loss_dtype) -> Tensor");

  // Linear + StableMax: pyreg/ops/linear_stablemax.py
  library.def(
      "linear_stablemax_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? "
      "weight, int reduction, int ignore_index, float label_smoothing, ScalarType compute_dtype, ScalarType "
      "loss_dtype, bool[] needs_grad) -> (Tensor loss, Tensor total_weight, Tensor grad_input, Tensor grad_weight, "
      "Tensor grad_bias)");
  library.def(
      "linear_stablemax_cross_entropy_backward(Tensor grad_rows, Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int ignore_index, float label_smoothing, ScalarType compute_dtype, bool[] "
      "needs_grad) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // Upstream gradients of gradients formed in the forward pass: csrc/scale_rows, pyreg/ops/scale_rows.py
  library.def("scale_rows_(Tensor(a!) rows, Tensor factor) -> ()");

  // OrthoGrad: csrc/orthograd, pyreg/ops/orthograd.py
  library.def("orthogonalize_gradients_(Tensor[] params, Tensor(a!)[] grads) -> ()");

  // Weight compander: csrc/weight_compander, pyreg/ops/weight_compander.py. For vs[i], a is constants[a[i]] or,
  // where a[i] is negative, numbers[-1 - a[i]]; b likewise.
  library.def(
      "weight_compander(Tensor[] vs, Tensor[] constants, float[] numbers, int[] a, int[] b, int kind) -> Tensor[]");
  library.def(
      "weight_compander_backward(Tensor[] grads, Tensor[] vs, Tensor[] constants, float[] numbers, int[] a, int[] b, "
      "int kind, int[] needs_grad) -> Tensor[]");
  library.def(
      "to_weight_gradients_(Tensor(a!)[] grads, Tensor[] vs, Tensor[] constants, float[] numbers, int[] a, int[] b, "
      "int kind, float decay_on_w, float decay_on_v) -> ()");
  library.def(
      "rescale_steps_(Tensor(a!)[] vs, Tensor[] old_vs, Tensor[] constants, float[] numbers, int[] a, int[] b, "
      "int kind) -> ()");
}

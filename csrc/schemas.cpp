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
  // Of some of the classes, the others being on other ranks of a process group: pyreg/ops/_class_shards.py.
  library.def(
      "stablemax_cross_entropy_sharded(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType loss_dtype, int first_class, int num_classes, str group) -> (Tensor loss, "
      "Tensor saved, Tensor local_target)");

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
  // The same of shards in several processes, step by step: sums [n, 3] and residuals [n] are added up in between.
  library.def("orthograd_sums(Tensor[] params, Tensor[] grads) -> Tensor");
  library.def("orthograd_residuals(Tensor[] params, Tensor[] grads, Tensor sums) -> Tensor");
  library.def("orthograd_update_(Tensor[] params, Tensor(a!)[] grads, Tensor sums, Tensor residuals) -> ()");

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

  // ConR: csrc/conr, pyreg/ops/conr.py. `statistics` [3, rows] of this family holds what the gradient takes of each
  // row: the log of its denominator and the weights of its two terms (csrc/core/pairs.h). A row_count of -1 is all
  // rows: a number in a schema would be compiled in, and be compiled anew for every other.
  library.def(
      "conr(Tensor features, Tensor targets, Tensor preds, Tensor? weights, float window, float temperature, float "
      "eta, int variant, int label_norm, int reduction, ScalarType loss_dtype, int first_row, int row_count, bool "
      "with_gradient) -> (Tensor loss, Tensor statistics, Tensor grad_features)");
  library.def(
      "conr_backward(Tensor grad_rows, Tensor features, Tensor targets, Tensor preds, Tensor? weights, Tensor "
      "statistics, float window, float temperature, float eta, int variant, int label_norm, int first_row, int "
      "row_count) -> Tensor");

  // Supervised contrastive: csrc/supcon, pyreg/ops/supcon.py
  library.def(
      "supcon(Tensor features, Tensor labels, float temperature, bool normalize, int reduction, ScalarType loss_dtype, "
      "int first_row, int row_count, bool with_gradient) -> (Tensor loss, Tensor statistics, Tensor grad_features)");
  library.def(
      "supcon_backward(Tensor grad_rows, Tensor features, Tensor labels, Tensor statistics, float temperature, bool "
      "normalize, int first_row, int row_count) -> Tensor");

  // InfoNCE: csrc/info_nce, pyreg/ops/info_nce.py. The positive of query i is key i + offset.
  library.def(
      "info_nce(Tensor query, Tensor key, Tensor? log_q, Tensor? query_ids, Tensor? key_ids, float temperature, bool "
      "normalize, bool by_query, bool by_key, int offset, int reduction, ScalarType loss_dtype, bool[2] with_gradient) "
      "-> (Tensor loss, Tensor query_statistics, Tensor key_statistics, Tensor grad_query, Tensor grad_key)");
  library.def(
      "info_nce_backward(Tensor grad_queries, Tensor grad_keys, Tensor query, Tensor key, Tensor? log_q, Tensor? "
      "query_ids, Tensor? key_ids, Tensor query_statistics, Tensor key_statistics, float temperature, bool normalize, "
      "int offset, bool[2] needs_grad) -> (Tensor grad_query, Tensor grad_key)");

  // Sinkhorn: csrc/sinkhorn, pyreg/ops/sinkhorn.py. Potentials hold eps log a and eps log b.
  library.def(
      "sinkhorn(Tensor cost, Tensor a, Tensor b, Tensor log_a, Tensor log_b, Tensor? rho_a, Tensor? rho_b, Tensor "
      "epsilon, Tensor first_epsilon, float epsilon_factor, bool is_counting, int max_iter, float tol, Tensor initial) "
      "-> (Tensor f, Tensor g, Tensor error, Tensor iterations)");
  library.def(
      "sinkhorn_points(Tensor x, Tensor y, int point_cost, bool is_streaming, Tensor a, Tensor b, Tensor log_a, Tensor "
      "log_b, Tensor? rho_a, Tensor? rho_b, Tensor epsilon, Tensor first_epsilon, float epsilon_factor, bool "
      "is_counting, int max_iter, float tol, Tensor initial) -> (Tensor f, Tensor g, Tensor error, Tensor iterations)");
  // csrc/point_plan, pyreg/ops/_point_plan.py.
  library.def(
      "point_plan(Tensor x, Tensor y, Tensor row_potentials, Tensor column_potentials, Tensor epsilon, Tensor u, "
      "Tensor "
      "z, int point_cost, bool times_cost, bool with_rows, bool with_columns, bool with_x, bool with_y) -> (Tensor "
      "rows, "
      "Tensor columns, Tensor by_x, Tensor by_y)");
  // Both potentials at once, averaged, at the epsilons of a list, and of points with themselves to a tolerance:
  // csrc/symmetric_sinkhorn, pyreg/ops/_symmetric_sinkhorn.py. Potentials leave the weights out. f, g, f_self, g_self;
  // the same of one more iteration, not averaged; and their slopes [B, n, d].
  library.def(
      "symmetric_sinkhorn(Tensor x, Tensor y, int point_cost, float least_square, Tensor a, Tensor b, float[] "
      "epsilons, "
      "float rho, bool with_self, bool slope_x, bool slope_y) -> (Tensor f, Tensor g, Tensor f_self, Tensor g_self, "
      "Tensor "
      "next_f, Tensor next_g, Tensor next_f_self, Tensor next_g_self, Tensor slope_f, Tensor slope_g, Tensor "
      "slope_f_self, Tensor slope_g_self)");
  library.def(
      "symmetric_sinkhorn_self(Tensor x, int point_cost, Tensor a, Tensor? rho, Tensor epsilon, Tensor first_epsilon, "
      "float epsilon_factor, int max_iter, float tol) -> (Tensor f, Tensor error, Tensor iterations)");
  // What follows them is in pyreg/ops/_potentials.py. Potentials here leave the weights out, and weights of 0 have one.
  library.def(
      "sinkhorn_potentials(Tensor cost, Tensor a, Tensor b, Tensor? rho_a, Tensor? rho_b, Tensor epsilon, Tensor "
      "first_epsilon, float epsilon_factor, bool is_counting, int max_iter, float tol, Tensor initial) -> (Tensor f, "
      "Tensor g, Tensor error, Tensor iterations)");
  library.def(
      "sinkhorn_value(Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g, Tensor? rho_a, Tensor? rho_b, Tensor "
      "epsilon, bool is_counting) -> Tensor");
  library.def(
      "sinkhorn_plan(Tensor cost, Tensor row_potentials, Tensor column_potentials, Tensor epsilon, ScalarType dtype) "
      "-> Tensor");
  library.def(
      "sinkhorn_adjoint(Tensor plan, Tensor row_factors, Tensor column_factors, Tensor row_kappas, Tensor "
      "column_kappas, Tensor rows, Tensor columns, bool transposed) -> (Tensor rows, Tensor columns)");
  // The same between points: pyreg/ops/_point_potentials.py.
  library.def(
      "sinkhorn_points_potentials(Tensor x, Tensor y, int point_cost, bool is_streaming, Tensor a, Tensor b, Tensor? "
      "rho_a, Tensor? rho_b, Tensor epsilon, Tensor first_epsilon, float epsilon_factor, bool is_counting, int "
      "max_iter, float tol, Tensor initial, Tensor? row_padding, Tensor? column_padding) -> (Tensor f, Tensor g, "
      "Tensor error, Tensor iterations)");
  library.def(
      "sinkhorn_points_value(Tensor x, Tensor y, Tensor a, Tensor b, Tensor f, Tensor g, Tensor? rho_a, Tensor? rho_b, "
      "Tensor epsilon, int point_cost, bool is_counting) -> Tensor");
  library.def(
      "sinkhorn_points_adjoint(Tensor x, Tensor y, Tensor row_potentials, Tensor column_potentials, Tensor epsilon, "
      "Tensor row_factors, Tensor column_factors, Tensor row_kappas, Tensor column_kappas, Tensor rows, Tensor "
      "columns, "
      "int point_cost, bool transposed) -> (Tensor rows, Tensor columns)");
  // Of points with themselves: pyreg/ops/_self_potentials.py.
  library.def(
      "sinkhorn_self_potentials(Tensor x, Tensor a, Tensor? rho, Tensor epsilon, Tensor first_epsilon, float "
      "epsilon_factor, int point_cost, int max_iter, float tol, Tensor? padding) -> (Tensor f, Tensor error, Tensor "
      "iterations)");
  library.def(
      "sinkhorn_self_value(Tensor x, Tensor a, Tensor f, Tensor? rho, Tensor epsilon, int point_cost) -> Tensor");
  // geomloss's samples loss: pyreg/ops/samples_loss.py. The last four are the potentials' gradients, each row's by its
  // own point.
  library.def(
      "samples_loss_potentials(Tensor x, Tensor y, Tensor a, Tensor b, int p, float blur, float reach, float diameter, "
      "float scaling, bool debias, bool need_x, bool need_y) -> (Tensor f, Tensor g, Tensor f_self, Tensor g_self, "
      "Tensor slope_f, Tensor slope_g, Tensor slope_f_self, Tensor slope_g_self)");

  // Progressive partial transport: csrc/partial_transport, pyreg/ops/partial_transport.py. Both of k classes and a
  // virtual one, whose scalings are logarithms.
  library.def(
      "partial_transport(Tensor logits, Tensor? gain, Tensor targets, Tensor initial, float epsilon, float gamma, int "
      "max_iter, float tol, bool with_energy) -> (Tensor plan, Tensor scalings, Tensor error, Tensor iterations, "
      "Tensor energy)");
  library.def(
      "semantic_partial_transport(Tensor logits, Tensor similarity, bool is_features, Tensor targets, float "
      "semantic_weight, int mm_iter, float mm_tol, float epsilon, float gamma, int max_iter, float tol) -> (Tensor "
      "plan, Tensor error, Tensor iterations)");
}

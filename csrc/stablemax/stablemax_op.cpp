// StableMax operators: tensors in, tensors out. Compiled once for the CPU and once for CUDA.
#include "core/tensor.h"
#include "stablemax/stablemax.h"

namespace pyreg {

namespace {

RowLayout layout_of(const Tensor& input, int64_t dim) {
  RowLayout layout{1, input.size(dim), 1};
  for (int64_t axis = 0; axis < input.dim(); ++axis) {
    if (axis < dim) layout.outer *= input.size(axis);
    if (axis > dim) layout.inner *= input.size(axis);
  }
  return layout;
}

// Logits [N, C] or [N, C, inner] as the kernels take them: rows of one stride, or contiguous.
struct Logits {
  Tensor tensor;
  RowLayout layout;
  int64_t stride;
};

Logits logits_of(const Tensor& input, const char* name) {
  PYREG_REQUIRE(input.dim() == 2 || input.dim() == 3, name, "expected input of shape [N, C] or [N, C, inner], got ",
                input.dim(), " dimensions");
  const RowLayout layout = layout_of(input, 1);
  PYREG_REQUIRE(layout.classes > 0 || layout.rows() == 0, name, "expected at least one class");
  if (input.dim() == 2 && input.stride(1) == 1 && input.stride(0) >= layout.classes) {
    return {input, layout, input.stride(0)};
  }
  return {as_contiguous(input), layout, layout.classes};
}

struct Target {
  Tensor tensor;
  bool labels;
};

CrossEntropyArgs cross_entropy_args(const char* name, const Logits& logits, const Target& target,
                                    const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                                    double label_smoothing, ScalarType loss_type) {
  PYREG_REQUIRE(
      target.tensor.is_cpu() == logits.tensor.is_cpu() && (!weight || weight->is_cpu() == logits.tensor.is_cpu()), name,
      "expected all tensors on one device");
  CrossEntropyArgs args{};
  args.dtype = dtype_of(logits.tensor.scalar_type(), name);
  args.loss_dtype = dtype_of(loss_type, name);
  args.layout = logits.layout;
  args.logits = logits.tensor.const_data_ptr();
  args.logits_stride = logits.stride;
  if (target.labels) {
    PYREG_REQUIRE(target.tensor.numel() == logits.layout.rows(), name, "expected ", logits.layout.rows(),
                  " class indices in target, got ", target.tensor.numel());
    args.labels = static_cast<const int64_t*>(target.tensor.const_data_ptr());
  } else {
    PYREG_REQUIRE(
        target.tensor.numel() == logits.tensor.numel() && target.tensor.scalar_type() == logits.tensor.scalar_type(),
        name, "expected probabilities in target of input's shape and dtype");
    args.probabilities = target.tensor.const_data_ptr();
  }
  if (weight) {
    PYREG_REQUIRE(weight->numel() == logits.layout.classes && weight->is_contiguous() &&
                      weight->scalar_type() == accumulate_type(args.dtype),
                  name, "expected weight of shape [", logits.layout.classes,
                  "], contiguous, in the accumulation dtype");
    args.weight = weight->const_data_ptr();
  }
  PYREG_REQUIRE(reduction >= 0 && reduction <= 2, name, "expected reduction 0 (none), 1 (mean) or 2 (sum), got ",
                reduction);
  args.reduction = static_cast<Reduction>(reduction);
  args.ignore_index = ignore_index;
  args.label_smoothing = label_smoothing;
  return args;
}

Target target_of(const Tensor& target) { return {as_contiguous(target), target.scalar_type() == ScalarType::Long}; }

int64_t saved_size(const CrossEntropyArgs& args) {
  return (args.labels ? kSavedFieldsForLabels : kSavedFieldsForProbabilities) * args.layout.rows() + 1;
}

Tensor empty_loss(const CrossEntropyArgs& args, ScalarType type, const Tensor& like) {
  if (args.reduction != Reduction::none) return empty({}, type, like);
  if (like.dim() == 2) return empty({args.layout.outer}, type, like);
  return empty({args.layout.outer, args.layout.inner}, type, like);
}

void check_labels(int64_t invalid, const CrossEntropyArgs& args) {
  if (invalid != args.ignore_index) {
    fail_index("stablemax_cross_entropy: target has class ", invalid, ", which is out of bounds for input with ",
               args.layout.classes, " classes; expected 0 <= target < ", args.layout.classes,
               " or ignore_index = ", args.ignore_index);
  }
}

// Contiguous, of the shape and dtype of logits [N, C] or [N, C, inner].
Tensor empty_rows(const Tensor& input) {
  if (input.dim() == 2) return empty({input.size(0), input.size(1)}, input.scalar_type(), input);
  PYREG_REQUIRE(input.dim() == 3, "stablemax_cross_entropy", "expected input of shape [N, C] or [N, C, inner], got ",
                input.dim(), " dimensions");
  return empty({input.size(0), input.size(1), input.size(2)}, input.scalar_type(), input);
}

// The loss and what the backward pass needs; `grad_input`, where given, receives the gradient for grad_loss = 1.
std::tuple<Tensor, Tensor> run_forward(const char* name, void (*kernel)(const CrossEntropyArgs&), const Tensor& input,
                                       const Tensor& target, const std::optional<Tensor>& weight, int64_t reduction,
                                       int64_t ignore_index, double label_smoothing, ScalarType loss_type,
                                       void* grad_input) {
  const Logits logits = logits_of(input, name);
  const Target goal = target_of(target);
  CrossEntropyArgs args =
      cross_entropy_args(name, logits, goal, weight, reduction, ignore_index, label_smoothing, loss_type);
  PYREG_REQUIRE(grad_input == nullptr || goal.labels, name, "expected class indices in target");
  Tensor loss = empty_loss(args, loss_type, input);
  Tensor saved = empty({saved_size(args)}, accumulate_type(args.dtype), input);
  args.loss = loss.mutable_data_ptr();
  args.saved = saved.mutable_data_ptr();
  args.grad_logits = grad_input;
  int64_t invalid = ignore_index;
  args.invalid_label = &invalid;
  const Launch launch(input);
  args.stream = launch.stream;
  kernel(args);
  check_labels(invalid, args);
  return {loss, saved};
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction,
                                         int64_t ignore_index, double label_smoothing, ScalarType loss_type) {
  return run_forward("stablemax_cross_entropy", &PYREG_DEVICE::stablemax_cross_entropy_forward, input, target, weight,
                     reduction, ignore_index, label_smoothing, loss_type, nullptr);
}

Tensor cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor saved,
                              int64_t reduction, int64_t ignore_index, double label_smoothing) {
  constexpr const char* kName = "stablemax_cross_entropy_backward";
  const Logits logits = logits_of(input, kName);
  const Target goal = target_of(target);
  const Tensor grad = as_contiguous(grad_loss);
  CrossEntropyArgs args =
      cross_entropy_args(kName, logits, goal, weight, reduction, ignore_index, label_smoothing, grad.scalar_type());
  PYREG_REQUIRE(grad.numel() == (args.reduction == Reduction::none ? args.layout.rows() : 1), kName,
                "expected one gradient a loss, got ", grad.numel());
  PYREG_REQUIRE(
      saved.numel() == saved_size(args) && saved.is_contiguous() && saved.scalar_type() == accumulate_type(args.dtype),
      kName, "saved is not what the forward pass returned for this input");
  Tensor grad_input = empty_rows(input);
  args.grad_loss = grad.const_data_ptr();
  args.saved = const_cast<void*>(saved.const_data_ptr());
  args.grad_logits = grad_input.mutable_data_ptr();
  const Launch launch(input);
  args.stream = launch.stream;
  PYREG_DEVICE::stablemax_cross_entropy_backward(args);
  return grad_input;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_with_gradient(Tensor input, Tensor target,
                                                               std::optional<Tensor> weight, int64_t reduction,
                                                               int64_t ignore_index, double label_smoothing,
                                                               ScalarType loss_type) {
  Tensor grad_input = empty_rows(input);
  const auto [loss, saved] =
      run_forward("stablemax_cross_entropy_with_gradient", &PYREG_DEVICE::stablemax_cross_entropy_with_gradient, input,
                  target, weight, reduction, ignore_index, label_smoothing, loss_type, grad_input.mutable_data_ptr());
  return {loss, saved, grad_input};
}

Tensor cross_entropy_in_place(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction,
                              int64_t ignore_index, double label_smoothing, ScalarType loss_type) {
  constexpr const char* kName = "stablemax_cross_entropy_";
  PYREG_REQUIRE(input.is_contiguous(), kName, "expected a contiguous input, whose memory the gradient takes over");
  return std::get<0>(run_forward(kName, &PYREG_DEVICE::stablemax_cross_entropy_with_gradient, input, target, weight,
                                 reduction, ignore_index, label_smoothing, loss_type, input.mutable_data_ptr()));
}

using StablemaxKernel = void (*)(const StablemaxArgs&);

Tensor apply_rows(const char* name, StablemaxKernel kernel, const Tensor& input, const Tensor* grad_output, int64_t dim,
                  ScalarType output_type, ScalarType grad_type) {
  PYREG_REQUIRE(input.dim() >= 1 && dim >= 0 && dim < input.dim(), name, "dim ", dim, " is out of range for input of ",
                input.dim(), " dimensions");
  const Tensor rows = as_contiguous(input);
  StablemaxArgs args{};
  args.dtype = dtype_of(input.scalar_type(), name);
  args.output_dtype = dtype_of(grad_type, name);
  PYREG_REQUIRE(args.output_dtype == args.dtype || (args.output_dtype == Dtype::float32 && rows.element_size() == 2),
                name, "expected the output dtype to be input's, or float32 for a 16-bit input");
  args.layout = layout_of(rows, dim);
  args.input = rows.const_data_ptr();
  std::optional<Tensor> grad;
  if (grad_output) {
    grad = as_contiguous(*grad_output);
    PYREG_REQUIRE(grad->numel() == rows.numel(), name, "expected grad_output of input's shape");
    args.grad_output = grad->const_data_ptr();
  }
  // Flat memory of the input's shape.
  Tensor output = torch::stable::view(empty({rows.numel()}, output_type, input), rows.sizes());
  args.output = output.mutable_data_ptr();
  if (rows.numel() == 0) return output;
  const Launch launch(input);
  args.stream = launch.stream;
  kernel(args);
  return output;
}

Tensor stablemax(Tensor input, int64_t dim, ScalarType dtype) {
  return apply_rows("stablemax", &PYREG_DEVICE::stablemax_forward, input, nullptr, dim, dtype, dtype);
}

Tensor stablemax_backward(Tensor grad_output, Tensor input, int64_t dim) {
  return apply_rows("stablemax_backward", &PYREG_DEVICE::stablemax_backward, input, &grad_output, dim,
                    input.scalar_type(), grad_output.scalar_type());
}

Tensor log_stablemax(Tensor input, int64_t dim, ScalarType dtype) {
  return apply_rows("log_stablemax", &PYREG_DEVICE::log_stablemax_forward, input, nullptr, dim, dtype, dtype);
}

Tensor log_stablemax_backward(Tensor grad_output, Tensor input, int64_t dim) {
  return apply_rows("log_stablemax_backward", &PYREG_DEVICE::log_stablemax_backward, input, &grad_output, dim,
                    input.scalar_type(), grad_output.scalar_type());
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("stablemax", TORCH_BOX(&stablemax));
  library.impl("stablemax_backward", TORCH_BOX(&stablemax_backward));
  library.impl("log_stablemax", TORCH_BOX(&log_stablemax));
  library.impl("log_stablemax_backward", TORCH_BOX(&log_stablemax_backward));
  library.impl("stablemax_cross_entropy", TORCH_BOX(&cross_entropy));
  library.impl("stablemax_cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  library.impl("stablemax_cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  library.impl("stablemax_cross_entropy_", TORCH_BOX(&cross_entropy_in_place));
}

}  // namespace pyreg

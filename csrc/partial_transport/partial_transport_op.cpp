// The operator of progressive partial transport on the CPU: tensors in, tensors out.
#include <optional>
#include <tuple>

#include "core/tensor.h"
#include "partial_transport/partial_transport.h"

namespace pyreg {

namespace {

constexpr const char* kName = "partial_transport";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> partial_transport(Tensor logits, std::optional<Tensor> gain,
                                                                     Tensor targets, Tensor initial, double epsilon,
                                                                     double gamma, int64_t max_iter, double tol,
                                                                     bool with_energy) {
  PYREG_REQUIRE(logits.dim() == 2 && logits.size(0) > 0 && logits.size(1) > 0, kName,
                "expected logits [n, k] with at least one row and one class");
  PartialTransportArgs args{};
  args.dtype = dtype_of(logits.scalar_type(), kName);
  args.rows = logits.size(0);
  args.classes = logits.size(1);
  const ScalarType type = accumulate_type(args.dtype);
  for (const Tensor* tensor : {&targets, &initial}) {
    PYREG_REQUIRE(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Double && tensor->is_contiguous() &&
                      tensor->dim() == 1 && tensor->size(0) == args.classes + 1,
                  kName, "expected contiguous float64 targets and initial scalings of shape [k + 1]");
  }
  const Tensor contiguous = as_contiguous(logits);
  std::optional<Tensor> gains;
  if (gain) {
    PYREG_REQUIRE(gain->is_cpu() && gain->scalar_type() == type && gain->dim() == 2 && gain->size(0) == args.rows &&
                      gain->size(1) == args.classes,
                  kName, "expected a gain of the logits' shape in the dtype of the result");
    gains = as_contiguous(*gain);
    args.gain = gains->const_data_ptr();
  }
  PYREG_REQUIRE(epsilon > 0 && gamma > 0, kName, "expected epsilon and gamma above 0");
  const Tensor plan = empty({args.rows, args.classes}, type, logits);
  const Tensor scalings = torch::stable::clone(initial);
  const Tensor error = empty({1}, ScalarType::Double, logits), iterations = empty({1}, ScalarType::Long, logits);
  Tensor energy = empty({1}, ScalarType::Double, logits);
  torch::stable::zero_(energy);
  args.logits = contiguous.const_data_ptr();
  args.targets = static_cast<const double*>(targets.const_data_ptr());
  args.epsilon = epsilon;
  args.epsilon_by_gamma = epsilon / gamma;
  args.max_iterations = max_iter;
  args.tolerance = tol;
  args.log_scalings = static_cast<double*>(scalings.mutable_data_ptr());
  args.plan = plan.mutable_data_ptr();
  args.error = static_cast<double*>(error.mutable_data_ptr());
  args.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  args.energy = with_energy ? static_cast<double*>(energy.mutable_data_ptr()) : nullptr;
  cpu::partial_transport(args);
  return {plan, scalings, error, iterations, energy};
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("partial_transport", TORCH_BOX(&partial_transport));
}

}  // namespace pyreg

// Sinkhorn's operators: tensors in, tensors out.
#include <optional>
#include <tuple>

#include "core/tensor.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn(Tensor cost, Tensor a, Tensor b, Tensor log_a, Tensor log_b,
                                                    std::optional<Tensor> rho_a, std::optional<Tensor> rho_b,
                                                    Tensor epsilon, Tensor first_epsilon, double epsilon_factor,
                                                    bool is_counting, int64_t max_iter, double tol, Tensor initial) {
  SinkhornArgs args{};
  args.dtype = dtype_of(cost.scalar_type(), "sinkhorn");
  args.cost = cost.const_data_ptr();
  args.batch = cost.size(0); args.rows = cost.size(1); args.columns = cost.size(2);
  Tensor f = empty({args.batch, args.rows}, ScalarType::Double, cost);
  Tensor g = torch::stable::clone(initial);
  Tensor error = empty({args.batch}, ScalarType::Double, cost);
  Tensor iterations = empty({args.batch}, ScalarType::Long, cost);
  torch::stable::zero_(f);
  const auto data = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  args.row = {data(log_a), rho_a ? data(*rho_a) : nullptr, data(a), static_cast<double*>(f.mutable_data_ptr())};
  args.column = {data(log_b), rho_b ? data(*rho_b) : nullptr, data(b), static_cast<double*>(g.mutable_data_ptr())};
  args.is_counting = is_counting;
  args.epsilon = data(epsilon); args.first_epsilon = data(first_epsilon);
  args.epsilon_factor = epsilon_factor; args.max_iterations = max_iter; args.tolerance = tol;
  args.error = static_cast<double*>(error.mutable_data_ptr());
  args.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  cpu::sinkhorn(args);
  return {f, g, error, iterations};
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) { library.impl("sinkhorn", TORCH_BOX(&sinkhorn)); }

}  // namespace pyreg

// Sinkhorn's operators: tensors in, tensors out. Compiled once for the CPU and once for CUDA, where that between points
// is written in Triton.
#include <optional>
#include <tuple>

#include "core/tensor.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg {

namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Options {
  const Tensor &a, &b, &log_a, &log_b;
  const std::optional<Tensor>&rho_a, &rho_b;
  const Tensor &epsilon, &first_epsilon;
  double epsilon_factor;
  bool is_counting;
  int64_t max_iter;
  double tol;
  const Tensor& initial;
};

const double* numbers(const char* name, const Tensor& tensor, const Tensor& like, int64_t batch, int64_t count) {
  PYREG_REQUIRE(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                    tensor.get_device_index() == like.get_device_index(),
                name, "expected all tensors on one device");
  const bool fits =
      tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == batch * count;
  PYREG_REQUIRE(fits, name, "expected contiguous float64 tensors of shape [B, ", count, "] with B = ", batch);
  return static_cast<const double*>(tensor.const_data_ptr());
}

// Fills what does not depend on the cost, and runs the kernel.
Result solve(const char* name, SinkhornArgs& args, const Tensor& like, const Options& options) {
  const int64_t batch = args.batch, n = args.rows, m = args.columns;
  args.dtype = dtype_of(like.scalar_type(), name);
  PYREG_REQUIRE(args.dtype == Dtype::float64 || args.dtype == Dtype::float32, name,
                "expected costs or points of float64 or float32");
  PYREG_REQUIRE(n > 0 && m > 0, name, "expected at least one row and one column");
  PYREG_REQUIRE(options.epsilon_factor < 1, name, "expected an epsilon_factor below 1");
  const Launch launch(like);
  Tensor f = empty({batch, n}, ScalarType::Double, like), g = torch::stable::clone(options.initial);
  numbers(name, g, like, batch, m);
  torch::stable::zero_(f);
  Tensor error = empty({batch}, ScalarType::Double, like), iterations = empty({batch}, ScalarType::Long, like);
  const auto rhos = [&](const std::optional<Tensor>& rho, int64_t count) {
    return rho ? numbers(name, *rho, like, batch, count) : nullptr;
  };
  args.row = {numbers(name, options.log_a, like, batch, n), rhos(options.rho_a, n),
              numbers(name, options.a, like, batch, n), static_cast<double*>(f.mutable_data_ptr())};
  args.column = {numbers(name, options.log_b, like, batch, m), rhos(options.rho_b, m),
                 numbers(name, options.b, like, batch, m), static_cast<double*>(g.mutable_data_ptr())};
  args.is_counting = options.is_counting;
  args.epsilon = numbers(name, options.epsilon, like, batch, 1);
  args.first_epsilon = numbers(name, options.first_epsilon, like, batch, 1);
  args.epsilon_factor = options.epsilon_factor;
  args.max_iterations = options.max_iter;
  args.tolerance = options.tol;
  args.error = static_cast<double*>(error.mutable_data_ptr());
  args.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  const Tensor workspace = empty({PYREG_DEVICE::sinkhorn_workspace(args)}, ScalarType::Byte, like);
  args.workspace = workspace.mutable_data_ptr();
  args.stream = launch.stream;
  PYREG_DEVICE::sinkhorn(args);
  return {f, g, error, iterations};
}

Result sinkhorn(Tensor cost, Tensor a, Tensor b, Tensor log_a, Tensor log_b, std::optional<Tensor> rho_a,
                std::optional<Tensor> rho_b, Tensor epsilon, Tensor first_epsilon, double epsilon_factor,
                bool is_counting, int64_t max_iter, double tol, Tensor initial) {
  PYREG_REQUIRE(cost.dim() == 3 && cost.is_contiguous(), "sinkhorn", "expected a contiguous cost [B, n, m]");
  SinkhornArgs args{};
  args.cost = cost.const_data_ptr();
  args.batch = cost.size(0);
  args.rows = cost.size(1);
  args.columns = cost.size(2);
  return solve(
      "sinkhorn", args, cost,
      {a, b, log_a, log_b, rho_a, rho_b, epsilon, first_epsilon, epsilon_factor, is_counting, max_iter, tol, initial});
}

Result sinkhorn_points(Tensor x, Tensor y, int64_t point_cost, bool is_streaming, Tensor a, Tensor b, Tensor log_a,
                       Tensor log_b, std::optional<Tensor> rho_a, std::optional<Tensor> rho_b, Tensor epsilon,
                       Tensor first_epsilon, double epsilon_factor, bool is_counting, int64_t max_iter, double tol,
                       Tensor initial) {
  constexpr const char* kName = "sinkhorn_points";
  PYREG_REQUIRE(x.dim() == 3 && y.dim() == 3 && x.is_contiguous() && y.is_contiguous() && x.size(0) == y.size(0) &&
                    x.size(2) == y.size(2) && x.size(2) > 0 && x.scalar_type() == y.scalar_type(),
                kName, "expected contiguous points x [B, n, d] and y [B, m, d] of one dtype");
  PYREG_REQUIRE(point_cost >= 0 && point_cost <= 2, kName, "expected point_cost to be 0, 1 or 2");
  SinkhornArgs args{};
  args.point_cost = static_cast<PointCost>(point_cost);
  args.dimension = x.size(2);
  args.x = x.const_data_ptr();
  args.y = y.const_data_ptr();
  args.is_streaming = is_streaming;
  args.batch = x.size(0);
  args.rows = x.size(1);
  args.columns = y.size(1);
  return solve(
      kName, args, x,
      {a, b, log_a, log_b, rho_a, rho_b, epsilon, first_epsilon, epsilon_factor, is_counting, max_iter, tol, initial});
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  if constexpr (PYREG_DEVICE::kHasSinkhornPoints) library.impl("sinkhorn_points", TORCH_BOX(&sinkhorn_points));
}

}  // namespace pyreg

// Symmetric Sinkhorn's operators: tensors in, tensors out.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/tensor.h"
#include "symmetric_sinkhorn/symmetric_sinkhorn.h"

namespace pyreg {

namespace {

// Costs are held up to so many bytes of all problems at a time.
constexpr int64_t kMostHeld = int64_t{1} << 28;

struct Cloud {
  Tensor points, weights;  // [B, n, d], [B, n]

  Cloud(const char* name, const Tensor& x, const Tensor& a) : points(as_contiguous(x)), weights(as_contiguous(a)) {
    PYREG_REQUIRE(x.dim() == 3 && x.is_cpu() && x.size(1) > 0 && x.size(2) > 0, name,
                  "expected points [B, n, d] on the CPU");
    PYREG_REQUIRE(a.scalar_type() == ScalarType::Double && a.is_cpu() && a.dim() == 2 && a.size(0) == x.size(0) &&
                      a.size(1) == x.size(1),
                  name, "expected float64 weights [B, n] on the CPU");
  }

  int64_t batch() const { return points.size(0); }
  int64_t count() const { return points.size(1); }
  Tensor potentials() const { return empty({batch(), count()}, ScalarType::Double, points); }

  SymmetricSide side(int64_t index, const double* rhos, const Tensor& potentials, const Tensor* next) const {
    const int64_t first = index * count();
    const auto of_problem = [&](const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()) + first; };
    const size_t bytes = points.element_size();
    return {count(),
            static_cast<const char*>(points.const_data_ptr()) + static_cast<size_t>(first * points.size(2)) * bytes,
            static_cast<const double*>(weights.const_data_ptr()) + first,
            rhos == nullptr ? nullptr : rhos + first,
            of_problem(potentials),
            next == nullptr ? nullptr : of_problem(*next)};
  }
};

SymmetricSinkhornArgs arguments(const char* name, const Tensor& x, int64_t point_cost) {
  SymmetricSinkhornArgs args{};
  args.dtype = dtype_of(x.scalar_type(), name);
  PYREG_REQUIRE(args.dtype == Dtype::float64 || args.dtype == Dtype::float32, name,
                "expected points of float64 or float32");
  PYREG_REQUIRE(point_cost >= 0 && point_cost <= 2, name, "expected point_cost to be 0, 1 or 2");
  args.point_cost = static_cast<PointCost>(point_cost);
  args.dimension = x.size(2);
  args.most_held = kMostHeld;
  return args;
}

using Potentials = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Potentials symmetric_sinkhorn(Tensor x, Tensor y, int64_t point_cost, double least_square, Tensor a, Tensor b,
                              std::vector<double> epsilons, double rho, bool with_self) {
  constexpr const char* kName = "symmetric_sinkhorn";
  const Cloud rows(kName, x, a), columns(kName, y, b);
  PYREG_REQUIRE(x.size(0) == y.size(0) && x.size(2) == y.size(2) && x.scalar_type() == y.scalar_type(), kName,
                "expected points x [B, n, d] and y [B, m, d] of one dtype");
  PYREG_REQUIRE(!epsilons.empty(), kName, "expected at least one epsilon");
  for (const double epsilon : epsilons) PYREG_REQUIRE(epsilon > 0, kName, "expected epsilons above 0");
  PYREG_REQUIRE(rho > 0, kName, "expected rho above 0");
  SymmetricSinkhornArgs args = arguments(kName, x, point_cost);
  args.least_square = least_square;
  args.epsilons = epsilons.data();
  args.epsilon_count = static_cast<int64_t>(epsilons.size());
  const bool is_balanced = rho == std::numeric_limits<double>::infinity();
  const std::vector<double> rhos(is_balanced ? 0 : static_cast<size_t>(rows.batch()) *
                                                       static_cast<size_t>(std::max(rows.count(), columns.count())),
                                 rho);
  const double* const penalties = is_balanced ? nullptr : rhos.data();
  const Tensor f = rows.potentials(), g = columns.potentials(), next_f = rows.potentials(),
               next_g = columns.potentials();
  const auto none = [&] { return empty({0, 0}, ScalarType::Double, x); };
  const Tensor f_self = with_self ? rows.potentials() : none(), g_self = with_self ? columns.potentials() : none(),
               next_f_self = with_self ? rows.potentials() : none(),
               next_g_self = with_self ? columns.potentials() : none();
  std::vector<SymmetricProblem> problems;
  for (int64_t k = 0; k < rows.batch(); ++k) {
    problems.push_back(
        {rows.side(k, penalties, f, &next_f), columns.side(k, penalties, g, &next_g), false, 0, 0, nullptr, nullptr});
    if (!with_self) continue;
    const SymmetricSide of_x = rows.side(k, penalties, f_self, &next_f_self);
    const SymmetricSide of_y = columns.side(k, penalties, g_self, &next_g_self);
    problems.push_back({of_x, of_x, true, 0, 0, nullptr, nullptr});
    problems.push_back({of_y, of_y, true, 0, 0, nullptr, nullptr});
  }
  args.problems = problems.data();
  args.problem_count = static_cast<int64_t>(problems.size());
  PYREG_DEVICE::symmetric_sinkhorn(args);
  return {f, g, f_self, g_self, next_f, next_g, next_f_self, next_g_self};
}

std::tuple<Tensor, Tensor, Tensor> symmetric_sinkhorn_self(Tensor x, int64_t point_cost, Tensor a,
                                                           std::optional<Tensor> rho, Tensor epsilon,
                                                           Tensor first_epsilon, double epsilon_factor,
                                                           int64_t max_iter, double tol) {
  constexpr const char* kName = "symmetric_sinkhorn_self";
  const Cloud cloud(kName, x, a);
  const auto numbers = [&](const Tensor& tensor, int64_t count) {
    PYREG_REQUIRE(tensor.scalar_type() == ScalarType::Double && tensor.is_cpu() && tensor.is_contiguous() &&
                      tensor.numel() == count,
                  kName, "expected contiguous float64 epsilons [B] and penalties [B, n] on the CPU");
    return static_cast<const double*>(tensor.const_data_ptr());
  };
  PYREG_REQUIRE(epsilon_factor < 1, kName, "expected an epsilon_factor below 1");
  const double* const rhos = rho ? numbers(*rho, cloud.batch() * cloud.count()) : nullptr;
  const double *const last = numbers(epsilon, cloud.batch()), *const first = numbers(first_epsilon, cloud.batch());
  SymmetricSinkhornArgs args = arguments(kName, x, point_cost);
  args.epsilon_factor = epsilon_factor;
  args.max_iterations = max_iter;
  args.tolerance = tol;
  const Tensor f = cloud.potentials(), error = empty({cloud.batch()}, ScalarType::Double, x),
               iterations = empty({cloud.batch()}, ScalarType::Long, x);
  std::vector<SymmetricProblem> problems;
  for (int64_t k = 0; k < cloud.batch(); ++k) {
    const SymmetricSide side = cloud.side(k, rhos, f, nullptr);
    problems.push_back({side, side, true, last[k], first[k], static_cast<double*>(error.mutable_data_ptr()) + k,
                        static_cast<int64_t*>(iterations.mutable_data_ptr()) + k});
  }
  args.problems = problems.data();
  args.problem_count = static_cast<int64_t>(problems.size());
  PYREG_DEVICE::symmetric_sinkhorn(args);
  return {f, error, iterations};
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("symmetric_sinkhorn", TORCH_BOX(&symmetric_sinkhorn));
  library.impl("symmetric_sinkhorn_self", TORCH_BOX(&symmetric_sinkhorn_self));
}

}  // namespace pyreg

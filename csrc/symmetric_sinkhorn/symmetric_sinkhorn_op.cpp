// Symmetric Sinkhorn's operators: tensors in, tensors out; and slopes by torch's products with what the kernel leaves.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/products.h"
#include "symmetric_sinkhorn/symmetric_sinkhorn.h"

namespace pyreg {

namespace {

// Beyond three dimensions costs are held, up to so many bytes of all problems at a time: 8000 x 8000 floats. One that
// would take more forms them anew in every iteration.
constexpr int64_t kMostHeld = int64_t{1} << 28;
constexpr int64_t kMostDirect = 3;

// Small problems share the threads, so many bytes of costs of them at a time; larger ones follow on each other in the
// same memory, for that of the first touch costs as much as an iteration.
constexpr int64_t kHeldTogether = int64_t{1} << 22;

// How many costs are held: none where the kernel forms them anew.
int64_t held_count(int64_t rows, int64_t columns, bool is_self, int64_t dimension, size_t bytes) {
  const int64_t count = HeldCosts(rows, columns, is_self).count();
  return dimension > kMostDirect && count * static_cast<int64_t>(bytes) <= kMostHeld ? count : 0;
}

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

  SymmetricSide side(int64_t index, const double* rhos, const Tensor& potentials) const {
    const int64_t first = index * count();
    const size_t bytes = points.element_size();
    return {count(),
            static_cast<const char*>(points.const_data_ptr()) + static_cast<size_t>(first * points.size(2)) * bytes,
            static_cast<const double*>(weights.const_data_ptr()) + first,
            rhos == nullptr ? nullptr : rhos + first,
            static_cast<double*>(potentials.mutable_data_ptr()) + first,
            nullptr,
            nullptr,
            nullptr};
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
  return args;
}

// ---- at the epsilons of a list ----

// Potentials of a cloud with another or with itself, f and f', and slopes.
struct Found {
  Tensor potentials, next, slopes, sums;

  Found(const Cloud& cloud, bool is_wanted, bool has_slopes)
      : potentials(numbers(cloud, is_wanted)),
        next(numbers(cloud, is_wanted)),
        slopes(has_slopes ? empty({cloud.batch(), cloud.count(), cloud.points.size(2)}, cloud.points.scalar_type(),
                                  cloud.points)
                          : empty({0, 0, 0}, cloud.points.scalar_type(), cloud.points)),
        sums(numbers(cloud, has_slopes)) {}

  static Tensor numbers(const Cloud& cloud, bool is_there) {
    return is_there ? cloud.potentials() : empty({0, 0}, ScalarType::Double, cloud.points);
  }

  SymmetricSide side(const Cloud& cloud, int64_t index, const double* rhos) const {
    SymmetricSide result = cloud.side(index, rhos, potentials);
    result.next = static_cast<double*>(next.mutable_data_ptr()) + index * cloud.count();
    if (sums.numel() == 0) return result;
    const size_t bytes = static_cast<size_t>(cloud.count() * cloud.points.size(2)) * slopes.element_size();
    result.slopes = static_cast<char*>(slopes.mutable_data_ptr()) + static_cast<size_t>(index) * bytes;
    result.sums = static_cast<double*>(sums.mutable_data_ptr()) + index * cloud.count();
    return result;
  }
};

// A problem whose costs are held, in which the kernel leaves W.
template <typename A>
class HeldProblem {
 public:
  HeldProblem(const SymmetricProblem& problem, PointCost cost, int64_t dimension, const Tensor& memory, int64_t first)
      : problem_(problem),
        cost_(cost),
        d_(dimension),
        costs_(problem.row.count, problem.column.count, problem.is_self),
        memory_(memory),
        first_(first) {}

  void set_slopes() const {
    const std::vector<double> centre = this->centre();
    const SymmetricSide &row = problem_.row, &column = problem_.column;
    if (problem_.is_self) {
      if (row.slopes == nullptr) return;
      const Tensor z = weighted(row, centre);
      Tensor sums = empty({row.count, d_ + 1}, memory_.scalar_type(), memory_);
      torch::stable::zero_(sums);
      for (int64_t block = 0; block < costs_.blocks(); ++block) {
        const int64_t first = costs_.first_column(block), rows = std::min(costs_.block_rows(), row.count - first);
        const int64_t rest = row.count - first, width = costs_.width(block), offset = first_ + costs_.offset(block);
        add_product(part(sums, first, rows), matrix_view(memory_, offset, {rows, rest}, {width, 1}),
                    part(z, first, rest));
        add_product(part(sums, first, rest), matrix_view(memory_, offset, {rest, rows}, {1, width}),
                    part(z, first, rows));
      }
      return set(row, sums, centre);
    }
    const Tensor w = matrix_view(memory_, first_, {row.count, column.count}, {costs_.stride, 1});
    const Tensor transposed = matrix_view(memory_, first_, {column.count, row.count}, {1, costs_.stride});
    if (row.slopes != nullptr) set(row, product(w, weighted(column, centre)), centre);
    if (column.slopes != nullptr) set(column, product(transposed, weighted(row, centre)), centre);
  }

 private:
  // Around which differences of sums lose the fewest digits.
  std::vector<double> centre() const {
    std::vector<double> result(static_cast<size_t>(d_), 0.0);
    if (cost_ == PointCost::cosine) return result;
    const A* const points = static_cast<const A*>(problem_.row.points);
    for (int64_t i = 0; i < problem_.row.count; ++i) {
      for (int64_t k = 0; k < d_; ++k) {
        result[static_cast<size_t>(k)] +=
            static_cast<double>(points[i * d_ + k]) / static_cast<double>(problem_.row.count);
      }
    }
    return result;
  }

  // [count, d + 1]: b_j (y_j, 1)
  Tensor weighted(const SymmetricSide& side, const std::vector<double>& centre) const {
    const Tensor result = empty({side.count, d_ + 1}, memory_.scalar_type(), memory_);
    A* to = static_cast<A*>(result.mutable_data_ptr());
    const A* points = static_cast<const A*>(side.points);
    for (int64_t i = 0; i < side.count; ++i, to += d_ + 1, points += d_) {
      const A weight = static_cast<A>(side.weights[i]);
      for (int64_t k = 0; k < d_; ++k) to[k] = weight * (points[k] - static_cast<A>(centre[static_cast<size_t>(k)]));
      to[d_] = weight;
    }
    return result;
  }

  Tensor product(const Tensor& w, const Tensor& z) const {
    const Tensor result = empty({w.size(0), d_ + 1}, memory_.scalar_type(), memory_);
    multiply(result, w, z);
    return result;
  }

  Tensor part(const Tensor& matrix, int64_t first, int64_t count) const {
    return matrix_view(matrix, first * (d_ + 1), {count, d_ + 1}, {d_ + 1, 1});
  }

  // From sum_j W_ij b_j (y_j, 1).
  void set(const SymmetricSide& side, const Tensor& sums, const std::vector<double>& centre) const {
    const A* sum = static_cast<const A*>(sums.const_data_ptr());
    const A* points = static_cast<const A*>(side.points);
    A* slopes = static_cast<A*>(side.slopes);
    for (int64_t i = 0; i < side.count; ++i, sum += d_ + 1, points += d_, slopes += d_) {
      if (side.sums[i] == 0) continue;
      const A scale = static_cast<A>((cost_ == PointCost::sqeuclidean ? 2 : 1) / side.sums[i]);
      for (int64_t k = 0; k < d_; ++k) {
        const A own = cost_ == PointCost::cosine ? A(0) : points[k] - static_cast<A>(centre[static_cast<size_t>(k)]);
        slopes[k] = scale * (sum[d_] * own - sum[k]);
      }
    }
  }

  const SymmetricProblem& problem_;
  PointCost cost_;
  int64_t d_;
  HeldCosts costs_;
  const Tensor& memory_;  // where costs begin at first_
  int64_t first_;
};

template <typename A>
void solve_held(SymmetricSinkhornArgs args, std::vector<SymmetricProblem>& problems, const Tensor& like) {
  const auto held_count_of = [&](const SymmetricProblem& problem) {
    return held_count(problem.row.count, problem.column.count, problem.is_self, args.dimension, sizeof(A));
  };
  constexpr int64_t kTogether = kHeldTogether / static_cast<int64_t>(sizeof(A));
  int64_t largest = 0, all = 0;
  for (const SymmetricProblem& problem : problems) {
    largest = std::max(largest, held_count_of(problem));
    all += held_count_of(problem);
  }
  const Tensor memory = empty({std::max(largest, std::min(all, kTogether))}, like.scalar_type(), like);
  for (size_t first = 0, end = 0; first < problems.size(); first = end) {
    std::vector<HeldProblem<A>> held;
    for (int64_t total = 0; end < problems.size(); ++end) {
      const int64_t count = held_count_of(problems[end]);
      if (end > first && total + count > kTogether) break;
      if (count > 0) {
        held.emplace_back(problems[end], args.point_cost, args.dimension, memory, total);
        problems[end].held = static_cast<A*>(memory.mutable_data_ptr()) + total;
      }
      total += count;
    }
    args.problems = problems.data() + first;
    args.problem_count = static_cast<int64_t>(end - first);
    PYREG_DEVICE::symmetric_sinkhorn(args);
    for (const HeldProblem<A>& problem : held) problem.set_slopes();
  }
}

void solve(const SymmetricSinkhornArgs& args, std::vector<SymmetricProblem>& problems, const Tensor& like) {
  if (args.dtype == Dtype::float64) return solve_held<double>(args, problems, like);
  solve_held<float>(args, problems, like);
}

// Whether the largest of the problems has slopes here; beyond, they are a pass over the plan for themselves.
bool can_hold_slopes(int64_t n, int64_t m, int64_t dimension, size_t bytes) {
  const int64_t most = std::max(n, m);
  return dimension <= kMostDirect || held_count(most, most, false, dimension, bytes) > 0;
}

using Results =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results symmetric_sinkhorn(Tensor x, Tensor y, int64_t point_cost, double least_square, Tensor a, Tensor b,
                           std::vector<double> epsilons, double rho, bool with_self, bool slope_x, bool slope_y) {
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
  const int64_t most = rows.batch() * std::max(rows.count(), columns.count());
  const std::vector<double> rhos(is_balanced ? 0 : static_cast<size_t>(most), rho);
  const double* const penalties = is_balanced ? nullptr : rhos.data();
  const bool has_slopes = can_hold_slopes(rows.count(), columns.count(), args.dimension, x.element_size());
  const bool of_x = has_slopes && slope_x, of_y = has_slopes && slope_y;
  const Found f(rows, true, of_x), g(columns, true, of_y);
  const Found f_self(rows, with_self, with_self && of_x), g_self(columns, with_self, with_self && of_y);
  std::vector<SymmetricProblem> problems;
  const auto add = [&](const SymmetricSide& row, const SymmetricSide& column, bool is_self) {
    problems.push_back({row, column, is_self, nullptr, 0, 0, nullptr, nullptr});
  };
  for (int64_t k = 0; k < rows.batch(); ++k) {
    add(f.side(rows, k, penalties), g.side(columns, k, penalties), false);
    if (!with_self) continue;
    const SymmetricSide of_rows = f_self.side(rows, k, penalties), of_columns = g_self.side(columns, k, penalties);
    add(of_rows, of_rows, true);
    add(of_columns, of_columns, true);
  }
  solve(args, problems, rows.points);
  return {f.potentials, g.potentials, f_self.potentials, g_self.potentials, f.next,        g.next,
          f_self.next,  g_self.next,  f.slopes,          g.slopes,          f_self.slopes, g_self.slopes};
}

// ---- of points with themselves, to a tolerance ----

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
    const SymmetricSide side = cloud.side(k, rhos, f);
    problems.push_back({side, side, true, nullptr, last[k], first[k],
                        static_cast<double*>(error.mutable_data_ptr()) + k,
                        static_cast<int64_t*>(iterations.mutable_data_ptr()) + k});
  }
  solve(args, problems, cloud.points);
  return {f, error, iterations};
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("symmetric_sinkhorn", TORCH_BOX(&symmetric_sinkhorn));
  library.impl("symmetric_sinkhorn_self", TORCH_BOX(&symmetric_sinkhorn_self));
}

}  // namespace pyreg

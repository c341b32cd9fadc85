// One pass over the plan between points: panels, and torch's products with them.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "core/products.h"
#include "point_plan/point_plan.h"

namespace pyreg {

namespace {

constexpr const char* kName = "point_plan";

// Entries of the panels at a time: 4 MB of float.
constexpr int64_t kMostEntries = int64_t{1} << 20;

// As many columns as no vector of any instruction set is longer than.
constexpr int64_t kPadding = 16;

struct Wanted {
  bool rows, columns, x, y;
};

// Contiguous [B, size, width] as its problems' matrices of their first rows.
Tensor problem_of(const Tensor& tensor, int64_t index, int64_t count) {
  const int64_t size = tensor.size(1), width = tensor.size(2);
  return matrix_view(tensor, index * size * width, {count, width}, {width, 1});
}
Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count, int64_t stride, int64_t width) {
  return matrix_view(matrix, first * stride, {count, width}, {stride, 1});
}
Tensor transposed_rows_of(const Tensor& matrix, int64_t first, int64_t count, int64_t stride, int64_t width) {
  return matrix_view(matrix, first * stride, {width, count}, {1, stride});
}

Tensor zeros(std::initializer_list<int64_t> sizes, const Tensor& like) {
  Tensor result = empty(sizes, like.scalar_type(), like);
  torch::stable::zero_(result);
  return result;
}

// Rows or columns but for those at the end that have no part in the plan: a ragged batch is padded with them.
int64_t count_present(const double* potentials, int64_t count) {
  while (count > 0 && potentials[count - 1] == -INFINITY) --count;
  return count;
}

template <typename A>
class Pass {
 public:
  Pass(const Tensor& x, const Tensor& y, const Tensor& row_potentials, const Tensor& column_potentials,
       const Tensor& epsilon, const Tensor& u, const Tensor& z, PointCost point_cost, bool times_cost, Wanted wanted)
      : x_(x),
        y_(y),
        u_(u),
        z_(z),
        row_potentials_(static_cast<const double*>(row_potentials.const_data_ptr())),
        column_potentials_(static_cast<const double*>(column_potentials.const_data_ptr())),
        epsilon_(static_cast<const double*>(epsilon.const_data_ptr())),
        batch_(x.size(0)),
        all_rows_(x.size(1)),
        all_columns_(y.size(1)),
        d_(x.size(2)),
        k_(u.size(2)),
        wanted_(wanted),
        rows(zeros({batch_, all_rows_, k_}, x)),
        columns(zeros({batch_, all_columns_, k_}, x)),
        by_x(zeros({batch_, all_rows_, d_}, x)),
        by_y(zeros({batch_, all_columns_, d_}, x)) {
    args_ = {};
    args_.dtype = sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;
    args_.point_cost = point_cost;
    args_.dimension = d_;
    args_.times_cost = times_cost;
  }

  void run() {
    for (int64_t index = 0; index < batch_; ++index) {
      n_ = count_present(row_potentials_ + index * all_rows_, all_rows_);
      m_ = count_present(column_potentials_ + index * all_columns_, all_columns_);
      stride_ = (m_ + kPadding - 1) / kPadding * kPadding;
      problem(index);
    }
  }

 private:
  void problem(int64_t index) {
    const int64_t of_rows = index * all_rows_, of_columns = index * all_columns_;
    const bool has_plan = wanted_.rows || wanted_.columns, has_weights = wanted_.x || wanted_.y;
    if (n_ == 0 || m_ == 0 || !(has_plan || has_weights)) return;
    const bool is_vector = k_ == 1, pulls_directly = has_weights && is_direct(args_.point_cost, d_);
    const bool holds_weights = has_weights && !(pulls_directly && is_vector);
    const int64_t panels = has_plan + holds_weights;
    const int64_t panel_rows = panels == 0 ? n_ : std::clamp(kMostEntries / (panels * stride_), int64_t{1}, n_);
    const auto panel = [&](bool is_wanted) {
      return zeros({is_wanted ? panel_rows * stride_ : 0}, x_);  // products leave the padding as it is
    };
    const Tensor plan = panel(has_plan), weights = panel(holds_weights);
    Tensor direct_by_y = zeros({pulls_directly && wanted_.y ? kPlanBlocks : 0, d_, stride_}, x_);
    const Tensor coordinates = empty({d_, stride_}, x_.scalar_type(), x_);
    const Tensor potentials = empty({2, stride_}, x_.scalar_type(), x_);
    const Tensor z_padded = zeros({stride_}, x_);
    args_.y = coordinates.const_data_ptr();
    args_.column_potentials = potentials.const_data_ptr();
    args_.plan = has_plan ? plan.mutable_data_ptr() : nullptr;
    args_.weights = holds_weights ? weights.mutable_data_ptr() : nullptr;
    if (pulls_directly && wanted_.y) args_.by_y = direct_by_y.mutable_data_ptr();
    if (has_weights && is_vector) args_.z = z_padded.const_data_ptr();
    cpu::point_columns({args_.dtype, m_, d_, stride_, data(y_) + of_columns * d_, column_potentials_ + of_columns,
                        coordinates.mutable_data_ptr(), potentials.mutable_data_ptr()});
    args_.columns = m_;
    args_.stride = stride_;
    args_.epsilon = epsilon_[index];
    if (is_vector) std::copy_n(data(z_) + of_columns, m_, static_cast<A*>(z_padded.mutable_data_ptr()));
    const Centred points(*this, index, has_weights && !pulls_directly);
    const Tensor u = problem_of(u_, index, n_), z = problem_of(z_, index, m_);
    // Transposed: of [x, 1]^T W the product is a third faster than of W^T [x, 1].
    const Tensor sums_of_columns = zeros({d_ + 1, wanted_.y && !pulls_directly ? m_ : 0}, x_);
    for (int64_t first = 0; first < n_; first += panel_rows) {
      const int64_t count = std::min(panel_rows, n_ - first);
      args_.rows = count;
      args_.x = data(x_) + (of_rows + first) * d_;
      args_.row_potentials = row_potentials_ + of_rows + first;
      const Tensor u_rows = rows_of(u_, of_rows + first, count, k_, k_);
      const Tensor weights_here = rows_of(weights, 0, holds_weights ? count : 0, stride_, m_);
      if (pulls_directly && wanted_.x) args_.by_x = static_cast<A*>(by_x.mutable_data_ptr()) + (of_rows + first) * d_;
      if (has_weights) {
        if (is_vector)
          args_.u = data(u_) + of_rows + first;
        else
          multiply(weights_here, u_rows, matrix_view(z_, of_columns * k_, {k_, m_}, {1, k_}));
      }
      cpu::point_plan(args_);
      if (wanted_.rows) {
        multiply(rows_of(rows, of_rows + first, count, k_, k_), rows_of(plan, 0, count, stride_, m_), z);
      }
      if (wanted_.columns) {
        add_product(problem_of(columns, index, m_), transposed_rows_of(plan, 0, count, stride_, m_), u_rows);
      }
      if (pulls_directly) continue;
      if (wanted_.x) {
        const Tensor sums = empty({count, d_ + 1}, x_.scalar_type(), x_);
        multiply(sums, weights_here, points.y);
        points.pull({data(sums), d_ + 1, 1}, points.x, first, count,
                    static_cast<A*>(by_x.mutable_data_ptr()) + of_rows * d_);
      }
      if (wanted_.y) {
        add_product(sums_of_columns, transposed_rows_of(points.x, first, count, d_ + 1, d_ + 1), weights_here);
      }
    }
    if (pulls_directly) {
      finish_direct(index, direct_by_y);
    } else if (wanted_.y) {
      points.pull({data(sums_of_columns), 1, m_}, points.y, 0, m_,
                  static_cast<A*>(by_y.mutable_data_ptr()) + of_columns * d_);
    }
  }

  // The factor s, and the blocks' sums.
  void finish_direct(int64_t index, const Tensor& partial) {
    const A scale = args_.point_cost == PointCost::sqeuclidean ? A(2) : A(1);
    A* const of_x = static_cast<A*>(by_x.mutable_data_ptr()) + index * all_rows_ * d_;
    if (wanted_.x) {
      for (int64_t i = 0; i < n_ * d_; ++i) of_x[i] *= scale;
    }
    if (!wanted_.y) return;
    A* const of_y = static_cast<A*>(by_y.mutable_data_ptr()) + index * all_columns_ * d_;
    for (int64_t k = 0; k < d_; ++k) {
      for (int64_t j = 0; j < m_; ++j) {
        A sum = 0;
        for (int64_t block = 0; block < kPlanBlocks; ++block) sum += data(partial)[(block * d_ + k) * stride_ + j];
        of_y[j * d_ + k] = scale * sum;
      }
    }
  }

  // The points of a problem around their mean, whose digits differences of sums would lose, and a 1 each.
  struct Centred {
    Centred(const Pass& pass, int64_t index, bool is_needed)
        : point_cost(pass.args_.point_cost),
          d(pass.d_),
          x(empty({is_needed ? pass.n_ : 0, d + 1}, pass.x_.scalar_type(), pass.x_)),
          y(empty({is_needed ? pass.m_ : 0, d + 1}, pass.x_.scalar_type(), pass.x_)) {
      if (!is_needed) return;
      const A* const of_x = data(pass.x_) + index * pass.all_rows_ * d;
      std::vector<double> centre(static_cast<size_t>(d), 0.0);
      if (point_cost != PointCost::cosine) {
        for (int64_t i = 0; i < pass.n_; ++i) {
          for (int64_t k = 0; k < d; ++k)
            centre[k] += static_cast<double>(of_x[i * d + k]) / static_cast<double>(pass.n_);
        }
      }
      fill(of_x, pass.n_, centre, static_cast<A*>(x.mutable_data_ptr()));
      fill(data(pass.y_) + index * pass.all_columns_ * d, pass.m_, centre, static_cast<A*>(y.mutable_data_ptr()));
    }

    void fill(const A* points, int64_t count, const std::vector<double>& centre, A* to) const {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < d; ++k) to[i * (d + 1) + k] = points[i * d + k] - static_cast<A>(centre[k]);
        to[i * (d + 1) + d] = 1;
      }
    }

    // W [y, 1] of some rows, or columns likewise.
    struct Sums {
      const A* data;
      int64_t row_stride, coordinate_stride;
      A at(int64_t i, int64_t k) const { return data[i * row_stride + k * coordinate_stride]; }
    };

    // Of rows first and following of x.
    void pull(const Sums& sums, const Tensor& points, int64_t first, int64_t count, A* gradient) const {
      const A scale = point_cost == PointCost::sqeuclidean ? A(2) : A(1);
      const bool is_distance = point_cost != PointCost::cosine;
      const A* const x = data(points) + first * (d + 1);
      for (int64_t i = 0; i < count; ++i) {
        const A total = sums.at(i, d);
        for (int64_t k = 0; k < d; ++k) {
          const A own = is_distance ? total * x[i * (d + 1) + k] : A(0);
          gradient[(first + i) * d + k] = scale * (own - sums.at(i, k));
        }
      }
    }

    PointCost point_cost;
    int64_t d;
    Tensor x, y;  // [n, d + 1], [m, d + 1]
  };

  static const A* data(const Tensor& tensor) { return static_cast<const A*>(tensor.const_data_ptr()); }

  const Tensor &x_, &y_, &u_, &z_;
  const double *row_potentials_, *column_potentials_, *epsilon_;
  int64_t batch_, all_rows_, all_columns_, d_, k_;
  Wanted wanted_;
  PointPlanArgs args_;
  int64_t n_ = 0, m_ = 0, stride_ = 0;  // of a problem

 public:
  Tensor rows, columns, by_x, by_y;
};

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> results(Pass<A>&& pass) {
  pass.run();
  return {pass.rows, pass.columns, pass.by_x, pass.by_y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> point_plan(Tensor x, Tensor y, Tensor row_potentials,
                                                      Tensor column_potentials, Tensor epsilon, Tensor u, Tensor z,
                                                      int64_t point_cost, bool times_cost, bool with_rows,
                                                      bool with_columns, bool with_x, bool with_y) {
  PYREG_REQUIRE(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(2) == y.size(2), kName,
                "expected points x [B, n, d] and y [B, m, d]");
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1);
  const Dtype dtype = dtype_of(x.scalar_type(), kName);
  PYREG_REQUIRE(dtype == Dtype::float64 || dtype == Dtype::float32, kName, "expected points of float64 or float32");
  PYREG_REQUIRE(point_cost >= 0 && point_cost <= 2, kName, "expected point_cost to be 0, 1 or 2");
  const auto has_shape = [](const Tensor& tensor, int64_t batch, int64_t count) {
    return tensor.scalar_type() == ScalarType::Double && tensor.numel() == batch * count && tensor.is_cpu();
  };
  PYREG_REQUIRE(
      has_shape(row_potentials, batch, n) && has_shape(column_potentials, batch, m) && has_shape(epsilon, batch, 1),
      kName, "expected float64 potentials [B, n] and [B, m], and epsilon [B]");
  PYREG_REQUIRE(u.dim() == 3 && z.dim() == 3 && u.size(0) == batch && z.size(0) == batch && u.size(1) == n &&
                    z.size(1) == m && u.size(2) == z.size(2),
                kName, "expected u [B, n, k] and z [B, m, k]");
  for (const Tensor* tensor : {&y, &u, &z}) {
    PYREG_REQUIRE(tensor->scalar_type() == x.scalar_type() && tensor->is_cpu(), kName,
                  "expected y, u and z of the dtype and device of x");
  }
  const Wanted wanted{with_rows, with_columns, with_x, with_y};
  const Tensor inputs[] = {as_contiguous(x),
                           as_contiguous(y),
                           as_contiguous(row_potentials),
                           as_contiguous(column_potentials),
                           as_contiguous(epsilon),
                           as_contiguous(u),
                           as_contiguous(z)};
  const auto run = [&](auto number) {
    return results(Pass<decltype(number)>(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6],
                                          static_cast<PointCost>(point_cost), times_cost, wanted));
  };
  return dtype == Dtype::float64 ? run(double{}) : run(float{});
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) { library.impl("point_plan", TORCH_BOX(&point_plan)); }

}  // namespace pyreg

// CPU kernels of a panel of the plan between points. Notation: point_plan.h.
#include "core/parallel.h"
#include "core/rows.h"
#include "point_plan/point_plan.h"
#include "sinkhorn/point_costs.h"

namespace pyreg::PYREG_ISA {

namespace {

constexpr int64_t kTogether = 4;  // rows whose costs are formed at a time in many dimensions

template <typename A>
constexpr A kLargest = sizeof(A) == 4 ? A(80) : A(600);

template <typename A, PointCost kCost, int64_t kDimension>
class Panel {
 public:
  explicit Panel(const PointPlanArgs& args)
      : args_(args),
        cost_{args.dimension, args.stride, static_cast<const A*>(args.x), static_cast<const A*>(args.y)},
        epsilon_(static_cast<A>(args.epsilon)),
        scale_(static_cast<A>(1 / args.epsilon)) {}

  void run() const {
    parallel_for(kPlanBlocks, 1, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t block = begin; block < end; ++block) {
        int64_t i = args_.rows * block / kPlanBlocks;
        const int64_t end = args_.rows * (block + 1) / kPlanBlocks;
        if constexpr (kDimension == 0) {
          const Scratch<A> costs(kTogether * args_.stride);
          for (; i + kTogether <= end; i += kTogether) {
            fill_costs<kTogether>(cost_, i, costs.get(), args_.stride);
            for (int64_t r = 0; r < kTogether; ++r) row(i + r, block, costs.get() + r * args_.stride);
          }
        }
        for (; i < end; ++i) row(i, block, nullptr);
      }
    });
  }

 private:
  // `costs` of the row, or null.
  void row(int64_t i, int64_t block, const A* costs) const {
    const A* const point = cost_.row(i).point;
    const Split<A> potential(args_.row_potentials[i]);
    const A* const high = static_cast<const A*>(args_.column_potentials);
    const A* const low = high + args_.stride;
    const A* const u = static_cast<const A*>(args_.u);
    const A* const z = static_cast<const A*>(args_.z);
    A* const plan = part(args_.plan, i * args_.stride);
    A* const weights = part(args_.weights, i * args_.stride);
    A* const by_x = part(args_.by_x, i * args_.dimension);
    A* const by_y = part(args_.by_y, block * args_.dimension * args_.stride);
    const bool is_direct = by_x != nullptr || by_y != nullptr;
    constexpr int64_t kSums = kDimension > 0 ? kDimension : 1;
    Vector<A> sums[kSums] = {};
    for (int64_t j = 0; j < args_.stride; j += kLanes<A>) {
      const Vector<A> c = costs == nullptr ? cost_.at({point}, j) : load(costs + j);
      const Vector<A> exponent =
          difference<A>(broadcast(potential.high), c, load(high + j), load(low + j) + potential.low) * scale_;
      Vector<A> e = exponential(exponent < kLargest<A> ? exponent : broadcast(kLargest<A>));
      if (plan != nullptr) store(plan + j, args_.times_cost ? e * c : e);
      if (weights == nullptr && !is_direct) continue;
      if (args_.times_cost) e = e * (c - epsilon_);
      if constexpr (kCost == PointCost::euclidean) e = c > A(0) ? e / c : broadcast(A(0));
      const Vector<A> weight = e * (u == nullptr ? load(weights + j) : u[i] * load(z + j));
      if (!is_direct) {
        store(weights + j, weight);
        continue;
      }
      for (int64_t k = 0; k < kDimension; ++k) {
        const Vector<A> pull = weight * (point[k] - load(cost_.y + k * args_.stride + j));
        sums[k] += pull;
        if (by_y != nullptr) store(by_y + k * args_.stride + j, load(by_y + k * args_.stride + j) - pull);
      }
    }
    if (by_x == nullptr) return;
    for (int64_t k = 0; k < kDimension; ++k) by_x[k] = sum_lanes(sums[k]);
  }

  static A* part(void* base, int64_t offset) { return base == nullptr ? nullptr : static_cast<A*>(base) + offset; }

  const PointPlanArgs& args_;
  PointsCost<A, kCost, kDimension> cost_;
  A epsilon_, scale_;
};

template <typename A, PointCost kCost>
void panel_of_dimension(const PointPlanArgs& args) {
  switch (args.dimension) {
    case 1:
      return Panel<A, kCost, 1>(args).run();
    case 2:
      return Panel<A, kCost, 2>(args).run();
    case 3:
      return Panel<A, kCost, 3>(args).run();
    default:
      return Panel<A, kCost, 0>(args).run();
  }
}

template <typename A>
void panel_of_cost(const PointPlanArgs& args) {
  switch (args.point_cost) {
    case PointCost::sqeuclidean:
      return panel_of_dimension<A, PointCost::sqeuclidean>(args);
    case PointCost::euclidean:
      return panel_of_dimension<A, PointCost::euclidean>(args);
    case PointCost::cosine:
      return panel_of_dimension<A, PointCost::cosine>(args);
  }
}

template <typename A>
void columns(const PointColumnsArgs& args) {
  transpose_points(static_cast<const A*>(args.points), args.columns, args.dimension, args.stride,
                   static_cast<A*>(args.y));
  A* const potentials = static_cast<A*>(args.column_potentials);
  for (int64_t j = 0; j < args.stride; ++j) {
    const Split<A> potential(j < args.columns ? args.potentials[j] : -INFINITY);
    potentials[j] = potential.high;
    potentials[args.stride + j] = potential.low;
  }
}

}  // namespace

void point_plan(const PointPlanArgs& args) {
  if (args.dtype == Dtype::float64) return panel_of_cost<double>(args);
  panel_of_cost<float>(args);
}

void point_columns(const PointColumnsArgs& args) {
  if (args.dtype == Dtype::float64) return columns<double>(args);
  columns<float>(args);
}

}  // namespace pyreg::PYREG_ISA

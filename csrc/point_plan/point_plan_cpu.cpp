// CPU kernels of a panel of the plan between points. Notation: point_plan.h.
#include "core/parallel.h"
#include "point_plan/point_plan.h"
#include "sinkhorn/point_costs.h"

namespace pyreg::PYREG_ISA {

namespace {

// Entries that are worth a second thread.
constexpr int64_t kEntriesPerTask = 8192;

template <typename A>
constexpr A kLargest = sizeof(A) == 4 ? A(80) : A(600);

template <typename A, PointCost kCost, int64_t kDimension>
void panel(const PointPlanArgs& args) {
  const PointsCost<A, kCost, kDimension> cost{args.dimension, args.stride, static_cast<const A*>(args.x),
                                              static_cast<const A*>(args.y)};
  const A epsilon = static_cast<A>(args.epsilon), scale = static_cast<A>(1 / args.epsilon);
  const A* const column_potentials = static_cast<const A*>(args.column_potentials);
  const A* const u = static_cast<const A*>(args.u);
  const A* const z = static_cast<const A*>(args.z);
  parallel_for(args.rows, (kEntriesPerTask + args.stride - 1) / args.stride, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t i = begin; i < end; ++i) {
      const auto point = cost.row(i);
      const Split<A> potential(args.row_potentials[i]);
      A* const plan = args.plan == nullptr ? nullptr : static_cast<A*>(args.plan) + i * args.stride;
      A* const weights = args.weights == nullptr ? nullptr : static_cast<A*>(args.weights) + i * args.stride;
      for (int64_t j = 0; j < args.stride; j += kLanes<A>) {
        const Vector<A> c = cost.at(point, j), low = load(column_potentials + args.stride + j) + potential.low;
        const Vector<A> high = load(column_potentials + j);
        const Vector<A> exponent = difference<A>(broadcast(potential.high), c, high, low) * scale;
        Vector<A> e = exponential(exponent < kLargest<A> ? exponent : broadcast(kLargest<A>));
        if (plan != nullptr) store(plan + j, args.times_cost ? e * c : e);
        if (weights == nullptr) continue;
        if (args.times_cost) e = e * (c - epsilon);
        const Vector<A> factor = u == nullptr ? load(weights + j) : u[i] * load(z + j);
        if constexpr (kCost == PointCost::euclidean) e = c > A(0) ? e / c : broadcast(A(0));
        store(weights + j, e * factor);
      }
    }
  });
}

template <typename A, PointCost kCost>
void panel_of_dimension(const PointPlanArgs& args) {
  switch (args.dimension) {
    case 1:
      return panel<A, kCost, 1>(args);
    case 2:
      return panel<A, kCost, 2>(args);
    case 3:
      return panel<A, kCost, 3>(args);
    default:
      return panel<A, kCost, 0>(args);
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

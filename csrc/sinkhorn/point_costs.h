// Costs between points on the CPU, formed from their coordinates by vectors of columns, and exponents with them.
#pragma once

#include <cmath>

#include "core/math.h"
#include "core/simd.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg::PYREG_ISA {

// From differences of coordinates: a product of matrices loses what lengths and distances have in common.
// kDimension 0: any number of them.
template <typename Scores, PointCost kCost, int64_t kDimension>
struct PointsCost {
  using A = Scores;
  struct Row {
    const A* point;
  };

  Row row(int64_t i) const { return {x + i * dimension}; }

  Vector<A> at(const Row& row, int64_t j) const {
    Vector<A> sum{};
    for (int64_t k = 0; k < (kDimension > 0 ? kDimension : dimension); ++k) {
      sum = add(sum, row.point[k], load(y + k * stride + j));
    }
    return finish(sum);
  }

  static Vector<A> add(Vector<A> sum, A x, Vector<A> y) {
    if constexpr (kCost == PointCost::cosine) return sum + x * y;
    const Vector<A> difference = x - y;
    return sum + difference * difference;
  }
  Vector<A> finish(Vector<A> sum) const {
    if constexpr (kCost == PointCost::cosine) return A(1) - sum;
    if constexpr (kCost == PointCost::euclidean) return square_root(sum < least_square ? broadcast(least_square) : sum);
    return sum;
  }

  Vector<A> at_end(const Row& row, int64_t j, int count) const {
    return lane_index<A>() < count ? at(row, j) : broadcast(static_cast<A>(__builtin_inf()));
  }

  int64_t dimension, stride;
  const A* x;          // [rows, dimension]
  const A* y;          // [dimension, stride], the columns' points
  A least_square = 0;  // squared distances count as no less, before roots are taken
};

// Costs of rows first... from column `begin` on, `stride` apart. A vector of the columns' points is loaded once for
// kRows of them.
template <int64_t kRows, typename A, PointCost kCost, int64_t kDimension>
void fill_costs(const PointsCost<A, kCost, kDimension>& cost, int64_t first, A* to, int64_t stride, int64_t begin = 0) {
  const A* const points = cost.x + first * cost.dimension;
  for (int64_t j = begin; j < cost.stride; j += kLanes<A>, to += kLanes<A>) {
    Vector<A> sums[kRows] = {};
    for (int64_t k = 0; k < cost.dimension; ++k) {
      const Vector<A> coordinate = load(cost.y + k * cost.stride + j);
      for (int64_t r = 0; r < kRows; ++r) sums[r] = cost.add(sums[r], points[r * cost.dimension + k], coordinate);
    }
    for (int64_t r = 0; r < kRows; ++r) store(to + r * stride, cost.finish(sums[r]));
  }
}

// Points [count, dimension] as `y` above: transposed, and padded by 0. Some points at a time, which the first-level
// cache holds until the last of their coordinates has been taken.
template <typename A>
void transpose_points(const A* points, int64_t count, int64_t dimension, int64_t stride, A* to) {
  constexpr int64_t kPoints = 16;
  for (int64_t first = 0; first < count; first += kPoints) {
    const int64_t end = first + kPoints < count ? first + kPoints : count;
    for (int64_t k = 0; k < dimension; ++k) {
      for (int64_t j = first; j < end; ++j) to[k * stride + j] = points[j * dimension + k];
    }
  }
  for (int64_t k = 0; k < dimension; ++k) {
    for (int64_t j = count; j < stride; ++j) to[k * stride + j] = 0;
  }
}

// A potential as one number of A and what that leaves.
template <typename A>
struct Split {
  explicit Split(double x) : high(static_cast<A>(x)), low(std::isfinite(x) ? static_cast<A>(x - high) : A(0)) {}
  A high, low;
};

// p - c + q + low. Potentials and costs are some thousand epsilon at times, and their difference some epsilon: what
// float loses in the first step is added back (Knuth's sum without error); the second loses but digits of its result.
// Minus infinity stays it.
template <typename A>
inline Vector<A> difference(Vector<A> p, Vector<A> c, Vector<A> q, Vector<A> low) {
  const Vector<A> first = p - c, sum = first + q;
  if constexpr (sizeof(A) == 8) return sum;
  const Vector<A> minus_c = first - p, loss = (p - (first - minus_c)) - (c + minus_c);
  return sum > broadcast(-static_cast<A>(__builtin_inf())) ? sum + (loss + low) : sum;
}

}  // namespace pyreg::PYREG_ISA

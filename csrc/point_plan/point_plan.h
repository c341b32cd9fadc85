// One pass over the plan between points, which is never held:
//
//   E_ij = exp((F_i + G_j - C_ij) / eps),   C_ij = c(x_i, y_j)
//   rows     E z   [n, k]        by_x_i = sum_j E_ij (u_i . z_j) dC_ij / dx_i   [n, d]
//   columns  E^T u [m, k]        by_y_j = sum_i E_ij (u_i . z_j) dC_ij / dy_j   [m, d]
//
// Both are gradients of sum_ij E_ij (u_i . z_j), but for -1 / eps. So they are of sum_ij E_ij C_ij (u_i . z_j) where
// rows and columns are of E_ij C_ij: with E_ij (C_ij - eps) in place of E_ij.
//
// With W_ij = E_ij (u_i . z_j) slope_ij, by_x is s (W 1 x - W y) for distances: s = 2 and slope 1 for squared ones, s =
// 1 and slope 1 / |x_i - y_j| otherwise, 0 where two points meet; and -W y for cosines.
//
// In up to kMostDirect dimensions W (x - y) is summed as it stands, which keeps the digits of points that nearly meet,
// and W is not even held for a moment. Otherwise a panel of some rows and all columns is formed at a time, of E, of W
// or of both, by one exponential an entry, and multiplied by torch's matrix products while it lies in the cache.
// Exponents are those of sinkhorn.h, beyond kLargest cut off: between two weights of 0 they may be anything.
#pragma once

#include "sinkhorn/sinkhorn.h"

namespace pyreg {

constexpr int64_t kMostDirect = 3;

inline bool is_direct(PointCost point_cost, int64_t dimension) {
  return point_cost != PointCost::cosine && dimension <= kMostDirect;
}

// Rows are shared by threads in so many blocks, whose sums for the columns are added up in a fixed order.
constexpr int64_t kPlanBlocks = 16;

struct PointPlanArgs {
  Dtype dtype;  // float64 or float32
  PointCost point_cost;
  int64_t rows, columns, dimension;
  int64_t stride;                 // of what has an entry a column: columns and their padding
  const void* x;                  // [rows, dimension]
  const void* y;                  // [dimension, stride], transposed
  const double* row_potentials;   // [rows]
  const void* column_potentials;  // [2, stride]: as numbers of the dtype, and what that leaves; -infinity as padding
  double epsilon;
  bool times_cost;
  const void* u;  // [rows], with z [stride] for k = 1; null: u . z is in `weights`
  const void* z;
  void* plan;     // [rows, stride] or null
  void* weights;  // [rows, stride] or null: W
  // Where it is direct, or null: gradients but for s.
  void* by_x;  // [rows, dimension]
  void* by_y;  // [kPlanBlocks, dimension, stride], added to
};

struct PointColumnsArgs {
  Dtype dtype;
  int64_t columns, dimension, stride;
  const void* points;        // [columns, dimension]
  const double* potentials;  // [columns]
  void* y;                   // as above
  void* column_potentials;
};

PYREG_DECLARE_KERNEL(point_plan, PointPlanArgs)
PYREG_DECLARE_KERNEL(point_columns, PointColumnsArgs)

}  // namespace pyreg

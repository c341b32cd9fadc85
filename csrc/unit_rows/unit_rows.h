// Rows brought to length 1 and into the order in which tiles take them, and the way of a gradient back through both.
//
//   z = f / max(|f|, 1e-12)
//   df = (dz - z (z . dz)) / |f|, or dz / 1e-12 where |f| < 1e-12
//
// Without normalisation z = f and df = dz. Norms are summed in double: no feature overflows its square but a double's.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace pyreg {

constexpr double kLeastNorm = 1e-12;

struct UnitRowsArgs {
  Dtype dtype;           // of features
  const void* features;  // [*, width]
  const int64_t* order;  // [count] which of the features is row i; null: i itself
  int64_t count, width;
  bool normalize;
  void* rows;            // [count, width] in the accumulation type: z
  double* inverse_norm;  // [count] 1 / max(|f|, 1e-12); negative where |f| < 1e-12
};

struct UnitRowsBackwardArgs {
  Dtype dtype;            // of grad_features
  const void* rows;       // [count, width] z
  const void* grad_rows;  // [count, width] dz, as z
  const double* inverse_norm;
  const int64_t* order;
  int64_t first;  // row i's gradient goes to grad_features[order[i] - first]
  int64_t count, width;
  bool normalize;
  void* grad_features;  // [*, width]
};

PYREG_DECLARE_KERNEL(unit_rows, UnitRowsArgs)
PYREG_DECLARE_KERNEL(unit_rows_backward, UnitRowsBackwardArgs)

}  // namespace pyreg

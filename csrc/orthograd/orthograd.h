// OrthoGrad (Prieto et al. 2025, arXiv 2501.04697): the gradient's component along the weights is removed and the rest
// rescaled to the gradient's norm. For each parameter w with gradient g, both flat:
//
//   g_perp = g - (w.g / (w.w + 1e-30)) w,      g' = g_perp |g| / (|g_perp| + 1e-30)
//
// |g_perp|^2 = g.g - (w.g)^2 / w.w cancels where g is nearly parallel to w. The sums are kept in double, which is right to
// 1e-8 down to |g_perp| / |g| = 1e-4; below that |g_perp| is summed from its elements in a pass of its own.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"
#include "core/math.h"

namespace pyreg {

constexpr double kOrthogradEpsilon = 1e-30;

// The sums over one parameter, or over a part of it.
struct OrthogradSums {
  double ww, wg, gg;
};

// g' = scale * (g - projection * w)
struct OrthogradUpdate {
  double projection;  // w.g / (w.w + epsilon)
  double scale;       // |g| / (|g_perp| + epsilon)
};

PYREG_HOST_DEVICE double orthograd_projection(const OrthogradSums& sums) {
  return sums.wg / (sums.ww + kOrthogradEpsilon);
}

// |g_perp|^2 from the three sums: sum (g - a w)^2 = gg - 2 a wg + a^2 ww.
PYREG_HOST_DEVICE double orthograd_residual(const OrthogradSums& sums) {
  const double projection = orthograd_projection(sums);
  return sums.gg - projection * (2 * sums.wg - projection * sums.ww);
}

// Whether the three sums have lost too many digits to give |g_perp|: at a ratio of 1e-4, 1e-8 of their 1e-16 are left.
PYREG_HOST_DEVICE bool orthograd_is_parallel(const OrthogradSums& sums) {
  return !(orthograd_residual(sums) >= 1e-8 * sums.gg);
}

PYREG_HOST_DEVICE OrthogradUpdate orthograd_update(const OrthogradSums& sums, double residual) {
  return {orthograd_projection(sums), sqrt(sums.gg) / (sqrt(residual) + kOrthogradEpsilon)};
}

struct OrthogradTensor {
  const void* weight;  // [size]
  void* grad;          // [size], overwritten
  int64_t size;
  Dtype dtype;         // of both
};

struct OrthogradArgs {
  const OrthogradTensor* tensors;  // [count], in host memory
  int64_t count;
  void* workspace;  // CUDA: device memory of orthograd_workspace_bytes(count) bytes
  void* stream;
};

// grad <- g' for every tensor
PYREG_DECLARE_KERNEL(orthogonalize_gradients, OrthogradArgs)

}  // namespace pyreg

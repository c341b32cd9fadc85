// OrthoGrad (Prieto et al. 2025, arXiv 2501.04697): the gradient's component along the weights is removed and the rest
// rescaled to the gradient's norm. For each parameter w with gradient g, both flat:
//
//   g_perp = g - (w.g / (w.w + epsilon)) w,      g' = g_perp |g| / (|g_perp| + epsilon),      epsilon = 1e-30
//
// The sums w.w, w.g and g.g are kept in double, in which the products of floats are exact, and give
//
//   |g_perp|^2 = g.g - 2 a w.g + a^2 w.w = g.g - a w.g (1 + epsilon / (w.w + epsilon)),      a = w.g / (w.w + epsilon)
//
// which cancels where g is nearly parallel to w: there |g_perp|^2 is summed from its elements in a pass of its own.
// Where |g_perp| < 2^-45 |g|, below what double arithmetic resolves, g is parallel to w and g' is 0; the formula would
// bring rounding noise up to |g|. A parameter of one element is such a case. The rounding of float elements (2^-25) is
// far above that: it counts as given.
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

PYREG_HOST_DEVICE OrthogradSums operator+(const OrthogradSums& a, const OrthogradSums& b) {
  return {a.ww + b.ww, a.wg + b.wg, a.gg + b.gg};
}

// g' = scale * (g - projection * w)
struct OrthogradUpdate {
  double projection;  // a
  double scale;       // |g| / (|g_perp| + epsilon)

  // Zero weights leave the gradient as it is.
  PYREG_HOST_DEVICE bool is_identity() const { return projection == 0 && scale == 1; }
};

PYREG_HOST_DEVICE double orthograd_projection(const OrthogradSums& sums) {
  return sums.wg / (sums.ww + kOrthogradEpsilon);
}

// |g_perp|^2 from the three sums
PYREG_HOST_DEVICE double orthograd_residual(const OrthogradSums& sums) {
  const double correction = 1 + kOrthogradEpsilon / (sums.ww + kOrthogradEpsilon);
  return sums.gg - orthograd_projection(sums) * sums.wg * correction;
}

// Whether the three sums have lost too many digits to give |g_perp|. For float and narrower gradients 10 of the sums'
// 16 digits may go: 6 fewer than the result holds. For double gradients none may.
PYREG_HOST_DEVICE bool orthograd_is_parallel(const OrthogradSums& sums, Dtype dtype) {
  return orthograd_residual(sums) < (dtype == Dtype::float64 ? 0.25 : 1e-6) * sums.gg;
}

// The residual is |g_perp|^2.
PYREG_HOST_DEVICE OrthogradUpdate orthograd_update(const OrthogradSums& sums, double residual) {
  if (sums.ww == 0 && sums.wg == 0) return {0, 1};
  if (residual < 0x1p-90 * sums.gg) return {orthograd_projection(sums), 0};
  return {orthograd_projection(sums), sqrt(sums.gg) / (sqrt(residual) + kOrthogradEpsilon)};
}

// g' of one element
PYREG_HOST_DEVICE double orthograd_apply(const OrthogradUpdate& update, double w, double g) {
  return update.scale * (g - update.projection * w);
}

// The tensors lie one after another in a space of chunks, none of which spans two tensors. A chunk is the unit of work
// and of summation: sums over chunks are joined in their order, so that no result depends on the number of threads.
// 16384 floats are 64 KB: weights and gradients of a chunk fit in a CPU core's L2 between two passes, and the 1700
// chunks of a ResNet-50 fill a GPU several times over.
constexpr int64_t kOrthogradChunk = 16384;

struct OrthogradTensor {
  const void* weight;   // [size]
  void* grad;           // [size], overwritten
  int64_t size;         // > 0
  int32_t first_chunk;  // the chunks of all tensors before this one
  Dtype dtype;          // of both

  PYREG_HOST_DEVICE int32_t chunks() const {
    return static_cast<int32_t>((size + kOrthogradChunk - 1) / kOrthogradChunk);
  }
};

// Tensors may be shards of parameters whose other shards lie in other processes. Then a call makes one step, and what
// it leaves is added up over the processes before the next.
enum class OrthogradStep {
  everything,  // grad <- g'
  sums,        // args.sums <- sums over the tensors
  residuals,   // args.residuals <- |g_perp|^2 over the tensors, from args.sums of whole parameters; 0 where these give
               // it
  update,      // grad <- g' from args.sums and args.residuals of whole parameters
};

struct OrthogradArgs {
  const OrthogradTensor* tensors;  // [count], in host memory
  int64_t count;
  int64_t chunks;     // of all tensors
  double* workspace;  // [orthograd_workspace_size(count, chunks)], on the tensors' device
  OrthogradStep step;
  OrthogradSums* sums;  // [count], of single steps
  double* residuals;    // [count], of single steps but the first
  void* stream;
};

struct OrthogradWorkspace {
  OrthogradSums* sums;          // [count]
  OrthogradUpdate* updates;     // [count]
  double* residuals;            // [count]
  OrthogradSums* partial_sums;  // [chunks]
  double* partial_residuals;    // [chunks], of nearly parallel gradients only
};

PYREG_HOST_DEVICE int64_t orthograd_workspace_size(int64_t count, int64_t chunks) { return 6 * count + 4 * chunks; }

// With the sums and residuals of the call in place of its own where it makes a single step.
PYREG_HOST_DEVICE OrthogradWorkspace orthograd_workspace(const OrthogradArgs& args) {
  const bool is_single = args.step != OrthogradStep::everything;
  double* const updates = args.workspace + 3 * args.count;
  double* const residuals = updates + 2 * args.count;
  double* const partial_sums = residuals + args.count;
  return {is_single ? args.sums : reinterpret_cast<OrthogradSums*>(args.workspace),
          reinterpret_cast<OrthogradUpdate*>(updates), is_single ? args.residuals : residuals,
          reinterpret_cast<OrthogradSums*>(partial_sums), partial_sums + 3 * args.chunks};
}

// What the step says, for every tensor
PYREG_DECLARE_KERNEL(orthogonalize_gradients, OrthogradArgs)

}  // namespace pyreg

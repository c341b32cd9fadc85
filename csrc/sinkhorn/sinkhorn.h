// Entropic optimal transport on a dense cost C [n, m], by Sinkhorn's iteration.
//
//   P_ij = exp((F_i + G_j - C_ij) / eps)
//   F_i <- eps (target_i - kappa_i log sum_j exp((G_j - C_ij) / eps))        G_j the same with the roles exchanged
//
// F and G hold eps log a and eps log b already. target = log a where the entropy is relative to a b^T ("product"), and
// kappa log a where it is relative to the counting measure; kappa = rho / (rho + eps), 1 for a marginal that must hold.
// A weight of 0 has target -infinity: its F is -infinity and its part of the plan 0.
//
// Stabilised scaling. With K = exp((Fa_i + Ga_j - C_ij) / eps) formed once for absorbed potentials Fa, Ga, and
// u = exp((F - Fa) / eps), v = exp((G - Ga) / eps):
//
//   s = K v,    u_i = exp(target_i + (kappa_i - 1) Fa_i / eps) s_i^-kappa_i
//   t = K^T u,  v_j = exp(target_j + (kappa_j - 1) Ga_j / eps) t_j^-kappa_j
//
// A row's u_i is known when its s_i is, so that u_i K_i joins t while the row is in cache: K is read once an iteration.
// Where a sum or a scaling leaves [1 / kWidest, kWidest], the potentials are absorbed, after one iteration by
// log-sum-exp on C itself if a sum had nothing left; so begins every stage of eps too.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/isa.h"

namespace pyreg {

// rho / (rho + eps), of penalties that are all infinite where there are none.
PYREG_HOST_DEVICE double sinkhorn_kappa(const double* rhos, int64_t i, double epsilon) {
  if (rhos == nullptr || rhos[i] == static_cast<double>(INFINITY)) return 1;
  return rhos[i] / (rhos[i] + epsilon);
}

struct SinkhornSide {
  const double* targets;  // [batch, count]: target_i but for epsilon: log a, or NaN-free -inf
  const double* rhos;     // [batch, count] or null: all infinite
  const double* weights;  // [batch, count]: a, for the marginals' error
  double* potentials;     // [batch, count] in: where to begin; out: F or G

  PYREG_HOST_DEVICE double kappa(int64_t i, double epsilon) const { return sinkhorn_kappa(rhos, i, epsilon); }
};

// cosine: of points of length 1, 1 - x . y
enum class PointCost : int32_t { sqeuclidean, euclidean, cosine };

// How a CUDA device is to be used; the tests force every way.
enum class SinkhornWay : int32_t { fastest, block, grid, launches };
struct SinkhornLimits {
  SinkhornWay way = SinkhornWay::fastest;
  int64_t shared_bytes = INT64_MAX;   // of a block, where the device has more
  bool may_hold_in_registers = true;  // K
};

struct SinkhornArgs {
  Dtype dtype;       // float64 or float32, of the cost or the points and of K
  const void* cost;  // [batch, rows, columns], contiguous; null: between points
  PointCost point_cost;
  int64_t dimension;
  const void* x;      // [batch, rows, dimension]
  const void* y;      // [batch, columns, dimension]
  bool is_streaming;  // K is never held
  int64_t batch, rows, columns;
  SinkhornSide row, column;
  bool is_counting;             // target is multiplied by kappa
  const double* epsilon;        // [batch] where it ends
  const double* first_epsilon;  // [batch] where it begins
  double epsilon_factor;        // between stages, below 1
  int64_t max_iterations;
  double tolerance;
  double* error;        // [batch] the last known
  int64_t* iterations;  // [batch]
  // On CUDA alone:
  SinkhornLimits limits;
  void* workspace;  // [sinkhorn_workspace(args)] bytes
  void* stream;

  PYREG_HOST_DEVICE double target(const SinkhornSide& side, int64_t i, double at) const {
    return is_counting ? side.targets[i] * side.kappa(i, at) : side.targets[i];
  }
  // Of marginals that must hold, how far a row's mass is from its weight. Else how far the logarithm of its mass is
  // from what its potential and the penalty ask for, which for a small rho may be far even where the potential moves by
  // little of eps. `step` is by how much it moves.
  PYREG_HOST_DEVICE double row_error(int64_t i, double at, double log_mass, double step) const {
    const double weight = row.weights[i];
    if (weight == 0) return 0;
    if (row.rhos == nullptr && column.rhos == nullptr) return fabs(weight - exp(log_mass));
    return fabs(step) < static_cast<double>(INFINITY) ? weight * fabs(step) / (row.kappa(i, at) * at) : 0;
  }
};

// A problem's stage of epsilon. `iterations` is always how many it has made.
struct SinkhornSchedule {
  enum class Next { iteration, stage, end };

  double epsilon;
  int32_t end;  // of the stage, in iterations; max_iterations is below 2^31
  bool is_last;

  // Of each stage but the last, whose end is the tolerance or the last iteration of all.
  static constexpr int32_t kStageIterations = 3;

  PYREG_HOST_DEVICE static SinkhornSchedule first(const SinkhornArgs& args, int64_t problem) {
    return stage(args, problem, args.first_epsilon[problem], 0);
  }
  PYREG_HOST_DEVICE SinkhornSchedule after(const SinkhornArgs& args, int64_t problem, int32_t iterations) const {
    return stage(args, problem, epsilon * args.epsilon_factor, iterations);
  }

  // What follows on an iteration whose error is `error`.
  PYREG_HOST_DEVICE Next next(const SinkhornArgs& args, int32_t iterations, double error) const {
    if (iterations < end && !(is_last && error <= args.tolerance)) return Next::iteration;
    return is_last ? Next::end : Next::stage;
  }

 private:
  // The last iteration is made at the epsilon that was asked for, whatever stage has been reached: so is the error.
  PYREG_HOST_DEVICE static SinkhornSchedule stage(const SinkhornArgs& args, int64_t problem, double wanted,
                                                  int32_t iterations) {
    const double last = args.epsilon[problem];
    const int32_t most = static_cast<int32_t>(args.max_iterations);
    if (!(wanted > last) || iterations + 1 >= most) return {last, most, true};
    return {wanted, iterations + kStageIterations < most ? iterations + kStageIterations : most - 1, false};
  }
};

PYREG_DECLARE_KERNEL(sinkhorn, SinkhornArgs)

namespace cpu {
constexpr bool kHasSinkhornPoints = true;
PYREG_HOST_DEVICE int64_t sinkhorn_workspace(const SinkhornArgs&) { return 0; }
}  // namespace cpu
namespace cuda {
constexpr bool kHasSinkhornPoints = false;
int64_t sinkhorn_workspace(const SinkhornArgs& args);  // bytes
}  // namespace cuda

}  // namespace pyreg

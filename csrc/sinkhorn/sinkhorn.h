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

#include "core/dtype.h"
#include "core/isa.h"

namespace pyreg {

struct SinkhornSide {
  const double* targets;  // [batch, count]: target_i but for epsilon: log a, or NaN-free -inf
  const double* rhos;     // [batch, count] or null: all infinite
  const double* weights;  // [batch, count]: a, for the marginals' error
  double* potentials;     // [batch, count] in: where to begin; out: F or G
};

// cosine: of points of length 1, 1 - x . y
enum class PointCost : int32_t { sqeuclidean, euclidean, cosine };

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
};

PYREG_DECLARE_KERNEL(sinkhorn, SinkhornArgs)

}  // namespace pyreg

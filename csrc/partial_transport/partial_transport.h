// Progressive partial transport of logits x [n, k]: every row has the mass 1 / n, which goes to k classes, whose masses
// are penalised, and to a virtual class of cost 0, whose mass must hold.
//
//   score_ij = gain_ij + x_ij - logsumexp_j x_ij,    score_ik = 0      (minus the cost)
//   plan_ij  = softmax_j( beta_j + score_ij / eps )                     n times the transport plan
//   beta_j  <- kappa_j ( log target_j + log n + beta_j - log sum_i plan_ij )
//   beta_j  <- beta_j + gamma / eps log( sum_{j < k} target_j exp(-eps / gamma beta_j) / sum_{j < k} target_j )
//
// beta is the logarithm of the columns' scaling; kappa = gamma / (gamma + eps), 1 for the virtual class. Rows must
// hold, so that they have no state: a row's scaling is the inverse of its sum, and whatever its scores have in common
// cancels. The last step is the constant, added to all of beta and taken from the rows' scalings, of which the plan
// knows nothing, that makes the dual largest: by the step before alone it is approached at the rate kappa, be the plan
// ever so good. The logarithm of the softmax is never formed: scores are x_ij - max, and logsumexp - max of the virtual
// class.
//
// Stabilised scaling: with K = exp(base_j + score_ij / eps - largest_i) formed once and v = exp(beta - base),
//
//   s = K v,    t = K^T (1 / s),    beta_j <- kappa_j ( log target_j + log n + base_j - log t_j )
//
// A row's s_i is known when it has been read, so that K_i / s_i joins t while the row is in cache: K is read once an
// iteration. K is formed anew where beta has moved far from base. Where all that a column has left of K is below its
// range, one iteration is made in the logarithms, in double.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace pyreg {

struct PartialTransportArgs {
  Dtype dtype;  // of the logits; all else is of its accumulation type, A
  int64_t rows, classes;
  const void* logits;     // [rows, classes], contiguous
  const void* gain;       // [rows, classes] or null
  const double* targets;  // [classes + 1], their sum 1; a class of 0 gets nothing
  double epsilon;
  double epsilon_by_gamma;  // eps / gamma, 0 where the masses of the classes must hold
  int64_t max_iterations;
  double tolerance;
  double* log_scalings;  // [classes + 1] in: where to begin; out: beta, 0 for a class of target 0
  void* plan;            // [rows, classes]
  double* error;         // [1]: sum_j target_j |step of beta_j| / kappa_j of the last iteration
  int64_t* iterations;   // [1]
  double* energy;        // [1] or null: sum_ij q_ij (-score_ij + gain_ij + eps log q_ij) with q = plan / rows, j < k
};

PYREG_DECLARE_KERNEL(partial_transport, PartialTransportArgs)

}  // namespace pyreg

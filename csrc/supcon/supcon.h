// SupCon: supervised contrastive loss (Khosla et al., NeurIPS 2020, the form with the sum outside the logarithm).
//
//   P_i = {j != i: labels equal}, a_ij = [j != i], alpha_i = 1, beta_i = 1 / |P_i|, both 0 where P_i is empty
//
// Loss and gradient from these: core/pairs.h.
#pragma once

#include "core/pairs.h"

namespace pyreg {

inline PairRow supcon_row(const PairSums& sums, int64_t i, bool is_bounded, double shift) {
  if (sums.positives[i] == 0) return {};
  const double beta = 1 / static_cast<double>(sums.positives[i]);
  return pair_row(pair_log_sum(sums, i, is_bounded, shift, 0), sums.positive_sum[i], 1, beta);
}

PYREG_DECLARE_KERNEL(supcon_statistics, PairArgs)
PYREG_DECLARE_KERNEL(supcon_gradient, PairArgs)

}  // namespace pyreg

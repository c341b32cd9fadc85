// ConR: contrastive regularizer for deep imbalanced regression (Keramati, Meng, Evans, ICLR 2024).
//
//   d_ij = |y_i - y_j|, e_ij = |p_i - p_j|        distances of targets and of predictions
//   P_i = {j != i: d_ij <= window}                positives
//   N_i = {j: d_ij > window and e_ij <= window}   negatives
//   a_ij = [j in P_i] + [j in N_i] r_ij,  r_ij = w_i exp(eta d_ij), or w_i eta d_ij (nyud2)
//   alpha_i = w_i, beta_i = w_i / |P_i| (nyud2: |P_i| / (|P_i| + 1) and 1 / (|P_i| + 1)), 0 where P_i or N_i is empty
//   extra_i = 0, or N - |P_i| (agedb, nyud2)
//
// Loss and gradient from these: core/pairs.h. The masks and w have no gradient.
#pragma once

#include "core/pairs.h"

namespace pyreg {

enum class ConrVariant : int32_t { paper, agedb, nyud2 };

inline PairRow conr_row(const PairSums& sums, int64_t i, bool is_bounded, double shift, double weight,
                        ConrVariant variant, int64_t count) {
  const auto positives = static_cast<double>(sums.positives[i]);
  if (sums.positives[i] == 0 || sums.negatives[i] == 0) return {};
  const double extra = variant == ConrVariant::paper ? 0 : static_cast<double>(count) - positives;
  const double lse = pair_log_sum(sums, i, is_bounded, shift, extra);
  if (variant == ConrVariant::nyud2) {
    return pair_row(lse, sums.positive_sum[i], positives / (positives + 1), 1 / (positives + 1));
  }
  return pair_row(lse, sums.positive_sum[i], weight, weight / positives);
}

PYREG_DECLARE_KERNEL(conr_statistics, PairArgs)
PYREG_DECLARE_KERNEL(conr_gradient, PairArgs)
PYREG_DECLARE_KERNEL(conr_sampled_scores, PairArgs)
PYREG_DECLARE_KERNEL(conr_sampled_products, PairArgs)

}  // namespace pyreg

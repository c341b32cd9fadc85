// InfoNCE: each query's key among all keys (van den Oord et al. 2018), and each key's query among all queries (CLIP).
//
//   p_ij = [j = i + offset], a_ij = 1, or 0 where j is another key with the id of i's own; alpha_i = beta_i = 1
//   scores of the query's direction are s_ij - log_q_j
//
// A query without a key of its own has no loss. Loss and gradient from these: core/pairs.h.
#pragma once

#include "core/pairs.h"

namespace pyreg {

inline PairRow info_nce_row(const PairSums& sums, int64_t i, bool is_bounded, double shift) {
  if (sums.positives[i] == 0) return {};
  return pair_row(pair_log_sum(sums, i, is_bounded, shift, 0), sums.positive_sum[i], 1, 1);
}

PYREG_DECLARE_KERNEL(info_nce_statistics, PairArgs)
PYREG_DECLARE_KERNEL(info_nce_gradient, PairArgs)

}  // namespace pyreg

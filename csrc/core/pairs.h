// What the losses over all pairs of rows share (ConR, SupCon, InfoNCE).
//
//   s_ij = z_i . z_j / tau                           z: the features, normalised or as they are
//   lse_i = log(sum_j a_ij exp(s_ij) + extra_i)      a: the pair's share in the denominator, 0 where it is masked
//   T_i = sum_j p_ij s_ij                            p: 1 for positives
//   loss_i = alpha_i lse_i - beta_i T_i
//
//   G_ij = dloss_i / ds_ij = alpha_i a_ij exp(s_ij - lse_i) - beta_i p_ij
//   H_ij = (u_i G_ij + u_j G_ji) / tau, dz_i = sum_j H_ij z_j      u: the upstream gradient of each row's loss
//
// The scores are made a tile at a time by torch's matrix product, read by the statistics pass, made again in the
// backward, and turned in their place into H, which two more products take. Where rows and columns are the same, only
// the tiles on and above the diagonal are made: one exponential serves both of a pair's rows, H its both gradients. Of
// few rows the scores are held and made once. Where few of a tile's pairs mean anything, they take a dot product each
// instead of the tile's product (pair_samples.h).
//
// Two ways to keep exp in range. Bounded: every exponent lies within kBoundedRange of the same `shift`, so that no sum
// underflows. Otherwise each row and column has a running maximum and takes an exponential of its own.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/isa.h"

namespace pyreg {

// exp(-60) is 2^-87: a float sum of such terms keeps its precision, and 1 / sum stays finite beside weights and counts.
constexpr double kBoundedRange = 60;

// Arrays are read a whole vector at a time: this many elements beyond the last column belong to them.
constexpr int64_t kPairPadding = 16;

// From one pair in so many that mean anything on, scores and H z are made pair by pair (core/pair_samples.h).
constexpr int64_t kPairsPerSample = 8;

// Sums over the pairs of each row (or column), in units of exp(maximum), or of exp(shift) where bounded.
struct PairSums {
  double* maximum;
  double* sum;
  double* positive_sum;
  int64_t* positives;
  int64_t* negatives;
};

// What is known of each row (or column); null where an operator has no use for it. A: float or double, the scores'.
struct PairSide {
  const void* targets;  // [labels, label_stride], of label_dtype
  const void* preds;    // as targets
  int64_t label_stride;
  const void* weights;          // [n] A
  const void* codes;            // [n] int32 beside float scores, int64 beside double: equal where classes or ids are
  const void* exponents;        // [n] A, of columns: added to the scores in the rows' denominators
  const int64_t* partner;       // [n] the column that is a row's own or its positive; -1 for none
  const void* lse;              // [n] A; gradient of unbounded scores only
  const void* exp_weight;       // [n] A: u alpha / tau, times exp(shift - lse) where bounded
  const void* positive_weight;  // [n] A: u beta / tau
};

// Of all rows and columns; the scores' type, [.., width].
struct PairFeatures {
  const void* rows;
  const void* columns;
  int64_t width;
  void* row_totals;     // gain H z
  void* column_totals;  // null where not needed; the rows' where rows and columns are the same
  bool* is_sampled;     // receives whether the scores have been made
};

struct PairArgs;

// Kernels that take a tile pair by pair: one makes the scores where few of them mean anything, one adds H z.
struct PairSampling {
  void (*scores)(const PairArgs&);
  void (*products)(const PairArgs&);
};

struct PairArgs {
  Dtype dtype;   // float64 or float32, of the scores
  void* scores;  // [rows, columns], raw products; the gradient pass overwrites them with H
  int64_t scores_stride;
  int64_t first_row, rows, first_column, columns;
  bool is_upper;     // rows and columns are the same: only pairs with column > row count, and count for both
  bool has_columns;  // statistics: the columns' sums too. gradient: G_ji too
  bool is_bounded;
  double scale;  // 1 / tau
  double shift;
  PairSide row, column;
  PairSums row_sums, column_sums;
  void* workspace;               // pair_workspace_bytes
  const PairSampling* sampling;  // null where all pairs mean something
  PairFeatures features;         // for its kernels

  // ConR
  Dtype label_dtype;
  int64_t labels;  // K
  int32_t label_norm;
  double window;
  double push_rate;  // r = w exp(push_rate d) (push_constant + push_slope d)
  double push_constant, push_slope;
};

// Rows that one task takes. Each has sums of its own for the columns, added up in order: the result does not depend on
// the number of threads.
constexpr int64_t kPairBlockRows = 16;
constexpr int64_t kPairFields = 5;  // sum, positive_sum, positives, negatives; maximum

inline int64_t pair_workspace_bytes(int64_t rows, int64_t columns) {
  const int64_t blocks = (rows + kPairBlockRows - 1) / kPairBlockRows;
  return static_cast<int64_t>(sizeof(double)) * (blocks + 1) * kPairFields * (columns + kPairPadding);
}

// A row's part of `statistics`, and its loss.
struct PairRow {
  double lse = 0, alpha = 0, beta = 0, loss = 0;
  double statistic(int64_t field) const { return field == 0 ? lse : field == 1 ? alpha : beta; }
};

inline double pair_log_sum(const PairSums& sums, int64_t i, bool is_bounded, double shift, double extra) {
  const double log_sum = (is_bounded ? shift : sums.maximum[i]) + std::log(sums.sum[i]);
  if (!(extra > 0)) return log_sum;
  const double log_extra = std::log(extra);
  const double high = std::fmax(log_sum, log_extra), low = std::fmin(log_sum, log_extra);
  return std::isnan(log_sum) ? log_sum : high + std::log1p(std::exp(low - high));
}

inline PairRow pair_row(double lse, double positive_sum, double alpha, double beta) {
  return {lse, alpha, beta, alpha * lse - beta * positive_sum};
}

}  // namespace pyreg

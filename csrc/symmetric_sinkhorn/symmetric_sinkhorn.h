// Sinkhorn's iteration between points with both potentials brought up to date at once, and averaged:
//
//   f'_i = -kappa eps log sum_j b_j exp((g_j - C_ij) / eps)     g'_j = -kappa eps log sum_i a_i exp((f_i - C_ij) / eps)
//   f <- (f + f') / 2                                           g <- (g + g') / 2
//
// Potentials leave the weights out. Both sums are those of one matrix,
//
//   E_ij = exp((f_i + g_j - C_ij) / eps),   sum_j b_j E_ij = exp((f_i - f'_i / kappa) / eps),
//
// so that a pair costs one exponential. Averages of the last step's f' and g' keep E within the plan's density: for
// f'_i + g_j - C_ij and f_i + g'_j - C_ij are at most -eps log b_j and -eps log a_i. Between two epsilons it grows at
// most by the power of their ratio; where a sum leaves [1 / kWidest, kWidest] all the same, that row's or column's is
// found again by log-sum-exp.
//
// Of points with themselves the potentials are equal and so are E_ij and E_ji: pairs of one half are formed, each gives
// to the sums of both its points. The averaged step halves its error there, at least.
//
// Slopes are what f' / kappa and g' / kappa have as gradients by their own points, the other potentials being
// constants:
//
//   slope_i = sum_j b_j E_ij dC_ij / dx_i / sum_j b_j E_ij
//
// Up to three dimensions the last iteration sums them; where costs are held it leaves W = E dC / d(distance) in their
// place, for torch's products.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/isa.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg {

struct SymmetricSide {
  int64_t count;
  const void* points;     // [count, dimension]
  const double* weights;  // [count]
  const double* rhos;     // [count] or null: all infinite
  double* potentials;     // [count]
  double* next;           // [count] or null: f' of the potentials, not averaged
  void* slopes;           // [count, dimension] or null
  double* sums;           // [count] or null: sum_j b_j E_ij of `next`; 0 where the kernel has set the slope by itself

  PYREG_HOST_DEVICE double kappa(int64_t i, double epsilon) const { return sinkhorn_kappa(rhos, i, epsilon); }
};

struct SymmetricProblem {
  SymmetricSide row, column;
  bool is_self;  // the column is the row
  void* held;    // [held_costs(...)] or null: costs
  // Where there is no list of epsilons:
  double epsilon, first_epsilon;
  double* error;
  int64_t* iterations;
};

struct SymmetricSinkhornArgs {
  Dtype dtype;  // float64 or float32, of the points
  PointCost point_cost;
  int64_t dimension;
  double least_square;  // squared distances count as no less, before roots are taken
  SymmetricProblem* problems;
  int64_t problem_count;
  // Either an iteration each, whose potentials are f' and g' of the first one's at first, and the last one's `next` ...
  const double* epsilons;
  int64_t epsilon_count;
  // ... or as many as `error` takes to come down to the tolerance, epsilon falling by the factor from one to the next.
  double epsilon_factor;
  int64_t max_iterations;
  double tolerance;
};

// Held costs are of blocks of rows one after another, each [rows, stride - first column]: all rows, from the first
// column on, or, of points with themselves, so many rows of as many columns and those after them. There W is 0 left of
// the diagonal and half of it on the diagonal: W + W^T is all of it.
constexpr int64_t kSelfBlock = 128;

// As many columns as no vector of any instruction set is longer than.
constexpr int64_t kSymmetricPadding = 16;

struct HeldCosts {
  int64_t rows, stride;
  bool is_self;

  PYREG_HOST_DEVICE HeldCosts(int64_t rows, int64_t columns, bool is_self)
      : rows(rows),
        stride((columns + kSymmetricPadding - 1) / kSymmetricPadding * kSymmetricPadding),
        is_self(is_self) {}

  PYREG_HOST_DEVICE int64_t block_rows() const { return is_self && rows > kSelfBlock ? kSelfBlock : rows; }
  PYREG_HOST_DEVICE int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
  PYREG_HOST_DEVICE int64_t first_column(int64_t block) const { return is_self ? block * block_rows() : 0; }
  PYREG_HOST_DEVICE int64_t width(int64_t block) const { return stride - first_column(block); }
  PYREG_HOST_DEVICE int64_t offset(int64_t block) const {
    const int64_t height = block_rows();
    return height * (block * stride - (is_self ? block * (block - 1) / 2 * height : 0));
  }
  PYREG_HOST_DEVICE int64_t count() const { return offset(blocks()); }
  // Row i's from column j on, which is none left of its block.
  PYREG_HOST_DEVICE int64_t at(int64_t i, int64_t j) const {
    const int64_t block = i / block_rows();
    return offset(block) + (i - block * block_rows()) * width(block) + j - first_column(block);
  }
};

PYREG_DECLARE_KERNEL(symmetric_sinkhorn, SymmetricSinkhornArgs)

}  // namespace pyreg

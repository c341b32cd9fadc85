// CPU kernel of Sinkhorn's iteration on a dense cost. Method and notation: sinkhorn.h.
//
// One problem is shared by the threads in blocks of rows, whose sums for the columns are added up in a fixed order; of
// a batch of problems, each is one thread's. Some rows go together: v is loaded once for their sums, t once for what
// they add to it. Bytes an iteration: K once from wherever it lies, and once more from the first-level cache.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/huge_pages.h"
#include "core/math.h"
#include "core/parallel.h"
#include "core/row_groups.h"
#include "core/rows.h"
#include "core/simd.h"
#include "core/team.h"
#include "sinkhorn/point_costs.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg::PYREG_ISA {

namespace {

// Scalings and sums of K beyond it ask for absorption: a float's square of it is still a number.
template <typename A>
constexpr A kWidest = sizeof(A) == 4 ? A(1e15) : A(1e100);

// Rows go in tiles that are still in the first-level cache when they are added to the columns' sums, four rows sharing
// each read and write of those. 500 x 500 on 2 cores: 10.4 us an iteration two rows at a time, 8.0 so. 2000 x 2000 is
// bound by the reads of K from beyond the second level: 277 us an iteration, whatever the tile.
template <typename A>
constexpr int64_t kTogether = kLanes<A> < 4 ? kLanes<A> : 4;
constexpr int64_t kTileBytes = 32 << 10;
constexpr int64_t kMostBlocks = 16;  // of rows: the most threads that share a problem

// A block of no fewer entries: a quarter of 500 x 500, whose blocks of K lie in two cores' second-level caches.
constexpr int64_t kBlockEntries = 60000;

// Below so many entries an iteration ends before a second thread has begun.
constexpr int64_t kLeastShared = 1 << 16;

// Of a batch, problems of so many entries are shared, one after another; others are one thread's each.
constexpr int64_t kLeastSharedOfBatch = 16 * kLeastShared;

// Rows or columns but for those of weight 0 at the end, which take part in nothing: a ragged batch is padded with them.
int64_t count_present(const double* weights, int64_t count) {
  while (count > 1 && weights[count - 1] == 0) --count;
  return count;
}

struct Size {
  int64_t rows, columns;

  Size(const SinkhornArgs& args, int64_t index)
      : rows(count_present(args.row.weights + index * args.rows, args.rows)),
        columns(count_present(args.column.weights + index * args.columns, args.columns)) {}
  int64_t entries() const { return rows * columns; }
};

// ---- costs ----

template <typename Scores>
struct DenseCost {
  using A = Scores;
  static constexpr bool kIsHeld = true;
  struct Row {
    const A* costs;
  };

  DenseCost(const SinkhornArgs& args, int64_t index, const Size&)
      : columns(args.columns), costs(static_cast<const A*>(args.cost) + index * args.rows * args.columns) {}

  Row row(int64_t i) const { return {costs + i * columns}; }
  Vector<A> at(const Row& row, int64_t j) const { return load(row.costs + j); }
  Vector<A> at_end(const Row& row, int64_t j, int count) const {
    return load_partial(row.costs + j, count, static_cast<A>(__builtin_inf()));
  }

  int64_t columns;
  const A* costs;
};

// Between points.
template <typename Scores, PointCost kCost, int64_t kDimension>
struct OwnPointsCost : PointsCost<Scores, kCost, kDimension> {
  using A = Scores;
  static constexpr bool kIsHeld = false;
  static constexpr bool kIsLong = kDimension == 0;  // worth forming for several rows at a time

  OwnPointsCost(const SinkhornArgs& args, int64_t index, const Size& size)
      : coordinates(args.dimension * padded(size.columns)) {
    this->dimension = kDimension > 0 ? kDimension : args.dimension;
    this->stride = padded(size.columns);
    this->x = static_cast<const A*>(args.x) + index * args.rows * args.dimension;
    this->y = coordinates.get();
    transpose_points(static_cast<const A*>(args.y) + index * args.columns * args.dimension, size.columns,
                     args.dimension, this->stride, coordinates.get());
  }

  static int64_t padded(int64_t columns) { return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

  Scratch<A> coordinates;
};

// ---- the iteration ----

template <typename Cost>
class Problem {
 public:
  using A = typename Cost::A;

  Problem(const SinkhornArgs& args, int64_t index, const Size& size)
      : args_(args),
        n_(size.rows),
        m_(size.columns),
        stride_((m_ + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        index_(index),
        first_row_(index * args.rows),
        first_column_(index * args.columns),
        blocks_(block_count(args, size)),
        cost_(args, index, size),
        is_streaming_(args.is_streaming),
        tile_(tile_rows(stride_)),
        kernel_((is_streaming_ ? blocks_ * tile_ : n_) * stride_),
        u_(n_),
        row_factor_(n_ + kLanes<A>),
        row_kappa_(n_ + kLanes<A>),
        row_weight_(n_),
        row_sum_(n_),
        v_(stride_),
        next_v_(stride_),
        partial_(blocks_ * stride_),
        column_factor_(stride_),
        column_kappa_(stride_),
        shifted_(stride_),
        shifted_low_(stride_),
        maxima_(blocks_ * stride_),
        block_states_(blocks_) {
    for (int64_t i = 0; i < n_; ++i) row_weight_.get()[i] = static_cast<A>(args.row.weights[first_row_ + i]);
    if (!is_streaming_) advise_huge_pages(kernel_.get(), sizeof(A) * static_cast<size_t>(n_ * stride_));
  }

  void run() {
    const double last = args_.epsilon[index_];
    double epsilon = args_.first_epsilon[index_] > last ? args_.first_epsilon[index_] : last;
    int64_t iteration = 0;
    double error = INFINITY;
    const int64_t max_iterations = args_.max_iterations;
    while (iteration < max_iterations) {
      // The last one is made at the epsilon that was asked for, whatever stage has been reached: so is the error.
      if (iteration + 1 == max_iterations) epsilon = last;
      const bool is_last = epsilon <= last;
      set_epsilon(epsilon);
      bool has_kernel = exact_iteration(error);
      ++iteration;
      const int64_t stage_end = iteration + kStageIterations;
      const int64_t end = is_last ? max_iterations : stage_end < max_iterations ? stage_end : max_iterations - 1;
      while (iteration < end && !(is_last && error <= args_.tolerance)) {
        if (!has_kernel) build_kernel();
        has_kernel = false;
        if (scaling_iterations(iteration, end, is_last ? args_.tolerance : -INFINITY, error)) {
          absorb();
        } else {
          // The sums that were lost are found again on the cost, from the columns' potentials before.
          absorb_column_scalings();
          has_kernel = exact_iteration(error);
        }
      }
      if (has_kernel) absorb();
      if (is_last) break;
      epsilon = epsilon * args_.epsilon_factor > last ? epsilon * args_.epsilon_factor : last;
    }
    if (iteration > 0) {
      for (int64_t i = n_; i < args_.rows; ++i) row_potentials()[i] = -INFINITY;
      for (int64_t j = m_; j < args_.columns; ++j) column_potentials()[j] = -INFINITY;
    }
    args_.error[index_] = error;
    args_.iterations[index_] = iteration;
  }

 private:
  static constexpr int64_t kStageIterations = 2;

  struct Range {
    A smallest, largest;
  };

  // What the scaling of a block's rows leaves.
  struct BlockState {
    double error;
    Range of_u;
    bool is_lost;    // a sum or a scaling is out of range
    char apart[64];  // from other threads' cache lines
  };

  static int64_t tile_rows(int64_t stride) {
    const int64_t most = kTileBytes / (stride * static_cast<int64_t>(sizeof(A)));
    return most < kTogether<A> ? kTogether<A> : most < kLanes<A> ? most : kLanes<A>;
  }

  // By the size alone, so that a problem has the same bits in whatever batch.
  static int64_t block_count(const SinkhornArgs& args, const Size& size) {
    if (size.entries() < kLeastShared) return 1;
    const int64_t most = args.is_streaming ? kMostBlocks : size.entries() / kBlockEntries;
    const int64_t by_rows = size.rows / kTogether<A>;
    const int64_t count = most < by_rows ? most : by_rows;
    return count < 1 ? 1 : count < kMostBlocks ? count : kMostBlocks;
  }

  double* row_potentials() const { return args_.row.potentials + first_row_; }
  double* column_potentials() const { return args_.column.potentials + first_column_; }

  int64_t first_row(int64_t block) const { return n_ * block / blocks_; }

  static double kappa(const SinkhornSide& side, int64_t i, double epsilon) { return side.kappa(i, epsilon); }

  double target(const SinkhornSide& side, int64_t i) const { return args_.target(side, i, epsilon_); }

  double potential(const SinkhornSide& side, int64_t k, double log_sum) const {
    return epsilon_ * (target(side, k) - kappa(side, k, epsilon_) * log_sum);
  }

  void set_epsilon(double epsilon) {
    epsilon_ = epsilon;
    for (int64_t i = 0; i < n_; ++i) row_kappa_.get()[i] = static_cast<A>(kappa(args_.row, first_row_ + i, epsilon));
    for (int64_t j = 0; j < stride_; ++j) {
      column_kappa_.get()[j] = j < m_ ? static_cast<A>(kappa(args_.column, first_column_ + j, epsilon)) : A(1);
    }
    is_balanced_ = args_.row.rhos == nullptr && args_.column.rhos == nullptr;
    rows_hold_ = columns_hold_ = true;
    for (int64_t i = 0; i < n_; ++i) rows_hold_ = rows_hold_ && row_kappa_.get()[i] == 1;
    for (int64_t j = 0; j < m_; ++j) columns_hold_ = columns_hold_ && column_kappa_.get()[j] == 1;
  }

  // ---- from potentials ----

  // An iteration from the columns' potentials alone, be the scalings what they may. Whether it leaves K, built around
  // the rows' new potentials and the columns' old ones, with v for their new ones.
  bool exact_iteration(double& error) {
    split_column_potentials();
    if (is_streaming_) {
      for_each_block(blocks_, [&](int64_t block) {
        BlockState& state = block_states_.get()[block] = {};
        A* const exponentials = kernel_.get() + block * tile_ * stride_;
        for (int64_t i = first_row(block); i < first_row(block + 1); ++i) exact_row(i, exponentials, false, state);
      });
    } else {
      reset_columns();
      for_each_block(blocks_, [&](int64_t block) { build_exact_rows(block); });
      has_costs_ = false;
    }
    error = sum_of_errors();
    if (!is_streaming_ && scale_columns()) return true;
    // Some column has next to nothing of what rows give: found with a maximum of its own.
    if constexpr (!Cost::kIsHeld) {
      has_costs_ = !is_streaming_;  // in K's memory, until it is formed anew
      if (has_costs_) {
        for_each_block(blocks_, [&](int64_t block) {
          fill_costs_of(first_row(block), first_row(block + 1), kernel_.get() + first_row(block) * stride_);
        });
      }
    }
    log_domain_columns();
    return false;
  }

  // K's rows around their exact potentials, and what they add to the columns' sums.
  void build_exact_rows(int64_t block) {
    const int64_t first = first_row(block), end = first_row(block + 1);
    A* const k = kernel_.get() + first * stride_;
    if constexpr (!Cost::kIsHeld) fill_costs_of(first, end, k);
    A* const sums = partial_.get() + block * stride_;
    for (int64_t j = 0; j < stride_; ++j) sums[j] = 0;
    BlockState& state = block_states_.get()[block] = {0, {1, 1}, false, {}};
    for (int64_t i = first; i < end; ++i) {
      A* const row = k + (i - first) * stride_;
      const A scale = exact_row(i, row, !Cost::kIsHeld, state);
      row_factor_.get()[i] = factor(args_.row, first_row_ + i, row_potentials()[i]);
      u_.get()[i] = scale > 0 ? A(1) : A(0);
      row_sum_.get()[i] = 0;
      for (int64_t j = 0; j < stride_; j += kLanes<A>) {
        const Vector<A> plan = scale > 0 ? load(row + j) * scale : Vector<A>{};
        store(row + j, plan);
        store(sums + j, load(sums + j) + plan);
      }
    }
  }

  // Row i's potential from the columns', and exp((G_j - C_ij - largest) / eps) in `exponentials`, which may hold its
  // costs; the factor that makes K's row of them, 0 where nothing is transported. As x_j = (G_j - largest) / eps, A
  // would lose what C and G have in common: kept as potentials, subtracted first.
  A exact_row(int64_t i, A* exponentials, bool has_costs, BlockState& state) const {
    const A scale = static_cast<A>(1 / epsilon_), none = -static_cast<A>(__builtin_inf());
    Vector<A> largest = broadcast(none);
    const auto find_largest = [&](int64_t j, Vector<A> cost) {
      const Vector<A> x = load(shifted_.get() + j) - cost;
      largest = x > largest ? x : largest;
    };
    Vector<A> sum{};
    A maximum = none;
    const auto exponentiate = [&](int64_t j, Vector<A> cost) {
      const Vector<A> potential = load(shifted_.get() + j), low = load(shifted_low_.get() + j);
      const Vector<A> term = exponential(difference<A>(potential, cost, broadcast(-maximum), low) * scale);
      store(exponentials + j, term);
      sum += term;
    };
    const auto over_costs = [&](auto&& function) {
      if (!has_costs) return for_each_cost(i, function);
      for (int64_t j = 0; j < stride_; j += kLanes<A>) function(j, load(exponentials + j));
    };
    over_costs(find_largest);
    for (int lane = 0; lane < kLanes<A>; ++lane) maximum = largest[lane] > maximum ? largest[lane] : maximum;
    const double old = row_potentials()[i];
    row_potentials()[i] = -INFINITY;
    if (maximum == none) return 0;
    over_costs(exponentiate);
    const int64_t k = first_row_ + i;
    const double largest_exponent = static_cast<double>(maximum) / epsilon_;
    const double log_sum = largest_exponent + std::log(static_cast<double>(sum_lanes(sum)));
    const double exponent = target(args_.row, k) - kappa(args_.row, k, epsilon_) * log_sum;
    row_potentials()[i] = epsilon_ * exponent;
    state.error += row_error(k, old / epsilon_ + log_sum, epsilon_ * exponent - old);
    const A result = static_cast<A>(std::exp(exponent + largest_exponent));
    if (exponent > -INFINITY && !(result > 1 / kWidest<A> && result < kWidest<A>)) state.is_lost = true;
    return result;
  }

  // ---- by log-sum-exp on the cost ----

  void log_domain_columns() {
    const A scale = static_cast<A>(1 / epsilon_);
    const A none = -static_cast<A>(__builtin_inf());
    for_each_block(blocks_, [&](int64_t block) {
      A* const maxima = maxima_.get() + block * stride_;
      for (int64_t j = 0; j < stride_; ++j) maxima[j] = none;
      for (int64_t i = first_row(block); i < first_row(block + 1); ++i) {
        const A potential = static_cast<A>(row_potentials()[i]);
        for_each_vector(i, [&](int64_t j, Vector<A> cost) {
          const Vector<A> x = potential - cost, before = load(maxima + j);
          store(maxima + j, x > before ? x : before);
        });
      }
    });
    A* const maxima = maxima_.get();
    for (int64_t block = 1; block < blocks_; ++block) {
      for (int64_t j = 0; j < m_; ++j) {
        const A candidate = maxima_.get()[block * stride_ + j];
        maxima[j] = candidate > maxima[j] ? candidate : maxima[j];
      }
    }
    for (int64_t j = 0; j < stride_; ++j) shifted_.get()[j] = maxima[j] > none ? maxima[j] : A(0);
    for_each_block(blocks_, [&](int64_t block) {
      A* const sums = partial_.get() + block * stride_;
      for (int64_t j = 0; j < stride_; ++j) sums[j] = 0;
      for (int64_t i = first_row(block); i < first_row(block + 1); ++i) {
        const Split<A> potential(row_potentials()[i]);
        for_each_vector(i, [&](int64_t j, Vector<A> cost) {
          const Vector<A> high = broadcast(potential.high), low = broadcast(potential.low);
          const Vector<A> x = difference<A>(high, cost, -load(shifted_.get() + j), low);
          store(sums + j, load(sums + j) + exponential(x * scale));
        });
      }
    });
    for (int64_t j = 0; j < m_; ++j) {
      const double log_sum = static_cast<double>(shifted_.get()[j]) / epsilon_ + std::log(column_sum(j));
      column_potentials()[j] = maxima[j] > none ? potential(args_.column, first_column_ + j, log_sum) : -INFINITY;
    }
  }

  double column_sum(int64_t j) const {
    double sum = 0;
    for (int64_t block = 0; block < blocks_; ++block) sum += partial_.get()[block * stride_ + j];
    return sum;
  }

  double row_error(int64_t k, double log_mass, double step) const {
    return args_.row_error(k, epsilon_, log_mass, step);
  }

  double sum_of_errors() const {
    double error = 0;
    for (int64_t block = 0; block < blocks_; ++block) error += block_states_.get()[block].error;
    return error;
  }

  // ---- by scaling ----

  void split_column_potentials() const {
    for (int64_t j = 0; j < stride_; ++j) {
      const Split<A> potential(j < m_ ? column_potentials()[j] : -INFINITY);
      shifted_.get()[j] = potential.high;
      shifted_low_.get()[j] = potential.low;
    }
  }

  // Of a scaling: what it is but for the power of its sum.
  A factor(const SinkhornSide& side, int64_t k, double potential) const {
    const double exponent = target(side, k) + (kappa(side, k, epsilon_) - 1) * potential / epsilon_;
    return std::isfinite(potential) ? static_cast<A>(std::exp(exponent)) : A(0);
  }

  // Scalings of 1 for the columns around the potentials as they are.
  void reset_columns() {
    for (int64_t j = 0; j < stride_; ++j) {
      const double potential = j < m_ ? column_potentials()[j] : -INFINITY;
      column_factor_.get()[j] = j < m_ ? factor(args_.column, first_column_ + j, potential) : A(0);
      v_.get()[j] = std::isfinite(potential) ? A(1) : A(0);
    }
  }

  // Scalings of 1 around the potentials as they are, and K for them.
  void build_kernel() {
    split_column_potentials();
    reset_columns();
    for (int64_t i = 0; i < n_; ++i) {
      const double potential = row_potentials()[i];
      row_factor_.get()[i] = factor(args_.row, first_row_ + i, potential);
      u_.get()[i] = std::isfinite(potential) ? A(1) : A(0);
    }
    if (is_streaming_) return;
    for_each_block(blocks_, [&](int64_t block) {
      const int64_t first = first_row(block), end = first_row(block + 1);
      A* const k = kernel_.get() + first * stride_;
      if constexpr (!Cost::kIsHeld) {
        if (!has_costs_) fill_costs_of(first, end, k);
      }
      for (int64_t i = first; i < end; ++i) fill_row(i, k + (i - first) * stride_, !Cost::kIsHeld);
    });
    has_costs_ = false;
  }

  void fill_costs_of(int64_t first, int64_t end, A* to) const {
    if constexpr (!Cost::kIsHeld) {
      for (; first + kTogether<A> <= end; first += kTogether<A>, to += kTogether<A> * stride_) {
        fill_costs<kTogether<A>>(cost_, first, to, stride_);
      }
      for (; first < end; ++first, to += stride_) fill_costs<1>(cost_, first, to, stride_);
    }
  }

  // K's row i; where k holds its costs, in their place.
  void fill_row(int64_t i, A* k, bool has_costs) const {
    const A scale = static_cast<A>(1 / epsilon_);
    const Split<A> potential(row_potentials()[i]);
    const auto fill = [&](int64_t j, Vector<A> cost) {
      const Vector<A> low = load(shifted_low_.get() + j) + potential.low;
      store(k + j, exponential(difference<A>(broadcast(potential.high), cost, load(shifted_.get() + j), low) * scale));
    };
    if (!has_costs) return for_each_cost(i, fill);
    for (int64_t j = 0; j < stride_; j += kLanes<A>) fill(j, load(k + j));
  }

  // At most up to `end`, to the tolerance, or to where scalings ask for absorption. Whether no sum was lost; `error` is
  // of the potentials before the last of them.
  bool scaling_iterations(int64_t& iteration, int64_t end, double tolerance, double& error) {
    bool is_sound = true, is_backward = false;
    repeat_in_parallel(
        blocks_, [&](int64_t block) { scale_rows(block, is_backward); },
        [&] {
          is_sound = scale_columns();
          error = sum_of_errors();
          ++iteration;
          // Rows that were last are first: what one iteration leaves in the cache, the next one finds there.
          is_backward = !is_backward;
          return is_sound && !is_streaming_ && !needs_absorption() && iteration < end && !(error <= tolerance);
        });
    return is_sound;
  }

  void scale_rows(int64_t block, bool is_backward) {
    A* const sums = partial_.get() + block * stride_;
    for (int64_t j = 0; j < stride_; ++j) sums[j] = 0;
    block_states_.get()[block] = {0, {1, 1}, false, {}};
    const int64_t first = first_row(block), end = first_row(block + 1);
    const int64_t tiles = (end - first + tile_ - 1) / tile_;
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t row = first + (is_backward ? tiles - 1 - k : k) * tile_;
      scale_tile(row, row + tile_ < end ? tile_ : end - row, block);
    }
    block_states_.get()[block].of_u = range(u_.get() + first, end - first);
  }

  // Whether no sum was lost: only then are the scalings new.
  bool scale_columns() {
    for (int64_t block = 0; block < blocks_; ++block) {
      if (block_states_.get()[block].is_lost) return false;
    }
    LaneIndex<A> is_lost{};
    for (int64_t j = 0; j < stride_; j += kLanes<A>) {
      Vector<A> sum = load(partial_.get() + j);
      for (int64_t block = 1; block < blocks_; ++block) sum += load(partial_.get() + block * stride_ + j);
      const Vector<A> v = scaling(load(column_factor_.get() + j), sum, column_kappa_.get() + j, columns_hold_);
      const LaneIndex<A> is_there = load(v_.get() + j) > A(0);
      is_lost |= is_there & ~is_sound(sum, v);
      store(next_v_.get() + j, is_there ? v : Vector<A>{});
    }
    if (any_lane(is_lost)) return false;
    v_.swap(next_v_);
    return true;
  }

  static LaneIndex<A> is_sound(Vector<A> sum, Vector<A> scaling) {
    return (sum > 1 / kWidest<A>)&(scaling > 1 / kWidest<A>)&(scaling < kWidest<A>);
  }

  // Of scalings above 0, and 1.
  static Range range(const A* scalings, int64_t count) {
    const Vector<A> one = broadcast(A(1));
    Vector<A> smallest = one, largest = one;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int left = count - i < kLanes<A> ? static_cast<int>(count - i) : kLanes<A>;
      const Vector<A> x = load_partial(scalings + i, left, A(1)), known = x > A(0) ? x : one;
      smallest = known < smallest ? known : smallest;
      largest = known > largest ? known : largest;
    }
    Range result{1, 1};
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      result.smallest = smallest[lane] < result.smallest ? smallest[lane] : result.smallest;
      result.largest = largest[lane] > result.largest ? largest[lane] : result.largest;
    }
    return result;
  }

  // sum^-kappa
  static A power(A sum, A kappa) {
    return kappa == 1 ? 1 / sum : static_cast<A>(std::pow(static_cast<double>(sum), -static_cast<double>(kappa)));
  }

  // Rows whose K stays in the first-level cache from their sums to what they add to the columns'.
  void scale_tile(int64_t first, int64_t count, int64_t block) {
    A* const k = kernel_.get() + (is_streaming_ ? block * tile_ : first) * stride_;
    if constexpr (!Cost::kIsHeld) {
      if (is_streaming_) {
        if (Cost::kIsLong) fill_costs_of(first, first + count, k);
        for (int64_t r = 0; r < count; ++r) fill_row(first + r, k + r * stride_, Cost::kIsLong);
      }
    }
    A sums[kLanes<A>] = {}, u[kLanes<A>];
    in_groups<kTogether<A>>(count, [&](auto rows, int64_t r) { sum_rows<rows>(k + r * stride_, sums + r); });
    store(u, row_scalings(first, static_cast<int>(count), load(sums), block_states_.get()[block]));
    A* const t = partial_.get() + block * stride_;
    in_groups<kTogether<A>>(count, [&](auto rows, int64_t r) { add_rows<rows>(k + r * stride_, stride_, u + r, t); });
  }

  // K v
  template <int64_t kRows>
  void sum_rows(const A* k, A* to) const {
    Vector<A> sums[kRows][2] = {};
    const A* const v = v_.get();
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= stride_; j += 2 * kLanes<A>) {
      const Vector<A> v0 = load(v + j), v1 = load(v + j + kLanes<A>);
      for (int64_t r = 0; r < kRows; ++r) {
        sums[r][0] += load(k + r * stride_ + j) * v0;
        sums[r][1] += load(k + r * stride_ + j + kLanes<A>) * v1;
      }
    }
    if (j < stride_) {
      for (int64_t r = 0; r < kRows; ++r) sums[r][0] += load(k + r * stride_ + j) * load(v + j);
    }
    for (int64_t r = 0; r < kRows; ++r) to[r] = sum_lanes(sums[r][0] + sums[r][1]);
  }

  // factor sum^-kappa
  static Vector<A> scaling(Vector<A> factor, Vector<A> sum, const A* kappa, bool holds) {
    Vector<A> result = factor / sum;
    if (!holds) {
      for (int lane = 0; lane < kLanes<A>; ++lane) result[lane] = factor[lane] * power(sum[lane], kappa[lane]);
    }
    return result;
  }

  Vector<A> row_scalings(int64_t first, int count, Vector<A> sum, BlockState& state) {
    const Vector<A> before = load_partial(u_.get() + first, count, A(0));
    const LaneIndex<A> is_there = before > A(0);
    const Vector<A> u = scaling(load(row_factor_.get() + first), sum, row_kappa_.get() + first, rows_hold_);
    state.is_lost |= any_lane(is_there & ~is_sound(sum, u));
    if (is_balanced_) {
      const Vector<A> off = before * sum - load_partial(row_weight_.get() + first, count, A(0));
      state.error += static_cast<double>(sum_lanes(is_there ? (off < A(0) ? -off : off) : Vector<A>{}));
    } else {
      for (int lane = 0; lane < count; ++lane) {
        if (!is_there[lane]) continue;
        const double step = std::abs(std::log(u[lane] / before[lane]));
        state.error += args_.row.weights[first_row_ + first + lane] * step / row_kappa_.get()[first + lane];
      }
    }
    const Vector<A> result = is_there ? u : Vector<A>{};
    store_partial(u_.get() + first, result, count);
    store_partial(row_sum_.get() + first, is_there ? sum : Vector<A>{}, count);
    return result;
  }

  bool needs_absorption() const {
    // Half of the range, in either direction, is left to the next iteration.
    const A widest = std::sqrt(kWidest<A>);
    auto [smallest, largest] = range(v_.get(), m_);
    for (int64_t block = 0; block < blocks_; ++block) {
      const Range of_u = block_states_.get()[block].of_u;
      largest = of_u.largest > largest ? of_u.largest : largest;
      smallest = of_u.smallest < smallest ? of_u.smallest : smallest;
    }
    return largest > widest || smallest < 1 / widest;
  }

  // From the sums that made the scalings, which are kept in double: what A loses of a scaling is epsilon's rounding,
  // and of a sum kappa times that. Values and gradients take exp(-F / rho), where the difference counts.
  void absorb() {
    for (int64_t i = 0; i < n_; ++i) {
      const A sum = row_sum_.get()[i];
      if (sum > 0) row_potentials()[i] = absorbed(args_.row, first_row_ + i, sum);
    }
    for (int64_t j = 0; j < m_; ++j) {
      if (v_.get()[j] > 0) column_potentials()[j] = absorbed(args_.column, first_column_ + j, column_sum(j));
    }
  }

  double absorbed(const SinkhornSide& side, int64_t k, double sum) const {
    return potential(side, k, std::log(sum) - side.potentials[k] / epsilon_);
  }

  void absorb_column_scalings() const {
    for (int64_t j = 0; j < m_; ++j) {
      const A scaling = v_.get()[j];
      if (scaling > 0) column_potentials()[j] += epsilon_ * std::log(static_cast<double>(scaling));
    }
  }

  // Calls function(j, costs of row and columns j...); beyond the last column they are infinite.
  template <typename Function>
  void for_each_vector(int64_t i, Function&& function) const {
    if (!has_costs_) return for_each_cost(i, function);
    const A* const costs = kernel_.get() + i * stride_;
    for (int64_t j = 0; j < stride_; j += kLanes<A>) function(j, load(costs + j));
  }
  template <typename Function>
  void for_each_cost(int64_t i, Function&& function) const {
    const typename Cost::Row row = cost_.row(i);
    int64_t j = 0;
    for (; j + kLanes<A> <= m_; j += kLanes<A>) function(j, cost_.at(row, j));
    if (j < m_) function(j, cost_.at_end(row, j, static_cast<int>(m_ - j)));
  }

  const SinkhornArgs& args_;
  int64_t n_, m_, stride_, index_, first_row_, first_column_, blocks_;
  Cost cost_;
  bool has_costs_ = false;  // kernel_ holds the costs for now
  bool is_streaming_;       // K is formed anew in every iteration, tile_ rows of a block at a time
  int64_t tile_;            // rows
  Scratch<A> kernel_;
  Scratch<A> u_, row_factor_, row_kappa_, row_weight_;
  Scratch<A> row_sum_;  // that made u, 0 where the potentials themselves are new
  Scratch<A> v_, next_v_, partial_, column_factor_, column_kappa_, shifted_, shifted_low_, maxima_;
  Scratch<BlockState> block_states_;
  double epsilon_ = 0;
  bool is_balanced_ = true, rows_hold_ = true, columns_hold_ = true;
};

template <typename Cost>
void solve_all(const SinkhornArgs& args) {
  const int64_t least_shared = args.batch == 1 ? 0 : kLeastSharedOfBatch;
  std::vector<std::pair<Size, int64_t>> problems;
  problems.reserve(static_cast<size_t>(args.batch));
  for (int64_t i = 0; i < args.batch; ++i) problems.emplace_back(Size(args, i), i);
  // The largest first: small ones fill what is left of the threads' time.
  std::stable_sort(problems.begin(), problems.end(),
                   [](const auto& one, const auto& other) { return one.first.entries() > other.first.entries(); });
  const auto run = [&](int64_t k) { Problem<Cost>(args, problems[k].second, problems[k].first).run(); };
  int64_t shared = 0;
  for (; shared < args.batch && problems[shared].first.entries() >= least_shared; ++shared) run(shared);
  std::atomic<int64_t> next{shared};
  parallel_for(args.batch - shared, 1, [&](int64_t, int64_t) {
    for (int64_t k = next++; k < args.batch; k = next++) run(k);
  });
}

template <typename A, PointCost kCost>
void solve_points(const SinkhornArgs& args) {
  switch (args.dimension) {
    case 1:
      return solve_all<OwnPointsCost<A, kCost, 1>>(args);
    case 2:
      return solve_all<OwnPointsCost<A, kCost, 2>>(args);
    case 3:
      return solve_all<OwnPointsCost<A, kCost, 3>>(args);
    default:
      return solve_all<OwnPointsCost<A, kCost, 0>>(args);
  }
}

template <typename A>
void solve(const SinkhornArgs& args) {
  if (args.cost != nullptr) return solve_all<DenseCost<A>>(args);
  switch (args.point_cost) {
    case PointCost::sqeuclidean:
      return solve_points<A, PointCost::sqeuclidean>(args);
    case PointCost::euclidean:
      return solve_points<A, PointCost::euclidean>(args);
    case PointCost::cosine:
      return solve_points<A, PointCost::cosine>(args);
  }
}

}  // namespace

void sinkhorn(const SinkhornArgs& args) {
  if (args.dtype == Dtype::float64) return solve<double>(args);
  solve<float>(args);
}

}  // namespace pyreg::PYREG_ISA

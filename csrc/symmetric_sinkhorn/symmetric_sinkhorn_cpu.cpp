// CPU kernels of symmetric Sinkhorn. Method and notation: symmetric_sinkhorn.h.
//
// E's exponents are to the base 2, potentials and costs scaled to it. Rows go in panels of a vector's length, some of
// which share each load of the columns' coordinates, potentials and sums. A problem is shared by the threads in blocks
// of panels, each with its own sums for the columns, added up in a fixed order; of many problems, each is one thread's.
// Of points with themselves a panel begins at its own rows: what lies left of them, others have given to its sums.
//
// In up to three dimensions costs are formed anew with every pair, some six operations beside the exponential's twelve;
// in more they are held, as far as memory goes, and read once an iteration: 16 MB, or 0.3 ms from the third-level cache
// on 2 cores, for 2000 x 2000 in float32, whose exponentials take 0.5 ms. Sums are of the points' dtype, potentials
// float64.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "core/math.h"
#include "core/parallel.h"
#include "core/row_groups.h"
#include "core/rows.h"
#include "core/simd.h"
#include "core/team.h"
#include "sinkhorn/point_costs.h"
#include "symmetric_sinkhorn/symmetric_sinkhorn.h"

namespace pyreg::PYREG_ISA {

namespace {

constexpr double kLn2 = 0.69314718055994530942;

// Sums within [1 / kWidest, kWidest] have all their digits, and so have the exponentials that made them.
template <typename A>
constexpr A kWidest = sizeof(A) == 4 ? A(1e30) : A(1e280);

template <typename A>
constexpr int64_t kPanelRows = kLanes<A>;

// Rows that share a load of what belongs to columns.
template <typename A>
constexpr int64_t kTogether = kLanes<A> < 8 ? kLanes<A> : 8;

// Below so many pairs an iteration ends before a second thread has begun; of several problems, those of so many are
// shared, one after another.
constexpr int64_t kLeastShared = 1 << 16;
constexpr int64_t kLeastSharedOfSeveral = 16 * kLeastShared;
constexpr int64_t kMostBlocks = 16;

// What E takes of a side's points, and what it gives back.
template <typename A>
struct Points {
  Points(const SymmetricSide& side, int64_t dimension)
      : side(side),
        dimension(dimension),
        stride((side.count + kSymmetricPadding - 1) / kSymmetricPadding * kSymmetricPadding),
        weights(stride),
        scaled(stride),
        sums(stride),
        next(stride) {
    for (int64_t i = 0; i < stride; ++i) {
      weights.get()[i] = i < side.count ? static_cast<A>(side.weights[i]) : A(0);
      sums.get()[i] = 1;
    }
    for (int64_t i = 0; i < side.count; ++i) side.potentials[i] = 0;
  }

  const A* points() const { return static_cast<const A*>(side.points); }

  // [dimension, stride]; made when they are first asked for: those of rows seldom are.
  const A* coordinates() {
    if (transposed == nullptr) {
      transposed = std::make_unique<Scratch<A>>(dimension * stride);
      transpose_points(points(), side.count, dimension, stride, transposed->get());
    }
    return transposed->get();
  }

  void scale(double per_unit) {
    for (int64_t i = 0; i < stride; ++i) {
      scaled.get()[i] = i < side.count ? static_cast<A>(side.potentials[i] * per_unit) : A(0);
    }
  }

  SymmetricSide side;
  int64_t dimension, stride;
  std::unique_ptr<Scratch<A>> transposed;
  Scratch<A> weights;    // 0 as padding
  Scratch<A> scaled;     // potentials in units of eps ln 2
  Scratch<A> sums;       // of E with the other side's weights
  Scratch<double> next;  // f'
};

template <typename A, PointCost kCost, int64_t kDimension>
class Problem {
 public:
  Problem(const SymmetricSinkhornArgs& args, const SymmetricProblem& problem)
      : args_(args),
        problem_(problem),
        row_(problem.row, args.dimension),
        own_column_(problem.is_self ? empty_side() : problem.column, args.dimension),
        column_(problem.is_self ? row_ : own_column_),
        n_(problem.row.count),
        stride_(column_.stride),
        panels_((n_ + kPanelRows<A> - 1) / kPanelRows<A>),
        blocks_(block_count(problem)),
        cost_{args.dimension, stride_, row_.points(), column_.coordinates(), static_cast<A>(args.least_square)},
        held_(n_, column_.side.count, problem.is_self),
        costs_(kDimension == 0 && problem.held == nullptr ? blocks_ * kPanelRows<A> * stride_ : 0),
        partial_(blocks_ * stride_),
        row_slopes_(row_.stride * (has_slopes() ? kDimension : 0)),
        partial_slopes_(blocks_ * stride_ * (has_slopes() ? kDimension : 0)) {}

  void run() {
    begin();
    if (problem_.held != nullptr) {
      for_each_block(blocks_, [&](int64_t block) {
        for (int64_t p = block; p < panels_; p += blocks_) fill_panel(p, block);
      });
    }
    while (!is_done_) {
      repeat_in_parallel(
          blocks_, [&](int64_t block) { pass(block); },
          [&] {
            if (!find_next()) return false;
            advance();
            return !is_done_;
          });
      if (is_done_) break;
      find_lost();
      advance();
    }
  }

 private:
  // By its size alone, so that a problem has the same bits in whatever company.
  static int64_t block_count(const SymmetricProblem& problem) {
    const int64_t n = problem.row.count;
    if (n * problem.column.count < kLeastShared) return 1;
    return std::clamp(n / kPanelRows<A>, int64_t{1}, kMostBlocks);
  }

  static SymmetricSide empty_side() { return {}; }

  bool has_slopes() const { return problem_.row.slopes != nullptr || problem_.column.slopes != nullptr; }

  // ---- the schedule ----

  enum class Take { first, average, next };

  void begin() {
    iteration_ = 0;
    if (args_.epsilons != nullptr) return set(args_.epsilons[0], Take::first);
    set(args_.max_iterations > 1 ? std::max(problem_.first_epsilon, problem_.epsilon) : problem_.epsilon, Take::first);
  }

  void set(double epsilon, Take take) {
    epsilon_ = epsilon;
    take_ = take;
    row_.scale(1 / (epsilon * kLn2));
    if (!problem_.is_self) column_.scale(1 / (epsilon * kLn2));
  }

  // With f' and g' found: takes them, and sets what follows.
  void advance() {
    const double error = args_.epsilons == nullptr ? row_error() : 0;
    take(row_);
    if (!problem_.is_self) take(column_);
    ++iteration_;
    if (args_.epsilons != nullptr) {
      is_done_ = take_ == Take::next;
      const bool is_last = iteration_ > args_.epsilon_count;
      if (!is_done_) set(args_.epsilons[iteration_ - 1 - is_last], is_last ? Take::next : Take::average);
      return;
    }
    const bool is_last_epsilon = epsilon_ <= problem_.epsilon;
    *problem_.error = is_last_epsilon ? error : INFINITY;
    *problem_.iterations = iteration_;
    is_done_ = iteration_ >= args_.max_iterations || (is_last_epsilon && error <= args_.tolerance);
    if (is_done_) return;
    const bool is_last = iteration_ + 1 >= args_.max_iterations;
    set(is_last ? problem_.epsilon : std::max(epsilon_ * args_.epsilon_factor, problem_.epsilon), Take::average);
  }

  void take(const Points<A>& points) const {
    const SymmetricSide& side = points.side;
    const double* const next = points.next.get();
    if (take_ == Take::next) {
      if (side.next != nullptr) std::copy_n(next, side.count, side.next);
      if (side.slopes != nullptr) set_slopes(points);
      return;
    }
    const bool is_listed = args_.epsilons != nullptr;
    for (int64_t i = 0; i < side.count; ++i) {
      // Where a point has no weight no other's potential follows its own: the error does not tell how far that is off.
      const bool takes_all = take_ == Take::first || (!is_listed && side.weights[i] == 0);
      side.potentials[i] += (takes_all ? 1 : 0.5) * (next[i] - side.potentials[i]);
    }
  }

  // How far rows' masses are from their weights; with penalties, from what their potentials ask for.
  double row_error() const {
    const SymmetricSide& side = row_.side;
    double error = 0;
    for (int64_t i = 0; i < side.count; ++i) {
      const double step = side.rhos == nullptr
                              ? static_cast<double>(row_.sums.get()[i]) - 1
                              : (row_.next.get()[i] - side.potentials[i]) / (side.kappa(i, epsilon_) * epsilon_);
      error += side.weights[i] * std::abs(step);
    }
    return error;
  }

  // ---- potentials from sums ----

  // f' and g'; whether all sums had their digits.
  bool find_next() {
    add_partial_sums();
    const bool rows_are_sound = find_next(row_);
    return (problem_.is_self || find_next(column_)) && rows_are_sound;
  }

  void add_partial_sums() {
    for (int64_t j = 0; j < stride_; j += kLanes<A>) {
      Vector<A> sum = problem_.is_self ? load(row_.sums.get() + j) : Vector<A>{};
      for (int64_t block = 0; block < blocks_; ++block) sum += load(partial_.get() + block * stride_ + j);
      store(column_.sums.get() + j, sum);
    }
  }

  bool find_next(const Points<A>& points) const {
    LaneIndex<A> is_lost{};
    for (int64_t i = 0; i < points.stride; i += kLanes<A>) {
      Vector<A> sum = load(points.sums.get() + i);
      const int left = static_cast<int>(std::min<int64_t>(points.side.count - i, kLanes<A>));
      sum = lane_index<A>() < left ? sum : broadcast(A(1));
      is_lost |= ~is_sound(sum);
      set_next(points, i, sum);
    }
    return !any_lane(is_lost);
  }

  static LaneIndex<A> is_sound(Vector<A> sum) { return (sum >= 1 / kWidest<A>)&(sum <= kWidest<A>); }

  // log sum_j = log of the sum - f / eps, the latter as E has had it.
  void set_next(const Points<A>& points, int64_t first, Vector<A> sum) const {
    A sums[kLanes<A>];
    store(sums, sum);
    for (int64_t part = 0; part < kLanes<A>; part += kLanes<double>) {
      DoubleVector of_part, scaled;
      for (int lane = 0; lane < kLanes<double>; ++lane) {
        of_part[lane] = static_cast<double>(sums[part + lane]);
        scaled[lane] = static_cast<double>(points.scaled.get()[first + part + lane]);
      }
      store(points.next.get() + first + part, -epsilon_ * (logarithm(of_part) - scaled * kLn2));
    }
    if (points.side.rhos == nullptr) return;
    for (int64_t i = first; i < std::min(first + kLanes<A>, points.side.count); ++i) {
      points.next.get()[i] *= points.side.kappa(i, epsilon_);
    }
  }

  // ---- sums that were lost ----

  void find_lost() {
    find_lost(row_, column_);
    if (!problem_.is_self) find_lost(column_, row_);
  }

  void find_lost(const Points<A>& points, Points<A>& others) {
    others.coordinates();
    const Scratch<int64_t> lost(points.side.count);
    int64_t count = 0;
    for (int64_t i = 0; i < points.side.count; ++i) {
      if (!is_sound(points.sums.get()[i])) lost.get()[count++] = i;
    }
    const int64_t grain = std::max(int64_t{1}, kElementsPerTask / others.stride);
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = lost.get()[k];
        const double log_sum = this->log_sum(points.points() + i * args_.dimension, others);
        points.next.get()[i] = -points.side.kappa(i, epsilon_) * epsilon_ * log_sum;
        points.sums.get()[i] = static_cast<A>(std::exp(points.scaled.get()[i] * kLn2 + log_sum));
        if (take_ == Take::next && points.side.slopes != nullptr) set_lost_slope(points, i, others, log_sum);
      }
    });
  }

  // sum_j b_j exp((g_j - C_j) / eps - log_sum) dC_j / dx, one by one.
  void set_lost_slope(const Points<A>& points, int64_t i, const Points<A>& others, double log_sum) const {
    const int64_t d = args_.dimension;
    const A* const point = points.points() + i * d;
    const PointsCost<A, kCost, kDimension> cost = cost_from(point, others);
    const Scratch<double> slope(d);
    std::fill_n(slope.get(), d, 0.0);
    A costs[kLanes<A>];
    for (int64_t first = 0; first < others.side.count; first += kLanes<A>) {
      store(costs, cost.at({point}, first));
      for (int64_t j = first; j < std::min(first + kLanes<A>, others.side.count); ++j) {
        if (others.side.weights[j] == 0) continue;  // whose exponential may be infinite
        const double c = static_cast<double>(costs[j - first]);
        const double e = others.side.weights[j] *
                         std::exp(static_cast<double>(others.scaled.get()[j]) * kLn2 - c / epsilon_ - log_sum);
        const double w = kCost == PointCost::euclidean ? (c * c > args_.least_square ? e / c : 0) : e;
        for (int64_t k = 0; k < d; ++k) {
          const double y = static_cast<double>(others.points()[j * d + k]);
          slope.get()[k] += kCost == PointCost::cosine ? -w * y : w * (static_cast<double>(point[k]) - y);
        }
      }
    }
    A* const to = static_cast<A*>(points.side.slopes) + i * d;
    for (int64_t k = 0; k < d; ++k) to[k] = static_cast<A>((kCost == PointCost::sqeuclidean ? 2 : 1) * slope.get()[k]);
    points.sums.get()[i] = 0;  // what others' sums hold of it does not count
    points.side.sums[i] = 0;
  }

  // ---- slopes ----

  void set_slopes(const Points<A>& points) const {
    const SymmetricSide& side = points.side;
    for (int64_t i = 0; i < side.count; ++i) {
      if (points.sums.get()[i] == 0) continue;  // found one by one
      side.sums[i] = static_cast<double>(points.sums.get()[i]);
      if constexpr (kDimension > 0) {
        for (int64_t k = 0; k < kDimension; ++k) {
          A sum = &points == &row_ ? row_slopes_.get()[k * row_.stride + i] : A(0);
          if (&points == &column_) {
            for (int64_t block = 0; block < blocks_; ++block) {
              sum += partial_slopes_.get()[(block * kDimension + k) * stride_ + i];
            }
          }
          const A scale = (kCost == PointCost::sqeuclidean ? 2 : 1) / points.sums.get()[i];
          static_cast<A*>(side.slopes)[i * kDimension + k] = scale * sum;
        }
      }
    }
  }

  static bool is_sound(A sum) { return sum >= 1 / kWidest<A> && sum <= kWidest<A>; }

  PointsCost<A, kCost, kDimension> cost_from(const A* point, const Points<A>& others) const {
    return {args_.dimension, others.stride, point, others.transposed->get(), static_cast<A>(args_.least_square)};
  }

  // log sum_j b_j exp((g_j - C_j) / eps)
  double log_sum(const A* point, const Points<A>& others) const {
    const PointsCost<A, kCost, kDimension> cost = cost_from(point, others);
    const A scale = static_cast<A>(1 / (epsilon_ * kLn2)), none = -static_cast<A>(__builtin_inf());
    const auto exponents = [&](int64_t j) {
      const Vector<A> x = load(others.scaled.get() + j) - scale * cost.at({point}, j);
      return load(others.weights.get() + j) > A(0) ? x : broadcast(none);
    };
    Vector<A> largest = broadcast(none);
    for (int64_t j = 0; j < others.stride; j += kLanes<A>) {
      const Vector<A> x = exponents(j);
      largest = x > largest ? x : largest;
    }
    A maximum = none;
    for (int lane = 0; lane < kLanes<A>; ++lane) maximum = largest[lane] > maximum ? largest[lane] : maximum;
    if (maximum == none) return -INFINITY;
    Vector<A> sum{};
    for (int64_t j = 0; j < others.stride; j += kLanes<A>) {
      sum += load(others.weights.get() + j) * power_of_two(exponents(j) - maximum);
    }
    return kLn2 * static_cast<double>(maximum) + std::log(static_cast<double>(sum_lanes(sum)));
  }

  // ---- pairs ----

  int64_t first_column(int64_t panel) const { return problem_.is_self ? panel * kPanelRows<A> : 0; }

  // Of a panel from its first column on, and the distance between its rows'.
  A* costs(int64_t panel, int64_t block) const {
    if (problem_.held == nullptr) return costs_.get() + block * kPanelRows<A> * stride_;
    return static_cast<A*>(problem_.held) + held_.at(panel * kPanelRows<A>, first_column(panel));
  }
  int64_t costs_stride(int64_t panel) const {
    if (problem_.held == nullptr) return stride_ - first_column(panel);
    return held_.width(panel * kPanelRows<A> / held_.block_rows());
  }

  void fill_panel(int64_t panel, int64_t block) const {
    if constexpr (kDimension == 0) {
      const int64_t first = panel * kPanelRows<A>, rows = std::min(kPanelRows<A>, n_ - first);
      A* const to = costs(panel, block);
      const int64_t stride = costs_stride(panel);
      in_groups<kTogether<A>>(rows, [&](auto count, int64_t r) {
        fill_costs<count>(cost_, first + r, to + r * stride, stride, first_column(panel));
      });
    }
  }

  void pass(int64_t block) {
    std::fill_n(partial_.get() + block * stride_, stride_, A(0));
    if (take_ == Take::next && has_slopes()) {
      const int64_t count = kDimension * stride_;
      std::fill_n(partial_slopes_.get() + block * count, count, A(0));
      return pass<true>(block);
    }
    pass<false>(block);
  }

  template <bool kWithSlopes>
  void pass(int64_t block) {
    // With their sums and those of slopes, fewer rows fit into the registers.
    constexpr int64_t kRows = kWithSlopes && kTogether<A> > 4 ? 4 : kTogether<A>;
    for (int64_t p = block; p < panels_; p += blocks_) {
      if (kDimension == 0 && problem_.held == nullptr) fill_panel(p, block);
      A* const of_panel = costs(p, block);
      const int64_t stride = costs_stride(p);
      const int64_t first = p * kPanelRows<A>, rows = std::min(kPanelRows<A>, n_ - first);
      in_groups<kRows>(rows, [&](auto count, int64_t r) {
        add_rows<count, kWithSlopes>(first + r, first_column(p), of_panel + r * stride, stride, block);
      });
      if (kWithSlopes && kDimension == 0 && problem_.held != nullptr && problem_.is_self) clear_half(p);
    }
  }

  // W left of the diagonal, and half of it on the diagonal.
  void clear_half(int64_t panel) const {
    const int64_t first = panel * kPanelRows<A>;
    for (int64_t i = first; i < std::min(first + kPanelRows<A>, n_); ++i) {
      const int64_t begin = held_.first_column(i / held_.block_rows());
      A* const row = static_cast<A*>(problem_.held) + held_.at(i, begin);
      std::fill_n(row, i - begin, A(0));
      row[i - begin] *= A(0.5);
    }
  }

  // What belongs to the rows of a group, the columns and a block, where stores to sums can't change it.
  struct Group {
    const A *points, *row_potentials, *row_weights;  // of the group's rows
    const A *coordinates, *potentials, *weights;     // of columns
    A *column_sums, *column_slopes, *costs;          // costs of the group's rows
    int64_t dimension, stride, costs_stride;
    A scale;
    bool is_held;
  };

  template <int64_t kRows, bool kWithSlopes>
  void add_rows(int64_t first, int64_t begin, A* costs, int64_t costs_stride, int64_t block) const {
    constexpr int64_t kSlopes = kWithSlopes ? kDimension : 0;
    const int64_t stride = stride_;
    const Group group{cost_.x + first * args_.dimension,
                      row_.scaled.get() + first,
                      row_.weights.get() + first,
                      cost_.y,
                      column_.scaled.get(),
                      column_.weights.get(),
                      partial_.get() + block * stride,
                      partial_slopes_.get() + block * kSlopes * stride,
                      costs - begin,
                      args_.dimension,
                      stride,
                      costs_stride,
                      static_cast<A>(1 / (epsilon_ * kLn2)),
                      problem_.held != nullptr};
    Vector<A> sums[kRows] = {}, slopes[kRows][kSlopes > 0 ? kSlopes : 1] = {};
    int64_t j = begin;
    if (problem_.is_self) {  // the panel's own points: both halves, for the rows alone
      add_vector<kRows, kSlopes, kWithSlopes, false>(group, j, sums, slopes);
      j += kLanes<A>;
    }
    for (; j < stride; j += kLanes<A>) add_vector<kRows, kSlopes, kWithSlopes, true>(group, j, sums, slopes);
    for (int64_t r = 0; r < kRows; ++r) {
      row_.sums.get()[first + r] = sum_lanes(sums[r]);
      for (int64_t k = 0; k < kSlopes; ++k) {
        row_slopes_.get()[k * row_.stride + first + r] = sum_lanes(slopes[r][k]);
      }
    }
  }

  // The loop over rows must be unrolled: their sums are registers.
  template <int64_t kRows, int64_t kSlopes, bool kKeeps, bool kOfColumns>
  __attribute__((always_inline)) void add_vector(const Group& group, int64_t j, Vector<A> (&sums)[kRows],
                                                 Vector<A> (&slopes)[kRows][kSlopes > 0 ? kSlopes : 1]) const {
    const Vector<A> potentials = load(group.potentials + j), weights = load(group.weights + j);
    Vector<A> coordinates[kDimension > 0 ? kDimension : 1];
    for (int64_t k = 0; k < kDimension; ++k) coordinates[k] = load(group.coordinates + k * group.stride + j);
    Vector<A> total = kOfColumns ? load(group.column_sums + j) : Vector<A>{};
    Vector<A> totals[kSlopes > 0 ? kSlopes : 1] = {};
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      Vector<A> cost{};
      const A* const point = group.points + r * group.dimension;
      if constexpr (kDimension > 0) {
        for (int64_t k = 0; k < kDimension; ++k) cost = cost_.add(cost, point[k], coordinates[k]);
        cost = cost_.finish(cost);
      } else {
        cost = load(group.costs + r * group.costs_stride + j);
      }
      const Vector<A> e = power_of_two((potentials - group.scale * cost) + group.row_potentials[r]);
      sums[r] += weights * e;
      if (kOfColumns) total += group.row_weights[r] * e;
      if constexpr (kKeeps) {
        const Vector<A> w = per_distance(e, cost);
        if constexpr (kDimension == 0) {
          if (group.is_held) store(group.costs + r * group.costs_stride + j, w);
        }
        for (int64_t k = 0; k < kSlopes; ++k) {
          const Vector<A> by_x = kCost == PointCost::cosine ? -w * coordinates[k] : w * (point[k] - coordinates[k]);
          const Vector<A> by_y = kCost == PointCost::cosine ? w * point[k] : by_x;
          slopes[r][k] += weights * by_x;
          if (kOfColumns) totals[k] -= group.row_weights[r] * by_y;
        }
      }
    }
    if (!kOfColumns) return;
    store(group.column_sums + j, total);
    for (int64_t k = 0; k < kSlopes; ++k) {
      A* const to = group.column_slopes + k * group.stride + j;
      store(to, load(to) + totals[k]);
    }
  }

  Vector<A> per_distance(Vector<A> e, Vector<A> cost) const {
    if constexpr (kCost != PointCost::euclidean) return e;
    return cost * cost > static_cast<A>(args_.least_square) ? e / cost : Vector<A>{};
  }

  const SymmetricSinkhornArgs& args_;
  const SymmetricProblem& problem_;
  Points<A> row_, own_column_;
  Points<A>& column_;
  int64_t n_, stride_, panels_, blocks_;
  PointsCost<A, kCost, kDimension> cost_;
  HeldCosts held_;
  Scratch<A> costs_;           // of a panel a block
  Scratch<A> partial_;         // [blocks, stride]
  Scratch<A> row_slopes_;      // [dimension, row's stride]
  Scratch<A> partial_slopes_;  // [blocks, dimension, stride]
  double epsilon_ = 0;
  Take take_ = Take::first;
  int64_t iteration_ = 0;
  bool is_done_ = false;
};

struct Ranked {
  int64_t pairs, index;
};

template <typename A, PointCost kCost, int64_t kDimension>
void solve_all(const SymmetricSinkhornArgs& args) {
  const int64_t count = args.problem_count, least_shared = count == 1 ? 0 : kLeastSharedOfSeveral;
  std::vector<Ranked> order;
  order.reserve(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) {
    const SymmetricProblem& problem = args.problems[k];
    order.push_back({problem.row.count * problem.column.count / (problem.is_self ? 2 : 1), k});
  }
  // The largest first: small ones fill what is left of the threads' time.
  std::stable_sort(order.begin(), order.end(), [](const Ranked& k, const Ranked& l) { return k.pairs > l.pairs; });
  const auto run = [&](int64_t k) { Problem<A, kCost, kDimension>(args, args.problems[order[k].index]).run(); };
  int64_t shared = 0;
  for (; shared < count && order[shared].pairs >= least_shared; ++shared) run(shared);
  std::atomic<int64_t> next{shared};
  parallel_for(count - shared, 1, [&](int64_t, int64_t) {
    for (int64_t k = next++; k < count; k = next++) run(k);
  });
}

template <typename A, PointCost kCost>
void solve_of_cost(const SymmetricSinkhornArgs& args) {
  switch (args.dimension) {
    case 1:
      return solve_all<A, kCost, 1>(args);
    case 2:
      return solve_all<A, kCost, 2>(args);
    case 3:
      return solve_all<A, kCost, 3>(args);
    default:
      return solve_all<A, kCost, 0>(args);
  }
}

template <typename A>
void solve(const SymmetricSinkhornArgs& args) {
  switch (args.point_cost) {
    case PointCost::sqeuclidean:
      return solve_of_cost<A, PointCost::sqeuclidean>(args);
    case PointCost::euclidean:
      return solve_of_cost<A, PointCost::euclidean>(args);
    case PointCost::cosine:
      return solve_of_cost<A, PointCost::cosine>(args);
  }
}

}  // namespace

void symmetric_sinkhorn(const SymmetricSinkhornArgs& args) {
  if (args.dtype == Dtype::float64) return solve<double>(args);
  solve<float>(args);
}

}  // namespace pyreg::PYREG_ISA

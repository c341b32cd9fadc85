// CPU kernel of progressive partial transport. Method and notation: partial_transport.h.
//
// Threads share blocks of rows, whose number depends on the size alone and whose sums for the columns are added up in a
// fixed order. A tile is some rows that are still in the first-level cache when they are added to the columns' sums;
// four of them share each read of v, and each read and write of those sums. Bytes an iteration: K once from wherever it
// lies, and once more from the first-level cache. K lies in the result's memory where its rows fill whole vectors.
//
// Sums are of A over kChunkRows rows and of double beyond: thousands of rows leave no more rounding than a hundred.
// Exponents are formed in double, for at a small eps they are thousands; K's exponentials are of A.
#include <cmath>
#include <type_traits>

#include "core/huge_pages.h"
#include "core/math.h"
#include "core/parallel.h"
#include "core/row_groups.h"
#include "core/rows.h"
#include "core/simd.h"
#include "core/team.h"
#include "partial_transport/partial_transport.h"

namespace pyreg::PYREG_ISA {

namespace {

// K is formed anew once a scaling is exp(this) or its inverse.
constexpr double kFarthest = 16;

// What a column must have of K, times the rows, for its sum to have lost nothing that matters below K's least numbers.
template <typename A>
constexpr double kLeastShare = sizeof(A) == 4 ? 1e-30 : 1e-290;

// A column of so small a share of all mass is nothing to the others, and moves by an iteration in logarithms only,
// every so many iterations and at the end.
constexpr double kNegligibleShare = 1e-25;
constexpr int64_t kBetweenExact = 16;

constexpr int64_t kTogether = 4;
constexpr int64_t kTileBytes = 32 << 10;
constexpr int64_t kChunkRows = 128;
constexpr int64_t kMostBlocks = 16;        // of rows: the most threads that take part
constexpr int64_t kBlockEntries = 60000;   // a block of no fewer
constexpr int64_t kLeastShared = 1 << 16;  // entries from which on a second thread has begun before an iteration ends
constexpr double kLeastExponent = -1e300;  // a maximum to begin with, which may be subtracted from minus infinity

template <typename Storage>
class Solver {
 public:
  using A = Accumulate<Storage>;

  explicit Solver(const PartialTransportArgs& args)
      : args_(args),
        n_(args.rows),
        k_(args.classes),
        stride_(padded<A>(k_)),
        wide_(padded<double>(stride_ > k_ ? stride_ : k_ + 1)),
        blocks_(block_count(n_, k_)),
        tile_(tile_rows(stride_)),
        own_kernel_(stride_ == k_ ? 0 : n_ * stride_),
        kernel_(stride_ == k_ ? static_cast<A*>(args.plan) : own_kernel_.get()),
        virtual_(n_ + kLanes<A>),
        maximum_(n_),
        log_sum_(n_),
        row_(blocks_ * stride_),
        exponents_(blocks_ * wide_),
        chunk_(blocks_ * stride_),
        sums_(blocks_ * wide_),
        maxima_(blocks_ * wide_),
        energies_(blocks_ * kApart),
        v_(stride_),
        beta_(wide_),
        base_(wide_),
        next_(wide_),
        moved_(wide_),
        share_(wide_),
        dormant_(wide_) {
    if (stride_ != k_) advise_huge_pages(kernel_, sizeof(A) * static_cast<size_t>(n_ * stride_));
    for (int64_t j = 0; j < wide_; ++j) {
      beta_.get()[j] = is_present(j) ? args.log_scalings[j] : 0;
      moved_.get()[j] = share_.get()[j] = 0;
      dormant_.get()[j] = false;
    }
    for (int64_t i = 0; i < kLanes<A>; ++i) virtual_.get()[n_ + i] = 0;
  }

  void run() {
    for_each_block(blocks_, [&](int64_t block) { prepare_rows(block); });
    while (iteration_ < args_.max_iterations && !is_done()) {
      build_kernel();
      needs_exact_ = false;
      repeat_in_parallel(blocks_, [&](int64_t block) { scale_rows(block); }, [&] { return scale_columns(); });
      if (needs_exact_) exact_iteration();
    }
    if (needs_exact_ || distance() > kFarthest) build_kernel();
    for_each_block(blocks_, [&](int64_t block) { write_rows(block); });
    for (int64_t j = 0; j <= k_; ++j) args_.log_scalings[j] = beta_.get()[j];
    *args_.error = error_;
    *args_.iterations = iteration_;
    if (args_.energy == nullptr) return;
    *args_.energy = 0;
    for (int64_t block = 0; block < blocks_; ++block) *args_.energy += energies_.get()[block * kApart];
  }

 private:
  static constexpr int64_t kApart = 8;  // doubles: a cache line

  template <typename T>
  static int64_t padded(int64_t count) {
    return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  }
  static int64_t block_count(int64_t rows, int64_t classes) {
    if (rows * classes < kLeastShared) return 1;
    const int64_t by_entries = rows * classes / kBlockEntries, by_rows = rows / kTogether;
    const int64_t count = by_entries < by_rows ? by_entries : by_rows;
    return count < 1 ? 1 : count < kMostBlocks ? count : kMostBlocks;
  }
  static int64_t tile_rows(int64_t stride) {
    const int64_t most = kTileBytes / (stride * static_cast<int64_t>(sizeof(A)));
    return most < kTogether ? kTogether : most < kLanes<A> ? most : kLanes<A>;
  }

  int64_t first_row(int64_t block) const { return n_ * block / blocks_; }

  bool is_present(int64_t j) const { return j <= k_ && args_.targets[j] > 0; }
  bool is_done() const { return error_ <= args_.tolerance; }
  double kappa(int64_t j) const { return j < k_ ? 1 / (1 + args_.epsilon_by_gamma) : 1; }

  // The logarithm of a scaling from that of what the columns' sum is with a scaling of exp(at).
  double updated(int64_t j, double at, double log_sum) const {
    return kappa(j) * (std::log(args_.targets[j] * static_cast<double>(n_)) + at - log_sum);
  }

  // How far scalings are from 1.
  double distance() const {
    double farthest = 0;
    for (int64_t j = 0; j <= k_; ++j) farthest = std::fmax(farthest, std::abs(beta_.get()[j] - base_.get()[j]));
    return farthest;
  }

  // ---- scores ----

  static A largest(const A* x, int64_t stride) {
    Vector<A> largest = load(x);
    for (int64_t j = kLanes<A>; j < stride; j += kLanes<A>) {
      const Vector<A> next = load(x + j);
      largest = next > largest ? next : largest;
    }
    A result = largest[0];
    for (int lane = 1; lane < kLanes<A>; ++lane) result = largest[lane] > result ? largest[lane] : result;
    return result;
  }

  // [stride], minus infinity beyond the last class.
  void load_logits(int64_t i, A* to) const {
    const Storage* const logits = static_cast<const Storage*>(args_.logits) + i * k_;
    int64_t j = 0;
    for (; j + kLanes<A> <= k_; j += kLanes<A>) store(to + j, load(logits + j));
    const A none = -static_cast<A>(__builtin_inf());
    if (j < k_) store(to + j, load_partial(logits + j, static_cast<int>(k_ - j), none));
  }

  void prepare_rows(int64_t block) const {
    A* const row = row_.get() + block * stride_;
    for (int64_t i = first_row(block); i < first_row(block + 1); ++i) {
      load_logits(i, row);
      const A maximum = largest(row, stride_);
      double sum = 0;
      for (int64_t j = 0; j < stride_; j += kLanes<A>) {
        sum += static_cast<double>(sum_lanes(exponential(load(row + j) - maximum)));
      }
      maximum_.get()[i] = maximum;
      log_sum_.get()[i] = std::log(sum);
    }
  }

  // x - max, with the gain where it is wanted.
  void load_scores(int64_t i, bool with_gain, A* to) const {
    load_logits(i, to);
    const A maximum = maximum_.get()[i];
    for (int64_t j = 0; j < stride_; ++j) to[j] -= maximum;
    if (args_.gain == nullptr || !with_gain) return;
    const A* const gain = static_cast<const A*>(args_.gain) + i * k_;
    for (int64_t j = 0; j < k_; ++j) to[j] += gain[j];
  }

  // base + score / eps of all columns; minus infinity for those that are not there. Their maximum.
  double fill_exponents(int64_t i, A* row, double* to) const {
    load_scores(i, true, row);
    const double scale = 1 / args_.epsilon;
    const double* const base = masked_base_;
    for (int64_t j = 0; j < stride_; ++j) to[j] = static_cast<double>(row[j]) * scale + base[j];
    to[k_] = log_sum_.get()[i] * scale + base[k_];
    for (int64_t j = k_ + 1; j < wide_; ++j) to[j] = -INFINITY;
    DoubleVector largest = load(to);
    for (int64_t j = kLanes<double>; j < wide_; j += kLanes<double>) {
      const DoubleVector next = load(to + j);
      largest = next > largest ? next : largest;
    }
    double result = largest[0];
    for (int lane = 1; lane < kLanes<double>; ++lane) result = largest[lane] > result ? largest[lane] : result;
    return result;
  }

  // ---- K ----

  void build_kernel() {
    for (int64_t j = 0; j < wide_; ++j) {
      base_.get()[j] = beta_.get()[j];
      next_.get()[j] = is_present(j) ? beta_.get()[j] : -INFINITY;
    }
    masked_base_ = next_.get();
    set_scalings();
    for_each_block(blocks_, [&](int64_t block) { build_rows(block); });
  }

  void build_rows(int64_t block) const {
    A* const row = row_.get() + block * stride_;
    double* const exponents = exponents_.get() + block * wide_;
    for (int64_t i = first_row(block); i < first_row(block + 1); ++i) {
      const double maximum = fill_exponents(i, row, exponents);
      virtual_.get()[i] = static_cast<A>(std::exp(exponents[k_] - maximum));
      exponents[k_] = k_ < stride_ ? -INFINITY : exponents[k_];
      A* const k = kernel_ + i * stride_;
      for (int64_t j = 0; j < stride_; ++j) k[j] = static_cast<A>(exponents[j] - maximum);
      for (int64_t j = 0; j < stride_; j += kLanes<A>) store(k + j, exponential(load(k + j)));
    }
  }

  void set_scalings() {
    const auto scaling = [&](int64_t j) {
      return is_present(j) ? static_cast<A>(std::exp(beta_.get()[j] - base_.get()[j])) : A(0);
    };
    for (int64_t j = 0; j < stride_; ++j) v_.get()[j] = j < k_ ? scaling(j) : A(0);
    virtual_v_ = scaling(k_);
  }

  // ---- an iteration ----

  void scale_rows(int64_t block) const {
    double* const sums = sums_.get() + block * wide_;
    for (int64_t j = 0; j < wide_; ++j) sums[j] = 0;
    A* const chunk = chunk_.get() + block * stride_;
    const int64_t end = first_row(block + 1);
    for (int64_t first = first_row(block); first < end; first += kChunkRows) {
      const int64_t last = first + kChunkRows < end ? first + kChunkRows : end;
      for (int64_t j = 0; j < stride_; ++j) chunk[j] = 0;
      Vector<A> of_virtual{};
      for (int64_t i = first; i < last; i += tile_) {
        of_virtual += scale_tile(i, static_cast<int>(i + tile_ < last ? tile_ : last - i), chunk);
      }
      for (int64_t j = 0; j < k_; ++j) sums[j] += static_cast<double>(chunk[j]);
      sums[k_] += static_cast<double>(sum_lanes(of_virtual));
    }
  }

  // Adds the rows of the plan to the columns' sums; what it adds to that of the virtual column.
  Vector<A> scale_tile(int64_t first, int count, A* chunk) const {
    const A* const k = kernel_ + first * stride_;
    A sums[kLanes<A>] = {}, u[kLanes<A>];
    in_groups<kTogether>(count, [&](auto rows, int64_t r) { sum_rows<rows>(k + r * stride_, sums + r); });
    const Vector<A> of_virtual = load(virtual_.get() + first);
    const Vector<A> sum = load(sums) + of_virtual * virtual_v_;
    const Vector<A> inverse = lane_index<A>() < count ? A(1) / sum : Vector<A>{};
    store(u, inverse);
    in_groups<kTogether>(count, [&](auto rows, int64_t r) { add_rows<rows>(k + r * stride_, stride_, u + r, chunk); });
    return of_virtual * inverse;
  }

  // K v
  template <int64_t kRows>
  void sum_rows(const A* k, A* to) const {
    Vector<A> sums[kRows] = {};
    const A* const v = v_.get();
    for (int64_t j = 0; j < stride_; j += kLanes<A>) {
      const Vector<A> scaling = load(v + j);
      for (int64_t r = 0; r < kRows; ++r) sums[r] += load(k + r * stride_ + j) * scaling;
    }
    for (int64_t r = 0; r < kRows; ++r) to[r] = sum_lanes(sums[r]);
  }

  // Whether scaling goes on.
  bool scale_columns() {
    double* const sums = sums_.get();
    bool has_dormant = false;
    for (int64_t j = 0; j <= k_; ++j) {
      for (int64_t block = 1; block < blocks_; ++block) sums[j] += sums[block * wide_ + j];
      if (!is_present(j) || sums[j] >= kLeastShare<A> * static_cast<double>(n_)) continue;
      if (!dormant_.get()[j]) {
        needs_exact_ = true;
        return false;
      }
      has_dormant = true;
    }
    for (int64_t j = 0; j <= k_; ++j) {
      const bool is_sound = sums[j] >= kLeastShare<A> * static_cast<double>(n_);
      next_.get()[j] = is_sound ? updated(j, base_.get()[j], std::log(sums[j])) : beta_.get()[j];
    }
    end_iteration();
    set_scalings();
    const bool is_end = is_done() || iteration_ + 1 >= args_.max_iterations;
    if (has_dormant && (is_end || ++since_exact_ >= kBetweenExact) && iteration_ < args_.max_iterations) {
      needs_exact_ = true;
      return false;
    }
    return iteration_ < args_.max_iterations && !is_done() && distance() <= kFarthest;
  }

  // Of the columns' next scalings.
  void end_iteration() {
    const double shift = dual_shift();
    error_ = 0;
    for (int64_t j = 0; j <= k_; ++j) {
      if (!is_present(j)) continue;
      const double next = next_.get()[j] + shift;
      moved_.get()[j] = std::abs(next - beta_.get()[j]);
      error_ += args_.targets[j] * moved_.get()[j] / kappa(j);
      beta_.get()[j] = next;
    }
    ++iteration_;
  }

  // Exact differences from the least of beta: a large gamma must not multiply their rounding.
  double dual_shift() const {
    const double rate = args_.epsilon_by_gamma;
    if (rate == 0) return 0;
    double least = INFINITY, sum = 0, mass = 0;
    for (int64_t j = 0; j < k_; ++j) {
      if (is_present(j)) least = std::fmin(least, next_.get()[j]);
    }
    for (int64_t j = 0; j < k_; ++j) {
      if (!is_present(j)) continue;
      sum += args_.targets[j] * std::expm1(-rate * (next_.get()[j] - least));
      mass += args_.targets[j];
    }
    return std::log1p(sum / mass) / rate - least;
  }

  // In the logarithms: the same, be the scalings what they may.
  void exact_iteration() {
    for (int64_t j = 0; j < wide_; ++j) next_.get()[j] = is_present(j) ? beta_.get()[j] : -INFINITY;
    masked_base_ = next_.get();
    for_each_block(blocks_, [&](int64_t block) { add_log_rows(block); });
    for (int64_t j = 0; j <= k_; ++j) {
      double maximum = kLeastExponent, sum = 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        maximum = std::fmax(maximum, maxima_.get()[block * wide_ + j]);
      }
      for (int64_t block = 0; block < blocks_; ++block) {
        sum += sums_.get()[block * wide_ + j] * std::exp(maxima_.get()[block * wide_ + j] - maximum);
      }
      const double log_sum = maximum + std::log(sum), before = beta_.get()[j];
      next_.get()[j] = std::isfinite(log_sum) ? updated(j, before, log_sum) : before;
      share_.get()[j] = std::exp(log_sum + next_.get()[j] - before) / static_cast<double>(n_);
    }
    end_iteration();
    for (int64_t j = 0; j <= k_; ++j) {
      dormant_.get()[j] = moved_.get()[j] < 1 && share_.get()[j] < kNegligibleShare;
    }
    since_exact_ = 0;
  }

  // Columns' sums of the plan, each relative to the largest of its terms so far.
  void add_log_rows(int64_t block) const {
    double* const sums = sums_.get() + block * wide_;
    double* const maxima = maxima_.get() + block * wide_;
    for (int64_t j = 0; j < wide_; ++j) {
      sums[j] = 0;
      maxima[j] = kLeastExponent;
    }
    A* const row = row_.get() + block * stride_;
    double* const exponents = exponents_.get() + block * wide_;
    for (int64_t i = first_row(block); i < first_row(block + 1); ++i) {
      const double maximum = fill_exponents(i, row, exponents);
      DoubleVector total{};
      for (int64_t j = 0; j < wide_; j += kLanes<double>) total += exponential(load(exponents + j) - maximum);
      const double log_sum = maximum + std::log(sum_lanes(total));
      for (int64_t j = 0; j < wide_; j += kLanes<double>) {
        const DoubleVector term = load(exponents + j) - log_sum, before = load(maxima + j);
        const DoubleVector now = term > before ? term : before;
        store(sums + j, load(sums + j) * exponential(before - now) + exponential(term - now));
        store(maxima + j, now);
      }
    }
  }

  // ---- the result ----

  void write_rows(int64_t block) const {
    A* const plan = static_cast<A*>(args_.plan);
    const A* const v = v_.get();
    double energy = 0;
    for (int64_t i = first_row(block); i < first_row(block + 1); ++i) {
      const A* const k = kernel_ + i * stride_;
      Vector<A> total{};
      for (int64_t j = 0; j < stride_; j += kLanes<A>) total += load(k + j) * load(v + j);
      const A inverse = A(1) / (sum_lanes(total) + virtual_.get()[i] * virtual_v_);
      A* const to = plan + i * k_;
      int64_t j = 0;
      for (; j + kLanes<A> <= k_; j += kLanes<A>) store(to + j, load(k + j) * load(v + j) * inverse);
      if (j < k_) store_partial(to + j, load(k + j) * load(v + j) * inverse, static_cast<int>(k_ - j));
      if (args_.energy != nullptr) energy += row_energy(i, to, row_.get() + block * stride_);
    }
    energies_.get()[block * kApart] = energy;
  }

  double row_energy(int64_t i, const A* plan, A* row) const {
    load_scores(i, false, row);
    const double n = static_cast<double>(n_);
    const A log_sum = static_cast<A>(log_sum_.get()[i]), epsilon = static_cast<A>(args_.epsilon);
    const A log_n = static_cast<A>(std::log(n)), least = sizeof(A) == 4 ? A(1e-37) : A(1e-300);
    Vector<A> energy{};
    for (int64_t j = 0; j < k_; j += kLanes<A>) {
      const int count = static_cast<int>(k_ - j < kLanes<A> ? k_ - j : kLanes<A>);
      const Vector<A> p = load_partial(plan + j, count, A(0)), score = load(row + j);
      const LaneIndex<A> counts = p > least;
      const Vector<A> log_q = logarithm(counts ? p : broadcast(A(1))) - log_n;
      energy += counts ? p * ((log_sum - score) + epsilon * log_q) : Vector<A>{};
    }
    return static_cast<double>(sum_lanes(energy)) / n;
  }

  const PartialTransportArgs& args_;
  int64_t n_, k_, stride_, wide_, blocks_, tile_;
  Scratch<A> own_kernel_;
  A* kernel_;           // [n, stride], 0 beyond the last class
  Scratch<A> virtual_;  // [n]: the virtual column of K
  Scratch<A> maximum_;  // [n], of the logits
  Scratch<double> log_sum_;
  // Of a block:
  Scratch<A> row_;
  Scratch<double> exponents_;
  Scratch<A> chunk_;
  Scratch<double> sums_, maxima_, energies_;
  // Of all columns:
  Scratch<A> v_;
  A virtual_v_ = 0;
  Scratch<double> beta_, base_, next_, moved_, share_;
  Scratch<bool> dormant_;
  const double* masked_base_ = nullptr;  // minus infinity for columns that are not there
  double error_ = INFINITY;
  int64_t iteration_ = 0, since_exact_ = 0;
  bool needs_exact_ = false;
};

}  // namespace

void partial_transport(const PartialTransportArgs& args) {
  dispatch_dtype(args.dtype, [&](auto storage) { Solver<typename decltype(storage)::type>(args).run(); });
}

}  // namespace pyreg::PYREG_ISA

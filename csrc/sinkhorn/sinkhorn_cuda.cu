// CUDA kernels of Sinkhorn's iteration on a dense cost. Method and notation: sinkhorn.h.
//
// The rows of a problem are shared by `parts` blocks; each holds its rows of K, all their columns. An iteration is
//
//   rows      s = K v of the part's rows, u, and what the rows add to t = K^T u        one read of K
//   columns   t over all parts, v; every part has its own columns                      two barriers of the parts
//
// Teams of a block's threads take kRows rows at a time. A thread of a team holds kColumns columns of them, one team's
// width apart, in registers between their two uses: s is reduced over the team, t over the teams of a block and then,
// in memory, over its parts, in fixed orders. Errors and flags go the same way, so that all blocks of a problem come to
// the same decisions; the host is never waited for.
//
// K is resident where a part's rows fit: in registers (small problems, kHeld), else in shared memory. It is formed anew
// from the cost where scalings have become wide, and at each stage of epsilon. Where K is not resident it is formed in
// every iteration, around the potentials as they are: one exponential an entry, which the units for it give faster than
// memory gives costs. A row formed anew is scaled to its new potential at once, so that K is P and u is 1; a row whose
// sum is out of range is formed again around its largest entry. Columns whose sum is out of range get their potential
// by log-sum-exp, in a pass of its own.
//
// Ways: `block`, one block a problem through all its iterations; `grid`, a cooperative launch whose blocks share out
// problems in groups; `launches`, each step a launch of its own, for devices without cooperative launches, where those
// after convergence return at once.
//
// Sums are in the dtype of the cost, potentials in double. Per entry and iteration of resident K: two multiply-adds,
// and from shared memory one read. Of a problem of 128 x 128 floats in registers, 256 threads: 64 entries and 128
// multiply-adds a thread, and about as many instructions again for the sums over lanes, u and v.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/math.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg {

namespace {

// All registers of a multiprocessor: 128 a thread for floats, 255 for doubles.
template <typename A>
constexpr int kMostThreads = sizeof(A) == 4 ? 512 : 256;
constexpr int kMostWarps = 16;
constexpr int kColumns = 4;
template <bool kHeld>
constexpr int kRowsOf = kHeld ? 16 : 8;

// As on the CPU: scalings and sums of K beyond it ask for absorption.
template <typename A>
constexpr A kWidest = sizeof(A) == 4 ? A(1e15) : A(1e100);
// Of K just formed: a million entries that were too small for a number are 1e-7 of it.
template <typename A>
constexpr A kLeastSum = sizeof(A) == 4 ? A(1e-25) : A(1e-200);

// ---- plan ----

struct Plan {
  SinkhornWay way;
  bool is_held;                 // K is in registers
  bool is_resident;             // in registers or shared memory
  bool has_tile;                // else: a team's rows of K are in shared memory between their two uses
  bool has_shared_sums;         // of columns over a part's rows
  int parts, groups;            // blocks that share a problem, problems at a time
  int rows_each, columns_each;  // of a part
  int part_rows;                // rows_each, rounded up to whole groups
  int threads, teams;           // of a block
  int log2_team;                // of the threads of a team
  int rounds;                   // that the teams need for the part's rows
  int stride;                   // of columns in workspace and shared memory: a multiple of 32
  int chunks;                   // of a row: a team's columns at once
  int stripes;                  // of rows that a part's threads share out in the pass by log-sum-exp
};

// A potential as one number of A and what that leaves.
template <typename A>
struct Split {
  A high, low;
  __device__ __forceinline__ explicit Split(double x)
      : high(static_cast<A>(x)), low(is_infinite(x) ? A(0) : static_cast<A>(x - static_cast<double>(high))) {}
};

template <typename A>
struct alignas(4 * sizeof(A)) RowState {
  A scaling, factor, kappa, weight;  // u_i = factor s_i^-kappa
};
template <typename A>
struct alignas(2 * sizeof(A)) ColumnState {
  A factor, kappa;
};

// Of a warp's rows and columns, or of a part's.
template <typename A>
struct alignas(16) Slot {
  A error;
  int32_t row_flags, column_flags;
};
// Of a block. In shared memory, since the hot loops have no registers for it. All threads set the same, with a barrier
// since it was last read; each sees at least what it has set itself.
struct Here {
  SinkhornSchedule schedule;
  unsigned problem, group;
  unsigned expected;  // arrivals of the group at its next barrier: the first thread's alone
  int part;
};

enum Flag : int32_t { kLost = 1, kWide = 2 };

inline int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Byte offsets in a block's dynamic shared memory. What some threads may write while others still read it is there
// twice.
template <typename A>
struct SharedLayout {
  int here;        // Here
  int slots;       // [2, kMostWarps] Slot
  int exchange;    // [2, kMostWarps, kRows]
  int sums;        // [teams, stride] of columns
  int scalings;    // [2, stride] v
  int columns;     // [stride] ColumnState
  int rows;        // [part_rows] RowState
  int kernel;      // [part_rows, stride] K, or without resident K [teams * kRows, stride]
  int64_t needed;  // bytes

  explicit SharedLayout(const Plan& plan) : needed(0) {
    const int64_t stride = plan.stride * static_cast<int64_t>(sizeof(A));
    const bool is_in_shared = plan.is_resident && !plan.is_held;
    here = take(true, sizeof(Here));
    slots = take(true, 2 * kMostWarps * sizeof(Slot<A>));
    exchange =
        take((1 << plan.log2_team) > kWarpSize || plan.way != SinkhornWay::block, 2 * kMostWarps * 8 * sizeof(A));
    sums = take(plan.has_shared_sums, plan.teams * stride);
    scalings = take(plan.is_resident, 2 * stride);
    columns = take(plan.is_resident, 2 * stride);
    rows = take(plan.is_resident, plan.part_rows * static_cast<int64_t>(sizeof(RowState<A>)));
    kernel = take(is_in_shared || plan.has_tile, (is_in_shared ? plan.part_rows : plan.teams * kRowsOf<false>)*stride);
  }

 private:
  int take(bool is_needed, int64_t bytes) {
    const int offset = static_cast<int>(needed);
    if (is_needed) needed += aligned(bytes);
    return offset;
  }
};

// Of one group in global memory: what its blocks tell each other.
template <typename A>
struct WorkspaceLayout {
  int64_t columns;   // [stride] Split
  int64_t scalings;  // [stride] v
  int64_t slots;     // [2, parts] Slot
  int64_t sums;      // [parts, stride], or by log-sum-exp [parts * stripes, stride]
  int64_t maxima;    // [parts * stripes, stride]
  int64_t needed;    // bytes

  explicit WorkspaceLayout(const Plan& plan) {
    const int64_t stride = plan.stride * static_cast<int64_t>(sizeof(A)), parts = plan.parts;
    columns = 0;
    scalings = columns + 2 * stride;
    slots = scalings + stride;
    sums = slots + aligned(2 * parts * static_cast<int64_t>(sizeof(Slot<A>)));
    maxima = sums + parts * plan.stripes * stride;
    needed = maxima + parts * plan.stripes * stride;
  }
};

template <typename A>
struct Launched {
  SinkhornArgs args;
  Plan plan;
  SharedLayout<A> shared;
  WorkspaceLayout<A> there;
  unsigned* arrivals;           // [groups], 0 when the kernel begins
  SinkhornSchedule* schedules;  // [batch], of the way by launches
  int32_t* is_done;             // [batch]
  char* groups;                 // [groups, there.needed]
};

// ---- arithmetic ----

// 2^x; below the smallest normal number 0.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

__device__ __forceinline__ float raise(float x, float y) { return powf(x, y); }
__device__ __forceinline__ double raise(double x, double y) { return pow(x, y); }

// p - c + q + low. Potentials and costs are some thousand epsilon at times, and their difference some epsilon: what
// float loses in the first step is added back (Knuth's sum without error); the second loses but digits of its result.
// Minus infinity stays it.
template <typename A>
__device__ __forceinline__ A difference(A p, A c, A q, A low) {
  const A first = p - c, sum = first + q;
  if constexpr (sizeof(A) == 8) return sum;
  const A minus_c = first - p, loss = (p - (first - minus_c)) - (c + minus_c);
  return sum > -static_cast<A>(INFINITY) ? sum + (loss + low) : sum;
}

// Keeps what is computed from x where it is: computed earlier and kept, it would take the registers of K.
__device__ __forceinline__ int kept_here(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
template <typename T>
__device__ __forceinline__ const T* kept_here(const T* x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

struct Larger {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// ---- one part of a problem ----

template <typename A, bool kHeld>
class Part {
  static constexpr int kRows = kRowsOf<kHeld>;
  static constexpr int kSpread = kWarpSize / kRows;  // lanes that look after the same row
  static constexpr A kNone = -static_cast<A>(INFINITY);

 public:
  using Next = SinkhornSchedule::Next;

  // The first problem of this block's.
  __device__ __forceinline__ Part(const Launched<A>& launched, unsigned problem, unsigned group, int part)
      : launched_(launched), args_(launched.args), plan_(launched.plan) {
    here() = {{}, problem, group, 0, part};
  }

  struct Verdict {
    A error;
    int32_t flags;
  };

  // All iterations.
  __device__ __forceinline__ void run() {
    set_schedule(SinkhornSchedule::first(args_, problem()));
    publish_column_potentials();
    barrier();
    bool must_form = true;
    A error = static_cast<A>(INFINITY);
    int32_t iterations = 0;
    while (args_.max_iterations > 0) {
      const Scalings scalings = iterate(must_form, error);
      const Next next = here().schedule.next(args_, ++iterations, static_cast<double>(error));
      must_form = scalings != Scalings::good || next != Next::iteration;
      if (scalings != Scalings::none && must_form) {
        absorb();
        barrier();
      }
      if (next == Next::end) break;
      if (next == Next::stage) {
        const SinkhornSchedule stage = here().schedule.after(args_, problem(), iterations);
        __syncthreads();
        set_schedule(stage);
      }
    }
    if (part() == 0 && threadIdx.x == 0) {
      args_.error[problem()] = static_cast<double>(error);
      args_.iterations[problem()] = iterations;
    }
  }

  __device__ __forceinline__ void run_all() {
#pragma unroll 1
    while (true) {
      run();
      if (kHeld || problem() + plan_.groups >= args_.batch) return;
      barrier();  // before the next problem takes the memory
      const unsigned next = static_cast<unsigned>(problem()) + plan_.groups;
      __syncthreads();
      here().problem = next;
    }
  }

  // ---- the steps of an iteration ----

  __device__ __forceinline__ void set_schedule(const SinkhornSchedule& schedule) const { here().schedule = schedule; }

  __device__ __forceinline__ void publish_column_potentials() {
    for (int j = first_column() + thread(); j < end_column(); j += threads()) {
      column_potentials()[j] = Split<A>(column_potential(j));
    }
  }

  // Sums of the part's rows over K, their potentials or scalings, and what the rows add to the columns' sums.
  template <bool kForms>
  __device__ __forceinline__ void rows() {
    A error = 0;
    int32_t flags = 0;
    const int rounds = kHeld ? 1 : plan_.rounds;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int first = (round * plan_.teams + team_number()) * kRows;  // of the team's rows in the part
      const A u = kForms ? form_rows(first, error, flags) : scale_rows(first, error, flags);
      add_to_columns<kForms>(first, u, round == 0);
    }
    const Verdict of_warp = reduce(error, flags);
    if (lane() == 0) slots()[warp()] = {of_warp.error, of_warp.flags, 0};
    __syncthreads();
  }

  // Hands the part's sums, error and flags to the others.
  __device__ __forceinline__ void publish_sums() {
    if (plan_.has_shared_sums) {
      A* const own = all_sums() + at_line(part(), 0);
      for (int j = thread(); j < m(); j += threads()) own[j] = sum_of_teams(j);
    }
    if (warp() == 0) {
      const Verdict verdict = read_own_slots();
      if (lane() == 0) all_slots()[part()] = {verdict.error, verdict.flags, 0};
    }
  }

  // New potentials or scalings of the part's own columns.
  template <bool kForms>
  __device__ __forceinline__ void columns() {
    int32_t flags = 0;
    if (is_alone()) {
      for (int j = thread(); j < m(); j += threads()) column<kForms>(j, sum_of_teams(j), flags);
    } else {
      columns_of_parts<kForms>(flags);
    }
    flags = flags_of_warp(flags);
    if (lane() == 0) slots()[warp()].column_flags = flags;
  }

  // After columns(): the flags of this part's columns, to the others.
  __device__ __forceinline__ void publish_flags() {
    __syncthreads();
    if (warp() != 0) return;
    const int32_t flags = flags_of_warp(lane() < threads() >> 5 ? slots()[lane()].column_flags : 0);
    if (lane() == 0) all_slots()[part()].column_flags = flags;
  }

  // The same bits for every thread of the problem.
  __device__ __forceinline__ Verdict verdict() const { return is_alone() ? read_own_slots() : read_all_slots(); }

  // Log-sum-exp for the columns over the part's rows, of their potentials. A thread has rows `stripes` apart; it keeps
  // the largest exponent so far and the sum relative to it.
  __device__ __forceinline__ void log_sums_of_part() {
    const int stripe = plan_.stride <= threads() ? thread() / plan_.stride : 0;
    if (stripe >= plan_.stripes) return;
    const int64_t line = (part() * static_cast<int64_t>(plan_.stripes) + stripe) * plan_.stride;
    for (int j = plan_.stride <= threads() ? thread() % plan_.stride : thread(); j < m(); j += threads()) {
      A maximum = kNone, sum = 0;
#pragma unroll 1
      for (int i = stripe; i < rows_(); i += plan_.stripes) {
        const Split<A> row(row_potential(i));
        const A entry = cost()[(first_row() + i) * static_cast<int64_t>(m()) + j];
        const A x = row.high - entry;
        if (x > maximum) {
          sum *= power_of_two((maximum - x) * scale());
          maximum = x;
        }
        if (x > kNone) sum += power_of_two(difference(row.high, entry, -maximum, row.low) * scale());
      }
      all_maxima()[line + j] = maximum;
      all_sums()[line + j] = sum;
    }
  }

  __device__ __forceinline__ void columns_by_log_sums() {
    const int lines = plan_.parts * plan_.stripes;
    for (int j = first_column() + thread(); j < end_column(); j += threads()) {
      A maximum = kNone;
      for (int line = 0; line < lines; ++line) maximum = Larger{}(maximum, all_maxima()[at_line(line, j)]);
      double potential = -INFINITY;
      if (maximum > kNone) {
        double sum = 0;
        for (int line = 0; line < lines; ++line) {
          const A weight = power_of_two((all_maxima()[at_line(line, j)] - maximum) * scale());
          sum += static_cast<double>(weight) * static_cast<double>(all_sums()[at_line(line, j)]);
        }
        potential = potential_of(args_.column, column_index(j), static_cast<double>(maximum) / epsilon() + log(sum));
      }
      set_column_potential(j, potential);
    }
  }

 private:
  // Around the potentials as they were, what has come of an iteration: none, where the potentials themselves are new.
  enum class Scalings { none, good, wide };

  __device__ __forceinline__ Scalings iterate(bool must_form, A& error) {
    Verdict found{};
    if (!must_form) {
      found = half_iterations<false>();
      if (found.flags & kLost) {
        // The sums that were lost are found again on the cost, from the columns' potentials before.
        absorb_columns(scalings_before());
        barrier();
        must_form = true;
      }
    }
    if (must_form) found = half_iterations<true>();
    error = found.error;
    if (found.flags & kLost) {
      log_sums_of_part();
      barrier();
      columns_by_log_sums();
      barrier();
      return Scalings::none;
    }
    if (!plan_.is_resident) return Scalings::none;
    return found.flags & kWide ? Scalings::wide : Scalings::good;
  }

  template <bool kForms>
  __device__ __forceinline__ Verdict half_iterations() {
    turn_ ^= 1;
    rows<kForms>();
    if (!is_alone()) {
      publish_sums();
      barrier();
    }
    columns<kForms>();
    if (is_alone()) {
      __syncthreads();
      return verdict();
    }
    publish_flags();
    barrier();
    if (plan_.is_resident) {
      for (int j = thread(); j < m(); j += threads()) scalings_now()[j] = __ldcg(all_scalings() + j);
      __syncthreads();
    }
    return verdict();
  }

  // ---- rows ----

  // K of the team's rows, formed around their potentials and scaled to the new ones. Returns the scaling, in the lanes
  // that look after each row.
  __device__ __forceinline__ A form_rows(int first, A& error, int32_t& flags) {
    int own = first + row_of_lane();
    const bool exists = own < rows_();
    double base = exists ? row_potential(own) : -INFINITY;
    const bool is_wanted = exists && args_.row.targets[row_index(own)] > -INFINITY;
    A sum;
#pragma unroll 1
    for (bool is_again = false;; is_again = true) {
      sum = form(kept_here(first), base);
      const bool is_out = is_wanted && !(sum > kLeastSum<A> && sum < 1 / kLeastSum<A>);
      if (is_again || !any(is_out)) break;
      const A largest = largest_exponent(kept_here(first));
      if (is_out) base = largest > kNone ? -static_cast<double>(largest) : -INFINITY;
    }
    own = kept_here(own);
    base_ = base;
    double potential = -INFINITY;
    A u = 0;
    if (is_wanted && sum > 0) {
      const int64_t i = row_index(own);
      const double log_sum = log(static_cast<double>(sum)) - base / epsilon();
      potential = potential_of(args_.row, i, log_sum);
      u = static_cast<A>(exp((potential - base) / epsilon()));
      if (flags_of(u * sum, A(1)) != 0) flags |= kWide;  // scalings would lose it
      if (leads()) {
        const double before = args_.row.potentials[i];
        error += static_cast<A>(args_.row_error(i, epsilon(), before / epsilon() + log_sum, potential - before));
      }
    }
    if (exists && leads()) {
      const int64_t i = row_index(own);
      args_.row.potentials[i] = potential;
      if (plan_.is_resident) {
        const double kappa = args_.row.kappa(i, epsilon());
        row_states()[own] = {potential > -INFINITY ? A(1) : A(0), factor(args_.row, i, potential),
                             static_cast<A>(kappa), static_cast<A>(args_.row.weights[i])};
      }
    }
    return u;
  }

  // Returns the new scalings, in the lanes that look after each row.
  __device__ __forceinline__ A scale_rows(int first, A& error, int32_t& flags) {
    const int own = first + row_of_lane();
    const A* const v = scalings_before();
    A sums[kRows] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      load(first, chunk);
      const int column = column_of(chunk);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int j = column + k * team();
        const A scaling = j < plan_.stride ? v[j] : A(0);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += k_[r][k] * scaling;
      }
    }
    const A sum = reduce_rows(sums, Plus{});
    if (own >= rows_()) return 0;
    const RowState<A> state = row_states()[own];
    if (!(state.scaling > 0)) return 0;
    const A u = scaling_of(state.factor, state.kappa, sum);
    if (leads()) {
      const bool is_balanced = args_.row.rhos == nullptr && args_.column.rhos == nullptr;
      error += is_balanced ? absolute(state.weight - state.scaling * sum)
                           : state.weight * absolute(logarithm(u / state.scaling)) / state.kappa;
      row_states()[own].scaling = u;
    }
    flags |= flags_of(sum, u);
    return u;
  }

  // Forms K of the team's rows and the lane's columns, whose row's potential is `base`; the row's sum.
  __device__ __forceinline__ A form(int first, double base) {
    A sums[kRows] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      form(first, base, chunk);
      if (plan_.has_tile || (plan_.is_resident && !kHeld)) store(first, chunk);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) sums[r] += k_[r][k];
      }
    }
    return reduce_rows(sums, Plus{});
  }

  __device__ __forceinline__ void form(int first, double base, int chunk) {
    const int column = column_of(chunk);
    read_costs(first, column);
    A highs[kColumns], lows[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int j = column + k * team();
      const Split<A> potential = j < m() ? column_potentials()[j] : Split<A>(-INFINITY);
      highs[k] = potential.high;
      lows[k] = potential.low;
    }
    const Split<A> row(base);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const A high = __shfl_sync(kFullWarp, row.high, r * kSpread), low = __shfl_sync(kFullWarp, row.low, r * kSpread);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        k_[r][k] = power_of_two(difference(high, k_[r][k], highs[k], low + lows[k]) * scale());
      }
    }
  }

  // Into the place of K, where its entries are about to be; of the lane's columns from this one on.
  __device__ __forceinline__ void read_costs(int first, int column) {
    const A* costs = cost() + (first_row() + first) * static_cast<int64_t>(m()) + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        k_[r][k] = first + r < rows_() && column + k * team() < m() ? costs[k * team()] : -kNone;
      }
      costs = kept_here(costs + m());
    }
  }

  // max_j (G_j - C_ij)
  __device__ __forceinline__ A largest_exponent(int first) {
    A largest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) largest[r] = kNone;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      const int column = column_of(chunk);
      read_costs(first, column);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int j = column + k * team();
        const A potential = j < m() ? column_potentials()[j].high : kNone;
#pragma unroll
        for (int r = 0; r < kRows; ++r) largest[r] = Larger{}(largest[r], potential - k_[r][k]);
      }
    }
    return reduce_rows(largest, Larger{});
  }

  // u K, added to the columns' sums; where K has just been formed, that is K.
  template <bool kForms>
  __device__ __forceinline__ void add_to_columns(int first, A u, bool is_first) {
    A* const own = sums() + team_number() * plan_.stride;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      if (chunks() > 1) {
        if (plan_.is_resident || plan_.has_tile) {
          load(first, chunk);
        } else {
          form(first, base_, chunk);
        }
      }
      A totals[kColumns] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const A scaling = __shfl_sync(kFullWarp, u, r * kSpread);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const A entry = k_[r][k] * scaling;
          totals[k] += entry;
          if (kForms) k_[r][k] = entry;
        }
      }
      if (kForms && plan_.is_resident && !kHeld) store(first, chunk);
      const int column = column_of(chunk);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int j = column + k * team();
        if (j < plan_.stride) own[j] = is_first ? totals[k] : own[j] + totals[k];
      }
    }
  }

  // ---- columns ----

  // Sums of the part's own columns over all parts: eight neighbours are read together, which is what memory gives at
  // once, and the block's warps share out the parts.
  template <bool kForms>
  __device__ __forceinline__ void columns_of_parts(int32_t& flags) {
    constexpr int kTogether = 8, kParts = kWarpSize / kTogether;
    const int octets = (end_column() - first_column() + kTogether - 1) / kTogether, warps = threads() / kWarpSize;
    const int stripes = octets >= warps ? 1 : octets == 0 ? warps : warps / octets;
    const int side_by_side = warps / stripes, stripe = warp() / side_by_side;
    for (int begin = 0; begin < octets; begin += side_by_side) {
      const int j = first_column() + (begin + warp() % side_by_side) * kTogether + lane() % kTogether;
      A sum = 0;
      if (j < end_column() && stripe < stripes) {
#pragma unroll 4
        for (int part = stripe * kParts + lane() / kTogether; part < plan_.parts; part += stripes * kParts) {
          sum += __ldcg(all_sums() + at_line(part, j));
        }
      }
#pragma unroll
      for (int offset = kTogether; offset < kWarpSize; offset *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, offset);
      }
      if (lane() < kTogether) exchange()[warp() * kTogether + lane()] = sum;
      __syncthreads();
      if (thread() < side_by_side * kTogether) {
        const int own = first_column() + begin * kTogether + thread();
        A total = 0;
        for (int s = 0; s < stripes; ++s) total += exchange()[s * side_by_side * kTogether + thread()];
        if (own < end_column()) column<kForms>(own, total, flags);
      }
      __syncthreads();
    }
  }

  // The scaling of a column whose sum over u K is known, or its potential where K is not resident.
  template <bool kForms>
  __device__ __forceinline__ void column(int j, A sum, int32_t& flags) {
    A scaling = 0;
    if constexpr (kForms) {
      const int64_t index = column_index(j);
      const double before = column_potential(j);
      const bool is_wanted = before > -INFINITY && args_.target(args_.column, index, epsilon()) > -INFINITY;
      double potential = -INFINITY;
      if (is_wanted) {
        if (!(sum > kLeastSum<A> && sum < 1 / kLeastSum<A>)) flags |= kLost;
        potential = potential_of(args_.column, index, log(static_cast<double>(sum)) - before / epsilon());
        scaling = static_cast<A>(exp((potential - before) / epsilon()));
      }
      if (!plan_.is_resident || !is_wanted) set_column_potential(j, potential);
      if (!plan_.is_resident) return;
      if (is_wanted) flags |= flags_of(A(1), scaling);
      columns_()[j] = {factor(args_.column, index, before), static_cast<A>(args_.column.kappa(index, epsilon()))};
    } else if (scalings_before()[j] > 0) {
      scaling = scaling_of(columns_()[j].factor, columns_()[j].kappa, sum);
      flags |= flags_of(sum, scaling);
    }
    (is_alone() ? scalings_now() : all_scalings())[j] = scaling;
  }

  // ---- potentials and scalings ----

  __device__ __forceinline__ double potential_of(const SinkhornSide& side, int64_t index, double log_sum) const {
    return epsilon() * (args_.target(side, index, epsilon()) - side.kappa(index, epsilon()) * log_sum);
  }

  // Of the sums over a K that is formed around this potential.
  __device__ __forceinline__ A factor(const SinkhornSide& side, int64_t index, double potential) const {
    if (!(potential > -INFINITY)) return 0;
    const double kappa = side.kappa(index, epsilon());
    return static_cast<A>(exp(args_.target(side, index, epsilon()) + (kappa - 1) * potential / epsilon()));
  }

  __device__ __forceinline__ static A scaling_of(A factor, A kappa, A sum) {
    return kappa == 1 ? factor * reciprocal(sum) : factor * raise(sum, -kappa);
  }

  // Half of the range, in either direction, is left to the next iteration.
  __device__ __forceinline__ static int32_t flags_of(A sum, A scaling) {
    constexpr A kWide_ = kWidest<A>, kRoot = sizeof(A) == 4 ? A(3e7) : A(1e50);
    const bool is_sound = sum > 1 / kWide_ && scaling > 1 / kWide_ && scaling < kWide_;
    return (is_sound ? 0 : kLost) | (scaling > kRoot || scaling < 1 / kRoot ? kWide : 0);
  }

  __device__ __forceinline__ void absorb() {
    for (int i = thread(); i < rows_(); i += threads()) {
      const A scaling = row_states()[i].scaling;
      if (scaling > 0) {
        args_.row.potentials[row_index(i)] += epsilon() * log(static_cast<double>(scaling));
      }
    }
    absorb_columns(scalings_now());
  }

  __device__ __forceinline__ void absorb_columns(const A* scalings) {
    for (int j = first_column() + thread(); j < end_column(); j += threads()) {
      const A scaling = scalings[j];
      if (scaling > 0) {
        set_column_potential(j, column_potential(j) + epsilon() * log(static_cast<double>(scaling)));
      }
    }
  }

  __device__ __forceinline__ int64_t row_index(int i) const { return problem() * args_.rows + first_row() + i; }
  __device__ __forceinline__ double row_potential(int i) const { return args_.row.potentials[row_index(i)]; }
  __device__ __forceinline__ int64_t column_index(int j) const { return problem() * args_.columns + j; }
  __device__ __forceinline__ double column_potential(int j) const { return args_.column.potentials[column_index(j)]; }
  __device__ __forceinline__ void set_column_potential(int j, double potential) {
    args_.column.potentials[column_index(j)] = potential;
    column_potentials()[j] = Split<A>(potential);
  }

  // ---- K in shared memory ----

  // Of row `first` and the lane's first column of the chunk.
  __device__ __forceinline__ A* entries(int first, int column) const {
    return kernel() + (plan_.is_resident ? first : team_number() * kRows) * plan_.stride + column;
  }

  __device__ __forceinline__ void load(int first, int chunk) {
    if constexpr (!kHeld) {
      const int column = column_of(chunk);
      const A* row = entries(first, column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          k_[r][k] = first < rows_() && column + k * team() < plan_.stride ? row[k * team()] : A(0);
        }
        row += plan_.stride;
      }
    }
  }

  __device__ __forceinline__ void store(int first, int chunk) const {
    const int column = column_of(chunk);
    A* row = entries(first, column);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (first < rows_() && column + k * team() < plan_.stride) row[k * team()] = k_[r][k];
      }
      row += plan_.stride;
    }
  }

  // ---- sums over threads ----

  // Over the team; of row r in the kSpread lanes from r kSpread on. Each step halves the rows that a lane looks after.
  template <typename Combine>
  __device__ __forceinline__ A reduce_rows(A (&values)[kRows], Combine combine) {
#pragma unroll
    for (int offset = kWarpSize / 2, count = kRows; offset > 0; offset /= 2, count /= 2) {
      if (count > 1) {
        const bool is_upper = lane() & offset;
#pragma unroll
        for (int r = 0; r < kRows / 2; ++r) {
          if (r >= count / 2) break;
          const A kept = is_upper ? values[r + count / 2] : values[r],
                  given = is_upper ? values[r] : values[r + count / 2];
          values[r] = combine(kept, __shfl_xor_sync(kFullWarp, given, offset));
        }
      } else {
        values[0] = combine(values[0], __shfl_xor_sync(kFullWarp, values[0], offset));
      }
    }
    if (kHeld || team() == kWarpSize) return values[0];
    A* const there = exchange() + exchange_turn_ * (kMostWarps * kRows);
    exchange_turn_ ^= 1;  // while others still read the sums before
    if (lane() % kSpread == 0) there[warp() * kRows + row_of_lane()] = values[0];
    __syncthreads();
    const int warps = team() / kWarpSize, first = warp() & -warps;
    A value = there[first * kRows + row_of_lane()];
    for (int w = 1; w < warps; ++w) value = combine(value, there[(first + w) * kRows + row_of_lane()]);
    return value;
  }

  __device__ __forceinline__ A sum_of_teams(int j) const {
    const A* const of_teams = sums() + j;
    A sum = of_teams[0];
    for (int t = 1; t < plan_.teams; ++t) sum += of_teams[t * plan_.stride];
    return sum;
  }

  // Over the slots of this block's warps.
  __device__ __forceinline__ Verdict read_own_slots() const {
    const Slot<A> slot = lane() < (threads() >> 5) ? slots()[lane()] : Slot<A>{};
    return reduce(slot.error, slot.row_flags | slot.column_flags);
  }

  __device__ __forceinline__ Verdict read_all_slots() const {
    A error = 0;
    int32_t flags = 0;
    for (int i = lane(); i < plan_.parts; i += kWarpSize) {
      const Slot<A> slot = all_slots()[i];
      error += slot.error;
      flags |= slot.row_flags | slot.column_flags;
    }
    return reduce(error, flags);
  }

  // Over the warp.
  __device__ __forceinline__ static Verdict reduce(A error, int32_t flags) {
    return {group_sum<kWarpSize>(error), flags_of_warp(flags)};
  }
  __device__ __forceinline__ static int32_t flags_of_warp(int32_t flags) {
    return (__any_sync(kFullWarp, flags & kLost) ? kLost : 0) | (__any_sync(kFullWarp, flags & kWide) ? kWide : 0);
  }

  // Where teams are warps, of the warp, else of the block.
  __device__ __forceinline__ bool any(bool predicate) const {
    return kHeld || team() == kWarpSize ? __any_sync(kFullWarp, predicate) : __syncthreads_or(predicate);
  }

  __device__ __forceinline__ void barrier() {
    if (is_alone()) {
      __syncthreads();
    } else {
      group_barrier(launched_.arrivals + group(), plan_.parts, here().expected);
    }
  }

  // ---- who is who ----

  __device__ __forceinline__ static int thread() { return kept_here(static_cast<int>(threadIdx.x)); }
  __device__ __forceinline__ static int threads() { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ static int lane() { return thread() & (kWarpSize - 1); }
  __device__ __forceinline__ static int warp() { return thread() >> 5; }
  __device__ __forceinline__ static int row_of_lane() { return lane() / kSpread; }
  __device__ __forceinline__ int log2_team() const { return kHeld ? 5 : plan_.log2_team; }
  __device__ __forceinline__ int team() const { return 1 << log2_team(); }
  __device__ __forceinline__ int team_number() const { return thread() >> log2_team(); }
  __device__ __forceinline__ int team_rank() const { return thread() & (team() - 1); }
  __device__ __forceinline__ int chunks() const { return kHeld ? 1 : plan_.chunks; }
  // Of the lanes that look after a row, in all warps of the team, one.
  __device__ __forceinline__ bool leads() const { return team_rank() < kWarpSize && lane() % kSpread == 0; }
  __device__ __forceinline__ bool is_alone() const { return kHeld || plan_.way == SinkhornWay::block; }
  // The lane's first column of a chunk; the others are a team apart.
  __device__ __forceinline__ int column_of(int chunk) const { return team_rank() + chunk * kColumns * team(); }
  __device__ __forceinline__ int64_t at_line(int line, int j) const {
    return line * static_cast<int64_t>(plan_.stride) + j;
  }
  __device__ __forceinline__ int first_of(int64_t count, int part) const {
    return static_cast<int>(count * part / plan_.parts);
  }
  __device__ __forceinline__ Here& here() const { return *shared<Here>(launched_.shared.here); }
  __device__ __forceinline__ double epsilon() const { return here().schedule.epsilon; }
  // Of exponents, for powers of two.
  __device__ __forceinline__ A scale() const { return static_cast<A>(1.4426950408889634 / epsilon()); }
  // With K in registers a block has one problem, and all of it.
  __device__ __forceinline__ int64_t problem() const { return kHeld ? blockIdx.x : here().problem; }
  __device__ __forceinline__ int64_t group() const { return kHeld ? blockIdx.x : here().group; }
  __device__ __forceinline__ int part() const { return kHeld ? 0 : here().part; }
  __device__ __forceinline__ int m() const { return static_cast<int>(args_.columns); }
  __device__ __forceinline__ int first_row() const { return kHeld ? 0 : part() * plan_.rows_each; }
  __device__ __forceinline__ int rows_() const {
    return kHeld ? static_cast<int>(args_.rows) : of_share(static_cast<int>(args_.rows), plan_.rows_each);
  }
  __device__ __forceinline__ int first_column() const { return kHeld ? 0 : part() * plan_.columns_each; }
  __device__ __forceinline__ int end_column() const {
    return kHeld ? m() : first_column() + of_share(m(), plan_.columns_each);
  }
  // How many of `count` things are this part's, if each has `share` and the last ones what is left.
  __device__ __forceinline__ int of_share(int count, int share) const {
    return min(max(count - part() * share, 0), share);
  }
  __device__ __forceinline__ const A* cost() const {
    return static_cast<const A*>(args_.cost) + problem() * args_.rows * args_.columns;
  }

  // ---- memory: of the block, then of the group ----

  template <typename T>
  __device__ __forceinline__ static T* shared(int offset) {
    return reinterpret_cast<T*>(dynamic_shared<char>() + offset);
  }
  __device__ __forceinline__ Slot<A>* slots() const {
    return shared<Slot<A>>(launched_.shared.slots) + turn_ * kMostWarps;
  }
  __device__ __forceinline__ A* exchange() const { return shared<A>(launched_.shared.exchange); }
  // That an iteration finds, and those that it starts from.
  __device__ __forceinline__ A* scalings_now() const {
    return shared<A>(launched_.shared.scalings) + turn_ * plan_.stride;
  }
  __device__ __forceinline__ A* scalings_before() const {
    return shared<A>(launched_.shared.scalings) + (turn_ ^ 1) * plan_.stride;
  }
  __device__ __forceinline__ ColumnState<A>* columns_() const {
    return shared<ColumnState<A>>(launched_.shared.columns);
  }
  __device__ __forceinline__ RowState<A>* row_states() const { return shared<RowState<A>>(launched_.shared.rows); }
  __device__ __forceinline__ A* kernel() const { return shared<A>(launched_.shared.kernel); }
  __device__ __forceinline__ A* sums() const {
    if (kHeld || plan_.has_shared_sums) return shared<A>(launched_.shared.sums);
    return all_sums() + at_line(part(), 0);
  }

  template <typename T>
  __device__ __forceinline__ T* there(int64_t offset) const {
    return reinterpret_cast<T*>(launched_.groups + group() * launched_.there.needed + offset);
  }
  __device__ __forceinline__ Split<A>* column_potentials() const { return there<Split<A>>(launched_.there.columns); }
  __device__ __forceinline__ A* all_scalings() const { return there<A>(launched_.there.scalings); }
  __device__ __forceinline__ Slot<A>* all_slots() const {
    return there<Slot<A>>(launched_.there.slots) + turn_ * plan_.parts;
  }
  __device__ __forceinline__ A* all_sums() const { return there<A>(launched_.there.sums); }
  __device__ __forceinline__ A* all_maxima() const { return there<A>(launched_.there.maxima); }

  const Launched<A>& launched_;
  const SinkhornArgs& args_;
  const Plan& plan_;

  double base_ = 0;                   // potential around which the lane's row was formed
  int turn_ = 0, exchange_turn_ = 0;  // of what is there twice
  A k_[kRows][kColumns];
};

// ---- kernels ----

template <typename A, bool kHeld>
__global__ void __launch_bounds__(kMostThreads<A>, 1) solve(const __grid_constant__ Launched<A> launched) {
  const unsigned parts = launched.plan.parts, group = blockIdx.x / parts;
  Part<A, kHeld>(launched, group, group, static_cast<int>(blockIdx.x % parts)).run_all();
}

// Way by launches: a grid of parts for each problem, and each step for all of them.
enum class Step { begin, rows, columns, log_sums, columns_by_log_sums, advance };

template <typename A, Step kStep>
__global__ void __launch_bounds__(kMostThreads<A>, 1) step(const __grid_constant__ Launched<A> launched) {
  const unsigned parts = kStep == Step::advance ? 1 : launched.plan.parts, problem = blockIdx.x / parts;
  SinkhornSchedule& schedule = launched.schedules[problem];
  Part<A, false> part(launched, problem, problem, static_cast<int>(blockIdx.x % parts));
  if constexpr (kStep == Step::begin) {
    part.publish_column_potentials();
    if (blockIdx.x % parts != 0 || threadIdx.x != 0) return;
    schedule = SinkhornSchedule::first(launched.args, problem);
    launched.is_done[problem] = launched.args.max_iterations <= 0;
    launched.args.error[problem] = INFINITY;
    launched.args.iterations[problem] = 0;
    return;
  }
  if (launched.is_done[problem] != 0) return;
  part.set_schedule(schedule);
  if constexpr (kStep == Step::rows) {
    part.template rows<true>();
    part.publish_sums();
  } else if constexpr (kStep == Step::columns) {
    part.template columns<true>();
    part.publish_flags();
  } else {
    const auto verdict = part.verdict();
    if constexpr (kStep == Step::advance) {
      if (threadIdx.x != 0) return;
      const double error = static_cast<double>(verdict.error);
      const int32_t iterations = static_cast<int32_t>(++launched.args.iterations[problem]);
      const SinkhornSchedule::Next next = schedule.next(launched.args, iterations, error);
      if (next == SinkhornSchedule::Next::stage) schedule = schedule.after(launched.args, problem, iterations);
      launched.is_done[problem] = next == SinkhornSchedule::Next::end;
      launched.args.error[problem] = error;
    } else if (verdict.flags & kLost) {
      if constexpr (kStep == Step::log_sums) part.log_sums_of_part();
      if constexpr (kStep == Step::columns_by_log_sums) part.columns_by_log_sums();
    }
  }
}

// ---- launches ----

// What the two barriers of an iteration take, as entries that a block could stream meanwhile: about 4 us.
constexpr int64_t kBarrierEntries = 1 << 16;
// What an iteration's launches take.
constexpr int64_t kLaunchEntries = 4 * kBarrierEntries;

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <typename A>
void (*solver_of(const Plan& plan))(Launched<A>) {
  return plan.is_held ? solve<A, true> : solve<A, false>;
}

template <typename A>
class Planner {
 public:
  explicit Planner(const SinkhornArgs& args)
      : args_(args),
        processors_(multiprocessor_count()),
        shared_(std::min<int64_t>(args.limits.shared_bytes, max_dynamic_shared())) {
    if (args.max_iterations > INT32_MAX) {
      throw std::invalid_argument("pyreg::sinkhorn: CUDA kernels make fewer than 2^31 iterations, got max_iter = " +
                                  std::to_string(args.max_iterations));
    }
    if (args.rows > kMost || args.columns > kMost || args.batch > kMost) {
      throw std::invalid_argument("pyreg::sinkhorn: CUDA kernels take at most 2^30 problems, rows and columns, got " +
                                  std::to_string(args.batch) + ", " + std::to_string(args.rows) + " and " +
                                  std::to_string(args.columns));
    }
  }

  Plan plan() const {
    const Plan block = block_plan(), grid = grid_plan();
    switch (args_.limits.way) {
      case SinkhornWay::block:
        return block;
      case SinkhornWay::grid:
        if (!is_possible(grid)) throw std::runtime_error("pyreg::sinkhorn: no cooperative launch of this size here");
        return grid;
      case SinkhornWay::launches:
        return launches_plan();
      case SinkhornWay::fastest:
        break;
    }
    const int64_t entries = args_.rows * args_.columns, by_block = divide_up(args_.batch, processors_) * entries;
    if (block.is_resident || by_block <= kBarrierEntries) return block;
    const int64_t by_grid = divide_up(args_.batch, grid.groups) * (kBarrierEntries + entries / grid.parts);
    if (by_grid < by_block && is_possible(grid)) return grid;
    const int64_t by_launches = kLaunchEntries + divide_up(args_.batch * entries, processors_);
    return by_launches < by_block && !is_possible(grid) ? launches_plan() : block;
  }

 private:
  static constexpr int64_t kMost = int64_t{1} << 30;

  Plan block_plan() const {
    Plan plan{};
    plan.way = SinkhornWay::block;
    plan.parts = 1;
    plan.groups = static_cast<int>(args_.batch);
    if (args_.limits.may_hold_in_registers && args_.columns <= kColumns * kWarpSize &&
        args_.rows <= kMostThreads<A> / kWarpSize * kRowsOf<true>) {
      plan.is_held = true;
      set_shape<true>(plan);
      plan.is_resident = plan.has_shared_sums = true;
      if (fits(plan)) return plan;
      plan.is_held = false;
    }
    set_shape<false>(plan);
    if (!make_resident(plan)) make_streaming(plan);
    return plan;
  }

  // K resident where the whole device has room for a problem's.
  Plan grid_plan() const {
    Plan plan{};
    plan.way = SinkhornWay::grid;
    const int most = static_cast<int>(std::min<int64_t>(processors_, divide_up(args_.rows, kRowsOf<false>)));
    for (plan.parts = 1; plan.parts <= most; ++plan.parts) {
      set_shape<false>(plan);
      if (make_resident(plan)) break;
    }
    const int least = plan.is_resident ? plan.parts : 1;
    plan.groups = static_cast<int>(std::min<int64_t>(args_.batch, processors_ / least));
    plan.parts = std::min(processors_ / plan.groups, most);
    plan.parts = static_cast<int>(divide_up(args_.rows, divide_up(args_.rows, plan.parts)));  // none without a row
    set_shape<false>(plan);
    if (!plan.is_resident || !make_resident(plan)) make_streaming(plan);
    return plan;
  }

  Plan launches_plan() const {
    Plan plan{};
    plan.way = SinkhornWay::launches;
    plan.groups = static_cast<int>(args_.batch);
    const int64_t wanted = std::max<int64_t>(4 * processors_ / args_.batch, 1);
    plan.parts = static_cast<int>(std::min<int64_t>(wanted, divide_up(args_.rows, kRowsOf<false>)));
    set_shape<false>(plan);
    make_streaming(plan);
    return plan;
  }

  template <bool kHeld>
  void set_shape(Plan& plan) const {
    constexpr int kRows = kRowsOf<kHeld>;
    plan.rows_each = static_cast<int>(divide_up(args_.rows, plan.parts));
    plan.columns_each = static_cast<int>(divide_up(args_.columns, plan.parts));
    plan.part_rows = static_cast<int>(divide_up(plan.rows_each, kRows) * kRows);
    plan.stride = static_cast<int>(divide_up(args_.columns, kWarpSize) * kWarpSize);
    plan.log2_team = 5;
    while ((1 << plan.log2_team) < kMostThreads<A> && kColumns << plan.log2_team < args_.columns) ++plan.log2_team;
    plan.chunks = static_cast<int>(divide_up(plan.stride, kColumns << plan.log2_team));
    set_teams(plan, std::min(kMostThreads<A> >> plan.log2_team, plan.part_rows / kRows), kRows);
  }

  static void set_teams(Plan& plan, int teams, int rows) {
    plan.teams = teams;
    plan.threads = teams << plan.log2_team;
    plan.rounds = static_cast<int>(divide_up(plan.part_rows, rows * teams));
    plan.stripes = std::max(plan.threads / plan.stride, 1);
  }

  bool make_resident(Plan& plan) const {
    plan.is_resident = plan.has_shared_sums = true;
    plan.has_tile = false;
    plan.is_resident = fits(plan);
    return plan.is_resident;
  }

  void make_streaming(Plan& plan) const {
    plan.is_resident = false;
    plan.has_shared_sums = true;
    plan.has_tile = plan.chunks > 1;
    if (fits(plan)) return;
    plan.has_tile = false;
    if (fits(plan)) return;
    plan.has_shared_sums = false;
    set_teams(plan, 1, kRowsOf<false>);
  }

  bool fits(const Plan& plan) const { return SharedLayout<A>(plan).needed <= shared_; }

  static bool is_possible(const Plan& plan) {
    if (device_attribute<cudaDevAttrCooperativeLaunch>() == 0) return false;
    const size_t shared = static_cast<size_t>(SharedLayout<A>(plan).needed);
    allow_dynamic_shared(solver_of<A>(plan), shared);
    return plan.groups * plan.parts <= max_cooperative_grid(solver_of<A>(plan), plan.threads, shared);
  }

  const SinkhornArgs& args_;
  const int processors_;
  const int64_t shared_;
};

// Where things are in the workspace, from its beginning: the arrivals at 0.
template <typename A>
struct Workspace {
  int64_t schedules, is_done, groups, bytes;

  explicit Workspace(const SinkhornArgs& args, const Plan& plan) {
    const int64_t stepped = plan.way == SinkhornWay::launches ? args.batch : 0;
    schedules = aligned(plan.groups * static_cast<int64_t>(sizeof(unsigned)));
    is_done = schedules + aligned(stepped * static_cast<int64_t>(sizeof(SinkhornSchedule)));
    groups = is_done + aligned(stepped * static_cast<int64_t>(sizeof(int32_t)));
    bytes = groups + plan.groups * WorkspaceLayout<A>(plan).needed;
  }
};

template <typename A, Step kStep>
void launch_step(const Launched<A>& launched, int parts) {
  const size_t shared = static_cast<size_t>(launched.shared.needed);
  allow_dynamic_shared(step<A, kStep>, shared);
  const dim3 grid(static_cast<unsigned>(launched.args.batch * parts));
  PYREG_LAUNCH((step<A, kStep>), grid, launched.plan.threads, shared, launched.args.stream, launched);
}

template <typename A>
void launch(const SinkhornArgs& args) {
  const Plan plan = Planner<A>(args).plan();
  const Workspace<A> at(args, plan);
  char* const workspace = static_cast<char*>(args.workspace);
  const Launched<A> launched{args,
                             plan,
                             SharedLayout<A>(plan),
                             WorkspaceLayout<A>(plan),
                             reinterpret_cast<unsigned*>(workspace),
                             reinterpret_cast<SinkhornSchedule*>(workspace + at.schedules),
                             reinterpret_cast<int32_t*>(workspace + at.is_done),
                             workspace + at.groups};
  if (plan.way == SinkhornWay::launches) {
    launch_step<A, Step::begin>(launched, plan.parts);
    for (int64_t iteration = 0; iteration < args.max_iterations; ++iteration) {
      launch_step<A, Step::rows>(launched, plan.parts);
      launch_step<A, Step::columns>(launched, plan.parts);
      launch_step<A, Step::log_sums>(launched, plan.parts);
      launch_step<A, Step::columns_by_log_sums>(launched, plan.parts);
      launch_step<A, Step::advance>(launched, 1);
    }
    return;
  }
  const auto solver = solver_of<A>(plan);
  const size_t shared = static_cast<size_t>(launched.shared.needed);
  allow_dynamic_shared(solver, shared);
  const dim3 grid(static_cast<unsigned>(plan.groups * plan.parts));
  if (plan.way == SinkhornWay::block) {
    PYREG_LAUNCH(solver, grid, plan.threads, shared, args.stream, launched);
    return;
  }
  check_cuda(cudaMemsetAsync(workspace, 0, plan.groups * sizeof(unsigned), static_cast<cudaStream_t>(args.stream)),
             "cudaMemsetAsync");
  PYREG_LAUNCH_COOPERATIVE(solver, grid, plan.threads, shared, args.stream, launched);
}

}  // namespace

namespace cuda {

int64_t sinkhorn_workspace(const SinkhornArgs& args) {
  if (args.batch == 0) return 0;
  const auto bytes = [&](auto tag) {
    using A = typename decltype(tag)::type;
    return Workspace<A>(args, Planner<A>(args).plan()).bytes;
  };
  return args.dtype == Dtype::float64 ? bytes(TypeTag<double>{}) : bytes(TypeTag<float>{});
}

void sinkhorn(const SinkhornArgs& args) {
  if (args.batch == 0) return;
  if (args.dtype == Dtype::float64) return launch<double>(args);
  launch<float>(args);
}

}  // namespace cuda

}  // namespace pyreg

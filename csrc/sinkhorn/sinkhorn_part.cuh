// A block's part of a problem: its rows of K, all their columns, and the steps of an iteration on them.
//
// Teams of a block's threads take kRows rows at a time. A thread of a team holds kColumns columns of them, one team's
// width apart, in registers between their two uses: s is reduced over the team, t over the teams of a block and then,
// in memory, over its parts, in fixed orders. Errors and flags go the same way, so that all blocks of a problem come to
// the same decisions; the host is never waited for.
//
// Of resident K, scalings are absorbed where they have become wide, and at each stage of epsilon: then it is formed
// anew. A row formed anew is scaled to its new potential at once, so that K is P and u is 1; a row whose sum is out of
// range is formed again around its largest entry. Columns whose sum is out of range get their potential by log-sum-exp,
// in a pass of its own.
#pragma once

#include "sinkhorn/sinkhorn_plan.cuh"

namespace pyreg::sinkhorn_cuda {

// As on the CPU: scalings and sums of K beyond it ask for absorption.
template <typename A>
constexpr A kWidest = sizeof(A) == 4 ? A(1e15) : A(1e100);
// Of K just formed: a million entries that were too small for a number are 1e-7 of it.
template <typename A>
constexpr A kLeastSum = sizeof(A) == 4 ? A(1e-25) : A(1e-200);

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
        absorb_column_scalings();
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
        row_sums()[own] = 0;
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
        const A scaling = j < m() ? v[j] : A(0);
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
      row_sums()[own] = sum;
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

  // From the sums that made the scalings, as on the CPU: A loses less of them.
  __device__ __forceinline__ void absorb() {
    for (int i = thread(); i < rows_(); i += threads()) {
      const A sum = row_sums()[i];
      if (sum > 0) args_.row.potentials[row_index(i)] = absorbed(args_.row, row_index(i), static_cast<double>(sum));
    }
    for (int j = first_column() + thread(); j < end_column(); j += threads()) {
      if (scalings_now()[j] > 0) set_column_potential(j, absorbed(args_.column, column_index(j), sum_of_rows(j)));
    }
  }

  __device__ __forceinline__ double absorbed(const SinkhornSide& side, int64_t index, double sum) const {
    return potential_of(side, index, log(sum) - side.potentials[index] / epsilon());
  }

  // Of the last iteration's rows, all parts'.
  __device__ __forceinline__ double sum_of_rows(int j) const {
    if (is_alone()) return static_cast<double>(sum_of_teams(j));
    double sum = 0;
    for (int part = 0; part < plan_.parts; ++part) sum += static_cast<double>(__ldcg(all_sums() + at_line(part, j)));
    return sum;
  }

  __device__ __forceinline__ void absorb_column_scalings() {
    for (int j = first_column() + thread(); j < end_column(); j += threads()) {
      const A scaling = scalings_before()[j];
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
  __device__ __forceinline__ A* row_sums() const { return shared<A>(launched_.shared.row_sums); }
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

}  // namespace pyreg::sinkhorn_cuda

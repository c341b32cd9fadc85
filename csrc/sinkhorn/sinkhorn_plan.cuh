// How Sinkhorn's CUDA kernels share out a device, and what lies where in its memory.
//
// Ways: `block`, one block a problem through all its iterations; `grid`, a cooperative launch whose blocks share out
// problems in groups; `launches`, each step a launch of its own, for devices without cooperative launches.
//
// K is resident where a part's rows fit: in registers (small problems), else in shared memory, of all blocks of a group
// together. Where it does not fit, it is formed from the cost in every iteration.
#pragma once

#include <algorithm>

#include "core/cuda.cuh"
#include "core/math.h"
#include "sinkhorn/sinkhorn.h"

namespace pyreg::sinkhorn_cuda {

// All registers of a multiprocessor: 128 a thread for floats, 255 for doubles.
template <typename A>
constexpr int kMostThreads = sizeof(A) == 4 ? 512 : 256;
constexpr int kMostWarps = 16;
// What a thread holds of K at once: rows, of which those of a team take as many at a time, and columns.
template <bool kHeld>
constexpr int kRowsOf = kHeld ? 16 : 8;
constexpr int kColumns = 4;

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
struct alignas(16) RowState {
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
  int row_sums;    // [part_rows] that made u, 0 where the potentials themselves are new
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
    row_sums = take(plan.is_resident, plan.part_rows * static_cast<int64_t>(sizeof(A)));
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

// What the two barriers of an iteration take, as entries that a block could stream meanwhile: about 4 us.
constexpr int64_t kBarrierEntries = 1 << 16;
// What an iteration's launches take.
constexpr int64_t kLaunchEntries = 4 * kBarrierEntries;

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <typename A>
class Planner {
 public:
  // `solver`: the kernel that shares K between blocks
  Planner(const SinkhornArgs& args, void (*solver)(Launched<A>))
      : args_(args),
        solver_(solver),
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

  bool is_possible(const Plan& plan) const {
    if (device_attribute<cudaDevAttrCooperativeLaunch>() == 0) return false;
    const size_t shared = static_cast<size_t>(SharedLayout<A>(plan).needed);
    allow_dynamic_shared(solver_, shared);
    return plan.groups * plan.parts <= max_cooperative_grid(solver_, plan.threads, shared);
  }

  const SinkhornArgs& args_;
  void (*const solver_)(Launched<A>);
  const int processors_;
  const int64_t shared_;
};

}  // namespace pyreg::sinkhorn_cuda

// CUDA kernels of Sinkhorn's iteration on a dense cost. Method and notation: sinkhorn.h.
//
// The rows of a problem are shared by `parts` blocks (sinkhorn_plan.cuh); each holds its rows of K, all their columns
// (sinkhorn_part.cuh). An iteration is
//
//   rows      s = K v of the part's rows, u, and what the rows add to t = K^T u        one read of K
//   columns   t over all parts, v; every part has its own columns                      two barriers of the parts
//
// Sums are in the dtype of the cost, potentials in double. Per entry and iteration of resident K: two multiply-adds,
// and from shared memory one read. Of a problem of 128 x 128 floats in registers, 256 threads: 64 entries and 128
// multiply-adds a thread, and twice as many instructions again for the sums over lanes, u and v. Without resident K:
// one read of the cost, one exponential and some fifteen operations, which take less time than the read.
#include "sinkhorn/sinkhorn_part.cuh"

namespace pyreg {

namespace {

using namespace sinkhorn_cuda;

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

template <typename A>
void (*solver_of(const Plan& plan))(Launched<A>) {
  return plan.is_held ? solve<A, true> : solve<A, false>;
}

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
  const Plan plan = Planner<A>(args, solve<A, false>).plan();
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
    return Workspace<A>(args, Planner<A>(args, solve<A, false>).plan()).bytes;
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

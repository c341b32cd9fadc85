// CUDA kernels of StableMax. Formulas and notation: stablemax.h, with R = sum_{k != p} s_k and Q = sum_j q_j:
//
//   loss = -sum_j q_j log p_j,   dL/dx_j = (Q / S) s'_j - q_j h_j  (j != p),   dL/dx_p = h_p (Q p_p - q_p)
//
// Accumulation: float for float, bfloat16 and float16 (a thread adds 16-byte packs, at most a few hundred; then a tree
// over its team), double for double. Losses of rows and their weights add up in double, in an order that depends on
// the shape alone: no atomics, the same bits on every run.
//
// Tile: a row and its team of threads, see core/rows.cuh. The second touch of a row comes from shared memory or L2.
//
// Bytes of device memory an element, b being the size of a logit: forward b; backward 2 b; both at once 2 b; stablemax
// and its logarithm forward b + the output's; their backward 2 b + the gradient's; probability targets add b to each of
// forward and backward. Flops: about 6 and one reciprocal an element and touch; logarithms only where a result has
// them.
//
// A label outside [0, classes) is never used as an address. Its row's loss and gradient are NaN (checking it on the
// host would wait for the device); it adds nothing to the weight by which a mean divides.
#include "core/rows.cuh"
#include "stablemax/stablemax.h"

namespace pyreg::cuda {

namespace {

// ---- sums of a row without its pivot ----

// Some row of the warp overflows: then all of it sums again times kRescale. Each warp of a block sees the same rows,
// or the block one row: the answer is the same for all threads that share a barrier.
__device__ __forceinline__ bool any_row(bool overflows) { return __any_sync(kFullWarp, overflows); }

// R for the pivot `excluded`, whose logit is given.
template <typename Storage, typename A = Accumulate<Storage>>
__device__ __forceinline__ RowSum<A> sum_rest(const RowView<Storage>& row, const Team& team, int excluded, A logit) {
  RowSum<A> result{};
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool rescale = attempt == 1;
    const A scale = rescale ? A(kRescale) : A(1);
    A rest = 0;
    row.template read<Touch::first>([&](int j, auto& x, auto&) {
      replace(x, excluded - j, -static_cast<A>(INFINITY));
      A part = 0;
#pragma unroll
      for (A v : x) part += stable_value(v) * scale;
      rest += part;
    });
    rest = team.sum(rest);
    if (!rescale) result.rest = rest;
    const bool overflows = is_infinite(result.rest + stable_value(logit));
    if (rescale) return overflows ? RowSum<A>{rest, true} : result;
    if (!any_row(overflows)) return result;
  }
  return result;
}

// The largest logit seen and the sum of s over all others seen.
template <typename A>
struct Leader {
  MaxIndex<A> best;
  A rest;
};

template <typename A>
struct JoinLeaders {
  A scale;
  __device__ __forceinline__ Leader<A> operator()(const Leader<A>& a, const Leader<A>& b) const {
    const MaxIndex<A> best = better_of(a.best, b.best);
    const A loser = best.index == a.best.index ? b.best.value : a.best.value;
    return {best, (a.rest + b.rest) + stable_value(loser) * scale};
  }
};

template <typename A>
struct Pivot {
  int index;  // of the largest logit, the first of equals
  A logit;
  RowSum<A> sum;
};

// Pivot and R in one walk.
template <typename Storage, typename A = Accumulate<Storage>>
__device__ __forceinline__ Pivot<A> sum_rest_of_largest(const RowView<Storage>& row, const Team& team) {
  Pivot<A> pivot{};
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool rescale = attempt == 1;
    const A scale = rescale ? A(kRescale) : A(1);
    Leader<A> leader{MaxIndex<A>::none(), 0};
    row.template read<Touch::first>([&](int j, auto& x, auto&) {
      constexpr int kCount = sizeof(x) / sizeof(A);
      A part = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A value = x[i];
        // Packs come in ascending order, so equals keep the first; single elements may come out of order.
        const bool wins =
            !(value <= leader.best.value) || (kCount == 1 && value == leader.best.value && j < leader.best.index);
        part += stable_value(wins ? leader.best.value : value) * scale;
        if (wins) leader.best = {value, j + i};
      }
      leader.rest += part;
    });
    leader = team.reduce(leader, JoinLeaders<A>{scale});
    if (!rescale) {
      // Where all logits are -inf every class gives the same NaN, and perhaps none has won.
      pivot.index = is_infinite(leader.best.value) && leader.best.value < 0 ? 0 : static_cast<int>(leader.best.index);
      pivot.logit = leader.best.value;
      pivot.sum = {leader.rest, false};
    }
    const bool overflows = is_infinite(pivot.sum.rest + stable_value(pivot.logit));
    if (rescale) {
      if (overflows) pivot.sum = {leader.rest, true};
      return pivot;
    }
    if (!any_row(overflows)) return pivot;
  }
  return pivot;
}

// ---- cross-entropy ----

// A kernel's arguments. q_j = w_j (keep t_j + spread), t being the target before smoothing.
template <typename A>
struct Call : CrossEntropyArgs {
  A keep;    // 1 - label_smoothing
  A spread;  // label_smoothing / classes

  explicit Call(const CrossEntropyArgs& args)
      : CrossEntropyArgs(args),
        keep(static_cast<A>(1 - args.label_smoothing)),
        spread(static_cast<A>(args.label_smoothing / static_cast<double>(args.layout.classes))) {}
  __device__ __forceinline__ A weight_of(int j) const { return weight ? static_cast<const A*>(weight)[j] : A(1); }
};

template <typename A>
struct Saved {
  A* fields;
  int64_t rows;

  __device__ Saved(const CrossEntropyArgs& args, int64_t row_count)
      : fields(static_cast<A*>(args.saved)), rows(row_count) {}
  __device__ A& operator()(SavedRows::Field field, int64_t row) const { return fields[field * rows + row]; }
  __device__ A& total_weight(const CrossEntropyArgs& args) const {
    return fields[(args.labels ? kSavedFieldsForLabels : kSavedFieldsForProbabilities) * rows];
  }
  __device__ void store(int64_t row, const RowResult<A>& result) const {
    (*this)(SavedRows::loss, row) = result.loss;
    (*this)(SavedRows::sum_gradient, row) = result.sum_gradient;
    (*this)(SavedRows::pivot_gradient, row) = result.pivot_gradient;
  }
};

__device__ __forceinline__ void store_loss(const CrossEntropyArgs& args, int64_t i, double value) {
  switch (args.loss_dtype) {
    case Dtype::float64:
      static_cast<double*>(args.loss)[i] = value;
      break;
    case Dtype::float32:
      static_cast<float*>(args.loss)[i] = static_cast<float>(value);
      break;
    case Dtype::bfloat16:
      static_cast<bfloat16*>(args.loss)[i] = narrow<bfloat16>(static_cast<float>(value));
      break;
    case Dtype::float16:
      static_cast<float16*>(args.loss)[i] = narrow<float16>(static_cast<float>(value));
      break;
  }
}

// The upstream gradient of one row, the mean's division included.
template <typename A>
__device__ __forceinline__ A upstream_gradient(const CrossEntropyArgs& args, const Saved<A>& saved, int64_t row) {
  const int64_t i = args.reduction == Reduction::none ? row : 0;
  A value = 0;
  switch (args.loss_dtype) {
    case Dtype::float64:
      value = static_cast<A>(static_cast<const double*>(args.grad_loss)[i]);
      break;
    case Dtype::float32:
      value = static_cast<const float*>(args.grad_loss)[i];
      break;
    case Dtype::bfloat16:
      value = widen(static_cast<const bfloat16*>(args.grad_loss)[i]);
      break;
    case Dtype::float16:
      value = widen(static_cast<const float16*>(args.grad_loss)[i]);
      break;
  }
  return args.reduction == Reduction::mean ? value / saved.total_weight(args) : value;
}

// A row's label, and what becomes of the row.
struct RowLabel {
  int label;     // only where counted
  bool counted;  // neither ignored, nor no class, nor beyond the last row
  bool invalid;  // neither a class nor ignore_index

  __device__ RowLabel(const CrossEntropyArgs& args, int64_t row, int64_t rows) {
    const int64_t value = row < rows ? args.labels[row] : args.ignore_index;
    const bool ignored = value == args.ignore_index;
    counted = !ignored && value >= 0 && value < args.layout.classes;
    invalid = !ignored && !counted;
    label = counted ? static_cast<int>(value) : 0;
  }
};

template <bool kSmoothing, typename Storage, typename A = Accumulate<Storage>>
__device__ __forceinline__ RowResult<A> label_row_forward(const RowView<Storage>& row, const Team& team, int label,
                                                          const Call<A>& args) {
  const bool counted = row.n > 0;
  const A logit = counted ? row[label] : A(0);
  const RowSum<A> sum = sum_rest(row, team, label, logit);
  const RowNormalizer<A> normalizer = normalize_row(sum.rest, logit, sum.rescaled);
  const A label_weight = counted ? args.weight_of(label) : A(0);
  const A target = args.keep * label_weight;
  RowResult<A> result;
  result.loss = target * normalizer.negative_log;
  A rest_mass = 0, pivot_mass = target;
  if constexpr (kSmoothing) {
    Sums<A, 2> sums{};  // of weights, of weights times log s
    row.template read<Touch::again>([&](int j, auto& x, auto&) {
      constexpr int kCount = sizeof(x) / sizeof(A);
      Sums<A, 2> part{};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A weight = args.weight_of(j + i);
        part[0] += weight;
        part[1] += weight * log_stable_value(x[i]);
      }
      sums = sums + part;
    });
    sums = team.sum(sums);
    const A log_sum = log_row_sum(sum.rest, logit, sum.rescaled);
    result.loss += args.spread * (sums[0] * log_sum - sums[1]);
    rest_mass = args.spread * (sums[0] - label_weight);
    pivot_mass += args.spread * label_weight;
  }
  result.sum_gradient = (rest_mass + pivot_mass) * normalizer.inverse_sum;
  result.pivot_gradient = pivot_difference(normalizer, rest_mass, pivot_mass);
  return result;
}

// out_j = scale ((Q/S) s'_j - q_j h_j). `probabilities` is the row's target, or None for a label.
template <Touch kTouch, bool kSmoothing, typename Storage, typename Probability, typename A = Accumulate<Storage>>
__device__ __forceinline__ void write_gradient(const RowView<Storage>& row, const Probability* probabilities, int pivot,
                                               A sum_gradient, A pivot_gradient, A scale, const Call<A>& args,
                                               Storage* out) {
  constexpr bool kLabels = kIsNone<Probability>;
  const A factor = scale * sum_gradient;
  row.template walk<kTouch>(probabilities, out, [&](int j, auto& x, auto& t) {
    constexpr int kCount = sizeof(x) / sizeof(A);
    const int at = pivot - j;
    A at_pivot = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto terms = stable_terms(x[i]);
      A gradient = stable_derivative(x[i], terms, factor);
      if (!kLabels || (kSmoothing && args.spread > 0)) {
        A q = args.spread;
        if constexpr (!kLabels) q += args.keep * t[i];
        gradient -= scale * (q * args.weight_of(j + i)) * terms.slope;
      }
      if (i == at) at_pivot = scale * (terms.slope * pivot_gradient);
      x[i] = gradient;
    }
    replace(x, at, at_pivot);
  });
}

template <typename Storage, bool kSmoothing>
constexpr int kLabelThreads = kSmoothing ? kTwoStreamThreads : kOneStreamThreads<Storage>;

// Forward, and where grad_logits is given the gradient for an upstream gradient of 1; it may be the logits themselves.
template <typename Storage, bool kSmoothing>
__global__ void __launch_bounds__((kLabelThreads<Storage, kSmoothing>), 1)
    labels_forward(const Call<Accumulate<Storage>> args, const Tiling tiling) {
  using A = Accumulate<Storage>;
  const Saved<A> saved(args, tiling.rows);
  for_each_row(tiling, [&](int64_t index, const Team& team) {
    const bool exists = index < tiling.rows;
    const RowLabel target(args, index, tiling.rows);
    const RowView<Storage> row(args.logits, args.layout, index, args.logits_stride, target.counted, team);
    RowResult<A> result = label_row_forward<kSmoothing>(row, team, target.label, args);
    if (!target.counted) {
      const A value = target.invalid ? static_cast<A>(NAN) : A(0);
      result = {value, value, value};
    }
    if (exists && team.rank == 0) {
      saved.store(index, result);
      if (args.reduction == Reduction::none) store_loss(args, index, result.loss);
    }
    if (args.grad_logits == nullptr) return;
    team.barrier();  // every thread has read the label's logit
    Storage* out = static_cast<Storage*>(args.grad_logits) +
                   (exists ? row_offset(tiling, args.layout, index, args.layout.classes) : 0);
    if (target.counted) {
      const A scale = args.reduction == Reduction::mean ? A(1) / saved.total_weight(args) : A(1);
      write_gradient<Touch::again, kSmoothing>(row, static_cast<const None*>(nullptr), target.label,
                                               result.sum_gradient, result.pivot_gradient, scale, args, out);
    } else if (exists) {
      fill_row(out, args.layout, result.loss, team);
    }
  });
}

// An integer kept in the bits of a saved element, whatever its type.
template <typename Storage>
__global__ void __launch_bounds__(kTwoStreamThreads, 1)
    probabilities_forward(const Call<Accumulate<Storage>> args, const Tiling tiling) {
  using A = Accumulate<Storage>;
  const Saved<A> saved(args, tiling.rows);
  for_each_row(tiling, [&](int64_t index, const Team& team) {
    const bool exists = index < tiling.rows;
    const RowView<Storage> row(args.logits, args.layout, index, args.logits_stride, exists, team);
    const Storage* t = static_cast<const Storage*>(args.probabilities) +
                       (exists ? row_offset(tiling, args.layout, index, args.layout.classes) : 0);
    const Pivot<A> pivot = sum_rest_of_largest(row, team);
    const RowNormalizer<A> normalizer = normalize_row(pivot.sum.rest, pivot.logit, pivot.sum.rescaled);
    const A log_sum = log_row_sum(pivot.sum.rest, pivot.logit, pivot.sum.rescaled);
    Sums<A, 2> rest{};  // without the pivot: of q, of -q log p
    row.template walk<Touch::again>(t, static_cast<None*>(nullptr), [&](int j, auto& x, auto& mass) {
      constexpr int kCount = sizeof(x) / sizeof(A);
      Sums<A, 2> part{};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A q = (args.keep * mass[i] + args.spread) * args.weight_of(j + i);
        const A log_p = log_probability(x[i], stable_terms(x[i]), normalizer, log_sum);
        if (j + i != pivot.index) {
          part[0] += q;
          part[1] -= q * log_p;
        }
      }
      rest = rest + part;
    });
    rest = team.sum(rest);
    if (!exists || team.rank != 0) return;
    const A pivot_mass =
        row.n > 0 ? (args.keep * widen(t[pivot.index * args.layout.inner]) + args.spread) * args.weight_of(pivot.index)
                  : A(0);
    const A loss = row.n > 0 ? rest[1] + pivot_mass * normalizer.negative_log : A(0);
    saved.store(index, {loss, (rest[0] + pivot_mass) * normalizer.inverse_sum,
                        pivot_difference(normalizer, rest[0], pivot_mass)});
    saved(SavedRows::pivot, index) = bits_of_index<A>(pivot.index);
    if (args.reduction == Reduction::none) store_loss(args, index, loss);
  });
}

template <typename Storage, typename Probability>
constexpr int kBackwardThreads = kIsNone<Probability> ? kOneStreamThreads<Storage> : kTwoStreamThreads;

// Probability is None for class indices.
template <typename Storage, typename Probability>
__global__ void __launch_bounds__((kBackwardThreads<Storage, Probability>), 1)
    cross_entropy_backward(const Call<Accumulate<Storage>> args, const Tiling tiling) {
  using A = Accumulate<Storage>;
  constexpr bool kLabels = kIsNone<Probability>;
  const Saved<A> saved(args, tiling.rows);
  for_each_row(tiling, [&](int64_t index, const Team& team) {
    if (index >= tiling.rows) return;
    const int64_t offset = row_offset(tiling, args.layout, index, args.layout.classes);
    Storage* out = static_cast<Storage*>(args.grad_logits) + offset;
    const Probability* probabilities = nullptr;
    int pivot;
    if constexpr (kLabels) {
      const RowLabel target(args, index, tiling.rows);
      if (!target.counted) {
        return fill_row(out, args.layout, target.invalid ? static_cast<A>(NAN) : A(0), team);
      }
      pivot = target.label;
    } else {
      pivot = static_cast<int>(index_of_bits(saved(SavedRows::pivot, index)));
      probabilities = static_cast<const Probability*>(args.probabilities) + offset;
    }
    const RowView<Storage> row(args.logits, args.layout, index, args.logits_stride, true, team);
    write_gradient<Touch::first, true>(row, probabilities, pivot, saved(SavedRows::sum_gradient, index),
                                       saved(SavedRows::pivot_gradient, index), upstream_gradient(args, saved, index),
                                       args, out);
  });
}

// ---- the sum of rows' losses and weights ----
//
// One block reads 12 bytes a row. Beyond kRowsPerChunk rows it would be slower than the rows themselves (262,144 rows
// of 12 classes: 3 MB against 12 MB read by the whole device, computed), so that many blocks first sum a chunk each and
// leave its two sums where its first two rows' losses were.

constexpr int kReduceThreads = 1024;
constexpr int64_t kRowsPerChunk = 8192;
constexpr int64_t kMaxChunks = 128;

using RowTotals = Sums<double, 2>;  // loss, weight

template <typename A>
__device__ __forceinline__ RowTotals sum_rows(const CrossEntropyArgs& args, const Saved<A>& saved, int64_t begin,
                                              int64_t end, bool with_losses) {
  const A* weight = static_cast<const A*>(args.weight);
  RowTotals totals{};
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    if (with_losses) totals[0] += saved(SavedRows::loss, row);
    if (args.labels == nullptr) {
      totals[1] += 1;
    } else if (const RowLabel target(args, row, saved.rows); target.counted) {
      totals[1] += weight ? static_cast<double>(weight[target.label]) : 1.0;
    }
  }
  return totals;
}

template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    sum_chunk(const CrossEntropyArgs args, int64_t chunk_rows, bool with_losses) {
  const Saved<A> saved(args, args.layout.outer * args.layout.inner);
  const int64_t begin = blockIdx.x * chunk_rows;
  const int64_t end = blockIdx.x + 1 == gridDim.x ? saved.rows : begin + chunk_rows;
  const RowTotals totals = block_sum<kReduceThreads>(sum_rows(args, saved, begin, end, with_losses));
  if (threadIdx.x == 0) {  // block_sum's barriers: all of the chunk has been read
    saved(SavedRows::loss, begin) = static_cast<A>(totals[0]);
    saved(SavedRows::loss, begin + 1) = static_cast<A>(totals[1]);
  }
}

// Writes the total weight, and where `with_losses` the reduced loss.
template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    finish_sum(const CrossEntropyArgs args, int64_t chunks, int64_t chunk_rows, bool with_losses) {
  const Saved<A> saved(args, args.layout.outer * args.layout.inner);
  RowTotals totals{};
  if (chunks == 0) {
    totals = sum_rows(args, saved, 0, saved.rows, with_losses);
  } else {
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
      totals[0] += saved(SavedRows::loss, chunk * chunk_rows);
      totals[1] += saved(SavedRows::loss, chunk * chunk_rows + 1);
    }
  }
  totals = block_sum<kReduceThreads>(totals);
  if (threadIdx.x != 0) return;
  saved.total_weight(args) = static_cast<A>(totals[1]);
  if (with_losses) store_loss(args, 0, args.reduction == Reduction::mean ? totals[0] / totals[1] : totals[0]);
}

template <typename A>
void launch_sum(const CrossEntropyArgs& args, bool with_losses) {
  const int64_t rows = args.layout.rows();
  const int64_t chunks = rows < 2 * kRowsPerChunk ? 0 : std::min(rows / kRowsPerChunk, kMaxChunks);
  const int64_t chunk_rows = chunks == 0 ? 0 : rows / chunks;  // the last chunk takes what is left over too
  if (chunks > 0) {
    PYREG_LAUNCH(sum_chunk<A>, dim3(static_cast<unsigned>(chunks)), dim3(kReduceThreads), 0, args.stream, args,
                 chunk_rows, with_losses);
  }
  PYREG_LAUNCH(finish_sum<A>, dim3(1), dim3(kReduceThreads), 0, args.stream, args, chunks, chunk_rows, with_losses);
}

// ---- stablemax and its logarithm ----

// The rows of one call: input, grad_output and output have the same shape, all contiguous.
template <typename In, typename Body>
__device__ __forceinline__ void for_each_input_row(const StablemaxArgs& args, const Tiling& tiling, Body&& body) {
  for_each_row(tiling, [&](int64_t index, const Team& team) {
    const bool exists = index < tiling.rows;
    const RowView<In> row(args.input, args.layout, index, args.layout.classes, exists, team);
    body(row, team, exists ? row_offset(tiling, args.layout, index, args.layout.classes) : 0);
  });
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kOneStreamThreads<In>, 1)
    stablemax_rows(const StablemaxArgs args, const Tiling tiling) {
  using A = Accumulate<In>;
  for_each_input_row<In>(args, tiling, [&](const RowView<In>& row, const Team& team, int64_t offset) {
    const A logit = row.n > 0 ? row[0] : A(0);
    const RowSum<A> sum = sum_rest(row, team, 0, logit);
    const RowNormalizer<A> normalizer = normalize_row(sum.rest, logit, sum.rescaled);
    row.template write<Touch::again>(static_cast<Out*>(args.output) + offset, [&](int, auto& x, auto&) {
#pragma unroll
      for (A& v : x) v = probability(v, stable_terms(v), normalizer);
    });
  });
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kOneStreamThreads<In>, 1)
    log_stablemax_rows(const StablemaxArgs args, const Tiling tiling) {
  using A = Accumulate<In>;
  for_each_input_row<In>(args, tiling, [&](const RowView<In>& row, const Team& team, int64_t offset) {
    const Pivot<A> pivot = sum_rest_of_largest(row, team);
    const RowNormalizer<A> normalizer = normalize_row(pivot.sum.rest, pivot.logit, pivot.sum.rescaled);
    const A log_sum = log_row_sum(pivot.sum.rest, pivot.logit, pivot.sum.rescaled);
    row.template write<Touch::again>(static_cast<Out*>(args.output) + offset, [&](int j, auto& x, auto&) {
#pragma unroll
      for (A& v : x) v = log_probability(v, stable_terms(v), normalizer, log_sum);
      replace(x, pivot.index - j, -normalizer.negative_log);
    });
  });
}

// dx_j = s'_j / S (g_j - sum_k g_k p_k)
template <typename In, typename Grad>
__global__ void __launch_bounds__(kTwoStreamThreads, 1)
    stablemax_rows_backward(const StablemaxArgs args, const Tiling tiling) {
  using A = Accumulate<In>;
  for_each_input_row<In>(args, tiling, [&](const RowView<In>& row, const Team& team, int64_t offset) {
    const Grad* g = static_cast<const Grad*>(args.grad_output) + offset;
    const Pivot<A> pivot = sum_rest_of_largest(row, team);
    const RowNormalizer<A> normalizer = normalize_row(pivot.sum.rest, pivot.logit, pivot.sum.rescaled);
    const A pivot_grad = row.n > 0 ? widen(g[pivot.index * args.layout.inner]) : A(0);
    A rest = 0;
    row.template walk<Touch::again>(g, static_cast<None*>(nullptr), [&](int j, auto& x, auto& grad) {
      constexpr int kCount = sizeof(x) / sizeof(A);
      replace(x, pivot.index - j, -static_cast<A>(INFINITY));
      replace(grad, pivot.index - j, pivot_grad);
      A part = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        part += (grad[i] - pivot_grad) * probability(x[i], stable_terms(x[i]), normalizer);
      rest += part;
    });
    rest = team.sum(rest);
    row.template walk<Touch::again>(g, static_cast<In*>(args.output) + offset, [&](int, auto& x, auto& grad) {
      constexpr int kCount = sizeof(x) / sizeof(A);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] = stable_derivative(x[i], stable_terms(x[i]), normalizer.inverse_sum) * ((grad[i] - pivot_grad) - rest);
      }
    });
  });
}

// dx_j = h_j (g_j - G p_j), G = sum_k g_k
template <typename In, typename Grad>
__global__ void __launch_bounds__(kTwoStreamThreads, 1)
    log_stablemax_rows_backward(const StablemaxArgs args, const Tiling tiling) {
  using A = Accumulate<In>;
  for_each_input_row<In>(args, tiling, [&](const RowView<In>& row, const Team& team, int64_t offset) {
    const Grad* g = static_cast<const Grad*>(args.grad_output) + offset;
    const Pivot<A> pivot = sum_rest_of_largest(row, team);
    const RowNormalizer<A> normalizer = normalize_row(pivot.sum.rest, pivot.logit, pivot.sum.rescaled);
    A rest_grad = 0;
    row.template walk<Touch::again>(g, static_cast<None*>(nullptr), [&](int j, auto&, auto& grad) {
      replace(grad, pivot.index - j, A(0));
      A part = 0;
#pragma unroll
      for (A v : grad) part += v;
      rest_grad += part;
    });
    rest_grad = team.sum(rest_grad);
    const A pivot_grad = row.n > 0 ? widen(g[pivot.index * args.layout.inner]) : A(0);
    const A factor = (rest_grad + pivot_grad) * normalizer.inverse_sum;
    const A at_pivot = stable_terms(pivot.logit).slope * -pivot_difference(normalizer, rest_grad, pivot_grad);
    row.template walk<Touch::again>(g, static_cast<In*>(args.output) + offset, [&](int j, auto& x, auto& grad) {
      constexpr int kCount = sizeof(x) / sizeof(A);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto terms = stable_terms(x[i]);
        x[i] = grad[i] * terms.slope - stable_derivative(x[i], terms, factor);
      }
      replace(x, pivot.index - j, at_pivot);
    });
  });
}

template <typename Storage>
void launch_labels(const char* name, const Call<Accumulate<Storage>>& args) {
  const bool keep_row = args.grad_logits != nullptr;
  if (args.spread > 0) {
    launch_rows(name, &labels_forward<Storage, true>, args, sizeof(Storage), kLabelThreads<Storage, true>, true);
  } else {
    launch_rows(name, &labels_forward<Storage, false>, args, sizeof(Storage), kLabelThreads<Storage, false>, keep_row);
  }
}

}  // namespace

void stablemax_cross_entropy_forward(const CrossEntropyArgs& args) {
  constexpr const char* kName = "stablemax_cross_entropy_forward";
  dispatch_dtype(args.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    Call<Accumulate<Storage>> call(args);
    call.grad_logits = nullptr;
    if (args.labels) {
      launch_labels<Storage>(kName, call);
    } else {
      launch_rows(kName, &probabilities_forward<Storage>, call, sizeof(Storage), kTwoStreamThreads, true);
    }
    launch_sum<Accumulate<Storage>>(args, args.reduction != Reduction::none);
  });
}

void stablemax_cross_entropy_backward(const CrossEntropyArgs& args) {
  constexpr const char* kName = "stablemax_cross_entropy_backward";
  dispatch_dtype(args.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    const Call<Accumulate<Storage>> call(args);
    if (args.labels) {
      launch_rows(kName, &cross_entropy_backward<Storage, None>, call, sizeof(Storage), kBackwardThreads<Storage, None>,
                  false);
    } else {
      launch_rows(kName, &cross_entropy_backward<Storage, Storage>, call, sizeof(Storage),
                  kBackwardThreads<Storage, Storage>, false);
    }
  });
}

void stablemax_cross_entropy_with_gradient(const CrossEntropyArgs& args) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    using A = Accumulate<Storage>;
    launch_sum<A>(args, false);  // the total weight, by which a mean's gradients are divided
    launch_labels<Storage>("stablemax_cross_entropy_with_gradient", Call<A>(args));
    if (args.reduction != Reduction::none) launch_sum<A>(args, true);
  });
}

#define PYREG_STABLEMAX_KERNEL(name, kernel, max_threads)                                              \
  void name(const StablemaxArgs& args) {                                                               \
    dispatch_in_out(args.dtype, args.output_dtype, [&](auto in, auto out) {                            \
      using In = typename decltype(in)::type;                                                          \
      using Out = typename decltype(out)::type;                                                        \
      launch_rows(#name, &kernel<In, Out>, args, static_cast<int64_t>(sizeof(In)), max_threads, true); \
    });                                                                                                \
  }

PYREG_STABLEMAX_KERNEL(stablemax_forward, stablemax_rows, kOneStreamThreads<In>)
PYREG_STABLEMAX_KERNEL(log_stablemax_forward, log_stablemax_rows, kOneStreamThreads<In>)
PYREG_STABLEMAX_KERNEL(stablemax_backward, stablemax_rows_backward, kTwoStreamThreads)
PYREG_STABLEMAX_KERNEL(log_stablemax_backward, log_stablemax_rows_backward, kTwoStreamThreads)

}  // namespace pyreg::cuda

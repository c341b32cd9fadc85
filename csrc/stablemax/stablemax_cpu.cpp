// CPU kernels of StableMax. Formulas and notation: stablemax.h.
//
// Accumulation: float for float, bfloat16 and float16 (partial sums of 4096 elements by SIMD lanes, then double),
// double for double. A row is the unit of work: its second pass finds it in cache (32,000 floats are 128 KB). Bytes
// moved: forward, one read of the logits; backward, one read and one write into fresh memory; in place, one read and
// one write of the same lines.
#include "stablemax/row_passes.h"
#include "stablemax/side_by_side.h"
#include "stablemax/stablemax.h"

namespace pyreg::PYREG_ISA {

namespace {

template <typename A>
A sum_weights(const A* weight, int64_t classes) {
  if (weight == nullptr) return static_cast<A>(classes);
  double total = 0;
  for (int64_t j = 0; j < classes; ++j) total += weight[j];
  return static_cast<A>(total);
}

template <typename A>
struct Saved {
  A* fields;
  int64_t rows;
  A& operator()(SavedRows::Field field, int64_t row) const { return fields[field * rows + row]; }
  void store(int64_t row, const RowResult<A>& result) const {
    (*this)(SavedRows::loss, row) = result.loss;
    (*this)(SavedRows::sum_gradient, row) = result.sum_gradient;
    (*this)(SavedRows::pivot_gradient, row) = result.pivot_gradient;
  }
  RowResult<A> load(int64_t row) const {
    return {(*this)(SavedRows::loss, row), (*this)(SavedRows::sum_gradient, row),
            (*this)(SavedRows::pivot_gradient, row)};
  }
};

// What every row of one call shares.
template <typename A>
struct Options {
  const A* weight;  // [classes] or null
  A weight_sum;     // sum of class weights, or their number
  A keep;           // 1 - label_smoothing
  A spread;         // label_smoothing / classes
  A weight_of(int64_t label) const { return weight ? weight[label] : A(1); }
};

template <typename A>
Options<A> options_of(const CrossEntropyArgs& args) {
  const A* weight = static_cast<const A*>(args.weight);
  return {weight, sum_weights(weight, args.layout.classes), static_cast<A>(1 - args.label_smoothing),
          static_cast<A>(args.label_smoothing / static_cast<double>(args.layout.classes))};
}

// ---- class-index targets ----

// A row's result from the sum of its rest and, under label smoothing, sum_j w_j log s_j over all classes.
template <typename A>
PYREG_HOST_DEVICE RowResult<A> label_result(const RowSum<A>& sum, A logit, A log_stable, int64_t label,
                                            const Options<A>& options) {
  const RowNormalizer<A> row = normalize_row(sum.rest, logit, sum.rescaled);
  const A target = options.keep * options.weight_of(label);
  RowResult<A> result;
  result.loss = target * row.negative_log;
  A rest_mass = 0, pivot_mass = target;
  if (options.spread > 0) {
    const A log_sum = log_row_sum(sum.rest, logit, sum.rescaled);
    result.loss += options.spread * (options.weight_sum * log_sum - log_stable);
    rest_mass = options.spread * (options.weight_sum - options.weight_of(label));
    pivot_mass += options.spread * options.weight_of(label);
  }
  result.sum_gradient = (rest_mass + pivot_mass) * row.inverse_sum;
  result.pivot_gradient = pivot_difference(row, rest_mass, pivot_mass);
  return result;
}

template <typename Storage, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE RowResult<A> label_row_forward(const Storage* x, int64_t n, int64_t label,
                                                 const Options<A>& options) {
  const RowSum<A> sum = sum_rest(x, n, label);
  A log_stable = 0;
  if (options.spread > 0) {
    const A* weight = options.weight;
    log_stable = sum_row(x, n, -1, [=](int64_t j, Vector<A> v) {
      const Vector<A> term = weight ? load_or_zero(weight, j, n) * log_stable_value(v) : log_stable_value(v);
      return j + kLanes<A> <= n ? term : without_tail<A>(term, static_cast<int>(n - j));
    });
  }
  return label_result(sum, ::pyreg::widen(x[label]), log_stable, label, options);
}

// grad_j = scale ((Q/S) s'_j - q_j h_j)
template <typename Storage, typename Out, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE void label_row_backward(const Storage* x, int64_t n, int64_t label, A sum_gradient, A pivot_gradient,
                                          A scale, const Options<A>& options, Out* out) {
  const A logit = ::pyreg::widen(x[label]);  // read before an in-place result overwrites it
  const Vector<A> factor = broadcast(scale * sum_gradient);
  if (options.spread > 0) {
    const A spread = scale * options.spread;
    const A* weight = options.weight;
    map_row(x, n, out, [=](int64_t j, Vector<A> v) {
      const auto terms = stable_terms(v);
      const Vector<A> q = weight ? spread * load_or_zero(weight, j, n) : broadcast(spread);
      return stable_derivative(v, terms, factor) - q * terms.slope;
    });
  } else {
    map_row(x, n, out, [=](int64_t, Vector<A> v) { return stable_derivative(v, stable_terms(v), factor); });
  }
  out[label] = ::pyreg::narrow<Out>(scale * (stable_terms(logit).slope * pivot_gradient));
}

template <typename Out>
void fill_zero(Out* out, int64_t n) {
  memset(static_cast<void*>(out), 0, sizeof(Out) * n);
}

// Sums rows' losses and weights in row order, so that the result does not depend on the number of threads.
template <typename A>
void reduce_losses(const CrossEntropyArgs& args, const Saved<A>& saved, double total_weight) {
  constexpr int kPartials = 16;  // independent additions; one alone would wait 4 cycles for the one before
  double partial[kPartials] = {};
  const A* losses = &saved(SavedRows::loss, 0);
  int64_t row = 0;
  for (; row + kPartials <= saved.rows; row += kPartials) {
    for (int k = 0; k < kPartials; ++k) partial[k] += losses[row + k];
  }
  for (int k = 0; row < saved.rows; ++row, ++k) partial[k] += losses[row];
  double total = 0;
  for (double part : partial) total += part;
  if (args.reduction == Reduction::mean) total /= total_weight;
  dispatch_dtype(args.loss_dtype, [&](auto tag) {
    using Loss = typename decltype(tag)::type;
    *static_cast<Loss*>(args.loss) = ::pyreg::narrow<Loss>(static_cast<Accumulate<Loss>>(total));
  });
}

template <typename A>
void store_row_losses(const CrossEntropyArgs& args, const Saved<A>& saved) {
  dispatch_dtype(args.loss_dtype, [&](auto tag) {
    using Loss = typename decltype(tag)::type;
    for (int64_t row = 0; row < saved.rows; ++row) {
      static_cast<Loss*>(args.loss)[row] =
          ::pyreg::narrow<Loss>(static_cast<Accumulate<Loss>>(saved(SavedRows::loss, row)));
    }
  });
}

template <typename A>
void finish_losses(const CrossEntropyArgs& args, const Saved<A>& saved, int64_t fields, double total_weight) {
  saved.fields[fields * saved.rows] = static_cast<A>(total_weight);
  if (args.reduction == Reduction::none) {
    store_row_losses(args, saved);
  } else {
    reduce_losses(args, saved, total_weight);
  }
}

bool is_class(int64_t label, const CrossEntropyArgs& args) {
  return label >= 0 && label < args.layout.classes && label != args.ignore_index;
}

// The weights of all rows that count; reports a label that is no class.
template <typename A>
double total_label_weight(const CrossEntropyArgs& args, const A* weight) {
  const int64_t rows = args.layout.rows();
  int64_t valid = 0, ignored = 0;
  for (int64_t row = 0; row < rows; ++row) {
    valid += is_class(args.labels[row], args);
    ignored += args.labels[row] == args.ignore_index;
  }
  if (valid + ignored != rows) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t label = args.labels[row];
      if (label != args.ignore_index && !is_class(label, args)) *args.invalid_label = label;
    }
    return 0;
  }
  if (weight == nullptr) return static_cast<double>(valid);
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (is_class(args.labels[row], args)) total += weight[args.labels[row]];
  }
  return total;
}

// The upstream gradient of one row, the mean's division included.
template <typename A>
struct UpstreamGradient {
  const CrossEntropyArgs& args;
  A shared;

  UpstreamGradient(const CrossEntropyArgs& call, A total_weight) : args(call), shared(1) {
    if (args.reduction == Reduction::none) return;
    shared = element(0);
    if (args.reduction == Reduction::mean) shared /= total_weight;
  }
  A operator()(int64_t row) const { return args.reduction == Reduction::none ? element(row) : shared; }

  A element(int64_t row) const {
    A value = 0;
    dispatch_dtype(args.loss_dtype, [&](auto tag) {
      using Loss = typename decltype(tag)::type;
      value = static_cast<A>(::pyreg::widen(static_cast<const Loss*>(args.grad_loss)[row]));
    });
    return value;
  }
};

// Without label smoothing a row's result follows from its R, its target logit and its target's weight alone: the rows'
// passes leave these in the row's saved fields (weight 0 for a row that does not count), and this turns them into
// results, a SIMD lane a row.
template <typename A>
void finish_label_rows(const Saved<A>& saved, const char* rescaled) {
  A* const rests = &saved(SavedRows::sum_gradient, 0);
  A* const logits = &saved(SavedRows::pivot_gradient, 0);
  A* const losses = &saved(SavedRows::loss, 0);
  const int64_t blocks = (saved.rows + kLanes<A> - 1) / kLanes<A>;
  parallel_for(blocks, kElementsPerTask / kLanes<A>, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kLanes<A>;
      const int count = static_cast<int>(saved.rows - row < kLanes<A> ? saved.rows - row : kLanes<A>);
      const Vector<A> rest = load_or_zero(rests, row, saved.rows), logit = load_or_zero(logits, row, saved.rows);
      const Vector<A> target = load_or_zero(losses, row, saved.rows);
      const auto many = normalize_common_row(rest, logit, broadcast(A(1)));
      store_lanes<A, A>(losses, row, saved.rows, target * many.negative_log);
      store_lanes<A, A>(rests, row, saved.rows, target * many.inverse_sum);
      store_lanes<A, A>(logits, row, saved.rows, pivot_difference(many, Vector<A>{}, target));
      const Vector<A> ratio = rest / stable_value(logit);
      const bool common = memchr(rescaled + row, 1, count) == nullptr;
      if (common && !any_lane(ratio >= broadcast(A(kLargestRatio)))) continue;
      for (int lane = 0; lane < count; ++lane) {
        const RowNormalizer<A> one = normalize_row<A>(rest[lane], logit[lane], rescaled[row + lane] != 0);
        losses[row + lane] = target[lane] * one.negative_log;
        rests[row + lane] = target[lane] * one.inverse_sum;
        logits[row + lane] = pivot_difference<A>(one, 0, target[lane]);
      }
    }
  });
}

// ---- class-index targets, rows side by side ----

template <typename Storage, typename A = Accumulate<Storage>>
void label_block_forward(const RowBlock<Storage>& rows, const BlockLabels<A>& labels, const Options<A>& options,
                         RowResult<A>* results) {
  BlockLanes<A> rest, log_stable{};
  bool rescaled[kBlockVectors * kLanes<A>];
  sum_rest_block(rows, labels, rest, rescaled);
  if (options.spread > 0) {
    dispatch_vectors(rows.vectors(), [&](auto vectors) {
      sum_block<decltype(vectors)::value>(
          rows, log_stable, [&](int64_t j, int, Vector<A> x) { return options.weight_of(j) * log_stable_value(x); });
    });
  }
  for (int k = 0; k < rows.count; ++k) {
    const int64_t label = labels.value[k];
    results[k] = {};
    if (label < 0) continue;
    const A logit = ::pyreg::widen(rows.x[label * rows.stride + k]);
    results[k] = label_result<A>({rest.value[k], rescaled[k]}, logit, log_stable.value[k], label, options);
  }
}

template <typename Storage, typename A = Accumulate<Storage>>
void label_block_backward(const RowBlock<Storage>& rows, const BlockLabels<A>& labels, const RowResult<A>* results,
                          const A* scale, const Options<A>& options, Storage* out) {
  BlockLanes<A> factor{}, spread{}, pivot{};
  for (int k = 0; k < rows.count; ++k) {
    const int64_t label = labels.value[k];
    if (label < 0) continue;
    const A logit = ::pyreg::widen(rows.x[label * rows.stride + k]);  // read before an in-place result overwrites it
    factor.value[k] = scale[k] * results[k].sum_gradient;
    spread.value[k] = scale[k] * options.spread;
    pivot.value[k] = scale[k] * (stable_terms(logit).slope * results[k].pivot_gradient);
  }
  dispatch_vectors(rows.vectors(), [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<A> factors[kVectors];
    LaneIndex<A> label[kVectors];
    for (int v = 0; v < kVectors; ++v) factors[v] = factor.vector(v), label[v] = labels.vector(v);
    const auto map = [&](auto&& gradient) {
      map_block<kVectors>(rows, out, [&](int64_t j, int v, Vector<A> x) {
        return label[v] < 0 ? Vector<A>{} : gradient(j, v, x, stable_terms(x));  // 0 whatever an ignored row holds
      });
    };
    if (options.spread > 0) {
      map([&](int64_t j, int v, Vector<A> x, const StableTerms<Vector<A>>& terms) {
        const Vector<A> q = spread.vector(v) * options.weight_of(j);
        return stable_derivative(x, terms, factors[v]) - q * terms.slope;
      });
    } else {
      map([&](int64_t, int v, Vector<A> x, const StableTerms<Vector<A>>& terms) {
        return stable_derivative(x, terms, factors[v]);
      });
    }
  });
  for (int k = 0; k < rows.count; ++k) {
    if (labels.value[k] >= 0) out[labels.value[k] * rows.stride + k] = ::pyreg::narrow<Storage>(pivot.value[k]);
  }
}

// Calls body(first_row, block, labels, offset), offset the block's first element, for blocks of all rows, in parallel.
template <typename Storage, typename Body>
void for_each_block(const CrossEntropyArgs& args, Body&& body) {
  using A = Accumulate<Storage>;
  const RowLayout& layout = args.layout;
  if (layout.rows() == 0) return;  // then there may be no class either
  // Narrower blocks where wide ones would leave threads without work; no row's result depends on the width.
  constexpr int64_t kFewBlocks = 8;
  int64_t width = kBlockVectors * kLanes<A>;
  while (width > kLanes<A> && layout.outer * ((layout.inner + width - 1) / width) < kFewBlocks) width /= 2;
  const int64_t blocks = (layout.inner + width - 1) / width;
  const int64_t grain = (kElementsPerTask + width * layout.classes - 1) / (width * layout.classes);
  parallel_for(layout.outer * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t column = block % blocks * width, first_row = block / blocks * layout.inner + column;
      const int64_t offset = block / blocks * layout.classes * layout.inner + column;
      const int count = static_cast<int>(layout.inner - column < width ? layout.inner - column : width);
      BlockLabels<A> labels;
      for (int k = 0; k < kBlockVectors * kLanes<A>; ++k) labels.value[k] = -1;
      for (int k = 0; k < count; ++k) {
        const int64_t label = args.labels[first_row + k];
        if (is_class(label, args)) labels.value[k] = static_cast<typename BlockLabels<A>::Index>(label);
      }
      const Storage* x = static_cast<const Storage*>(args.logits) + offset;
      body(first_row, RowBlock<Storage>{x, layout.classes, layout.inner, count}, labels, offset);
    }
  });
}

bool lie_side_by_side(const RowLayout& layout) {
  return layout.inner >= kLeastSideBySide && layout.classes <= INT32_MAX;
}

template <typename Storage>
void labels_forward(const CrossEntropyArgs& args) {
  using A = Accumulate<Storage>;
  const Options<A> options = options_of<A>(args);
  const Saved<A> saved{static_cast<A*>(args.saved), args.layout.rows()};
  const double total_weight = total_label_weight(args, options.weight);
  if (lie_side_by_side(args.layout)) {
    for_each_block<Storage>(args, [&](int64_t row, const auto& rows, const auto& labels, int64_t) {
      RowResult<A> results[kBlockVectors * kLanes<A>];
      label_block_forward(rows, labels, options, results);
      for (int k = 0; k < rows.count; ++k) saved.store(row + k, results[k]);
    });
    return finish_losses(args, saved, kSavedFieldsForLabels, total_weight);
  }
  const bool smoothed = options.spread > 0;
  Scratch<char> rescaled(smoothed ? 0 : saved.rows);
  for_each_row(args.layout, static_cast<const Storage*>(args.logits), args.logits_stride,
               static_cast<const Storage*>(nullptr), static_cast<Storage*>(nullptr),
               [&](int64_t row, const auto* x, const auto*, auto*) {
                 const int64_t label = args.labels[row], classes = args.layout.classes;
                 RowResult<A> result{};
                 if (smoothed) {
                   if (is_class(label, args)) result = label_row_forward(x, classes, label, options);
                 } else {
                   rescaled.get()[row] = 0;
                   if (is_class(label, args)) {
                     const RowSum<A> sum = sum_rest(x, classes, label);
                     rescaled.get()[row] = sum.rescaled;
                     result = {options.weight_of(label), sum.rest, ::pyreg::widen(x[label])};
                   }
                 }
                 saved.store(row, result);
               });
  if (!smoothed) finish_label_rows(saved, rescaled.get());
  finish_losses(args, saved, kSavedFieldsForLabels, total_weight);
}

template <typename Storage>
void labels_backward(const CrossEntropyArgs& args) {
  using A = Accumulate<Storage>;
  const Options<A> options = options_of<A>(args);
  const Saved<A> saved{static_cast<A*>(const_cast<void*>(args.saved)), args.layout.rows()};
  const UpstreamGradient<A> upstream(args, saved.fields[kSavedFieldsForLabels * saved.rows]);
  if (lie_side_by_side(args.layout)) {
    return for_each_block<Storage>(args, [&](int64_t row, const auto& rows, const auto& labels, int64_t offset) {
      RowResult<A> results[kBlockVectors * kLanes<A>];
      A scale[kBlockVectors * kLanes<A>];
      for (int k = 0; k < rows.count; ++k) results[k] = saved.load(row + k), scale[k] = upstream(row + k);
      label_block_backward(rows, labels, results, scale, options, static_cast<Storage*>(args.grad_logits) + offset);
    });
  }
  for_each_row(args.layout, static_cast<const Storage*>(args.logits), args.logits_stride,
               static_cast<const Storage*>(nullptr), static_cast<Storage*>(args.grad_logits),
               [&](int64_t row, const auto* x, const auto*, auto* out) {
                 const int64_t label = args.labels[row], classes = args.layout.classes;
                 if (!is_class(label, args)) return fill_zero(out, classes);
                 label_row_backward(x, classes, label, saved(SavedRows::sum_gradient, row),
                                    saved(SavedRows::pivot_gradient, row), upstream(row), options, out);
               });
}

template <typename Storage>
void labels_with_gradient(const CrossEntropyArgs& args) {
  using A = Accumulate<Storage>;
  const Options<A> options = options_of<A>(args);
  const Saved<A> saved{static_cast<A*>(args.saved), args.layout.rows()};
  const double total_weight = total_label_weight(args, options.weight);
  if (*args.invalid_label != args.ignore_index) return;  // nothing is overwritten when the call is going to fail
  const A scale = args.reduction == Reduction::mean ? static_cast<A>(1 / total_weight) : A(1);
  if (lie_side_by_side(args.layout)) {
    for_each_block<Storage>(args, [&](int64_t row, const auto& rows, const auto& labels, int64_t offset) {
      RowResult<A> results[kBlockVectors * kLanes<A>];
      A scales[kBlockVectors * kLanes<A>];
      label_block_forward(rows, labels, options, results);
      for (int k = 0; k < rows.count; ++k) saved.store(row + k, results[k]), scales[k] = scale;
      label_block_backward(rows, labels, results, scales, options, static_cast<Storage*>(args.grad_logits) + offset);
    });
    return finish_losses(args, saved, kSavedFieldsForLabels, total_weight);
  }
  for_each_row(
      args.layout, static_cast<const Storage*>(args.logits), args.logits_stride, static_cast<const Storage*>(nullptr),
      static_cast<Storage*>(args.grad_logits), [&](int64_t row, const auto* x, const auto*, auto* out) {
        const int64_t label = args.labels[row], classes = args.layout.classes;
        RowResult<A> result{};
        if (label == args.ignore_index) {
          fill_zero(out, classes);
        } else {
          result = label_row_forward(x, classes, label, options);
          label_row_backward(x, classes, label, result.sum_gradient, result.pivot_gradient, scale, options, out);
        }
        saved.store(row, result);
      });
  finish_losses(args, saved, kSavedFieldsForLabels, total_weight);
}

// ---- probability targets ----

// q_j = w_j ((1 - smoothing) t_j + smoothing / classes); 0 beyond the row's end.
template <typename Probability, typename A>
PYREG_HOST_DEVICE Vector<A> target_mass(const Probability* t, int64_t j, int64_t n, const Options<A>& options) {
  Vector<A> q = options.keep * load_or_zero(t, j, n) + options.spread;
  if (options.weight) return q * load_or_zero(options.weight, j, n);
  return j + kLanes<A> <= n ? q : without_tail<A>(q, static_cast<int>(n - j));
}

template <typename Storage, typename Probability, typename A = Accumulate<Storage>>
RowResult<A> probability_row_forward(const Storage* x, const Probability* t, int64_t n, int64_t pivot,
                                     const Options<A>& options) {
  const RowSum<A> sum = sum_rest(x, n, pivot);
  const A logit = ::pyreg::widen(x[pivot]);
  const RowNormalizer<A> row = normalize_row(sum.rest, logit, sum.rescaled);
  const A log_sum = log_row_sum(sum.rest, logit, sum.rescaled);
  const A rest_mass =
      sum_row(x, n, pivot, [=, &options](int64_t j, Vector<A>) { return target_mass(t, j, n, options); });
  const A rest_loss = sum_row(x, n, pivot, [=, &options](int64_t j, Vector<A> v) {
    const Vector<A> q = target_mass(t, j, n, options);
    const Vector<A> log_p = log_probability(v, stable_terms(v), row, log_sum);
    return j + kLanes<A> <= n ? -q * log_p : without_tail<A>(-q * log_p, static_cast<int>(n - j));
  });
  const A pivot_mass = (options.keep * ::pyreg::widen(t[pivot]) + options.spread) * options.weight_of(pivot);
  return {rest_loss + pivot_mass * row.negative_log, (rest_mass + pivot_mass) * row.inverse_sum,
          pivot_difference(row, rest_mass, pivot_mass)};
}

template <typename Storage, typename Probability, typename Out, typename A = Accumulate<Storage>>
void probability_row_backward(const Storage* x, const Probability* t, int64_t n, int64_t pivot, A sum_gradient,
                              A pivot_gradient, A scale, const Options<A>& options, Out* out) {
  const Vector<A> factor = broadcast(scale * sum_gradient);
  const A pivot_logit = ::pyreg::widen(x[pivot]);
  map_row(x, n, out, [=, &options](int64_t j, Vector<A> v) {
    const auto terms = stable_terms(v);
    const Vector<A> q = scale * target_mass(t, j, n, options);
    return stable_derivative(v, terms, factor) - q * terms.slope;
  });
  out[pivot] = ::pyreg::narrow<Out>(scale * (stable_terms(pivot_logit).slope * pivot_gradient));
}

template <typename Storage>
void probabilities_forward(const CrossEntropyArgs& args) {
  using A = Accumulate<Storage>;
  const Options<A> options = options_of<A>(args);
  const Saved<A> saved{static_cast<A*>(args.saved), args.layout.rows()};
  for_each_row(args.layout, static_cast<const Storage*>(args.logits), args.logits_stride,
               static_cast<const Storage*>(args.probabilities), static_cast<Storage*>(nullptr),
               [&](int64_t row, const auto* x, const auto* t, auto*) {
                 const int64_t pivot = largest(x, args.layout.classes);
                 const RowResult<A> result = probability_row_forward(x, t, args.layout.classes, pivot, options);
                 saved.store(row, result);
                 saved(SavedRows::pivot, row) = bits_of_index<A>(pivot);
               });
  finish_losses(args, saved, kSavedFieldsForProbabilities, static_cast<double>(args.layout.rows()));
}

template <typename Storage>
void probabilities_backward(const CrossEntropyArgs& args) {
  using A = Accumulate<Storage>;
  const Options<A> options = options_of<A>(args);
  const Saved<A> saved{static_cast<A*>(args.saved), args.layout.rows()};
  const UpstreamGradient<A> upstream(args, saved.fields[kSavedFieldsForProbabilities * saved.rows]);
  for_each_row(args.layout, static_cast<const Storage*>(args.logits), args.logits_stride,
               static_cast<const Storage*>(args.probabilities), static_cast<Storage*>(args.grad_logits),
               [&](int64_t row, const auto* x, const auto* t, auto* out) {
                 probability_row_backward(x, t, args.layout.classes, index_of_bits(saved(SavedRows::pivot, row)),
                                          saved(SavedRows::sum_gradient, row), saved(SavedRows::pivot_gradient, row),
                                          upstream(row), options, out);
               });
}

// ---- stablemax and its logarithm ----

template <typename Storage, typename Out, typename A = Accumulate<Storage>>
void stablemax_row(const Storage* x, int64_t n, Out* out) {
  const int64_t pivot = 0;
  const RowSum<A> sum = sum_rest(x, n, pivot);
  const RowNormalizer<A> row = normalize_row(sum.rest, ::pyreg::widen(x[pivot]), sum.rescaled);
  map_row(x, n, out, [=](int64_t, Vector<A> v) { return probability(v, stable_terms(v), row); });
}

// dx_j = s'_j / S (g_j - sum_k g_k p_k)
template <typename Storage, typename Grad, typename Out, typename A = Accumulate<Storage>>
void stablemax_row_backward(const Storage* x, const Grad* g, int64_t n, Out* out) {
  const int64_t pivot = largest(x, n);
  const RowSum<A> sum = sum_rest(x, n, pivot);
  const RowNormalizer<A> row = normalize_row(sum.rest, ::pyreg::widen(x[pivot]), sum.rescaled);
  const A pivot_grad = ::pyreg::widen(g[pivot]);
  const A rest = sum_row(x, n, pivot, [=](int64_t j, Vector<A> v) {
    return (load_or_zero(g, j, n) - pivot_grad) * probability(v, stable_terms(v), row);
  });
  const Vector<A> factor = broadcast(row.inverse_sum);
  map_row(x, n, out, [=](int64_t j, Vector<A> v) {
    const Vector<A> centred = (load_or_zero(g, j, n) - pivot_grad) - rest;
    return stable_derivative(v, stable_terms(v), factor) * centred;
  });
}

template <typename Storage, typename Out, typename A = Accumulate<Storage>>
void log_stablemax_row(const Storage* x, int64_t n, Out* out) {
  const int64_t pivot = largest(x, n);
  const RowSum<A> sum = sum_rest(x, n, pivot);
  const A logit = ::pyreg::widen(x[pivot]);
  const RowNormalizer<A> row = normalize_row(sum.rest, logit, sum.rescaled);
  const A log_sum = log_row_sum(sum.rest, logit, sum.rescaled);
  map_row(x, n, out, [=](int64_t, Vector<A> v) { return log_probability(v, stable_terms(v), row, log_sum); });
  out[pivot] = ::pyreg::narrow<Out>(-row.negative_log);
}

// dx_j = h_j (g_j - G p_j), G = sum_k g_k
template <typename Storage, typename Grad, typename Out, typename A = Accumulate<Storage>>
void log_stablemax_row_backward(const Storage* x, const Grad* g, int64_t n, Out* out) {
  const int64_t pivot = largest(x, n);
  const RowSum<A> sum = sum_rest(x, n, pivot);
  const A logit = ::pyreg::widen(x[pivot]);
  const RowNormalizer<A> row = normalize_row(sum.rest, logit, sum.rescaled);
  const A rest_grad = sum_row(x, n, pivot, [=](int64_t j, Vector<A>) { return load_or_zero(g, j, n); });
  const A pivot_grad = ::pyreg::widen(g[pivot]);
  const Vector<A> factor = broadcast((rest_grad + pivot_grad) * row.inverse_sum);
  map_row(x, n, out, [=](int64_t j, Vector<A> v) {
    const auto terms = stable_terms(v);
    return load_or_zero(g, j, n) * terms.slope - stable_derivative(v, terms, factor);
  });
  out[pivot] = ::pyreg::narrow<Out>(stable_terms(logit).slope * -pivot_difference(row, rest_grad, pivot_grad));
}

}  // namespace

void stablemax_cross_entropy_forward(const CrossEntropyArgs& args) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    args.labels ? labels_forward<Storage>(args) : probabilities_forward<Storage>(args);
  });
}

void stablemax_cross_entropy_backward(const CrossEntropyArgs& args) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    args.labels ? labels_backward<Storage>(args) : probabilities_backward<Storage>(args);
  });
}

void stablemax_cross_entropy_with_gradient(const CrossEntropyArgs& args) {
  dispatch_dtype(args.dtype, [&](auto tag) { labels_with_gradient<typename decltype(tag)::type>(args); });
}

#define PYREG_STABLEMAX_FORWARD(name, row_function)                                                                 \
  void name(const StablemaxArgs& args) {                                                                            \
    dispatch_in_out(args.dtype, args.output_dtype, [&](auto in, auto out) {                                         \
      using In = typename decltype(in)::type;                                                                       \
      using Out = typename decltype(out)::type;                                                                     \
      for_each_row(args.layout, static_cast<const In*>(args.input), args.layout.classes,                            \
                   static_cast<const In*>(nullptr), static_cast<Out*>(args.output),                                 \
                   [&](int64_t, const auto* x, const auto*, auto* y) { row_function(x, args.layout.classes, y); }); \
    });                                                                                                             \
  }

#define PYREG_STABLEMAX_BACKWARD(name, row_function)                                                              \
  void name(const StablemaxArgs& args) {                                                                          \
    dispatch_in_out(args.dtype, args.output_dtype, [&](auto in, auto grad) {                                      \
      using In = typename decltype(in)::type;                                                                     \
      using Grad = typename decltype(grad)::type;                                                                 \
      for_each_row(                                                                                               \
          args.layout, static_cast<const In*>(args.input), args.layout.classes,                                   \
          static_cast<const Grad*>(args.grad_output), static_cast<In*>(args.output),                              \
          [&](int64_t, const auto* x, const auto* g, auto* dx) { row_function(x, g, args.layout.classes, dx); }); \
    });                                                                                                           \
  }

PYREG_STABLEMAX_FORWARD(stablemax_forward, stablemax_row)
PYREG_STABLEMAX_FORWARD(log_stablemax_forward, log_stablemax_row)
PYREG_STABLEMAX_BACKWARD(stablemax_backward, stablemax_row_backward)
PYREG_STABLEMAX_BACKWARD(log_stablemax_backward, log_stablemax_row_backward)

}  // namespace pyreg::PYREG_ISA

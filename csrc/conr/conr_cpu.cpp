// CPU kernels of ConR: masks, pushes and distances of a tile's pairs; formulas: conr.h, passes: core/pair_passes.h.
// They take 8 to 16 bytes of every pair's labels from cache and one exponential; the products that make the scores take
// D times 2 operations.
#include "conr/conr.h"

#include "core/pair_passes.h"

namespace pyreg::PYREG_ISA {

namespace {

// A distance in the scores' type, and where it is within the window: compared in the labels' own type.
template <typename A>
struct Distance {
  Vector<A> value;
  Mask<A> is_within;
};

// One label a row, of the scores' type.
template <typename Scores>
struct OneLabel {
  using A = Scores;
  struct Row {
    A label;
  };

  OneLabel(const PairArgs& args, const void* rows, const void* columns)
      : rows_(static_cast<const A*>(rows)),
        columns_(static_cast<const A*>(columns)),
        window_(static_cast<A>(args.window)) {}

  Row row(int64_t i) const { return {rows_[i]}; }
  Distance<A> distance(const Row& row, int64_t j) const {
    const Vector<A> value = absolute(row.label - load(columns_ + j));
    return {value, value <= window_};
  }

 private:
  const A* rows_;
  const A* columns_;
  A window_;
};

// Any number of labels a row, under a norm.
template <typename Scores, typename Label>
struct ManyLabels {
  using A = Scores;
  struct Row {
    int64_t index;
  };
  static constexpr int kParts = kLanes<A> / kLanes<Label>;  // vectors of labels beside a vector of scores

  ManyLabels(const PairArgs& args, const void* rows, const void* columns)
      : rows_(static_cast<const Label*>(rows)),
        columns_(static_cast<const Label*>(columns)),
        row_stride_(args.row.label_stride),
        column_stride_(args.column.label_stride),
        count_(args.labels),
        norm_(args.labels == 1 ? 1 : args.label_norm),
        window_(static_cast<Label>(args.window)) {}

  Row row(int64_t i) const { return {i}; }
  Distance<A> distance(const Row& row, int64_t j) const {
    Label values[kLanes<A>];
    Code<Label> within[kLanes<A>];
    for (int part = 0; part < kParts; ++part) {
      const Vector<Label> value = norm(row, j + part * kLanes<Label>);
      const Mask<Label> is_within = value <= window_;
      store(values + part * kLanes<Label>, value);
      memcpy(within + part * kLanes<Label>, &is_within, sizeof(is_within));
    }
    Distance<A> result;
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      result.value[lane] = static_cast<A>(values[lane]);
      result.is_within[lane] = static_cast<Code<A>>(within[lane]);
    }
    return result;
  }

 private:
  Vector<Label> norm(const Row& row, int64_t j) const {
    Vector<Label> total{};
    for (int64_t k = 0; k < count_; ++k) {
      const Vector<Label> d = absolute(rows_[k * row_stride_ + row.index] - load(columns_ + k * column_stride_ + j));
      if (norm_ == 1) {
        total += d;
      } else if (norm_ == 2) {
        total += d * d;
      } else {
        total = d > total ? d : total;
      }
    }
    return norm_ == 2 ? square_root(total) : total;
  }

  const Label* rows_;
  const Label* columns_;
  int64_t row_stride_, column_stride_, count_;
  int32_t norm_;
  Label window_;
};

template <typename Labels>
struct ConrPairs {
  using A = typename Labels::A;
  static constexpr bool kMayBeEmpty = true, kCountsNegatives = true;

  struct Row {
    typename Labels::Row target, pred;
    A weight;
    Code<A> self;
  };

  explicit ConrPairs(const PairArgs& args)
      : targets(args, args.row.targets, args.column.targets),
        preds(args, args.row.preds, args.column.preds),
        args_(args),
        push_rate(static_cast<A>(args.push_rate)),
        push_constant(static_cast<A>(args.push_constant)),
        push_slope(static_cast<A>(args.push_slope)) {}

  Row row(int64_t i) const {
    return {targets.row(i), preds.row(i), static_cast<const A*>(args_.row.weights)[i],
            static_cast<Code<A>>(args_.row.partner ? args_.row.partner[i] : -1)};
  }

  PairTerms<A> terms(const Row& row, int64_t j, Mask<A> valid) const {
    const Distance<A> d = targets.distance(row.target, j), e = preds.distance(row.pred, j);
    const Mask<A> other = valid & (lane_index<A>() + static_cast<Code<A>>(j) != row.self);
    const Mask<A> positive = d.is_within & other;
    // A distance that is NaN is beyond no window: such a pair is neither.
    const Mask<A> negative = ~d.is_within & (d.value == d.value) & e.is_within & other;
    const Vector<A> exponent = keep<A>(negative, push_rate * d.value);
    const Vector<A> push = push_constant + push_slope * d.value;
    const Vector<A> one = broadcast(A(1));
    const Vector<A> column_weight = load(static_cast<const A*>(args_.column.weights) + j);
    const Vector<A> row_factor = negative ? row.weight * push : one;
    const Vector<A> column_factor = negative ? column_weight * push : one;
    return {positive | negative, positive,     exponent_of(exponent, row_factor), exponent_of(exponent, column_factor),
            row_factor,          column_factor};
  }

  // A term of factor 0 must not be the largest, beside which the others may vanish.
  Vector<A> exponent_of(Vector<A> exponent, Vector<A> factor) const {
    return args_.is_bounded ? exponent : factor == 0 ? minus_infinity<A>() : exponent;
  }

  Labels targets, preds;
  const PairArgs& args_;
  A push_rate, push_constant, push_slope;
};

template <typename Function>
void dispatch(const PairArgs& args, Function&& function) {
  if (args.dtype == Dtype::float64) {
    if (args.labels == 1) return function(TypeTag<ConrPairs<OneLabel<double>>>{});
    return function(TypeTag<ConrPairs<ManyLabels<double, double>>>{});
  }
  if (args.label_dtype == Dtype::float64) return function(TypeTag<ConrPairs<ManyLabels<float, double>>>{});
  if (args.labels == 1) return function(TypeTag<ConrPairs<OneLabel<float>>>{});
  function(TypeTag<ConrPairs<ManyLabels<float, float>>>{});
}

}  // namespace

void conr_statistics(const PairArgs& args) {
  dispatch(args, [&](auto pairs) { run_pair_statistics<typename decltype(pairs)::type>(args); });
}

void conr_gradient(const PairArgs& args) {
  dispatch(args, [&](auto pairs) { run_pair_gradient<typename decltype(pairs)::type>(args); });
}

}  // namespace pyreg::PYREG_ISA

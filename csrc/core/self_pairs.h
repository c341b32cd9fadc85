// The losses whose rows and columns are the same features, ConR and SupCon: all rows, or, in data-parallel training,
// one process's rows against all.
//
// An operator derives its Problem from SelfPairs and gives it
//   columns_for(rows)  the spans of columns that may hold pairs of a span of rows
//   row(sums, i)       the i-th row's statistics and loss (PairRow)
//   divisor(losses)    what a mean divides by
//   statistics_kernel, gradient_kernel
#pragma once

#include <optional>
#include <tuple>

#include "core/pair_tiles.h"

namespace pyreg {

// For row_count: a number that tracing need not know.
constexpr int64_t kAllRows = -1;

class SelfPairs {
 public:
  SelfPairs(const char* name, const Tensor& features, bool normalize, double temperature, int64_t first_row,
            int64_t row_count)
      : name_(name),
        features_(as_contiguous(features)),
        dtype_(dtype_of(features.scalar_type(), name)),
        normalize_(normalize),
        first_row_(first_row),
        row_count_(row_count == kAllRows ? features.size(0) : row_count) {
    PYREG_REQUIRE(features.dim() == 2 && features.size(1) > 0, name, "expected features of shape [N, D]");
    PYREG_REQUIRE(first_row_ >= 0 && row_count_ >= 0 && row_count_ <= count() - first_row_, name,
                  "expected rows within the features'");
    PYREG_REQUIRE(temperature > 0, name, "expected a positive temperature");
    args_.dtype = accumulate(dtype_);
    args_.scale = 1 / temperature;
    args_.is_upper = row_count_ == count();
  }

  const char* name() const { return name_; }
  PairArgs& args() { return args_; }
  const Tensor& features() const { return features_; }
  Dtype dtype() const { return dtype_; }
  int64_t count() const { return features_.size(0); }
  int64_t first_row() const { return first_row_; }
  int64_t row_count() const { return row_count_; }

  // Which of the features the i-th row and the i-th column of the tiles are.
  int64_t row_source(int64_t i) const { return column_source(args_.is_upper ? i : row_partner_[i]); }
  int64_t column_source(int64_t i) const { return order_.empty() ? i : order_[i]; }

  UnitRows unit_columns() const { return UnitRows(features_, dtype_, order_, normalize_); }
  UnitRows unit_rows() const {
    std::vector<int64_t> sources(static_cast<size_t>(row_count_));
    for (int64_t i = 0; i < row_count_; ++i) sources[i] = row_source(i);
    return UnitRows(features_, dtype_, std::move(sources), normalize_);
  }

 protected:
  // Puts the columns into an order, and the rows that are asked for with them.
  void set_order(std::vector<int64_t> order) {
    order_ = std::move(order);
    if (args_.is_upper) return;
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t source = column_source(i);
      if (source >= first_row_ && source < first_row_ + row_count_) row_partner_.push_back(i);
    }
  }

  bool is_ordered() const { return !order_.empty(); }

  // Calls fill(side, count, source of the i-th) for the columns, and for the rows if they differ.
  template <typename Fill>
  void fill_sides(Fill&& fill) {
    fill(args_.column, count(), [this](int64_t i) { return column_source(i); });
    args_.row = args_.column;
    if (args_.is_upper) return;
    fill(args_.row, row_count_, [this](int64_t i) { return row_source(i); });
    args_.row.partner = row_partner_.data();
  }

  // An array that lives as long as the problem.
  const void* keep(std::vector<char> array) { return arrays_.emplace_back(std::move(array)).data(); }

  PairArgs args_{};

 private:
  const char* name_;
  Tensor features_;
  Dtype dtype_;
  bool normalize_;
  int64_t first_row_, row_count_;
  std::vector<int64_t> order_, row_partner_;
  std::vector<std::vector<char>> arrays_;
};

// The gradient of `rows` from the panels of `args`; statistics(field, source) and upstream(source) are of all rows.
template <typename Statistics, typename Upstream>
std::array<PairWeights, 2> self_pair_weights(SelfPairs& problem, Statistics&& statistics, Upstream&& upstream) {
  PairArgs& args = problem.args();
  const auto weights = [&](int64_t count, auto source) {
    PairWeights result(args.dtype, count);
    result.fill(
        args, {0, count}, [&](int64_t field, int64_t i) { return statistics(field, source(i)); },
        [&](int64_t i) { return upstream(source(i)); });
    return result;
  };
  return {weights(args.is_upper ? 0 : problem.row_count(), [&](int64_t i) { return problem.row_source(i); }),
          weights(problem.count(), [&](int64_t i) { return problem.column_source(i); })};
}

inline void set_weights(PairArgs& args, const std::array<PairWeights, 2>& weights) {
  weights[1].set(args.column);
  weights[args.is_upper ? 1 : 0].set(args.row);
}

// (loss, statistics [3, row_count], gradient of the reduced loss or [0])
template <typename Problem>
std::tuple<Tensor, Tensor, Tensor> self_pairs_forward(Problem& problem, int64_t reduction_code, ScalarType loss_type,
                                                      bool with_gradient) {
  const Reduction reduction = reduction_of(reduction_code, problem.name());
  PairArgs& args = problem.args();
  const int64_t row_count = problem.row_count(), first_row = problem.first_row();
  const bool is_mean = reduction == Reduction::mean;
  PYREG_REQUIRE(!with_gradient || (args.is_upper && problem.count() <= kOnePanelRows && reduction != Reduction::none),
                problem.name(), "expected with_gradient for at most ", kOnePanelRows, " rows and a reduced loss only");
  const ScalarType type = accumulate_type(problem.dtype());
  const Dtype dtype = accumulate(problem.dtype());
  Tensor gradient = with_gradient ? empty({problem.count(), problem.features().size(1)}, type, problem.features())
                                  : empty({0}, type, problem.features());
  std::vector<PairRow> rows(static_cast<size_t>(row_count));
  double divisor = 1;
  if (row_count > 0) {
    PairSumsMemory sums(row_count);
    args.row_sums = args.column_sums = sums.pointers();
    args.has_columns = args.is_upper;
    const UnitRows columns = problem.unit_columns();
    const std::optional<UnitRows> own_rows = args.is_upper ? std::nullopt : std::optional(problem.unit_rows());
    PanelMemory memory(args, row_count, problem.count(), columns.rows);
    pair_statistics(args, memory, own_rows ? *own_rows : columns, columns, Problem::statistics_kernel,
                    [&](Span span) { return problem.columns_for(span); });
    for (int64_t i = 0; i < row_count; ++i) rows[problem.row_source(i) - first_row] = problem.row(args.row_sums, i);
    if (is_mean) divisor = problem.divisor(rows);
    if (with_gradient) {
      // The one panel's scores are still there.
      const auto weights = self_pair_weights(
          problem, [&](int64_t field, int64_t i) { return rows[i].statistic(field); },
          [&](int64_t) { return 1 / divisor; });
      set_weights(args, weights);
      Problem::gradient_kernel(args);
      const Tensor total = zeros_like_rows(columns);
      add_gradient_of_panel(args, memory, columns, columns, &total, &total);
      columns.backward(total, dtype, 0, gradient);
    }
  } else if (is_mean) {
    divisor = problem.divisor(rows);
  }
  std::vector<double> losses(rows.size());
  for (int64_t i = 0; i < row_count; ++i) losses[i] = rows[i].loss;
  return {reduce_losses(losses, reduction, divisor, loss_type, problem.features()),
          statistics_of(rows, type, problem.features()), gradient};
}

template <typename Problem>
Tensor self_pairs_backward(Problem& problem, const Tensor& grad_rows, const Tensor& statistics) {
  const int64_t count = problem.count(), row_count = problem.row_count();
  const Tensor& features = problem.features();
  const ScalarType type = accumulate_type(problem.dtype());
  PYREG_REQUIRE(grad_rows.dim() == 1 && grad_rows.size(0) == count && grad_rows.scalar_type() == type, problem.name(),
                "expected grad_rows of shape [N] in the features' accumulation dtype");
  PYREG_REQUIRE(statistics.dim() == 2 && statistics.size(0) == 3 && statistics.size(1) == count &&
                    statistics.scalar_type() == type,
                problem.name(), "expected statistics of shape [3, N] in the features' accumulation dtype");
  Tensor gradient = empty({row_count, features.size(1)}, features.scalar_type(), features);
  if (row_count == 0) return gradient;
  const Numbers upstream(as_contiguous(grad_rows)), known(as_contiguous(statistics));
  PairArgs& args = problem.args();
  const auto weights = self_pair_weights(
      problem, [&](int64_t field, int64_t i) { return known[field * count + i]; },
      [&](int64_t i) { return upstream[i]; });
  set_weights(args, weights);
  args.has_columns = true;
  const UnitRows columns = problem.unit_columns();
  const std::optional<UnitRows> own_rows = args.is_upper ? std::nullopt : std::optional(problem.unit_rows());
  const UnitRows& rows = own_rows ? *own_rows : columns;
  PanelMemory memory(args, row_count, count, columns.rows);
  const Tensor total = zeros_like_rows(rows);
  pair_gradient(args, memory, rows, columns, &total, args.is_upper ? &total : nullptr, Problem::gradient_kernel,
                [&](Span span) { return problem.columns_for(span); });
  rows.backward(total, problem.dtype(), problem.first_row(), gradient);
  return gradient;
}

}  // namespace pyreg

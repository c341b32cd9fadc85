// InfoNCE's operators on the CPU: tiles of queries against keys, whose rows' and columns' sums are the two directions.
#include "info_nce/info_nce.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "core/pair_tiles.h"

namespace pyreg {

namespace {

// Rows against columns: queries against keys, or, where only the keys' direction is asked for, keys against queries.
class Problem {
 public:
  struct Side {
    const Tensor& features;
    const std::optional<Tensor>& ids;
  };

  Problem(const char* name, const Side& rows, const Side& columns, const std::optional<Tensor>& log_q,
          double temperature, bool normalize, int64_t offset, bool has_columns)
      : name_(name),
        row_features_(as_contiguous(rows.features)),
        column_features_(as_contiguous(columns.features)),
        normalize_(normalize),
        dtype_(dtype_of(rows.features.scalar_type(), name)) {
    PYREG_REQUIRE(rows.features.dim() == 2 && columns.features.dim() == 2 && rows.features.size(1) > 0 &&
                      rows.features.size(1) == columns.features.size(1) &&
                      rows.features.scalar_type() == columns.features.scalar_type(),
                  name, "expected query [N, D] and key [M, D] of one dtype");
    PYREG_REQUIRE(temperature > 0, name, "expected a positive temperature");
    args_.dtype = accumulate(dtype_);
    args_.scale = 1 / temperature;
    args_.has_columns = has_columns;
    set_partners(offset);
    set_ids(rows.ids, columns.ids);
    // Scores of the rows' direction lie within 1 / tau of the exponents. Bounded ones share one exponential between
    // both directions, of which only one has log_q.
    const auto [lowest, highest] = set_exponents(log_q);
    args_.is_bounded = normalize && 2 * args_.scale + (highest - lowest) <= kBoundedRange && !(log_q && has_columns);
    set_shift(args_, args_.scale + highest);
  }

  PairArgs& args() { return args_; }
  Dtype dtype() const { return dtype_; }
  int64_t row_count() const { return row_features_.size(0); }
  int64_t column_count() const { return column_features_.size(0); }
  UnitRows unit_rows() const { return UnitRows(row_features_, dtype_, {}, normalize_); }
  UnitRows unit_columns() const { return UnitRows(column_features_, dtype_, {}, normalize_); }
  auto all_columns() const { return dense_columns(args_, column_count()); }

  PairRow row(const PairSums& sums, int64_t i) const { return info_nce_row(sums, i, args_.is_bounded, args_.shift); }

 private:
  void set_partners(int64_t offset) {
    offset = std::clamp(offset, -row_count(), column_count());  // beyond which no row has a positive
    partners_.resize(static_cast<size_t>(row_count()));
    for (int64_t i = 0; i < row_count(); ++i) {
      partners_[i] = i + offset >= 0 && i + offset < column_count() ? i + offset : -1;
    }
    args_.row.partner = partners_.data();
  }

  void set_ids(const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids) {
    PYREG_REQUIRE(row_ids.has_value() == column_ids.has_value(), name_, "expected both query_ids and key_ids or none");
    if (!row_ids) return;
    const auto values = [&](const Tensor& ids, int64_t count) {
      PYREG_REQUIRE(
          ids.dim() == 1 && ids.size(0) == count && ids.is_contiguous() && ids.scalar_type() == ScalarType::Long, name_,
          "expected contiguous int64 ids, one a row");
      return std::span(static_cast<const int64_t*>(ids.const_data_ptr()), static_cast<size_t>(count));
    };
    const auto rows = values(*row_ids, row_count()), columns = values(*column_ids, column_count());
    const Codes codes{rows, columns};
    row_codes_ = codes.array(args_.dtype, rows);
    column_codes_ = codes.array(args_.dtype, columns);
    args_.row.codes = row_codes_.data();
    args_.column.codes = column_codes_.data();
  }

  std::array<double, 2> set_exponents(const std::optional<Tensor>& log_q) {
    const int64_t count = column_count();
    if (!log_q || count == 0) return {0, 0};
    PYREG_REQUIRE(log_q->dim() == 1 && log_q->size(0) == count && log_q->is_contiguous() &&
                      log_q->scalar_type() == accumulate_type(dtype_),
                  name_, "expected contiguous log_q of shape [M] in the features' accumulation dtype");
    const Numbers log_probabilities(*log_q);
    double lowest = INFINITY, highest = -INFINITY;
    exponents_ = padded_array(args_.dtype, count, [&](int64_t i) {
      const double exponent = -log_probabilities[i];
      lowest = std::fmin(lowest, exponent);
      highest = std::fmax(highest, exponent);
      return exponent;
    });
    args_.column.exponents = exponents_.data();
    return {lowest, highest};
  }

  const char* name_;
  Tensor row_features_, column_features_;
  bool normalize_;
  Dtype dtype_;
  PairArgs args_{};
  std::vector<int64_t> partners_;
  std::vector<char> row_codes_, column_codes_, exponents_;
};

using Rows = std::vector<PairRow>;

Tensor empty_gradient(const Tensor& of, bool is_needed, ScalarType type) {
  return is_needed ? empty({of.size(0), of.size(1)}, type, of) : empty({0}, type, of);
}

// Of rows and columns, as far as they are needed.
class Gradients {
 public:
  Gradients(const UnitRows& rows, const UnitRows& columns, bool needs_rows, bool needs_columns)
      : rows_(rows), columns_(columns) {
    if (needs_rows) row_total_ = zeros_like_rows(rows);
    if (needs_columns) column_total_ = zeros_like_rows(columns);
  }

  const Tensor* row_total() const { return row_total_ ? &*row_total_ : nullptr; }
  const Tensor* column_total() const { return column_total_ ? &*column_total_ : nullptr; }

  void write(Dtype dtype, Tensor& grad_rows, Tensor& grad_columns) const {
    if (row_total_) rows_.backward(*row_total_, dtype, 0, grad_rows);
    if (column_total_) columns_.backward(*column_total_, dtype, 0, grad_columns);
  }

 private:
  const UnitRows& rows_;
  const UnitRows& columns_;
  std::optional<Tensor> row_total_, column_total_;
};

// Statistics of rows and columns; with `gradients`, those of `upstream` times all rows' losses too: a panel of all
// columns knows its rows' statistics, and with them the gradient of its scores in the rows' direction, so that no
// product is made twice. In both directions that holds only where the panel is the only one.
void run_forward(Problem& problem, Rows& rows, Rows& columns, const UnitRows& unit_rows, const UnitRows& unit_columns,
                 const Gradients* gradients, double upstream) {
  PairArgs& args = problem.args();
  PairSumsMemory row_sums(problem.row_count()), column_sums(problem.column_count());
  args.row_sums = row_sums.pointers();
  args.column_sums = column_sums.pointers();
  PanelMemory memory(args, unit_rows.count(), unit_columns.count(), unit_rows.rows, gradients != nullptr);
  PairWeights row_weights(args.dtype, unit_rows.count()), column_weights(args.dtype, unit_columns.count());
  row_weights.set(args.row);
  column_weights.set(args.column);
  const auto fill = [&](PairWeights& weights, const Rows& known, Span span) {
    weights.fill(
        args, span, [&](int64_t field, int64_t i) { return known[i].statistic(field); },
        [&](int64_t) { return upstream; });
  };
  set_memory(args, memory);
  for_each_panel(args, memory, unit_rows.count(), problem.all_columns(), [&] {
    multiply_panel(args, memory, unit_rows, unit_columns);
    cpu::info_nce_statistics(args);
    if (gradients == nullptr) return;
    const Span span{args.first_row, args.rows};
    for (int64_t i = span.first; i < span.end(); ++i) rows[i] = problem.row(args.row_sums, i);
    fill(row_weights, rows, span);
    if (args.has_columns) {
      for (size_t j = 0; j < columns.size(); ++j) columns[j] = problem.row(args.column_sums, static_cast<int64_t>(j));
      fill(column_weights, columns, {0, unit_columns.count()});
    }
    cpu::info_nce_gradient(args);
    add_gradient_of_panel(args, memory, unit_rows, unit_columns, gradients->row_total(), gradients->column_total());
  });
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = problem.row(args.row_sums, static_cast<int64_t>(i));
  for (size_t j = 0; j < columns.size(); ++j) columns[j] = problem.row(args.column_sums, static_cast<int64_t>(j));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(Tensor query, Tensor key, std::optional<Tensor> log_q,
                                                            std::optional<Tensor> query_ids,
                                                            std::optional<Tensor> key_ids, double temperature,
                                                            bool normalize, bool by_query, bool by_key, int64_t offset,
                                                            int64_t reduction_code, ScalarType loss_type,
                                                            std::vector<bool> with_gradient) {
  constexpr const char* kName = "info_nce";
  const Reduction reduction = reduction_of(reduction_code, kName);
  PYREG_REQUIRE(by_query || by_key, kName, "expected by_query or by_key");
  PYREG_REQUIRE(with_gradient.size() == 2, kName, "expected with_gradient of two");
  const std::optional<Tensor> none;
  const Problem::Side queries{query, query_ids}, keys{key, key_ids};
  Problem problem(kName, by_query ? queries : keys, by_query ? keys : queries, by_query ? log_q : none, temperature,
                  normalize, by_query ? offset : -offset, by_query && by_key);
  const bool is_symmetric = by_query && by_key, has_gradient = with_gradient[0] || with_gradient[1];
  PYREG_REQUIRE(!is_symmetric || (query.size(0) == key.size(0) && offset == 0), kName,
                "expected as many queries as keys and offset 0 for both directions");
  PYREG_REQUIRE(
      !has_gradient || (reduction != Reduction::none && (!is_symmetric || is_one_panel(query.size(0), key.size(0)))),
      kName, "expected with_gradient for a reduced loss of one direction, or of at most ", kOnePanelRows,
      " rows, only");
  const ScalarType type = accumulate_type(problem.dtype());
  Tensor grad_query = empty_gradient(query, with_gradient[0], type);
  Tensor grad_key = empty_gradient(key, with_gradient[1], type);
  Rows rows(static_cast<size_t>(problem.row_count()));
  Rows columns(static_cast<size_t>(is_symmetric ? problem.column_count() : 0));
  const auto divisor = static_cast<double>(rows.size());
  if (problem.row_count() > 0 && problem.column_count() > 0) {
    const UnitRows unit_rows = problem.unit_rows(), unit_columns = problem.unit_columns();
    std::optional<Gradients> gradients;
    if (has_gradient) {
      gradients.emplace(unit_rows, unit_columns, with_gradient[by_query ? 0 : 1], with_gradient[by_query ? 1 : 0]);
    }
    const double upstream = (reduction == Reduction::mean ? 1 / divisor : 1) / (is_symmetric ? 2 : 1);
    run_forward(problem, rows, columns, unit_rows, unit_columns, gradients ? &*gradients : nullptr, upstream);
    if (gradients) {
      gradients->write(problem.args().dtype, by_query ? grad_query : grad_key, by_query ? grad_key : grad_query);
    }
  } else {
    torch::stable::zero_(grad_query);
    torch::stable::zero_(grad_key);
  }
  std::vector<double> losses(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    losses[i] = is_symmetric ? (rows[i].loss + columns[i].loss) / 2 : rows[i].loss;
  }
  Tensor row_statistics = statistics_of(rows, type, query), column_statistics = statistics_of(columns, type, query);
  return {reduce_losses(losses, reduction, divisor, loss_type, query), by_query ? row_statistics : column_statistics,
          by_query ? column_statistics : row_statistics, grad_query, grad_key};
}

std::tuple<Tensor, Tensor> info_nce_backward(Tensor grad_queries, Tensor grad_keys, Tensor query, Tensor key,
                                             std::optional<Tensor> log_q, std::optional<Tensor> query_ids,
                                             std::optional<Tensor> key_ids, Tensor query_statistics,
                                             Tensor key_statistics, double temperature, bool normalize, int64_t offset,
                                             std::vector<bool> needs_grad) {
  constexpr const char* kName = "info_nce_backward";
  PYREG_REQUIRE(needs_grad.size() == 2, kName, "expected needs_grad of two");
  const bool by_query = query_statistics.size(-1) > 0, by_key = key_statistics.size(-1) > 0;
  const std::optional<Tensor> none;
  const Problem::Side queries{query, query_ids}, keys{key, key_ids};
  Problem problem(kName, by_query ? queries : keys, by_query ? keys : queries, by_query ? log_q : none, temperature,
                  normalize, by_query ? offset : -offset, by_query && by_key);
  PairArgs& args = problem.args();
  const auto weights_of = [&](const Tensor& grad, const Tensor& statistics, int64_t count) {
    const ScalarType type = accumulate_type(problem.dtype());
    PYREG_REQUIRE(grad.dim() == 1 && grad.size(0) == count && grad.scalar_type() == type && statistics.dim() == 2 &&
                      statistics.size(0) == 3 && statistics.size(1) == count && statistics.scalar_type() == type,
                  kName, "expected gradients of shape [N] and statistics of shape [3, N] in the accumulation dtype");
    const Numbers upstream(as_contiguous(grad)), known(as_contiguous(statistics));
    PairWeights weights(args.dtype, count);
    weights.fill(
        args, {0, count}, [&](int64_t field, int64_t i) { return known[field * count + i]; },
        [&](int64_t i) { return upstream[i]; });
    return weights;
  };
  Tensor grad_query = empty_gradient(query, needs_grad[0], query.scalar_type());
  Tensor grad_key = empty_gradient(key, needs_grad[1], query.scalar_type());
  if ((!by_query && !by_key) || query.size(0) == 0 || key.size(0) == 0) {
    torch::stable::zero_(grad_query);
    torch::stable::zero_(grad_key);
    return {grad_query, grad_key};
  }
  const PairWeights row_weights = by_query ? weights_of(grad_queries, query_statistics, query.size(0))
                                           : weights_of(grad_keys, key_statistics, key.size(0));
  row_weights.set(args.row);
  std::optional<PairWeights> column_weights;
  if (args.has_columns) {
    column_weights.emplace(weights_of(grad_keys, key_statistics, key.size(0)));
    column_weights->set(args.column);
  }
  const UnitRows rows = problem.unit_rows(), columns = problem.unit_columns();
  PanelMemory memory(args, rows.count(), columns.count(), rows.rows);
  const Gradients gradients(rows, columns, needs_grad[by_query ? 0 : 1], needs_grad[by_query ? 1 : 0]);
  pair_gradient(args, memory, rows, columns, gradients.row_total(), gradients.column_total(), cpu::info_nce_gradient,
                problem.all_columns());
  gradients.write(problem.dtype(), by_query ? grad_query : grad_key, by_query ? grad_key : grad_query);
  return {grad_query, grad_key};
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("info_nce", TORCH_BOX(&info_nce));
  library.impl("info_nce_backward", TORCH_BOX(&info_nce_backward));
}

}  // namespace pyreg

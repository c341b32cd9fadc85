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
    // Scores of the rows' direction lie within 1 / tau of the exponents. Bounded ones share one exponential between both
    // directions, of which only one has log_q.
    const auto [lowest, highest] = set_exponents(log_q);
    args_.is_bounded = normalize && 2 * args_.scale + (highest - lowest) <= kBoundedRange && !(log_q && has_columns);
    args_.shift = args_.scale + highest;
  }

  PairArgs& args() { return args_; }
  Dtype dtype() const { return dtype_; }
  int64_t row_count() const { return row_features_.size(0); }
  int64_t column_count() const { return column_features_.size(0); }
  UnitRows unit_rows() const { return UnitRows(row_features_, dtype_, {}, normalize_); }
  UnitRows unit_columns() const { return UnitRows(column_features_, dtype_, {}, normalize_); }
  auto all_columns() const { return dense_columns(args_, column_count()); }

  // Statistics [3, n] and losses of rows or columns.
  Tensor statistics(const PairSums& sums, int64_t count, std::vector<double>& losses) const {
    Tensor result = empty({3, count}, accumulate_type(dtype_), row_features_);
    losses.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const PairRow row = info_nce_row(sums, i, args_.is_bounded, args_.shift);
      losses[i] = row.loss;
      store_element(result, args_.dtype, i, row.lse);
      store_element(result, args_.dtype, count + i, row.alpha);
      store_element(result, args_.dtype, 2 * count + i, row.beta);
    }
    return result;
  }

 private:
  void set_partners(int64_t offset) {
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
      PYREG_REQUIRE(ids.dim() == 1 && ids.size(0) == count && ids.is_contiguous() &&
                        ids.scalar_type() == ScalarType::Long,
                    name_, "expected contiguous int64 ids, one a row");
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
    double lowest = INFINITY, highest = -INFINITY;
    exponents_ = padded_array(args_.dtype, count, [&](int64_t i) {
      const double exponent = -element(*log_q, i);
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

std::tuple<Tensor, Tensor, Tensor> info_nce(Tensor query, Tensor key, std::optional<Tensor> log_q,
                                            std::optional<Tensor> query_ids, std::optional<Tensor> key_ids,
                                            double temperature, bool normalize, bool by_query, bool by_key,
                                            int64_t offset, int64_t reduction, ScalarType loss_type) {
  constexpr const char* kName = "info_nce";
  PYREG_REQUIRE(by_query || by_key, kName, "expected by_query or by_key");
  const std::optional<Tensor> none;
  const Problem::Side queries{query, query_ids}, keys{key, key_ids};
  Problem problem(kName, by_query ? queries : keys, by_query ? keys : queries, by_query ? log_q : none,
                  temperature, normalize, by_query ? offset : -offset, by_query && by_key);
  PYREG_REQUIRE(!(by_query && by_key) || (query.size(0) == key.size(0) && offset == 0), kName,
                "expected as many queries as keys and offset 0 for both directions");
  PairArgs& args = problem.args();
  PairSumsMemory row_sums(problem.row_count()), column_sums(problem.column_count());
  args.row_sums = row_sums.pointers();
  args.column_sums = column_sums.pointers();
  if (problem.row_count() > 0 && problem.column_count() > 0) {
    const UnitRows rows = problem.unit_rows(), columns = problem.unit_columns();
    PanelMemory memory(args, rows.count(), columns.count(), rows.rows);
    pair_statistics(args, memory, rows, columns, cpu::info_nce_statistics, problem.all_columns());
  }
  std::vector<double> losses, column_losses;
  Tensor row_statistics = problem.statistics(args.row_sums, problem.row_count(), losses);
  Tensor column_statistics =
      problem.statistics(args.column_sums, args.has_columns ? problem.column_count() : 0, column_losses);
  for (size_t i = 0; i < column_losses.size(); ++i) losses[i] = (losses[i] + column_losses[i]) / 2;
  const auto divisor = static_cast<double>(losses.size());
  return {reduce_losses(losses, reduction, divisor, loss_type, query), by_query ? row_statistics : column_statistics,
          by_query ? column_statistics : row_statistics};
}

std::tuple<Tensor, Tensor> info_nce_backward(Tensor grad_queries, Tensor grad_keys, Tensor query, Tensor key,
                                             std::optional<Tensor> log_q, std::optional<Tensor> query_ids,
                                             std::optional<Tensor> key_ids, Tensor query_statistics,
                                             Tensor key_statistics, double temperature, bool normalize,
                                             int64_t offset, std::vector<bool> needs_grad) {
  constexpr const char* kName = "info_nce_backward";
  PYREG_REQUIRE(needs_grad.size() == 2, kName, "expected needs_grad of two");
  const bool by_query = query_statistics.size(-1) > 0, by_key = key_statistics.size(-1) > 0;
  const std::optional<Tensor> none;
  const Problem::Side queries{query, query_ids}, keys{key, key_ids};
  Problem problem(kName, by_query ? queries : keys, by_query ? keys : queries, by_query ? log_q : none,
                  temperature, normalize, by_query ? offset : -offset, by_query && by_key);
  PairArgs& args = problem.args();
  const auto weights_of = [&](const Tensor& grad, const Tensor& statistics, int64_t count) {
    const ScalarType type = accumulate_type(problem.dtype());
    PYREG_REQUIRE(grad.dim() == 1 && grad.size(0) == count && grad.scalar_type() == type && statistics.dim() == 2 &&
                      statistics.size(0) == 3 && statistics.size(1) == count && statistics.scalar_type() == type,
                  kName, "expected gradients of shape [N] and statistics of shape [3, N] in the accumulation dtype");
    const Tensor upstream = as_contiguous(grad), known = as_contiguous(statistics);
    return PairWeights(
        args, count, [&](int64_t field, int64_t i) { return element(known, field * count + i); },
        [&](int64_t i) { return element(upstream, i); });
  };
  const Tensor& features = query;
  const auto gradient_like = [&](const Tensor& tensor, bool is_needed) {
    return is_needed ? empty({tensor.size(0), tensor.size(1)}, features.scalar_type(), features)
                     : empty({0}, features.scalar_type(), features);
  };
  Tensor grad_query = gradient_like(query, needs_grad[0]), grad_key = gradient_like(key, needs_grad[1]);
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
  const bool needs_rows = needs_grad[by_query ? 0 : 1], needs_columns = needs_grad[by_query ? 1 : 0];
  std::optional<Tensor> row_total, column_total;
  if (needs_rows) row_total = zeros_like_rows(rows);
  if (needs_columns) column_total = zeros_like_rows(columns);
  pair_gradient(args, memory, rows, columns, row_total ? &*row_total : nullptr,
                column_total ? &*column_total : nullptr, cpu::info_nce_gradient, problem.all_columns());
  if (row_total) rows.backward(*row_total, problem.dtype(), 0, by_query ? grad_query : grad_key);
  if (column_total) columns.backward(*column_total, problem.dtype(), 0, by_query ? grad_key : grad_query);
  return {grad_query, grad_key};
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("info_nce", TORCH_BOX(&info_nce));
  library.impl("info_nce_backward", TORCH_BOX(&info_nce_backward));
}

}  // namespace pyreg

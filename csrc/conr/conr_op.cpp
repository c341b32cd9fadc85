// ConR's operators on the CPU: rows in the order of their labels, tiles of their pairs, results in the caller's order.
//
// In that order positives are a band around the diagonal, and the targets and predictions of a block of rows lie within
// bounds. Where the bounds of rows and columns are further apart than the window, in targets and in predictions, no pair
// of them is positive or negative: the block's products and exponentials are left out.
#include <cmath>
#include <optional>

#include "conr/conr.h"
#include "core/pair_tiles.h"

namespace pyreg {

namespace {

constexpr int64_t kBlockColumns = 64;  // that have bounds together

// Bounds of consecutive rows, for each of K labels.
struct Bounds {
  std::vector<double> low, high;
};

class Problem {
 public:
  Problem(const char* name, const Tensor& features, const Tensor& targets, const Tensor& preds,
          const std::optional<Tensor>& weights, double window, double temperature, double eta, int64_t variant,
          int64_t label_norm, int64_t first_row, int64_t row_count)
      : name_(name), count_(features.size(0)), labels_(targets.size(1)), first_row_(first_row), row_count_(row_count),
        features_(as_contiguous(features)), dtype_(dtype_of(features.scalar_type(), name)),
        targets_(targets), preds_(preds), weights_(weights), variant_(static_cast<ConrVariant>(variant)) {
    check(variant, label_norm, temperature);
    args_.dtype = accumulate(dtype_);
    args_.label_dtype = dtype_of(targets.scalar_type(), name);
    args_.labels = labels_;
    args_.label_norm = static_cast<int32_t>(label_norm);
    args_.window = window;
    args_.scale = 1 / temperature;
    args_.is_upper = row_count == count_;
    const bool is_linear = variant_ == ConrVariant::nyud2;
    args_.push_rate = is_linear ? 0 : eta;
    args_.push_constant = is_linear ? 0 : 1;
    args_.push_slope = is_linear ? eta : 0;
    sort();
    fill_arrays();
    choose_shift();
  }

  PairArgs& args() { return args_; }
  ConrVariant variant() const { return variant_; }
  int64_t count() const { return count_; }
  int64_t row_count() const { return row_count_; }
  Dtype dtype() const { return dtype_; }
  const Tensor& features() const { return features_; }
  // Where the i-th row and column of the tiles come from.
  int64_t row_source(int64_t i) const { return column_source(row_partner_.empty() ? i : row_partner_[i]); }
  int64_t column_source(int64_t i) const { return order_.empty() ? i : order_[i]; }
  double weight(int64_t source) const { return weights_ ? element(*weights_, source) : 1; }

  UnitRows unit_columns() const { return UnitRows(features_, dtype_, order_, true); }
  UnitRows unit_rows() const {
    std::vector<int64_t> sources(static_cast<size_t>(row_count_));
    for (int64_t i = 0; i < row_count_; ++i) sources[i] = row_source(i);
    return UnitRows(features_, dtype_, std::move(sources), true);
  }

  // The columns that may hold a pair of some rows.
  std::vector<Span> columns_for(Span rows) const {
    const int64_t begin = args_.is_upper ? rows.first : 0;
    if (order_.empty()) return {Span{begin, count_ - begin}};
    const Bounds target = row_bounds(targets_, rows), pred = row_bounds(preds_, rows);
    std::vector<Span> spans;
    for (int64_t block = begin / kBlockColumns; block * kBlockColumns < count_; ++block) {
      if (gap(target, target_blocks_[block]) > reach_ && gap(pred, pred_blocks_[block]) > reach_) continue;
      const int64_t first = std::max(begin, block * kBlockColumns);
      const int64_t end = std::min(count_, (block + 1) * kBlockColumns);
      if (!spans.empty() && spans.back().end() == first) {
        spans.back().count += end - first;
      } else {
        spans.push_back({first, end - first});
      }
    }
    return spans;
  }

 private:
  void check(int64_t variant, int64_t label_norm, double temperature) const {
    PYREG_REQUIRE(features_.dim() == 2 && features_.size(1) > 0, name_, "expected features of shape [N, D]");
    PYREG_REQUIRE(targets_.dim() == 2 && targets_.size(0) == count_ && labels_ > 0 && targets_.is_contiguous(), name_,
                  "expected contiguous targets of shape [N, K]");
    PYREG_REQUIRE(preds_.dim() == 2 && preds_.size(0) == count_ && preds_.size(1) == labels_ &&
                      preds_.is_contiguous() && preds_.scalar_type() == targets_.scalar_type(),
                  name_, "expected contiguous preds of the targets' shape and dtype");
    const bool is_double = targets_.scalar_type() == ScalarType::Double;
    PYREG_REQUIRE(is_double || (targets_.scalar_type() == ScalarType::Float && dtype_ != Dtype::float64), name_,
                  "expected float64 targets and preds, or float32 ones beside features that are not float64");
    PYREG_REQUIRE(!weights_ || (weights_->dim() == 1 && weights_->size(0) == count_ && weights_->is_contiguous() &&
                                weights_->scalar_type() == accumulate_type(dtype_)),
                  name_, "expected weights of shape [N] in the features' accumulation dtype");
    PYREG_REQUIRE(first_row_ >= 0 && row_count_ >= 0 && first_row_ + row_count_ <= count_, name_,
                  "expected rows within the features'");
    PYREG_REQUIRE(variant >= 0 && variant <= 2 && label_norm >= 0 && label_norm <= 2, name_,
                  "expected variant and label_norm to be 0, 1 or 2");
    PYREG_REQUIRE(temperature > 0, name_, "expected a positive temperature");
  }

  void sort() {
    if (count_ > kOnePanelRows) {
      order_.resize(static_cast<size_t>(count_));
      std::iota(order_.begin(), order_.end(), 0);
      std::vector<std::array<double, 2>> keys(order_.size());
      for (int64_t i = 0; i < count_; ++i) keys[i] = {element(targets_, i * labels_), element(preds_, i * labels_)};
      // NaN has no place in an order of numbers: last.
      const auto key = [&](int64_t i, int k) { return std::isnan(keys[i][k]) ? INFINITY : keys[i][k]; };
      std::sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) {
        if (key(i, 0) != key(j, 0)) return key(i, 0) < key(j, 0);
        if (key(i, 1) != key(j, 1)) return key(i, 1) < key(j, 1);
        return i < j;
      });
    }
    if (!args_.is_upper) {
      for (int64_t i = 0; i < count_; ++i) {
        if (column_source(i) >= first_row_ && column_source(i) < first_row_ + row_count_) row_partner_.push_back(i);
      }
    }
  }

  void fill_arrays() {
    const auto fill = [&](PairSide& side, std::array<std::vector<char>, 3>& memory, int64_t count, auto source) {
      const int64_t stride = count + kPairPadding;
      const auto labels_of = [&](const Tensor& labels) {
        return padded_array(args_.label_dtype, stride * labels_ - kPairPadding, [&](int64_t at) {
          const int64_t i = std::min(at % stride, count - 1);
          return element(labels, source(i) * labels_ + at / stride);
        });
      };
      memory = {labels_of(targets_), labels_of(preds_),
                padded_array(args_.dtype, count, [&](int64_t i) { return weight(source(i)); })};
      side.targets = memory[0].data();
      side.preds = memory[1].data();
      side.weights = memory[2].data();
      side.label_stride = stride;
    };
    if (count_ == 0) return;
    fill(args_.column, column_memory_, count_, [&](int64_t i) { return column_source(i); });
    args_.row = args_.column;
    if (!args_.is_upper && row_count_ > 0) {
      fill(args_.row, row_memory_, row_count_, [&](int64_t i) { return row_source(i); });
      args_.row.partner = row_partner_.data();
    }
    if (order_.empty()) return;
    for (int64_t first = 0; first < count_; first += kBlockColumns) {
      const Span span{first, std::min(kBlockColumns, count_ - first)};
      target_blocks_.push_back(bounds(targets_, span, [&](int64_t i) { return column_source(i); }));
      pred_blocks_.push_back(bounds(preds_, span, [&](int64_t i) { return column_source(i); }));
    }
    // A distance is rounded a few times where it is compared: bounds are held against a little more than the window.
    reach_ = args_.window * (1 + 1e-5 * static_cast<double>(labels_));
  }

  template <typename Source>
  Bounds bounds(const Tensor& labels, Span span, Source&& source) const {
    Bounds result{std::vector<double>(labels_, INFINITY), std::vector<double>(labels_, -INFINITY)};
    for (int64_t i = span.first; i < span.end(); ++i) {
      for (int64_t k = 0; k < labels_; ++k) {
        const double value = element(labels, source(i) * labels_ + k);
        result.low[k] = std::fmin(result.low[k], value);
        result.high[k] = std::fmax(result.high[k], value);
      }
    }
    return result;
  }

  Bounds row_bounds(const Tensor& labels, Span rows) const {
    return bounds(labels, rows, [&](int64_t i) { return row_source(i); });
  }

  // No pair is closer.
  double gap(const Bounds& a, const Bounds& b) const {
    std::vector<double> gaps(static_cast<size_t>(labels_));
    for (int64_t k = 0; k < labels_; ++k) {
      gaps[k] = std::max({a.low[k] - b.high[k], b.low[k] - a.high[k], 0.0});
    }
    return norm(gaps);
  }

  double norm(const std::vector<double>& values) const {
    double sum = 0, largest = 0, squares = 0;
    for (const double value : values) {
      sum += value;
      squares += value * value;
      largest = std::max(largest, value);
    }
    return args_.label_norm == 1 ? sum : args_.label_norm == 2 ? std::sqrt(squares) : largest;
  }

  // Scores lie within 1 / tau of 0, pushes add 0 to push_rate times the widest distance.
  void choose_shift() {
    double widest = 0;
    if (count_ > 0) {
      const Bounds all = bounds(targets_, {0, count_}, [](int64_t i) { return i; });
      std::vector<double> widths(static_cast<size_t>(labels_));
      for (int64_t k = 0; k < labels_; ++k) widths[k] = all.high[k] - all.low[k];
      widest = norm(widths);
    }
    const double push = args_.push_rate * widest;
    args_.shift = args_.scale + std::fmax(push, 0);
    args_.is_bounded = 2 * args_.scale + std::abs(push) <= kBoundedRange;
  }

  const char* name_;
  int64_t count_, labels_, first_row_, row_count_;
  Tensor features_;
  Dtype dtype_;
  const Tensor& targets_;
  const Tensor& preds_;
  const std::optional<Tensor>& weights_;
  ConrVariant variant_;
  PairArgs args_{};
  std::vector<int64_t> order_, row_partner_;
  std::array<std::vector<char>, 3> column_memory_, row_memory_;
  std::vector<Bounds> target_blocks_, pred_blocks_;
  double reach_ = 0;
};

using Result = std::tuple<Tensor, Tensor, Tensor>;

// The gradient of all rows' features from that of their scores' panels.
template <typename Statistics, typename Upstream>
void set_weights(PairArgs& args, std::vector<PairWeights>& memory, Problem& problem, Statistics&& statistics,
                 Upstream&& upstream) {
  memory.reserve(2);
  memory.emplace_back(
      args, problem.count(), [&](int64_t field, int64_t i) { return statistics(field, problem.column_source(i)); },
      [&](int64_t i) { return upstream(problem.column_source(i)); });
  memory[0].set(args.column);
  if (args.is_upper) {
    memory[0].set(args.row);
    return;
  }
  memory.emplace_back(
      args, problem.row_count(), [&](int64_t field, int64_t i) { return statistics(field, problem.row_source(i)); },
      [&](int64_t i) { return upstream(problem.row_source(i)); });
  memory[1].set(args.row);
}

Result conr(Tensor features, Tensor targets, Tensor preds, std::optional<Tensor> weights, double window,
            double temperature, double eta, int64_t variant, int64_t label_norm, int64_t reduction,
            ScalarType loss_type, int64_t first_row, int64_t row_count, bool with_gradient) {
  constexpr const char* kName = "conr";
  Problem problem(kName, features, targets, preds, weights, window, temperature, eta, variant, label_norm, first_row,
                  row_count);
  PairArgs& args = problem.args();
  const bool is_mean = static_cast<Reduction>(reduction) == Reduction::mean;
  PYREG_REQUIRE(!with_gradient || (args.is_upper && problem.count() <= kOnePanelRows &&
                                   static_cast<Reduction>(reduction) != Reduction::none),
                kName, "expected with_gradient for at most ", kOnePanelRows, " rows and a reduced loss only");
  const ScalarType type = accumulate_type(problem.dtype());
  std::vector<double> losses(static_cast<size_t>(row_count));
  std::vector<PairRow> rows(losses.size());
  Tensor statistics = empty({3, row_count}, type, features);
  const bool keeps_dtype = problem.dtype() == Dtype::float64 || problem.dtype() == Dtype::float32;
  Tensor gradient = empty({0}, keeps_dtype ? features.scalar_type() : type, features);
  if (row_count > 0) {
    PairSumsMemory sums(row_count);
    args.row_sums = args.column_sums = sums.pointers();
    args.has_columns = args.is_upper;
    const UnitRows columns = problem.unit_columns();
    const std::optional<UnitRows> own_rows = args.is_upper ? std::nullopt : std::optional(problem.unit_rows());
    const UnitRows& unit_rows = own_rows ? *own_rows : columns;
    PanelMemory memory(args, row_count, problem.count(), columns.rows);
    pair_statistics(args, memory, unit_rows, columns, cpu::conr_statistics,
                    [&](Span span) { return problem.columns_for(span); });
    const double divisor = is_mean ? static_cast<double>(problem.count()) : 1;
    for (int64_t i = 0; i < row_count; ++i) {
      const int64_t source = problem.row_source(i), at = source - first_row;
      rows[at] = conr_row(args.row_sums, i, args.is_bounded, args.shift, problem.weight(source), problem.variant(),
                          problem.count());
      losses[at] = rows[at].loss;
    }
    if (with_gradient) {
      std::vector<PairWeights> pair_weights;
      set_weights(
          args, pair_weights, problem,
          [&](int64_t field, int64_t i) { return field == 0 ? rows[i].lse : field == 1 ? rows[i].alpha : rows[i].beta; },
          [&](int64_t) { return 1 / divisor; });
      args.has_columns = true;
      cpu::conr_gradient(args);
      const Tensor total = zeros_like_rows(columns);
      add_gradient_of_panel(args, memory, columns, columns, &total, &total);
      gradient = columns.features_gradient(total, gradient.scalar_type(), accumulate(problem.dtype()), 0);
    }
  }
  const Dtype statistics_dtype = accumulate(problem.dtype());
  for (int64_t i = 0; i < row_count; ++i) {
    store_element(statistics, statistics_dtype, i, rows[i].lse);
    store_element(statistics, statistics_dtype, row_count + i, rows[i].alpha);
    store_element(statistics, statistics_dtype, 2 * row_count + i, rows[i].beta);
  }
  return {reduce_losses(losses, reduction, static_cast<double>(problem.count()), loss_type, features), statistics,
          gradient};
}

Tensor conr_backward(Tensor grad_rows, Tensor features, Tensor targets, Tensor preds, std::optional<Tensor> weights,
                     Tensor statistics, double window, double temperature, double eta, int64_t variant,
                     int64_t label_norm, int64_t first_row, int64_t row_count) {
  constexpr const char* kName = "conr_backward";
  Problem problem(kName, features, targets, preds, weights, window, temperature, eta, variant, label_norm, first_row,
                  row_count);
  const int64_t count = problem.count();
  const ScalarType type = accumulate_type(problem.dtype());
  PYREG_REQUIRE(grad_rows.dim() == 1 && grad_rows.size(0) == count && grad_rows.scalar_type() == type, kName,
                "expected grad_rows of shape [N] in the features' accumulation dtype");
  PYREG_REQUIRE(statistics.dim() == 2 && statistics.size(0) == 3 && statistics.size(1) == count &&
                    statistics.scalar_type() == type,
                kName, "expected statistics of shape [3, N] in the features' accumulation dtype");
  if (row_count == 0) return empty({0, features.size(1)}, features.scalar_type(), features);
  const Tensor upstream = as_contiguous(grad_rows), known = as_contiguous(statistics);
  PairArgs& args = problem.args();
  std::vector<PairWeights> pair_weights;
  set_weights(
      args, pair_weights, problem, [&](int64_t field, int64_t i) { return element(known, field * count + i); },
      [&](int64_t i) { return element(upstream, i); });
  args.has_columns = true;
  const UnitRows columns = problem.unit_columns();
  const std::optional<UnitRows> own_rows = args.is_upper ? std::nullopt : std::optional(problem.unit_rows());
  const UnitRows& rows = own_rows ? *own_rows : columns;
  PanelMemory memory(args, row_count, count, columns.rows);
  const Tensor total = zeros_like_rows(rows);
  pair_gradient(args, memory, rows, columns, &total, args.is_upper ? &total : nullptr, cpu::conr_gradient,
                [&](Span span) { return problem.columns_for(span); });
  return rows.features_gradient(total, features.scalar_type(), problem.dtype(), first_row);
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("conr", TORCH_BOX(&conr));
  library.impl("conr_backward", TORCH_BOX(&conr_backward));
}

}  // namespace pyreg

// ConR's operators on the CPU: rows in the order of their labels, tiles of their pairs, results in the caller's order.
//
// In that order positives are a band around the diagonal, and the targets and predictions of a block of rows lie within
// bounds. Where the bounds of rows and columns are further apart than the window, in targets and in predictions, no
// pair of them is positive or negative: the block's products and exponentials are left out.
#include <cmath>

#include "conr/conr.h"
#include "core/self_pairs.h"

namespace pyreg {

namespace {

constexpr int64_t kBlockColumns = 64;  // that have bounds together

// An exponent carries as many roundings as its distance from the shift is large: rows without far negatives do not pay
// for those that have them.
constexpr double kBoundedPush = 8;

// Of consecutive rows, for each of K labels.
struct Bounds {
  std::vector<double> low, high;
};

// Targets or predictions: [N, K].
class Labels {
 public:
  Labels(const Tensor& labels, int32_t norm)
      : labels_(labels), dtype_(dtype_of(labels.scalar_type(), "conr")), count_(labels.size(1)), norm_(norm) {}

  Dtype dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  double at(int64_t source, int64_t k) const { return labels_[source * count_ + k]; }

  // [K, count + padding]
  template <typename Source>
  std::vector<char> array(int64_t count, Source&& source) const {
    const int64_t stride = count + kPairPadding;
    return padded_array(dtype_, count == 0 ? 0 : stride * count_ - kPairPadding,
                        [&](int64_t i) { return at(source(std::min(i % stride, count - 1)), i / stride); });
  }

  template <typename Source>
  Bounds bounds(Span rows, Source&& source) const {
    Bounds result{std::vector<double>(count_, INFINITY), std::vector<double>(count_, -INFINITY)};
    for (int64_t i = rows.first; i < rows.end(); ++i) {
      for (int64_t k = 0; k < count_; ++k) {
        result.low[k] = std::fmin(result.low[k], at(source(i), k));
        result.high[k] = std::fmax(result.high[k], at(source(i), k));
      }
    }
    return result;
  }

  // No two rows within these bounds are closer.
  double gap(const Bounds& a, const Bounds& b) const {
    Norm gap{norm_};
    for (int64_t k = 0; k < count_; ++k) gap.add(std::max({a.low[k] - b.high[k], b.low[k] - a.high[k], 0.0}));
    return gap.value();
  }

  double width(const Bounds& bounds) const {
    Norm width{norm_};
    for (int64_t k = 0; k < count_; ++k) width.add(bounds.high[k] - bounds.low[k]);
    return width.value();
  }

 private:
  struct Norm {
    int32_t norm;
    double total = 0;
    void add(double x) { total = norm == 1 ? total + x : norm == 2 ? total + x * x : std::max(total, x); }
    double value() const { return norm == 2 ? std::sqrt(total) : total; }
  };

  Numbers labels_;
  Dtype dtype_;
  int64_t count_;
  int32_t norm_;
};

struct Options {
  double window, temperature, eta;
  int64_t variant, label_norm, first_row, row_count;
};

class Problem : public SelfPairs {
 public:
  static constexpr auto statistics_kernel = cpu::conr_statistics;
  static constexpr auto gradient_kernel = cpu::conr_gradient;

  Problem(const char* name, const Tensor& features, const Tensor& targets, const Tensor& preds,
          const std::optional<Tensor>& weights, const Options& options)
      : SelfPairs(name, features, true, options.temperature, options.first_row, options.row_count),
        weights_(weights ? std::optional<Numbers>(*weights) : std::nullopt),
        variant_(static_cast<ConrVariant>(options.variant)),
        targets_(checked_labels(targets, targets), static_cast<int32_t>(options.label_norm)),
        preds_(checked_labels(preds, targets), static_cast<int32_t>(options.label_norm)) {
    PYREG_REQUIRE(!weights || (weights->dim() == 1 && weights->size(0) == count() && weights->is_contiguous() &&
                               weights->scalar_type() == accumulate_type(dtype())),
                  name, "expected contiguous weights of shape [N] in the features' accumulation dtype");
    PYREG_REQUIRE(options.variant >= 0 && options.variant <= 2 && options.label_norm >= 0 && options.label_norm <= 2,
                  name, "expected variant and label_norm to be 0, 1 or 2");
    args_.label_dtype = targets_.dtype();
    args_.labels = targets_.count();
    args_.label_norm = static_cast<int32_t>(options.label_norm);
    args_.window = options.window;
    const bool is_linear = variant_ == ConrVariant::nyud2;
    args_.push_rate = is_linear ? 0 : options.eta;
    args_.push_constant = is_linear ? 0 : 1;
    args_.push_slope = is_linear ? options.eta : 0;
    set_order(count() > kOnePanelRows ? order_of_labels() : std::vector<int64_t>{});
    fill_sides([&](PairSide& side, int64_t count, auto source) {
      side.targets = keep(targets_.array(count, source));
      side.preds = keep(preds_.array(count, source));
      side.label_stride = count + kPairPadding;
      side.weights = keep(padded_array(args_.dtype, count, [&](int64_t i) { return weight(source(i)); }));
    });
    find_bounds();
    choose_shift();
  }

  PairRow row(const PairSums& sums, int64_t i) const {
    return conr_row(sums, i, args_.is_bounded, args_.shift, weight(row_source(i)), variant_, count());
  }

  double divisor(const std::vector<PairRow>&) const { return static_cast<double>(count()); }

  std::vector<Span> columns_for(Span rows) const {
    const int64_t begin = args_.is_upper ? rows.first : 0;
    if (!is_ordered()) return {Span{begin, count() - begin}};
    const auto source = [this](int64_t i) { return row_source(i); };
    const Bounds target = targets_.bounds(rows, source), pred = preds_.bounds(rows, source);
    std::vector<Span> spans;
    for (int64_t block = begin / kBlockColumns; block * kBlockColumns < count(); ++block) {
      // A panel starts with its square on the diagonal, even if all of its labels are NaN.
      const bool is_diagonal = args_.is_upper && block * kBlockColumns < rows.end();
      const bool is_empty = !is_diagonal && targets_.gap(target, target_blocks_[block]) > reach_ &&
                            preds_.gap(pred, pred_blocks_[block]) > reach_;
      if (is_empty) continue;
      const int64_t first = std::max(begin, block * kBlockColumns);
      const int64_t end = std::min(count(), (block + 1) * kBlockColumns);
      if (!spans.empty() && spans.back().end() == first) {
        spans.back().count += end - first;
      } else {
        spans.push_back({first, end - first});
      }
    }
    return spans;
  }

 private:
  const Tensor& checked_labels(const Tensor& labels, const Tensor& targets) const {
    PYREG_REQUIRE(labels.dim() == 2 && labels.size(0) == count() && labels.size(1) > 0 &&
                      labels.size(1) == targets.size(1) && labels.is_contiguous() &&
                      labels.scalar_type() == targets.scalar_type(),
                  name(), "expected contiguous targets and preds of one shape [N, K] and dtype");
    PYREG_REQUIRE(labels.scalar_type() == ScalarType::Double ||
                      (labels.scalar_type() == ScalarType::Float && dtype() != Dtype::float64),
                  name(), "expected float64 targets and preds, or float32 ones beside features that are not float64");
    return labels;
  }

  double weight(int64_t source) const { return weights_ ? (*weights_)[source] : 1; }

  // By the first label, then by its prediction, so that bounds are narrow in both; NaN, which has no place, last.
  std::vector<int64_t> order_of_labels() const {
    std::vector<int64_t> order(static_cast<size_t>(count()));
    std::iota(order.begin(), order.end(), 0);
    const auto key = [](const Labels& labels, int64_t i) {
      const double label = labels.at(i, 0);
      return std::isnan(label) ? INFINITY : label;
    };
    std::vector<std::array<double, 2>> keys(order.size());
    for (int64_t i = 0; i < count(); ++i) keys[i] = {key(targets_, i), key(preds_, i)};
    std::sort(order.begin(), order.end(),
              [&](int64_t i, int64_t j) { return keys[i] != keys[j] ? keys[i] < keys[j] : i < j; });
    return order;
  }

  void find_bounds() {
    // A distance is rounded a few times before it is compared: bounds are held against a little more than the window.
    reach_ = args_.window * (1 + 1e-5 * static_cast<double>(args_.labels));
    if (!is_ordered()) return;
    const auto source = [this](int64_t i) { return column_source(i); };
    for (int64_t first = 0; first < count(); first += kBlockColumns) {
      const Span span{first, std::min(kBlockColumns, count() - first)};
      target_blocks_.push_back(targets_.bounds(span, source));
      pred_blocks_.push_back(preds_.bounds(span, source));
    }
  }

  // Scores lie within 1 / tau of 0, pushes add 0 to push_rate times the widest distance.
  void choose_shift() {
    const Bounds all = targets_.bounds({0, count()}, [](int64_t i) { return i; });
    const double push = count() > 0 ? args_.push_rate * targets_.width(all) : 0;
    set_shift(args_, args_.scale + std::fmax(push, 0));
    args_.is_bounded = 2 * args_.scale + std::abs(push) <= kBoundedRange && std::abs(push) <= kBoundedPush;
  }

  std::optional<Numbers> weights_;
  ConrVariant variant_;
  Labels targets_, preds_;
  std::vector<Bounds> target_blocks_, pred_blocks_;
  double reach_ = 0;
};

std::tuple<Tensor, Tensor, Tensor> conr(Tensor features, Tensor targets, Tensor preds, std::optional<Tensor> weights,
                                        double window, double temperature, double eta, int64_t variant,
                                        int64_t label_norm, int64_t reduction, ScalarType loss_type, int64_t first_row,
                                        int64_t row_count, bool with_gradient) {
  Problem problem("conr", features, targets, preds, weights,
                  {window, temperature, eta, variant, label_norm, first_row, row_count});
  return self_pairs_forward(problem, reduction, loss_type, with_gradient);
}

Tensor conr_backward(Tensor grad_rows, Tensor features, Tensor targets, Tensor preds, std::optional<Tensor> weights,
                     Tensor statistics, double window, double temperature, double eta, int64_t variant,
                     int64_t label_norm, int64_t first_row, int64_t row_count) {
  Problem problem("conr_backward", features, targets, preds, weights,
                  {window, temperature, eta, variant, label_norm, first_row, row_count});
  return self_pairs_backward(problem, grad_rows, statistics);
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("conr", TORCH_BOX(&conr));
  library.impl("conr_backward", TORCH_BOX(&conr_backward));
}

}  // namespace pyreg

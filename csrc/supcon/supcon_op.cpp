// SupCon's operators on the CPU: tiles of all pairs, on and above the diagonal where all rows are asked for.
#include "supcon/supcon.h"

#include "core/self_pairs.h"

namespace pyreg {

namespace {

class Problem : public SelfPairs {
 public:
  static constexpr auto statistics_kernel = cpu::supcon_statistics;
  static constexpr auto gradient_kernel = cpu::supcon_gradient;

  Problem(const char* name, const Tensor& features, const Tensor& labels, double temperature, bool normalize,
          int64_t first_row, int64_t row_count)
      : SelfPairs(name, features, normalize, temperature, first_row, row_count) {
    PYREG_REQUIRE(labels.dim() == 1 && labels.size(0) == count() && labels.is_contiguous() &&
                      labels.scalar_type() == ScalarType::Long,
                  name, "expected contiguous int64 labels of shape [N]");
    const std::span values(static_cast<const int64_t*>(labels.const_data_ptr()), static_cast<size_t>(count()));
    const Codes codes{values};
    set_order({});
    fill_sides([&](PairSide& side, int64_t count, auto source) {
      const int64_t first = count > 0 ? source(0) : 0;  // the rows asked for are consecutive
      side.codes = keep(codes.array(args_.dtype, values.subspan(first, count)));
    });
    set_shift(args_, args_.scale);
    args_.is_bounded = normalize && 2 * args_.scale <= kBoundedRange;
  }

  PairRow row(const PairSums& sums, int64_t i) const { return supcon_row(sums, i, args_.is_bounded, args_.shift); }

  double divisor(const std::vector<PairRow>& rows) const {
    const auto active = std::count_if(rows.begin(), rows.end(), [](const PairRow& row) { return row.alpha != 0; });
    return std::max(static_cast<double>(active), 1.0);
  }

  auto columns_for(Span rows) const { return dense_columns(args_, count())(rows); }
};

std::tuple<Tensor, Tensor, Tensor> supcon(Tensor features, Tensor labels, double temperature, bool normalize,
                                          int64_t reduction, ScalarType loss_type, int64_t first_row, int64_t row_count,
                                          bool with_gradient) {
  Problem problem("supcon", features, labels, temperature, normalize, first_row, row_count);
  return self_pairs_forward(problem, reduction, loss_type, with_gradient);
}

Tensor supcon_backward(Tensor grad_rows, Tensor features, Tensor labels, Tensor statistics, double temperature,
                       bool normalize, int64_t first_row, int64_t row_count) {
  Problem problem("supcon_backward", features, labels, temperature, normalize, first_row, row_count);
  return self_pairs_backward(problem, grad_rows, statistics);
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("supcon", TORCH_BOX(&supcon));
  library.impl("supcon_backward", TORCH_BOX(&supcon_backward));
}

}  // namespace pyreg

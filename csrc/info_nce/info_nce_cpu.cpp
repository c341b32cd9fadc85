// CPU kernels of InfoNCE: a row has one positive, and every pair counts but those that share an id. Formulas:
// info_nce.h, core/pairs.h; passes: core/pair_passes.h.
#include "info_nce/info_nce.h"

#include "core/pair_passes.h"

namespace pyreg::PYREG_ISA {

namespace {

template <typename Scores>
struct InfoNcePairs {
  using A = Scores;
  static constexpr bool kMayBeEmpty = false, kCountsNegatives = false;

  struct Row {
    Code<A> partner, id;
  };

  explicit InfoNcePairs(const PairArgs& args) : row_(args.row), column_(args.column) {}

  Row row(int64_t i) const {
    return {static_cast<Code<A>>(row_.partner[i]), row_.codes ? static_cast<const Code<A>*>(row_.codes)[i] : 0};
  }

  PairTerms<A> terms(const Row& row, int64_t j, Mask<A> valid) const {
    const Mask<A> positive = valid & (lane_index<A>() + static_cast<Code<A>>(j) == row.partner);
    Mask<A> active = valid;
    if (column_.codes) active &= positive | (load_codes<A>(static_cast<const Code<A>*>(column_.codes) + j) != row.id);
    const Vector<A> none{}, one = broadcast(A(1));
    const Vector<A> exponent = column_.exponents ? load(static_cast<const A*>(column_.exponents) + j) : none;
    return {active, positive, exponent, none, one, one};
  }

 private:
  const PairSide& row_;
  const PairSide& column_;
};

}  // namespace

void info_nce_statistics(const PairArgs& args) {
  dispatch_scores<InfoNcePairs>(args, [&](auto pairs) { run_pair_statistics<typename decltype(pairs)::type>(args); });
}

void info_nce_gradient(const PairArgs& args) {
  dispatch_scores<InfoNcePairs>(args, [&](auto pairs) { run_pair_gradient<typename decltype(pairs)::type>(args); });
}

}  // namespace pyreg::PYREG_ISA

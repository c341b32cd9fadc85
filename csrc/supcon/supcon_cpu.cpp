// CPU kernels of SupCon: all pairs count, those of one class are positive. Formulas: supcon.h, core/pairs.h; passes:
// core/pair_passes.h.
#include "supcon/supcon.h"

#include "core/pair_passes.h"

namespace pyreg::PYREG_ISA {

namespace {

template <typename Scores>
struct SupconPairs {
  using A = Scores;
  static constexpr bool kMayBeEmpty = false, kCountsNegatives = false;

  struct Row {
    Code<A> label, self;
  };

  explicit SupconPairs(const PairArgs& args)
      : rows(static_cast<const Code<A>*>(args.row.codes)),
        columns(static_cast<const Code<A>*>(args.column.codes)),
        selves(args.row.partner) {}

  Row row(int64_t i) const { return {rows[i], static_cast<Code<A>>(selves ? selves[i] : -1)}; }

  PairTerms<A> terms(const Row& row, int64_t j, Mask<A> valid) const {
    const Mask<A> other = valid & (lane_index<A>() + static_cast<Code<A>>(j) != row.self);
    const Vector<A> none{}, one = broadcast(A(1));
    return {other, other & (load_codes<A>(columns + j) == row.label), none, none, one, one};
  }

  const Code<A>* rows;
  const Code<A>* columns;
  const int64_t* selves;
};

}  // namespace

void supcon_statistics(const PairArgs& args) {
  dispatch_scores<SupconPairs>(args, [&](auto pairs) { run_pair_statistics<typename decltype(pairs)::type>(args); });
}

void supcon_gradient(const PairArgs& args) {
  dispatch_scores<SupconPairs>(args, [&](auto pairs) { run_pair_gradient<typename decltype(pairs)::type>(args); });
}

}  // namespace pyreg::PYREG_ISA

// The two passes over a tile of scores, as templates of what a pair means; see core/pairs.h.
//
// `Pairs` names the scores' type A, and for a row and a vector of columns gives PairTerms. Rows are shared out in
// blocks of kPairBlockRows; within a block, columns are taken kColumnsAtOnce at a time so that what is read and summed
// of them stays in the first-level cache while the rows pass by. Sums of a vector's lanes are of type A over at most
// kColumnsAtOnce / lanes (rows) or kPairBlockRows (columns) terms, and double beyond.
#pragma once

#include "core/math.h"
#include "core/pairs.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace pyreg::PYREG_ISA {

template <typename A>
using Mask = LaneIndex<A>;
template <typename A>
using Code = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <typename A>
struct PairTerms {
  Mask<A> active, positive;                 // all bits set or none
  Vector<A> row_exponent, column_exponent;  // added to the score, in the row's and the column's denominator
  Vector<A> row_factor, column_factor;      // of exp
};

constexpr int64_t kColumnsAtOnce = 512;

template <typename A>
PYREG_HOST_DEVICE Vector<A> keep(Mask<A> mask, Vector<A> x) {
  return bit_cast<Vector<A>>(bit_cast<Mask<A>>(x) & mask);
}

template <typename A>
PYREG_HOST_DEVICE Vector<A> larger(Vector<A> a, Vector<A> b) {
  return a > b ? a : b;
}

template <typename A>
PYREG_HOST_DEVICE A largest_lane(Vector<A> v) {
  A largest = v[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

template <typename A>
PYREG_HOST_DEVICE int64_t count_lanes(Mask<A> counts) {
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += counts[lane];
  return sum;
}

// Sums over pairs, lane by lane.
template <typename A>
struct LanePairSums {
  Vector<A> sum{}, positive_sum{};
  Mask<A> positives{}, negatives{};
};

// The columns' sums of one block of rows: fields of `width` elements.
template <typename A>
struct ColumnSums {
  A* data;
  int64_t width;
  A* sum() const { return data; }
  A* positive_sum() const { return data + width; }
  Code<A>* positives() const { return reinterpret_cast<Code<A>*>(data + 2 * width); }
  Code<A>* negatives() const { return reinterpret_cast<Code<A>*>(data + 3 * width); }
  A* maximum() const { return data + 4 * width; }
};

template <typename A>
PYREG_HOST_DEVICE Mask<A> load_codes(const Code<A>* p) {
  Mask<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <typename A>
class Tile {
 public:
  explicit Tile(const PairArgs& args) : args_(args), width_(args.columns + kPairPadding) {}

  int64_t blocks() const { return (args_.rows + kPairBlockRows - 1) / kPairBlockRows; }
  A* scores(int64_t row) const { return static_cast<A*>(args_.scores) + row * args_.scores_stride; }
  ColumnSums<A> column_sums(int64_t block) const {
    return {static_cast<A*>(args_.workspace) + block * kPairFields * width_, width_};
  }
  // What columns subtract from exponents, once the whole tile's maxima are known.
  A* column_shifts() const { return column_sums(blocks()).data; }

  // The first of the tile's columns that pairs with a row of it.
  int64_t begin(int64_t row) const {
    if (!args_.is_upper) return 0;
    const int64_t after = args_.first_row + row + 1 - args_.first_column;
    return after > 0 ? after : 0;
  }

  // Calls body(row, j, lanes that are pairs) for the vectors of a block of rows, columns [from, to) of the tile; j and
  // from are multiples of the lanes.
  template <typename RowBegin, typename Body, typename RowEnd>
  void for_each_vector(int64_t block, int64_t from, int64_t to, RowBegin&& row_begin, Body&& body,
                       RowEnd&& row_end) const {
    const int64_t first = block * kPairBlockRows;
    const int64_t last = first + kPairBlockRows < args_.rows ? first + kPairBlockRows : args_.rows;
    for (int64_t row = first; row < last; ++row) {
      const int64_t start = begin(row) > from ? begin(row) : from;
      if (start >= to) continue;
      row_begin(row);
      int64_t j = start - start % kLanes<A>;
      if (j < start) {
        const Mask<A> lane = lane_index<A>();
        body(row, j, (lane >= static_cast<Code<A>>(start - j)) & (lane < static_cast<Code<A>>(to - j)));
        j += kLanes<A>;
      }
      for (; j + kLanes<A> <= to; j += kLanes<A>) body(row, j, ~Mask<A>{});
      if (j < to) body(row, j, lane_index<A>() < static_cast<Code<A>>(to - j));
      row_end(row);
    }
  }

  template <typename Function>
  void for_each_block_in_parallel(Function&& function) const {
    const int64_t elements = kPairBlockRows * args_.columns;
    parallel_for(blocks(), (kElementsPerTask + elements - 1) / elements, [&](int64_t first, int64_t last) {
      const FlushSubnormals flush;
      for (int64_t block = first; block < last; ++block) function(block);
    });
  }

 private:
  const PairArgs& args_;
  int64_t width_;
};

template <typename A>
PYREG_HOST_DEVICE Vector<A> minus_infinity() {
  return broadcast(-static_cast<A>(__builtin_inf()));
}

// ---- statistics ----

// What a row or column subtracts from its exponents; 0 while none of them is above -infinity.
template <typename A>
A shift_of(double maximum) {
  return static_cast<A>(maximum == -INFINITY ? 0 : maximum);
}

// Raises the running maxima of the rows and columns to those of the tile, and scales their sums to the new ones.
template <typename Pairs, bool kColumns>
void raise_maxima(const PairArgs& args, const Pairs& pairs, const Tile<typename Pairs::A>& tile) {
  using A = typename Pairs::A;
  const Vector<A> scale = broadcast(static_cast<A>(args.scale));
  const auto raise = [](const PairSums& sums, int64_t i, double maximum) {
    if (!(maximum > sums.maximum[i])) return;
    sums.sum[i] *= std::exp(sums.maximum[i] - maximum);
    sums.maximum[i] = maximum;
  };
  tile.for_each_block_in_parallel([&](int64_t block) {
    A* const maxima = tile.column_sums(block).maximum();
    if constexpr (kColumns) {
      for (int64_t j = 0; j < args.columns; j += kLanes<A>) store(maxima + j, minus_infinity<A>());
    }
    typename Pairs::Row row;
    Vector<A> row_maximum;
    tile.for_each_vector(
        block, 0, args.columns,
        [&](int64_t i) {
          row = pairs.row(args.first_row + i);
          row_maximum = minus_infinity<A>();
        },
        [&](int64_t i, int64_t j, Mask<A> valid) {
          const PairTerms<A> terms = pairs.terms(row, args.first_column + j, valid);
          const Vector<A> s = load(tile.scores(i) + j) * scale;
          row_maximum = larger<A>(terms.active ? s + terms.row_exponent : minus_infinity<A>(), row_maximum);
          if constexpr (kColumns) {
            const Vector<A> candidate = terms.active ? s + terms.column_exponent : minus_infinity<A>();
            store(maxima + j, larger<A>(candidate, load(maxima + j)));
          }
        },
        [&](int64_t i) { raise(args.row_sums, args.first_row + i, largest_lane<A>(row_maximum)); });
  });
  if constexpr (kColumns) {
    A* const shifts = tile.column_shifts();
    for (int64_t j = 0; j < args.columns; ++j) {
      for (int64_t block = 0; block < tile.blocks(); ++block) {
        raise(args.column_sums, args.first_column + j, tile.column_sums(block).maximum()[j]);
      }
      shifts[j] = shift_of<A>(args.column_sums.maximum[args.first_column + j]);
    }
  }
}

template <typename Pairs, bool kBounded, bool kColumns>
void statistics_of_block(const PairArgs& args, const Pairs& pairs, const Tile<typename Pairs::A>& tile, int64_t block,
                         int64_t from, int64_t to) {
  using A = typename Pairs::A;
  const Vector<A> scale = broadcast(static_cast<A>(args.scale)), shift = broadcast(static_cast<A>(args.shift));
  const ColumnSums<A> columns = tile.column_sums(block);
  if constexpr (kColumns) {
    for (int64_t j = from; j < to; j += kLanes<A>) {
      store(columns.sum() + j, Vector<A>{});
      store(columns.positive_sum() + j, Vector<A>{});
      const Mask<A> none{};
      memcpy(columns.positives() + j, &none, sizeof(none));
      memcpy(columns.negatives() + j, &none, sizeof(none));
    }
  }
  typename Pairs::Row row;
  LanePairSums<A> sums;
  Vector<A> row_shift = shift;
  tile.for_each_vector(
      block, from, to,
      [&](int64_t i) {
        row = pairs.row(args.first_row + i);
        sums = {};
        if constexpr (!kBounded) row_shift = broadcast(shift_of<A>(args.row_sums.maximum[args.first_row + i]));
      },
      [&](int64_t i, int64_t j, Mask<A> valid) {
        const PairTerms<A> terms = pairs.terms(row, args.first_column + j, valid);
        if (Pairs::kMayBeEmpty && !any_lane(terms.active)) return;
        const Vector<A> s = load(tile.scores(i) + j) * scale;
        const Vector<A> e = keep<A>(terms.active, exponential(s + terms.row_exponent - row_shift));
        sums.sum += e * terms.row_factor;
        sums.positive_sum += keep<A>(terms.positive, s + terms.row_exponent);
        sums.positives -= terms.positive;
        if constexpr (Pairs::kCountsNegatives) sums.negatives -= terms.active & ~terms.positive;
        if constexpr (kColumns) {
          Vector<A> e_of_column = e;
          if constexpr (!kBounded) {
            const Vector<A> column_shift = load(tile.column_shifts() + j);
            e_of_column = keep<A>(terms.active, exponential(s + terms.column_exponent - column_shift));
          }
          store(columns.sum() + j, load(columns.sum() + j) + e_of_column * terms.column_factor);
          store(columns.positive_sum() + j,
                load(columns.positive_sum() + j) + keep<A>(terms.positive, s + terms.column_exponent));
          const auto count = [j](Code<A>* counts, Mask<A> mask) {
            const Mask<A> counted = load_codes<A>(counts + j) - mask;
            memcpy(counts + j, &counted, sizeof(counted));
          };
          count(columns.positives(), terms.positive);
          if constexpr (Pairs::kCountsNegatives) count(columns.negatives(), terms.active & ~terms.positive);
        }
      },
      [&](int64_t i) {
        const int64_t k = args.first_row + i;
        args.row_sums.sum[k] += sum_lanes(sums.sum);
        args.row_sums.positive_sum[k] += sum_lanes(sums.positive_sum);
        args.row_sums.positives[k] += count_lanes<A>(sums.positives);
        if constexpr (Pairs::kCountsNegatives) args.row_sums.negatives[k] += count_lanes<A>(sums.negatives);
      });
}

template <typename Pairs, bool kBounded, bool kColumns>
void pair_statistics(const PairArgs& args) {
  using A = typename Pairs::A;
  const Pairs pairs(args);
  const Tile<A> tile(args);
  if constexpr (!kBounded) raise_maxima<Pairs, kColumns>(args, pairs, tile);
  tile.for_each_block_in_parallel([&](int64_t block) {
    for (int64_t from = 0; from < args.columns; from += kColumnsAtOnce) {
      const int64_t to = from + kColumnsAtOnce < args.columns ? from + kColumnsAtOnce : args.columns;
      statistics_of_block<Pairs, kBounded, kColumns>(args, pairs, tile, block, from, to);
    }
  });
  if constexpr (kColumns) {
    parallel_for(args.columns, kElementsPerTask / (4 * tile.blocks()) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < tile.blocks(); ++block) {
        const ColumnSums<A> columns = tile.column_sums(block);
        for (int64_t j = begin; j < end; ++j) {
          const int64_t k = args.first_column + j;
          args.column_sums.sum[k] += columns.sum()[j];
          args.column_sums.positive_sum[k] += columns.positive_sum()[j];
          args.column_sums.positives[k] += columns.positives()[j];
          if constexpr (Pairs::kCountsNegatives) args.column_sums.negatives[k] += columns.negatives()[j];
        }
      }
    });
  }
}

// ---- gradient ----

template <typename Pairs, bool kBounded, bool kColumns>
void gradient_of_block(const PairArgs& args, const Pairs& pairs, const Tile<typename Pairs::A>& tile, int64_t block,
                       int64_t from, int64_t to) {
  using A = typename Pairs::A;
  const auto at = [](const void* array, int64_t i) { return static_cast<const A*>(array) + i; };
  const Vector<A> scale = broadcast(static_cast<A>(args.scale)), shift = broadcast(static_cast<A>(args.shift));
  typename Pairs::Row row;
  Vector<A> exp_weight, positive_weight, row_shift = shift;
  tile.for_each_vector(
      block, from, to,
      [&](int64_t i) {
        const int64_t k = args.first_row + i;
        row = pairs.row(k);
        exp_weight = broadcast(*at(args.row.exp_weight, k));
        positive_weight = broadcast(*at(args.row.positive_weight, k));
        if constexpr (!kBounded) row_shift = broadcast(*at(args.row.lse, k));
      },
      [&](int64_t i, int64_t j, Mask<A> valid) {
        const int64_t k = args.first_column + j;
        A* const score = tile.scores(i) + j;
        const PairTerms<A> terms = pairs.terms(row, k, valid);
        if (Pairs::kMayBeEmpty && !any_lane(terms.active)) {
          store(score, Vector<A>{});
          return;
        }
        const Vector<A> s = load(score) * scale;
        const Vector<A> e = exponential(s + terms.row_exponent - row_shift);
        Vector<A> factor = exp_weight * terms.row_factor, of_positive = positive_weight;
        Vector<A> h{};
        if constexpr (kColumns) {
          const Vector<A> column_factor = load(at(args.column.exp_weight, k)) * terms.column_factor;
          of_positive += load(at(args.column.positive_weight, k));
          if constexpr (kBounded) {
            factor += column_factor;
          } else {
            h = column_factor * exponential(s + terms.column_exponent - load(at(args.column.lse, k)));
          }
        }
        h += e * factor;
        store(score, keep<A>(terms.active, h) - keep<A>(terms.positive, of_positive));
      },
      [](int64_t) {});
}

// The square on the diagonal of an upper tile: 0 on it, and below it what is above.
template <typename A>
void mirror(const PairArgs& args, const Tile<A>& tile) {
  tile.for_each_block_in_parallel([&](int64_t block) {
    const int64_t first = block * kPairBlockRows;
    const int64_t last = first + kPairBlockRows < args.rows ? first + kPairBlockRows : args.rows;
    for (int64_t j = 0; j < last && j < args.columns; ++j) {
      for (int64_t i = first > j ? first : j; i < last; ++i) {
        tile.scores(i)[j] = i == j || i >= args.columns ? A(0) : tile.scores(j)[i];
      }
    }
  });
}

template <typename Pairs, bool kBounded, bool kColumns>
void pair_gradient(const PairArgs& args) {
  const Pairs pairs(args);
  const Tile<typename Pairs::A> tile(args);
  tile.for_each_block_in_parallel([&](int64_t block) {
    for (int64_t from = 0; from < args.columns; from += kColumnsAtOnce) {
      const int64_t to = from + kColumnsAtOnce < args.columns ? from + kColumnsAtOnce : args.columns;
      gradient_of_block<Pairs, kBounded, kColumns>(args, pairs, tile, block, from, to);
    }
  });
  if (args.is_upper && args.first_column == args.first_row) mirror(args, tile);
}

// Calls pass<Pairs, kBounded, kColumns>: which of them is known at run time.
template <typename Pairs>
void run_pair_statistics(const PairArgs& args) {
  if (args.is_bounded) {
    return args.has_columns ? pair_statistics<Pairs, true, true>(args) : pair_statistics<Pairs, true, false>(args);
  }
  args.has_columns ? pair_statistics<Pairs, false, true>(args) : pair_statistics<Pairs, false, false>(args);
}

template <typename Pairs>
void run_pair_gradient(const PairArgs& args) {
  if (args.is_bounded) {
    return args.has_columns ? pair_gradient<Pairs, true, true>(args) : pair_gradient<Pairs, true, false>(args);
  }
  args.has_columns ? pair_gradient<Pairs, false, true>(args) : pair_gradient<Pairs, false, false>(args);
}

// Calls function with the type Pairs<A> for the scores' A.
template <template <typename> typename Pairs, typename Function>
void dispatch_scores(const PairArgs& args, Function&& function) {
  if (args.dtype == Dtype::float64) return function(TypeTag<Pairs<double>>{});
  function(TypeTag<Pairs<float>>{});
}

}  // namespace pyreg::PYREG_ISA

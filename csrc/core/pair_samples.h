// Where few of a tile's pairs mean anything, their scores and what their H adds to the gradient, pair by pair instead
// of by matrix products of the whole tile. Notation: core/pairs.h; passes in between: core/pair_passes.h, which mask
// the other pairs' scores, whatever these are.
//
// A score is a dot product: D multiplications of which each reads a float of z_j from the second-level cache. Of H z a
// task takes kSliceVectors vectors of features: z_i and the sum of H_ij z_j stay in registers while the row's pairs
// pass by, z_j and the sum of H_ij z_i in the cache. On two AVX-512 cores this does a third to a quarter of the
// operations a second that matrix products do.
#pragma once

#include <algorithm>
#include <atomic>

#include "core/pair_passes.h"

namespace pyreg::PYREG_ISA {

// The numbers of the lanes in which a mask is set.
template <typename A, typename Function>
PYREG_HOST_DEVICE void for_each_lane(Mask<A> mask, Function&& function) {
  for (uint32_t bits = lane_bits<A>(mask); bits != 0; bits &= bits - 1) function(__builtin_ctz(bits));
}

// Whether at most one of kPairsPerSample of a tile's pairs is active.
template <typename Pairs>
bool has_few_pairs(const PairArgs& args) {
  using A = typename Pairs::A;
  const Pairs pairs(args);
  const Tile<A> tile(args);
  const int64_t limit = args.rows * args.columns / kPairsPerSample;
  std::atomic<int64_t> count = 0;
  tile.for_each_block_in_parallel([&](int64_t block) {
    typename Pairs::Row row;
    Mask<A> active{};
    bool is_over = false;
    tile.for_each_vector(
        block, 0, args.columns,
        [&](int64_t i) {
          row = pairs.row(args.first_row + i);
          active = Mask<A>{};
          is_over = count > limit;
        },
        [&](int64_t, int64_t j, Mask<A> valid) {
          if (!is_over) active -= pairs.terms(row, args.first_column + j, valid).active;
        },
        [&](int64_t) { count += count_lanes<A>(active); });
  });
  return count <= limit;
}

template <typename A>
A dot(const A* a, const A* b, int64_t width) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  Vector<A> sums[4]{};
  int64_t k = 0;
  for (; k + kStep <= width; k += kStep) {
    for (int part = 0; part < 4; ++part) {
      sums[part] += load(a + k + part * kLanes<A>) * load(b + k + part * kLanes<A>);
    }
  }
  for (; k + kLanes<A> <= width; k += kLanes<A>) sums[0] += load(a + k) * load(b + k);
  if (k < width) {
    const auto rest = static_cast<int>(width - k);
    sums[1] += load_partial(a + k, rest, A(0)) * load_partial(b + k, rest, A(0));
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Makes the scores of active pairs if these are few.
template <typename Pairs>
void sample_scores(const PairArgs& args) {
  using A = typename Pairs::A;
  *args.features.is_sampled = has_few_pairs<Pairs>(args);
  if (!*args.features.is_sampled) return;
  const Pairs pairs(args);
  const Tile<A> tile(args);
  const PairFeatures& features = args.features;
  const int64_t width = features.width;
  const auto* const row_z = static_cast<const A*>(features.rows) + args.first_row * width;
  const auto* const column_z = static_cast<const A*>(features.columns) + args.first_column * width;
  const int64_t grain = kPairsPerSample * kElementsPerTask / (kPairBlockRows * args.columns * width) + 1;
  parallel_for(tile.blocks(), grain, [&](int64_t begin, int64_t end) {
    typename Pairs::Row row;
    for (int64_t block = begin; block < end; ++block) {
      tile.for_each_vector(
          block, 0, args.columns, [&](int64_t i) { row = pairs.row(args.first_row + i); },
          [&](int64_t i, int64_t j, Mask<A> valid) {
            for_each_lane<A>(pairs.terms(row, args.first_column + j, valid).active, [&](int lane) {
              tile.scores(i)[j + lane] = dot(row_z + i * width, column_z + (j + lane) * width, width);
            });
          },
          [](int64_t) {});
    }
  });
}

constexpr int kSliceVectors = 8;

// What H of the tile adds to `count` features of the rows' and the columns' totals; kCount of them, or the last few.
template <typename A, bool kWhole>
void add_slice(const PairArgs& args, const Tile<A>& tile, int64_t from, int64_t count) {
  const PairFeatures& features = args.features;
  const auto lanes_of = [count](int part) {
    return kWhole ? kLanes<A> : static_cast<int>(std::clamp<int64_t>(count - part * kLanes<A>, 0, kLanes<A>));
  };
  const auto read = [&](const A* p, int part) {
    return kWhole ? load(p + part * kLanes<A>) : load_partial(p + part * kLanes<A>, lanes_of(part), A(0));
  };
  const auto write = [&](A* p, int part, Vector<A> v) {
    kWhole ? store(p + part * kLanes<A>, v) : store_partial(p + part * kLanes<A>, v, lanes_of(part));
  };
  const auto at = [&](auto* matrix, int64_t row) {
    using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(matrix)>>, const A, A>;
    return static_cast<Element*>(matrix) + row * features.width + from;
  };
  Vector<A> z[kSliceVectors], sum[kSliceVectors];
  const auto for_each_part = [](auto&& function) {
    for (int part = 0; part < kSliceVectors; ++part) function(part);
  };
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    tile.for_each_vector(
        block, 0, args.columns,
        [&](int64_t i) {
          for_each_part([&](int part) {
            z[part] = read(at(features.rows, args.first_row + i), part);
            sum[part] = read(at(features.row_totals, args.first_row + i), part);
          });
        },
        [&](int64_t i, int64_t j, Mask<A> valid) {
          const Vector<A> h = load(tile.scores(i) + j);
          for_each_lane<A>((h != 0) & valid, [&](int lane) {
            const Vector<A> h_ij = broadcast(h[lane]);
            const int64_t column = args.first_column + j + lane;
            const A* const other = at(features.columns, column);
            for_each_part([&](int part) { sum[part] += h_ij * read(other, part); });
            if (features.column_totals == nullptr) return;
            A* const total = at(features.column_totals, column);
            for_each_part([&](int part) { write(total, part, read(total, part) + h_ij * z[part]); });
          });
        },
        [&](int64_t i) {
          for_each_part([&](int part) { write(at(features.row_totals, args.first_row + i), part, sum[part]); });
        });
  }
}

// Adds H z to the totals. A task has features to itself, and sums in the order of the pairs.
template <typename A>
void add_sampled_products(const PairArgs& args) {
  constexpr int64_t kSlice = kSliceVectors * kLanes<A>;
  const Tile<A> tile(args);
  const int64_t width = args.features.width;
  const int64_t grain = kPairsPerSample * kElementsPerTask / (args.rows * args.columns * kSlice) + 1;
  parallel_for((width + kSlice - 1) / kSlice, grain, [&](int64_t begin, int64_t end) {
    for (int64_t from = begin * kSlice; from < std::min(end * kSlice, width); from += kSlice) {
      from + kSlice <= width ? add_slice<A, true>(args, tile, from, kSlice)
                             : add_slice<A, false>(args, tile, from, width - from);
    }
  });
}

}  // namespace pyreg::PYREG_ISA

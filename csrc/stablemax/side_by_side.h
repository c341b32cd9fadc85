// Passes over rows that lie side by side, a SIMD lane a row: class j of row k is x[j * stride + k]. No row waits for
// the lanes of its neighbours, and every cache line is read where it lies.
//
// A block of rows is as wide as 4 vectors: a read of 64 floats is 4 neighbouring cache lines.
#pragma once

#include "stablemax/row_passes.h"

namespace pyreg::PYREG_ISA {

namespace {

constexpr int kBlockVectors = 4;
// Narrower rows of neighbours leave most lanes empty: a transposed copy (core/rows.h) is faster.
constexpr int64_t kLeastSideBySide = 8;
// Classes summed in the accumulation type before they join the rows' doubles.
constexpr int64_t kClassChunk = 64;
// Reads this many classes ahead; the hardware's own prefetch does not follow strides from page to page.
constexpr int64_t kClassesAhead = 16;

template <typename Storage>
struct RowBlock {
  using A = Accumulate<Storage>;

  const Storage* x;
  int64_t classes;
  int64_t stride;
  int count;  // rows, at most kBlockVectors * kLanes<A>

  int vectors() const { return (count + kLanes<A> - 1) / kLanes<A>; }
};

// Values of the rows of a block.
template <typename A>
struct BlockLanes {
  A value[kBlockVectors * kLanes<A>];
  Vector<A> vector(int v) const { return load(value + v * kLanes<A>); }
};

template <typename A>
struct BlockLabels {
  using Index = std::remove_cv_t<std::remove_reference_t<decltype(lane_index<A>()[0])>>;

  Index value[kBlockVectors * kLanes<A>];  // -1: the row does not count
  LaneIndex<A> vector(int v) const {
    LaneIndex<A> labels;
    memcpy(&labels, value + v * kLanes<A>, sizeof(labels));
    return labels;
  }
};

template <int kVectors, typename Storage>
PYREG_HOST_DEVICE void prefetch_class(const Storage* x) {
  constexpr int kBytes = kVectors * kLanes<Accumulate<Storage>> * static_cast<int>(sizeof(Storage));
  for (int byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(x) + byte);
}

// Calls function(std::integral_constant<int, vectors>) for the number of vectors of a block.
template <typename Function>
PYREG_HOST_DEVICE void dispatch_vectors(int vectors, Function&& function) {
  switch (vectors) {
    case 1:
      return function(std::integral_constant<int, 1>{});
    case 2:
      return function(std::integral_constant<int, 2>{});
    case 3:
      return function(std::integral_constant<int, 3>{});
    default:
      return function(std::integral_constant<int, kBlockVectors>{});
  }
}

// total[k] = sum over classes of term(j, v, x), x the logits of class j in vector v of the rows.
template <int kVectors, typename Storage, typename Term, typename A = Accumulate<Storage>>
void sum_block(const RowBlock<Storage>& rows, BlockLanes<A>& total, Term&& term) {
  double sums[kVectors * kLanes<A>] = {};
  for (int64_t chunk = 0; chunk < rows.classes; chunk += kClassChunk) {
    const int64_t end = chunk + kClassChunk < rows.classes ? chunk + kClassChunk : rows.classes;
    Vector<A> partial[kVectors] = {};
    for (int64_t j = chunk; j < end; ++j) {
      const Storage* x = rows.x + j * rows.stride;
      prefetch_class<kVectors>(x + kClassesAhead * rows.stride);
      for (int v = 0; v < kVectors; ++v) partial[v] += term(j, v, load_logits(x, v * kLanes<A>, rows.count));
    }
    for (int v = 0; v < kVectors; ++v) {
      A lanes[kLanes<A>];
      store(lanes, partial[v]);
      for (int lane = 0; lane < kLanes<A>; ++lane) sums[v * kLanes<A> + lane] += lanes[lane];
    }
  }
  for (int k = 0; k < kVectors * kLanes<A>; ++k) total.value[k] = static_cast<A>(sums[k]);
}

// out = f(j, v, x), x as above; out may be the logits' own memory.
template <int kVectors, typename Storage, typename Out, typename Function, typename A = Accumulate<Storage>>
void map_block(const RowBlock<Storage>& rows, Out* out, Function&& f) {
  for (int64_t j = 0; j < rows.classes; ++j) {
    const Storage* x = rows.x + j * rows.stride;
    prefetch_class<kVectors>(x + kClassesAhead * rows.stride);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t k = v * kLanes<A>;
      store_lanes<Out, A>(out + j * rows.stride, k, rows.count, f(j, v, load_logits(x, k, rows.count)));
    }
  }
}

// The sum of s over every row without its label's class, and which of them were summed times kRescale.
template <typename Storage, typename A = Accumulate<Storage>>
void sum_rest_block(const RowBlock<Storage>& rows, const BlockLabels<A>& labels, BlockLanes<A>& rest, bool* rescaled) {
  dispatch_vectors(rows.vectors(), [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    LaneIndex<A> label[kVectors];
    for (int v = 0; v < kVectors; ++v) label[v] = labels.vector(v);
    const auto sum = [&](BlockLanes<A>& total, A scale) {
      sum_block<kVectors>(rows, total, [&](int64_t j, int v, Vector<A> x) {
        const auto excluded = label[v] == static_cast<typename BlockLabels<A>::Index>(j);
        return excluded ? Vector<A>{} : stable_value(x) * scale;
      });
    };
    sum(rest, A(1));
    bool overflows = false;
    for (int k = 0; k < rows.count; ++k) {
      const int64_t j = labels.value[k];
      rescaled[k] = j >= 0 && is_infinite(rest.value[k] + stable_value(::pyreg::widen(rows.x[j * rows.stride + k])));
      overflows |= rescaled[k];
    }
    if (!overflows) return;
    BlockLanes<A> smaller;
    sum(smaller, A(kRescale));
    for (int k = 0; k < rows.count; ++k) {
      if (rescaled[k]) rest.value[k] = smaller.value[k];
    }
  });
}

}  // namespace

}  // namespace pyreg::PYREG_ISA

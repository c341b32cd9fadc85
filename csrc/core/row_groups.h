// Rows of a matrix that lies in the cache, some at a time: they share each load and store of what belongs to columns.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/simd.h"

namespace pyreg::PYREG_ISA {

// Calls function(rows, first) for groups of kRows rows, and then of one, of `count`; `rows` is a compile-time constant.
template <int64_t kRows, typename Function>
void in_groups(int64_t count, Function&& function) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) function(std::integral_constant<int64_t, kRows>{}, r);
  for (; r < count; ++r) function(std::integral_constant<int64_t, 1>{}, r);
}

// t += K^T u of kRows rows of K, `stride` long and apart, a multiple of a vector.
template <int64_t kRows, typename A>
void add_rows(const A* k, int64_t stride, const A* u, A* t) {
  for (int64_t j = 0; j < stride; j += kLanes<A>) {
    Vector<A> total = load(t + j);
    for (int64_t r = 0; r < kRows; ++r) total += u[r] * load(k + r * stride + j);
    store(t + j, total);
  }
}

}  // namespace pyreg::PYREG_ISA

// Passes over one contiguous row of logits, a SIMD lane a class: sums and elementwise maps.
#pragma once

#include "stablemax/stablemax.h"

namespace pyreg::PYREG_ISA {

namespace {

constexpr int64_t kChunk = 4096;  // elements summed in the accumulation type before they join the row's double

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

// Loads lanes [j, j + kLanes) of a row of n; beyond its end -inf, whose s and h are 0.
template <typename Storage, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE Vector<A> load_logits(const Storage* x, int64_t j, int64_t n) {
  return j + kLanes<A> <= n ? load(x + j) : load_partial(x + j, static_cast<int>(n - j), -kInfinity<A>);
}

template <typename Storage, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE Vector<A> load_or_zero(const Storage* x, int64_t j, int64_t n) {
  return j + kLanes<A> <= n ? load(x + j) : load_partial(x + j, static_cast<int>(n - j), A(0));
}

template <typename Storage, typename A>
PYREG_HOST_DEVICE void store_lanes(Storage* out, int64_t j, int64_t n, const Vector<A>& v) {
  if (j + kLanes<A> <= n) {
    store(out + j, v);
  } else {
    store_partial(out + j, v, static_cast<int>(n - j));
  }
}

// Writes out_j = f(j, x_j) over a row.
template <typename Storage, typename Out, typename Function, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE void map_row(const Storage* x, int64_t n, Out* out, Function&& f) {
  constexpr int64_t kStep = 2 * kLanes<A>;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    prefetch_ahead<kStep>(x + j);
    const Vector<A> first = f(j, load(x + j));
    const Vector<A> second = f(j + kLanes<A>, load(x + j + kLanes<A>));
    store(out + j, first);
    store(out + j + kLanes<A>, second);
  }
  for (; j < n; j += kLanes<A>) store_lanes<Out, A>(out, j, n, f(j, load_logits(x, j, n)));
}

// Zero in the lane of class `excluded`, v elsewhere.
template <typename A>
PYREG_HOST_DEVICE Vector<A> without(const Vector<A>& v, int64_t j, int64_t excluded) {
  return lane_index<A>() == static_cast<decltype(lane_index<A>()[0] + 0)>(excluded - j) ? Vector<A>{} : v;
}

// Zero from lane `count` on.
template <typename A>
PYREG_HOST_DEVICE Vector<A> without_tail(const Vector<A>& v, int count) {
  return lane_index<A>() < count ? v : Vector<A>{};
}

// Sum over the row of term(j, x) without class `excluded`; term gives 0 where x = -inf.
template <typename Storage, typename Term, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE A sum_row(const Storage* x, int64_t n, int64_t excluded, Term&& term) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  double total = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + kChunk < n ? chunk + kChunk : n;
    Vector<A> sum0{}, sum1{}, sum2{}, sum3{};
    int64_t j = chunk;
    const bool has_excluded = excluded >= chunk && excluded < end;
    const int64_t plain_end = has_excluded ? excluded / kStep * kStep : end;
    const auto plain = [&](int64_t until) {
      for (; j + kStep <= until; j += kStep) {
        prefetch_ahead<kStep>(x + j);
        sum0 += term(j, load(x + j));
        sum1 += term(j + kLanes<A>, load(x + j + kLanes<A>));
        sum2 += term(j + 2 * kLanes<A>, load(x + j + 2 * kLanes<A>));
        sum3 += term(j + 3 * kLanes<A>, load(x + j + 3 * kLanes<A>));
      }
    };
    plain(plain_end);
    if (has_excluded) {
      const int64_t step_end = j + kStep < end ? j + kStep : end;
      for (; j < step_end; j += kLanes<A>) sum0 += without<A>(term(j, load_logits(x, j, n)), j, excluded);
      plain(end);
    }
    for (; j < end; j += kLanes<A>) sum1 += term(j, load_logits(x, j, n));
    total += sum_lanes((sum0 + sum1) + (sum2 + sum3));
  }
  return static_cast<A>(total);
}

template <typename Storage, typename A = Accumulate<Storage>>
RowSum<A> sum_rest(const Storage* x, int64_t n, int64_t pivot) {
  const A rest = sum_row(x, n, pivot, [](int64_t, Vector<A> v) { return stable_value(v); });
  const A sum = rest + stable_value(::pyreg::widen(x[pivot]));
  if (__builtin_expect(!is_infinite(sum), 1)) return {rest, false};
  return {sum_row(x, n, pivot, [](int64_t, Vector<A> v) { return stable_value(v) * A(kRescale); }), true};
}

// The largest logit's class, the first of equals. A row with a NaN may give any class: its sum is NaN all the same.
template <typename Storage, typename A = Accumulate<Storage>>
int64_t largest(const Storage* x, int64_t n) {
  Vector<A> best = load_logits(x, 0, n);
  for (int64_t j = kLanes<A>; j < n; j += kLanes<A>) {
    const Vector<A> v = load_logits(x, j, n);
    best = v <= best ? best : v;
  }
  A value = best[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) value = best[lane] <= value ? value : best[lane];
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    const auto hit = load_or_zero(x, j, n) == broadcast(value);
    for (int lane = 0; lane < kLanes<A> && j + lane < n; ++lane) {
      if (hit[lane]) return j + lane;
    }
  }
  return 0;  // NaN equals nothing: every class gives the same NaN
}

}  // namespace

}  // namespace pyreg::PYREG_ISA

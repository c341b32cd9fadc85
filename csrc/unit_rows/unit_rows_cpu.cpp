// CPU kernels of unit_rows.h. Bytes moved: features read once and rows written; backward, rows and their gradient read,
// the features' gradient written. A row is read twice, the second time from cache.
#include "unit_rows/unit_rows.h"

#include <cmath>

#include "core/parallel.h"
#include "core/simd.h"

namespace pyreg::PYREG_ISA {

namespace {

template <typename Storage, typename Function>
void for_each_vector(int64_t width, Function&& function) {
  using A = Accumulate<Storage>;
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) function(j, kLanes<A>);
  if (j < width) function(j, static_cast<int>(width - j));
}

template <typename Storage, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE Vector<A> load_some(const Storage* p, int count) {
  return count == kLanes<A> ? load(p) : load_partial(p, count, A(0));
}

template <typename Storage, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE void store_some(Storage* p, Vector<A> v, int count) {
  count == kLanes<A> ? store(p, v) : store_partial(p, v, count);
}

template <typename A>
double dot(const A* a, const A* b, int64_t width) {
  decltype(to_doubles(Vector<A>{})) sum{};
  for_each_vector<A>(width, [&](int64_t j, int count) {
    sum = sum + to_doubles(load_some(a + j, count)) * to_doubles(load_some(b + j, count));
  });
  return sum_lanes(sum);
}

template <typename Storage>
double square_sum(const Storage* f, int64_t width) {
  using A = Accumulate<Storage>;
  decltype(to_doubles(Vector<A>{})) sum{};
  for_each_vector<Storage>(width, [&](int64_t j, int count) {
    const auto x = to_doubles(load_some(f + j, count));
    sum = sum + x * x;
  });
  return sum_lanes(sum);
}

int64_t grain(int64_t width) { return kElementsPerTask / (width > 0 ? width : 1) + 1; }

template <typename Storage>
void normalize_all(const UnitRowsArgs& args) {
  using A = Accumulate<Storage>;
  const int64_t width = args.width;
  parallel_for(args.count, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Storage* const f = static_cast<const Storage*>(args.features) + (args.order ? args.order[i] : i) * width;
      A* const z = static_cast<A*>(args.rows) + i * width;
      double inverse = 1;
      if (args.normalize) {
        const double norm = std::sqrt(square_sum(f, width));
        inverse = 1 / (norm < kLeastNorm ? kLeastNorm : norm);
        args.inverse_norm[i] = norm < kLeastNorm ? -inverse : inverse;
      }
      // A float holds neither the inverse of a huge norm nor that of a tiny one: where it does not, double does.
      const bool is_moderate = inverse > 1e-30 && inverse < 1e30;
      const auto factor = static_cast<A>(inverse);
      for_each_vector<Storage>(width, [&](int64_t j, int count) {
        const Vector<A> x = load_some(f + j, count);
        if (is_moderate) return store_some(z + j, x * factor, count);
        Vector<A> scaled{};
        for (int lane = 0; lane < count; ++lane) scaled[lane] = static_cast<A>(x[lane] * inverse);
        store_some(z + j, scaled, count);
      });
    }
  });
}

template <typename Storage>
void differentiate_all(const UnitRowsBackwardArgs& args) {
  using A = Accumulate<Storage>;
  const int64_t width = args.width;
  parallel_for(args.count, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* const z = static_cast<const A*>(args.rows) + i * width;
      const A* const dz = static_cast<const A*>(args.grad_rows) + i * width;
      Storage* const df =
          static_cast<Storage*>(args.grad_features) + ((args.order ? args.order[i] : i) - args.first) * width;
      const double signed_inverse = args.normalize ? args.inverse_norm[i] : 1;
      const auto inverse = static_cast<A>(std::abs(signed_inverse));
      const auto along = static_cast<A>(args.normalize && signed_inverse > 0 ? dot(z, dz, width) : 0);
      for_each_vector<Storage>(width, [&](int64_t j, int count) {
        const Vector<A> projected = load_some(dz + j, count) - along * load_some(z + j, count);
        store_some(df + j, projected * inverse, count);
      });
    }
  });
}

}  // namespace

void unit_rows(const UnitRowsArgs& args) {
  dispatch_dtype(args.dtype, [&](auto storage) { normalize_all<typename decltype(storage)::type>(args); });
}

void unit_rows_backward(const UnitRowsBackwardArgs& args) {
  dispatch_dtype(args.dtype, [&](auto storage) { differentiate_all<typename decltype(storage)::type>(args); });
}

}  // namespace pyreg::PYREG_ISA

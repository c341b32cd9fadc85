// CPU kernel of scale_rows. Bytes moved: one read and one write of the rows whose factor is not 1.
#include "scale_rows/scale_rows.h"

#include "core/parallel.h"
#include "core/simd.h"

namespace pyreg::PYREG_ISA {

namespace {

constexpr int64_t kBlock = 4096;  // elements of a row that are one unit of work

template <typename Storage, typename A = Accumulate<Storage>>
void scale(Storage* row, int64_t n, A factor) {
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) store(row + j, load(row + j) * factor);
  if (j < n)
    store_partial(row + j, load_partial(row + j, static_cast<int>(n - j), A(0)) * factor, static_cast<int>(n - j));
}

template <typename Storage, typename Factor>
void scale_all(const ScaleRowsArgs& args) {
  using A = Accumulate<Storage>;
  const auto factor_of = [&](int64_t row) {
    return static_cast<A>(::pyreg::widen(static_cast<const Factor*>(args.factor)[args.shared ? 0 : row]));
  };
  if (args.width == 0 || (args.shared && factor_of(0) == 1)) return;
  const int64_t blocks = (args.width + kBlock - 1) / kBlock;
  const int64_t block_width = args.width < kBlock ? args.width : kBlock;
  parallel_for(args.count * blocks, (kElementsPerTask + block_width - 1) / block_width,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row = i / blocks, first = i % blocks * kBlock;
                   const A factor = factor_of(row);
                   const int64_t n = args.width - first < kBlock ? args.width - first : kBlock;
                   if (factor != 1) scale(static_cast<Storage*>(args.rows) + row * args.width + first, n, factor);
                 }
               });
}

}  // namespace

void scale_rows(const ScaleRowsArgs& args) {
  dispatch_dtype(args.dtype, [&](auto storage) {
    dispatch_dtype(args.factor_dtype, [&](auto factor) {
      scale_all<typename decltype(storage)::type, typename decltype(factor)::type>(args);
    });
  });
}

}  // namespace pyreg::PYREG_ISA

// CUDA kernel of scale_rows. A block takes one chunk of one row, finds its factor and leaves where that is 1: a launch
// that has nothing to do costs microseconds. Bytes moved: one read and one write of the rows whose factor is not 1.
#include <algorithm>

#include "core/cuda.cuh"
#include "scale_rows/scale_rows.h"

namespace pyreg::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 32768;  // elements: enough 16-byte packs for four rounds of all threads
constexpr int64_t kBlocksPerMultiprocessor = 32;

template <typename Storage, typename Factor>
__global__ void __launch_bounds__(kThreads) scale_chunks(const ScaleRowsArgs args, const int64_t chunks) {
  using A = Accumulate<Storage>;
  for (int64_t i = blockIdx.x; i < args.count * chunks; i += gridDim.x) {
    const int64_t row = i / chunks, first = i % chunks * kChunk;
    const A factor = static_cast<A>(widen(static_cast<const Factor*>(args.factor)[args.shared ? 0 : row]));
    if (factor == A(1)) continue;
    const int64_t rest = args.width - first;
    Storage* const data = static_cast<Storage*>(args.rows) + row * args.width + first;
    transform_row(static_cast<const Storage*>(data), data, rest < kChunk ? rest : kChunk, static_cast<int>(threadIdx.x),
                  kThreads, [=](int64_t, A x) { return x * factor; });
  }
}

}  // namespace

void scale_rows(const ScaleRowsArgs& args) {
  ScaleRowsArgs flat = args;
  if (args.shared) {
    flat.width = args.count * args.width;
    flat.count = 1;
  }
  const int64_t chunks = (flat.width + kChunk - 1) / kChunk;
  if (flat.count * chunks == 0) return;
  const int64_t grid = std::min<int64_t>(flat.count * chunks, kBlocksPerMultiprocessor * multiprocessor_count());
  dispatch_dtype(args.dtype, [&](auto storage) {
    dispatch_dtype(args.factor_dtype, [&](auto factor) {
      PYREG_LAUNCH((scale_chunks<typename decltype(storage)::type, typename decltype(factor)::type>),
                   static_cast<unsigned>(grid), kThreads, 0, args.stream, flat, chunks);
    });
  });
}

}  // namespace pyreg::cuda

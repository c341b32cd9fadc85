// CUDA kernels of OrthoGrad. Formulas and notation: orthograd.h.
//
// Four launches for up to kTableTensors tensors: sums of each chunk; sums of each tensor; |g_perp|^2 of each chunk of a
// nearly parallel gradient (the other blocks leave at once); the update. Single steps (OrthogradStep) take those they
// need, and one more that leaves |g_perp|^2 of each tensor. A block works on one chunk, so that work is
// shared by equal numbers of elements; partial sums are joined in a fixed order, without atomics.
// The table of tensors is a kernel parameter: no copy, no synchronisation, and a CUDA graph holds it.
//
// Accumulation: double. An element of a float or narrower gradient is updated in float with a in two parts, which is as
// right as double; GPUs for graphics have few double units.
// Bytes moved: 5 elements a parameter (read w and g; read both and write g).
#include "core/cuda.cuh"
#include "orthograd/orthograd.h"

namespace pyreg {

namespace {

constexpr int kThreads = 256;
// A kernel's parameters take at most 32764 bytes.
constexpr int kTableTensors = 1000;

struct Table {
  OrthogradTensor tensors[kTableTensors];
  int count;
  int first_chunk;     // of the first tensor
  bool has_residuals;  // of each tensor, in the workspace
  OrthogradWorkspace workspace;
};
static_assert(sizeof(Table) <= 32764);

// The tensor that holds the chunk: the last one that begins at or before it.
__device__ __forceinline__ int tensor_of(const Table& table, int chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.tensors[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

// A chunk's weights and gradients in packs of 16 bytes where both allow it, then one by one.
// Calls on_pack(w, g, index of the first element) and on_element(index).
template <typename Storage, typename OnPack, typename OnElement>
__device__ __forceinline__ void walk_chunk(const Storage* w, const Storage* g, int size, OnPack&& on_pack,
                                           OnElement&& on_element) {
  constexpr int kSize = Pack<Storage>::kSize;
  const bool aligned = (reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(g)) % 16 == 0;
  const int packs = aligned ? size / kSize : 0;
  for (int first = threadIdx.x; first < packs; first += kPacksInFlight * kThreads) {
    Pack<Storage> w_packs[kPacksInFlight], g_packs[kPacksInFlight];
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) {
      const int pack = first + u * kThreads;
      if (pack < packs) {
        w_packs[u] = load_pack(w + pack * kSize);
        g_packs[u] = load_pack(g + pack * kSize);
      }
    }
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) {
      const int pack = first + u * kThreads;
      if (pack < packs) on_pack(w_packs[u], g_packs[u], pack * kSize);
    }
  }
#pragma unroll 1
  for (int i = packs * kSize + threadIdx.x; i < size; i += kThreads) on_element(i);
}

struct ChunkOfTensor {
  const OrthogradTensor& tensor;
  int index;  // of the tensor in the table
  int64_t begin;
  int size;
};

__device__ __forceinline__ ChunkOfTensor chunk_of_block(const Table& table) {
  const int chunk = table.first_chunk + blockIdx.x;
  const int index = tensor_of(table, chunk);
  const OrthogradTensor& tensor = table.tensors[index];
  const int64_t begin = (chunk - tensor.first_chunk) * kOrthogradChunk;
  const int64_t rest = tensor.size - begin;
  return {tensor, index, begin, static_cast<int>(rest < kOrthogradChunk ? rest : kOrthogradChunk)};
}

// f(w, g) with pointers to the chunk's first elements in their type
template <typename Function>
__device__ __forceinline__ void with_elements(const ChunkOfTensor& chunk, Function&& f) {
  const auto call = [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    f(static_cast<const Storage*>(chunk.tensor.weight) + chunk.begin,
      static_cast<Storage*>(chunk.tensor.grad) + chunk.begin);
  };
  switch (chunk.tensor.dtype) {
    case Dtype::float64:
      return call(TypeTag<double>{});
    case Dtype::float32:
      return call(TypeTag<float>{});
    case Dtype::bfloat16:
      return call(TypeTag<bfloat16>{});
    case Dtype::float16:
      return call(TypeTag<float16>{});
  }
}

// Calls f(w, g) for every element of the chunk, widened to double.
template <typename Function>
__device__ __forceinline__ void read_chunk(const ChunkOfTensor& chunk, Function&& f) {
  with_elements(chunk, [&](const auto* w, const auto* g) {
    walk_chunk(
        w, g, chunk.size,
        [&](const auto& w_pack, const auto& g_pack, int) {
#pragma unroll
          for (int i = 0; i < static_cast<int>(w_pack.kSize); ++i) {
            f(static_cast<double>(widen(w_pack.value[i])), static_cast<double>(widen(g_pack.value[i])));
          }
        },
        [&](int i) { f(static_cast<double>(widen(w[i])), static_cast<double>(widen(g[i]))); });
  });
}

// w.w, w.g and g.g of each chunk
__global__ void __launch_bounds__(kThreads) sum_chunks(const __grid_constant__ Table table) {
  const ChunkOfTensor chunk = chunk_of_block(table);
  OrthogradSums sums{};
  read_chunk(chunk, [&](double w, double g) {
    sums.ww += w * w;
    sums.wg += w * g;
    sums.gg += g * g;
  });
  sums = block_sum<kThreads>(sums);
  if (threadIdx.x == 0) table.workspace.partial_sums[table.first_chunk + blockIdx.x] = sums;
}

// The same of each tensor
__global__ void __launch_bounds__(kThreads) sum_tensors(const __grid_constant__ Table table) {
  const OrthogradTensor& tensor = table.tensors[blockIdx.x];
  const OrthogradSums* partial = table.workspace.partial_sums + tensor.first_chunk;
  OrthogradSums sums{};
  for (int chunk = threadIdx.x; chunk < tensor.chunks(); chunk += kThreads) sums = sums + partial[chunk];
  sums = block_sum<kThreads>(sums);
  if (threadIdx.x == 0) table.workspace.sums[blockIdx.x] = sums;
}

// |g_perp|^2 of each chunk of a nearly parallel gradient
__global__ void __launch_bounds__(kThreads) sum_residuals(const __grid_constant__ Table table) {
  const ChunkOfTensor chunk = chunk_of_block(table);
  const OrthogradSums sums = table.workspace.sums[chunk.index];
  if (!orthograd_is_parallel(sums, chunk.tensor.dtype)) return;
  const double projection = orthograd_projection(sums);
  double residual = 0;
  read_chunk(chunk, [&](double w, double g) {
    const double perpendicular = g - projection * w;
    residual += perpendicular * perpendicular;
  });
  residual = block_sum<kThreads>(residual);
  if (threadIdx.x == 0) table.workspace.partial_residuals[table.first_chunk + blockIdx.x] = residual;
}

// The same of a tensor, by all threads of a block; of a nearly parallel gradient.
__device__ __forceinline__ double joined_residual(const Table& table, const OrthogradTensor& tensor) {
  const double* partial = table.workspace.partial_residuals + tensor.first_chunk;
  double residual = 0;
  for (int i = threadIdx.x; i < tensor.chunks(); i += kThreads) residual += partial[i];
  return block_sum<kThreads>(residual);
}

// The same of each tensor, 0 where its gradient is not nearly parallel
__global__ void __launch_bounds__(kThreads) join_residuals(const __grid_constant__ Table table) {
  const OrthogradTensor& tensor = table.tensors[blockIdx.x];
  const bool is_parallel = orthograd_is_parallel(table.workspace.sums[blockIdx.x], tensor.dtype);
  const double residual = is_parallel ? joined_residual(table, tensor) : 0;
  if (threadIdx.x == 0) table.workspace.residuals[blockIdx.x] = residual;
}

// g' of one element in the accumulation type. In float, a = high + low: each product is joined without rounding, so the
// error is that of g_perp's own rounding, however much of g the projection takes away.
template <typename A>
struct Apply;

template <>
struct Apply<double> {
  OrthogradUpdate update;
  __device__ __forceinline__ explicit Apply(const OrthogradUpdate& u) : update(u) {}
  __device__ __forceinline__ double operator()(double w, double g) const { return orthograd_apply(update, w, g); }
};

template <>
struct Apply<float> {
  float high, low, scale;
  __device__ __forceinline__ explicit Apply(const OrthogradUpdate& u)
      : high(static_cast<float>(u.projection)),
        low(static_cast<float>(u.projection - static_cast<double>(high))),
        scale(static_cast<float>(u.scale)) {}
  __device__ __forceinline__ float operator()(float w, float g) const {
    return scale * fmaf(-low, w, fmaf(-high, w, g));
  }
};

__global__ void __launch_bounds__(kThreads) update_gradients(const __grid_constant__ Table table) {
  const ChunkOfTensor chunk = chunk_of_block(table);
  const OrthogradSums sums = table.workspace.sums[chunk.index];
  double residual = orthograd_residual(sums);
  if (orthograd_is_parallel(sums, chunk.tensor.dtype)) {
    residual = table.has_residuals ? table.workspace.residuals[chunk.index] : joined_residual(table, chunk.tensor);
  }
  const OrthogradUpdate update = orthograd_update(sums, residual);
  if (update.is_identity()) return;
  with_elements(chunk, [&](const auto* w, auto* g) {
    using Storage = std::remove_pointer_t<decltype(g)>;
    const Apply<Accumulate<Storage>> apply(update);
    walk_chunk(
        w, static_cast<const Storage*>(g), chunk.size,
        [&](const auto& w_pack, auto& g_pack, int first) {
#pragma unroll
          for (int i = 0; i < static_cast<int>(w_pack.kSize); ++i) {
            g_pack.value[i] = narrow<Storage>(apply(widen(w_pack.value[i]), widen(g_pack.value[i])));
          }
          store_pack(g + first, g_pack);
        },
        [&](int i) { g[i] = narrow<Storage>(apply(widen(w[i]), widen(g[i]))); });
  });
}

}  // namespace

namespace cuda {

void orthogonalize_gradients(const OrthogradArgs& args) {
  const bool is_single = args.step != OrthogradStep::everything;
  const auto makes = [&](OrthogradStep step) { return !is_single || args.step == step; };
  for (int64_t first = 0; first < args.count; first += kTableTensors) {
    Table table{};
    table.count = static_cast<int>(args.count - first < kTableTensors ? args.count - first : kTableTensors);
    for (int i = 0; i < table.count; ++i) table.tensors[i] = args.tensors[first + i];
    const OrthogradTensor& last = table.tensors[table.count - 1];
    table.first_chunk = table.tensors[0].first_chunk;
    table.has_residuals = is_single;
    table.workspace = orthograd_workspace(args);
    table.workspace.sums += first;
    table.workspace.residuals += first;
    const unsigned chunks = static_cast<unsigned>(last.first_chunk + last.chunks() - table.first_chunk);
    if (makes(OrthogradStep::sums)) {
      PYREG_LAUNCH(sum_chunks, chunks, kThreads, 0, args.stream, table);
      PYREG_LAUNCH(sum_tensors, table.count, kThreads, 0, args.stream, table);
    }
    if (makes(OrthogradStep::residuals)) PYREG_LAUNCH(sum_residuals, chunks, kThreads, 0, args.stream, table);
    if (args.step == OrthogradStep::residuals) {
      PYREG_LAUNCH(join_residuals, table.count, kThreads, 0, args.stream, table);
    }
    if (makes(OrthogradStep::update)) PYREG_LAUNCH(update_gradients, chunks, kThreads, 0, args.stream, table);
  }
}

}  // namespace cuda

}  // namespace pyreg

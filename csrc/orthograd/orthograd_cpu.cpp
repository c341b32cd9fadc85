// CPU kernels of OrthoGrad. Formulas and notation: orthograd.h.
//
// Accumulation: double for every dtype, in the sums and in each element: the conversions hide behind memory.
// A tensor of one chunk is finished by one thread while it lies in L2. Larger ones take two passes over their chunks,
// all tensors in one parallel loop a pass: every loop ends with a wait for the slowest thread, which is long where
// other processes (data loaders) compete for the cores. Bytes moved: 5 elements a parameter (read w and g; read both
// and write g), 3 in a tensor of one chunk.
#include "core/parallel.h"
#include "core/simd.h"
#include "orthograd/orthograd.h"

namespace pyreg::PYREG_ISA {

namespace {

// ---- kStep elements of any dtype as two vectors of doubles ----

constexpr int kStep = kLanes<float>;
typedef uint32_t HalfUInts __attribute__((vector_size(kVectorBytes / 2)));

template <typename V>
PYREG_HOST_DEVICE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}

PYREG_HOST_DEVICE HalfFloats to_floats(DoubleVector v) { return __builtin_convertvector(v, HalfFloats); }

PYREG_HOST_DEVICE Doubles load_doubles(const double* p) { return {load(p), load(p + kStep / 2)}; }
PYREG_HOST_DEVICE void store_doubles(double* p, const Doubles& v) {
  store(p, v.first);
  store(p + kStep / 2, v.second);
}

PYREG_HOST_DEVICE Doubles load_doubles(const float* p) {
  return {to_doubles(load_as<HalfFloats>(p)), to_doubles(load_as<HalfFloats>(p + kStep / 2))};
}
PYREG_HOST_DEVICE void store_doubles(float* p, const Doubles& v) {
  const HalfFloats first = to_floats(v.first), second = to_floats(v.second);
  memcpy(p, &first, sizeof(first));
  memcpy(p + kStep / 2, &second, sizeof(second));
}

// Elements at even places first, then those at odd places: halves of 32-bit lanes, told apart without a shuffle.
PYREG_HOST_DEVICE Doubles load_doubles(const bfloat16* p) {
  const HalfUInts pairs = load_as<HalfUInts>(p);
  return {to_doubles(bit_cast<HalfFloats>(pairs << 16)), to_doubles(bit_cast<HalfFloats>(pairs & 0xffff0000u))};
}
PYREG_HOST_DEVICE HalfUInts round_to_bfloat16(DoubleVector v) {  // in the upper half of each lane
  const HalfFloats narrow = to_floats(v);
  const HalfUInts bits = bit_cast<HalfUInts>(narrow);
  return narrow == narrow ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}
PYREG_HOST_DEVICE void store_doubles(bfloat16* p, const Doubles& v) {
  const HalfUInts pairs = (round_to_bfloat16(v.first) >> 16) | (round_to_bfloat16(v.second) & 0xffff0000u);
  memcpy(p, &pairs, sizeof(pairs));
}

PYREG_HOST_DEVICE Doubles load_doubles(const float16* p) {
#if defined(__AVX512F__)
  return {to_doubles(bit_cast<HalfFloats>(_mm256_cvtph_ps(load_as<__m128i>(p)))),
          to_doubles(bit_cast<HalfFloats>(_mm256_cvtph_ps(load_as<__m128i>(p + kStep / 2))))};
#else
  return to_doubles(load(p));
#endif
}
PYREG_HOST_DEVICE void store_doubles(float16* p, const Doubles& v) {
#if defined(__AVX512F__)
  const __m128i first = _mm256_cvtps_ph(bit_cast<__m256>(to_floats(v.first)), _MM_FROUND_TO_NEAREST_INT);
  const __m128i second = _mm256_cvtps_ph(bit_cast<__m256>(to_floats(v.second)), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &first, sizeof(first));
  memcpy(p + kStep / 2, &second, sizeof(second));
#else
  const HalfFloats halves[2] = {to_floats(v.first), to_floats(v.second)};
  store(p, load_as<FloatVector>(halves));
#endif
}

// ---- one chunk ----

template <typename Storage>
OrthogradSums sum_chunk(const Storage* w, const Storage* g, int64_t n) {
  Doubles ww{}, wg{}, gg{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Doubles x = load_doubles(w + i), y = load_doubles(g + i);
    ww = ww + x * x;
    wg = wg + x * y;
    gg = gg + y * y;
  }
  OrthogradSums sums{sum_lanes(ww), sum_lanes(wg), sum_lanes(gg)};
  for (; i < n; ++i) {
    const double x = ::pyreg::widen(w[i]), y = ::pyreg::widen(g[i]);
    sums = sums + OrthogradSums{x * x, x * y, y * y};
  }
  return sums;
}

template <typename Storage>
double sum_residual(const Storage* w, const Storage* g, int64_t n, double projection) {
  Doubles squares{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Doubles perpendicular = load_doubles(g + i) - projection * load_doubles(w + i);
    squares = squares + perpendicular * perpendicular;
  }
  double total = sum_lanes(squares);
  for (; i < n; ++i) {
    const double perpendicular = ::pyreg::widen(g[i]) - projection * ::pyreg::widen(w[i]);
    total += perpendicular * perpendicular;
  }
  return total;
}

template <typename Storage>
void update_chunk(const Storage* w, Storage* g, int64_t n, const OrthogradUpdate& update) {
  const double projection = update.projection, scale = update.scale;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    store_doubles(g + i, scale * (load_doubles(g + i) - projection * load_doubles(w + i)));
  }
  for (; i < n; ++i) {
    const double result = orthograd_apply(update, ::pyreg::widen(w[i]), ::pyreg::widen(g[i]));
    g[i] = ::pyreg::narrow<Storage>(static_cast<Accumulate<Storage>>(result));
  }
}

// ---- all tensors ----

struct Chunk {
  int64_t tensor;
  int64_t index;  // in the space of all chunks
  int64_t size;
};

// Calls body(chunk, w, g) for every chunk of every tensor, with typed pointers to the chunk's first elements.
// Threads share the chunks by equal numbers of elements.
template <typename Body>
void for_each_chunk(const OrthogradTensor* tensors, int64_t count, Body&& body) {
  int64_t elements = 0;
  for (int64_t t = 0; t < count; ++t) elements += tensors[t].size;
  parallel_for(elements, kElementsPerTask, [&](int64_t range_begin, int64_t range_end) {
    int64_t offset = 0;  // of the tensor's first element
    for (int64_t t = 0; t < count && offset < range_end; offset += tensors[t++].size) {
      const OrthogradTensor& tensor = tensors[t];
      const int64_t skipped = range_begin > offset ? range_begin - offset : 0;
      int64_t begin = (skipped + kOrthogradChunk - 1) / kOrthogradChunk * kOrthogradChunk;  // the range's first chunk
      for (; begin < tensor.size && offset + begin < range_end; begin += kOrthogradChunk) {
        const int64_t rest = tensor.size - begin;
        const Chunk chunk{t, tensor.first_chunk + begin / kOrthogradChunk,
                          rest < kOrthogradChunk ? rest : kOrthogradChunk};
        dispatch_dtype(tensor.dtype, [&](auto tag) {
          using Storage = typename decltype(tag)::type;
          body(chunk, static_cast<const Storage*>(tensor.weight) + begin, static_cast<Storage*>(tensor.grad) + begin);
        });
      }
    }
  });
}

template <typename Sum>
Sum sum_partials(const Sum* partials, const OrthogradTensor& tensor) {
  Sum total{};
  for (int64_t chunk = 0; chunk < tensor.chunks(); ++chunk) total = total + partials[tensor.first_chunk + chunk];
  return total;
}

template <typename Storage>
void finish_tensor(const OrthogradTensor& tensor, const Storage* w, Storage* g) {
  const OrthogradSums sums = sum_chunk(w, g, tensor.size);
  const double residual = orthograd_is_parallel(sums, tensor.dtype)
                              ? sum_residual(w, g, tensor.size, orthograd_projection(sums))
                              : orthograd_residual(sums);
  const OrthogradUpdate update = orthograd_update(sums, residual);
  if (!update.is_identity()) update_chunk(w, g, tensor.size, update);
}

// ---- the steps; takes(t) says of which tensors ----

template <typename Takes>
void join_sums(const OrthogradArgs& args, const OrthogradWorkspace& workspace, Takes&& takes) {
  for (int64_t t = 0; t < args.count; ++t) {
    if (takes(t)) workspace.sums[t] = sum_partials(workspace.partial_sums, args.tensors[t]);
  }
}

template <typename Takes>
void sum_residuals(const OrthogradArgs& args, const OrthogradWorkspace& workspace, Takes&& takes) {
  const auto is_parallel = [&](int64_t t) {
    return takes(t) && orthograd_is_parallel(workspace.sums[t], args.tensors[t].dtype);
  };
  bool any_parallel = false;
  for (int64_t t = 0; t < args.count; ++t) any_parallel = any_parallel || is_parallel(t);
  if (any_parallel) {
    for_each_chunk(args.tensors, args.count, [&](const Chunk& chunk, const auto* w, auto* g) {
      if (!is_parallel(chunk.tensor)) return;
      const double projection = orthograd_projection(workspace.sums[chunk.tensor]);
      workspace.partial_residuals[chunk.index] = sum_residual(w, g, chunk.size, projection);
    });
  }
  for (int64_t t = 0; t < args.count; ++t) {
    workspace.residuals[t] = is_parallel(t) ? sum_partials(workspace.partial_residuals, args.tensors[t]) : 0;
  }
}

template <typename Takes>
void update_gradients(const OrthogradArgs& args, const OrthogradWorkspace& workspace, Takes&& takes) {
  for (int64_t t = 0; t < args.count; ++t) {
    if (!takes(t)) continue;
    const OrthogradSums& sums = workspace.sums[t];
    const bool is_parallel = orthograd_is_parallel(sums, args.tensors[t].dtype);
    workspace.updates[t] = orthograd_update(sums, is_parallel ? workspace.residuals[t] : orthograd_residual(sums));
  }
  for_each_chunk(args.tensors, args.count, [&](const Chunk& chunk, const auto* w, auto* g) {
    if (!takes(chunk.tensor)) return;
    const OrthogradUpdate update = workspace.updates[chunk.tensor];
    if (!update.is_identity()) update_chunk(w, g, chunk.size, update);
  });
}

void make_everything(const OrthogradArgs& args, const OrthogradWorkspace& workspace) {
  const OrthogradTensor* const tensors = args.tensors;
  const auto is_large = [&](int64_t t) { return tensors[t].chunks() > 1; };
  for_each_chunk(tensors, args.count, [&](const Chunk& chunk, const auto* w, auto* g) {
    if (is_large(chunk.tensor)) {
      workspace.partial_sums[chunk.index] = sum_chunk(w, g, chunk.size);
    } else {
      finish_tensor(tensors[chunk.tensor], w, g);
    }
  });
  bool any_large = false;
  for (int64_t t = 0; t < args.count; ++t) any_large = any_large || is_large(t);
  if (!any_large) return;
  join_sums(args, workspace, is_large);
  sum_residuals(args, workspace, is_large);
  update_gradients(args, workspace, is_large);
}

}  // namespace

void orthogonalize_gradients(const OrthogradArgs& args) {
  const OrthogradWorkspace workspace = orthograd_workspace(args);
  const auto all = [](int64_t) { return true; };
  switch (args.step) {
    case OrthogradStep::everything:
      return make_everything(args, workspace);
    case OrthogradStep::sums:
      for_each_chunk(args.tensors, args.count, [&](const Chunk& chunk, const auto* w, auto* g) {
        workspace.partial_sums[chunk.index] = sum_chunk(w, g, chunk.size);
      });
      return join_sums(args, workspace, all);
    case OrthogradStep::residuals:
      return sum_residuals(args, workspace, all);
    case OrthogradStep::update:
      return update_gradients(args, workspace, all);
  }
}

}  // namespace pyreg::PYREG_ISA

// CPU kernels of the weight compander. Formulas and notation: weight_compander.h.
//
// One pass over all tensors, their chunks shared out by equal numbers of elements. Bytes moved: forward, 2 elements a
// weight (read v, write w); gradient, 3 (read v and dL/dw, write dL/dv), with the sums for dL/da and dL/db kept in
// double on the way. Arithmetic in float for float, bfloat16 and float16, in double for double.
//
// Plain stores: memory that is fresh from the kernel has just been zeroed and lies in cache. 25 million floats forward
// into fresh memory took 33 ms with plain stores and 44 with stores past the cache (2 cores, other work beside); into
// used memory 24 and 17, but then whoever uses the weights next would miss them in cache.
#include "core/parallel.h"
#include "core/simd.h"
#include "weight_compander/weight_compander.h"

namespace pyreg::PYREG_ISA {

namespace {

template <typename Storage>
constexpr Accumulate<Storage> kLargest = __DBL_MAX__;
template <>
constexpr float kLargest<float> = __FLT_MAX__;
template <>
constexpr float kLargest<bfloat16> = 0x1.fep127f;
template <>
constexpr float kLargest<float16> = 65504.0f;

template <typename A>
using WideVector = decltype(to_doubles(Vector<A>{}));

template <typename A>
struct LaneSums {
  WideVector<A> value{}, moment{};  // sum g f(u), sum g u f'(u)
};

// One vector of a pass: what is written, and what is added to the sums.
template <CompanderKind kind, CompanderPass pass, typename Storage, typename A = Accumulate<Storage>>
PYREG_HOST_DEVICE Vector<A> step(Vector<A> v, Vector<A> g, const CompanderCoefficients<A>& c,
                                 const CompanderDecay<A>& decay, LaneSums<A>& sums) {
  const auto terms = compander_terms<kind, A>(v * c.inverse_b);
  if constexpr (pass == CompanderPass::forward) {
    return c.a * terms.value;
  } else if constexpr (pass == CompanderPass::to_weight) {
    return compander_to_weight<A>(g, v, c.a * terms.value, c.slope * terms.slope, decay, kLargest<Storage>);
  } else if constexpr (pass == CompanderPass::rescale) {
    return v + (g - v) * (c.slope * terms.slope);
  } else {
    if constexpr (pass == CompanderPass::gradient_and_sums) {
      sums.value = sums.value + to_doubles(g * terms.value);
      sums.moment = sums.moment + to_doubles(g * terms.moment);
    }
    return g * (c.slope * terms.slope);
  }
}

template <CompanderKind kind, CompanderPass pass, typename Storage, typename A = Accumulate<Storage>>
LaneSums<A> run_part(const Storage* v, const Storage* g, Storage* out, int64_t n, const CompanderCoefficients<A>& c,
                     const CompanderDecay<A>& decay) {
  constexpr bool kHasPartner = pass != CompanderPass::forward;
  constexpr bool kMayDiscard = pass == CompanderPass::gradient_and_sums;
  constexpr int64_t kStep = 2 * kLanes<A>;
  LaneSums<A> sums;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch_ahead<kStep>(v + i);
    if constexpr (kHasPartner) prefetch_ahead<kStep>(g + i);
    const Vector<A> first =
        step<kind, pass, Storage>(load(v + i), kHasPartner ? load(g + i) : Vector<A>{}, c, decay, sums);
    const Vector<A> second = step<kind, pass, Storage>(
        load(v + i + kLanes<A>), kHasPartner ? load(g + i + kLanes<A>) : Vector<A>{}, c, decay, sums);
    if (kMayDiscard && out == nullptr) continue;
    store(out + i, first);
    store(out + i + kLanes<A>, second);
  }
  for (; i < n; i += kLanes<A>) {  // beyond the end v and g are 0, which adds 0 to the sums
    const int count = static_cast<int>(n - i < kLanes<A> ? n - i : kLanes<A>);
    const Vector<A> last = step<kind, pass, Storage>(
        load_partial(v + i, count, A(0)), kHasPartner ? load_partial(g + i, count, A(0)) : Vector<A>{}, c, decay, sums);
    if (kMayDiscard && out == nullptr) continue;
    store_partial(out + i, last, count);
  }
  return sums;
}

template <CompanderKind kind, CompanderPass pass, typename Storage>
void run_chunk(const CompanderArgs& args, const CompanderTensor& tensor, int32_t chunk) {
  using A = Accumulate<Storage>;
  const CompanderDecay<A> decay{static_cast<A>(args.decay_on_w), static_cast<A>(args.decay_on_v)};
  const int32_t begin = chunk * tensor.parts_per_chunk(), rest = tensor.parts() - begin;
  const int32_t end = begin + (rest < tensor.parts_per_chunk() ? rest : tensor.parts_per_chunk());
  for (int32_t p = begin; p < end; ++p) {
    const CompanderPart part = compander_part(tensor, p);
    const double a = tensor.a[part.row], b = tensor.b[part.row];
    const auto at = [&](const void* data) { return static_cast<const Storage*>(data) + part.begin; };
    Storage* const out = tensor.out ? static_cast<Storage*>(tensor.out) + part.begin : nullptr;
    const LaneSums<A> sums = run_part<kind, pass, Storage>(at(tensor.v), tensor.partner ? at(tensor.partner) : nullptr,
                                                           out, part.size, {a, b}, decay);
    if constexpr (pass == CompanderPass::gradient_and_sums) {
      args.partial_sums[tensor.first_part + p] = {sum_lanes(sums.value), -(a / b) * sum_lanes(sums.moment)};
    }
  }
}

template <CompanderKind kind, CompanderPass pass>
void run_all(const CompanderArgs& args) {
  int64_t elements = 0;
  for (int64_t t = 0; t < args.count; ++t) elements += args.tensors[t].rows * args.tensors[t].row_size;
  parallel_for(elements, kElementsPerTask, [&](int64_t range_begin, int64_t range_end) {
    int64_t offset = 0;  // of the chunk's first element among all
    for (int64_t t = 0; t < args.count && offset < range_end; ++t) {
      const CompanderTensor& tensor = args.tensors[t];
      const int64_t tensor_begin = offset;
      for (int32_t chunk = 0; chunk < tensor.chunks() && offset < range_end; ++chunk) {
        offset = tensor_begin + compander_part(tensor, chunk * tensor.parts_per_chunk()).begin;
        if (offset < range_begin || offset >= range_end) continue;
        dispatch_dtype(tensor.dtype,
                       [&](auto tag) { run_chunk<kind, pass, typename decltype(tag)::type>(args, tensor, chunk); });
      }
      offset = tensor_begin + tensor.rows * tensor.row_size;
    }
  });
}

void add_up(const CompanderArgs& args) {
  for (int64_t i = 0; i < args.gradient_count; ++i) {
    for (int32_t k = 0; k < args.gradients[i].size; ++k) args.totals[args.gradients[i].total + k] = 0;
  }
  for (int64_t t = 0; t < args.count; ++t) {
    const CompanderTensor& tensor = args.tensors[t];
    const auto total = [&](int32_t gradient, int64_t row) -> double& {
      const CompanderGradient& g = args.gradients[gradient];
      return args.totals[g.total + (g.size == 1 ? 0 : row)];
    };
    for (int32_t p = 0; p < tensor.parts(); ++p) {
      const CompanderSums& sums = args.partial_sums[tensor.first_part + p];
      const int64_t row = p / tensor.parts_per_row();
      if (tensor.a_gradient >= 0) total(tensor.a_gradient, row) += sums.a;
      if (tensor.b_gradient >= 0) total(tensor.b_gradient, row) += sums.b;
    }
  }
  for (int64_t i = 0; i < args.gradient_count; ++i) {
    const CompanderGradient& gradient = args.gradients[i];
    dispatch_dtype(gradient.dtype, [&](auto tag) {
      using Storage = typename decltype(tag)::type;
      for (int32_t k = 0; k < gradient.size; ++k) {
        const auto total = static_cast<Accumulate<Storage>>(args.totals[gradient.total + k]);
        static_cast<Storage*>(gradient.out)[k] = ::pyreg::narrow<Storage>(total);
      }
    });
  }
}

template <CompanderKind kind>
void run_kind(const CompanderArgs& args) {
  switch (args.pass) {
    case CompanderPass::forward:
      return run_all<kind, CompanderPass::forward>(args);
    case CompanderPass::gradient:
      return run_all<kind, CompanderPass::gradient>(args);
    case CompanderPass::gradient_and_sums:
      run_all<kind, CompanderPass::gradient_and_sums>(args);
      return add_up(args);
    case CompanderPass::to_weight:
      return run_all<kind, CompanderPass::to_weight>(args);
    case CompanderPass::rescale:
      return run_all<kind, CompanderPass::rescale>(args);
  }
}

}  // namespace

void weight_compander(const CompanderArgs& args) {
  switch (args.kind) {
    case CompanderKind::arctan:
      return run_kind<CompanderKind::arctan>(args);
    case CompanderKind::arsinh:
      return run_kind<CompanderKind::arsinh>(args);
    case CompanderKind::erf:
      return run_kind<CompanderKind::erf>(args);
  }
}

}  // namespace pyreg::PYREG_ISA

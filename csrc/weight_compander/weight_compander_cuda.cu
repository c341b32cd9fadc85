// CUDA kernels of the weight compander. Formulas and notation: weight_compander.h.
//
// One launch for up to kTableTensors tensors, and for the gradients of a and b a second, small one that joins the
// parts' sums in a fixed order, without atomics. A block works on one chunk: on a part with all its threads, or on
// short rows with a warp for each. The tables are kernel parameters: no copy, no synchronisation, and a CUDA graph
// holds them.
//
// float64 tensors have launches of their own: their functions take twice the registers, which would cost all others
// half of their threads in flight.
//
// Accumulation: the elements of a pack of 16 bytes are summed in the accumulation type, packs in double.
// Bytes moved: forward, 2 elements a weight (read v, write w); gradient, 3 (read v and dL/dw, write dL/dv).
#include <vector>

#include "core/cuda.cuh"
#include "weight_compander/weight_compander.h"

namespace pyreg {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// A kernel's parameters take at most 32764 bytes.
constexpr int kTableTensors = 360;

// ---- one pass over the elements ----

// Packs of each tensor that a thread loads before it uses the first. More would cost registers, and with them other
// warps, whose loads are in flight meanwhile.
constexpr int kPacks = 2;

struct Table {
  CompanderTensor tensors[kTableTensors];  // first_chunk counts the chunks of this table
  CompanderSums* partial_sums;
  double decay_on_w, decay_on_v;
  int count;
};
static_assert(sizeof(Table) <= 32764);

// The tensor that holds the chunk: the last one that begins at or before it.
__device__ __forceinline__ const CompanderTensor& tensor_of(const Table& table, int chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.tensors[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return table.tensors[low];
}

template <typename Storage>
__device__ __forceinline__ Accumulate<Storage> largest_number() {
  if constexpr (std::is_same_v<Storage, double>) {
    return 1.7976931348623157e308;
  } else if constexpr (std::is_same_v<Storage, float16>) {
    return 65504.0f;
  } else {
    return std::is_same_v<Storage, float> ? 0x1.fffffep127f : 0x1.fep127f;
  }
}

template <CompanderKind kind, CompanderPass pass, typename Storage>
struct Step {
  using A = Accumulate<Storage>;
  CompanderCoefficients<A> c;
  CompanderDecay<A> decay;

  // What is written for an element; sums gain what it adds to them.
  __device__ __forceinline__ A operator()(A v, A g, Sums<A, 2>& sums) const {
    const CompanderTerms<A> terms = compander_terms<kind, A>(v * c.inverse_b);
    if constexpr (pass == CompanderPass::forward) return c.a * terms.value;
    if constexpr (pass == CompanderPass::to_weight) {
      return compander_to_weight<A>(g, v, c.a * terms.value, c.slope * terms.slope, decay, largest_number<Storage>());
    }
    if constexpr (pass == CompanderPass::rescale) return v + (g - v) * (c.slope * terms.slope);
    if constexpr (pass == CompanderPass::gradient_and_sums) {
      sums[0] += g * terms.value;
      sums[1] += g * terms.moment;
    }
    return g * (c.slope * terms.slope);
  }
};

// A part in packs of 16 bytes where all its tensors reach a 16-byte boundary at the same element, then one by one, as
// all of a float64 part: a pack of two would not fit into the registers beside what its functions need. Shared out
// among `lanes` threads of which this is number `lane`. Returns sum g f(u) and sum g u f'(u) of its elements.
template <CompanderPass pass, typename Storage, typename StepOfPass>
__device__ __forceinline__ CompanderSums walk_part(const Storage* v, const Storage* g, Storage* out, int size, int lane,
                                                   int lanes, const StepOfPass& step) {
  using A = Accumulate<Storage>;
  constexpr bool kHasPartner = pass != CompanderPass::forward;
  constexpr bool kByPacks = sizeof(Storage) < sizeof(double);
  constexpr int kSize = Pack<Storage>::kSize;
  const auto distance = [v](const Storage* p) {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(v);
  };
  const bool alike = kByPacks && (!kHasPartner || distance(g) % 16 == 0) && (out == nullptr || distance(out) % 16 == 0);
  const RowParts<Storage> row(v, size);
  const int head = alike ? static_cast<int>(row.head) : size, packs = alike ? static_cast<int>(row.packs) : 0;
  CompanderSums total{};
  const auto add = [&total](const Sums<A, 2>& sums) {
    if constexpr (pass == CompanderPass::gradient_and_sums) total = total + CompanderSums{sums[0], sums[1]};
  };
  for (int first = lane; kByPacks && first < packs; first += kPacks * lanes) {
    Pack<Storage> v_packs[kPacks], g_packs[kPacks];
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int pack = first + u * lanes;
      if (pack < packs) {
        v_packs[u] = load_pack(v + head + pack * kSize);
        if constexpr (kHasPartner) g_packs[u] = load_pack(g + head + pack * kSize);
      }
    }
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int pack = first + u * lanes;
      if (pack >= packs) break;
      Sums<A, 2> sums{};
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const A partner = kHasPartner ? widen(g_packs[u].value[i]) : A(0);
        v_packs[u].value[i] = narrow<Storage>(step(widen(v_packs[u].value[i]), partner, sums));
      }
      add(sums);
      if (out != nullptr) store_pack(out + head + pack * kSize, v_packs[u]);
    }
  }
#pragma unroll 1
  for (int j = lane; j < size - packs * kSize; j += lanes) {
    const int i = j < head ? j : j + packs * kSize;
    Sums<A, 2> sums{};
    const A result = step(widen(v[i]), kHasPartner ? widen(g[i]) : A(0), sums);
    add(sums);
    if (out != nullptr) out[i] = narrow<Storage>(result);
  }
  return total;
}

template <CompanderKind kind, CompanderPass pass, typename Storage>
__device__ __forceinline__ CompanderSums run_part(const Table& table, const CompanderTensor& tensor,
                                                  const CompanderPart& part, double a, double b, int lane, int lanes) {
  using A = Accumulate<Storage>;
  const Step<kind, pass, Storage> step{{a, b}, {static_cast<A>(table.decay_on_w), static_cast<A>(table.decay_on_v)}};
  const Storage* const g =
      pass == CompanderPass::forward ? nullptr : static_cast<const Storage*>(tensor.partner) + part.begin;
  Storage* const out = tensor.out == nullptr ? nullptr : static_cast<Storage*>(tensor.out) + part.begin;
  return walk_part<pass>(static_cast<const Storage*>(tensor.v) + part.begin, g, out, static_cast<int>(part.size), lane,
                         lanes, step);
}

template <CompanderKind kind, CompanderPass pass, bool is_double>
__global__ void __launch_bounds__(kThreads) run_chunks(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const CompanderTensor& tensor = tensor_of(table, chunk);
  const int parts_per_chunk = tensor.parts_per_chunk(), parts = tensor.parts();
  const int begin = (chunk - tensor.first_chunk) * parts_per_chunk;
  const int end = begin + parts_per_chunk < parts ? begin + parts_per_chunk : parts;
  const bool by_warp = parts_per_chunk > 1;
  const int thread = threadIdx.x;
  const int lane = by_warp ? thread % kWarpSize : thread, lanes = by_warp ? kWarpSize : kThreads;
  for (int p = begin + (by_warp ? thread / kWarpSize : 0); p < end; p += by_warp ? kWarps : 1) {
    const CompanderPart part = compander_part(tensor, p);
    const double a = tensor.a[part.row], b = tensor.b[part.row];
    CompanderSums sums{};
    if constexpr (is_double) {
      sums = run_part<kind, pass, double>(table, tensor, part, a, b, lane, lanes);
    } else if (tensor.dtype == Dtype::float32) {
      sums = run_part<kind, pass, float>(table, tensor, part, a, b, lane, lanes);
    } else if (tensor.dtype == Dtype::bfloat16) {
      sums = run_part<kind, pass, bfloat16>(table, tensor, part, a, b, lane, lanes);
    } else {
      sums = run_part<kind, pass, float16>(table, tensor, part, a, b, lane, lanes);
    }
    if constexpr (pass == CompanderPass::gradient_and_sums) {
      sums = by_warp ? group_sum<kWarpSize>(sums) : block_sum<kThreads>(sums);
      if (lane == 0) table.partial_sums[tensor.first_part + p] = {sums.a, -(a / b) * sums.b};
    }
  }
}

// ---- the gradients of a and b ----

// The parts of one tensor and, as indices into SumTable::gradients or -1, the gradients that they add to.
struct Source {
  int32_t first_part, parts_per_row, rows, a_gradient, b_gradient;
};

// A gradient whose tensors are spread over several tables is carried on in the totals.
struct Target {
  CompanderGradient gradient;
  bool resumes, ends;
};

struct SumTable {
  Source sources[kTableTensors];
  Target targets[2 * kTableTensors];
  const CompanderSums* partial_sums;
  double* totals;
  int source_count;
};
static_assert(sizeof(SumTable) <= 32764);

__device__ __forceinline__ void finish(const SumTable& table, const Target& target, int i, double total) {
  const CompanderGradient& gradient = target.gradient;
  if (target.resumes) total += table.totals[gradient.total + i];
  if (!target.ends) {
    table.totals[gradient.total + i] = total;
    return;
  }
  switch (gradient.dtype) {
    case Dtype::float64:
      static_cast<double*>(gradient.out)[i] = total;
      break;
    case Dtype::float32:
      static_cast<float*>(gradient.out)[i] = static_cast<float>(total);
      break;
    case Dtype::bfloat16:
      static_cast<bfloat16*>(gradient.out)[i] = narrow<bfloat16>(static_cast<float>(total));
      break;
    case Dtype::float16:
      static_cast<float16*>(gradient.out)[i] = narrow<float16>(static_cast<float>(total));
      break;
  }
}

// The sum of one member over every stride-th of a source's parts [begin, end).
__device__ __forceinline__ double sum_parts(const CompanderSums* sums, double CompanderSums::* member, int64_t begin,
                                            int64_t end, int stride) {
  double total = 0;
  for (int64_t p = begin; p < end; p += stride) total += sums[p].*member;
  return total;
}

// Block x works on target x: one value with all threads, one value a row with a thread for each row.
__global__ void __launch_bounds__(kThreads) add_up(const __grid_constant__ SumTable table) {
  const int index = blockIdx.x;
  const Target& target = table.targets[index];
  const bool by_row = target.gradient.size > 1;
  if (!by_row && blockIdx.y > 0) return;
  const int first = by_row ? static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x) : 0;
  const int stride = by_row ? static_cast<int>(gridDim.y) * kThreads : 1;
  for (int row = first; row < target.gradient.size; row += stride) {
    double total = 0;
    for (int s = 0; s < table.source_count; ++s) {
      const Source& source = table.sources[s];
      const int64_t begin =
          source.first_part + (by_row ? static_cast<int64_t>(row) * source.parts_per_row : threadIdx.x);
      const int64_t end =
          source.first_part + static_cast<int64_t>(by_row ? row + 1 : source.rows) * source.parts_per_row;
      const int step = by_row ? 1 : kThreads;
      if (source.a_gradient == index) total += sum_parts(table.partial_sums, &CompanderSums::a, begin, end, step);
      if (source.b_gradient == index) total += sum_parts(table.partial_sums, &CompanderSums::b, begin, end, step);
    }
    if (!by_row) total = block_sum<kThreads>(total);
    if (by_row || threadIdx.x == 0) finish(table, target, row, total);
  }
}

// ---- launches ----

// The tensors of one kind of launch, in tables of equal order: float64, or all others.
std::vector<std::vector<const CompanderTensor*>> tables_of(const CompanderArgs& args, bool is_double) {
  std::vector<std::vector<const CompanderTensor*>> tables;
  for (int64_t t = 0; t < args.count; ++t) {
    if ((args.tensors[t].dtype == Dtype::float64) != is_double) continue;
    if (tables.empty() || tables.back().size() == kTableTensors) tables.emplace_back();
    tables.back().push_back(&args.tensors[t]);
  }
  return tables;
}

template <CompanderKind kind, CompanderPass pass>
void launch_table(const CompanderArgs& args, const std::vector<const CompanderTensor*>& tensors) {
  Table table{};
  int chunks = 0;
  for (const CompanderTensor* tensor : tensors) {
    table.tensors[table.count] = *tensor;
    table.tensors[table.count++].first_chunk = chunks;
    chunks += tensor->chunks();
  }
  table.partial_sums = args.partial_sums;
  table.decay_on_w = args.decay_on_w;
  table.decay_on_v = args.decay_on_v;
  if (tensors[0]->dtype == Dtype::float64) {
    PYREG_LAUNCH((run_chunks<kind, pass, true>), chunks, kThreads, 0, args.stream, table);
  } else {
    PYREG_LAUNCH((run_chunks<kind, pass, false>), chunks, kThreads, 0, args.stream, table);
  }
}

// Joins the sums of every table's parts. `tables` are all of the call.
void launch_sums(const CompanderArgs& args, const std::vector<std::vector<const CompanderTensor*>>& tables) {
  constexpr int kNone = -1;
  std::vector<int> first_table(args.gradient_count, kNone), last_table(args.gradient_count, kNone);
  const auto for_each_gradient = [&](int t, auto&& f) {
    for (const CompanderTensor* tensor : tables[t]) {
      for (const int32_t gradient : {tensor->a_gradient, tensor->b_gradient}) {
        if (gradient >= 0) f(gradient);
      }
    }
  };
  const int count = static_cast<int>(tables.size());
  for (int t = 0; t < count; ++t) {
    for_each_gradient(t, [&](int32_t gradient) {
      if (first_table[gradient] == kNone) first_table[gradient] = t;
      last_table[gradient] = t;
    });
  }
  for (int t = 0; t < count; ++t) {
    SumTable table{};
    table.partial_sums = args.partial_sums;
    table.totals = args.totals;
    int targets = 0, rows = 1;
    std::vector<int32_t> target_of(args.gradient_count, kNone);
    for_each_gradient(t, [&](int32_t gradient) {
      if (target_of[gradient] != kNone) return;
      target_of[gradient] = targets;
      table.targets[targets++] = {args.gradients[gradient], first_table[gradient] < t, last_table[gradient] == t};
      rows = args.gradients[gradient].size > rows ? args.gradients[gradient].size : rows;
    });
    if (targets == 0) continue;
    const auto index = [&](int32_t gradient) { return gradient < 0 ? kNone : target_of[gradient]; };
    for (const CompanderTensor* tensor : tables[t]) {
      table.sources[table.source_count++] = {tensor->first_part, tensor->parts_per_row(), tensor->rows,
                                             index(tensor->a_gradient), index(tensor->b_gradient)};
    }
    const int blocks = (rows + kThreads - 1) / kThreads;
    const dim3 grid(static_cast<unsigned>(targets), static_cast<unsigned>(blocks < 1024 ? blocks : 1024));
    PYREG_LAUNCH(add_up, grid, kThreads, 0, args.stream, table);
  }
}

template <CompanderKind kind, CompanderPass pass>
void run_pass(const CompanderArgs& args) {
  std::vector<std::vector<const CompanderTensor*>> tables = tables_of(args, false);
  for (auto& table : tables_of(args, true)) tables.push_back(std::move(table));
  for (const auto& table : tables) launch_table<kind, pass>(args, table);
  if constexpr (pass == CompanderPass::gradient_and_sums) launch_sums(args, tables);
}

template <CompanderKind kind>
void run_kind(const CompanderArgs& args) {
  switch (args.pass) {
    case CompanderPass::forward:
      return run_pass<kind, CompanderPass::forward>(args);
    case CompanderPass::gradient:
      return run_pass<kind, CompanderPass::gradient>(args);
    case CompanderPass::gradient_and_sums:
      return run_pass<kind, CompanderPass::gradient_and_sums>(args);
    case CompanderPass::to_weight:
      return run_pass<kind, CompanderPass::to_weight>(args);
    case CompanderPass::rescale:
      return run_pass<kind, CompanderPass::rescale>(args);
  }
}

}  // namespace

namespace cuda {

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

}  // namespace cuda

}  // namespace pyreg

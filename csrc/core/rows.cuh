// Rows on CUDA: how threads share the rows of a tensor [outer, classes, inner], and how they walk over one.
//
// A row is worked on by a team of threads. A contiguous row has a team of 1 to 32 lanes of a warp (several rows a warp)
// or a block; of interleaved rows (inner > 1) each warp takes 32 neighbours, so that its loads are contiguous, and the
// warps of a block share out the classes. One kernel body serves all: see Team and RowView. Where a kernel touches its
// row again after a reduction, a block keeps it in shared memory; a row that is longer than that, or that belongs to a
// part of a warp, comes from L2 or L1 the second time.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/cuda.cuh"
#include "core/rows.h"

namespace pyreg::cuda {

// Threads of the largest block. Kernels that read one stream stay within the 64 registers of 1024 threads; with two
// 16-byte loads in flight each these keep 32 KB in flight, where 20 KB hide the latency of an H100's memory (computed).
// Kernels that read two streams, or have logarithms or doubles, need up to 128 registers.
template <typename Storage>
constexpr int kOneStreamThreads = sizeof(Storage) == 8 ? 512 : 1024;
constexpr int kTwoStreamThreads = 512;
// Blocks that hold several teams, and blocks that do not keep their row: these gain nothing from being large, and
// several small ones hide each other's reductions.
constexpr int kSmallBlockThreads = 256;
// Bytes of a row for each thread of a team in a warp: eight 16-byte loads, enough to spread out the cost of a
// reduction, and few enough that the lines a warp touches stay in L1 until they are used up.
constexpr int64_t kWarpBytesPerThread = 128;
// The same in a block. With it, blocks whose rows together fill the shared memory of a multiprocessor (228 KB on sm_90)
// have about 1024 threads together, however many they are.
constexpr int64_t kBlockBytesPerThread = 256;
// Threads on a multiprocessor below which teams grow although their share of a row shrinks, down to four loads.
constexpr int64_t kBusyThreads = 1024;
constexpr int64_t kLeastBytesPerThread = 64;
// Classes of one thread where rows are interleaved; bounds the rounding error of its sequential sum.
constexpr int64_t kClassesPerThread = 16;
// Blocks a multiprocessor gets before blocks loop over tiles: many, so that their ends even out.
constexpr int64_t kBlocksPerMultiprocessor = 64;
// Scratch of a reduction for each warp, or for each thread where rows are interleaved: the largest value reduced.
constexpr int kReducedBytes = 24;
// Element indices are 32 bits wide, with room for the step beyond the last: with 64 the walks below need more registers
// than a block of 1024 threads has.
constexpr int64_t kMaxClasses = int64_t{1} << 30;

// How the threads of a block share rows; the same for all blocks of a launch. Kernels read it from constant memory:
// what they could compute from it would cost them registers.
struct Tiling {
  int threads;        // of a block
  int team;           // threads of a row, a power of two
  int columns;        // rows between a team's neighbouring threads: 1, or a multiple of 32 where rows are interleaved
  int cached_packs;   // of a row, kept in shared memory
  int scratch_bytes;  // of shared memory, for reductions
  int64_t rows;       // outer * inner
  int64_t rows_per_tile;  // threads / team
  int64_t tiles;          // the last one may be incomplete
  int64_t slab;           // classes * inner
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two_up_to(int64_t n, int limit) {
  return n >= limit ? limit : next_power_of_two(static_cast<int>(std::max<int64_t>(n, 1)));
}

inline Tiling choose_tiling(const RowLayout& layout, int64_t element_size, int max_threads, bool keep_row) {
  if (layout.classes > kMaxClasses) {
    throw std::invalid_argument("pyreg: CUDA row kernels take rows of at most 2^30 elements, got " +
                                std::to_string(layout.classes));
  }
  Tiling tiling{};
  tiling.rows = layout.rows();
  tiling.slab = layout.classes * layout.inner;
  if (layout.inner == 1) {
    const int64_t bytes = layout.classes * element_size;
    int64_t team = power_of_two_up_to(divide_up(bytes, kWarpBytesPerThread), 2 * kWarpSize);
    if (team > kWarpSize) {
      team = power_of_two_up_to(divide_up(bytes, kBlockBytesPerThread), keep_row ? max_threads : kSmallBlockThreads);
    }
    const int64_t busy = kBusyThreads * multiprocessor_count();
    while (team < max_threads && tiling.rows * team < busy && team * kLeastBytesPerThread < bytes) team *= 2;
    tiling.team = static_cast<int>(team);
    tiling.columns = 1;
    tiling.threads = std::max(tiling.team, kSmallBlockThreads);
    if (tiling.team > kWarpSize) {
      tiling.threads = tiling.team;
      tiling.scratch_bytes = tiling.threads / kWarpSize * kReducedBytes;
    }
  } else {
    tiling.team = power_of_two_up_to(divide_up(layout.classes, kClassesPerThread), max_threads / kWarpSize);
    tiling.threads = tiling.team == 1 ? kSmallBlockThreads : kWarpSize * tiling.team;
    tiling.columns = tiling.threads / tiling.team;
    tiling.scratch_bytes = tiling.team == 1 ? 0 : tiling.threads * kReducedBytes;
  }
  tiling.scratch_bytes = (tiling.scratch_bytes + 15) / 16 * 16;
  if (keep_row && tiling.columns == 1 && tiling.team > kWarpSize) {
    const int64_t available = max_dynamic_shared() - tiling.scratch_bytes;
    tiling.cached_packs = static_cast<int>(std::min(layout.classes * element_size, available) / 16);
  }
  tiling.rows_per_tile = tiling.threads / tiling.team;
  tiling.tiles = divide_up(tiling.rows, tiling.rows_per_tile);
  return tiling;
}

// Launches kernel(args, tiling) over all rows. `keep_row`: it touches a row more than once.
template <typename Args>
void launch_rows(const char* name, void (*kernel)(Args, Tiling), const Args& args, int64_t element_size,
                 int max_threads, bool keep_row) {
  const Tiling tiling = choose_tiling(args.layout, element_size, max_threads, keep_row);
  if (tiling.tiles == 0) return;
  const int64_t grid = std::min(tiling.tiles, kBlocksPerMultiprocessor * multiprocessor_count());
  const size_t shared = static_cast<size_t>(tiling.scratch_bytes) + static_cast<size_t>(tiling.cached_packs) * 16;
  allow_dynamic_shared(kernel, shared);
  launch(name, false, kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(tiling.threads)), shared,
         args.stream, args, tiling);
}

// The threads that work on one row.
class Team {
 public:
  const Tiling& tiling;
  int number;  // of this team in its block
  int rank;    // of this thread in its team

  __device__ explicit Team(const Tiling& tiles) : tiling(tiles) {
    const int thread = static_cast<int>(threadIdx.x);
    number = tiling.columns == 1 ? thread / tiling.team : thread % tiling.columns;
    rank = tiling.columns == 1 ? thread % tiling.team : thread / tiling.columns;
  }
  __device__ int size() const { return tiling.team; }

  // Every thread of the block calls it; every thread of a team gets the same bits.
  template <typename T, typename Combine>
  __device__ T reduce(T value, Combine combine) const {
    static_assert(sizeof(T) <= kReducedBytes, "the scratch is too small for this value");
    const bool interleaved = tiling.columns > 1;
    if (!interleaved) value = reduce_lanes(value, size(), combine);
    if (!spans_warps()) return value;
    T* partial = dynamic_shared<T>();
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;  // a power of two
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    __syncthreads();  // the block may still be reading what the call before left there
    if (interleaved) {
      partial[threadIdx.x] = value;
    } else if (lane == 0) {
      partial[warp] = value;
    }
    __syncthreads();
    if (!interleaved) return reduce_lanes(partial[lane % warps], warps, combine);
    value = partial[lane];
#pragma unroll 1
    for (int i = 1; i < warps; ++i) value = combine(value, partial[i * kWarpSize + lane]);
    return value;
  }

  template <typename T>
  __device__ T sum(T value) const {
    return reduce(value, Plus{});
  }

  // What the team has read is read before any of it writes.
  __device__ void barrier() const {
    if (spans_warps()) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

 private:
  __device__ bool spans_warps() const { return tiling.columns == 1 ? size() > kWarpSize : size() > 1; }

  // Reduces each aligned group of `width` lanes, of the whole warp where width is larger.
  template <typename T, typename Combine>
  __device__ static T reduce_lanes(T value, int width, Combine combine) {
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      if (offset < width) value = combine(value, shuffle_xor<kWarpSize>(value, offset));
    }
    return value;
  }
};

// Calls body(row, team) for the rows of every tile of this block, beyond the last row too: reductions need all threads.
template <typename Body>
__device__ __forceinline__ void for_each_row(const Tiling& tiling, Body&& body) {
  const Team team(tiling);
  for (int64_t tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    body(tile * tiling.rows_per_tile + team.number, team);
  }
}

// Where a row begins; `stride` is the distance between rows that are not interleaved.
__device__ __forceinline__ int64_t row_offset(const Tiling& tiling, const RowLayout& layout, int64_t row,
                                              int64_t stride) {
  if (layout.inner == 1) return row * stride;
  return row / layout.inner * tiling.slab + row % layout.inner;
}

// Stands for a second input or an output that a walk does not have.
struct None {};
template <typename T>
constexpr bool kIsNone = std::is_same_v<T, None>;

// N neighbours of a row, whose address is a multiple of 16 bytes.
template <typename T, int N>
struct Values {
  static_assert(N % Pack<T>::kSize == 0, "whole packs");
  Pack<T> pack[N / Pack<T>::kSize];

  __device__ __forceinline__ T& operator[](int i) { return pack[i / Pack<T>::kSize].value[i % Pack<T>::kSize]; }
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < N / Pack<T>::kSize; ++i) pack[i] = load_pack(from + i * Pack<T>::kSize);
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < N / Pack<T>::kSize; ++i) store_pack(to + i * Pack<T>::kSize, pack[i]);
  }
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Sets v[at] where there is such an element; at is a run-time index into registers.
template <typename A, int N>
__device__ __forceinline__ void replace(A (&v)[N], int at, A value) {
  if (static_cast<unsigned>(at) >= static_cast<unsigned>(N)) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i == at) v[i] = value;
  }
}

// A row as 16-byte packs where it is contiguous, and single elements before and after them.
template <typename Storage>
struct PackedRow {
  static constexpr int kSize = Pack<Storage>::kSize;
  int head;     // index of the first pack's first element
  int packs;    // number of packs
  int singles;  // number of elements outside the packs

  __device__ __forceinline__ explicit PackedRow(int n) : head(n), packs(0), singles(n) {}
  __device__ __forceinline__ PackedRow(const Storage* row, int n, bool contiguous) : PackedRow(n) {
    if (!contiguous) return;
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Storage));
    head = min((kSize - misaligned) % kSize, n);
    packs = (n - head) / kSize;
    singles = n - packs * kSize;
  }
  __device__ __forceinline__ int pack_index(int pack) const { return head + pack * kSize; }
  __device__ __forceinline__ int single_index(int i) const { return i < head ? i : i + packs * kSize; }
};

enum class Touch { first, again };

// A row as its team walks over it. Every walk gives a thread the same elements.
template <typename Storage>
class RowView {
  using A = Accumulate<Storage>;
  static constexpr int kSize = Pack<Storage>::kSize;
  static constexpr int kPart = std::min(kSize, 4);  // of a pack widened at once: 8 floats need too many registers

 public:
  const int n;

  __device__ __forceinline__ RowView(const void* data, const RowLayout& layout, int64_t row, int64_t row_stride,
                                     bool exists, const Team& team)
      : n(exists ? static_cast<int>(layout.classes) : 0),
        data_(static_cast<const Storage*>(data) + (exists ? row_offset(team.tiling, layout, row, row_stride) : 0)),
        stride_(layout.inner),
        parts_(data_, n, layout.inner == 1),
        team_(team) {}

  __device__ A operator[](int j) const { return widen(data_[j * stride_]); }

  // Calls f(j, x, y) for elements j, j + 1, ... of this row, x, and of the row at `second`, y: arrays of one size, of
  // one element or a part of a pack. What f leaves in x goes to `out`. The first walk leaves packs in shared memory.
  // Where the rows do not reach a 16-byte boundary at the same element, one by one.
  template <Touch kTouch, typename Second, typename Out, typename Function>
  __device__ __forceinline__ void walk(const Second* second, Out* out, Function&& f) const {
    bool same_boundaries = true;
    if constexpr (!kIsNone<Second>) same_boundaries = is_aligned(second + parts_.head);
    if constexpr (!kIsNone<Out>) same_boundaries = same_boundaries && is_aligned(out + parts_.head);
    PackedRow<Storage> parts = parts_;
    if (same_boundaries) {
      walk_packs<kTouch>(second, out, f);
    } else {
      parts = PackedRow<Storage>(n);
    }
    walk_singles(parts, second, out, f);
  }

  template <Touch kTouch, typename Function>
  __device__ __forceinline__ void read(Function&& f) const {
    walk<kTouch>(static_cast<const None*>(nullptr), static_cast<None*>(nullptr), f);
  }

  template <Touch kTouch, typename Out, typename Function>
  __device__ __forceinline__ void write(Out* out, Function&& f) const {
    walk<kTouch>(static_cast<const None*>(nullptr), out, f);
  }

 private:
  const Storage* data_;
  const int64_t stride_;
  const PackedRow<Storage> parts_;
  const Team& team_;

  template <Touch kTouch, typename Second, typename Out, typename Function>
  __device__ __forceinline__ void walk_packs(const Second* second, Out* out, Function&& f) const {
    constexpr int kInFlight = kTouch == Touch::first ? 2 : 1;
    using Other = std::conditional_t<kIsNone<Second>, Storage, Second>;
    Pack<Storage>* cache = dynamic_shared<Pack<Storage>>() + team_.tiling.scratch_bytes / 16;
    const int cached = team_.tiling.cached_packs;
    const int step = kInFlight * team_.size();

    // The second touch runs backwards: what was read last is in L2 most surely.
    constexpr bool kForwards = kTouch == Touch::first;
    int start = team_.rank + (kForwards ? 0 : (parts_.packs - 1) / step * step);
#pragma unroll 1
    for (; kForwards ? start < parts_.packs : start >= 0; start += kForwards ? step : -step) {
      Pack<Storage> pack[kInFlight];
      Values<Other, kSize> other[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int p = start + u * team_.size();
        if (p < parts_.packs) {
          const int j = parts_.pack_index(p);
          if (kTouch == Touch::again && p < cached) {
            pack[u] = cache[p];
          } else {
            pack[u] = load_pack(data_ + j);
          }
          if constexpr (!kIsNone<Second>) other[u].load(second + j);
        }
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int p = start + u * team_.size();
        if (p < parts_.packs) {
          const int j = parts_.pack_index(p);
          if (kTouch == Touch::first && p < cached) cache[p] = pack[u];
          Values<std::conditional_t<kIsNone<Out>, Storage, Out>, kSize> result;
#pragma unroll
          for (int part = 0; part < kSize; part += kPart) {
            A x[kPart], y[kPart];
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              x[k] = widen(pack[u].value[part + k]);
              if constexpr (!kIsNone<Second>) y[k] = widen(other[u][part + k]);
            }
            f(j + part, x, y);
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              if constexpr (!kIsNone<Out>) result[part + k] = narrow<Out>(x[k]);
            }
          }
          if constexpr (!kIsNone<Out>) result.store(out + j);
        }
      }
    }
  }

  template <typename Second, typename Out, typename Function>
  __device__ __forceinline__ void walk_singles(const PackedRow<Storage>& parts, const Second* second, Out* out,
                                               Function&& f) const {
    constexpr int kInFlight = 4;
    using Other = std::conditional_t<kIsNone<Second>, Storage, Second>;
#pragma unroll 1
    for (int start = team_.rank; start < parts.singles; start += kInFlight * team_.size()) {
      Storage element[kInFlight];
      Other other[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = start + u * team_.size();
        if (i < parts.singles) {
          element[u] = data_[parts.single_index(i) * stride_];
          if constexpr (!kIsNone<Second>) other[u] = second[parts.single_index(i) * stride_];
        }
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = start + u * team_.size();
        if (i < parts.singles) {
          const int j = parts.single_index(i);
          A x[1] = {widen(element[u])}, y[1];
          if constexpr (!kIsNone<Second>) y[0] = widen(other[u]);
          f(j, x, y);
          if constexpr (!kIsNone<Out>) out[j * stride_] = narrow<Out>(x[0]);
        }
      }
    }
  }
};

// Sets every element of a row.
template <typename Out>
__device__ __forceinline__ void fill_row(Out* out, const RowLayout& layout, Accumulate<Out> value, const Team& team) {
  constexpr int kSize = Pack<Out>::kSize;
  const PackedRow<Out> parts(out, static_cast<int>(layout.classes), layout.inner == 1);
  Values<Out, kSize> values;
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = narrow<Out>(value);
  for (int p = team.rank; p < parts.packs; p += team.size()) values.store(out + parts.pack_index(p));
  for (int i = team.rank; i < parts.singles; i += team.size()) {
    out[parts.single_index(i) * layout.inner] = narrow<Out>(value);
  }
}

}  // namespace pyreg::cuda

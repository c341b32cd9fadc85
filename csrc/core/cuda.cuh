// What every CUDA kernel here shares: launching, shared memory, reductions, and walking a row in 16-byte packs.
//
// Compiled by nvcc, and by the host compiler against the emulation of CUDA in tests/cuda_on_cpu.
// Everything is deterministic: sums follow a fixed tree, and no result depends on the order of threads.
// Blocks are one-dimensional and a multiple of 32 threads: shuffles name all 32 lanes of a warp.
#pragma once

#include <cooperative_groups.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "core/dtype.h"

namespace pyreg {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// Host: errors, device properties, launches.

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline constexpr int kMaxDevices = 64;
template <cudaDeviceAttr attribute>
inline std::array<std::atomic<int>, kMaxDevices> cached_attribute{};  // 0: not asked yet

template <cudaDeviceAttr attribute>
int device_attribute() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kMaxDevices) throw std::runtime_error("pyreg: device index " + std::to_string(device) + " is over 63");
  std::atomic<int>& cached = cached_attribute<attribute>[device];
  int value = cached.load(std::memory_order_relaxed);
  if (value == 0) {
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    cached.store(value, std::memory_order_relaxed);
  }
  return value;
}

inline int multiprocessor_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Bytes of dynamic shared memory that a block may have after `allow_dynamic_shared`.
inline int max_dynamic_shared() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

// More than 48 KB of dynamic shared memory must be asked for once per kernel and device.
template <typename... Parameters>
void allow_dynamic_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
}

// Blocks of this kernel that fit on the whole device at once: the largest grid of a cooperative launch.
template <typename... Parameters>
int max_cooperative_grid(void (*kernel)(Parameters...), int threads, size_t dynamic_shared_bytes) {
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads,
                                                           dynamic_shared_bytes),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks * multiprocessor_count();
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_shared_bytes, void* stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
#if defined(PYREG_CUDA_EMULATION)
  (void)stream;
  pyreg_emulation::launch(name, cooperative, kernel, grid, block, dynamic_shared_bytes,
                          std::forward<Arguments>(arguments)...);
#else
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  const cudaError_t error = std::apply(
      [&](auto&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        const void* function = reinterpret_cast<const void*>(kernel);
        if (cooperative) {
          return cudaLaunchCooperativeKernel(function, grid, block, pointers, dynamic_shared_bytes, cuda_stream);
        }
        return cudaLaunchKernel(function, grid, block, pointers, dynamic_shared_bytes, cuda_stream);
      },
      values);
  // The same error stays behind as the runtime's last error: take it away, or it is blamed on the next launch.
  const cudaError_t last = cudaGetLastError();
  check_cuda(error != cudaSuccess ? error : last, name);
#endif
}

// PYREG_LAUNCH((kernel<float, 4>), grid, block, dynamic_shared_bytes, stream, arguments...): throws std::runtime_error
// with the kernel's name where the launch fails. A kernel whose name holds a comma stands in parentheses.
#define PYREG_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::pyreg::launch(#kernel, false, kernel, grid, block, dynamic_shared_bytes, stream, __VA_ARGS__)

// The same for a kernel that calls `grid_barrier()`; the grid is at most `max_cooperative_grid`.
#define PYREG_LAUNCH_COOPERATIVE(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::pyreg::launch(#kernel, true, kernel, grid, block, dynamic_shared_bytes, stream, __VA_ARGS__)

// Device: shared memory and barriers.

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16 bytes");
#if defined(PYREG_CUDA_EMULATION)
  return static_cast<T*>(pyreg_emulation::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char pyreg_dynamic_shared[];
  return reinterpret_cast<T*>(pyreg_dynamic_shared);
#endif
}

// Waits for every thread of the grid and makes their writes visible. Cooperative launches only.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// The same for `blocks` blocks of a cooperative launch that share `arrivals`, 0 at its beginning. `expected` is each
// block's own, from barrier to barrier: 0 before the first; its first thread alone uses it. Counts may wrap around.
__device__ __forceinline__ void group_barrier(unsigned* arrivals, unsigned blocks, unsigned& expected) {
#if defined(PYREG_CUDA_EMULATION)
  (void)expected;
  pyreg_emulation::group_barrier(arrivals, blocks, {__FILE__, __LINE__});
#else
  __syncthreads();
  if (threadIdx.x == 0) {
    // What the block has written is seen by whoever sees its arrival, for the barrier and the release build on each
    // other; so do the acquire and the barrier after it.
    unsigned arrived;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(arrivals) : "memory");
    ++arrived;
    expected += blocks;
    while (static_cast<int>(arrived - expected) < 0) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(arrivals) : "memory");
    }
  }
  __syncthreads();
#endif
}

// Device: reductions over `WIDTH` neighbouring lanes and over a block.
//
// `combine(a, b)` must be commutative to the bit; then all lanes end with the same bits.

// Several sums carried together, so that they share shuffles' latency and barriers. A value of any
// trivially copyable struct of 4-byte words with an `operator+`, whose `T{}` is zero, sums the same way.
template <typename T, int N>
struct Sums {
  T value[N];

  __device__ __forceinline__ T& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
  __device__ __forceinline__ friend Sums operator+(const Sums& a, const Sums& b) {
    Sums sum;
#pragma unroll
    for (int i = 0; i < N; ++i) sum.value[i] = a.value[i] + b.value[i];
    return sum;
  }
};

// A candidate of an argmax. NaN is the largest value, as in torch, and the lowest index wins a tie.
template <typename T>
struct MaxIndex {
  T value;
  int64_t index;

  __device__ __forceinline__ static MaxIndex none() { return {-static_cast<T>(INFINITY), INT64_MAX}; }
  __device__ __forceinline__ friend MaxIndex better_of(const MaxIndex& a, const MaxIndex& b) {
    const bool a_is_nan = a.value != a.value;
    const bool b_is_nan = b.value != b.value;
    const bool a_wins = a_is_nan != b_is_nan             ? a_is_nan
                        : a_is_nan || a.value == b.value ? a.index < b.index
                                                         : a.value > b.value;
    return a_wins ? a : b;
  }
};

struct Plus {
  template <typename T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

struct BetterOf {
  template <typename T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return better_of(a, b);
  }
};

template <int WIDTH, typename T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "shuffles move 4-byte words");
  constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kFullWarp, words[i], lane_mask, WIDTH);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// Reduces each aligned group of WIDTH lanes; all 32 lanes of the warp must call it.
template <int WIDTH, typename T, typename Combine>
__device__ __forceinline__ T group_reduce(T value, Combine combine) {
  static_assert(WIDTH >= 1 && WIDTH <= kWarpSize && (WIDTH & (WIDTH - 1)) == 0, "WIDTH is a power of two up to 32");
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) value = combine(value, shuffle_xor<WIDTH>(value, offset));
  return value;
}

template <int WIDTH, typename T>
__device__ __forceinline__ T group_sum(T value) {
  return group_reduce<WIDTH>(value, Plus{});
}

template <int WIDTH, typename T>
__device__ __forceinline__ MaxIndex<T> group_max_index(MaxIndex<T> candidate) {
  return group_reduce<WIDTH>(candidate, BetterOf{});
}

__host__ __device__ constexpr int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Reduces over the THREADS threads of the block; every thread calls it and gets the result.
template <int THREADS, typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T identity, Combine combine) {
  static_assert(THREADS % kWarpSize == 0 && THREADS >= kWarpSize && THREADS <= 1024, "THREADS is a multiple of 32");
  constexpr int kWarps = THREADS / kWarpSize;
  value = group_reduce<kWarpSize>(value, combine);
  if constexpr (kWarps > 1) {
    __shared__ T partial[kWarps];
    constexpr int kWidth = next_power_of_two(kWarps);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    __syncthreads();  // the block may still be reading `partial` of the call before
    if (lane == 0) partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    const int slot = lane % kWidth;
    value = group_reduce<kWidth>(slot < kWarps ? partial[slot] : identity, combine);
  }
  return value;
}

template <int THREADS, typename T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce<THREADS>(value, T{}, Plus{});
}

template <int THREADS, typename T>
__device__ __forceinline__ MaxIndex<T> block_max_index(MaxIndex<T> candidate) {
  return block_reduce<THREADS>(candidate, MaxIndex<T>::none(), BetterOf{});
}

// Device: rows in memory.

// 16 bytes of a row, moved by one instruction.
template <typename Storage>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(Storage);
  Storage value[kSize];
};

// `address` is aligned to 16 bytes.
template <typename Storage>
__device__ __forceinline__ Pack<Storage> load_pack(const Storage* address) {
  const uint4 words = *reinterpret_cast<const uint4*>(address);
  Pack<Storage> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}

// `address` is global memory aligned to 16 bytes. An assignment through uint4* may be split into narrower stores.
template <typename Storage>
__device__ __forceinline__ void store_pack(Storage* address, const Pack<Storage>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof(words));
  __stwb(reinterpret_cast<uint4*>(address), words);
}

// Packs that a thread loads before it uses the first: four 16-byte loads a thread hide the latency of memory.
inline constexpr int kPacksInFlight = 4;

// A row as scalars up to the first 16-byte boundary, whole packs, and the scalars left over.
template <typename Storage>
struct RowParts {
  int64_t head;     // index of the first pack's first element
  int64_t packs;    // number of packs
  int64_t scalars;  // number of elements outside the packs

  __device__ __forceinline__ RowParts(const Storage* row, int64_t n) {
    constexpr int kSize = Pack<Storage>::kSize;
    const unsigned misaligned = static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Storage));
    head = (kSize - misaligned) % kSize;
    if (head > n) head = n;
    packs = (n - head) / kSize;
    scalars = n - packs * kSize;
  }

  __device__ __forceinline__ int64_t pack_index(int64_t pack) const { return head + pack * Pack<Storage>::kSize; }
  __device__ __forceinline__ int64_t scalar_index(int64_t i) const {
    return i < head ? i : i + packs * Pack<Storage>::kSize;
  }
};

// Calls f(j, widen(row[j])) once for each j < n, shared out among `lanes` threads of which this is number `lane`.
template <typename Storage, typename Function>
__device__ __forceinline__ void for_each_in_row(const Storage* row, int64_t n, int lane, int lanes, Function&& f) {
  const RowParts<Storage> parts(row, n);
  for (int64_t first = lane; first < parts.packs; first += kPacksInFlight * static_cast<int64_t>(lanes)) {
    Pack<Storage> pack[kPacksInFlight];
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) {
      const int64_t p = first + static_cast<int64_t>(u) * lanes;
      if (p < parts.packs) pack[u] = load_pack(row + parts.pack_index(p));
    }
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) {
      const int64_t p = first + static_cast<int64_t>(u) * lanes;
      if (p < parts.packs) {
        const int64_t j = parts.pack_index(p);
#pragma unroll
        for (int i = 0; i < Pack<Storage>::kSize; ++i) f(j + i, widen(pack[u].value[i]));
      }
    }
  }
#pragma unroll 1
  for (int64_t i = lane; i < parts.scalars; i += lanes) {
    const int64_t j = parts.scalar_index(i);
    f(j, widen(row[j]));
  }
}

// out[j] = narrow(f(j, widen(in[j]))) for each j < n. `in` and `out` are the same row or do not overlap.
// In packs where both rows reach a 16-byte boundary at the same index, else one by one.
template <typename Storage, typename Function>
__device__ __forceinline__ void transform_row(const Storage* in, Storage* out, int64_t n, int lane, int lanes,
                                              Function&& f) {
  RowParts<Storage> parts(in, n);
  if ((reinterpret_cast<uintptr_t>(in) - reinterpret_cast<uintptr_t>(out)) % 16 != 0) {
    parts.head = parts.scalars = n;
    parts.packs = 0;
  }
  for (int64_t first = lane; first < parts.packs; first += kPacksInFlight * static_cast<int64_t>(lanes)) {
    Pack<Storage> pack[kPacksInFlight];
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) {
      const int64_t p = first + static_cast<int64_t>(u) * lanes;
      if (p < parts.packs) pack[u] = load_pack(in + parts.pack_index(p));
    }
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) {
      const int64_t p = first + static_cast<int64_t>(u) * lanes;
      if (p < parts.packs) {
        const int64_t j = parts.pack_index(p);
#pragma unroll
        for (int i = 0; i < Pack<Storage>::kSize; ++i) {
          pack[u].value[i] = narrow<Storage>(f(j + i, widen(pack[u].value[i])));
        }
        store_pack(out + j, pack[u]);
      }
    }
  }
#pragma unroll 1
  for (int64_t i = lane; i < parts.scalars; i += lanes) {
    const int64_t j = parts.scalar_index(i);
    out[j] = narrow<Storage>(f(j, widen(in[j])));
  }
}

}  // namespace pyreg

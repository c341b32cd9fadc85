// Stands in for the CUDA toolkit's header: the subset that the kernels here use, on the emulator.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../emulator.h"

#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// Vector types. The wide ones are how kernels read memory of any type, hence may_alias.

#define PYREG_VECTOR2(Type, Element, alignment)                \
  struct __attribute__((may_alias, aligned(alignment))) Type { \
    Element x, y;                                              \
  };                                                           \
  inline Type make_##Type(Element x, Element y) { return {x, y}; }
#define PYREG_VECTOR4(Type, Element, alignment)                \
  struct __attribute__((may_alias, aligned(alignment))) Type { \
    Element x, y, z, w;                                        \
  };                                                           \
  inline Type make_##Type(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }

PYREG_VECTOR2(ushort2, unsigned short, 4)
PYREG_VECTOR4(ushort4, unsigned short, 8)
PYREG_VECTOR2(int2, int, 8)
PYREG_VECTOR4(int4, int, 16)
PYREG_VECTOR2(uint2, unsigned, 8)
PYREG_VECTOR4(uint4, unsigned, 16)
PYREG_VECTOR2(float2, float, 8)
PYREG_VECTOR4(float4, float, 16)
PYREG_VECTOR2(double2, double, 16)
PYREG_VECTOR2(longlong2, long long, 16)
PYREG_VECTOR2(ulonglong2, unsigned long long, 16)
#undef PYREG_VECTOR2
#undef PYREG_VECTOR4

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// Barriers, shuffles, votes. `file` and `line` are the caller's: errors name them, and lanes that meet must agree on
// them.

#define PYREG_CALLED_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PYREG_CALLED_FROM) { pyreg_emulation::block_barrier({file, line}); }
inline int __syncthreads_or(int predicate, PYREG_CALLED_FROM) {
  return pyreg_emulation::block_any(predicate != 0, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, PYREG_CALLED_FROM) {
  pyreg_emulation::warp_operation(pyreg_emulation::WarpOperation::sync, mask, 0, 0, 32, {file, line});
}

inline unsigned __activemask() { return pyreg_emulation::active_lanes(); }

inline unsigned __ballot_sync(unsigned mask, int predicate, PYREG_CALLED_FROM) {
  return static_cast<unsigned>(pyreg_emulation::warp_operation(pyreg_emulation::WarpOperation::ballot, mask,
                                                               predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, PYREG_CALLED_FROM) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PYREG_CALLED_FROM) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

namespace pyreg_emulation {

inline int lane_of_warp() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

template <typename T>
T shuffle(unsigned mask, T value, int source_lane, int width, Place place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(WarpOperation::shuffle, mask, bits, source_lane, width, place);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace pyreg_emulation

// Which lane each variant reads, as the PTX manual defines shfl.sync.

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, PYREG_CALLED_FROM) {
  const int first = pyreg_emulation::lane_of_warp() & ~(width - 1);
  return pyreg_emulation::shuffle(mask, value, first | (lane & (width - 1)), width, {file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PYREG_CALLED_FROM) {
  const int own = pyreg_emulation::lane_of_warp();
  const int source = own - static_cast<int>(delta & 31);
  return pyreg_emulation::shuffle(mask, value, source < (own & ~(width - 1)) ? own : source, width, {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PYREG_CALLED_FROM) {
  const int own = pyreg_emulation::lane_of_warp();
  const int source = own + static_cast<int>(delta & 31);
  return pyreg_emulation::shuffle(mask, value, source > (own | (width - 1)) ? own : source, width, {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, PYREG_CALLED_FROM) {
  const int own = pyreg_emulation::lane_of_warp();
  const int source = own ^ (lane_mask & 31);
  return pyreg_emulation::shuffle(mask, value, source > (own | (width - 1)) ? own : source, width, {file, line});
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomics: one host thread runs all, so a plain read and write is one step.

template <typename T>
T pyreg_replace(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

#define PYREG_ATOMIC_ADD(T) \
  inline T atomicAdd(T* address, T value) { return pyreg_replace(address, static_cast<T>(*address + value)); }
PYREG_ATOMIC_ADD(int)
PYREG_ATOMIC_ADD(unsigned)
PYREG_ATOMIC_ADD(unsigned long long)
PYREG_ATOMIC_ADD(float)
PYREG_ATOMIC_ADD(double)
#undef PYREG_ATOMIC_ADD

#define PYREG_ATOMIC(T)                                                                                           \
  inline T atomicMax(T* address, T value) { return pyreg_replace(address, *address < value ? value : *address); } \
  inline T atomicMin(T* address, T value) { return pyreg_replace(address, value < *address ? value : *address); } \
  inline T atomicExch(T* address, T value) { return pyreg_replace(address, value); }                              \
  inline T atomicCAS(T* address, T compare, T value) {                                                            \
    return pyreg_replace(address, *address == compare ? value : *address);                                        \
  }
PYREG_ATOMIC(int)
PYREG_ATOMIC(unsigned)
PYREG_ATOMIC(unsigned long long)
#undef PYREG_ATOMIC
inline float atomicExch(float* address, float value) { return pyreg_replace(address, value); }

// Loads and stores with a cache hint.

#define PYREG_LOAD(name)     \
  template <typename T>      \
  T name(const T* address) { \
    return *address;         \
  }
#define PYREG_STORE(name)          \
  template <typename T>            \
  void name(T* address, T value) { \
    *address = value;              \
  }
PYREG_LOAD(__ldg)
PYREG_LOAD(__ldca)
PYREG_LOAD(__ldcg)
PYREG_LOAD(__ldcs)
PYREG_LOAD(__ldlu)
PYREG_STORE(__stwb)
PYREG_STORE(__stcg)
PYREG_STORE(__stcs)
PYREG_STORE(__stwt)
#undef PYREG_LOAD
#undef PYREG_STORE

// Bits and arithmetic.

template <typename To, typename From>
To pyreg_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return pyreg_bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return pyreg_bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return pyreg_bit_cast<float>(x); }
inline float __int_as_float(int x) { return pyreg_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return pyreg_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return pyreg_bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// The runtime. Launches throw, so that no error is left to fetch.

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = pyreg_emulation::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(pyreg_emulation::kDefaultSharedLimit);
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = pyreg_emulation::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = device != pyreg_emulation::kWithoutCooperativeLaunch;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(pyreg_emulation::kMaxDynamicShared);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > pyreg_emulation::kMaxDynamicShared) {
    return cudaErrorInvalidValue;
  }
  pyreg_emulation::set_dynamic_shared_limit(kernel, static_cast<size_t>(value));
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                                 size_t dynamic_shared_bytes) {
  *blocks = pyreg_emulation::blocks_per_multiprocessor(threads, dynamic_shared_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes != 0) memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes != 0) memcpy(to, from, bytes);
  return cudaSuccess;
}

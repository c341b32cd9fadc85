// Kernels with planted bugs, each beside its right form where it has one. test_emulation.py sees each caught.

#include "core/cuda.cuh"
#include "exported.h"

namespace pyreg {
namespace {

// Reads 32 values of the input, of dynamic, of static shared memory, starting at `start`: out of bounds by one for 1.
__global__ void global_overrun_kernel(const float* in, float* out, int start) {
  out[threadIdx.x] = in[static_cast<int>(threadIdx.x) + start];
}

__global__ void dynamic_shared_overrun_kernel(const float* in, float* out, int start) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[static_cast<int>(threadIdx.x) + start];
}

__global__ void static_shared_overrun_kernel(const float* in, float* out, int start) {
  __shared__ float shared[32];
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[static_cast<int>(threadIdx.x) + start];
}

// Rotates 128 values by one through shared memory.
template <bool BARRIER>
__global__ void rotate_kernel(const float* in, float* out) {
  __shared__ float shared[128];
  shared[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % 128];
}

// Rotates in place, twice: the second barrier keeps a fast thread from overwriting what a slow one still reads.
template <bool BARRIER>
__global__ void rotate_twice_kernel(const float* in, float* out) {
  __shared__ float shared[128];
  shared[threadIdx.x] = in[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    __syncthreads();
    const float next = shared[(threadIdx.x + 1) % 128];
    if (BARRIER) __syncthreads();
    shared[threadIdx.x] = next;
  }
  out[threadIdx.x] = shared[threadIdx.x];
}

// Sums of 16 neighbouring lanes; right with WIDTH 16.
template <int WIDTH>
__global__ void sum_of_16_kernel(const float* in, float* out) {
  float x = in[threadIdx.x];
  for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset, WIDTH);
  out[threadIdx.x] = x;
}

// Reads shared memory that it never wrote: of the block before it, were that not erased.
__global__ void uninitialized_kernel(float* out) {
  __shared__ float shared[32];
  out[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x] + dynamic_shared<float>()[threadIdx.x];
  shared[threadIdx.x] = dynamic_shared<float>()[threadIdx.x] = 1;
}

// Misuse that ends the launch with an error, in one block of 64 threads; kFullMaskInPartOfAWarp in one of 48.
enum Misuse : int {
  kBarrierInOneBranch,
  kBarriersInBothBranches,
  kBarrierAfterExit,
  kShuffleWidthNotPowerOfTwo,
  kShuffleWidthsDiffer,
  kShuffleMasksDiffer,
  kShuffleOutsideMask,
  kShuffleNotNamed,
  kShuffleAfterExit,
  kShuffleInOneBranch,
  kShuffleMeetsVote,
  kGridBarrier,
  kFullMaskInPartOfAWarp,
  kVoteInOneBranch,
  kGroupBarrier,
};

__global__ void misuse_kernel(int misuse, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  const bool odd = t % 2 == 1;
  switch (misuse) {
    case kBarrierInOneBranch:
      if (t < 48) __syncthreads();
      break;
    case kBarriersInBothBranches:
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kBarrierAfterExit:
      if (t == 5) return;
      __syncthreads();
      break;
    case kShuffleWidthNotPowerOfTwo:
      out[t] = __shfl_xor_sync(kFullWarp, t, 1, 24);
      break;
    case kShuffleWidthsDiffer:
      out[t] = __shfl_xor_sync(kFullWarp, t, 1, odd ? 8 : 16);
      break;
    case kShuffleMasksDiffer:
      out[t] = __shfl_xor_sync(t == 7 ? 0xffu : kFullWarp, t, 1);
      break;
    case kShuffleOutsideMask:
      if (t < 16) out[t] = __shfl_down_sync(0xffffu, t, 1);
      break;
    case kShuffleNotNamed:
      out[t] = __shfl_xor_sync(0xffffu, t, 1);
      break;
    case kShuffleAfterExit:
      if (t == 5) return;
      out[t] = __shfl_xor_sync(kFullWarp, t, 1);
      break;
    case kShuffleInOneBranch:
      if (odd) out[t] = __shfl_xor_sync(kFullWarp, t, 2);
      __syncthreads();
      break;
    case kShuffleMeetsVote:
      if (odd) {
        out[t] = __shfl_xor_sync(kFullWarp, t, 2);
      } else {
        out[t] = __any_sync(kFullWarp, t);
      }
      break;
    case kGridBarrier:
      grid_barrier();
      break;
    case kFullMaskInPartOfAWarp:
      __syncwarp();
      break;
    case kVoteInOneBranch:
      if (t >= 5) out[t] = __syncthreads_or(odd);
      break;
    case kGroupBarrier: {
      unsigned expected = 0;
      group_barrier(reinterpret_cast<unsigned*>(out), 1, expected);
      break;
    }
  }
}

__global__ void idle_kernel(int*) {}

// Blocks of one group that disagree on how many they are.
__global__ void disagreeing_kernel(unsigned* arrivals) {
  unsigned expected = 0;
  group_barrier(arrivals, 2 + blockIdx.x, expected);
}

}  // namespace
}  // namespace pyreg

using namespace pyreg;

// where: 0 global, 1 dynamic shared, 2 static shared memory; `in` holds 32 floats.
PYREG_EXPORT const char* run_overrun(int where, const float* in, float* out, int start) {
  constexpr auto kWhere =
      std::array{global_overrun_kernel, dynamic_shared_overrun_kernel, static_shared_overrun_kernel};
  return error_of([&] {
    const auto overrun_kernel = kWhere.at(static_cast<size_t>(where));
    PYREG_LAUNCH(overrun_kernel, 1, 32, 32 * sizeof(float), nullptr, in, out, start);
  });
}

PYREG_EXPORT const char* run_rotate(int barrier, int twice, const float* in, float* out) {
  return error_of([&] {
    const auto once_kernel = barrier ? rotate_kernel<true> : rotate_kernel<false>;
    const auto twice_kernel = barrier ? rotate_twice_kernel<true> : rotate_twice_kernel<false>;
    PYREG_LAUNCH((twice ? twice_kernel : once_kernel), 1, 128, 0, nullptr, in, out);
  });
}

PYREG_EXPORT const char* run_sum_of_16(int width, const float* in, float* out) {
  return error_of([&] {
    const auto kernel = width == 16 ? sum_of_16_kernel<16> : sum_of_16_kernel<8>;
    PYREG_LAUNCH(kernel, 1, 32, 0, nullptr, in, out);
  });
}

PYREG_EXPORT const char* run_uninitialized(float* out, int blocks) {
  return error_of([&] { PYREG_LAUNCH(uninitialized_kernel, blocks, 32, 32 * sizeof(float), nullptr, out); });
}

PYREG_EXPORT const char* run_misuse(int misuse, int threads, int* out) {
  return error_of([&] { PYREG_LAUNCH(misuse_kernel, 1, threads, 0, nullptr, misuse, out); });
}

// A kernel that does nothing, launched with that shape; allowed: first ask for that much dynamic shared memory.
PYREG_EXPORT const char* run_idle(int grid, int block, size_t dynamic_shared_bytes, size_t allowed, int cooperative) {
  return error_of([&] {
    allow_dynamic_shared(idle_kernel, allowed);
    int* nothing = nullptr;
    if (cooperative) {
      PYREG_LAUNCH_COOPERATIVE(idle_kernel, grid, block, dynamic_shared_bytes, nullptr, nothing);
    } else {
      PYREG_LAUNCH(idle_kernel, grid, block, dynamic_shared_bytes, nullptr, nothing);
    }
  });
}

PYREG_EXPORT const char* run_disagreeing(unsigned* arrivals) {
  return error_of([&] { PYREG_LAUNCH_COOPERATIVE(disagreeing_kernel, 3, 64, 0, nullptr, arrivals); });
}

// Kernels that use each primitive of the emulation and of core/cuda.cuh rightly, for test_emulation.py.

#include <vector>

#include "core/cuda.cuh"
#include "exported.h"

namespace pyreg {
namespace {

// Warp shuffles: out[0..3][lane] of idx, up, down, xor.
template <typename T>
__global__ void shuffles_kernel(const T* in, T* out, int parameter, int width) {
  const unsigned lane = threadIdx.x;
  const T x = in[lane];
  out[lane] = __shfl_sync(kFullWarp, x, parameter, width);
  out[32 + lane] = __shfl_up_sync(kFullWarp, x, static_cast<unsigned>(parameter), width);
  out[64 + lane] = __shfl_down_sync(kFullWarp, x, static_cast<unsigned>(parameter), width);
  out[96 + lane] = __shfl_xor_sync(kFullWarp, x, parameter, width);
}

template <typename T>
void shuffles(const void* in, void* out, int parameter, int width) {
  PYREG_LAUNCH(shuffles_kernel<T>, 1, 32, 0, nullptr, static_cast<const T*>(in), static_cast<T*>(out), parameter,
               width);
}

// Votes, the odd lanes apart from the even ones.
__global__ void votes_kernel(const int* in, unsigned* out) {
  const unsigned lane = threadIdx.x;
  const unsigned mask = lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  out[96 + lane] = __activemask();
  out[lane] = __ballot_sync(mask, in[lane]);
  out[32 + lane] = static_cast<unsigned>(__any_sync(mask, in[lane]));
  out[64 + lane] = static_cast<unsigned>(__all_sync(mask, in[lane]));
  __syncwarp(mask);
}

// One block of 64 threads; out[0] sums of each group, out[1] the index of its maximum.
template <int WIDTH>
__global__ void groups_kernel(const double* in, double* out) {
  const unsigned t = threadIdx.x;
  const Sums<float, 3> sums =
      group_sum<WIDTH>(Sums<float, 3>{{static_cast<float>(in[t]), 1.0f, static_cast<float>(t)}});
  out[t] = group_sum<WIDTH>(in[t]);
  out[64 + t] = static_cast<double>(group_max_index<WIDTH>(MaxIndex<double>{in[t], t}).index);
  out[128 + t] = sums[0];
  out[192 + t] = sums[1];
  out[256 + t] = sums[2];
}

// in [repeats, THREADS]; out [4, repeats, THREADS]: sum in double, sum in float, second of two sums, argmax.
template <int THREADS>
__global__ void blocks_kernel(const double* in, double* out, int repeats) {
  const int t = static_cast<int>(threadIdx.x);
  for (int r = 0; r < repeats; ++r) {
    const int i = r * THREADS + t;
    const int plane = repeats * THREADS;
    out[i] = block_sum<THREADS>(in[i]);
    out[plane + i] = block_sum<THREADS>(static_cast<float>(in[i]));
    out[2 * plane + i] = block_sum<THREADS>(Sums<double, 2>{{in[i], in[i] * in[i]}})[1];
    out[3 * plane + i] = static_cast<double>(block_max_index<THREADS>(MaxIndex<double>{in[i], t}).index);
  }
}

// Histogram of `in` by atomics in shared and global memory, and one of each other atomic.
__global__ void atomics_kernel(const int* in, int n, int* counts, double* extremes, unsigned long long* total) {
  __shared__ int local[8];
  if (threadIdx.x < 8) local[threadIdx.x] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) {
    atomicAdd(&local[in[i] % 8], 1);
    atomicAdd(total, static_cast<unsigned long long>(in[i]));
    atomicAdd(&extremes[0], static_cast<double>(in[i]));
    atomicMax(&counts[8], in[i]);
    atomicMin(&counts[9], in[i]);
    atomicCAS(&counts[10], 0, in[i] + 1);  // of the first thread alone
    atomicExch(&counts[11], 7);
  }
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

// Each block keeps its part in shared memory, static and dynamic, across barriers of the whole grid.
__global__ void cooperative_kernel(const float* in, float* partial, float* out) {
  __shared__ float kept[64];
  float* kept_too = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  kept[t] = in[blockIdx.x * 64 + t];
  kept_too[t] = -kept[t];
  for (int round = 0; round < 3; ++round) {
    const float sum = block_sum<64>(kept[t]);
    if (t == 0) partial[blockIdx.x] = sum;
    grid_barrier();
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
    kept[t] += total;
    grid_barrier();
  }
  out[blockIdx.x * 64 + t] = kept[63 - t] + kept_too[t];
}

// The same in groups of two blocks, the last of one. Groups have different numbers of rounds; whether any thread of a
// block has seen a negative total counts too.
__global__ void grouped_kernel(const float* in, float* partial, float* out, unsigned* arrivals) {
  const unsigned t = threadIdx.x, group = blockIdx.x / 2, first = 2 * group, end = min(first + 2, gridDim.x);
  float kept = in[blockIdx.x * 64 + t];
  unsigned expected = 0;
  for (unsigned round = 0; round <= group; ++round) {
    const float sum = block_sum<64>(kept);
    if (t == 0) partial[blockIdx.x] = sum;
    group_barrier(arrivals + group, end - first, expected);
    float total = 0;
    for (unsigned b = first; b < end; ++b) total += partial[b];
    kept += total;
    if (__syncthreads_or(t == 40 && total < 0)) kept += 1;
    group_barrier(arrivals + group, end - first, expected);
  }
  out[blockIdx.x * 64 + t] = kept;
}

template <typename Storage>
__global__ void widen_kernel(const Storage* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = widen(in[i]);
}

template <typename Storage>
__global__ void narrow_kernel(const float* in, Storage* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = narrow<Storage>(in[i]);
}

template <typename Storage>
__global__ void visit_kernel(const Storage* row, int64_t n, Accumulate<Storage>* seen, int* visits) {
  for_each_in_row(row, n, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                  [&](int64_t j, Accumulate<Storage> x) {
                    seen[j] = x;
                    atomicAdd(&visits[j], 1);
                  });
}

template <typename Storage>
__global__ void transform_kernel(const Storage* in, Storage* out, int64_t n) {
  transform_row(in, out, n, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                [](int64_t j, Accumulate<Storage> x) { return x * 3 + static_cast<Accumulate<Storage>>(j % 5); });
}

// A row that starts `offset` elements after a 16-byte boundary and ends where the allocation ends.
template <typename Storage>
class Row {
 public:
  Row(const void* values, int64_t n, int offset) : memory_(static_cast<size_t>(n + offset)), offset_(offset) {
    if (n != 0) memcpy(data(), values, static_cast<size_t>(n) * sizeof(Storage));
  }
  Storage* data() { return memory_.data() + offset_; }

 private:
  std::vector<Storage> memory_;
  int offset_;
};

template <typename Storage>
void visit_row(const void* values, int64_t n, int offset, int lanes, void* seen, int* visits) {
  Row<Storage> row(values, n, offset);
  PYREG_LAUNCH(visit_kernel<Storage>, 1, lanes, 0, nullptr, row.data(), n, static_cast<Accumulate<Storage>*>(seen),
               visits);
}

template <typename Storage>
void transform(const void* values, int64_t n, int in_offset, int out_offset, int lanes, void* result) {
  Row<Storage> in(values, n, in_offset);
  Row<Storage> out(values, n, out_offset < 0 ? 0 : out_offset);
  Storage* to = out_offset < 0 ? in.data() : out.data();
  PYREG_LAUNCH(transform_kernel<Storage>, 1, lanes, 0, nullptr, in.data(), to, n);
  if (n != 0) memcpy(result, to, static_cast<size_t>(n) * sizeof(Storage));
}

template <int THREADS>
void blocks(const double* in, double* out, int repeats) {
  PYREG_LAUNCH(blocks_kernel<THREADS>, 1, THREADS, 0, nullptr, in, out, repeats);
}

constexpr unsigned blocks_for(int n) { return static_cast<unsigned>((n + 255) / 256); }

}  // namespace
}  // namespace pyreg

using namespace pyreg;

// kind: 0 int32, 1 uint32, 2 int64, 3 float, 4 double.
PYREG_EXPORT const char* run_shuffles(int kind, const void* in, void* out, int parameter, int width) {
  constexpr auto kByKind =
      std::array{shuffles<int>, shuffles<unsigned>, shuffles<int64_t>, shuffles<float>, shuffles<double>};
  return error_of([&] { kByKind.at(static_cast<size_t>(kind))(in, out, parameter, width); });
}

PYREG_EXPORT const char* run_votes(const int* in, unsigned* out) {
  return error_of([&] { PYREG_LAUNCH(votes_kernel, 1, 32, 0, nullptr, in, out); });
}

PYREG_EXPORT const char* run_groups(int log2_width, const double* in, double* out) {
  constexpr auto kByWidth = std::array{groups_kernel<1>, groups_kernel<2>,  groups_kernel<4>,
                                       groups_kernel<8>, groups_kernel<16>, groups_kernel<32>};
  return error_of([&] { PYREG_LAUNCH(kByWidth.at(static_cast<size_t>(log2_width)), 1, 64, 0, nullptr, in, out); });
}

PYREG_EXPORT const char* run_blocks(int threads, const double* in, double* out, int repeats) {
  return error_of([&] {
    switch (threads) {
      case 32:
        return blocks<32>(in, out, repeats);
      case 64:
        return blocks<64>(in, out, repeats);
      case 96:
        return blocks<96>(in, out, repeats);
      case 416:
        return blocks<416>(in, out, repeats);
      case 1024:
        return blocks<1024>(in, out, repeats);
    }
    throw std::invalid_argument("no kernel for that many threads");
  });
}

PYREG_EXPORT const char* run_atomics(const int* in, int n, int* counts, double* extremes, unsigned long long* total) {
  return error_of([&] { PYREG_LAUNCH(atomics_kernel, 5, 128, 0, nullptr, in, n, counts, extremes, total); });
}

PYREG_EXPORT const char* run_cooperative(const float* in, float* partial, float* out, int blocks) {
  return error_of(
      [&] { PYREG_LAUNCH_COOPERATIVE(cooperative_kernel, blocks, 64, 64 * sizeof(float), nullptr, in, partial, out); });
}

PYREG_EXPORT const char* run_grouped(const float* in, float* partial, float* out, unsigned* arrivals, int blocks) {
  return error_of(
      [&] { PYREG_LAUNCH_COOPERATIVE(grouped_kernel, blocks, 64, 0, nullptr, in, partial, out, arrivals); });
}

PYREG_EXPORT int cooperative_grid() { return max_cooperative_grid(cooperative_kernel, 64, 64 * sizeof(float)); }

PYREG_EXPORT const char* run_widen(int dtype, const void* in, float* out, int n) {
  return error_of([&] {
    dispatch_dtype(static_cast<Dtype>(dtype), [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (sizeof(T) == 2) {
        PYREG_LAUNCH(widen_kernel<T>, blocks_for(n), 256, 0, nullptr, static_cast<const T*>(in), out, n);
      }
    });
  });
}

PYREG_EXPORT const char* run_narrow(int dtype, const float* in, void* out, int n) {
  return error_of([&] {
    dispatch_dtype(static_cast<Dtype>(dtype), [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (sizeof(T) == 2) {
        PYREG_LAUNCH(narrow_kernel<T>, blocks_for(n), 256, 0, nullptr, in, static_cast<T*>(out), n);
      }
    });
  });
}

PYREG_EXPORT const char* run_visit(int dtype, const void* values, int64_t n, int offset, int lanes, void* seen,
                                   int* visits) {
  return error_of([&] {
    dispatch_dtype(static_cast<Dtype>(dtype),
                   [&](auto tag) { visit_row<typename decltype(tag)::type>(values, n, offset, lanes, seen, visits); });
  });
}

// out_offset -1: in place.
PYREG_EXPORT const char* run_transform(int dtype, const void* values, int64_t n, int in_offset, int out_offset,
                                       int lanes, void* result) {
  return error_of([&] {
    dispatch_dtype(static_cast<Dtype>(dtype), [&](auto tag) {
      transform<typename decltype(tag)::type>(values, n, in_offset, out_offset, lanes, result);
    });
  });
}

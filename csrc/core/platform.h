// What a header needs to serve the host compiler, nvcc, and the emulation of CUDA that the tests use.
//
// PYREG_ON_DEVICE is defined while the file is compiled as CUDA, by nvcc or by the tests' emulation.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(PYREG_CUDA_EMULATION)
#define PYREG_ON_DEVICE 1
#include <cuda_runtime.h>
#define PYREG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYREG_HOST_DEVICE inline __attribute__((always_inline))
#endif

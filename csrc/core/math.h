// Functions of a formula header, overloaded on scalars here and on SIMD vectors in core/simd_math.h, so that a formula
// can be a template over scalar, SIMD vector and device types.
#pragma once

#include <cmath>

#include "core/platform.h"

namespace pyreg {

PYREG_HOST_DEVICE float absolute(float x) { return fabsf(x); }
PYREG_HOST_DEVICE double absolute(double x) { return fabs(x); }
// On the device the hardware's approximation, one rounding off 1 / x and 0 at infinity, in place of a division's dozen
// instructions: a row of bfloat16 logits would be limited by these, not by memory.
PYREG_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}
PYREG_HOST_DEVICE double reciprocal(double x) { return 1.0 / x; }

template <typename A>
PYREG_HOST_DEVICE bool is_infinite(A x) {
  return absolute(x) == static_cast<A>(INFINITY);
}

#if defined(PYREG_ON_DEVICE)
PYREG_HOST_DEVICE float logarithm(float x) { return logf(x); }
PYREG_HOST_DEVICE double logarithm(double x) { return log(x); }
PYREG_HOST_DEVICE float log_one_plus(float x) { return log1pf(x); }
PYREG_HOST_DEVICE double log_one_plus(double x) { return log1p(x); }
#else
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }
inline float log_one_plus(float x) { return __builtin_log1pf(x); }
inline double log_one_plus(double x) { return __builtin_log1p(x); }
#endif

}  // namespace pyreg

#if defined(PYREG_ISA)
#include "core/simd_math.h"

namespace pyreg {
using namespace PYREG_ISA;  // the formula templates of namespace pyreg find the vector overloads by this
}
#endif

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

PYREG_HOST_DEVICE float with_sign_of(float magnitude, float sign) { return copysignf(magnitude, sign); }
PYREG_HOST_DEVICE double with_sign_of(double magnitude, double sign) { return copysign(magnitude, sign); }

#if defined(PYREG_ON_DEVICE)
PYREG_HOST_DEVICE float logarithm(float x) { return logf(x); }
PYREG_HOST_DEVICE double logarithm(double x) { return log(x); }
PYREG_HOST_DEVICE float log_one_plus(float x) { return log1pf(x); }
PYREG_HOST_DEVICE double log_one_plus(double x) { return log1p(x); }
PYREG_HOST_DEVICE float exponential(float x) { return expf(x); }
PYREG_HOST_DEVICE double exponential(double x) { return exp(x); }
// As reciprocal: one rounding off, without the branch for subnormal numbers.
PYREG_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return sqrtf(x);
#endif
}
PYREG_HOST_DEVICE double square_root(double x) { return sqrt(x); }
PYREG_HOST_DEVICE float arc_tangent(float x) { return atanf(x); }
PYREG_HOST_DEVICE double arc_tangent(double x) { return atan(x); }
PYREG_HOST_DEVICE float area_sine(float x) { return asinhf(x); }  // arsinh
PYREG_HOST_DEVICE double area_sine(double x) { return asinh(x); }
PYREG_HOST_DEVICE float error_function(float x) { return erff(x); }
PYREG_HOST_DEVICE double error_function(double x) { return erf(x); }
#else
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }
inline float log_one_plus(float x) { return __builtin_log1pf(x); }
inline double log_one_plus(double x) { return __builtin_log1p(x); }
inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float arc_tangent(float x) { return __builtin_atanf(x); }
inline double arc_tangent(double x) { return __builtin_atan(x); }
inline float area_sine(float x) { return __builtin_asinhf(x); }  // arsinh
inline double area_sine(double x) { return __builtin_asinh(x); }
inline float error_function(float x) { return __builtin_erff(x); }
inline double error_function(double x) { return __builtin_erf(x); }
#endif

}  // namespace pyreg

#if defined(PYREG_ISA)
#include "core/simd_math.h"

namespace pyreg {
using namespace PYREG_ISA;  // the formula templates of namespace pyreg find the vector overloads by this
}
#endif

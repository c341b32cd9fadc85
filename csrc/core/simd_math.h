// Vector forms of core/math.h, which includes this file, and the natural logarithm as a polynomial.
//
// log(m 2^e) with m in [sqrt(1/2), sqrt(2)): f = m - 1, s = f / (2 + f), log(1 + f) = 2 atanh(s)
//   = f - f^2/2 + s (f^2/2 + R),  R = 2 s^2 (1/3 + s^2/5 + s^4/7 + ...),  |s| < 0.1716.
// 5 terms leave a relative error of 2e-10 for float, 11 terms 1e-18 for double: rounding dominates in both.
#pragma once

#include "core/simd.h"

namespace pyreg::PYREG_ISA {

using pyreg::absolute;
using pyreg::log_one_plus;
using pyreg::logarithm;
using pyreg::reciprocal;

template <typename A>
struct LogFormat;

template <>
struct LogFormat<float> {
  using Bits = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kSqrtHalf = 0x3f3504f3;
  static constexpr int kTerms = 5;
  // ln 2 in two parts, the first with trailing zeros so that its product with an exponent is exact.
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
};

template <>
struct LogFormat<double> {
  using Bits = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr int kTerms = 11;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
};

PYREG_HOST_DEVICE FloatVector absolute(FloatVector x) {
  return bit_cast<FloatVector>(bit_cast<Int32Vector>(x) & 0x7fffffff);
}
PYREG_HOST_DEVICE DoubleVector absolute(DoubleVector x) {
  return bit_cast<DoubleVector>(bit_cast<Int64Vector>(x) & 0x7fffffffffffffff);
}

// With AVX-512 one Newton step on a 14-bit estimate, within one rounding of 1 / x in a quarter of the division's time
// (16 cycles a vector); infinity, whose step would be NaN, keeps the estimate 0.
PYREG_HOST_DEVICE FloatVector reciprocal(FloatVector x) {
#if defined(__AVX512F__)
  const __m512 d = bit_cast<__m512>(x);
  const __m512 estimate = _mm512_rcp14_ps(d);
  const __mmask16 finite = _mm512_cmp_ps_mask(d, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
  const __m512 error = _mm512_maskz_fnmadd_ps(finite, d, estimate, _mm512_set1_ps(1.0f));
  return bit_cast<FloatVector>(_mm512_fmadd_ps(estimate, error, estimate));
#else
  return 1.0f / x;
#endif
}
PYREG_HOST_DEVICE DoubleVector reciprocal(DoubleVector x) { return 1.0 / x; }

// For normal positive x, +infinity and NaN.
template <typename A>
PYREG_HOST_DEVICE Vector<A> vector_logarithm(Vector<A> x) {
  using Format = LogFormat<A>;
  using Integer = LaneIndex<A>;
  const Integer bits = bit_cast<Integer>(x);
  const Integer shifted = bits - Format::kSqrtHalf;
  const Integer exponent = shifted >> Format::kMantissaBits;
  const Vector<A> mantissa = bit_cast<Vector<A>>(bits - (exponent << Format::kMantissaBits));
  const Vector<A> e = __builtin_convertvector(exponent, Vector<A>);
  const Vector<A> f = mantissa - A(1);
  const Vector<A> s = f / (A(2) + f);
  const Vector<A> z = s * s;
  Vector<A> series = broadcast(A(2) / A(2 * Format::kTerms + 1));
  for (int term = Format::kTerms - 1; term >= 1; --term) series = series * z + A(2) / A(2 * term + 1);
  const Vector<A> half_square = A(0.5) * f * f;
  const Vector<A> result =
      e * Format::kLn2High - ((half_square - (s * (half_square + series * z) + e * Format::kLn2Low)) - f);
  return x < broadcast(A(__builtin_inf())) ? result : x;
}

PYREG_HOST_DEVICE FloatVector logarithm(FloatVector x) { return vector_logarithm<float>(x); }
PYREG_HOST_DEVICE DoubleVector logarithm(DoubleVector x) { return vector_logarithm<double>(x); }

// log(1 + x) for x >= 0: the rounding error of 1 + x comes back as a first-order term.
template <typename A>
PYREG_HOST_DEVICE Vector<A> vector_log_one_plus(Vector<A> x) {
  const Vector<A> y = A(1) + x;
  const Vector<A> result = vector_logarithm<A>(y) + (x - (y - A(1))) / y;
  return x < broadcast(A(__builtin_inf())) ? result : x;
}

PYREG_HOST_DEVICE FloatVector log_one_plus(FloatVector x) { return vector_log_one_plus<float>(x); }
PYREG_HOST_DEVICE DoubleVector log_one_plus(DoubleVector x) { return vector_log_one_plus<double>(x); }

}  // namespace pyreg::PYREG_ISA

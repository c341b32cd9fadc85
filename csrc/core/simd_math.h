// Vector forms of core/math.h, which includes this file, as polynomials: the natural logarithm for float and double,
// the functions further down for float, exp for double too. The other double ones are the scalar function, lane by
// lane.
//
// log(m 2^e) with m in [sqrt(1/2), sqrt(2)): f = m - 1, s = f / (2 + f), log(1 + f) = 2 atanh(s)
//   = f - f^2/2 + s (f^2/2 + R),  R = 2 s^2 (1/3 + s^2/5 + s^4/7 + ...),  |s| < 0.1716.
// 5 terms leave a relative error of 2e-10 for float, 11 terms 1e-18 for double: rounding dominates in both.
#pragma once

#include "core/simd.h"

namespace pyreg::PYREG_ISA {

using pyreg::absolute;
using pyreg::arc_tangent;
using pyreg::area_sine;
using pyreg::error_function;
using pyreg::exponential;
using pyreg::log_one_plus;
using pyreg::logarithm;
using pyreg::reciprocal;
using pyreg::square_root;
using pyreg::with_sign_of;

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

PYREG_HOST_DEVICE FloatVector with_sign_of(FloatVector magnitude, FloatVector sign) {
  const Int32Vector kept = bit_cast<Int32Vector>(magnitude) & 0x7fffffff;
  return bit_cast<FloatVector>(kept | (bit_cast<Int32Vector>(sign) & INT32_MIN));
}
PYREG_HOST_DEVICE DoubleVector with_sign_of(DoubleVector magnitude, DoubleVector sign) {
  const Int64Vector kept = bit_cast<Int64Vector>(magnitude) & INT64_MAX;
  return bit_cast<DoubleVector>(kept | (bit_cast<Int64Vector>(sign) & INT64_MIN));
}

template <typename V, typename Function>
PYREG_HOST_DEVICE V lane_by_lane(V x, Function&& f) {
  V result;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) result[lane] = f(x[lane]);
  return result;
}

PYREG_HOST_DEVICE FloatVector square_root(FloatVector x) {
#if defined(__AVX512F__)
  return bit_cast<FloatVector>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<FloatVector>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
  return lane_by_lane(x, [](float lane) { return square_root(lane); });
#endif
}
PYREG_HOST_DEVICE DoubleVector square_root(DoubleVector x) {
  return lane_by_lane(x, [](double lane) { return square_root(lane); });
}

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

// c[0] + c[1] x + c[2] x^2 + ...
template <size_t N>
PYREG_HOST_DEVICE FloatVector polynomial(FloatVector x, const float (&c)[N]) {
  FloatVector sum = broadcast(c[N - 1]);
  for (size_t i = N - 1; i-- > 0;) sum = sum * x + c[i];
  return sum;
}

// The polynomials below are minimax fits of the relative error, found by reweighted least squares; each leaves less
// than 0.06 of a float's rounding. tests/test_weight_compander.py holds the functions against float64 over all floats'
// range.

// exp(n ln 2 + r) = 2^n (1 + r + r^2 P(r)), |r| <= ln 2 / 2. The power is two factors: their product may be subnormal.
PYREG_HOST_DEVICE FloatVector exponential(FloatVector x) {
  constexpr float kP[] = {0.49999994f, 0.1666652f, 0.041668393f, 0.008368781f, 0.0013814467f};
  constexpr float kLog2E = 1.44269504f, kRound = 12582912.0f;  // 1.5 2^23: the sum's last bits are the integer n
  x = x > 89.0f ? broadcast(89.0f) : x;                        // infinity
  x = x < -104.0f ? broadcast(-104.0f) : x;                    // 0
  const FloatVector shifted = x * kLog2E + kRound;
  const Int32Vector n = bit_cast<Int32Vector>(shifted) - bit_cast<Int32Vector>(broadcast(kRound));
  const FloatVector rounded = shifted - kRound;
  const FloatVector r = (x - rounded * LogFormat<float>::kLn2High) - rounded * LogFormat<float>::kLn2Low;
  const FloatVector mantissa = 1.0f + (r + r * r * polynomial(r, kP));
  const Int32Vector half = n >> 1;
  const FloatVector first = bit_cast<FloatVector>((half + 127) << 23);
  const FloatVector second = bit_cast<FloatVector>((n - half + 127) << 23);
  return mantissa * first * second;
}

// 2^x, in half the instructions of an exponential where the exponent's bits are added by one of them; 0 where that is
// below the normal numbers and the thread flushes them.
PYREG_HOST_DEVICE FloatVector power_of_two(FloatVector x) {
  constexpr float kP[] = {1.0f, 0.6931472f, 0.24022646f, 0.055503286f, 0.009618489f, 0.0013399931f, 0.00015345811f};
  x = x < -150.0f ? broadcast(-150.0f) : x;  // 0
#if defined(__AVX512F__)
  const __m512 rounded = _mm512_roundscale_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return bit_cast<FloatVector>(
      _mm512_scalef_ps(bit_cast<__m512>(polynomial(x - bit_cast<FloatVector>(rounded), kP)), rounded));
#else
  constexpr float kRound = 12582912.0f;  // as below
  x = x > 129.0f ? broadcast(129.0f) : x;
  const FloatVector shifted = x + kRound;
  const Int32Vector n = bit_cast<Int32Vector>(shifted) - bit_cast<Int32Vector>(broadcast(kRound));
  const Int32Vector half = n >> 1;
  const FloatVector first = bit_cast<FloatVector>((half + 127) << 23);
  const FloatVector second = bit_cast<FloatVector>((n - half + 127) << 23);
  return polynomial(x - (shifted - kRound), kP) * first * second;
#endif
}

// arctan t = t + t^3 P(t^2) for t <= 1, arctan x = pi / 2 - arctan(1 / x) beyond.
PYREG_HOST_DEVICE FloatVector arc_tangent(FloatVector x) {
  constexpr float kP[] = {-0.333333f,   0.19998549f,   -0.14264242f, 0.10952186f,   -0.08403451f,
                          0.057957605f, -0.031177856f, 0.010914611f, -0.0017936227f};
  constexpr float kHalfPiHigh = 1.57079637f, kHalfPiLow = -4.37113883e-8f;
  const FloatVector magnitude = absolute(x);
  const auto is_large = magnitude > 1.0f;
  const FloatVector t = is_large ? reciprocal(magnitude) : magnitude;
  const FloatVector square = t * t;
  const FloatVector angle = t + t * (square * polynomial(square, kP));
  return with_sign_of(is_large ? kHalfPiHigh - (angle - kHalfPiLow) : angle, x);
}

// arsinh x = log(1 + x + x^2 / (1 + sqrt(1 + x^2))); from 2^30 on, where x^2 might overflow, log(1 + x) + log 2.
PYREG_HOST_DEVICE FloatVector area_sine(FloatVector x) {
  const FloatVector magnitude = absolute(x);
  const auto is_large = magnitude > 0x1p30f;
  const FloatVector square = magnitude * magnitude;
  const FloatVector excess = magnitude + square / (1.0f + square_root(1.0f + square));
  const FloatVector log = log_one_plus(is_large ? magnitude : excess);
  return with_sign_of(is_large ? log + 0.693147181f : log, x);
}

// erf x = x + x P(x^2) for x < 27/32, 1 - exp(-x - x Q(x)) beyond; from 4 on that is 1.
PYREG_HOST_DEVICE FloatVector error_function(FloatVector x) {
  constexpr float kP[] = {0.12837917f,  -0.37612638f,    0.1128375f,   -0.02686268f,
                          0.005209888f, -0.00082522427f, 8.876244e-05f};
  constexpr float kQ[] = {0.12860544f,  0.63533086f,     0.10593243f, -0.02349358f,
                          0.003512691f, -0.00029022733f, 7.91421e-06f};
  const FloatVector magnitude = absolute(x);
  const FloatVector small = magnitude + magnitude * polynomial(magnitude * magnitude, kP);
  const FloatVector t = magnitude > 4.0f ? broadcast(4.0f) : magnitude;
  const FloatVector large = 1.0f - exponential(-(t + t * polynomial(t, kQ)));
  return with_sign_of(magnitude < 0.84375f ? small : large, x);
}

// exp r, |r| <= ln 2 / 2; the series to r^13 leaves a relative error of 4e-18.
PYREG_HOST_DEVICE DoubleVector exponential_series(DoubleVector r) {
  constexpr double kInverseFactorial[] = {1.0 / 6,        1.0 / 24,        1.0 / 120,         1.0 / 720,
                                          1.0 / 5040,     1.0 / 40320,     1.0 / 362880,      1.0 / 3628800,
                                          1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  DoubleVector series = broadcast(kInverseFactorial[10]);
  for (int term = 9; term >= 0; --term) series = series * r + kInverseFactorial[term];
  return 1.0 + (r + r * r * (0.5 + r * series));
}

// x 2^n for an integer n, which may leave a subnormal number.
PYREG_HOST_DEVICE DoubleVector scale_by_power(DoubleVector x, DoubleVector n) {
  constexpr double kRound = 0x1.8p52;
  // Integers are in the last bits of sums with kRound; moved up into the exponent's, those above them are gone.
  const DoubleVector shifted_half = n * 0.5 + kRound;
  const DoubleVector shifted_rest = (n - (shifted_half - kRound)) + kRound;
  const UInt64Vector one = bit_cast<UInt64Vector>(broadcast(1.0));
  const DoubleVector first = bit_cast<DoubleVector>((bit_cast<UInt64Vector>(shifted_half) << 52) + one);
  const DoubleVector second = bit_cast<DoubleVector>((bit_cast<UInt64Vector>(shifted_rest) << 52) + one);
  return x * first * second;
}

// As for float.
PYREG_HOST_DEVICE DoubleVector exponential(DoubleVector x) {
  constexpr double kLog2E = 1.44269504088896340736, kRound = 0x1.8p52;
  x = x > 710.0 ? broadcast(710.0) : x;    // infinity
  x = x < -746.0 ? broadcast(-746.0) : x;  // 0
  const DoubleVector rounded = (x * kLog2E + kRound) - kRound;
  const DoubleVector r = (x - rounded * LogFormat<double>::kLn2High) - rounded * LogFormat<double>::kLn2Low;
  return scale_by_power(exponential_series(r), rounded);
}
PYREG_HOST_DEVICE DoubleVector power_of_two(DoubleVector x) {
  constexpr double kLn2 = 0.69314718055994530942, kRound = 0x1.8p52;
  x = x > 1025.0 ? broadcast(1025.0) : x;    // infinity
  x = x < -1076.0 ? broadcast(-1076.0) : x;  // 0
  const DoubleVector rounded = (x + kRound) - kRound;
  return scale_by_power(exponential_series((x - rounded) * kLn2), rounded);
}
PYREG_HOST_DEVICE DoubleVector arc_tangent(DoubleVector x) {
  return lane_by_lane(x, [](double lane) { return arc_tangent(lane); });
}
PYREG_HOST_DEVICE DoubleVector area_sine(DoubleVector x) {
  return lane_by_lane(x, [](double lane) { return area_sine(lane); });
}
PYREG_HOST_DEVICE DoubleVector error_function(DoubleVector x) {
  return lane_by_lane(x, [](double lane) { return error_function(lane); });
}

}  // namespace pyreg::PYREG_ISA

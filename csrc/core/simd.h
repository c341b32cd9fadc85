// SIMD vectors of the accumulation types for the instruction set being compiled, on GCC and Clang vector extensions:
// arithmetic, comparisons and `mask ? a : b` work on them as on scalars, so that a formula written once as a template
// serves scalars, vectors and the GPU.
#pragma once

#include <cstring>

#include "core/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyreg::PYREG_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
constexpr int kLanes = kVectorBytes / sizeof(A);

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16Vector __attribute__((vector_size(kVectorBytes / 2)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64Vector __attribute__((vector_size(kVectorBytes)));

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
  using mask = Int32Vector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
  using mask = Int64Vector;
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
using LaneIndex = typename VectorOf<A>::mask;

template <typename V, typename From>
PYREG_HOST_DEVICE V bit_cast(const From& from) {
  static_assert(sizeof(V) == sizeof(From));
  V to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename A>
PYREG_HOST_DEVICE Vector<A> broadcast(A x) {
  return x - Vector<A>{};
}

template <typename A>
PYREG_HOST_DEVICE LaneIndex<A> lane_index() {
  LaneIndex<A> index;
  for (int lane = 0; lane < kLanes<A>; ++lane) index[lane] = lane;
  return index;
}

// ---- loads ----

PYREG_HOST_DEVICE FloatVector load(const float* p) {
  FloatVector v;
  memcpy(&v, p, sizeof(v));
  return v;
}

PYREG_HOST_DEVICE DoubleVector load(const double* p) {
  DoubleVector v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// Zero extension and truncation: one instruction where GCC makes several shuffles of __builtin_convertvector.
PYREG_HOST_DEVICE UInt32Vector extend(UInt16Vector bits) {
#if defined(__AVX512F__)
  return bit_cast<UInt32Vector>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<UInt32Vector>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, UInt32Vector);
#endif
}

PYREG_HOST_DEVICE UInt16Vector truncate(UInt32Vector bits) {
#if defined(__AVX512F__)
  return bit_cast<UInt16Vector>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, UInt16Vector);
#endif
}

PYREG_HOST_DEVICE FloatVector widen(UInt16Vector bits, bfloat16) { return bit_cast<FloatVector>(extend(bits) << 16); }

PYREG_HOST_DEVICE FloatVector widen(UInt16Vector bits, float16) {
#if defined(__AVX512F__)
  return bit_cast<FloatVector>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<FloatVector>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  FloatVector v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = ::pyreg::widen(float16{bits[lane]});
  return v;
#endif
}

template <typename Half>
PYREG_HOST_DEVICE FloatVector load(const Half* p) {
  UInt16Vector bits;
  memcpy(&bits, p, sizeof(bits));
  return widen(bits, Half{});
}

// Bytes from a read to the one that is asked for beside it. The hardware's own prefetch ends with a page and leaves too
// few reads in flight. StableMax forward at 4096 x 32000 on 2 cores: float 27.8 ms without, 23.6 at 1024, 27.7 at 4096;
// bfloat16 28.3 without, 17.0 at 1024, 15.0 at 4096.
template <typename Storage>
constexpr int64_t kPrefetchBytes = sizeof(Storage) == 2 ? 4096 : 1024;

// Asks for the lines of a step of `count` elements ahead of x.
template <int64_t kCount, typename Storage>
PYREG_HOST_DEVICE void prefetch_ahead(const Storage* x) {
  for (int64_t byte = 0; byte < kCount * static_cast<int64_t>(sizeof(Storage)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + kPrefetchBytes<Storage> + byte);
  }
}

// AddressSanitizer sees no access under a mask: lanes one by one, where it is there.
#if defined(__SANITIZE_ADDRESS__)
#define PYREG_MASKED_ACCESS 0
#else
#define PYREG_MASKED_ACCESS 1
#endif

// The first `count` lanes from memory, `fill` in the others; reads nothing beyond them.
PYREG_HOST_DEVICE FloatVector load_partial(const float* p, int count, float fill) {
#if defined(__AVX512F__) && PYREG_MASKED_ACCESS
  return bit_cast<FloatVector>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (1u << count) - 1u, p));
#elif defined(__AVX2__) && PYREG_MASKED_ACCESS
  const __m256i mask = bit_cast<__m256i>(lane_index<float>() < count);
  return bit_cast<FloatVector>(
      _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask)));
#else
  FloatVector v = broadcast(fill);
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
#endif
}

PYREG_HOST_DEVICE DoubleVector load_partial(const double* p, int count, double fill) {
#if defined(__AVX512F__) && PYREG_MASKED_ACCESS
  return bit_cast<DoubleVector>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (1u << count) - 1u, p));
#else
  DoubleVector v = broadcast(fill);
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
#endif
}

template <typename Half>
PYREG_HOST_DEVICE FloatVector load_partial(const Half* p, int count, float fill) {
#if defined(__AVX512BW__) && defined(__AVX512VL__) && PYREG_MASKED_ACCESS
  const FloatVector v = widen(bit_cast<UInt16Vector>(_mm256_maskz_loadu_epi16((1u << count) - 1u, p)), Half{});
#else
  UInt16Vector bits{};
  for (int lane = 0; lane < count; ++lane) bits[lane] = p[lane].bits;
  const FloatVector v = widen(bits, Half{});
#endif
  return lane_index<float>() < count ? v : broadcast(fill);
}

// ---- stores ----

PYREG_HOST_DEVICE UInt16Vector narrow(FloatVector v, bfloat16) {
  const UInt32Vector bits = bit_cast<UInt32Vector>(v);
  const UInt32Vector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UInt32Vector quiet_nan = (bits >> 16) | 0x40u;
  return truncate(v == v ? rounded : quiet_nan);
}

PYREG_HOST_DEVICE UInt16Vector narrow(FloatVector v, float16) {
#if defined(__AVX512F__)
  return bit_cast<UInt16Vector>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<UInt16Vector>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  UInt16Vector bits;
  for (int lane = 0; lane < kLanes<float>; ++lane) bits[lane] = ::pyreg::narrow<float16>(v[lane]).bits;
  return bits;
#endif
}

PYREG_HOST_DEVICE void store(float* p, FloatVector v) { memcpy(p, &v, sizeof(v)); }
PYREG_HOST_DEVICE void store(double* p, DoubleVector v) { memcpy(p, &v, sizeof(v)); }

template <typename Half>
PYREG_HOST_DEVICE void store(Half* p, FloatVector v) {
  const UInt16Vector bits = narrow(v, Half{});
  memcpy(p, &bits, sizeof(bits));
}

PYREG_HOST_DEVICE void store_partial(float* p, FloatVector v, int count) {
#if defined(__AVX512F__) && PYREG_MASKED_ACCESS
  _mm512_mask_storeu_ps(p, (1u << count) - 1u, bit_cast<__m512>(v));
#elif defined(__AVX2__) && PYREG_MASKED_ACCESS
  _mm256_maskstore_ps(p, bit_cast<__m256i>(lane_index<float>() < count), bit_cast<__m256>(v));
#else
  for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
#endif
}

PYREG_HOST_DEVICE void store_partial(double* p, DoubleVector v, int count) {
#if defined(__AVX512F__) && PYREG_MASKED_ACCESS
  _mm512_mask_storeu_pd(p, (1u << count) - 1u, bit_cast<__m512d>(v));
#else
  for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
#endif
}

template <typename Half>
PYREG_HOST_DEVICE void store_partial(Half* p, FloatVector v, int count) {
  const UInt16Vector bits = narrow(v, Half{});
#if defined(__AVX512BW__) && defined(__AVX512VL__) && PYREG_MASKED_ACCESS
  _mm256_mask_storeu_epi16(p, (1u << count) - 1u, bit_cast<__m256i>(bits));
#else
  for (int lane = 0; lane < count; ++lane) p[lane].bits = bits[lane];
#endif
}

// Whether a comparison holds in any lane.
template <typename Mask>
PYREG_HOST_DEVICE bool any_lane(const Mask& mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  const auto halves = bit_cast<Int64Vector>(mask);
  return (halves[0] | halves[1]) != 0;
#endif
}

// A bit for each lane in which a comparison of A holds.
template <typename A>
PYREG_HOST_DEVICE uint32_t lane_bits(LaneIndex<A> mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(A) == sizeof(float)) {
    return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  } else {
    return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == sizeof(float)) {
    return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
  }
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) bits |= static_cast<uint32_t>(mask[lane] != 0) << lane;
  return bits;
#endif
}

// ---- reductions: a tree over the lanes, the same order everywhere ----

template <typename V>
PYREG_HOST_DEVICE auto sum_lanes(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == sizeof(float)) {
    return _mm512_reduce_add_ps(bit_cast<__m512>(v));
  } else {
    return _mm512_reduce_add_pd(bit_cast<__m512d>(v));
  }
#else
  using A = std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>;
  A partial[kLanes<A>];
  memcpy(partial, &v, sizeof(v));
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
  }
  return partial[0];
#endif
}

// ---- as many doubles as a FloatVector has floats ----

typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));

struct Doubles {
  DoubleVector first, second;
};

PYREG_HOST_DEVICE Doubles operator+(const Doubles& a, const Doubles& b) {
  return {a.first + b.first, a.second + b.second};
}
PYREG_HOST_DEVICE Doubles operator-(const Doubles& a, const Doubles& b) {
  return {a.first - b.first, a.second - b.second};
}
PYREG_HOST_DEVICE Doubles operator*(const Doubles& a, const Doubles& b) {
  return {a.first * b.first, a.second * b.second};
}
PYREG_HOST_DEVICE Doubles operator*(double a, const Doubles& b) { return {a * b.first, a * b.second}; }
PYREG_HOST_DEVICE double sum_lanes(const Doubles& a) { return sum_lanes(a.first + a.second); }

// One instruction where GCC makes four of __builtin_convertvector.
PYREG_HOST_DEVICE DoubleVector to_doubles(HalfFloats v) {
#if defined(__AVX512F__)
  return bit_cast<DoubleVector>(_mm512_cvtps_pd(bit_cast<__m256>(v)));
#elif defined(__AVX2__)
  return bit_cast<DoubleVector>(_mm256_cvtps_pd(bit_cast<__m128>(v)));
#else
  return __builtin_convertvector(v, DoubleVector);
#endif
}

PYREG_HOST_DEVICE Doubles to_doubles(FloatVector v) {
  HalfFloats halves[2];
  memcpy(halves, &v, sizeof(v));
  return {to_doubles(halves[0]), to_doubles(halves[1])};
}

PYREG_HOST_DEVICE DoubleVector to_doubles(DoubleVector v) { return v; }

// While it lives, this thread's subnormal results are 0: each would cost an x86 processor some 150 cycles, where sums
// of exponentials have no use for terms below 2^-126.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

}  // namespace pyreg::PYREG_ISA

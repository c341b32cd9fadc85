// Element types of the kernels, and the step from a run-time Dtype to a compile-time type.
//
// A kernel reads `Storage` (double, float, bfloat16, float16) and computes in `Accumulate<Storage>`:
// double for double, float for the rest.
#pragma once

#include <cstring>

#include "core/platform.h"

#if defined(PYREG_ON_DEVICE)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pyreg {

enum class Dtype : int32_t { float64, float32, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <typename Storage>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename Storage>
using Accumulate = typename AccumulateOf<Storage>::type;

// Names a type without holding a value: `dispatch_dtype(dtype, [&](auto tag) { using T = typename decltype(tag)::type;
// })`.
template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Function>
void dispatch_dtype(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::float64:
      return function(TypeTag<double>{});
    case Dtype::float32:
      return function(TypeTag<float>{});
    case Dtype::bfloat16:
      return function(TypeTag<bfloat16>{});
    case Dtype::float16:
      return function(TypeTag<float16>{});
  }
}

// Calls function(storage, out) with the types of a 16-bit input that may give float32, or of an input that keeps its
// own.
template <typename Function>
void dispatch_in_out(Dtype in, Dtype out, Function&& function) {
  dispatch_dtype(in, [&](auto storage) {
    using Storage = typename decltype(storage)::type;
    if constexpr (sizeof(Storage) == 2) {
      if (out == Dtype::float32) return function(storage, TypeTag<float>{});
    }
    function(storage, storage);
  });
}

// Scalar conversions between storage and accumulation, round to nearest even.
// On the device the hardware's own; on the host bit arithmetic.

PYREG_HOST_DEVICE double widen(double x) { return x; }
PYREG_HOST_DEVICE float widen(float x) { return x; }

PYREG_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

PYREG_HOST_DEVICE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PYREG_HOST_DEVICE float widen(bfloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

#if defined(PYREG_ON_DEVICE)

PYREG_HOST_DEVICE float widen(float16 x) {
  __half half;
  memcpy(&half, &x, sizeof(half));
  return __half2float(half);
}

template <typename Storage>
PYREG_HOST_DEVICE Storage narrow(Accumulate<Storage> x) {
  return x;
}
template <>
PYREG_HOST_DEVICE bfloat16 narrow<bfloat16>(float x) {
  const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
  bfloat16 result;
  memcpy(&result, &rounded, sizeof(result));
  return result;
}
template <>
PYREG_HOST_DEVICE float16 narrow<float16>(float x) {
  const __half rounded = __float2half_rn(x);
  float16 result;
  memcpy(&result, &rounded, sizeof(result));
  return result;
}

#else

PYREG_HOST_DEVICE float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into place the exponent is 112 too small; one product puts it right and makes subnormals exact.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

template <typename Storage>
PYREG_HOST_DEVICE Storage narrow(Accumulate<Storage> x) {
  return x;
}
template <>
PYREG_HOST_DEVICE bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
PYREG_HOST_DEVICE float16 narrow<float16>(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below the smallest normal: adding 0.5 rounds to a multiple of 2^-24
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

#endif

}  // namespace pyreg

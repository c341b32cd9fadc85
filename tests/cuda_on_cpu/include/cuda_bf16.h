// Stands in for the CUDA toolkit's header: conversions, by torch's bfloat16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return static_cast<float>(c10::BFloat16(x.bits, c10::BFloat16::from_bits()));
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {c10::BFloat16(x).x}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

// Stands in for the CUDA toolkit's header: conversions, by torch's half.
#pragma once

#include <torch/headeronly/util/Half.h>

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) { return static_cast<float>(c10::Half(x.bits, c10::Half::from_bits())); }
inline __half __float2half_rn(float x) { return {c10::Half(x).x}; }
inline __half __float2half(float x) { return __float2half_rn(x); }

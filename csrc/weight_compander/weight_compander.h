// The weight compander (Cakaj et al. 2023, arXiv 2306.16993): weights w as a saturating function of what is trained, v.
//
//   w = Psi(v) = a f(u),   u = v / b,   p = Psi'(v) = (a / b) f'(u)
//
//   kind      f          f'                         u f'(u)
//   arctan    arctan u   1 / (1 + u^2)              u / (1 + u^2)
//   arsinh    arsinh u   1 / sqrt(1 + u^2)          u / sqrt(1 + u^2)
//   erf       erf u      2 / sqrt(pi) exp(-u^2)     2 / sqrt(pi) u exp(-u^2)
//
// With g = dL/dw:   dL/dv = g p,   dL/da = sum g f(u),   dL/db = -(a / b) sum g u f'(u)
//
// a and b are of any sign but not 0, and each is one value for the tensor or one for each slice of its dimension 0 (an
// output channel). All functions below are computed from v, never from w, in double for double and in float for the
// rest; none is NaN for an infinite v where the limit is finite.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"
#include "core/math.h"

namespace pyreg {

enum class CompanderKind : int32_t { arctan, arsinh, erf };

// f(u), f'(u) and u f'(u); V is a scalar or a vector of A.
template <typename V>
struct CompanderTerms {
  V value, slope, moment;
};

template <CompanderKind kind, typename A, typename V>
PYREG_HOST_DEVICE CompanderTerms<V> compander_terms(V u) {
  const V x = absolute(u);
  if constexpr (kind == CompanderKind::arctan) {
    // With t = min(x, 1 / x), which squared does not overflow: f' = 1 / (1 + t^2) or t^2 / (1 + t^2), and
    // |u f'| = t / (1 + t^2) on both sides of 1.
    const auto is_large = x > 1.0f;
    const V t = is_large ? reciprocal(x) : x;
    const V share = reciprocal(1.0f + t * t);
    return {arc_tangent(u), is_large ? t * t * share : share, with_sign_of(t * share, u)};
  } else if constexpr (kind == CompanderKind::arsinh) {
    const auto is_large = x > 0x1p30f;  // sqrt(1 + x^2) is x, and x^2 might overflow
    const V slope = reciprocal(is_large ? x : square_root(1.0f + x * x));
    return {area_sine(u), slope, with_sign_of(is_large ? V{} + 1.0f : x * slope, u)};
  } else {
    const V slope = static_cast<A>(1.1283791670955126) * exponential(-(x * x));
    return {error_function(u), slope, slope > 0.0f ? u * slope : slope};
  }
}

// a, 1 / b and a / b, each rounded once
template <typename A>
struct CompanderCoefficients {
  A a, inverse_b, slope;

  PYREG_HOST_DEVICE CompanderCoefficients(double a_, double b_)
      : a(static_cast<A>(a_)), inverse_b(static_cast<A>(1 / b_)), slope(static_cast<A>(a_ / b_)) {}
};

// What one pass over a tensor does with each element v and its partner g, in another tensor of the same shape:
enum class CompanderPass : int32_t {
  forward,            // out <- w; no partner
  gradient,           // out <- dL/dv; g = dL/dw
  gradient_and_sums,  // the same, and the sums of dL/da and dL/db; out may be null
  to_weight,          // out <- dL/dw + the decay's gradient; g = dL/dv
  rescale,            // out <- v + (g - v) p; g = v after a step that was taken as if v were w
};

// The gradient by w from that by v, for an optimizer whose steps are taken on w. The gradient of `decay sum w^2` or of
// `decay sum v^2` is added in:
//
//   (g + 2 decay w p) / p = g / p + 2 decay w     or     (g + 2 decay v) / p
//
// Where p underflows to 0 the quotient is 0: v does not move there whatever its gradient, and an optimizer's moments
// stay finite. Where the quotient overflows, the largest number of the gradient's dtype stands for it. A gradient that
// is not finite itself is left as it is, for whoever looks for such gradients (a gradient scaler).
template <typename A>
struct CompanderDecay {
  A on_w, on_v;  // 2 decay or 0
};

template <typename A, typename V>
PYREG_HOST_DEVICE V compander_to_weight(V g, V v, V w, V p, const CompanderDecay<A>& decay, A largest) {
  const V numerator = decay.on_v != 0 ? g + decay.on_v * v : g;
  const V quotient = p == 0.0f ? V{} : numerator / p;
  V result = decay.on_w != 0 ? quotient + decay.on_w * w : quotient;
  result = result > largest ? V{} + largest : result;
  result = result < -largest ? V{} - largest : result;
  return absolute(g) < static_cast<A>(INFINITY) ? result : g;
}

// A tensor is rows of one a and b each: one row, or as many as dimension 0 has slices. A row's elements lie in parts,
// the units of summation: one part, or several of kCompanderPart elements. Parts lie in chunks, the units of work: one
// part a chunk, or as many short rows as make up a chunk. Sums over parts are joined in their order, so that no result
// depends on the number of threads. 16384 floats are 64 KB: few enough for threads to share evenly, and the 1600 chunks
// of a ResNet-50 fill a GPU several times over.
constexpr int64_t kCompanderPart = 16384;
constexpr int64_t kCompanderShortRow = 2048;  // such a row is worth a GPU's warp, a longer one a block

// a or b of one tensor
struct CompanderConstant {
  enum class Form : int32_t { number, one_value, value_a_row };

  union {
    double number;
    const void* values;  // in the memory of the tensors' device
  };
  Form form;
  Dtype dtype;  // of the values

  PYREG_HOST_DEVICE double operator[](int64_t row) const {
    if (form == Form::number) return number;
    const int64_t i = form == Form::value_a_row ? row : 0;
    switch (dtype) {
      case Dtype::float64:
        return static_cast<const double*>(values)[i];
      case Dtype::float32:
        return static_cast<const float*>(values)[i];
      case Dtype::bfloat16:
        return widen(static_cast<const bfloat16*>(values)[i]);
      case Dtype::float16:
        return widen(static_cast<const float16*>(values)[i]);
    }
    return 0;
  }
};

struct CompanderTensor {
  const void* v;        // [rows, row_size]
  const void* partner;  // the same: g of CompanderPass
  void* out;            // the same; may be the partner's memory
  CompanderConstant a, b;
  int64_t row_size;                 // > 0
  int32_t rows;                     // > 0
  int32_t first_chunk, first_part;  // those of all tensors before this one
  int32_t a_gradient, b_gradient;   // where dL/da and dL/db belong in CompanderArgs::gradients; -1: they are not wanted
  Dtype dtype;                      // of v, partner and out

  PYREG_HOST_DEVICE int32_t parts_per_row() const {
    return static_cast<int32_t>((row_size + kCompanderPart - 1) / kCompanderPart);
  }
  PYREG_HOST_DEVICE int32_t parts_per_chunk() const {
    return rows > 1 && row_size <= kCompanderShortRow ? static_cast<int32_t>(kCompanderPart / row_size) : 1;
  }
  PYREG_HOST_DEVICE int32_t parts() const { return rows * parts_per_row(); }
  PYREG_HOST_DEVICE int32_t chunks() const { return (parts() + parts_per_chunk() - 1) / parts_per_chunk(); }
};

struct CompanderPart {
  int64_t row, begin, size;  // begin: of its first element in the tensor
};

PYREG_HOST_DEVICE CompanderPart compander_part(const CompanderTensor& tensor, int32_t part) {
  const int64_t row = part / tensor.parts_per_row();
  const int64_t skipped = (part % tensor.parts_per_row()) * kCompanderPart;
  const int64_t rest = tensor.row_size - skipped;
  return {row, row * tensor.row_size + skipped, rest < kCompanderPart ? rest : kCompanderPart};
}

// sum g f(u) and -(a / b) sum g u f'(u): what a part adds to dL/da and dL/db of its row
struct CompanderSums {
  double a, b;
};

PYREG_HOST_DEVICE CompanderSums operator+(const CompanderSums& x, const CompanderSums& y) {
  return {x.a + y.a, x.b + y.b};
}

// The gradient of a tensor that holds values of a or b: of one value, or of one for each row. Several tensors of
// weights may share it.
struct CompanderGradient {
  void* out;      // [size]
  int64_t total;  // where its values are summed in the workspace's totals
  int32_t size;
  Dtype dtype;
};

struct CompanderArgs {
  CompanderKind kind;
  CompanderPass pass;
  const CompanderTensor* tensors;  // [count], in host memory
  int64_t count;
  const CompanderGradient* gradients;  // [gradient_count], in host memory
  int64_t gradient_count;
  CompanderSums* partial_sums;    // [parts of all tensors], on the tensors' device, as totals
  double* totals;                 // [sizes of all gradients]
  double decay_on_w, decay_on_v;  // 2 decay, of CompanderPass::to_weight
  void* stream;
};

PYREG_DECLARE_KERNEL(weight_compander, CompanderArgs)

}  // namespace pyreg

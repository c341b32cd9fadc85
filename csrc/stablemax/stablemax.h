// StableMax (Prieto et al. 2025, arXiv 2501.04697): softmax with exp replaced by
//
//   s(x) = x + 1 for x >= 0,  1 / (1 - x) for x < 0;      stablemax(x)_j = s(x_j) / S,  S = sum_k s(x_k)
//
// With d = 1 + |x| and h = 1 / d: s = d or h, s' = 1 or h^2, d log s / dx = h, log s = sign(x) log d. There is no
// exponential and no row maximum. -inf gives s = 0 and h = 0: a masked class.
//
// Where one class dominates, S - s_j cancels. So every sum here leaves out one class, the pivot p (the target of a
// class-index loss, else the largest logit): R = sum_{k != p} s_k, and with it
//
//   -log p_p = log1p(R / s_p),     1 - p_p = R / S,     g_j - sum_k g_k p_k = (g_j - g_p) - sum_{k != p} (g_k - g_p)
//   p_k
//
// are exact where the plain forms lose all digits.
#pragma once

#include <type_traits>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/math.h"
#include "core/rows.h"

namespace pyreg {

// d = 1 + |x| and h = 1 / d, from which every other quantity follows. T is a scalar or a SIMD vector.
template <typename T>
struct StableTerms {
  T magnitude;  // d
  T slope;      // h = d log s / dx
};

template <typename T>
PYREG_HOST_DEVICE StableTerms<T> stable_terms(T x) {
  const T magnitude = 1.0f + absolute(x);
  return {magnitude, reciprocal(magnitude)};
}

// s(x)
template <typename T>
PYREG_HOST_DEVICE T stable_value(T x, StableTerms<T> terms) {
  return x < 0.0f ? terms.slope : terms.magnitude;
}

template <typename T>
PYREG_HOST_DEVICE T stable_value(T x) {
  return stable_value(x, stable_terms(x));
}

// s'(x) * factor; the factor is multiplied in between so that h^2 alone never underflows.
template <typename T>
PYREG_HOST_DEVICE T stable_derivative(T x, StableTerms<T> terms, T factor) {
  return x < 0.0f ? terms.slope * (terms.slope * factor) : factor;
}

// log s(x)
template <typename T>
PYREG_HOST_DEVICE T log_stable_value(T x) {
  const T log_magnitude = log_one_plus(absolute(x));
  return x < 0.0f ? -log_magnitude : log_magnitude;
}

// Sums of a row can exceed the largest number although every logit is finite; such rows are summed again times 2^-64.
constexpr int kRescaleBits = 64;
constexpr float kRescale = 0x1p-64f;

// The sum of a row without its pivot.
template <typename A>
struct RowSum {
  A rest;  // R, times kRescale if rescaled
  bool rescaled;
};

// A row's sum S in the forms that values and gradients need. T is a scalar, or a SIMD vector with a row a lane.
template <typename T>
struct RowNormalizer {
  T scale;        // 1, or kRescale where the plain sum overflows
  T inverse;      // 1 / (scale S): the share of s is (s * scale) * inverse, in numbers that neither over- nor underflow
  T inverse_sum;  // 1 / S
  T pivot_share;  // p_p = s_p / S
  T rest_share;   // 1 - p_p = R / S
  T negative_log;  // -log p_p
};

// scale S from scale R. NaN where a logit is NaN or +infinity.
template <typename T>
PYREG_HOST_DEVICE T row_sum(T rest, T pivot_logit, T scale) {
  const T sum = rest + stable_value(pivot_logit) * scale;
  return sum + (sum - sum);
}

template <typename A>
PYREG_HOST_DEVICE A log_row_sum(A rest, A pivot_logit, bool rescaled) {
  const A sum = row_sum(rest, pivot_logit, rescaled ? A(kRescale) : A(1));
  return logarithm(sum) + (rescaled ? A(kRescaleBits * 0.693147180559945309417) : A(0));
}

// A ratio R / s_p from which log1p gives -log p_p; larger ones may have overflowed.
constexpr float kLargestRatio = 1e30f;

// From scale R and the pivot's logit; negative_log holds where R / s_p < kLargestRatio.
template <typename T>
PYREG_HOST_DEVICE RowNormalizer<T> normalize_common_row(T rest, T pivot_logit, T scale) {
  const T pivot = stable_value(pivot_logit) * scale;
  const T sum = row_sum(rest, pivot_logit, scale);
  const T inverse = 1.0f / sum;
  return {scale, inverse, scale * inverse, pivot / sum, rest / sum, log_one_plus(rest / pivot)};
}

template <typename A>
PYREG_HOST_DEVICE RowNormalizer<A> normalize_row(A rest, A pivot_logit, bool rescaled) {
  const A scale = rescaled ? A(kRescale) : A(1);
  RowNormalizer<A> row = normalize_common_row(rest, pivot_logit, scale);
  if (rest / (stable_value(pivot_logit) * scale) >= A(kLargestRatio)) {  // no cancellation in this difference
    row.negative_log = log_row_sum(rest, pivot_logit, rescaled) - log_stable_value(pivot_logit);
  }
  return row;
}

// Q p_p - q_p for a distribution of mass Q = rest_mass + pivot_mass, q_p = pivot_mass: where the pivot has most of the
// sum, from what the others have.
template <typename T>
PYREG_HOST_DEVICE T pivot_difference(const RowNormalizer<T>& row, T rest_mass, T pivot_mass) {
  const T mass = rest_mass + pivot_mass;
  return row.rest_share < 0.5f ? rest_mass - mass * row.rest_share : mass * row.pivot_share - pivot_mass;
}

// p = s / S
template <typename T, typename A>
PYREG_HOST_DEVICE T probability(T x, StableTerms<T> terms, const RowNormalizer<A>& row) {
  return (stable_value(x, terms) * row.scale) * row.inverse;
}

// log p. log(s / S) loses nothing where both are large or both are small; where the quotient would underflow, the
// difference of logarithms has no cancellation.
template <typename T, typename A>
PYREG_HOST_DEVICE T log_probability(T x, StableTerms<T> terms, const RowNormalizer<A>& row, A log_sum) {
  const T quotient = probability(x, terms, row);
  const auto normal = quotient > 1e-30f;
  const T log_argument = logarithm(normal ? quotient : terms.magnitude);
  return normal ? log_argument : (x < 0.0f ? -log_argument : log_argument) - log_sum;
}

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// What a forward pass leaves for the backward pass: an array [fields, rows] in the accumulation dtype, then one
// element, the total weight by which a mean divides. With Q = sum_j q_j over the row's target distribution q (class
// weights and label smoothing included):
//
//   dL/dx_j = (Q / S) s'_j - q_j h_j  for j != p,      dL/dx_p = h_p (Q p_p - q_p)
struct SavedRows {
  enum Field : int64_t {
    sum_gradient = 0,    // Q / S
    pivot_gradient = 1,  // Q p_p - q_p
    loss = 2,            // the row's loss
    pivot = 3,           // p, the bits of an integer as wide as the element; kept for probability targets
  };
};
constexpr int64_t kSavedFieldsForLabels = 3;
constexpr int64_t kSavedFieldsForProbabilities = 4;

// One row's entries there.
template <typename A>
struct RowResult {
  A loss;
  A sum_gradient;
  A pivot_gradient;
};

// An integer in the bits of a saved element, whatever its type.
template <typename A>
PYREG_HOST_DEVICE A bits_of_index(int64_t index) {
  const auto bits = static_cast<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>(index);
  A element;
  memcpy(&element, &bits, sizeof(element));
  return element;
}

template <typename A>
PYREG_HOST_DEVICE int64_t index_of_bits(A element) {
  std::conditional_t<sizeof(A) == 4, int32_t, int64_t> bits;
  memcpy(&bits, &element, sizeof(bits));
  return bits;
}

struct CrossEntropyArgs {
  Dtype dtype;                // of logits, probabilities and grad_logits
  Dtype loss_dtype;           // of loss and grad_loss
  RowLayout layout;           // [outer, classes, inner]
  const void* logits;         // [outer, classes, inner]
  int64_t logits_stride;      // between rows where inner == 1
  const int64_t* labels;      // [outer, inner] class indices, or null
  const void* probabilities;  // [outer, classes, inner], or null
  const void* weight;         // [classes] class weights in the accumulation dtype, or null
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;
  void* loss;              // [] or [outer, inner]
  void* saved;             // see SavedRows
  const void* grad_loss;   // [] or [outer, inner], backward
  void* grad_logits;       // [outer, classes, inner], backward; may be the logits with_gradient
  int64_t* invalid_label;  // CPU: receives a label outside [0, classes), else untouched
  void* stream;
};

// saved, loss <- logits, target
PYREG_DECLARE_KERNEL(stablemax_cross_entropy_forward, CrossEntropyArgs)
// grad_logits <- grad_loss, logits, target, saved
PYREG_DECLARE_KERNEL(stablemax_cross_entropy_backward, CrossEntropyArgs)
// Both in one pass over the logits, the gradient for grad_loss = 1; it may take the logits' own memory. Class indices
// only.
PYREG_DECLARE_KERNEL(stablemax_cross_entropy_with_gradient, CrossEntropyArgs)

struct StablemaxArgs {
  Dtype dtype;         // of input, and of grad_input
  Dtype output_dtype;  // of output and grad_output: dtype, or float32 for a 16-bit dtype
  RowLayout layout;
  const void* input;        // [outer, classes, inner]
  const void* grad_output;  // [outer, classes, inner], backward
  void* output;             // [outer, classes, inner]: stablemax, its logarithm, or grad_input
  void* stream;
};

PYREG_DECLARE_KERNEL(stablemax_forward, StablemaxArgs)
PYREG_DECLARE_KERNEL(stablemax_backward, StablemaxArgs)
PYREG_DECLARE_KERNEL(log_stablemax_forward, StablemaxArgs)
PYREG_DECLARE_KERNEL(log_stablemax_backward, StablemaxArgs)

}  // namespace pyreg

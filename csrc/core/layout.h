// The order in which tensors' elements lie in memory, for operators that take them as they lie.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace pyreg {

// Whether the elements fill one block of memory, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) != 1) axes.emplace_back(tensor.stride(axis), tensor.size(axis));
  }
  std::sort(axes.begin(), axes.end());
  int64_t dense = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != dense) return false;
    dense *= size;
  }
  return true;
}

// Whether two tensors of one shape fill a block of memory each in the same order: then their elements pair up as they
// lie.
inline bool lie_alike(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != 1 && a.stride(axis) != b.stride(axis)) return false;
  }
  return is_dense(a);
}

inline std::vector<int64_t> contiguous_strides(const Tensor& tensor) {
  std::vector<int64_t> strides(static_cast<size_t>(tensor.dim()));
  int64_t step = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
    strides[static_cast<size_t>(axis)] = step;
    step *= tensor.size(axis);
  }
  return strides;
}

// Uninitialised, of the tensor's shape and dtype, its elements in the order of the tensor's if that is dense, else
// contiguous.
inline Tensor empty_in_order_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const std::span<const int64_t> shape(sizes.data(), sizes.size());
  if (is_dense(tensor)) {
    return empty_strided(shape, {strides.data(), strides.size()}, tensor.scalar_type(), tensor);
  }
  return empty_strided(shape, contiguous_strides(tensor), tensor.scalar_type(), tensor);
}

inline Tensor empty_contiguous(const Tensor& like) {
  const auto sizes = like.sizes();
  return empty_strided({sizes.data(), sizes.size()}, contiguous_strides(like), like.scalar_type(), like);
}

inline void require_own_memory(const Tensor& tensor, const char* operator_name, const char* list, size_t i) {
  if (tensor.numel() == 0) return;  // its strides say nothing: torch leaves 0 among them
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    PYREG_REQUIRE(tensor.stride(axis) != 0 || tensor.size(axis) <= 1, operator_name, "expected ", list, "[", i,
                  "] to have memory of its own for each element, got an expanded tensor; clone it first");
  }
}

}  // namespace pyreg

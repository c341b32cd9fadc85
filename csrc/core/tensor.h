// Tensors for the <op>_op.cpp files, on LibTorch's stable ABI: one binary serves every torch >= 2.10.
//
// An op file is compiled once a device. PYREG_DEVICE names the namespace of its kernels (cpu or cuda),
// PYREG_DISPATCH_KEY the dispatch key and PYREG_LIBRARY the operator library it registers with.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/huge_pages.h"

// STABLE_TORCH_LIBRARY_IMPL does not expand macros in its arguments; this does.
#define PYREG_IMPLEMENT(library, key, variable) STABLE_TORCH_LIBRARY_IMPL(library, key, variable)

namespace pyreg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Thrown as ValueError and IndexError in Python.
template <typename... Parts>
[[noreturn]] void fail_value(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename... Parts>
[[noreturn]] void fail_index(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::out_of_range(message.str());
}

// The last line of defence behind the Python checks: a direct call of the operator with arguments that would make a
// kernel read out of bounds.
#define PYREG_REQUIRE(condition, operator_name, ...) \
  if (!(condition)) ::pyreg::fail_value("pyreg::", operator_name, ": ", __VA_ARGS__)

inline Dtype dtype_of(ScalarType type, const char* operator_name) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      fail_value("pyreg::", operator_name, ": expected a float64, float32, bfloat16 or float16 tensor, got ",
                 torch::headeronly::toString(type));
  }
}

inline ScalarType accumulate_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised, on the device of `like`, its elements one after another in some order. Large CPU outputs get huge
// pages.
inline Tensor empty_strided(std::span<const int64_t> sizes, std::span<const int64_t> strides, ScalarType type,
                            const Tensor& like) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
                               like.get_device_index(), &handle));
  Tensor result(handle);
  if (like.is_cpu()) {
    const size_t bytes = static_cast<size_t>(result.numel()) * result.element_size();
    advise_huge_pages(result.mutable_data_ptr(), bytes);
  }
  return result;
}

// The same, contiguous.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  std::array<int64_t, 8> strides{};
  int64_t step = 1;
  for (int64_t axis = static_cast<int64_t>(sizes.size()) - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= sizes.begin()[axis];
  }
  return empty_strided({sizes.begin(), sizes.size()}, {strides.data(), sizes.size()}, type, like);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Makes the tensor's device current for a kernel launch; `stream` is that device's current one. Nothing on the CPU.
struct Launch {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;

  explicit Launch([[maybe_unused]] const Tensor& on) {
#if defined(PYREG_WITH_CUDA)
    guard.emplace(on.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
#endif
  }
};

}  // namespace pyreg

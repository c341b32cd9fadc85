// Matrix products of torch on parts of tensors, without a copy.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "core/tensor.h"

namespace pyreg {

inline Tensor matrix_view(const Tensor& base, int64_t offset, std::array<int64_t, 2> sizes,
                          std::array<int64_t, 2> strides) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(base.get(), 2, sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
inline void add_product(const Tensor& total, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(total.get(), total.get(), a.get(), b.get(), 1, 1));
}

}  // namespace pyreg

// OrthoGrad's operator: tensors in, their gradients changed in place. Compiled once for the CPU and once for CUDA.
#include <algorithm>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/tensor.h"
#include "orthograd/orthograd.h"

namespace pyreg {

namespace {

constexpr const char* kName = "orthogonalize_gradients_";

void check_pair(const Tensor& param, const Tensor& grad, size_t i) {
  PYREG_REQUIRE(std::ranges::equal(param.sizes(), grad.sizes()), kName, "expected grads[", i,
                "] of the shape of params[", i, "]");
  PYREG_REQUIRE(param.scalar_type() == grad.scalar_type(), kName, "expected grads[", i, "] of dtype ",
                torch::headeronly::toString(param.scalar_type()), " as params[", i, "], got ",
                torch::headeronly::toString(grad.scalar_type()));
  require_own_memory(grad, kName, "grads", i);
}

void check_device(const Tensor& tensor, const Tensor& first, const char* list, size_t i) {
  PYREG_REQUIRE(tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                    tensor.get_device_index() == first.get_device_index(),
                kName, "expected all tensors on one device, but ", list, "[", i, "] lies on another than params[0]");
}

void orthogonalize_gradients_(std::vector<Tensor> params, std::vector<Tensor> grads) {
  PYREG_REQUIRE(params.size() == grads.size(), kName, "expected one gradient a parameter, got ", params.size(),
                " params and ", grads.size(), " grads");
  std::vector<OrthogradTensor> tensors;
  tensors.reserve(params.size());
  std::vector<Tensor> weight_copies;
  std::vector<std::pair<Tensor, Tensor>> grad_copies;  // gradient, its contiguous copy
  int64_t chunks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const Tensor& grad = grads[i];
    check_device(param, params[0], "params", i);
    check_device(grad, params[0], "grads", i);
    check_pair(param, grad, i);
    const Dtype dtype = dtype_of(param.scalar_type(), kName);
    const int64_t size = param.numel();
    if (size == 0) continue;
    OrthogradTensor tensor{nullptr, nullptr, size, static_cast<int32_t>(chunks), dtype};
    if (lie_alike(param, grad)) {
      tensor.weight = param.const_data_ptr();
      tensor.grad = grad.mutable_data_ptr();
    } else {
      weight_copies.push_back(contiguous(param));
      tensor.weight = weight_copies.back().const_data_ptr();
      Tensor copy = contiguous(grad);
      tensor.grad = copy.mutable_data_ptr();
      if (!grad.is_contiguous()) grad_copies.emplace_back(grad, std::move(copy));
    }
    chunks += tensor.chunks();
    tensors.push_back(tensor);
  }
  if (tensors.empty()) return;

  const Launch launch(params[0]);
  const int64_t count = static_cast<int64_t>(tensors.size());
  const Tensor workspace = empty({orthograd_workspace_size(count, chunks)}, ScalarType::Double, params[0]);
  OrthogradArgs args{};
  args.tensors = tensors.data();
  args.count = count;
  args.chunks = chunks;
  args.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  args.stream = launch.stream;
  PYREG_DEVICE::orthogonalize_gradients(args);
  for (auto& [grad, copy] : grad_copies) torch::stable::copy_(grad, copy);
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("orthogonalize_gradients_", TORCH_BOX(&orthogonalize_gradients_));
}

}  // namespace pyreg

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

// Parameters and gradients as the kernels take them.
class Pairs {
 public:
  Pairs(const std::vector<Tensor>& params, const std::vector<Tensor>& grads) {
    PYREG_REQUIRE(params.size() == grads.size(), kName, "expected one gradient a parameter, got ", params.size(),
                  " params and ", grads.size(), " grads");
    tensors_.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      check_device(params[i], params[0], "params", i);
      check_device(grads[i], params[0], "grads", i);
      check_pair(params[i], grads[i], i);
      if (params[i].numel() > 0) add(params[i], grads[i]);
    }
  }

  int64_t count() const { return static_cast<int64_t>(tensors_.size()); }

  // Makes one step, or everything; `sums` [count, 3] and `residuals` [count] as the step has them.
  void run(OrthogradStep step, const Tensor& like, const Tensor* sums, const Tensor* residuals) {
    const Launch launch(like);
    const Tensor workspace = empty({orthograd_workspace_size(count(), chunks_)}, ScalarType::Double, like);
    OrthogradArgs args{};
    args.tensors = tensors_.data();
    args.count = count();
    args.chunks = chunks_;
    args.workspace = static_cast<double*>(workspace.mutable_data_ptr());
    args.step = step;
    if (sums) args.sums = static_cast<OrthogradSums*>(const_cast<void*>(sums->const_data_ptr()));
    if (residuals) args.residuals = static_cast<double*>(const_cast<void*>(residuals->const_data_ptr()));
    args.stream = launch.stream;
    PYREG_DEVICE::orthogonalize_gradients(args);
  }

  // Where gradients did not lie as the weights do.
  void write_back() {
    for (auto& [grad, copy] : grad_copies_) torch::stable::copy_(grad, copy);
  }

 private:
  void add(const Tensor& param, const Tensor& grad) {
    OrthogradTensor tensor{nullptr, nullptr, param.numel(), static_cast<int32_t>(chunks_),
                           dtype_of(param.scalar_type(), kName)};
    if (lie_alike(param, grad)) {
      tensor.weight = param.const_data_ptr();
      tensor.grad = grad.mutable_data_ptr();
    } else {
      weight_copies_.push_back(contiguous(param));
      tensor.weight = weight_copies_.back().const_data_ptr();
      Tensor copy = contiguous(grad);
      tensor.grad = copy.mutable_data_ptr();
      if (!grad.is_contiguous()) grad_copies_.emplace_back(grad, std::move(copy));
    }
    chunks_ += tensor.chunks();
    tensors_.push_back(tensor);
  }

  std::vector<OrthogradTensor> tensors_;  // those that have elements
  std::vector<Tensor> weight_copies_;
  std::vector<std::pair<Tensor, Tensor>> grad_copies_;  // gradient, its contiguous copy
  int64_t chunks_ = 0;
};

void orthogonalize_gradients_(std::vector<Tensor> params, std::vector<Tensor> grads) {
  Pairs pairs(params, grads);
  if (pairs.count() == 0) return;
  pairs.run(OrthogradStep::everything, params[0], nullptr, nullptr);
  pairs.write_back();
}

// ---- parameters whose shards lie in several processes, step by step ----

Pairs shards_of(const std::vector<Tensor>& params, const std::vector<Tensor>& grads) {
  Pairs shards(params, grads);
  PYREG_REQUIRE(!params.empty() && shards.count() == static_cast<int64_t>(params.size()), kName,
                "expected shards that have elements");
  return shards;
}

void check_numbers(const Tensor& numbers, const char* name, int64_t count, const Tensor& like) {
  PYREG_REQUIRE(numbers.numel() == count && numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Double &&
                    numbers.is_cpu() == like.is_cpu(),
                kName, "expected ", name, " of ", count, " float64 numbers, contiguous, on the parameters' device");
}

Tensor sums_of_shards(std::vector<Tensor> params, std::vector<Tensor> grads) {
  Pairs shards = shards_of(params, grads);
  Tensor sums = empty({shards.count(), 3}, ScalarType::Double, params[0]);
  shards.run(OrthogradStep::sums, params[0], &sums, nullptr);
  return sums;
}

Tensor residuals_of_shards(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor sums) {
  Pairs shards = shards_of(params, grads);
  check_numbers(sums, "sums", 3 * shards.count(), params[0]);
  Tensor residuals = empty({shards.count()}, ScalarType::Double, params[0]);
  shards.run(OrthogradStep::residuals, params[0], &sums, &residuals);
  return residuals;
}

void update_shards_(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor sums, Tensor residuals) {
  Pairs shards = shards_of(params, grads);
  check_numbers(sums, "sums", 3 * shards.count(), params[0]);
  check_numbers(residuals, "residuals", shards.count(), params[0]);
  shards.run(OrthogradStep::update, params[0], &sums, &residuals);
  shards.write_back();
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("orthogonalize_gradients_", TORCH_BOX(&orthogonalize_gradients_));
  library.impl("orthograd_sums", TORCH_BOX(&sums_of_shards));
  library.impl("orthograd_residuals", TORCH_BOX(&residuals_of_shards));
  library.impl("orthograd_update_", TORCH_BOX(&update_shards_));
}

}  // namespace pyreg

// The weight compander's operators: lists of tensors in, lists of tensors out or changed in place. Compiled once for
// the CPU and once for CUDA.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/tensor.h"
#include "weight_compander/weight_compander.h"

namespace pyreg {

namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// The values of a and b, and which of them belong to each tensor: tensors[i], or numbers[-1 - i] where i is negative.
struct Constants {
  Tensors tensors;
  std::vector<double> numbers;
  Integers a, b;
};

// The kernel's table of tensors, and what must outlive its run.
class Table {
 public:
  Table(const char* name, const Tensors& vs, Constants constants, int64_t kind)
      : name_(name), constants_(std::move(constants)) {
    PYREG_REQUIRE(constants_.a.size() == vs.size() && constants_.b.size() == vs.size(), name,
                  "expected an a and a b for "
                  "each of ",
                  vs.size(), " tensors, got ", constants_.a.size(), " and ", constants_.b.size());
    PYREG_REQUIRE(kind >= 0 && kind <= 2, name, "expected kind 0 (arctan), 1 (arsinh) or 2 (erf), got ", kind);
    args_.kind = static_cast<CompanderKind>(kind);
    for (Tensor& tensor : constants_.tensors) {
      PYREG_REQUIRE(tensor.numel() <= INT32_MAX, name, "expected an a or b of at most ", INT32_MAX, " values, got ",
                    tensor.numel());
      tensor = as_contiguous(tensor);
    }
    rows_.reserve(vs.size());
  }

  // The entry for one tensor, without memory. Checks that everything fits together.
  CompanderTensor entry(const Tensor& v, const Tensor& first, size_t i) {
    check_device(v, first, "vs", i);
    CompanderTensor entry{};
    entry.dtype = dtype_of(v.scalar_type(), name_);
    entry.a = constant(constants_.a[i], v, first, "a", i);
    entry.b = constant(constants_.b[i], v, first, "b", i);
    const bool by_row =
        entry.a.form == CompanderConstant::Form::value_a_row || entry.b.form == CompanderConstant::Form::value_a_row;
    entry.rows = by_row ? static_cast<int32_t>(v.size(0)) : 1;
    entry.row_size = v.numel() / (entry.rows > 0 ? entry.rows : 1);
    entry.a_gradient = entry.b_gradient = -1;
    return entry;
  }

  // Values of a and b that would make NaN or infinity of everything. Only where reading them costs nothing.
  void check_values(const CompanderTensor& entry, const Tensor& v, size_t i) const {
    const double smallest = entry.dtype == Dtype::float64 ? DBL_MIN : FLT_MIN;
    const auto check = [&](const CompanderConstant& constant, const char* what, double least) {
      if (constant.form != CompanderConstant::Form::number && !v.is_cpu()) return;
      const int64_t count = constant.form == CompanderConstant::Form::value_a_row ? entry.rows : 1;
      for (int64_t row = 0; row < count; ++row) {
        const double value = constant[row];
        PYREG_REQUIRE(std::isfinite(value) && std::abs(value) >= least && value != 0, name_, "expected ", what,
                      " to be finite and not 0, got ", value, " for tensor ", i,
                      count > 1 ? ", slice " + std::to_string(row) + " of dimension 0" : std::string(),
                      "; w = a f(v / b) needs both a and b");
      }
    };
    check(entry.a, "a", 0);
    check(entry.b, "b", smallest);
  }

  // Whether the tensor's memory holds its rows one after another, with no gaps.
  static bool has_rows(const Tensor& tensor, const CompanderTensor& entry) {
    if (tensor.is_contiguous()) return true;
    return is_dense(tensor) && (entry.rows == 1 || tensor.stride(0) == entry.row_size);
  }

  void check_partner(const Tensor& partner, const Tensor& v, const char* list, size_t i) const {
    check_device(partner, v, list, i);
    PYREG_REQUIRE(std::ranges::equal(partner.sizes(), v.sizes()), name_, "expected ", list, "[", i,
                  "] of the shape of its v");
    PYREG_REQUIRE(partner.scalar_type() == v.scalar_type(), name_, "expected ", list, "[", i, "] of dtype ",
                  torch::headeronly::toString(v.scalar_type()), " as its v, got ",
                  torch::headeronly::toString(partner.scalar_type()));
  }

  // Adds an entry whose kernel reads v and `partner` and writes `out`, each of which may lie in memory as it likes.
  void add(CompanderTensor entry, const Tensor& v, const Tensor* partner, const Tensor* out) {
    if (v.numel() == 0) return;
    const bool as_it_lies = has_rows(v, entry) && (out == nullptr || lie_alike(*out, v));
    entry.v = held(as_it_lies ? v : as_contiguous(v)).const_data_ptr();
    if (partner != nullptr) {
      if (!as_it_lies) {
        entry.partner = held(as_contiguous(*partner)).const_data_ptr();
      } else if (lie_alike(*partner, v)) {
        entry.partner = partner->const_data_ptr();
      } else {
        Tensor copy = empty_in_order_of(v);
        torch::stable::copy_(copy, *partner);
        entry.partner = held(std::move(copy)).const_data_ptr();
      }
    }
    if (out != nullptr) {
      if (as_it_lies || out->is_contiguous()) {
        entry.out = out->mutable_data_ptr();
      } else {
        results_.emplace_back(*out, empty_contiguous(*out));
        entry.out = results_.back().second.mutable_data_ptr();
      }
    }
    entry.first_chunk = static_cast<int32_t>(chunks_);
    entry.first_part = static_cast<int32_t>(parts_);
    chunks_ += entry.chunks();
    parts_ += entry.parts();
    PYREG_REQUIRE(parts_ <= INT32_MAX, name_, "expected at most ", INT32_MAX,
                  " slices in all tensors with an a or b "
                  "for each slice of dimension 0, got more; call the operator with fewer tensors");
    rows_.push_back(entry);
  }

  // Where the gradient of constants[i] is to be written; tensors added with its index add to it.
  int32_t add_gradient(const Tensor& gradient) {
    gradients_.push_back({gradient.mutable_data_ptr(), totals_, static_cast<int32_t>(gradient.numel()),
                          dtype_of(gradient.scalar_type(), name_)});
    totals_ += gradient.numel();
    return static_cast<int32_t>(gradients_.size()) - 1;
  }

  bool has_gradients() const { return !gradients_.empty(); }

  void run(CompanderPass pass, const Tensor& on, double decay_on_w = 0, double decay_on_v = 0) {
    if (rows_.empty()) return;
    const Launch launch(on);
    Tensor workspace;
    if (!gradients_.empty()) {
      workspace = empty({2 * parts_ + totals_}, ScalarType::Double, on);
      args_.partial_sums = static_cast<CompanderSums*>(workspace.mutable_data_ptr());
      args_.totals = static_cast<double*>(workspace.mutable_data_ptr()) + 2 * parts_;
    }
    args_.pass = pass;
    args_.tensors = rows_.data();
    args_.count = static_cast<int64_t>(rows_.size());
    args_.gradients = gradients_.data();
    args_.gradient_count = static_cast<int64_t>(gradients_.size());
    args_.decay_on_w = 2 * decay_on_w;
    args_.decay_on_v = 2 * decay_on_v;
    args_.stream = launch.stream;
    PYREG_DEVICE::weight_compander(args_);
    for (auto& [out, result] : results_) torch::stable::copy_(out, result);
  }

  const Constants& constants() const { return constants_; }

 private:
  void check_device(const Tensor& tensor, const Tensor& first, const char* list, size_t i) const {
    PYREG_REQUIRE(tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                      tensor.get_device_index() == first.get_device_index(),
                  name_, "expected all tensors on one device, but ", list, "[", i, "] lies on another than vs[0]");
  }

  CompanderConstant constant(int64_t index, const Tensor& v, const Tensor& first, const char* what, size_t i) const {
    const int64_t tensors = static_cast<int64_t>(constants_.tensors.size());
    const int64_t numbers = static_cast<int64_t>(constants_.numbers.size());
    PYREG_REQUIRE(index >= -numbers && index < tensors, name_, "expected ", what, "[", i, "] in [", -numbers, ", ",
                  tensors, "), got ", index);
    CompanderConstant constant{};
    if (index < 0) {
      constant.form = CompanderConstant::Form::number;
      constant.number = constants_.numbers[static_cast<size_t>(-1 - index)];
      return constant;
    }
    const Tensor& values = constants_.tensors[static_cast<size_t>(index)];
    check_device(values, first, "constants", static_cast<size_t>(index));
    const bool by_row = values.numel() != 1;
    PYREG_REQUIRE(!by_row || (v.dim() > 0 && values.numel() == v.size(0)), name_, "expected ", what, " of tensor ", i,
                  " to hold one value or one for each slice of dimension 0, got ", values.numel(), " values");
    constant.form = by_row ? CompanderConstant::Form::value_a_row : CompanderConstant::Form::one_value;
    constant.values = values.const_data_ptr();
    constant.dtype = dtype_of(values.scalar_type(), name_);
    return constant;
  }

  const Tensor& held(Tensor tensor) {
    held_.push_back(std::move(tensor));
    return held_.back();
  }

  const char* name_;
  Constants constants_;
  CompanderArgs args_{};
  std::vector<CompanderTensor> rows_;
  std::vector<CompanderGradient> gradients_;
  Tensors held_;
  std::vector<std::pair<Tensor, Tensor>> results_;  // output, its contiguous stand-in
  int64_t chunks_ = 0, parts_ = 0, totals_ = 0;
};

Tensors weight_compander(Tensors vs, Tensors constants, std::vector<double> numbers, Integers a, Integers b,
                         int64_t kind) {
  Table table("weight_compander", vs, {std::move(constants), std::move(numbers), std::move(a), std::move(b)}, kind);
  Tensors ws;
  ws.reserve(vs.size());
  for (size_t i = 0; i < vs.size(); ++i) {
    const CompanderTensor entry = table.entry(vs[i], vs[0], i);
    table.check_values(entry, vs[i], i);
    ws.push_back(empty_in_order_of(vs[i]));
    table.add(entry, vs[i], nullptr, &ws[i]);
  }
  if (!vs.empty()) table.run(CompanderPass::forward, vs[0]);
  return ws;
}

// The gradients of those vs, and after them of those constants, whose flag in needs_grad (vs first) is not 0.
Tensors weight_compander_backward(Tensors grads, Tensors vs, Tensors constants, std::vector<double> numbers, Integers a,
                                  Integers b, int64_t kind, Integers needs_grad) {
  const char* const name = "weight_compander_backward";
  Table table(name, vs, {std::move(constants), std::move(numbers), std::move(a), std::move(b)}, kind);
  const size_t count = table.constants().tensors.size();
  PYREG_REQUIRE(grads.size() == vs.size() && needs_grad.size() == vs.size() + count, name,
                "expected a gradient for each of ", vs.size(), " tensors and ", vs.size() + count, " flags, got ",
                grads.size(), " and ", needs_grad.size());
  Tensors results;
  results.reserve(needs_grad.size());
  for (size_t i = 0; i < vs.size(); ++i) {
    if (needs_grad[i] != 0) results.push_back(empty_in_order_of(vs[i]));
  }
  std::vector<bool> is_used(count, false);  // by a tensor that has elements
  for (size_t i = 0; i < vs.size(); ++i) {
    for (const int64_t place : {table.constants().a.at(i), table.constants().b.at(i)}) {
      if (place >= 0 && vs[i].numel() > 0) is_used.at(static_cast<size_t>(place)) = true;
    }
  }
  std::vector<int32_t> gradients(count, -1);
  for (size_t i = 0; i < count; ++i) {
    if (needs_grad[vs.size() + i] == 0) continue;
    results.push_back(empty_contiguous(table.constants().tensors[i]));
    if (is_used[i]) {
      gradients[i] = table.add_gradient(results.back());
    } else {
      torch::stable::zero_(results.back());
    }
  }
  size_t next = 0;
  for (size_t i = 0; i < vs.size(); ++i) {
    CompanderTensor entry = table.entry(vs[i], vs[0], i);
    table.check_partner(grads[i], vs[i], "grads", i);
    const auto gradient_of = [&](int64_t place) { return place < 0 ? -1 : gradients[static_cast<size_t>(place)]; };
    entry.a_gradient = gradient_of(table.constants().a[i]);
    entry.b_gradient = gradient_of(table.constants().b[i]);
    const Tensor* const out = needs_grad[i] != 0 ? &results[next++] : nullptr;
    if (out != nullptr || entry.a_gradient >= 0 || entry.b_gradient >= 0) table.add(entry, vs[i], &grads[i], out);
  }
  if (!vs.empty()) {
    table.run(table.has_gradients() ? CompanderPass::gradient_and_sums : CompanderPass::gradient, vs[0]);
  }
  return results;
}

void to_weight_gradients_(Tensors grads, Tensors vs, Tensors constants, std::vector<double> numbers, Integers a,
                          Integers b, int64_t kind, double decay_on_w, double decay_on_v) {
  const char* const name = "to_weight_gradients_";
  PYREG_REQUIRE(grads.size() == vs.size(), name, "expected one gradient a tensor, got ", vs.size(), " vs and ",
                grads.size(), " grads");
  Table table(name, vs, {std::move(constants), std::move(numbers), std::move(a), std::move(b)}, kind);
  for (size_t i = 0; i < vs.size(); ++i) {
    const CompanderTensor entry = table.entry(vs[i], vs[0], i);
    table.check_values(entry, vs[i], i);
    table.check_partner(grads[i], vs[i], "grads", i);
    require_own_memory(grads[i], name, "grads", i);
    table.add(entry, vs[i], &grads[i], &grads[i]);
  }
  if (!vs.empty()) table.run(CompanderPass::to_weight, vs[0], decay_on_w, decay_on_v);
}

void rescale_steps_(Tensors vs, Tensors old_vs, Tensors constants, std::vector<double> numbers, Integers a, Integers b,
                    int64_t kind) {
  const char* const name = "rescale_steps_";
  PYREG_REQUIRE(old_vs.size() == vs.size(), name, "expected one old tensor a tensor, got ", vs.size(), " vs and ",
                old_vs.size(), " old_vs");
  Table table(name, vs, {std::move(constants), std::move(numbers), std::move(a), std::move(b)}, kind);
  for (size_t i = 0; i < vs.size(); ++i) {
    const CompanderTensor entry = table.entry(old_vs[i], vs[0], i);
    table.check_values(entry, old_vs[i], i);
    table.check_partner(vs[i], old_vs[i], "vs", i);
    require_own_memory(vs[i], name, "vs", i);
    table.add(entry, old_vs[i], &vs[i], &vs[i]);
  }
  if (!vs.empty()) table.run(CompanderPass::rescale, vs[0]);
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) {
  library.impl("weight_compander", TORCH_BOX(&weight_compander));
  library.impl("weight_compander_backward", TORCH_BOX(&weight_compander_backward));
  library.impl("to_weight_gradients_", TORCH_BOX(&to_weight_gradients_));
  library.impl("rescale_steps_", TORCH_BOX(&rescale_steps_));
}

}  // namespace pyreg

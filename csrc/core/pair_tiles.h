// Walks the tiles of a loss over all pairs of rows on the CPU: torch's matrix products between an operator's kernels.
// Notation: core/pairs.h.
//
// A panel is kPanelRows rows against up to kPanelColumns columns: its scores, at most 1 MB of float, are multiplied,
// read or turned into H, and multiplied again while they lie in the second-level cache. With 4096 x 512 floats on two
// cores the bare products of such panels run at 0.95 of the speed of undivided ones.
//
// Bytes beyond inputs and outputs: the rows of length 1, the sum of H z, one panel: O(N D).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "core/pairs.h"
#include "core/tensor.h"
#include "unit_rows/unit_rows.h"

namespace pyreg {

constexpr int64_t kPanelRows = 128;
constexpr int64_t kPanelColumns = 2048;

// Panels of all columns: 16 MB of float, or fewer rows, down to where products would slow down.
constexpr int64_t kMostScores = int64_t{1} << 22;
constexpr int64_t kLeastPanelRows = 32;

// As many rows as this are one panel: all their scores and their gradient are formed at once.
constexpr int64_t kOnePanelRows = 512;

struct Span {
  int64_t first, count;
  int64_t end() const { return first + count; }
};

inline Dtype accumulate(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

inline Tensor matrix_view(const Tensor& base, int64_t offset, std::array<int64_t, 2> sizes,
                          std::array<int64_t, 2> strides) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(base.get(), 2, sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// Rows [first, first + count) of a contiguous matrix, and the same transposed.
inline Tensor rows_of(const Tensor& matrix, Span span) {
  const int64_t width = matrix.size(1);
  return matrix_view(matrix, span.first * width, {span.count, width}, {width, 1});
}
inline Tensor transposed_rows_of(const Tensor& matrix, Span span) {
  const int64_t width = matrix.size(1);
  return matrix_view(matrix, span.first * width, {width, span.count}, {1, width});
}

inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
inline void add_product(const Tensor& total, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(total.get(), total.get(), a.get(), b.get(), 1, 1));
}

// The shift as the kernels subtract it: what is added to the logarithm is the same number.
inline void set_shift(PairArgs& args, double shift) {
  args.shift = args.dtype == Dtype::float64 ? shift : static_cast<double>(static_cast<float>(shift));
}

// ---- rows of length 1 ----

struct UnitRows {
  Tensor rows;  // [count, D] in the accumulation type
  std::vector<double> inverse_norm;
  std::vector<int64_t> order;  // empty: as the features lie
  bool normalize;

  UnitRows(const Tensor& features, Dtype dtype, std::vector<int64_t> ordered, bool normalize)
      : rows(empty({ordered.empty() ? features.size(0) : static_cast<int64_t>(ordered.size()), features.size(1)},
                   accumulate_type(dtype), features)),
        inverse_norm(static_cast<size_t>(rows.size(0))),
        order(std::move(ordered)),
        normalize(normalize) {
    cpu::unit_rows({dtype, features.const_data_ptr(), order_data(), rows.size(0), rows.size(1), normalize,
                    rows.mutable_data_ptr(), inverse_norm.data()});
  }

  int64_t count() const { return rows.size(0); }
  const int64_t* order_data() const { return order.empty() ? nullptr : order.data(); }

  // Writes the features' gradient, which starts with feature `first`'s, from that of the rows.
  void backward(const Tensor& grad_rows, Dtype dtype, int64_t first, Tensor& gradient) const {
    cpu::unit_rows_backward({dtype, rows.const_data_ptr(), grad_rows.const_data_ptr(), inverse_norm.data(),
                             order_data(), first, count(), rows.size(1), normalize, gradient.mutable_data_ptr()});
  }
};

inline Tensor zeros_like_rows(const UnitRows& rows) {
  Tensor total = empty({rows.count(), rows.rows.size(1)}, rows.rows.scalar_type(), rows.rows);
  torch::stable::zero_(total);
  return total;
}

// ---- arrays that passes read ----

// An array in the scores' type, readable a vector beyond its end.
template <typename Get>
std::vector<char> padded_array(Dtype dtype, int64_t count, Get&& get) {
  std::vector<char> bytes(static_cast<size_t>((count + kPairPadding) * size_of(dtype)));
  if (dtype == Dtype::float64) {
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<double*>(bytes.data())[i] = static_cast<double>(get(i));
  } else {
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(bytes.data())[i] = static_cast<float>(get(i));
  }
  return bytes;
}

// The elements of a contiguous float32 or float64 tensor.
class Numbers {
 public:
  explicit Numbers(const Tensor& tensor)
      : tensor_(tensor), data_(tensor.const_data_ptr()), is_double_(tensor.scalar_type() == ScalarType::Double) {}

  double operator[](int64_t i) const {
    return is_double_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }

 private:
  Tensor tensor_;  // which keeps the memory alive
  const void* data_;
  bool is_double_;
};

// Equal numbers for equal values, in the integer type beside the scores' (PairSide::codes).
class Codes {
 public:
  explicit Codes(std::initializer_list<std::span<const int64_t>> values) {
    for (const auto& part : values) distinct_.insert(distinct_.end(), part.begin(), part.end());
    std::sort(distinct_.begin(), distinct_.end());
    distinct_.erase(std::unique(distinct_.begin(), distinct_.end()), distinct_.end());
  }

  std::vector<char> array(Dtype dtype, std::span<const int64_t> values) const {
    std::vector<char> bytes((values.size() + kPairPadding) * static_cast<size_t>(size_of(dtype)));
    for (size_t i = 0; i < values.size(); ++i) {
      const auto code = std::lower_bound(distinct_.begin(), distinct_.end(), values[i]) - distinct_.begin();
      if (dtype == Dtype::float64) {
        reinterpret_cast<int64_t*>(bytes.data())[i] = code;
      } else {
        reinterpret_cast<int32_t*>(bytes.data())[i] = static_cast<int32_t>(code);
      }
    }
    return bytes;
  }

 private:
  std::vector<int64_t> distinct_;
};

struct PairSumsMemory {
  std::vector<double> maximum, sum, positive_sum;
  std::vector<int64_t> positives, negatives;

  explicit PairSumsMemory(int64_t count)
      : maximum(static_cast<size_t>(count), -std::numeric_limits<double>::infinity()),
        sum(maximum.size()),
        positive_sum(maximum.size()),
        positives(maximum.size()),
        negatives(maximum.size()) {}

  PairSums pointers() { return {maximum.data(), sum.data(), positive_sum.data(), positives.data(), negatives.data()}; }
};

// What the gradient pass takes of rows whose statistics are known: lse and the weights of the two terms.
class PairWeights {
 public:
  PairWeights(Dtype dtype, int64_t count)
      : dtype_(dtype), lse(bytes(count)), exp_weight(bytes(count)), positive_weight(bytes(count)) {}

  // statistics(field, i) and upstream(i) are of the i-th row in the tiles' order.
  template <typename Statistics, typename Upstream>
  void fill(const PairArgs& args, Span rows, Statistics&& statistics, Upstream&& upstream) {
    for (int64_t i = rows.first; i < rows.end(); ++i) {
      const double log_sum = statistics(0, i), alpha = statistics(1, i);
      const double scale = upstream(i) * args.scale;
      // A row without a loss has no exponential: nothing that could overflow.
      set(lse, i, alpha == 0 ? 1e30 : log_sum);
      set(exp_weight, i, alpha == 0 ? 0 : scale * alpha * (args.is_bounded ? std::exp(args.shift - log_sum) : 1));
      set(positive_weight, i, scale * statistics(2, i));
    }
  }

  void set(PairSide& side) const {
    side.lse = lse.data();
    side.exp_weight = exp_weight.data();
    side.positive_weight = positive_weight.data();
  }

 private:
  std::vector<char> bytes(int64_t count) const {
    return std::vector<char>(static_cast<size_t>((count + kPairPadding) * size_of(dtype_)));
  }
  void set(std::vector<char>& array, int64_t i, double value) const {
    if (dtype_ == Dtype::float64) {
      reinterpret_cast<double*>(array.data())[i] = value;
    } else {
      reinterpret_cast<float*>(array.data())[i] = static_cast<float>(value);
    }
  }

  Dtype dtype_;
  std::vector<char> lse, exp_weight, positive_weight;
};

// ---- the walk ----

inline bool is_one_panel(int64_t rows, int64_t columns) { return rows <= kOnePanelRows && columns <= kOnePanelRows; }

struct PanelMemory {
  Tensor scores, workspace;
  int64_t stride;
  int64_t panel_rows, panel_columns;

  // `has_whole_rows`: panels hold all columns.
  PanelMemory(const PairArgs& args, int64_t rows, int64_t columns, const Tensor& like, bool has_whole_rows = false)
      : scores(like), workspace(like) {
    const bool is_one = is_one_panel(rows, columns);
    const int64_t fitting =
        has_whole_rows ? std::clamp(kMostScores / columns, kLeastPanelRows, kPanelRows) : kPanelRows;
    panel_rows = is_one ? rows : std::min(rows, fitting);
    panel_columns = is_one || has_whole_rows ? columns : std::min(columns, kPanelColumns);
    stride = (panel_columns + 15) / 16 * 16 + kPairPadding;
    scores = empty({panel_rows * stride}, accumulate_type(args.dtype), like);
    workspace = empty({pair_workspace_bytes(panel_rows, panel_columns) / 8}, ScalarType::Double, like);
  }
};

// Calls visit() for every panel, with its place in args. `columns_for(rows)` gives the columns, as spans, that may hold
// pairs of some rows; the others are passed over.
template <typename ColumnsFor, typename Visit>
void for_each_panel(PairArgs& args, const PanelMemory& memory, int64_t rows, ColumnsFor&& columns_for, Visit&& visit) {
  for (int64_t first = 0; first < rows; first += memory.panel_rows) {
    args.first_row = first;
    args.rows = std::min(memory.panel_rows, rows - first);
    for (const Span& span : columns_for(Span{args.first_row, args.rows})) {
      for (int64_t begin = span.first; begin < span.end(); begin += memory.panel_columns) {
        args.first_column = begin;
        args.columns = std::min(memory.panel_columns, span.end() - begin);
        visit();
      }
    }
  }
}

// All pairs, or those on and above the diagonal.
inline auto dense_columns(const PairArgs& args, int64_t columns) {
  return [is_upper = args.is_upper, columns](Span rows) {
    const int64_t first = is_upper ? rows.first : 0;
    return std::array{Span{first, columns - first}};
  };
}

inline Tensor scores_view(const PairArgs& args, const PanelMemory& memory, int64_t from = 0) {
  return matrix_view(memory.scores, from, {args.rows, args.columns - from}, {memory.stride, 1});
}

inline void multiply_panel(const PairArgs& args, const PanelMemory& memory, const UnitRows& rows,
                           const UnitRows& columns) {
  multiply(scores_view(args, memory), rows_of(rows.rows, {args.first_row, args.rows}),
           transposed_rows_of(columns.rows, {args.first_column, args.columns}));
}

inline void set_memory(PairArgs& args, PanelMemory& memory) {
  args.scores = memory.scores.mutable_data_ptr();
  args.scores_stride = memory.stride;
  args.workspace = memory.workspace.mutable_data_ptr();
}

template <typename Kernel, typename ColumnsFor>
void pair_statistics(PairArgs& args, PanelMemory& memory, const UnitRows& rows, const UnitRows& columns,
                     Kernel&& kernel, ColumnsFor&& columns_for) {
  set_memory(args, memory);
  for_each_panel(args, memory, rows.count(), columns_for, [&] {
    multiply_panel(args, memory, rows, columns);
    kernel(args);
  });
}

// Adds H z to the totals of the rows and of the columns; null where not needed. Where is_upper both are the same
// tensor.
inline void add_gradient_of_panel(const PairArgs& args, const PanelMemory& memory, const UnitRows& rows,
                                  const UnitRows& columns, const Tensor* row_total, const Tensor* column_total) {
  const Span row_span{args.first_row, args.rows}, column_span{args.first_column, args.columns};
  if (row_total != nullptr) {
    add_product(rows_of(*row_total, row_span), scores_view(args, memory), rows_of(columns.rows, column_span));
  }
  // The square on the diagonal holds both triangles: it has gone to its rows.
  const int64_t from = args.is_upper && args.first_column == args.first_row ? std::min(args.rows, args.columns) : 0;
  if (column_total == nullptr || from == args.columns) return;
  const Span rest{args.first_column + from, args.columns - from};
  const Tensor transposed = matrix_view(memory.scores, from, {rest.count, args.rows}, {1, memory.stride});
  add_product(rows_of(*column_total, rest), transposed, rows_of(rows.rows, row_span));
}

template <typename Kernel, typename ColumnsFor>
void pair_gradient(PairArgs& args, PanelMemory& memory, const UnitRows& rows, const UnitRows& columns,
                   const Tensor* row_total, const Tensor* column_total, Kernel&& kernel, ColumnsFor&& columns_for) {
  set_memory(args, memory);
  for_each_panel(args, memory, rows.count(), columns_for, [&] {
    multiply_panel(args, memory, rows, columns);
    kernel(args);
    add_gradient_of_panel(args, memory, rows, columns, row_total, column_total);
  });
}

// ---- results ----

// A tensor with elements get(i) in the order of its memory.
template <typename Get>
Tensor tensor_of(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like, Get&& get) {
  Tensor result = empty(sizes, type, like);
  const int64_t count = result.numel();
  void* const data = result.mutable_data_ptr();
  dispatch_dtype(dtype_of(type, "pairs"), [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    for (int64_t i = 0; i < count; ++i) {
      static_cast<Storage*>(data)[i] = narrow<Storage>(static_cast<Accumulate<Storage>>(get(i)));
    }
  });
  return result;
}

// [3, rows] in the accumulation dtype.
inline Tensor statistics_of(const std::vector<PairRow>& rows, ScalarType type, const Tensor& like) {
  const auto count = static_cast<int64_t>(rows.size());
  return tensor_of({3, count}, type, like, [&](int64_t i) { return rows[i % count].statistic(i / count); });
}

enum class Reduction : int64_t { none, mean, sum };

inline Reduction reduction_of(int64_t code, const char* operator_name) {
  PYREG_REQUIRE(code >= 0 && code <= 2, operator_name, "expected reduction 0 (none), 1 (mean) or 2 (sum), got ", code);
  return static_cast<Reduction>(code);
}

// The rows' losses, or their sum, over `divisor` for the mean.
inline Tensor reduce_losses(const std::vector<double>& losses, Reduction reduction, double divisor, ScalarType type,
                            const Tensor& like) {
  if (reduction == Reduction::none) {
    const auto count = static_cast<int64_t>(losses.size());
    return tensor_of({count}, type, like, [&](int64_t i) { return losses[i]; });
  }
  const double sum = std::accumulate(losses.begin(), losses.end(), 0.0);
  const double loss = reduction == Reduction::mean ? sum / divisor : sum;
  return tensor_of({}, type, like, [&](int64_t) { return loss; });
}

}  // namespace pyreg

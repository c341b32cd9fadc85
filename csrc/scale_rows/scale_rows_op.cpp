// scale_rows_: tensors in, tensors out. Compiled once for the CPU and once for CUDA.
#include "core/tensor.h"
#include "scale_rows/scale_rows.h"

namespace pyreg {

namespace {

void scale_rows_(Tensor rows, Tensor factor) {
  constexpr const char* kName = "scale_rows_";
  PYREG_REQUIRE(rows.dim() >= 1 && rows.is_contiguous(), kName, "expected contiguous rows [N, ...]");
  ScaleRowsArgs args{};
  args.dtype = dtype_of(rows.scalar_type(), kName);
  args.factor_dtype = dtype_of(factor.scalar_type(), kName);
  args.count = rows.size(0);
  if (args.count == 0) return;
  args.width = rows.numel() / args.count;
  args.shared = factor.dim() == 0;
  PYREG_REQUIRE(args.shared || (factor.dim() == 1 && factor.size(0) == args.count), kName,
                "expected factor of shape [] or [", args.count, "]");
  const Tensor factors = as_contiguous(factor);
  args.rows = rows.mutable_data_ptr();
  args.factor = factors.const_data_ptr();
  const Launch launch(rows);
  args.stream = launch.stream;
  PYREG_DEVICE::scale_rows(args);
}

}  // namespace

PYREG_IMPLEMENT(PYREG_LIBRARY, PYREG_DISPATCH_KEY, library) { library.impl("scale_rows_", TORCH_BOX(&scale_rows_)); }

}  // namespace pyreg

// rows[i, :] *= factor[i], or all of rows *= factor, in place: the upstream gradient's share in a gradient that was
// formed during the forward pass. A factor of 1, which loss.backward() passes, is found by the kernel, so that it costs
// neither a pass over memory nor a wait for the GPU.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace pyreg {

struct ScaleRowsArgs {
  Dtype dtype;  // of rows
  Dtype factor_dtype;
  void* rows;  // [count, width], overwritten
  int64_t count, width;
  const void* factor;  // [count], or [] if shared
  bool shared;
  void* stream;
};

PYREG_DECLARE_KERNEL(scale_rows, ScaleRowsArgs)

}  // namespace pyreg

#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace pyreg {

void parallel_for_raw(int64_t count, int64_t grain, ParallelBody body, void* context) {
  if (count <= 0) return;
  if (count <= grain) return body(0, count, context);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace pyreg

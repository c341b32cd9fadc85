// Calls Sinkhorn's CUDA kernels with each way to use the device forced. All arrays are as in SinkhornArgs.
#include <algorithm>
#include <memory>

#include "exported.h"
#include "sinkhorn/sinkhorn.h"

using namespace pyreg;

PYREG_EXPORT const char* run_sinkhorn(SinkhornArgs* args) {
  return error_of([&] {
    // Of exactly the size asked for, and never written: a read before a write, or beyond the end, shows.
    const int64_t bytes = cuda::sinkhorn_workspace(*args);
    const std::unique_ptr<char[]> workspace(new char[bytes]);
    std::fill_n(workspace.get(), bytes, '\xff');
    args->workspace = workspace.get();
    cuda::sinkhorn(*args);
  });
}

// By which one tells what way has been chosen.
PYREG_EXPORT int64_t sinkhorn_workspace_bytes(SinkhornArgs* args) { return cuda::sinkhorn_workspace(*args); }

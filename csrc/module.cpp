// The extension modules: pyreg._C (schemas, CPU kernels) and pyreg._C_cuda (CUDA kernels). Importing one registers its
// operators; build_info() tells what it was built from and for.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#if !defined(PYREG_WITH_CUDA)
#include "core/huge_pages.h"
#include "core/isa.h"
#endif

#define PYREG_STRING_OF(x) #x
#define PYREG_STRING(x) PYREG_STRING_OF(x)

PYBIND11_MODULE(PYREG_MODULE_NAME, module) {
  module.doc() = "Registers pyreg's operators with torch; see build_info().";
  module.def("build_info", [] {
    pybind11::dict info;
    info["version"] = PYREG_VERSION;
    info["torch_headers"] = TORCH_VERSION;
    info["oldest_torch"] = PYREG_OLDEST_TORCH;
    info["compiler"] = __VERSION__;
#if defined(PYREG_WITH_CUDA)
    info["cuda"] = PYREG_CUDA_VERSION;
    info["architectures"] = PYREG_CUDA_ARCHITECTURES;
#else
    info["isa"] = pyreg::isa_name(pyreg::selected_isa());
#endif
    return info;
  });
#if !defined(PYREG_WITH_CUDA)
  module.def("advise_huge_pages", [](uintptr_t address, size_t bytes) {
    pyreg::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
#endif
}

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
#define PYREG_ENTRY(key, value) "\"" key "\": \"" value "\""

namespace {

// JSON behind a mark by which pyreg/_extension.py finds it in a file that does not load.
constexpr char kMark[] = "pyreg build: ";
constexpr char kBuild[] = "pyreg build: {" PYREG_ENTRY("version", PYREG_VERSION) ", " PYREG_ENTRY(
    "torch_headers",
    TORCH_VERSION) ", " PYREG_ENTRY("oldest_torch",
                                    PYREG_OLDEST_TORCH) ", " PYREG_ENTRY("python",
                                                                         PYREG_STRING(PY_MAJOR_VERSION) "." PYREG_STRING(
                                                                             PY_MINOR_VERSION)) ", "
#if defined(PYREG_WITH_CUDA)
    PYREG_ENTRY("cuda", PYREG_CUDA_VERSION) ", " PYREG_ENTRY("architectures", PYREG_CUDA_ARCHITECTURES) ", "
#endif
    PYREG_ENTRY("compiler", __VERSION__) "}";

pybind11::dict build_info() {
  pybind11::dict info = pybind11::module_::import("json").attr("loads")(kBuild + sizeof kMark - 1);
#if !defined(PYREG_WITH_CUDA)
  info["isa"] = pyreg::isa_name(pyreg::selected_isa());
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(PYREG_MODULE_NAME, module) {
  module.doc() = "Registers pyreg's operators with torch; see build_info().";
  module.def("build_info", &build_info, "What the module was built from and for.");
#if !defined(PYREG_WITH_CUDA)
  module.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { pyreg::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Asks for 2 MB pages at an address, for so many bytes.");
#endif
}

// The extension modules: pyreg._C (schemas, CPU kernels) and pyreg._C_cuda (CUDA kernels). Importing one registers its
// operators; build_info() tells what it was built from and for.
//
// Written for Python's limited API, as the operators are for torch's stable one: one binary for every Python >= 3.10.
#include <Python.h>
#include <torch/headeronly/version.h>

#if !defined(PYREG_WITH_CUDA)
#include "core/huge_pages.h"
#include "core/isa.h"
#endif

#define PYREG_STRING_OF(x) #x
#define PYREG_STRING(x) PYREG_STRING_OF(x)
#define PYREG_CONCATENATED_TWICE(a, b) a##b
#define PYREG_CONCATENATED(a, b) PYREG_CONCATENATED_TWICE(a, b)
#define PYREG_ENTRY(key, value) "\"" key "\": \"" value "\""

namespace {

// JSON behind a mark by which pyreg/_extension.py finds it in a file that does not load.
constexpr char kMark[] = "pyreg build: ";
constexpr char kBuild[] = "pyreg build: {" PYREG_ENTRY("version", PYREG_VERSION) ", " PYREG_ENTRY(
    "torch_headers", TORCH_VERSION) ", " PYREG_ENTRY("oldest_torch", PYREG_OLDEST_TORCH) ", "
#if defined(Py_LIMITED_API)
    PYREG_ENTRY("python", ">=3.10") ", "
#else
    PYREG_ENTRY("python", PYREG_STRING(PY_MAJOR_VERSION) "." PYREG_STRING(PY_MINOR_VERSION)) ", "
#endif
#if defined(PYREG_WITH_CUDA)
    PYREG_ENTRY("cuda", PYREG_CUDA_VERSION) ", " PYREG_ENTRY("architectures", PYREG_CUDA_ARCHITECTURES) ", "
#endif
    PYREG_ENTRY("compiler", __VERSION__) "}";

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* json = PyImport_ImportModule("json");
  if (json == nullptr) return nullptr;
  PyObject* info = PyObject_CallMethod(json, "loads", "s", kBuild + sizeof kMark - 1);
  Py_DECREF(json);
#if !defined(PYREG_WITH_CUDA)
  if (info == nullptr) return nullptr;
  PyObject* isa = PyUnicode_FromString(pyreg::isa_name(pyreg::selected_isa()));
  if (isa == nullptr || PyDict_SetItemString(info, "isa", isa) < 0) Py_CLEAR(info);
  Py_XDECREF(isa);
#endif
  return info;
}

#if !defined(PYREG_WITH_CUDA)
PyObject* advise_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address = 0, bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
  pyreg::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  Py_RETURN_NONE;
}
#endif

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What the module was built from and for."},
#if !defined(PYREG_WITH_CUDA)
    {"advise_huge_pages", advise_huge_pages, METH_VARARGS, "Asks for 2 MB pages at an address, for so many bytes."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          PYREG_STRING(PYREG_MODULE_NAME),
                          "Registers pyreg's operators with torch; see build_info().",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PYREG_CONCATENATED(PyInit_, PYREG_MODULE_NAME)() { return PyModule_Create(&definition); }

"""The project's operators with their CUDA kernels on the emulation, as `torch.ops.pyreg_cuda_on_cpu`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tests.cuda_on_cpu.emulation import build_library

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = (
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPYREG_LIBRARY=pyreg_cuda_on_cpu",
    "-DPYREG_DISPATCH_KEY=CPU",
    "-DPYREG_DEVICE=cuda",
)


def load_operators() -> list[str]:
    """Builds and loads them; returns the names of those that have a kernel in C++."""
    kernels = sorted(CSRC.glob("*/*_cuda.cu"))  # other operators have none in CUDA C++
    sources = [CSRC / "schemas.cpp", *(path.with_name(f"{path.parent.name}_op.cpp") for path in kernels), *kernels]
    torch.ops.load_library(str(build_library("pyreg_cuda_on_cpu", sources, FLAGS)))
    names = re.findall(r'"(\w+)\(', (CSRC / "schemas.cpp").read_text())
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in names if has_kernel(f"pyreg_cuda_on_cpu::{name}", "CPU")]

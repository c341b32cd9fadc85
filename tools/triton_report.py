"""Compiles the Triton kernels ahead of time, without a GPU, and reports them; fails if one spills.

A file `triton_kernels/<op>.py` lists what is to be compiled:

    AHEAD_OF_TIME = [
        (kernel, {"X_ptr": "*bf16", "n_cols": "i32", "BLOCK_SIZE": "constexpr"}, {"BLOCK_SIZE": 128}, {"num_warps": 4}),
    ]

a kernel, its signature, the values of its constants, and the options of its launch.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ptxas

KERNELS = Path(__file__).parents[1] / "triton_kernels"
ARCHITECTURES = (80, 90, 100, 120)
MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async\.sync|tcgen05\.mma|mma\.sync)\.[\w:.]+")

Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def compile_ahead(variant: Variant, architecture: int) -> tuple[ptxas.Usage, Counter[str]]:
    """What ptxas says of one variant, and the matrix instructions in its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    kernel, signature, constants, options = variant
    source = triton.compiler.ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError(f"the PTX of {kernel.__name__} names no target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        output = str(path.with_suffix(".cubin"))
        command = [get_ptxas(architecture).path, "-v", f"-arch={target[1]}", str(path), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"ptxas does not take the PTX of {kernel.__name__}:\n{done.stderr}")
    (usage,) = ptxas.parse(done.stderr)
    settings = ", ".join(f"{name}={value}" for name, value in (constants | options).items())
    usage.kernel = f"{usage.kernel}<{settings}>"
    usage.architecture = f"sm_{architecture}"
    usage.shared = compiled.metadata.shared  # dynamic: ptxas does not see it
    return usage, Counter(match[0] for match in MATRIX_INSTRUCTION.finditer(ptx))


def main() -> None:
    wanted = sys.argv[1:]
    files = sorted(path for path in KERNELS.glob("*.py") if not path.name.startswith("_"))
    if not files:
        print("no Triton kernels")
        return
    usages = []
    for path in files:
        variants: list[Variant] = importlib.import_module(f"pyreg.triton_kernels.{path.stem}").AHEAD_OF_TIME
        for variant in variants:
            for architecture in ARCHITECTURES:
                usage, instructions = compile_ahead(variant, architecture)
                usages.append(usage)
                matrix = ", ".join(f"{count} x {name}" for name, count in instructions.items()) or "none"
                print(f"{usage.kernel} on {usage.architecture}: matrix instructions: {matrix}")
    shown = [usage for usage in usages if not wanted or any(word in usage.kernel for word in wanted)]
    sys.exit(ptxas.report("Triton", shown))


if __name__ == "__main__":
    main()

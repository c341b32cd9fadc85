"""Compiles the Triton kernels ahead of time, without a GPU, and reports them.

Fails if one spills, needs more shared memory than its architecture has, or does without matrix instructions a product
for which there are some. A file `triton_kernels/<op>.py` names what is to be compiled:

    AHEAD_OF_TIME = {
        "op bf16": (
            kernel, {"X_ptr": "*bf16:16", "n_cols": "i32"}, {"BLOCK_SIZE": 128}, {"num_warps": 4}, (80, 90),
        ),
    }

a kernel, the types of its parameters (":16" where a pointer or a number is a multiple of 16), the values of its
constants, the options of its launch, and the architectures that run it so. Types of what is no parameter, or constant,
are passed over.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ptxas

KERNELS = Path(__file__).parents[1] / "triton_kernels"
# Shared memory that a block may have, and the matrix instruction; sm_120 has that of sm_80.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
MATRIX_INSTRUCTIONS = re.compile(r"\b(?:wgmma\.mma_async\.sync|tcgen05\.mma|mma\.sync)\.[\w:.]+")
# A product in Triton's first form that matrix instructions serve: of 16-bit operands, or of float32 ones as TF32.
MATRIX_PRODUCT = re.compile(r"tt\.dot .*(?:xbf16>|xf16>|inputPrecision = tf32)")

Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[int, ...]]


def compile_ahead(name: str, variant: Variant, architecture: int) -> tuple[ptxas.Usage, str]:
    """What ptxas says of one variant, and the matrix instructions in its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    kernel, types, constants, options, _ = variant
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {parameter: types[parameter].removesuffix(":16") for parameter in kernel.arg_names}
    multiples = {
        (i,): [["tt.divisibility", 16]] for i, parameter in enumerate(signature) if types[parameter].endswith(":16")
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError(f"the PTX of {name} names no target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        output = str(path.with_suffix(".cubin"))
        command = [get_ptxas(architecture).path, "-v", f"-arch={target[1]}", str(path), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"ptxas does not take the PTX of {name}:\n{done.stderr}")
    (usage,) = ptxas.parse(done.stderr)
    usage.kernel = name
    usage.architecture = f"sm_{architecture}"
    usage.shared = compiled.metadata.shared  # dynamic: ptxas does not see it
    instructions = Counter(match[0] for match in MATRIX_INSTRUCTIONS.finditer(ptx))
    if MATRIX_PRODUCT.search(compiled.asm["ttir"]):
        expected = MATRIX_INSTRUCTION[architecture]
        if not any(instruction.startswith(expected) for instruction in instructions):
            raise ValueError(f"{name} on sm_{architecture} multiplies without {expected}")
    if usage.shared > SHARED_MEMORY[architecture]:
        raise ValueError(f"{name} needs {usage.shared} bytes of shared memory, more than sm_{architecture} has")
    return usage, ", ".join(f"{count} x {instruction}" for instruction, count in instructions.items()) or "none"


def variants_of(file: str) -> dict[str, Variant]:
    return importlib.import_module(f"pyreg.triton_kernels.{file}").AHEAD_OF_TIME  # type: ignore[no-any-return]


def compile_named(job: tuple[str, str, int]) -> tuple[ptxas.Usage, str]:
    file, name, architecture = job
    return compile_ahead(name, variants_of(file)[name], architecture)


def main() -> None:
    wanted = sys.argv[1:]
    files = sorted(path.stem for path in KERNELS.glob("*.py") if not path.name.startswith("_"))
    jobs = [
        (file, name, architecture)
        for file in files
        for name, variant in variants_of(file).items()
        if not wanted or any(word in name for word in wanted)
        for architecture in variant[-1]
    ]
    if not jobs:
        print("no Triton kernels")
        return
    usages = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for usage, instructions in pool.map(compile_named, jobs):
            usages.append(usage)
            print(f"{usage.kernel} on {usage.architecture}: matrix instructions: {instructions}", flush=True)
    sys.exit(ptxas.report("Triton", usages))


if __name__ == "__main__":
    main()

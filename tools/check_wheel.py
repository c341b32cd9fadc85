"""Checks a wheel before it is handed out, and prints what is in it.

    python tools/check_wheel.py WHEEL

Its tag: this Python's, and a manylinux tag. Its extensions: no C++ symbol of torch, no symbol table.
Its CUDA kernels, where it has some: machine code for every architecture that the module names, and PTX of the last.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import symbols
from triton import knobs

PYTHON = "cp{}{}".format(*sys.version_info)
TAG = re.compile(rf"-{PYTHON}-{PYTHON}t?-manylinux_2_\d+_(?:x86_64|aarch64)\.whl$")
# To be had by everybody: a package index's limit for one file.
MOST_BYTES = 100 << 20


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"check_wheel: {message}")


def listed(library: Path, kind: str) -> set[int]:
    """The architectures for which a library has machine code ("elf") or PTX ("ptx")."""
    command = [knobs.nvidia.cuobjdump.path, f"--list-{kind}", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {int(number) for number in re.findall(r"\.sm_(\d+)[a-z]?\.(?:cubin|ptx)", done.stdout)}


def named_architectures(library: Path) -> list[int]:
    found = re.search(rb'"architectures": "([\d,]+)"', library.read_bytes())
    check(found is not None, f"{library.name} names no architectures")
    return [int(number) for number in found[1].split(b",")]  # type: ignore[index]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: check_wheel.py WHEEL (clear dist of older ones)")
    wheel = Path(sys.argv[1])
    check(TAG.search(wheel.name) is not None, f"the tag of {wheel.name} is not {PYTHON}-{PYTHON}-manylinux_2_*")
    check(wheel.stat().st_size < MOST_BYTES, f"{wheel.name} is larger than {MOST_BYTES >> 20} MiB")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            library = Path(archive.extract(name, folder))
            check(
                re.fullmatch(r"pyreg/_C(?:_cuda)?\.cpython-[\w-]+\.so", name) is not None, f"unexpected library {name}"
            )
            check(not symbols.unstable_symbols(library), f"{name} needs C++ symbols of torch")
            check(not symbols.has_symbol_table(library), f"{name} is not stripped")
            print(f"{name}: {library.stat().st_size / 2**20:.1f} MiB")
            if library.name.startswith("_C_cuda"):
                wanted = named_architectures(library)
                check(listed(library, "elf") == set(wanted), f"{name} has machine code for {listed(library, 'elf')}")
                check(listed(library, "ptx") == {wanted[-1]}, f"{name} has PTX of {listed(library, 'ptx')}")
                print(f"  machine code for {', '.join(f'sm_{number}' for number in wanted)}; PTX of sm_{wanted[-1]}")


if __name__ == "__main__":
    main()

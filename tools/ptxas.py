"""What ptxas says of compiled kernels, as a table: registers, shared memory, stack and spills."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

KERNEL = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<architecture>[^']+)'")
STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<shared>\d+) bytes smem")


@dataclass
class Usage:
    """One kernel on one architecture; bytes of static shared memory, stack frame, spill stores and loads."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


def parse(log: str) -> list[Usage]:
    """Reads `ptxas -v`. A device function that was not inlined reports no registers, and counts with its kernels."""
    usages = []
    kernel: re.Match[str] | None = None
    stack = spills = 0
    for line in log.splitlines():
        if match := KERNEL.search(line):
            if kernel is not None:
                raise ValueError(f"ptxas: no registers reported for {kernel['name']}, {kernel['architecture']}")
            kernel, stack, spills = match, 0, 0
        elif match := STACK.search(line):
            stack += int(match["stack"])
            spills += int(match["stores"]) + int(match["loads"])
        elif match := USED.search(line):
            if kernel is None:
                raise ValueError(f"ptxas: registers of an unknown kernel: {line.strip()}")
            shared = SHARED.search(line)
            registers, shared_bytes = int(match["registers"]), int(shared["shared"]) if shared else 0
            usages.append(Usage(kernel["name"], kernel["architecture"], registers, shared_bytes, stack, spills))
            kernel = None
    if kernel is not None:
        raise ValueError(f"ptxas: no registers reported for {kernel['name']}, {kernel['architecture']}")
    return usages


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Demangled, without parameters, namespaces of ours, and enumerations' casts."""
    names = list(dict.fromkeys(mangled))
    done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _shorten(full) for name, full in zip(names, done.stdout.splitlines(), strict=True)}


def _shorten(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w*?::|_NV_ANON_NAMESPACE::", "", name)
    name = re.sub(r"\b(pyreg|cuda)::", "", name)
    return re.sub(r"\((?:[\w:]+|unsigned \w+)\)(-?\d+)", r"\1", name).removeprefix("void ")


def show(console: Console, title: str, usages: list[Usage]) -> None:
    """One row a kernel. A cell holds one number where all architectures agree, else one for each, in order."""
    architectures = sorted({usage.architecture for usage in usages}, key=lambda name: int(re.sub(r"\D", "", name)))
    names = short_names(usage.kernel for usage in usages)
    table = Table(title=f"{title}: {len(names)} kernels for {', '.join(architectures)}", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for column in ("registers", "shared", "stack", "spills"):
        table.add_column(column, justify="right", no_wrap=True)
    for kernel in sorted(names, key=names.__getitem__):
        of = {usage.architecture: usage for usage in usages if usage.kernel == kernel}
        cells = []
        for column in ("registers", "shared", "stack", "spills"):
            values = [str(getattr(of[name], column)) if name in of else "-" for name in architectures]
            cells.append(values[0] if len(set(values)) == 1 else " ".join(values))
        table.add_row(names[kernel], *cells, style="red" if any(usage.spills for usage in of.values()) else None)
    console.print(table)


def report(title: str, usages: list[Usage]) -> int:
    """Prints the table and returns the exit status: 1 if a kernel spills registers."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log has no width; 80 columns would fold the names
    show(console, title, usages)
    spilling = [usage for usage in usages if usage.spills]
    for usage in spilling:
        name = short_names([usage.kernel])[usage.kernel]
        console.print(f"{name} spills {usage.spills} bytes on {usage.architecture}", style="red", markup=False)
    return 1 if spilling else 0

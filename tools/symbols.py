"""What compiled files define and ask for.

    python tools/symbols.py FILE.so...

fails if an extension needs a C++ symbol of torch, whose C++ interface changes with every release; the stable ABI is
plain C. Any C++ symbol but those of the C++ runtime counts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# The C++ runtime: versioned names, and names in namespace std, which torch's libraries may hold a copy of.
RUNTIME = re.compile(r"@(?:GLIBCXX|CXXABI|GCC)_|^_ZN?[KVRO]*S[tabsiod]")
TORCH = re.compile(r"\b(?:at|c10|torch|caffe2)::")


def unstable_symbols(library: Path) -> list[str]:
    """C++ symbols that a shared library needs and that do not come from the C++ runtime."""
    needed = [line.split()[-1] for line in _nm("--dynamic", "--undefined-only", library)]
    readable = _demangle([name for name in needed if name.startswith("_Z")])
    return [text for name, text in readable.items() if not RUNTIME.search(name) or TORCH.search(text)]


def shared_definitions(compiled: Path, isa: str) -> list[str]:
    """Symbols of an object that the linker may merge with another object's, though they hold code for `isa`.

    Names that mention the namespace of the instruction set belong to it alone; see csrc/core/isa.h.
    """
    entries = (line.split() for line in _nm("--defined-only", compiled))
    mergeable = [name for _, kind, name in entries if kind in "WVu" and not name.startswith("DW.ref.")]
    return list(_demangle([name for name in mergeable if f"{len(isa)}{isa}" not in name]).values())


def has_symbol_table(library: Path) -> bool:
    """Whether a library still holds the names that only a debugger needs."""
    return bool(_nm("--no-sort", library))


def _nm(*arguments: str | Path) -> list[str]:
    command = ["nm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _demangle(names: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: symbols.py FILE.so...")
    found = {path: names for path in sys.argv[1:] if (names := unstable_symbols(Path(path)))}
    for path, names in found.items():
        print(f"{path} needs C++ symbols of torch:", *names, sep="\n  ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

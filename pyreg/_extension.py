"""The compiled parts: which were built, which are loaded, and why not.

Three states differ: *not built*, *failed to load*, and *not needed here* (CUDA kernels where torch has no CUDA).
A part that failed keeps its error, which the first operator that needs it raises; importing pyreg never does.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import platform
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from pyreg import __version__, _requirements

_REMEDY = (
    "reinstall pyreg's wheel, or build it with: pip install --no-build-isolation . "
    f"(in pyreg's sources, with torch >= {'.'.join(map(str, _requirements.OLDEST_TORCH))}, a C++20 compiler"
)
_MARK = b"pyreg build: "  # csrc/module.cpp


@dataclass(frozen=True)
class Extension:
    """One compiled module of pyreg."""

    name: str
    state: str
    build_info: dict[str, Any]
    error: ImportError | None = None
    reason: str | None = None  # why it is not needed here
    file: Path | None = None
    missing_operators: list[str] = field(default_factory=list)

    def raise_error(self, *_: Any, **__: Any) -> NoReturn:
        """Raises why the module is not there."""
        if self.error is None:
            raise RuntimeError(f"{self.name} is loaded")
        raise ImportError(*self.error.args) from self.error.__cause__


def remedy(name: str) -> str:
    """What to do where the module is missing or broken."""
    return _REMEDY + (" and nvcc >= 12.8)" if name.endswith("_cuda") else ")")


def reason_of(error: ImportError) -> str:
    """What is wrong, without what to do."""
    return str(error).partition(" Remedy: ")[0]


def _find(name: str) -> Path | None:
    """The file that Python loads as this module, or else one that another Python would load."""
    spec = importlib.util.find_spec(name)  # an editable installation keeps it elsewhere
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    package, _, stem = name.rpartition(".")
    folders = importlib.import_module(package).__path__
    return next((path for folder in folders for path in sorted(Path(folder).glob(f"{stem}.*.so"))), None)


def read_build_info(file: Path) -> dict[str, Any]:
    """What a file says of its build without being loaded; empty where it says nothing."""
    content = file.read_bytes()
    start = content.find(_MARK + b"{")
    if start < 0:
        return {}
    try:
        found = json.loads(content[start + len(_MARK) : content.index(b"\0", start)])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_cut_off(file: Path) -> bool:
    """Whether a 64-bit ELF file ends before what it says is to be loaded. The loader of such a file dies of it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = opened.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return False
        if len(header) < 64:
            return True
        (table,) = struct.unpack_from("<Q", header, 32)
        entry, count = struct.unpack_from("<HH", header, 54)
        opened.seek(table)
        segments = opened.read(entry * count)
    if len(segments) < entry * count:
        return True
    ranges = (struct.unpack_from("<8xQ16xQ", segments, entry * i) for i in range(count))  # offset, length in the file
    return any(offset + length > size for offset, length in ranges)


def _built_for(info: dict[str, Any]) -> str:
    if not info:
        return "The file does not say what it was built for"
    parts = [
        f"pyreg {info.get('version')}",
        f"Python {info.get('python')}",
        f"torch >= {info.get('oldest_torch')} (headers of {info.get('torch_headers')})",
    ]
    if "cuda" in info:
        parts.append(f"CUDA {info['cuda']}")
    return f"It was built for {', '.join(parts)}"


def _failed(name: str, file: Path, reason: str, cause: Exception | None = None) -> Extension:
    info = read_build_info(file)
    cuda = "" if torch.version.cuda is None else f" (CUDA {torch.version.cuda})"
    found = f"pyreg {__version__}, Python {platform.python_version()}, torch {torch.__version__}{cuda}"
    error = ImportError(
        f"{name} was built, but {reason}. {_built_for(info)}; found here: {found}, {platform.machine()}. "
        f"Remedy: {remedy(name)}"
    )
    error.__cause__ = cause
    return Extension(name, "failed to load", info, error, file=file)


def _load(name: str, not_needed: str | None = None) -> Extension:
    file = _find(name)
    if not_needed is not None:
        return Extension(name, "not built" if file is None else "not needed here", {}, reason=not_needed, file=file)
    if file is None:
        return Extension(name, "not built", {}, ImportError(f"{name} was not built. Remedy: {remedy(name)}"))
    stem, suffixes = name.rpartition(".")[2], importlib.machinery.EXTENSION_SUFFIXES
    if file.name not in [stem + suffix for suffix in suffixes]:
        taken = " or ".join(stem + suffix for suffix in suffixes)
        return _failed(name, file, f"for another Python: there is {file.name}, and this Python loads {taken}")
    if _is_cut_off(file):
        return _failed(name, file, f"its file is incomplete: {file}")
    try:
        info = importlib.import_module(name).build_info()
    except Exception as error:  # whatever is wrong with it, the rest of pyreg can be imported
        return _failed(name, file, f"it does not load: {error}", error)
    if info.get("version") != __version__:
        return _failed(name, file, f"it is of pyreg {info.get('version')}, its Python files are of {__version__}")
    return Extension(name, "loaded", info, file=file)


def lacks(operator: str) -> ImportError | None:
    """Why there is no operator ``pyreg::<operator>``; None where it is there."""
    if CPU.error is not None:
        return CPU.error
    if hasattr(torch.ops.pyreg, operator):
        return None
    if operator not in CPU.missing_operators:
        CPU.missing_operators.append(operator)
    return ImportError(
        f"{CPU.name} lacks the operator pyreg::{operator}, which the Python files need: they are of other sources. "
        f"{_built_for(CPU.build_info)}. Remedy: {remedy(CPU.name)}"
    )


CPU = _load("pyreg._C")
if torch.version.cuda is None:
    CUDA = _load("pyreg._C_cuda", not_needed=f"torch {torch.__version__} has no CUDA")
else:
    CUDA = _load("pyreg._C_cuda", not_needed=None if CPU.error is None else "pyreg._C is not loaded")

"""The compiled parts: which were built, which are loaded, and why not.

Three states differ: *not built*, *failed to load*, and *not needed here* (CUDA kernels where torch has no CUDA).
A part that failed keeps its error, which the first operator that needs it raises.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, NoReturn

import torch


@dataclass(frozen=True)
class Extension:
    """One compiled module of pyreg."""

    name: str
    state: str
    build_info: dict[str, Any]
    error: ImportError | None = None

    def raise_error(self, *_: Any, **__: Any) -> NoReturn:
        """Raises why the module is not there."""
        raise self.error if self.error is not None else RuntimeError(f"{self.name} is loaded")


def _load(name: str, needed: bool) -> Extension:
    built = importlib.util.find_spec(name) is not None
    if not needed:
        return Extension(name, "not needed here" if built else "not built", {})
    if not built:
        remedy = "pip install --no-build-isolation . (with torch >= 2.10, a C++20 compiler" + (
            " and nvcc)" if name.endswith("_cuda") else ")"
        )
        return Extension(name, "not built", {}, ImportError(f"{name} was not built; build it with: {remedy}"))
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        reason = ImportError(
            f"{name} was built but does not load into torch {torch.__version__}: {error}. "
            "It serves torch >= 2.10 of the same processor; rebuild it here with: pip install --no-build-isolation ."
        )
        return Extension(name, "failed to load", {}, reason)
    return Extension(name, "loaded", module.build_info())


CPU = _load("pyreg._C", needed=True)
CUDA = _load("pyreg._C_cuda", needed=torch.version.cuda is not None and CPU.error is None)

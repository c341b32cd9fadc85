"""What this installation is and what it lacks: ``python -m pyreg.env``, or :func:`report` for the same as a dictionary.

Works where an extension was not built or does not load: then it says why, and what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

import pyreg
from pyreg import _extension

__all__ = ["report"]

_BUILD = "pip install --no-build-isolation ."
_ISA_NAMES = ("baseline", "avx2", "avx512")


def report() -> dict[str, Any]:
    """Versions, the state of each compiled part, and advice.

    Returns:
        ``python``, ``platform``, ``torch``, ``torch_cuda``, ``triton``, ``pyreg``, ``compiler``, ``nvcc``: versions,
        None for what is not there. ``gpus``: name and compute capability of each. ``instruction_set``: that of the CPU
        kernels in use, None if there are none. ``extensions``: for each compiled module its ``state`` ("loaded",
        "not built", "failed to load", "not needed here"), its ``error``, and what it says of its build. ``advice``:
        for each missing thing what it is, the ``reason``, and the ``remedy``.
    """
    gpus = [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
    ]
    extensions = {
        part.name: {"state": part.state, "error": None if part.error is None else str(part.error), **part.build_info}
        for part in (_extension.CPU, _extension.CUDA)
    }
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "pyreg": pyreg.__version__,
        "compiler": _first_line(os.environ.get("CXX", "c++"), "--version"),
        "nvcc": _last_line("nvcc", "--version"),
        "gpus": gpus,
        "instruction_set": _extension.CPU.build_info.get("isa"),
        "extensions": extensions,
        "advice": [*_extension_advice(), *_instruction_set_advice(), *_gpu_advice(gpus)],
    }


def _extension_advice() -> list[dict[str, str]]:
    parts = [_extension.CPU]
    if torch.version.cuda is not None and _extension.CPU.error is None:
        parts.append(_extension.CUDA)
    advice = []
    for part in parts:
        if part.error is None:
            continue
        needs = "a C++20 compiler and nvcc >= 12.8" if part is _extension.CUDA else "a C++20 compiler"
        advice.append(_advise(part.name, str(part.error), f"in pyreg's sources: {_BUILD} (needs {needs})"))
    return advice


def _instruction_set_advice() -> list[dict[str, str]]:
    wanted = os.environ.get("PYREG_ISA")
    if wanted is None or wanted in _ISA_NAMES:
        return []
    reason = f"PYREG_ISA={wanted} is none of {', '.join(_ISA_NAMES)} and has no effect"
    return [_advise("instruction set", reason, "unset PYREG_ISA, or set it to one of them")]


def _gpu_advice(gpus: list[tuple[str, tuple[int, int]]]) -> list[dict[str, str]]:
    if torch.version.cuda is None:
        return []
    advice = []
    if not gpus:
        reason = f"torch is built for CUDA {torch.version.cuda} and sees no GPU"
        advice.append(_advise("GPU", reason, "check the driver with nvidia-smi; the CPU kernels need none"))
    if _version("triton") is None:
        reason = "operators on tensor cores are Triton kernels"
        advice.append(_advise("triton", f"not installed; {reason}", "pip install 'triton>=3.6'"))
    built_for = [int(name) for name in str(_extension.CUDA.build_info.get("architectures", "")).split(",") if name]
    for name, (major, minor) in gpus:
        if built_for and not _is_served(10 * major + minor, built_for):
            reason = f"{name} is sm_{major}{minor}; the CUDA kernels are built for {', '.join(map(str, built_for))}"
            remedy = f"{_BUILD} -C cmake.define.PYREG_CUDA_ARCHITECTURES={major}{minor}"
            advice.append(_advise("CUDA kernels", reason, remedy))
    return advice


def _is_served(capability: int, built_for: list[int]) -> bool:
    """Machine code serves its major version from its minor version on, and the newest one's PTX all later ones."""
    same_major = any(capability // 10 == built // 10 and capability >= built for built in built_for)
    return same_major or capability >= built_for[-1]


def _advise(what: str, reason: str, remedy: str) -> dict[str, str]:
    return {"what": what, "reason": reason, "remedy": remedy}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n") if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    lines = [line for line in _output(*command) if line]
    return lines[0] if lines else None


def _last_line(*command: str) -> str | None:
    lines = [line for line in _output(*command) if line]
    return lines[-1] if lines else None


def _text(found: dict[str, Any]) -> str:
    gpus = ", ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in found["gpus"])
    rows = [
        ("python", f"{found['python']}, {found['platform']}"),
        ("torch", f"{found['torch']}, {'CUDA ' + found['torch_cuda'] if found['torch_cuda'] else 'without CUDA'}"),
        ("triton", found["triton"] or "not installed"),
        ("pyreg", found["pyreg"]),
        ("compiler", found["compiler"] or "not found"),
        ("nvcc", found["nvcc"] or "not found"),
        ("GPU", gpus or "none"),
        ("instruction set", found["instruction_set"] or "none: the CPU kernels are not loaded"),
    ]
    for name, part in found["extensions"].items():
        build = [f"{key} {value}" for key, value in part.items() if key not in ("state", "error")]
        rows.append((name, ": ".join([part["state"], *([", ".join(build)] if build else [])])))
    lines = [f"{name:<16} {value}" for name, value in rows]
    for item in found["advice"]:
        lines += ["", f"{item['what']}: {item['reason']}", f"  remedy: {item['remedy']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(_text(report()))

"""What this installation is and what it lacks: ``python -m pyreg.env``, or :func:`report` for the same as a dictionary.

Works where an extension was not built or does not load, and where torch is missing or too old: then it says why, and
what to do. ``--json`` prints the dictionary, for reports of bugs.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyreg
from pyreg import _requirements

__all__ = ["report"]

_ISA_NAMES = ("baseline", "avx2", "avx512")
_BUILD = "pip install --no-build-isolation ."


def report() -> dict[str, Any]:
    """Versions, the state of each compiled part, and advice.

    Returns:
        ``pyreg``, ``python``, ``torch``, ``torch_cuda``, ``triton``, ``driver``, ``driver_cuda`` (what it serves),
        ``compiler``, ``nvcc``: versions, None for what is not there. ``folder``: where pyreg is. ``gpus``: name and
        compute capability of each. ``instruction_set``: that of the CPU kernels in use, None if there are none.
        ``threads``: how many a CPU kernel runs on. ``extensions``: for each compiled module its ``state`` ("loaded",
        "not built", "failed to load", "not needed here"), its ``error``, the ``reason`` why it is not needed, and what
        it says of its build. ``advice``: for each missing thing what it is, the ``reason``, and the ``remedy``.
    """
    torch_found = _torch() if _requirements.TORCH_ERROR is None else _no_torch(_requirements.TORCH_ERROR)
    advice = torch_found.pop("advice")
    compiler = _first_line(os.environ.get("CXX") or "c++", "--version")
    return {
        "pyreg": pyreg.__version__,
        "folder": str(Path(pyreg.__file__).parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "triton": _version("triton"),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "driver_cuda": _driver_cuda(),
        "compiler": compiler,
        "nvcc": next((line for line in _output(_nvcc(), "--version") if "release" in line), None),
        **torch_found,
        "advice": [*advice, *_instruction_set_advice(), *_compiler_advice(compiler)],
    }


# ---- what needs torch ----


def _no_torch(error: ImportError) -> dict[str, Any]:
    """Of the compiled parts it is only known whether they are there: nothing is loaded without torch."""
    found = {name: importlib.util.find_spec(name) is not None for name in ("pyreg._C", "pyreg._C_cuda")}
    reason = "torch does not serve"
    return {
        "torch": _requirements.torch_version(),
        "torch_cuda": None,
        "gpus": [],
        "instruction_set": None,
        "threads": None,
        "extensions": {
            name: {"state": "not needed here" if built else "not built", "error": None, "reason": reason}
            for name, built in found.items()
        },
        "advice": [_advise("torch", str(error), _requirements.REMEDY)],
    }


def _torch() -> dict[str, Any]:
    import torch

    from pyreg import _extension

    gpus = [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
    ]
    extensions = {}
    for part in (_extension.CPU, _extension.CUDA):
        build_info = part.build_info or (_extension.read_build_info(part.file) if part.file is not None else {})
        error = None if part.error is None else str(part.error)
        extensions[part.name] = {"state": part.state, "error": error, "reason": part.reason, **build_info}
    return {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "instruction_set": _extension.CPU.build_info.get("isa"),
        "threads": torch.get_num_threads(),
        "extensions": extensions,
        "advice": [*_extension_advice(), *_gpu_advice(gpus, _driver_cuda())],
    }


def _extension_advice() -> list[dict[str, str]]:
    from pyreg import _extension

    advice = [
        _advise(part.name, _extension.reason_of(part.error), _extension.remedy(part.name))
        for part in (_extension.CPU, _extension.CUDA)
        if part.error is not None
    ]
    missing = _extension.CPU.missing_operators
    if missing:
        reason = f"it lacks {', '.join(missing)}, which the Python files need: they are of other sources"
        advice.append(_advise(_extension.CPU.name, reason, _extension.remedy(_extension.CPU.name)))
    return advice


def _gpu_advice(gpus: list[tuple[str, tuple[int, int]]], driver_cuda: str | None = None) -> list[dict[str, str]]:
    import torch

    from pyreg import _extension

    if torch.version.cuda is None:
        return []
    advice = []
    if not gpus:
        reason = f"torch is built for CUDA {torch.version.cuda} and sees no GPU"
        advice.append(_advise("GPU", reason, "check the driver with nvidia-smi; the CPU kernels need none"))
    if _version("triton") is None:
        reason = "operators on tensor cores are Triton kernels"
        advice.append(_advise("triton", f"not installed; {reason}", "pip install 'triton>=3.6'"))
    built_with = _extension.CUDA.build_info.get("cuda")
    if driver_cuda is not None and built_with is not None and _major(driver_cuda) < _major(built_with):
        reason = f"the driver serves CUDA {driver_cuda}, the CUDA kernels are built with {built_with}"
        remedy = f"update the driver, or build pyreg with nvcc {driver_cuda} (12.8 is the oldest): {_BUILD}"
        advice.append(_advise("driver", reason, remedy))
    built_for = [int(name) for name in str(_extension.CUDA.build_info.get("architectures", "")).split(",") if name]
    for name, (major, minor) in gpus:
        if built_for and not _is_served(10 * major + minor, built_for):
            reason = f"{name} is sm_{major}{minor}; the CUDA kernels are built for {', '.join(map(str, built_for))}"
            remedy = f"{_BUILD} -C cmake.define.PYREG_CUDA_ARCHITECTURES={major}{minor}"
            advice.append(_advise("CUDA kernels", reason, remedy))
    return advice


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _is_served(capability: int, built_for: list[int]) -> bool:
    """Machine code serves its major version from its minor version on, and the newest one's PTX all later ones."""
    same_major = any(capability // 10 == built // 10 and capability >= built for built in built_for)
    return same_major or capability >= built_for[-1]


# ---- what needs none ----


def _instruction_set_advice() -> list[dict[str, str]]:
    wanted = os.environ.get("PYREG_ISA")
    if wanted is None or wanted in _ISA_NAMES:
        return []
    reason = f"PYREG_ISA={wanted} is none of {', '.join(_ISA_NAMES)} and has no effect"
    return [_advise("instruction set", reason, "unset PYREG_ISA, or set it to one of them")]


def _compiler_advice(compiler: str | None) -> list[dict[str, str]]:
    if compiler is not None:
        return []
    reason = "none was found; torch.compile needs one on the CPU and Triton on a GPU, pyreg's own kernels do not"
    return [_advise("compiler", reason, "install g++, or name a compiler by CXX")]


def _advise(what: str, reason: str, remedy: str) -> dict[str, str]:
    return {"what": what, "reason": reason, "remedy": remedy}


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver serves."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()  # 1000 major + 10 minor
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> str:
    """As the Makefile looks for it."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [str(home / "bin" / "nvcc") for home in homes if (home / "bin" / "nvcc").exists()]
    return shutil.which("nvcc") or next(iter(found), "nvcc")


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.split("\n") if line] if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command)), None)


# ---- as text ----


def _architectures(names: str) -> str:
    """What GPUs there is machine code for; of the last one there is PTX too, which later ones compile."""
    numbers = names.split(",")
    return ", ".join([*(f"sm_{number}" for number in numbers), f"PTX of sm_{numbers[-1]}"])


def _text_of_extension(part: dict[str, Any]) -> str:
    state = part["state"] if part["reason"] is None else f"{part['state']} ({part['reason']})"
    build = [
        _architectures(value) if key == "architectures" else f"{key} {value}"
        for key, value in part.items()
        if key not in ("state", "error", "reason")
    ]
    return f"{state}: {', '.join(build)}" if build else str(state)


def _text(found: dict[str, Any]) -> str:
    gpus = ", ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in found["gpus"])
    cuda = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "without CUDA"
    driver = [found["driver"], f"for CUDA {found['driver_cuda']}" if found["driver_cuda"] else None]
    rows = [
        ("pyreg", f"{found['pyreg']}, {found['folder']}"),
        ("python", f"{found['python']}, {found['platform']}"),
        ("torch", f"{found['torch']}, {cuda}" if found["torch"] else "not installed"),
        ("triton", found["triton"] or "not installed"),
        ("compiler", found["compiler"] or "not found"),
        ("nvcc", found["nvcc"] or "not found (builds CUDA kernels, which a wheel brings along)"),
        ("driver", ", ".join(part for part in driver if part) or "not found"),
        ("GPU", gpus or "none"),
        ("instruction set", found["instruction_set"] or "none: the CPU kernels are not loaded"),
        ("threads", "unknown" if found["threads"] is None else str(found["threads"])),
        *((name, _text_of_extension(part)) for name, part in found["extensions"].items()),
    ]
    lines = [f"{name:<16} {value}" for name, value in rows]
    for item in found["advice"]:
        lines += ["", f"{item['what']}: {item['reason']}", f"  remedy: {item['remedy']}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pyreg.env", description="What this installation is and what it lacks.")
    parser.add_argument("--json", action="store_true", help="as JSON, for reports of bugs")
    found = report()
    print(json.dumps(found, indent=2) if parser.parse_args().json else _text(found))


if __name__ == "__main__":
    main()

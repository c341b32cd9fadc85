"""Builds .cu files for the CPU against the emulation of CUDA in this folder, with or without sanitizers."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = "g++"  # its name for sections and its attributes are relied upon
TORCH = Path(torch.__file__).resolve().parent
BUILD = ROOT / "build" / "cuda_on_cpu"
EMULATOR_SOURCES = (HERE / "emulator.cpp",)
LINKER_SCRIPT = HERE / "shared_memory.ld"

COMPILE_FLAGS = (
    "-std=c++20",
    "-DPYREG_CUDA_EMULATION",
    "-fPIC",
    "-fvisibility=hidden",
    "-fdata-sections",  # one section for each __shared__ variable: shared_memory.ld gathers them
    "-fno-gnu-unique",  # two libraries with the same kernel must not share its __shared__ variables
    "-fno-strict-aliasing",  # as nvcc
    "-ffp-contract=off",  # the same results on every machine
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}",
    f"-I{CSRC}",
    f"-isystem{TORCH / 'include'}",
)
OPTIMIZED_FLAGS = ("-O2", "-g1")
SANITIZER_FLAGS = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
LINK_FLAGS = (
    "-shared",
    f"-Wl,-T,{LINKER_SCRIPT}",
    "-Wl,--as-needed",
    f"-L{TORCH / 'lib'}",
    f"-Wl,-rpath,{TORCH / 'lib'}",
)
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")


def sanitized() -> bool:
    """True where libraries are to be built with sanitizers: PYREG_SANITIZE=1."""
    return os.environ.get("PYREG_SANITIZE", "0") == "1"


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)}\nfailed with exit status {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


@functools.cache
def _compiler_version() -> str:
    return _run([COMPILER, "--version"])


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _headers_digest() -> str:
    headers = [path for folder in (CSRC, HERE) for path in folder.rglob("*") if path.suffix in {".h", ".cuh"}]
    return _digest(*(part for path in sorted(headers) for part in (str(path), path.read_bytes())))


def _object(source: Path, flags: Sequence[str], headers: str) -> Path:
    """Compiles one source, unless an object of the same content is there. A .cu source becomes a .cu.o object."""
    source_bytes = source.read_bytes()
    key = _digest(str(source), source_bytes, headers, _compiler_version(), torch.__version__, *flags)
    target = BUILD / "objects" / f"{source.stem}-{key}{source.suffix}.o"
    if not target.exists():
        partial = target.with_name(f"{os.getpid()}-{target.name}")
        _run([COMPILER, *flags, "-c", "-x", "c++", str(source), "-o", str(partial)])
        partial.replace(target)
    return target


def build_library(
    name: str, sources: Sequence[Path], extra_flags: Sequence[str] = (), sanitize: bool | None = None
) -> Path:
    """Compiles `sources` and the emulator into one shared library and returns its path.

    Args:
        name: the library's name, without prefix and suffix.
        sources: .cu files of kernels and .cpp files that use them; the latter may use torch.
        extra_flags: further flags for the compiler, for all sources.
        sanitize: build with AddressSanitizer and UndefinedBehaviorSanitizer; None: as PYREG_SANITIZE=1 says.
            Such a library loads only into a process started with `sanitized_environment()`.
    """
    mode = SANITIZER_FLAGS if (sanitized() if sanitize is None else sanitize) else OPTIMIZED_FLAGS
    flags = (*COMPILE_FLAGS, *mode, *extra_flags)
    headers = _headers_digest()
    (BUILD / "objects").mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that share the tests one builds
        return _build(name, sources, mode, flags, headers)


def _build(name: str, sources: Sequence[Path], mode: Sequence[str], flags: Sequence[str], headers: str) -> Path:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source, flags, headers), (*sources, *EMULATOR_SOURCES)))
    key = _digest(*map(str, objects), LINKER_SCRIPT.read_bytes(), *LINK_FLAGS, *LIBRARIES)
    library = BUILD / f"lib{name}-{key}.so"
    if not library.exists():
        partial = library.with_name(f"{os.getpid()}-{library.name}")
        _run([COMPILER, *mode, *LINK_FLAGS, *map(str, objects), *LIBRARIES, "-o", str(partial)])
        partial.replace(library)
    return library


def _runtime_library(name: str) -> str:
    path = _run([COMPILER, f"-print-file-name={name}"]).strip()
    if not Path(path).is_absolute():
        raise RuntimeError(f"{COMPILER} has no {name}; install the compiler's sanitizer runtime")
    return path


def sanitized_environment() -> dict[str, str]:
    """The environment in which Python can load a sanitized library; checked by starting one such process."""
    environment = dict(os.environ)
    environment.update(
        PYREG_SANITIZE="1",
        # libstdc++ too: AddressSanitizer looks __cxa_throw up at its start, before torch would load it.
        LD_PRELOAD=f"{_runtime_library('libasan.so')} {_runtime_library('libstdc++.so.6')}",
        # Python and torch keep memory until the end of the process, and torch sizes some allocations by trying.
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:abort_on_error=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    probe = "import ctypes, torch; ctypes.CDLL(None).__asan_init; print(torch.ones(3).sum().item())"
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0 or done.stdout.strip() != "3.0":
        raise RuntimeError(f"Python and torch do not run under AddressSanitizer:\n{done.stdout}{done.stderr}")
    return environment

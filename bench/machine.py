"""What a result has to say about where it was measured."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

from pyreg import _extension

from . import ROOT


def core_count() -> int:
    """The cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@functools.cache
def cpu_name() -> str:
    """The model, with the family's numbers: a virtual machine often names its processor by the maker only."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


@functools.cache
def cache_bytes(device: str) -> int:
    """The last cache before memory: data rotated through more than this comes from memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_bytes(path.read_text().strip()) for path in sizes), default=32 << 20)


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


@functools.cache
def describe(device: str) -> dict[str, str]:
    """The columns that are the same in every row of one run; `load` is the load average at its start."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "cores": str(core_count()),
        "isa": str(_extension.CPU.build_info.get("isa", "")) if device == "cpu" else "",
        "torch": torch.__version__,
        "commit": _commit(),
        "load": f"{os.getloadavg()[0]:.2f}",
        "device": device,
    }


def _commit() -> str:
    """The commit measured, `-dirty` if files differ from it; `unknown` outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""The memory that is left."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


def check_memory(operator: str, what: str, shape: tuple[int, ...], like: Tensor) -> None:
    """An error where a tensor of this shape, of like's dtype and device, is larger than the memory that is left."""
    if torch.compiler.is_compiling():
        return
    needed, available = math.prod(shape) * like.element_size(), available_bytes(like.device)
    if available is not None and needed > available:
        raise ValueError(
            f"{operator}: {what} of shape {list(shape)} takes {needed / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB of memory are left on {like.device}; use apply, apply_transpose, "
            "barycentric_map, or fewer points"
        )


def available_bytes(device: torch.device) -> int | None:
    """The memory that can still be had; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

"""What a process holds at one moment."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096


class _MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@dataclass(frozen=True)
class Memory:
    resident: int  # bytes
    allocated: int  # bytes that malloc has given out, which CPU tensors come from
    blocks: int  # of Python's own allocator
    tensors: int  # alive in Python
    graphs: int  # contexts of autograd functions alive in Python

    def __sub__(self, before: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) - getattr(before, field.name) for field in fields(self)))


def held() -> Memory:
    """After a garbage collection; Linux with glibc >= 2.33."""
    gc.collect()
    kinds = [type(found) for found in gc.get_objects()]
    return Memory(
        resident=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        allocated=_allocated(),
        blocks=sys.getallocatedblocks(),
        tensors=sum(issubclass(kind, Tensor) for kind in kinds),
        graphs=sum(issubclass(kind, torch._C._FunctionBase) for kind in kinds),
    )


def _allocated() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)

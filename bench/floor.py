"""Floors: the time that the bare memory traffic of an operator, or its bare arithmetic, takes on this machine, measured
like any contender.

Each function takes tensors and returns the call to be timed, with all set-up done. What the calls move and compute is
counted inside of `counted()`, so that a report can say at which rate.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import ROOT
from .machine import core_count, cpu_name

SOURCE = Path(__file__).with_name("floor.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")

# Below this size glibc's malloc hands freed memory out again; from it on, a tensor is a fresh mapping every time.
FRESH_BYTES = 32 << 20
# Below this size a second thread costs more than it reads.
BYTES_PER_THREAD = 1 << 20


@dataclass
class Work:
    """The bytes that loops read and write, the floating-point operations of torch's matrix products, exponentials."""

    bytes: int = 0
    flops: int = 0
    exponentials: int = 0


_counting = Work()


@contextmanager
def counted() -> Iterator[Work]:
    """The work of the floors called inside, complete when it is left."""
    global _counting
    work = _counting = Work()
    with FlopCounterMode(display=False) as products:
        yield work
    work.flops = products.get_total_flops()
    _counting = Work()


class Span(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("words", ctypes.c_int64)]


def read(*tensors: Tensor) -> Callable[[], None]:
    """Reads the tensors once."""
    library, spans, threads = _library(), _spans(tensors), _threads(tensors)
    total = sum(tensor.nbytes for tensor in tensors)

    def call() -> None:
        _counting.bytes += total
        library.read_spans(spans, len(spans), threads)

    return call


def copy(*tensors: Tensor) -> Callable[[], None]:
    """Reads the tensors once and writes as much: into fresh memory if large, else into memory that was used before."""
    library, spans, threads = _library(), _spans(tensors), _threads(tensors)
    total = sum(tensor.nbytes for tensor in tensors)
    destination = _recycled(total) if total < FRESH_BYTES else None

    def call() -> None:
        _counting.bytes += 2 * total
        if destination is not None:
            library.copy_spans(spans, len(spans), threads, ctypes.c_void_p(destination.data_ptr()))
        elif library.copy_spans_to_fresh_memory(spans, len(spans), threads):
            raise MemoryError(f"floor: no {total} bytes of fresh memory")

    return call


@functools.cache
def _recycled(size: int) -> Tensor:
    """The one block that the allocator would hand out again and again."""
    return torch.ones(size, dtype=torch.uint8)


def update(inputs: Sequence[Tensor], updated: Sequence[Tensor]) -> Callable[[], None]:
    """Reads both lists, tensors of equal sizes in pairs, and writes the second in place with the values it has."""
    library, threads = _library(), _threads(updated)
    read_spans, written_spans = _spans(inputs), _spans(updated)
    total = sum(tensor.nbytes for tensor in inputs) + 2 * sum(tensor.nbytes for tensor in updated)

    def call() -> None:
        _counting.bytes += total
        library.update_spans(read_spans, written_spans, len(written_spans), threads, 0)

    return call


def exponentials(count: int) -> Callable[[], None]:
    """As many of float32, on all cores."""
    library, threads = _library(), core_count()

    def call() -> None:
        _counting.exponentials += count
        library.exponentials(count, threads)

    return call


def device_copy(moved_bytes: int, device: str) -> Callable[[], None]:
    """A copy within the memory of a GPU that moves as many bytes, reads and writes counted together."""
    source = torch.randint(256, (moved_bytes // 2,), dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)

    def call() -> None:
        _counting.bytes += 2 * source.nbytes
        destination.copy_(source)

    return call


def in_sequence(*calls: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for one in calls:
            one()

    return call


def _spans(tensors: Sequence[Tensor]) -> ctypes.Array[Span]:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("floor: the tensors must be contiguous")
    spans = (Span * len(tensors))(*[Span(tensor.data_ptr(), tensor.nbytes // 8) for tensor in tensors])
    spans.tensors = tensors  # the memory lives as long as its addresses are held
    return spans


def _threads(tensors: Sequence[Tensor]) -> int:
    total = sum(tensor.nbytes for tensor in tensors)
    return max(1, min(core_count(), total // BYTES_PER_THREAD))


@functools.cache
def _library() -> ctypes.CDLL:
    """`floor.cpp`, compiled once for each source and processor: it is built for the processor it runs on."""
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *FLAGS, cpu_name()]).encode()).hexdigest()[:16]
    path = ROOT / "build" / "bench" / f"floor-{key}.so"
    if not path.exists():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("floor: no C++ compiler found; install g++ or set CXX")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")  # renamed when complete: two runs may build at once
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(path)

    library = ctypes.CDLL(str(path))
    spans, count, threads = ctypes.POINTER(Span), ctypes.c_int64, ctypes.c_int
    library.read_spans.argtypes = [spans, count, threads]
    library.read_spans.restype = ctypes.c_uint64
    library.copy_spans.argtypes = [spans, count, threads, ctypes.c_void_p]
    library.copy_spans.restype = None
    library.copy_spans_to_fresh_memory.argtypes = [spans, count, threads]
    library.copy_spans_to_fresh_memory.restype = ctypes.c_int
    library.update_spans.argtypes = [spans, spans, count, threads, ctypes.c_uint64]
    library.update_spans.restype = None
    library.exponentials.argtypes = [count, threads]
    library.exponentials.restype = ctypes.c_float
    return library

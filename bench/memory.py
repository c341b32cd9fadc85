"""Peak memory of one call, in bytes above what was allocated before it."""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

# From here on the resident set tells the truth, to a percent: glibc maps such blocks afresh and returns them at once.
# Smaller blocks are recycled inside the heap, where the resident set does not see them come and go.
RESIDENT_BYTES = 32 << 20


def peak_extra_bytes(call: Callable[[], object], device: str, input_bytes: int) -> int:
    """Runs `call` once. On the CPU: the growth of the peak resident set for large inputs, which counts everything, also
    memory that no tensor owns; for small inputs, and where the kernel does not let the peak be reset, what torch's
    allocator hands out. On CUDA: the peak of torch's allocator."""
    if device == "cuda":
        return _allocated_on_cuda(call)
    if input_bytes >= RESIDENT_BYTES and _reset_peak_resident():
        return _resident(call)
    return _allocated_on_cpu(call)


def _allocated_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(call: Callable[[], object]) -> int:
    # Free heap that is still resident would be used again unseen.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _reset_peak_resident()
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _reset_peak_resident() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"memory: no {field} in /proc/self/status")


def _allocated_on_cpu(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


def launch_count(call: Callable[[], object]) -> int:
    """The CUDA kernels that one call launches; copies and fills by the driver are not kernels."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)

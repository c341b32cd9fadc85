"""Tests of process groups: all cases run in one go on every rank, each of which leaves what it found in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

RANKS = 2

Find = Callable[[int, dict[str, Any]], None]  # of a rank, what it finds


def _run(rank: int, find: Find, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    find(rank, found)
    torch.save(found, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def found_by_ranks(find: Find, folder: Path) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    torch.multiprocessing.spawn(_run, (find, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


def message_of(call: Callable[[], object]) -> str:
    """Of the error that it raises."""
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, NotImplementedError)) as error:
        call()
    return str(error.value)

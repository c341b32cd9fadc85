"""Ranks of a process group that have one loss together; rows of all of them, for losses of the global batch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyreg.ops import _library


def process_group(operator: str, group: Any, features: Tensor, traces: bool = False) -> dist.ProcessGroup | None:
    """The group whose ranks share the work: the argument itself, the default group for True, or None where there is
    one rank. ``traces``: nothing that is exchanged has to be known while tracing."""
    if group is None or group is False:
        return None
    if torch.compiler.is_compiling() and not traces:
        raise NotImplementedError(
            f"{operator}: group is not for torch.compile, since ranks exchange their numbers of rows; call the loss "
            "outside of the compiled function"
        )
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{operator}: group needs torch.distributed.init_process_group to have been called")
    if group is True:
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{operator}: this process is not in group, whose ranks alone can call it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{operator}: expected group to be a process group or True, got {type(group).__name__}; "
            "of a device mesh pass mesh.get_group()"
        )
    if not _library.has_kernel(features):
        raise ValueError(f"{operator}: group needs tensors of the CPU or CUDA, got {features.device}")
    return group if dist.get_world_size(group) > 1 else None


def refuse_create_graph(operator: str) -> None:
    """To be called in the backward pass of a gathered loss."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{operator}: with group there are gradients of first order alone, and create_graph asks for more"
        )


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


class Ranks:
    """Gathers rows of all ranks, in the order of ranks; ranks may have different numbers of rows.

    Creating one waits for the other ranks, and for the GPU: sizes must be known.

    Args:
        operator: the name for errors.
        group: a process group of several ranks.
        tensors: what is to be gathered, ``[rows, ...]``, by name; all ranks must agree in what follows the rows, in
            dtypes, and in which are None. The first is there.
    """

    def __init__(self, operator: str, group: dist.ProcessGroup, tensors: dict[str, Tensor | None]) -> None:
        self._group = group
        first = next(tensor for tensor in tensors.values() if tensor is not None)
        own = torch.tensor([len(first), *(code for tensor in tensors.values() for code in _layout(tensor))])
        own = own.to(first.device)
        self.sizes, *layouts = torch.stack(all_gather(own, group)).t().tolist()
        for name, lengths, dtypes in zip(tensors, layouts[::2], layouts[1::2], strict=True):
            if len(set(lengths)) > 1 or len(set(dtypes)) > 1:
                found = [
                    f"{length} {_DTYPES[dtype]}" if length else "none"
                    for length, dtype in zip(lengths, dtypes, strict=True)
                ]
                raise ValueError(f"{operator}: expected {name} with rows alike on all ranks of group, got {found}")
        self.rank = dist.get_rank(group)

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def first_row(self) -> int:
        return sum(self.sizes[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """``[total, ...]`` from ``[rows, ...]`` of every rank."""
        largest = max(self.sizes)
        if largest == 0:
            return rows
        padded = rows
        if len(rows) < largest:  # collectives move as much from every rank
            padded = rows.new_zeros(largest, *rows.shape[1:])
            padded[: len(rows)] = rows
        everyone = zip(all_gather(padded, self._group), self.sizes, strict=True)
        return torch.cat([part[:size] for part, size in everyone])


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors, of one shape, of all ranks."""
    tensor = tensor.contiguous()
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor, group=group)
    return everyone


def _layout(tensor: Tensor | None) -> tuple[int, int]:
    """The length of a row, and a number for the dtype."""
    if tensor is None:
        return 0, 0
    return math.prod(tensor.shape[1:]), _DTYPES.index(tensor.dtype)

"""OrthoGrad of parameters that are DTensors, as FSDP2 and tensor parallelism make them.

A rank has shards. The sums over a parameter are those over its shards, so that three numbers a parameter, of all
parameters in one message, are exchanged before the gradients change; and one more, which is not 0 where a gradient is
nearly parallel to its weights. The steps are those of ``csrc/orthograd``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyreg.ops import _library

_NAME = "orthogonalize_gradients_"
_everything = _library.operator(_NAME)
_sums = _library.operator("orthograd_sums")
_residuals = _library.operator("orthograd_residuals")
_update = _library.operator("orthograd_update_")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; who has one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def orthogonalize_(params: Sequence[Any]) -> None:
    """Replaces the gradients of DTensors that have one. All ranks of their meshes have to call it, with the same
    parameters in the same order."""
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for param in params:
        _match_placements(param)
        meshes = tuple(i for i, placement in enumerate(param.placements) if not placement.is_replicate())
        alike.setdefault((param.device_mesh, meshes), []).append(param)
    for (mesh, dims), members in alike.items():
        _orthogonalize_alike(members, [mesh.get_group(dim) for dim in dims])


def _match_placements(param: Any) -> None:
    """A gradient lies as its parameter does, whole sums and not parts of them."""
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{_NAME}: expected parameters that are sharded or replicated, got placements {param.placements} for a "
            f"parameter of shape {list(param.shape)}; redistribute it first"
        )
    grad = param.grad
    if not is_sharded(grad):
        raise TypeError(
            f"{_NAME}: expected a DTensor as the gradient of a DTensor, got {type(grad).__name__} for a parameter of "
            f"shape {list(param.shape)}"
        )
    if grad.dtype != param.dtype or not _library.has_kernel(param.to_local()):
        raise TypeError(
            f"{_NAME}: expected a gradient of its DTensor's dtype {param.dtype} on the CPU or CUDA, got {grad.dtype} "
            f"on {grad.device}; convert it with param.grad = param.grad.to(param.dtype)"
        )
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        param.grad = grad = grad.redistribute(param.device_mesh, param.placements)
    if not grad.to_local().is_contiguous():  # expanded, perhaps
        param.grad = grad.contiguous()


def _orthogonalize_alike(params: list[Any], groups: list[dist.ProcessGroup]) -> None:
    """Of parameters that the same ranks share."""
    weights = [param.to_local() for param in params]
    grads = [param.grad.to_local() for param in params]
    own = [i for i, weight in enumerate(weights) if weight.numel() > 0]
    shards = [weights[i] for i in own], [grads[i] for i in own]
    if not groups:
        _everything(*shards)
        return
    index = torch.tensor(own, dtype=torch.int64, device=weights[0].device) if len(own) < len(params) else None

    def of_all_ranks(numbers: Tensor) -> Tensor:
        """Sums over ranks of numbers of this rank's shards; of those shards alone."""
        everyone = numbers
        if index is not None:
            everyone = numbers.new_zeros((len(params), *numbers.shape[1:])).index_copy_(0, index, numbers)
        for group in groups:
            dist.all_reduce(everyone, group=group)
        return everyone if index is None else everyone.index_select(0, index)

    nothing = weights[0].new_empty((0, 3), dtype=torch.float64)
    sums = of_all_ranks(_sums(*shards) if own else nothing)
    residuals = of_all_ranks(_residuals(*shards, sums) if own else nothing[:, 0])
    if own:
        _update(*shards, sums, residuals)


@_library.fake("orthograd_sums")
def _(params: list[Tensor], grads: list[Tensor]) -> Tensor:
    return params[0].new_empty((len(params), 3), dtype=torch.float64)


@_library.fake("orthograd_residuals")
def _(params: list[Tensor], grads: list[Tensor], sums: Tensor) -> Tensor:
    return params[0].new_empty((len(params),), dtype=torch.float64)


@_library.fake("orthograd_update_")
def _(params: list[Tensor], grads: list[Tensor], sums: Tensor, residuals: Tensor) -> None:
    return None


_library.count_versions("orthograd_update_", 1)

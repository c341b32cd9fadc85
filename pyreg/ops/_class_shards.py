"""Cross-entropy under StableMax where each rank of a process group holds some of the classes.

With the classes of a rank go R_r, the sum of s over them without the target, and, where the target is one of them, its
logit and class weight. Their sums over the ranks, float64 ``[3, rows]`` and one message, are all that a row's loss and
gradient need. The passes over logits are the kernels of one process (``csrc/stablemax``):

- forward, a rank's ``1 / S_r`` and ``-R_r / S_r`` are what the kernel saves for its backward pass;
- then a row has two classes: the target, and one whose s is R;
- backward, the kernel gets what one process would have saved. It puts the gradient of a target elsewhere in the place
  of class 0, which therefore is class 0's own: ``h_0 (Q s_0 / S - q_0)``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyreg.ops import _classes, _library, _ranks
from pyreg.reference.stablemax import s

_NAME = "stablemax_cross_entropy"
_NO_CLASS = -1  # of rows that are ignored, in the kernels' calls


class Shard(NamedTuple):
    """A rank's classes, ``first`` to ``first + own``, of ``classes`` on all ranks of the group with this name."""

    first: int
    own: int
    classes: int
    group: str


def shard(operator: str, group: Any, num_classes: int | None, input: Tensor, own: int) -> Shard | None:
    """None where one rank has all classes."""
    members = _ranks.process_group(operator, group, input, traces=True)
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"{operator}: expected num_classes to be an integer >= 1, got {num_classes!r}")
    size, rank = (1, 0) if members is None else (dist.get_world_size(members), dist.get_rank(members))
    classes = size * own if num_classes is None else num_classes
    per_rank = -(-classes // size)
    first = min(rank * per_rank, classes)
    expected = min(per_rank, classes - first)
    if own != expected:
        raise ValueError(
            f"{operator}: expected input with {expected} of num_classes = {classes} classes on rank {rank} of {size}, "
            f"as torch.chunk divides them, got {own}"
        )
    return None if members is None else Shard(first, own, classes, members.group_name)


def _local_target(target: Tensor, ignore_index: int, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows ``[rows]``: the target among the rank's classes as kernels take it, whether it is one of them, and
    whether it is no class of any rank."""
    labels = target.flatten()
    counts = labels != ignore_index
    is_class = (labels >= 0) & (labels < shard.classes)
    local = labels - shard.first
    is_own = is_class & counts & (local >= 0) & (local < shard.own)
    local = torch.where(is_own, local, 0).where(is_class, shard.own).where(counts, _NO_CLASS)
    return local, is_own, counts & ~is_class


def _forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    loss_dtype: torch.dtype,
    first: int,
    classes: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    own = Shard(first, input.shape[1], classes, group)
    local, is_own, is_invalid = _local_target(target, ignore_index, own)
    counts = local != _NO_CLASS
    at = torch.where(is_own, local, 0)

    parts, weights, first_class = _parts(input, target.shape, local, at, is_own, weight, label_smoothing)
    message = torch.cat([parts.where(counts, 0).flatten(), weights.view(1), weights.new_full((1,), own.own)])
    if len(local) > 0:
        members = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
        dist.all_reduce(message, group=members)
        is_invalid = is_invalid | _is_incomplete(message[-1], own)
    if target.is_cpu:  # not before the message, which other ranks may be waiting for
        _classes.check_labels(_NAME, target, classes, ignore_index)
    rest, logit, target_weight, *logarithms = message[:-2].view_as(parts)
    all_weights = message[-2]

    # log1p(R / s_y), 1 / S and R / S, of two classes.
    others = torch.where(rest < 1, 1 - 1 / rest, rest - 1)
    pair = torch.stack([logit, others], 1)
    labels = torch.zeros_like(local)
    _, saved = _library.operator(_NAME)(pair, labels, None, 0, _NO_CLASS, 0.0, torch.float64)
    per_sum, minus_rest_share, losses = saved[:-1].view(3, -1)

    keep, spread = 1 - label_smoothing, label_smoothing / classes
    rest_mass, pivot_mass = spread * (all_weights - target_weight), (keep + spread) * target_weight
    mass, rest_share = rest_mass + pivot_mass, -minus_rest_share
    losses = keep * target_weight * losses
    if spread > 0:
        losses = losses - spread * (all_weights * per_sum.log() + logarithms[0])
    pivot_share = s(logit) * per_sum
    of_target = torch.where(rest_share < 0.5, rest_mass - mass * rest_share, mass * pivot_share - pivot_mass)
    sum_gradient = mass * per_sum
    of_first = sum_gradient * s(first_class[0]) - spread * first_class[1]

    fields = torch.stack([sum_gradient, torch.where(is_own, of_target, of_first), losses])
    fields = fields.masked_fill(is_invalid, math.nan).where(counts, 0)
    total = target_weight.where(counts, 0).sum()
    result = fields[2].view(target.shape)
    if reduction != 0:
        result = fields[2].sum() / (total if reduction == 1 else 1)
    saved = torch.cat([fields.flatten(), total.view(1)]).to(_library.accumulate_dtype(input.dtype))
    return result.to(loss_dtype), saved, local.view(target.shape)


def _is_incomplete(found: Tensor, shard: Shard) -> Tensor:
    """Whether the ranks together have other classes than this one counts on: an error on the CPU, else NaN."""
    if (found.is_cpu or _library.checks_values()) and found.item() != shard.classes:
        raise ValueError(
            f"{_NAME}: expected ranks of group to have {shard.classes} classes together, got {int(found.item())}, with "
            f"{shard.own} on this rank; give num_classes where slices differ, and divide as torch.chunk does"
        )
    return found != shard.classes


def _parts(
    input: Tensor,
    shape: torch.Size,
    local: Tensor,
    at: Tensor,
    is_own: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes with the rank's classes: ``[3, rows]`` R, the target's logit and weight, and under label smoothing a
    fourth, the sum of ``w log s``; the sum of class weights; logit and weight of class 0, ``[2, rows]``. float64."""
    own, fields = input.shape[1], 4 if label_smoothing > 0 else 3
    nothing = torch.zeros((fields, len(local)), dtype=torch.float64, device=input.device)
    if own == 0:
        return nothing, nothing.new_zeros(()), nothing[:2]
    weights = nothing.new_full((), own) if weight is None else weight.sum(dtype=torch.float64)

    def saved(weight: Tensor | None, smoothing: float) -> Tensor:
        options = weight, 0, _NO_CLASS, smoothing, _library.accumulate_dtype(input.dtype)
        _, found = _library.operator(_NAME)(input, local.where(local < own, 0).view(shape), *options)
        return found[:-1].view(3, -1).double()  # type: ignore[no-any-return]

    per_sum, minus_rest_share, _ = saved(None, 0.0)
    rest = torch.where(is_own, -minus_rest_share, 1) / per_sum
    logits = input.gather(1, at.view(shape).unsqueeze(1)).flatten().double()
    parts = [rest, torch.where(is_own, logits, 0), (is_own if weight is None else weight[at] * is_own).double()]
    if label_smoothing > 0:
        # A target of 1 / own everywhere has the loss (W log S_r - sum_j w_j log s_j) / own; infinite, or NaN of two
        # infinite parts, where a class is masked.
        logarithms = -(weights * per_sum.log() + own * saved(weight, 1.0)[2])
        parts.append(logarithms.masked_fill(logarithms.isnan() & ~per_sum.isnan(), -math.inf))
    first_logits = input[:, 0].flatten().double()
    first_weights = torch.ones_like(first_logits) if weight is None else weight[0].double().expand_as(first_logits)
    return torch.stack(parts), weights, torch.stack([first_logits, first_weights])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, _, weight, ctx.reduction, _, ctx.smoothing, _, _, ctx.classes, _ = inputs
    _, saved, local = output
    ctx.mark_non_differentiable(saved, local)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, local, weight, saved)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if grad_loss is None:
        return None, *nothing
    _ranks.refuse_create_graph(_NAME)
    input, local, weight, saved = ctx.saved_tensors
    if input.shape[1] == 0:
        return torch.zeros_like(input), *nothing
    # The kernel divides smoothing by the number of classes it sees.
    smoothing = ctx.smoothing * input.shape[1] / ctx.classes
    options = weight, saved, ctx.reduction, _NO_CLASS, smoothing
    return _library.operator(f"{_NAME}_backward")(grad_loss, input, local, *options), *nothing


@_library.fake("stablemax_cross_entropy_sharded")
def _fake(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, _, _, dtype, *_ = options
    loss = torch.empty(target.shape if reduction == 0 else (), dtype=dtype, device=input.device)
    saved = torch.empty((3 * target.numel() + 1,), dtype=_library.accumulate_dtype(input.dtype), device=input.device)
    return loss, saved, torch.empty_like(target, memory_format=torch.contiguous_format)


@_library.vmap("stablemax_cross_entropy_sharded")
def _vmap(*_: Any) -> Any:
    raise NotImplementedError(f"{_NAME}: with group there is no vmap; pass the samples as rows")


_library.implement("stablemax_cross_entropy_sharded", _forward)
cross_entropy = _library.differentiable("stablemax_cross_entropy_sharded", setup_context=_setup, backward=_backward)

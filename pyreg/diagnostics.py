"""What "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697) measures on a run that fails to generalise.

Both are for looking at a run, not for training on: they take no part in autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.ops._library import FLOAT_DTYPES, check_dense

__all__ = ["NaiveLossMinimization", "naive_loss_minimization_alignment", "softmax_collapse_rate"]

IGNORED = -100  # the ignore_index of torch.nn.functional.cross_entropy


@torch.no_grad()
def softmax_collapse_rate(logits: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose softmax cross-entropy is exactly 0 in the dtype of the logits.

    .. code-block:: text

        rate = #{n : log(sum_k exp(z_nk)) - z_ny == 0} / N

    Softmax collapse: rounding absorbs the other classes, so the sample stops pulling its logit away from theirs. The
    loss is torch's own, ``F.cross_entropy``, so that bf16 and fp16 count as the kernel that trains on them rounds.

    Args:
        logits: ``[N, C]``, float64, float32, bfloat16 or float16.
        target: ``[N]``, int64 class indices in ``[0, C)``. Rows with the index -100 are left out of both counts.

    Returns:
        A 0-d fp32 tensor on the device of the logits, in [0, 1]; NaN if there is no row to count.

    Gradient:
        None: it runs under ``torch.no_grad``.

    Raises:
        TypeError: logits that are not floating, target that is not int64.
        ValueError: any other shape, or an index outside ``[0, C)``. This check waits for the device.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> logits = torch.tensor([[20.0, 0.0], [2.0, 0.0]])
        >>> pyreg.diagnostics.softmax_collapse_rate(logits, torch.tensor([0, 0]))
        tensor(0.5000)
    """
    name = "softmax_collapse_rate"
    for which, tensor in (("logits", logits), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {which} should be a tensor, got {type(tensor).__name__}.")
        check_dense(name, which, tensor)
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: logits should be floating [N, C], got {logits.dtype}; convert with logits.float().")
    if logits.dim() != 2:
        raise ValueError(
            f"{name}: logits should be [N, C], got {list(logits.shape)};"
            f" move the classes last and flatten the rest, logits.flatten(0, -2)."
        )
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: target should be [N] = [{logits.shape[0]}] class indices for logits {list(logits.shape)},"
            f" got {list(target.shape)}; probabilities become indices with target.argmax(1)."
        )
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: target should be int64 [N], got {target.dtype}; convert with target.long().")
    is_counted = target != IGNORED
    if (is_counted & ((target < 0) | (target >= logits.shape[1]))).any():
        raise ValueError(
            f"{name}: target should hold class indices in [0, C) = [0, {logits.shape[1]}) or {IGNORED},"
            f" got values from {target.min().item()} to {target.max().item()}; mark rows to leave out with {IGNORED}."
        )
    losses = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED)
    return ((losses == 0) & is_counted).sum() / is_counted.sum()


class NaiveLossMinimization(NamedTuple):
    """Cosines between the descent step and the weights; see ``naive_loss_minimization_alignment``."""

    per_tensor: list[Tensor | None]  # 0-d each, in the order of the parameters; None where there is no gradient
    overall: Tensor  # 0-d


@torch.no_grad()
def naive_loss_minimization_alignment(params: Iterable[Tensor] | Tensor) -> NaiveLossMinimization:
    """Cosine between the descent step, minus the gradient, and the weights.

    .. code-block:: text

        alignment = -(w.g) / (|w| |g|)

    +1: the step only scales the weights up, which lowers the cross-entropy of samples that are already right and
    changes no prediction of a network that is homogeneous in its weights (naive loss minimization). 0: the step is
    orthogonal to the weights, as OrthoGrad makes it. -1: the step only shrinks them.

    Args:
        params: parameters after ``backward``, as from ``model.parameters()``, of any shapes.

    Returns:
        ``per_tensor``: the cosine of every parameter, flattened, and None for a parameter without a gradient.
        ``overall``: the cosine of all parameters that have a gradient, taken as one vector.
        Cosines are fp32, or fp64 for fp64 parameters; 0 where the weights or the gradient are zero.

    Gradient:
        None: it runs under ``torch.no_grad``.

    Raises:
        TypeError: an item that is not a tensor.
        ValueError: no parameter has a gradient, or one has a sparse gradient.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([-3.0, -4.0])
        >>> pyreg.diagnostics.naive_loss_minimization_alignment([w]).overall
        tensor(1.)
    """
    name = "naive_loss_minimization_alignment"
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"{name}: params should be tensors, got a module; pass module.parameters().")
    if not isinstance(params, Iterable):
        raise TypeError(f"{name}: params should be tensors, got {type(params).__name__}; pass model.parameters().")
    dots, weight_norms, grad_norms = [], [], []
    per_tensor: list[Tensor | None] = []
    for param in [params] if isinstance(params, Tensor) else params:
        if not isinstance(param, Tensor):
            raise TypeError(f"{name}: params should be tensors, got {type(param).__name__}; pass model.parameters().")
        if param.grad is None:
            per_tensor.append(None)
            continue
        if param.grad.is_sparse:
            raise ValueError(
                f"{name}: params should have dense gradients, got a sparse one; build it with sparse=False."
            )
        dtype = torch.promote_types(param.dtype, torch.float32)
        w, g = param.to(dtype).flatten(), param.grad.to(dtype).flatten()
        dots.append(-w.dot(g))
        weight_norms.append(w.norm())
        grad_norms.append(g.norm())
        per_tensor.append(_cosine(dots[-1], weight_norms[-1], grad_norms[-1]))
    if not dots:
        raise ValueError(
            f"{name}: params should hold at least one parameter with a gradient, got {len(per_tensor)} without;"
            f" call it between loss.backward() and optimizer.zero_grad()."
        )
    overall = _cosine(_stack(dots).sum(), _stack(weight_norms).norm(), _stack(grad_norms).norm())
    return NaiveLossMinimization(per_tensor, overall)


def _stack(scalars: list[Tensor]) -> Tensor:
    """One vector of 0-d tensors that may lie on several devices."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def _cosine(dot: Tensor, weight_norm: Tensor, grad_norm: Tensor) -> Tensor:
    length = weight_norm * grad_norm
    return torch.where(length == 0, 0, dot / length).clamp(-1, 1)

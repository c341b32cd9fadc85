"""StableMax: softmax with the exponential replaced by a function that grows linearly (arXiv 2501.04697).

    s(x) = x + 1        for x >= 0        s'(x) = 1
    s(x) = 1 / (1 - x)  for x <  0        s'(x) = 1 / (1 - x)^2

    stablemax(x)_j = s(x_j) / S,   S = sum_k s(x_k)
    log s(x)       = sign(x) log1p(|x|),   d log s / dx = 1 / (1 + |x|)

Everything is computed in the dtype of the input. Where a formula holds on one side of zero only, the other side is fed
a zero: `torch.where` then never multiplies an infinite derivative of the unused side by zero, and the gradient is right
at x = 0, at x = 1 and at x = -inf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def s(x: Tensor) -> Tensor:
    """`x + 1` for `x >= 0`, `1 / (1 - x)` below; `s(-inf) = 0`. Elementwise."""
    is_positive = x >= 0
    above = torch.where(is_positive, x, 0) + 1
    below = 1 / (1 - torch.where(is_positive, 0, x))
    return torch.where(is_positive, above, below)


def log_s(x: Tensor) -> Tensor:
    """`sign(x) log1p(|x|)`, with the derivative `1 / (1 + |x|)` everywhere, at 0 too. Elementwise."""
    is_positive = x >= 0
    above = torch.log1p(torch.where(is_positive, x, 0))
    below = -torch.log1p(-torch.where(is_positive, 0, x))
    return torch.where(is_positive, above, below)


def stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`s(x_j) / S` along `dim`; `dtype` casts the input first, as in `torch.softmax`."""
    values = s(input if dtype is None else input.to(dtype))
    return values / values.sum(dim, keepdim=True)


def log_stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`log s(x_j) - log S` along `dim`; `dtype` casts the input first, as in `torch.log_softmax`."""
    x = input if dtype is None else input.to(dtype)
    return log_s(x) - s(x).sum(dim, keepdim=True).log()


def stablemax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` with its log-softmax replaced by `log_stablemax`.

    `input` is `[C]`, `[N, C]` or `[N, C, d1, ..., dk]`. `target` holds class indices, `[]`, `[N]` or
    `[N, d1, ..., dk]`, or probabilities in the shape of `input`. At a large target logit x the gradient is the
    difference of two numbers near 1 / x and loses about log10(x) digits: use fp64 there.
    """
    log_probs = log_stablemax(input, dim=_class_dim(input))
    return cross_entropy_from_log_probabilities(log_probs, target, weight, ignore_index, reduction, label_smoothing)


def cross_entropy_from_log_probabilities(
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """What `torch.nn.functional.cross_entropy` does once it has the log-probabilities."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if label_smoothing > 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    smoothing = label_smoothing if label_smoothing > 0.0 else 0.0  # torch reads a negative value as none

    if log_probs.shape == target.shape:
        return _against_probabilities(log_probs, target, weight, ignore_index, reduction, smoothing)
    loss = F.nll_loss(log_probs, target, weight, ignore_index=ignore_index, reduction=reduction)
    if smoothing == 0.0:
        return loss
    uniform = _against_all_classes(log_probs, target, weight, ignore_index, reduction)
    return (1 - smoothing) * loss + smoothing / _classes(log_probs) * uniform


def _against_probabilities(
    log_probs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """`-sum_j weight_j q_j log p_j`; the mean is over the rows, whatever their weights."""
    if not target.is_floating_point():
        raise ValueError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if ignore_index >= 0:
        raise ValueError("ignore_index is not supported for floating point target")
    classes = _classes(log_probs)
    if smoothing > 0.0:
        target = target * (1 - smoothing) + smoothing / classes
    loss = -_weighted(log_probs * target, weight).sum(_class_dim(log_probs))
    return _reduce(loss, reduction, rows=log_probs.numel() // classes)


def _against_all_classes(
    log_probs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """`-sum_j weight_j log p_j` of the rows that are not ignored; the mean is over the weights of their targets."""
    is_ignored = target == ignore_index
    loss = -_weighted(log_probs, weight).sum(_class_dim(log_probs))
    loss = loss.masked_fill(is_ignored, 0)
    if weight is None:
        rows = (~is_ignored).sum()
    else:
        rows = weight[target.masked_fill(is_ignored, 0)].masked_fill(is_ignored, 0).sum()
    return _reduce(loss, reduction, rows)


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() <= 1 else 1


def _classes(input: Tensor) -> int:
    return max(input.shape[_class_dim(input)], 1)  # something to divide by where there is no class


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values
    classes = values.shape[_class_dim(values)]
    if weight.shape != (classes,):
        raise ValueError(
            f"cross_entropy: weight tensor should be defined either for all {classes} classes or no classes"
            f" but got weight tensor of shape: {list(weight.shape)}"
        )
    return values * weight.view(-1, *[1] * max(values.dim() - 2, 0))


def _reduce(loss: Tensor, reduction: str, rows: int | Tensor) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / rows

"""Arguments that losses over classes share: class indices, class weights, label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from pyreg.ops import _checks, _library


def check_smoothing(operator: str, label_smoothing: float) -> float:
    if not (_checks.is_number(label_smoothing) and label_smoothing <= 1.0):
        raise ValueError(f"{operator}: expected label_smoothing in [0, 1], got {label_smoothing!r}")
    return float(label_smoothing) if label_smoothing > 0.0 else 0.0  # torch reads a negative value as none


def check_label_dtype(operator: str, target: Tensor) -> None:
    _library.check_dense(operator, "target", target)
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{operator}: expected class indices of dtype int64, got {target.dtype}; use target.long()")


def check_ignore_index(operator: str, ignore_index: int) -> None:
    if not isinstance(ignore_index, (int, torch.SymInt)) or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"{operator}: expected ignore_index to be an integer of 64 bits, got {ignore_index!r}")


def check_nothing_ignored(operator: str, ignore_index: int) -> None:
    """Of a target that holds probabilities."""
    if ignore_index >= 0:
        raise ValueError(
            f"{operator}: ignore_index is for class indices; target holds probabilities, got ignore_index = "
            f"{ignore_index}. Give the rows to leave out a target of zeros"
        )


def check_labels(operator: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """An error where a class index is out of range; on a GPU it waits for the result."""
    invalid = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if invalid.numel() > 0:
        raise IndexError(
            f"{operator}: target has class {invalid[0].item()}, which is out of bounds for input with {classes} "
            f"classes; expected 0 <= target < {classes} or ignore_index = {ignore_index}"
        )


def check_weight(operator: str, weight: Tensor, classes: int, input: Tensor) -> Tensor:
    """The class weights, contiguous, in the dtype in which the operator sums."""
    _library.check_float(operator, "weight", weight)
    if weight.shape != (classes,):
        raise ValueError(f"{operator}: expected weight of shape [C] = [{classes}], got {list(weight.shape)}")
    if weight.device != input.device:
        raise ValueError(f"{operator}: expected weight on input's device {input.device}, got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operator}: weight has no gradient; pass weight.detach()")
    return weight.to(_library.accumulate_dtype(input.dtype)).contiguous()

"""Argument checks that operators share."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _library

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_number(operator: str, name: str, value: float, low: float, or_equal: bool) -> float:
    """A finite number above ``low``."""
    if isinstance(value, Tensor):
        check_constant(operator, name, value)
    if not (is_number(value) and (low <= value if or_equal else low < value) and value < math.inf):
        raise ValueError(
            f"{operator}: expected {name} to be a finite number {'>=' if or_equal else '>'} {low:g}, got {value!r}"
        )
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is real and can be compared with others: a number, or a tensor that holds one."""
    if isinstance(value, Tensor):
        is_real = value.dtype in _library.FLOAT_DTYPES or value.dtype in INTEGERS
        return is_real and value.numel() == 1 and value.layout == torch.strided and not value.is_meta
    return isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt))


def check_flag(operator: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{operator}: expected {name} to be True or False, got {value!r}")
    return value


def check_constant(operator: str, name: str, tensor: Tensor) -> None:
    """An error for an argument that has no gradient but seems to be trained."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operator}: {name} has no gradient; pass {name}.detach()")


def reads_values(tensor: Tensor) -> bool:
    """Whether values are checked: those of the CPU always, others where ``PYREG_CHECKS=1`` asks for it. Not while
    tracing, nor inside of ``torch.func``, where a tensor may stand for many."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    return tensor.is_cpu or _library.checks_values()


def check_beside(operator: str, name: str, tensor: Any, like: Tensor, like_name: str) -> None:
    """An error for what is no dense tensor, or on another device than the argument ``like_name``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
    _library.check_dense(operator, name, tensor)
    if tensor.device != like.device:
        raise ValueError(
            f"{operator}: expected {name} on the device of {like_name}, {like.device}, got {tensor.device}; move it "
            f"with {name}.to({str(like.device)!r})"
        )


def check_real(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _library.FLOAT_DTYPES and tensor.dtype not in INTEGERS:
        raise TypeError(
            f"{operator}: expected {name} to hold floating numbers or integers, got {tensor.dtype}; convert it with "
            f"{name}.float()"
        )


def check_weights(operator: str, name: str, weights: Tensor) -> None:
    """Finite and at least 0, where values are read."""
    if not reads_values(weights) or weights.numel() == 0:
        return
    check_finite(operator, name, weights)
    if (least := weights.min().item()) < 0:
        raise ValueError(f"{operator}: expected {name} to be at least 0, got {least}")


def check_finite(operator: str, name: str, tensor: Tensor) -> None:
    # The sum of finite numbers is finite but for an overflow: one cheap pass.
    if math.isfinite(tensor.sum().item()):
        return
    wrong = tensor[~tensor.isfinite()]
    if wrong.numel() > 0:
        raise ValueError(f"{operator}: expected finite numbers in {name}, got {wrong[0].item()}")

"""The weight compander's public functions and operators; kernels: ``csrc/weight_compander``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyreg.reference import weight_compander as reference

KINDS = ("arctan", "arsinh", "erf")


def weight_compander(v: Tensor, a: Tensor | float, b: Tensor | float, kind: str = "arctan") -> Tensor:
    return reference.weight_compander(v, a, b, kind)


def weight_compander_inverse(
    w: Tensor, a: Tensor | float, b: Tensor | float, kind: str = "arctan", clamp: bool = False
) -> Tensor:
    return reference.inverse(w, a, b, kind)


def weight_companders(
    vs: Sequence[Tensor], a: Sequence[Tensor | float], b: Sequence[Tensor | float], kind: str
) -> list[Tensor]:
    return [reference.weight_compander(*one, kind) for one in zip(vs, a, b, strict=True)]


def to_weight_gradients_(
    grads: Sequence[Tensor],
    vs: Sequence[Tensor],
    a: Sequence[Tensor | float],
    b: Sequence[Tensor | float],
    kind: str,
    decay: float = 0.0,
    decay_on: str = "w",
) -> None:
    for one in zip(grads, vs, a, b, strict=True):
        reference.to_weight_gradient_(*one, kind, decay, decay_on)


def rescale_steps_(
    vs: Sequence[Tensor],
    old_vs: Sequence[Tensor],
    a: Sequence[Tensor | float],
    b: Sequence[Tensor | float],
    kind: str,
) -> None:
    for one in zip(vs, old_vs, a, b, strict=True):
        reference.rescale_step_(*one, kind)

"""Sinkhorn's potentials and value of points with themselves as operators, with their gradients:
:mod:`pyreg.ops._point_potentials` where y is x, b is a and g is f."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _library, _potentials
from pyreg.ops._point_plan import point_plan
from pyreg.ops._point_potentials import Needs, implicit_gradients
from pyreg.ops._potentials import Side
from pyreg.ops._symmetric_sinkhorn import symmetric_sinkhorn_self

# ---- potentials ----


def _found(
    x: Tensor,
    a: Tensor,
    rho: Tensor | None,
    epsilon: Tensor,
    first_epsilon: Tensor,
    epsilon_factor: float,
    point_cost: int,
    max_iter: int,
    tol: float,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Infinity as padding."""
    f, error, iterations = symmetric_sinkhorn_self(
        x, point_cost, a, rho, epsilon, first_epsilon, epsilon_factor, max_iter, tol
    )
    return (f if padding is None else f.masked_fill_(padding, torch.inf)), error, iterations


def _setup_potentials(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, a, rho, epsilon, _, _, ctx.point_cost, *_ = inputs
    f, error, iterations = output
    ctx.mark_non_differentiable(error, iterations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, a, rho, epsilon, f)


def _potentials_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if gradient is None:
        return None, None, *nothing
    x, a, rho, epsilon, f = ctx.saved_tensors
    side = Side(f, a, rho, epsilon, is_counting=False)
    # f is the mean of the potentials of rows and of columns, which are equal.
    need_x, need_a, *_ = ctx.needs_input_grad
    needs = Needs(need_x, need_x, need_a, need_a)
    by_x, by_y, by_a, by_b = implicit_gradients((x, x), side, side, ctx.point_cost, gradient / 2, gradient / 2, needs)
    grad_x = by_x + by_y if by_x is not None and by_y is not None else None
    grad_a = by_a + by_b if by_a is not None and by_b is not None else None
    return grad_x, grad_a, *nothing


@_library.fake("sinkhorn_self_potentials")
def _fake_potentials(x: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    error, iterations = (a.new_empty((a.shape[0],), dtype=dtype) for dtype in (torch.float64, torch.int64))
    return torch.empty_like(a), error, iterations


_library.implement("sinkhorn_self_potentials", _found)
_library.vmap_into_batch("sinkhorn_self_potentials")
self_potentials = _library.differentiable(
    "sinkhorn_self_potentials", setup_context=_setup_potentials, backward=_potentials_backward
)


# ---- value ----


def _value(x: Tensor, a: Tensor, f: Tensor, rho: Tensor | None, epsilon: Tensor, point_cost: int) -> Tensor:
    side = Side(f, a, rho, epsilon, is_counting=False)
    return _potentials.dual_value(side, side)


def _setup_value(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.point_cost = inputs
    ctx.save_for_backward(*tensors)


def _value_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """By the envelope theorem the potentials count as constants; x and a stand on both sides."""
    x, a, f, rho, epsilon = ctx.saved_tensors
    side = Side(f, a, rho, epsilon, is_counting=False)
    need_x, need_a, *_ = ctx.needs_input_grad
    by_x = by_a = None
    if need_x:
        u = (2 * gradient.unsqueeze(1) * side.factors).unsqueeze(2).to(x.dtype)
        z = side.factors.unsqueeze(2).to(x.dtype)
        potentials = side.extended, side.extended
        _, _, by_x, _ = point_plan((x, x), potentials, epsilon, ctx.point_cost, u, z, by_x=True)
    if need_a:
        by_a = 2 * gradient.unsqueeze(1) * _potentials.by_weight(side, side.weights.sum(1))
    return by_x, by_a, None, None, None, None


@_library.fake("sinkhorn_self_value")
def _fake_value(x: Tensor, a: Tensor, *_: Any) -> Tensor:
    return a.new_empty((x.shape[0],))


_library.implement("sinkhorn_self_value", _value)
_library.vmap_into_batch("sinkhorn_self_value")
self_value = _library.differentiable("sinkhorn_self_value", setup_context=_setup_value, backward=_value_backward)

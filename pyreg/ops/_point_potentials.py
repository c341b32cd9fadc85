"""Sinkhorn's potentials and value between points as operators, with their gradients: :mod:`pyreg.ops._potentials`
without a cost matrix.

Instead of the cost they take ``x [B, n, d]``, ``y [B, m, d]`` and the cost's place in ``_pairwise_cost.COSTS``; points
of cosines have length 1. Where a gradient has a matrix of E's size, here are the factors that it is the product of, and
one pass over the plan (:mod:`pyreg.ops._point_plan`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyreg.ops import _adjoint, _library, _pairwise_cost, _potentials
from pyreg.ops._point_plan import point_plan
from pyreg.ops._potentials import Side

# Entries of all problems together up to which E is held where it is multiplied many times: 8 MB.
_MOST_HELD = 1 << 20

# Bytes of all problems' costs up to which CUDA holds them, unless it is to stream: what fits into the shared memory of
# a large GPU, where the kernels of csrc/sinkhorn leave it through all iterations.
_MOST_DENSE = 32 << 20

# Rows without a weight whose potentials are found at a time.
_UNKNOWN_ROWS = 4096

Points = tuple[Tensor, Tensor]


# ---- potentials ----


def _on_cuda(x: Tensor, y: Tensor, point_cost: int, is_streaming: bool, *problem: Any) -> tuple[Tensor, ...]:
    bytes_of_costs = x.shape[0] * x.shape[1] * y.shape[1] * x.element_size()
    if _library.has_triton() and (is_streaming or bytes_of_costs > _MOST_DENSE):
        return _triton().sinkhorn_points(x, y, point_cost, is_streaming, *problem)  # type: ignore[no-any-return]
    return _library.operator("sinkhorn")(_pairwise_cost.cost_of_computed(x, y, point_cost), *problem)  # type: ignore[no-any-return]


def _triton() -> ModuleType:
    return importlib.import_module("pyreg.triton_kernels.sinkhorn_points")


def _found(
    x: Tensor,
    y: Tensor,
    point_cost: int,
    is_streaming: bool,
    a: Tensor,
    b: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    epsilon: Tensor,
    first_epsilon: Tensor,
    epsilon_factor: float,
    is_counting: bool,
    max_iter: int,
    tol: float,
    initial: Tensor,
    row_padding: Tensor | None,
    column_padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``pyreg::sinkhorn_points`` finds, without the weights, and extended to weights of 0; infinity as padding,
    ``[B, n]`` and ``[B, m]``."""
    with_a, with_b, error, iterations = _library.operator("sinkhorn_points")(
        *(x, y, point_cost, is_streaming, a, b, a.log(), b.log(), rho_a, rho_b, epsilon, first_epsilon),
        *(epsilon_factor, is_counting, max_iter, tol, initial),
    )
    rows, columns = _potentials.sides(a, b, with_a, with_b, rho_a, rho_b, epsilon, is_counting)
    f = without_weights((x, y), point_cost, rows, with_b, row_padding)
    return f, without_weights((y, x), point_cost, columns, with_a, column_padding), error, iterations


def without_weights(points: Points, point_cost: int, side: Side, others: Tensor, padding: Tensor | None) -> Tensor:
    is_unknown = side.potentials == -torch.inf
    if padding is not None:
        is_unknown = is_unknown & ~padding
    if others.is_cpu:
        result = _filled(points, point_cost, side, others, is_unknown)
    elif _library.has_triton():
        result = _filled_without_waiting(points, point_cost, side, others, is_unknown)
    else:
        result = _potentials.without_weights(_pairwise_cost.cost_of_computed(*points, point_cost), side, others)
    return result if padding is None else result.masked_fill_(padding, torch.inf)


def _filled(points: Points, point_cost: int, side: Side, others: Tensor, is_unknown: Tensor) -> Tensor:
    result = side.bare
    for index in is_unknown.any(1).nonzero().flatten().tolist():
        for rows in torch.split(is_unknown[index].nonzero().flatten(), _UNKNOWN_ROWS):
            sums = _log_sums(points[0][index, rows], points[1][index], point_cost, others[index], side.epsilon[index])
            result[index, rows] = -side.kappa[index, rows] * sums
    return result


def _filled_without_waiting(points: Points, point_cost: int, side: Side, others: Tensor, is_unknown: Tensor) -> Tensor:
    sums = _triton().log_sums(*points, point_cost, others, side.epsilon, is_unknown)
    return torch.where(is_unknown, -side.kappa * sums, side.bare)


def _log_sums(x: Tensor, y: Tensor, point_cost: int, others: Tensor, epsilon: Tensor) -> Tensor:
    """``eps log sum_j exp((G_j - C_ij) / eps)``: rows of weight 1 after one iteration, by a change of sign."""
    epsilon = epsilon.view(1)
    ones = others.new_ones(1, len(x)), others.new_ones(1, len(y))
    zeros = others.new_zeros(1, len(x)), others.new_zeros(1, len(y))
    f, *_ = _library.operator("sinkhorn_points")(
        *(x.unsqueeze(0), y.unsqueeze(0), point_cost, True, *ones, *zeros, None, None, epsilon, epsilon),
        *(0.5, False, 1, 0.0, others.unsqueeze(0)),
    )
    return -f.squeeze(0)  # type: ignore[no-any-return]


def _setup_potentials(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, ctx.point_cost, _, a, b, rho_a, rho_b, epsilon, _, _, ctx.is_counting, *_ = inputs
    f, g, error, iterations = output
    ctx.mark_non_differentiable(error, iterations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, a, b, rho_a, rho_b, epsilon, f, g)


def _potentials_backward(ctx: Any, grad_f: Tensor | None, grad_g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 11
    if grad_f is None and grad_g is None:
        return (None,) * 6 + nothing
    x, y, a, b, rho_a, rho_b, epsilon, f, g = ctx.saved_tensors
    row, column = _potentials.sides(a, b, f, g, rho_a, rho_b, epsilon, ctx.is_counting)
    grad_f, grad_g = (
        torch.zeros_like(potentials) if gradient is None else gradient
        for gradient, potentials in ((grad_f, f), (grad_g, g))
    )
    need_x, need_y, _, _, need_a, need_b, *_ = ctx.needs_input_grad
    needs = Needs(need_x, need_y, need_a, need_b)
    grad_x, grad_y, grad_a, grad_b = implicit_gradients((x, y), row, column, ctx.point_cost, grad_f, grad_g, needs)
    return grad_x, grad_y, None, None, grad_a, grad_b, *nothing


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    y: bool
    a: bool
    b: bool


def implicit_gradients(
    points: Points, row: Side, column: Side, point_cost: int, grad_f: Tensor, grad_g: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """By x, y, a and b, of what has these gradients by potentials that are a fixed point."""
    x, y = points
    epsilon, extended = row.epsilon, (row.extended, column.extended)
    row_factors, column_factors = row.factors, column.factors
    p, q = _solve_adjoint(
        *(x.double(), y.double(), *extended, epsilon, row_factors, column_factors, row.kappa, column.kappa),
        *(grad_f, grad_g, point_cost, False),
    )
    u, z = torch.stack([p, row_factors], 2), torch.stack([column_factors, q], 2)
    asked = {"rows": needs.a, "columns": needs.b, "by_x": needs.x, "by_y": needs.y}
    rows, columns, by_x, by_y = point_plan((x.double(), y.double()), extended, epsilon, point_cost, u, z, **asked)
    grad_a = grad_b = None
    if needs.a:
        grad_a = -epsilon.unsqueeze(1) * rows[..., 1] * _potentials.derivative_of_factors(row)
    if needs.b:
        grad_b = -epsilon.unsqueeze(1) * columns[..., 0] * _potentials.derivative_of_factors(column)
    return (by_x.to(x.dtype) if needs.x else None), (by_y.to(y.dtype) if needs.y else None), grad_a, grad_b


@_library.fake("sinkhorn_points")
@_library.fake("sinkhorn_points_potentials")
def _fake_potentials(
    x: Tensor, y: Tensor, point_cost: int, is_streaming: bool, a: Tensor, b: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _potentials.fake_potentials(x, a, b)  # type: ignore[no-any-return]


_library.implement("sinkhorn_points", _on_cuda, ["CUDA"])
_library.implement("sinkhorn_points_potentials", _found)
_library.vmap_into_batch("sinkhorn_points_potentials")
potentials = _library.differentiable(
    "sinkhorn_points_potentials", setup_context=_setup_potentials, backward=_potentials_backward
)


def conditional(x: Tensor, y: Tensor, point_cost: int, others: Tensor, epsilon: Tensor) -> Tensor:
    """Potentials under which rows of E sum to 1 beside those of the columns with ``eps log b``, ``others [B, m]``:
    those of rows of weight 1 after one iteration; constants."""
    ones = (torch.ones_like(points[..., 0], dtype=torch.float64) for points in (x, y))
    options = None, None, epsilon, epsilon, 0.5, False, 1, 0.0, others.detach(), None, None
    return potentials(x, y, point_cost, True, *ones, *options)[0].detach()  # type: ignore[no-any-return]


# ---- value ----


def _value(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    epsilon: Tensor,
    point_cost: int,
    is_counting: bool,
) -> Tensor:
    return _potentials.dual_value(*_potentials.sides(a, b, f, g, rho_a, rho_b, epsilon, is_counting))


def _setup_value(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.point_cost, ctx.is_counting = inputs
    ctx.save_for_backward(*tensors)


def _value_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, y, a, b, f, g, rho_a, rho_b, epsilon = ctx.saved_tensors
    row, column = _potentials.sides(a, b, f, g, rho_a, rho_b, epsilon, ctx.is_counting)
    needs = Needs(*ctx.needs_input_grad[:4])
    return *value_gradients((x, y), row, column, ctx.point_cost, gradient, needs), *(None,) * 7


def value_gradients(
    points: Points,
    row: Side,
    column: Side,
    point_cost: int,
    gradient: Tensor,
    needs: Needs,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """By x, y, a and b; ``over_ranks`` sums what there is of rows in several processes."""
    dtype = points[0].dtype
    by_x = by_y = grad_a = grad_b = None
    if needs.x or needs.y:
        u = (gradient.unsqueeze(1) * row.factors).unsqueeze(2).to(dtype)
        z = column.factors.unsqueeze(2).to(dtype)
        extended = row.extended, column.extended
        _, _, *pulls = point_plan(points, extended, row.epsilon, point_cost, u, z, by_x=needs.x, by_y=needs.y)
        by_x, by_y = (pull if is_needed else None for pull, is_needed in zip(pulls, needs[:2], strict=True))
        if by_y is not None and over_ranks is not None:
            by_y = over_ranks(by_y)
    if needs.a:
        grad_a = gradient.unsqueeze(1) * _potentials.by_weight(row, column.weights.sum(1))
    if needs.b:
        mass = row.weights.sum(1)
        mass = mass if over_ranks is None else over_ranks(mass)
        grad_b = gradient.unsqueeze(1) * _potentials.by_weight(column, mass)
    return by_x, by_y, grad_a, grad_b


@_library.fake("sinkhorn_points_value")
def _fake_value(x: Tensor, y: Tensor, a: Tensor, *_: Any) -> Tensor:
    return a.new_empty((x.shape[0],))


_library.implement("sinkhorn_points_value", _value)
_library.vmap_into_batch("sinkhorn_points_value")
value = _library.differentiable("sinkhorn_points_value", setup_context=_setup_value, backward=_value_backward)


# ---- the adjoint equations ----


class _Streamed(NamedTuple):
    """E, formed anew for every product."""

    points: Points
    potentials: tuple[Tensor, Tensor]
    epsilon: Tensor
    point_cost: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.points[0].shape[0], self.points[0].shape[1], self.points[1].shape[1]

    @property
    def mT(self) -> _Streamed:
        return self._replace(points=self.points[::-1], potentials=self.potentials[::-1])

    def times(self, vector: Tensor) -> Tensor:
        z = vector.unsqueeze(2)
        return point_plan(self.points, self.potentials, self.epsilon, self.point_cost, z=z, rows=True)[0].squeeze(2)

    def scaled(self, rows: Tensor, columns: Tensor) -> _Streamed:
        f, g = (
            potentials + self.epsilon.unsqueeze(1) * factors.log()
            for potentials, factors in zip(self.potentials, (rows, columns), strict=True)
        )
        return self._replace(potentials=(f, g))


def _solve(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, *problem_and_options: Any
) -> tuple[Tensor, Tensor]:
    row_factors, column_factors, row_kappas, column_kappas, rows, columns, point_cost, transposed = problem_and_options
    matrix: _adjoint.Matrix = _Streamed((x, y), (f, g), epsilon, point_cost)
    if x.shape[0] * x.shape[1] * y.shape[1] <= _MOST_HELD:
        costs = _pairwise_cost.cost_of_computed(x, y, point_cost)
        matrix = _adjoint.Held(_potentials.exponential_plan(costs, f, g, epsilon, x.dtype))
    return _adjoint.solve_with(
        matrix, row_factors, column_factors, row_kappas, column_kappas, rows, columns, transposed
    )


def _setup_adjoint(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.point_cost, ctx.transposed = inputs
    ctx.save_for_backward(*tensors, *output)


def _adjoint_backward(ctx: Any, grad_p: Tensor, grad_q: Tensor) -> tuple[Tensor | None, ...]:
    """As of :mod:`pyreg.ops._adjoint`, where the gradient of E is ``-u z^T`` here."""
    x, y, f, g, epsilon, row_factors, column_factors, row_kappas, column_kappas, p, q = ctx.saved_tensors
    s, t = _solve_adjoint(
        *(x, y, f, g, epsilon, row_factors, column_factors, row_kappas, column_kappas, grad_p, grad_q),
        *(ctx.point_cost, not ctx.transposed),
    )
    grad_rows, grad_columns = s, t
    if ctx.transposed:
        s, t, p, q = p, q, s, t
    by_row, by_column = s * p / row_kappas, t * q / column_kappas
    u = torch.stack([by_row, row_factors * s, row_factors, p], 2)
    z = torch.stack([column_factors, q, by_column, column_factors * t], 2)
    everything = {"rows": True, "columns": True, "by_x": True, "by_y": True}
    rows, columns, by_x, by_y = point_plan((x, y), (f, g), epsilon, ctx.point_cost, u, z, **everything)
    per_exponent = 1 / epsilon.view(-1, 1)
    grad_row_factors = -(s * rows[..., 1] + rows[..., 2])
    grad_column_factors = -(t * columns[..., 3] + columns[..., 0])
    return (
        *(by_x * per_exponent.unsqueeze(2), by_y * per_exponent.unsqueeze(2)),
        *(-(u * rows).sum(2) * per_exponent, -(z * columns).sum(2) * per_exponent, None),
        *(grad_row_factors, grad_column_factors, None, None, grad_rows, grad_columns, None, None),
    )


@_library.fake("sinkhorn_points_adjoint")
def _fake_adjoint(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(arguments[9]), torch.empty_like(arguments[10])


_library.implement("sinkhorn_points_adjoint", _solve)
_library.vmap_into_batch("sinkhorn_points_adjoint")
_solve_adjoint = _library.differentiable(
    "sinkhorn_points_adjoint", setup_context=_setup_adjoint, backward=_adjoint_backward
)

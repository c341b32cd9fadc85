r"""Sinkhorn's potentials, value and plan on a dense cost as operators, with their gradients.

Everything here is of a batch of problems, ``[B, ...]``, and in one form for both references: with weights ``w = a`` for
"product" and ``w = a^kappa`` for "counting", ``v`` of b likewise, the potentials are the fixed point of

.. code-block:: text

    f_i = -kappa_i eps log sum_j v_j exp((g_j - C_ij) / eps)        g_j the same with the roles exchanged
    P_ij = w_i v_j exp((f_i + g_j - C_ij) / eps)

which has a meaning at weights of 0 too. Let ``E`` be the plan with weights of 0 counted as 1, so that ``P = A E B``
with factors A, B of 1, or 0 where the weight is: they carry the weights' derivatives, ``dA = dw / w``.

Implicit differentiation: with ``r = E B 1`` the fixed point's differential is

.. code-block:: text

    df_i = kappa_i / r_i sum_j E_ij (B_j dC_ij - B_j dg_j - eps dB_j)

and likewise dg with ``c = E^T A 1``. A function of f and g with gradients ``f'`` and ``g'`` then has the gradients

.. code-block:: text

    dC_ij = E_ij (p_i B_j + A_i q_j),    dA_i = -eps sum_j E_ij q_j,    dB_j = -eps sum_i E_ij p_i

where p and q solve the adjoint equations of :mod:`pyreg.ops._adjoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyreg import _extension
from pyreg.ops import _adjoint, _checks, _library, _log_domain


@dataclass(frozen=True)  # torch 2.10 traces no properties of a NamedTuple
class Side:
    """The rows of a batch of problems, or its columns."""

    potentials: Tensor  # [B, n], which leave the weights out
    weights: Tensor  # [B, n]
    rho: Tensor | None  # [B, n], none: all infinite
    epsilon: Tensor  # [B]
    is_counting: bool

    @property
    def kappa(self) -> Tensor:
        return torch.ones_like(self.weights) if self.rho is None else 1 / (1 + self.epsilon.unsqueeze(1) / self.rho)

    @property
    def powers(self) -> Tensor:
        """What stands for the weights in the form above, ``a`` or ``a^kappa``. Where a is 0, the derivative of the
        latter is infinite below kappa 1, and counted as 0."""
        if not self.is_counting or self.rho is None:
            return self.weights
        kappa, positive = self.kappa, self.weights > 0
        at_zero = torch.where(kappa == 1, self.weights, 0)
        return torch.where(positive, torch.where(positive, self.weights, 1) ** kappa, at_zero)

    @property
    def factors(self) -> Tensor:
        """A: 1 or 0."""
        powers = self.powers
        return powers / _or_one(powers).detach()

    @property
    def extended(self) -> Tensor:
        """Potentials of the plan itself, with ``eps log w``, those of weights of 0 as if it were 1."""
        result = self.potentials + self.epsilon.unsqueeze(1) * _or_one(self.powers).detach().log()
        return result.masked_fill(result == torch.inf, -torch.inf)  # who may go nowhere does not

    @property
    def conditional(self) -> Tensor:
        """Potentials under which E's rows have the same direction and sum to 1, once those of the columns have been
        found: rows of next to no mass have digits too."""
        return (self.potentials / self.kappa).masked_fill(self.potentials == torch.inf, -torch.inf)

    @property
    def bare(self) -> Tensor:
        """The potentials without the weights, where they hold ``eps log w``."""
        return self.potentials - self.epsilon.unsqueeze(1) * _or_one(self.powers).log()

    @property
    def masked(self) -> Tensor:
        """The same, minus infinity for weights of 0."""
        return self.extended.masked_fill(self.weights == 0, -torch.inf)

    @property
    def public(self) -> Tensor:
        """The potentials of the reference: of "counting" with ``kappa eps log a``."""
        if not self.is_counting:
            return self.potentials
        result = self.potentials + self.kappa * self.epsilon.unsqueeze(1) * _or_one(self.weights).log()
        return result.masked_fill(self.weights == 0, -torch.inf)

    @property
    def penalised(self) -> Tensor:
        """``phi(f) = f``, or ``-rho (exp(-f / rho) - 1)``."""
        f = self.public
        if self.rho is None:
            return f
        is_finite = self.rho < torch.inf
        rho = torch.where(is_finite, self.rho, 1)
        return torch.where(is_finite, -rho * torch.expm1(-torch.where(is_finite, f, 0) / rho), f)

    @property
    def kept(self) -> Tensor:
        """The share of the weight that a marginal has kept where its potentials have just been brought up to date:
        ``exp(-f / rho)``."""
        if self.rho is None:
            return torch.ones_like(self.weights)
        return torch.exp(-self.public.masked_fill(self.rho == torch.inf, 0) / self.rho)

    def sum(self, values: Tensor) -> Tensor:
        """``[B]``, over the weights; one of 0 adds nothing, be its value infinite."""
        result = (self.weights * values).sum(1)
        if result.is_cpu and _are_finite(result):
            return result
        return (self.weights * values.masked_fill((self.weights == 0) & values.isinf(), 0)).sum(1)


def sides(
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    epsilon: Tensor,
    is_counting: bool,
) -> tuple[Side, Side]:
    return Side(f, a, rho_a, epsilon, is_counting), Side(g, b, rho_b, epsilon, is_counting)


def _are_finite(numbers: Tensor) -> bool:
    """Whether they can be seen to be, by one cheap pass."""
    return _checks.reads_values(numbers) and math.isfinite(numbers.sum().item())


def _or_one(weights: Tensor) -> Tensor:
    return torch.where(weights > 0, weights, 1)


def plan(cost: Tensor, row: Side, column: Side, dtype: torch.dtype | None = None) -> Tensor:
    """``P [B, n, m]``, in the cost's dtype; differentiable in all that the sides hold."""
    dtype = dtype or cost.dtype
    result: Tensor
    if not torch.is_grad_enabled():
        result = exponential_plan(cost, row.masked, column.masked, row.epsilon, dtype)
        return result
    result = exponential_plan(cost, row.extended, column.extended, row.epsilon, dtype)
    return result * row.factors.unsqueeze(2).to(dtype) * column.factors.unsqueeze(1).to(dtype)


# ---- exp((F + G - C) / eps) ----

# Beyond it E is not taken: it has a larger number only between two weights of 0.
LARGEST_EXPONENT = {torch.float64: 600.0, torch.float32: 80.0}

# Entries whose exponents are formed in float64 at a time, whose digits the difference needs: few enough to stay in a
# processor's cache, enough to fill a GPU.
_CPU_BLOCK, _GPU_BLOCK = 1 << 16, 1 << 24


def _exponential_plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    result = _library.empty(tuple(cost.shape), dtype, cost)
    largest = LARGEST_EXPONENT[dtype]
    for problems, rows in _blocks(cost):
        exponents = f[problems, rows].unsqueeze(2) - cost[problems, rows]
        exponents += g[problems].unsqueeze(1)
        exponents /= epsilon[problems].view(-1, 1, 1)
        result[problems, rows] = exponents.clamp_(max=largest).to(dtype).exp_()
    return result


def _blocks(cost: Tensor) -> Iterator[tuple[slice, slice]]:
    """Problems and rows."""
    batch, n, m = cost.shape
    entries = _CPU_BLOCK if cost.is_cpu else _GPU_BLOCK
    problems = min(max(entries // max(n * m, 1), 1), max(batch, 1))
    rows = n if problems > 1 else min(max(entries // max(m, 1), 1), n)
    for first in range(0, batch, problems):
        for row in range(0, n, rows):
            yield slice(first, first + problems), slice(row, row + rows)


def _setup_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cost, _, _, epsilon, _ = inputs
    ctx.save_for_backward(output, epsilon)
    ctx.cost_dtype = cost.dtype


def _plan_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    result, epsilon = ctx.saved_tensors
    by_exponent = gradient * result / epsilon.view(-1, 1, 1).to(result.dtype)
    by_cost, by_f, by_g, *_ = ctx.needs_input_grad
    return (
        -by_exponent.to(ctx.cost_dtype) if by_cost else None,
        by_exponent.sum(2, dtype=epsilon.dtype) if by_f else None,
        by_exponent.sum(1, dtype=epsilon.dtype) if by_g else None,
        None,
        None,
    )


@_library.fake("sinkhorn_plan")
def _fake_plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    return cost.new_empty(cost.shape, dtype=dtype)


_library.implement("sinkhorn_plan", _exponential_plan)
_library.vmap_into_batch("sinkhorn_plan")
exponential_plan = _library.differentiable("sinkhorn_plan", setup_context=_setup_plan, backward=_plan_backward)


# ---- potentials ----


def _potentials(
    cost: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``pyreg::sinkhorn`` finds, without the weights, and extended to weights of 0."""
    log_a, log_b = a.log(), b.log()
    found = _library.operator("sinkhorn")(
        *(cost, a, b, log_a, log_b, rho_a, rho_b, epsilon, first_epsilon, epsilon_factor, is_counting),
        *(max_iter, tol, initial),
    )
    with_a, with_b, error, iterations = found
    if rho_a is None and rho_b is None and cost.is_cpu:
        f, g = with_a - epsilon.unsqueeze(1) * log_a, with_b - epsilon.unsqueeze(1) * log_b
        if _are_finite(f) and _are_finite(g):  # no weight is 0
            return f, g, error, iterations
    rows, columns = sides(a, b, with_a, with_b, rho_a, rho_b, epsilon, is_counting)
    f = without_weights(cost, rows, with_b)
    return f, without_weights(cost.mT, columns, with_a), error, iterations


def without_weights(cost: Tensor, side: Side, others: Tensor) -> Tensor:
    """``[B, n]`` from the potentials F with ``eps log w`` that the side has for now, and those of the other side."""
    result = side.bare
    fill = _fill_unknown if cost.is_cpu else _fill_unknown_without_waiting
    fill(result, side.potentials == -torch.inf, cost, others, -side.kappa * side.epsilon.unsqueeze(1), side.epsilon)
    return result


def _fill_unknown(
    result: Tensor, is_unknown: Tensor, cost: Tensor, others: Tensor, scale: Tensor, epsilon: Tensor
) -> None:
    """``scale_i log sum_j exp((G_j - C_ij) / eps)`` for rows without a weight, or without anywhere to go."""
    unknown = is_unknown.nonzero(as_tuple=True)
    if len(unknown[0]) > 0:
        exponents = (others[unknown[0]] - cost[unknown]) / epsilon[unknown[0]].unsqueeze(1)
        result[unknown] = scale[unknown] * exponents.logsumexp(1)


def _fill_unknown_without_waiting(
    result: Tensor, is_unknown: Tensor, cost: Tensor, others: Tensor, scale: Tensor, epsilon: Tensor
) -> None:
    """The same, for a GPU: of all rows, since which they are is known there alone."""
    for problems, rows in _blocks(cost):
        exponents = (others[problems].unsqueeze(1) - cost[problems, rows]) / epsilon[problems].view(-1, 1, 1)
        found = scale[problems, rows] * exponents.logsumexp(2)
        result[problems, rows] = torch.where(is_unknown[problems, rows], found, result[problems, rows])


def _setup_potentials(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, rho_a, rho_b, epsilon, *_ = inputs
    f, g, error, iterations = output
    ctx.mark_non_differentiable(error, iterations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cost, a, b, rho_a, rho_b, epsilon, f, g)
    ctx.is_counting = inputs[8]


def _potentials_backward(ctx: Any, grad_f: Tensor | None, grad_g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if grad_f is None and grad_g is None:
        return None, None, None, *nothing
    cost, a, b, rho_a, rho_b, epsilon, f, g = ctx.saved_tensors
    row, column = sides(a, b, f, g, rho_a, rho_b, epsilon, ctx.is_counting)
    extended = exponential_plan(cost, row.extended, column.extended, epsilon, torch.float64)
    row_factors, column_factors = row.factors, column.factors
    grad_f, grad_g = (
        torch.zeros_like(potentials) if gradient is None else gradient
        for gradient, potentials in ((grad_f, f), (grad_g, g))
    )
    p, q = _adjoint.solve(extended, row_factors, column_factors, row.kappa, column.kappa, grad_f, grad_g, False)
    by_cost, by_a, by_b, *_ = ctx.needs_input_grad
    grad_cost = grad_a = grad_b = None
    if by_cost:
        grad_cost = p.unsqueeze(2) * column_factors.unsqueeze(1) + row_factors.unsqueeze(2) * q.unsqueeze(1)
        grad_cost = (grad_cost * extended).to(cost.dtype)
    if by_a:
        by_factor = -epsilon.unsqueeze(1) * (extended @ q.unsqueeze(2)).squeeze(2)
        grad_a = by_factor * derivative_of_factors(row)
    if by_b:
        by_factor = -epsilon.unsqueeze(1) * (extended.mT @ p.unsqueeze(2)).squeeze(2)
        grad_b = by_factor * derivative_of_factors(column)
    return grad_cost, grad_a, grad_b, *nothing


def derivative_of_factors(side: Side) -> Tensor:
    """``dA / da``; the w that A divides by is a constant, as in E."""
    powers = side.powers
    scale = 1 / _or_one(powers).detach()
    if not side.is_counting or side.rho is None:
        return scale
    kappa = side.kappa
    return torch.where(side.weights > 0, kappa * powers / _or_one(side.weights) * scale, (kappa == 1) * scale)


@_library.fake("sinkhorn")
@_library.fake("sinkhorn_potentials")
def fake_potentials(cost: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, ...]:
    error, iterations = (a.new_empty((a.shape[0],), dtype=dtype) for dtype in (torch.float64, torch.int64))
    return torch.empty_like(a), torch.empty_like(b), error, iterations


if _extension.CUDA.state != "loaded":
    _library.implement("sinkhorn", _log_domain.sinkhorn, ["CUDA"])
_library.implement("sinkhorn_potentials", _potentials)
_library.vmap_into_batch("sinkhorn_potentials")
potentials = _library.differentiable(
    "sinkhorn_potentials", setup_context=_setup_potentials, backward=_potentials_backward
)


# ---- value ----


def dual_value(row: Side, column: Side, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The dual, where the columns' potentials are the last to have been brought up to date: their marginal is known.
    ``over_ranks`` sums what there is of rows in several processes."""
    over_ranks = over_ranks or (lambda numbers: numbers)
    of_columns = column.weights.sum(1)
    mass = of_columns if column.rho is None else column.sum(column.kept)
    if not row.is_counting:
        mass = mass - over_ranks(row.weights.sum(1)) * of_columns
    return over_ranks(row.sum(row.penalised)) + column.sum(column.penalised) - row.epsilon * mass


def _value(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    epsilon: Tensor,
    is_counting: bool,
) -> Tensor:
    return dual_value(*sides(a, b, f, g, rho_a, rho_b, epsilon, is_counting))


def _setup_value(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, is_counting = inputs
    ctx.save_for_backward(*tensors)
    ctx.is_counting = is_counting


def _value_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """By the envelope theorem potentials count as constants: nothing of the first order flows to them."""
    cost, a, b, f, g, rho_a, rho_b, epsilon = ctx.saved_tensors
    row, column = sides(a, b, f, g, rho_a, rho_b, epsilon, ctx.is_counting)
    by_cost, by_a, by_b, *_ = ctx.needs_input_grad
    grad_cost = None
    if by_cost:
        grad_cost = plan(cost, row, column) * gradient.view(-1, 1, 1).to(cost.dtype)
    grad_a = gradient.unsqueeze(1) * by_weight(row, column.weights.sum(1)) if by_a else None
    grad_b = gradient.unsqueeze(1) * by_weight(column, row.weights.sum(1)) if by_b else None
    return grad_cost, grad_a, grad_b, None, None, None, None, None, None


def by_weight(side: Side, others: Tensor) -> Tensor:
    """``phi(f_i)``, and for "product" ``- eps (sum_j P_ij / a_i - sum_j b_j)``; ``others [B]`` is the last sum."""
    if side.is_counting:
        return side.penalised
    return side.penalised - side.epsilon.unsqueeze(1) * (side.kept - others.unsqueeze(1))


@_library.fake("sinkhorn_value")
def _fake_value(cost: Tensor, a: Tensor, *_: Any) -> Tensor:
    return a.new_empty((cost.shape[0],))


_library.implement("sinkhorn_value", _value)
_library.vmap_into_batch("sinkhorn_value")
value = _library.differentiable("sinkhorn_value", setup_context=_setup_value, backward=_value_backward)

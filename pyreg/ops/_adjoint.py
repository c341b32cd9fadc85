r"""The linear equations of Sinkhorn's implicit derivatives, as an operator with its own derivative.

.. code-block:: text

    r_i / kappa_i p_i + A_i sum_j E_ij q_j = u_i        r = E B 1
    B_j sum_i E_ij p_i + c_j / lambda_j q_j = v_j       c = E^T A 1

of a batch, ``E [B, n, m]``, held or not, factors A, B of 1 or 0, and the matrix transposed where asked for. Unknowns
of factor 0 follow from the others, or before them; the others' matrix ``[r / kappa, P; P^T, c / lambda]`` is symmetric
and positive, but for a constant ``(p + t, q - t)`` that is free where no marginal has a penalty. Right sides that
gradients lead to have solutions there too; the one that is taken has no part along the constant in the scaled form
below.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyreg.ops import _convergence, _library

# Beyond, n^2 m operations take longer than the conjugate gradients' n m each iteration.
_MOST_DIRECT = 512

_TOLERANCE = 1e-13  # of the residual's norm
_MOST_ITERATIONS = 2000
_BETWEEN_CHECKS = 20  # each of which waits for a GPU


class Matrix(Protocol):
    """E ``[B, n, m]``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def mT(self) -> Matrix: ...

    def times(self, vector: Tensor) -> Tensor: ...

    def scaled(self, rows: Tensor, columns: Tensor) -> Matrix:
        """``rows_i E_ij columns_j``."""
        ...


class Held(NamedTuple):
    plan: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.shape

    @property
    def mT(self) -> Held:
        return Held(self.plan.mT)

    def times(self, vector: Tensor) -> Tensor:
        return _times(self.plan, vector)

    def scaled(self, rows: Tensor, columns: Tensor) -> Held:
        return Held(self.plan * rows.unsqueeze(2) * columns.unsqueeze(1))


def solve_with(
    matrix: Matrix,
    row_factors: Tensor,
    column_factors: Tensor,
    row_kappas: Tensor,
    column_kappas: Tensor,
    rows: Tensor,
    columns: Tensor,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    by_row = _inverse(matrix.times(column_factors) / row_kappas)
    by_column = _inverse(matrix.mT.times(row_factors) / column_kappas)
    has_row, has_column = row_factors > 0, column_factors > 0
    is_free = ((row_kappas == 1) | ~has_row).all(1) & ((column_kappas == 1) | ~has_column).all(1)
    by_active_row, by_active_column = by_row * has_row, by_column * has_column
    if transposed:
        p, q = _solve_positive(matrix, by_active_row, by_active_column, is_free, rows, columns)
        p_rest = by_row * (rows - matrix.times(q))
        q_rest = by_column * (columns - matrix.mT.times(p))
    else:
        p_rest, q_rest = by_row * rows, by_column * columns
        from_rows = matrix.mT.times(torch.where(has_row, 0, p_rest))
        from_columns = matrix.times(torch.where(has_column, 0, q_rest))
        active = rows - from_columns, columns - from_rows
        p, q = _solve_positive(matrix, by_active_row, by_active_column, is_free, *active)
    return torch.where(has_row, p, p_rest), torch.where(has_column, q, q_rest)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, 0 for a row or column that has no mass at all."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1), 0)


def _solve_positive(
    matrix: Matrix, by_row: Tensor, by_column: Tensor, is_free: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Where both factors are 1; 0 elsewhere. The longer side is eliminated, the shorter scaled to a unit diagonal:

        (1 - K K^T) y = rows / s - K (columns / t),   K = P / (s t),  s = sqrt(r / kappa),  t = sqrt(c / lambda)

    by_row and by_column are 1 / s^2 and 1 / t^2. The constant, y = s, is taken out where it is free.
    """
    if matrix.shape[1] > matrix.shape[2]:
        q, p = _solve_positive(matrix.mT, by_column, by_row, is_free, columns, rows)
        return p, q
    by_s, by_t = by_row.sqrt(), by_column.sqrt()
    constant = _inverse(by_s) * is_free.unsqueeze(1)
    constant = constant * _inverse(torch.linalg.vector_norm(constant, dim=1, keepdim=True))
    kernel = matrix.scaled(by_s, by_t)
    right = by_s * rows - kernel.times(by_t * columns)
    right = right - constant * (constant * right).sum(1, keepdim=True)
    if isinstance(kernel, Held) and kernel.shape[1] <= _MOST_DIRECT:
        y = _direct(kernel, right)
    else:
        y = _conjugate_gradients(kernel, right)
    y = y - constant * (constant * y).sum(1, keepdim=True)
    z = by_t * columns - kernel.mT.times(y)
    return by_s * y, by_t * z


def _apply(kernel: Matrix, y: Tensor) -> Tensor:
    return y - kernel.times(kernel.mT.times(y))


def _direct(kernel: Held, right: Tensor) -> Tensor:
    """By Cholesky's factors of the matrix and a little of the identity, for it may be singular, which a second step
    on the residual makes up for."""
    count = kernel.shape[1]
    ridge = 8 * count * torch.finfo(right.dtype).eps
    identity = torch.eye(count, dtype=right.dtype, device=right.device)
    factor = torch.linalg.cholesky_ex((1 + ridge) * identity - kernel.plan @ kernel.plan.mT).L
    y = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    return y + torch.cholesky_solve((right - _apply(kernel, y)).unsqueeze(2), factor).squeeze(2)


def _conjugate_gradients(kernel: Matrix, right: Tensor) -> Tensor:
    y, residual, direction = torch.zeros_like(right), right, right
    squares = residual.square().sum(1, keepdim=True)
    goal = _TOLERANCE**2 * squares
    for iteration in range(_MOST_ITERATIONS):
        image = _apply(kernel, direction)
        curvature = (direction * image).sum(1, keepdim=True)
        # A problem that is done stays as it is: its squares, and what is divided by, may be 0.
        going = (squares > goal) & (curvature > 0)
        step = torch.where(going, squares / torch.where(going, curvature, 1), 0)
        y = y + step * direction
        residual = residual - step * image
        new_squares = torch.where(going, residual.square().sum(1, keepdim=True), squares)
        direction = torch.where(going, residual + new_squares / torch.where(going, squares, 1) * direction, direction)
        squares = new_squares
        if iteration % _BETWEEN_CHECKS == 0 and not bool(going.any()):
            break
    else:
        left = (squares / goal).max().sqrt().item() * _TOLERANCE
        _convergence.warn(
            f"sinkhorn: the gradient through potentials is not solved for: {_MOST_ITERATIONS} conjugate gradients left "
            f"a residual of {left:.1e}; raise epsilon, or take gradients of value, which need no solution"
        )
    return y


# ---- the operator ----


def _solve(plan: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return solve_with(Held(plan), *arguments)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    plan, row_factors, column_factors, row_kappas, column_kappas, *_, transposed = inputs
    ctx.save_for_backward(plan, row_factors, column_factors, row_kappas, column_kappas, *output)
    ctx.transposed = transposed


def _backward(ctx: Any, grad_p: Tensor, grad_q: Tensor) -> tuple[Tensor | None, ...]:
    """Of the solution of ``H x = y``: ``y' = H^-T x'``, and of what H is made of the gradient of ``-y'^T H x``."""
    plan, row_factors, column_factors, row_kappas, column_kappas, p, q = ctx.saved_tensors
    s, t = solve(
        *(plan, row_factors, column_factors, row_kappas, column_kappas, grad_p, grad_q),
        not ctx.transposed,
    )
    grad_rows, grad_columns = s, t
    if ctx.transposed:
        s, t, p, q = p, q, s, t
    by_row, by_column = s * p / row_kappas, t * q / column_kappas
    grad_plan = -(
        by_row.unsqueeze(2) * column_factors.unsqueeze(1)
        + (row_factors * s).unsqueeze(2) * q.unsqueeze(1)
        + row_factors.unsqueeze(2) * by_column.unsqueeze(1)
        + p.unsqueeze(2) * (column_factors * t).unsqueeze(1)
    )
    grad_row_factors = -(s * _times(plan, q) + _times(plan, by_column))
    grad_column_factors = -(t * _times(plan.mT, p) + _times(plan.mT, by_row))
    return grad_plan, grad_row_factors, grad_column_factors, None, None, grad_rows, grad_columns, None


@_library.fake("sinkhorn_adjoint")
def _fake(
    plan: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    row_kappas: Tensor,
    column_kappas: Tensor,
    rows: Tensor,
    columns: Tensor,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(columns)


_library.implement("sinkhorn_adjoint", _solve)
_library.vmap_into_batch("sinkhorn_adjoint")
solve = _library.differentiable("sinkhorn_adjoint", setup_context=_setup, backward=_backward)

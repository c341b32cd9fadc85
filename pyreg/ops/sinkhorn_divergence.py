"""The Sinkhorn divergence between point clouds.

The problem between x and y is :func:`pyreg.functional.sinkhorn_points`; those of x and of y with themselves take the
symmetric iteration (:mod:`pyreg.ops._symmetric_sinkhorn`), on one half of the pairs. Definition:
:mod:`pyreg.reference.sinkhorn_divergence`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyreg.ops import sinkhorn
from pyreg.ops._point_cost import PointCost
from pyreg.ops._potentials import Side
from pyreg.ops._problems import Entries, Problems
from pyreg.ops._self_potentials import self_potentials, self_value
from pyreg.ops._transport import Progress
from pyreg.ops._transport_problem import Number, Options, solve_sides

_NAME = "sinkhorn_divergence"


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: sinkhorn.Cost = "sqeuclidean",
    epsilon: Number | None = None,
    relative_epsilon: float | None = None,
    rho: float | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    epsilon_scaling: float | None = None,
    x_offsets: sinkhorn.Offsets | None = None,
    y_offsets: sinkhorn.Offsets | None = None,
    streaming: bool | None = None,
) -> Tensor:
    r"""The debiased cost of entropic optimal transport between point clouds: 0 where they are equal, and above 0
    elsewhere.

    .. code-block:: text

        S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + epsilon / 2 (sum a - sum b)^2
        OT(x, y) = min_P  <P, C> + epsilon KL(P | a b^T) + rho KL(P 1 | a) + rho KL(P^T 1 | b)

    OT is the value of :func:`sinkhorn_points`; with x and y on both sides its two potentials are one, and half of the
    pairs are enough.

    Args:
        x, y: points ``[n, d]`` and ``[m, d]``, or ``[..., n, d]`` and ``[..., m, d]``, a batch of independent problems;
            float64, float32, bfloat16 or float16.
        a, b: weights ``[n]`` or ``[..., n]`` and ``[m]`` or ``[..., m]`` of the points' dtype, at least 0; 1 / n and
            1 / m by default. Their sums must be equal but for a finite rho.
        cost: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"``, or a function of points that returns their costs, as
            of :func:`sinkhorn_points`; they are held then, and under some costs the divergence is below 0.
        epsilon: above 0; a number, or a tensor ``[...]`` with one for each problem. That of geomloss's ``blur`` is
            ``2 blur^2`` for ``"sqeuclidean"``, whose divergence is twice geomloss's, and ``blur`` for ``"euclidean"``.
        relative_epsilon: in place of epsilon, which then is this many times the mean cost between x and y.
        rho: above 0, the penalty of marginals that do not hold; ``inf`` and None: they must.
        max_iter, tol, epsilon_scaling, x_offsets, y_offsets, streaming: as of :func:`sinkhorn_points`, for each of the
            three problems.

    Returns:
        ``[...]``, of the points' dtype, float32 for 16-bit ones; ``[B]`` of a ragged batch. Rounding of three values
        of the size of the costs is in it, each of which is summed in float64.

    Gradient:
        With respect to ``x``, ``y``, ``a`` and ``b``, to any order. The first by the envelope theorem,
        ``dS/dx_i = sum_j P_ij dC(x_i, y_j)/dx_i - sum_j Q_ij dC(x_i, x_j)/dx_i`` with the plans P between x and y and Q
        of x with itself; the second by the implicit function theorem.

    Raises:
        ValueError, TypeError: as of :func:`sinkhorn_points`.

    Warns:
        pyreg.transport.ConvergenceWarning: ``max_iter`` iterations have not brought the marginals' error down to
            ``tol``. On CUDA that look waits for the GPU; with ``tol=0`` there is none.

    Source: Genevay, Peyre, Cuturi, "Learning Generative Models with Sinkhorn Divergences", AISTATS 2018, arXiv
    1706.00292; Feydy, Sejourne, Vialard, Amari, Trouve, Peyre, "Interpolating between Optimal Transport and MMD using
    Sinkhorn Divergences", AISTATS 2019, arXiv 1810.08278; Sejourne, Feydy, Vialard, Trouve, Peyre, "Sinkhorn
    Divergences for Unbalanced Optimal Transport", arXiv 1910.12958.

    Example:
        >>> x, y = torch.randn(50, 2, requires_grad=True), torch.randn(60, 2)
        >>> pyreg.functional.sinkhorn_divergence(x, y, epsilon=0.1).backward()
    """
    sinkhorn.check_cost(_NAME, cost, streaming, x_offsets, y_offsets)
    sinkhorn.check_points(_NAME, x, y)
    penalty, like = _penalty(rho), x
    problems = sinkhorn.problems_of_points(_NAME, x, y, x_offsets, y_offsets)
    options = Options(
        a, b, epsilon, relative_epsilon, penalty, penalty, "product", max_iter, tol, epsilon_scaling, None
    )
    x, y = sinkhorn.computed(x), sinkhorn.computed(y)
    between = sinkhorn.cost_between(_NAME, x, y, cost, problems, streaming)
    row, column, progress = solve_sides(_NAME, between, problems, options, like, "x")
    progress.warn(_NAME)
    if isinstance(between, PointCost):
        selves = _self_values(between.points, (row, column), problems, between.code, progress)
    else:
        selves = (
            _value_of_function(cost, x, problems.rows, row, options._replace(b=a), like),
            _value_of_function(cost, y, problems.columns, column, options._replace(a=b), like),
        )
    masses = row.weights.sum(1) - column.weights.sum(1)
    divergence = between.value(row, column) - sum(selves) / 2 + row.epsilon / 2 * masses.square()
    return problems.numbers(divergence).to(between.dtype)


def _value_of_function(
    cost: sinkhorn.Cost, x: Tensor, entries: Entries, side: Side, options: Options, like: Tensor
) -> Tensor:
    """``[B]``, of points with themselves, by the iteration that alternates: nothing is known of the cost."""
    problems = Problems(entries.shape[:-1], entries, entries)
    own = sinkhorn.cost_between(_NAME, x, x, cost, problems, None)
    options = options._replace(epsilon=problems.numbers(side.epsilon), relative_epsilon=None)
    row, column, progress = solve_sides(_NAME, own, problems, options, like, "x")
    progress.warn(_NAME)
    return own.value(row, column)


def _penalty(rho: float | None) -> float:
    if rho is None:
        return math.inf
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not rho > 0:
        raise ValueError(f"{_NAME}: expected rho to be a number above 0, inf or None, got {rho!r}")
    return float(rho)


def _self_values(
    points: tuple[Tensor, Tensor], sides: tuple[Side, Side], problems: Problems, code: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """``[B]`` each. Clouds of as many points are one batch: small problems share the threads, or a launch."""
    (x, y), (row, column) = points, sides
    row_padding, column_padding = problems.rows.padding, problems.columns.padding
    if x.shape == y.shape and row_padding is None and column_padding is None:
        both = torch.cat([row.weights, column.weights])
        rho = None if row.rho is None or column.rho is None else torch.cat([row.rho, column.rho])
        side = Side(both, both, rho, torch.cat([row.epsilon, column.epsilon]), is_counting=False)
        of_x, of_y = _self_value(torch.cat([x, y]), side, None, code, progress).chunk(2)
        return of_x, of_y
    return (
        _self_value(x, row, row_padding, code, progress),
        _self_value(y, column, column_padding, code, progress),
    )


def _self_value(x: Tensor, side: Side, padding: Tensor | None, code: int, progress: Progress) -> Tensor:
    """``[B]``; the side's potentials are not those."""
    a, rho, epsilon, x = side.weights, side.rho, side.epsilon, x.contiguous()
    # The averaged step halves the error at least: no stages of epsilon.
    f, error, iterations = self_potentials(
        x, a, rho, epsilon, epsilon, 0.5, code, progress.max_iter, progress.tol, padding
    )
    Progress(error, iterations, progress.tol, progress.max_iter).warn(_NAME)
    return self_value(x, a, f, rho, epsilon, code)  # type: ignore[no-any-return]

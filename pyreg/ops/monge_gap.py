"""The Monge gap of a map on a batch of points: its public function.

Transport, and its gradient in one pass over the pairs: :mod:`pyreg.ops.sinkhorn`. Definition:
:mod:`pyreg.reference.monge_gap`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyreg.ops import _checks
from pyreg.ops._dense_cost import DenseCost
from pyreg.ops._point_cost import PointCost
from pyreg.ops._problems import Entries, Problems
from pyreg.ops._transport import exact_value
from pyreg.ops._transport_problem import Number, Options, Start, solve
from pyreg.ops.sinkhorn import Cost, check_cost, check_points, computed, cost_between

# As OTT-JAX has it.
DEFAULT_SHARE_OF_DEVIATION = 0.05


def monge_gap(
    source: Tensor,
    mapped: Tensor,
    *,
    epsilon: Number | None = None,
    relative_epsilon: float | None = None,
    cost: Cost = "sqeuclidean",
    max_iter: int = 2000,
    tol: float = 1e-3,
    epsilon_scaling: float | None = None,
    init: Start | None = None,
    streaming: bool | None = None,
) -> Tensor:
    r"""The Monge gap of the map T that takes ``source`` to ``mapped``: by how much it moves points at a higher cost
    than is needed to move them to the same places. To be added to a loss that fits T to its targets.

    .. code-block:: text

        gap = 1/n sum_i c(x_i, T(x_i)) - W
        W = min <P, C> - epsilon H(P)      H(P) = -sum P log P,   C_ij = c(x_i, T(x_j)),   P 1 = P^T 1 = 1/n

    which is ``-epsilon / n sum_i log P_ii`` of the optimal P. The plan that moves each point by T has the entropy
    log n: the gap is at least ``epsilon log n``, 0 for one point, and for an optimal T goes to 0 with epsilon. ``W`` is
    ``sinkhorn_points(source, mapped).value - 2 epsilon log n``. An iteration that ends early gives a gap that is too
    large, never one that is too small.

    Args:
        source: points ``x [n, d]``, or ``[..., n, d]``, a batch of independent problems; float64, float32, bfloat16 or
            float16.
        mapped: ``T(x)``, of the same shape, dtype and device.
        epsilon: above 0; a number, or a tensor ``[...]`` with one for each problem. By default, as in OTT-JAX, a
            twentieth of the standard deviation of all of the problem's costs. The gap grows with epsilon, so that
            gaps compare at the same epsilon only.
        relative_epsilon: in place of epsilon, which then is this many times the mean of the problem's costs: OTT-JAX's
            ``relative_epsilon="mean"``.
        cost: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"``, or a function of points that returns their costs
            ``[..., n, n]``; as of :func:`~pyreg.functional.sinkhorn_points`. The displacement's costs are the diagonal
            of what a function returns.
        max_iter, tol, epsilon_scaling, streaming: as of :func:`~pyreg.functional.sinkhorn_points`; the defaults of the
            first two are OTT-JAX's.
        init: as there: the potentials of a similar problem, as of the step before.

    Returns:
        ``[...]``, of the dtype of ``source``, float32 for 16 bits. Iterations are made in that dtype, the two terms
        are summed and subtracted in float64. Never negative: what rounding takes below ``epsilon log n`` is given back.

    Gradient:
        With respect to ``source`` and ``mapped``, to any order; epsilon is a constant, also where it is found from the
        costs. By the envelope theorem ``dW/dC = P``: one pass over the pairs gives both,
        ``dgap/dx_i = 1/n dc(x_i, T(x_i))/dx_i - sum_j P_ij dC_ij/dx_i``. That of ``"euclidean"`` is 0 where two points
        meet, that of ``"cosine"`` at 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options that do not fit; the message says what was expected.
        ValueError: NaN or infinite coordinates; without an epsilon, costs that are all the same, as those of a single
            point are. These are looked for on the CPU in eager calls, and on CUDA where ``PYREG_CHECKS=1`` in the
            environment asks for it, at the price of waiting for the GPU.

    Warns:
        pyreg.transport.ConvergenceWarning: ``max_iter`` iterations have not brought the marginals' error down to
            ``tol``. On CUDA that look waits for the GPU; with ``tol=0`` there is none.

    Source: Uscidda, Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML 2023, arXiv 2302.04953.

    Example:
        >>> x, y = torch.randn(64, 2), torch.randn(64, 2) + 1
        >>> model = torch.nn.Linear(2, 2)
        >>> mapped = model(x)
        >>> fitting = pyreg.functional.sinkhorn_points(mapped, y, relative_epsilon=0.05).value
        >>> (fitting + pyreg.functional.monge_gap(x, mapped)).backward()
    """
    operator, names = "monge_gap", ("source", "mapped")
    check_cost(operator, cost, streaming)
    check_points(operator, source, mapped, names)
    if source.shape != mapped.shape:
        raise ValueError(
            f"{operator}: expected mapped of the shape of source, {list(source.shape)}, its points one by one, got "
            f"{list(mapped.shape)}"
        )
    batch, n = tuple(source.shape[:-2]), source.shape[-2]
    problems = Problems(batch, Entries((*batch, n)), Entries((*batch, n)))
    between = cost_between(operator, computed(source), computed(mapped), cost, problems, streaming)
    if epsilon is None and relative_epsilon is None:
        epsilon = problems.numbers(_default_epsilon(between))
    options = Options(
        *(None, None, epsilon, relative_epsilon, None, None, "product", max_iter, tol, epsilon_scaling, init)
    )
    transport = solve(operator, between, problems, options, source, "source")

    displacement = problems.numbers(between.paired().mean(1))
    least = transport.epsilon * _log(n, transport.epsilon)
    gap = displacement - exact_value(transport) + 2 * least
    lost = (least - gap.detach()).clamp(min=0)
    return (gap + lost).to(between.dtype)


def _log(count: int, like: Tensor) -> Tensor | float:
    """Of a size, which in an exported program is no number."""
    return like.new_full((), count).log() if torch.compiler.is_exporting() else math.log(count)


def _default_epsilon(cost: DenseCost | PointCost) -> Tensor:
    """``[B]``, float64."""
    deviation = cost.deviation()
    if _checks.reads_values(deviation) and not bool((deviation > 0).all()):
        raise ValueError(
            "monge_gap: expected costs that differ, of which epsilon is a share by default, got costs that are all the "
            "same; give epsilon"
        )
    return DEFAULT_SHARE_OF_DEVIATION * deviation

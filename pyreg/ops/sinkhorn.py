"""Entropic optimal transport: the public functions and their argument checks.

Kernels: ``csrc/sinkhorn`` and ``csrc/point_plan``; between points on CUDA ``triton_kernels/sinkhorn_points.py`` and
``triton_kernels/point_plan.py``, or torch's own operators where Triton is not there. Operators and gradients:
:mod:`pyreg.ops._potentials` and :mod:`pyreg.ops._point_potentials`. The result: :mod:`pyreg.ops._transport`.
Definition: :mod:`pyreg.reference.sinkhorn`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pyreg.ops import _checks, _library, _pairwise_cost, _ranks
from pyreg.ops._dense_cost import DenseCost
from pyreg.ops._options import CostName, Reference
from pyreg.ops._point_cost import PointCost
from pyreg.ops._point_shards import ShardedEntries, ShardedPointCost
from pyreg.ops._problems import Entries, Problems, RaggedEntries
from pyreg.ops._transport import Transport
from pyreg.ops._transport_problem import Number, Options, Start, solve, solve_sides

Offsets = Tensor | Sequence[int]
Cost = CostName | Callable[[Tensor, Tensor], Tensor]


# ---- public functions ----


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: Number | None = None,
    relative_epsilon: float | None = None,
    rho_a: Number | None = None,
    rho_b: Number | None = None,
    reference: Reference = "product",
    max_iter: int = 1000,
    tol: float = 1e-6,
    epsilon_scaling: float | None = None,
    init: Start | None = None,
) -> Transport:
    r"""Entropic optimal transport under a cost matrix, by Sinkhorn's iteration.

    .. code-block:: text

        minimise  <P, C> + epsilon H(P) + rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b)

        reference "product":   H(P) = KL(P | a b^T)          P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
        reference "counting":  H(P) = sum P log P - P        P_ij = exp((f_i + g_j - C_ij) / epsilon)

    with ``KL(p | q) = sum p log(p / q) - p + q``. Where rho is infinite, the default, the marginal must hold; with both
    finite the problem is unbalanced, with one semi-relaxed. A problem without finite rho has the same plan for either
    reference.

    Args:
        cost: ``[n, m]`` or ``[..., n, m]``, a batch of independent problems; float64, float32, bfloat16 or float16.
            ``+inf`` forbids a pair.
        a, b: weights ``[n]`` or ``[..., n]`` and ``[m]`` or ``[..., m]`` of the cost's dtype, at least 0, those of 0
            being as good as absent; 1 / n and 1 / m by default. Of a problem without finite rho their sums must be
            equal; what rounding leaves of a difference is taken out of b.
        epsilon: above 0; a number, or a tensor ``[...]`` with one for each problem.
        relative_epsilon: in place of epsilon, which then is this many times the mean of the problem's finite costs.
        rho_a, rho_b: penalties, above 0, of marginals that do not hold; a number, or a tensor ``[n]`` or ``[..., n]``
            (``[m]``, ``[..., m]``) with one for each entry. ``inf`` and None: the marginal must hold.
        reference: ``"product"`` or ``"counting"``, see above.
        max_iter: at least 1; the iterations of all stages of epsilon.
        tol: what :attr:`~pyreg.transport.Transport.marginal_error` has to come down to; 0 makes all iterations, and
            warns of nothing.
        epsilon_scaling: a factor between 0 and 1: the first iterations are made at an epsilon of the cost's range,
            which is multiplied by the factor every few of them until it is epsilon. Small epsilons come near their
            solution in a fraction of the iterations so; the last digits take as many as without.
        init: where to begin: the :class:`~pyreg.transport.Transport` of a similar problem, or potentials ``(f, g)`` as
            it has them.

    Returns:
        :class:`~pyreg.transport.Transport`, which has the value, the potentials, the plan and what is computed with it.
        Iterations are made in float64 for float64 costs and in float32 otherwise, potentials and value kept in float64.

    Gradient:
        Of everything in the result with respect to ``cost``, ``a`` and ``b``, to any order; ``epsilon`` and the
        penalties are constants. ``value`` by the envelope theorem, ``dvalue/dC = P`` and, for "product",
        ``dvalue/da_i = phi(f_i) - epsilon exp(-f_i / rho_a) + epsilon sum b`` with ``phi(f) = f``, or
        ``-rho_a (exp(-f / rho_a) - 1)``, for "counting" ``phi(f_i)``; without finite rho, those by a and b are known up
        to a constant that is added to one and taken from the other. The rest, and second derivatives of ``value``, by
        the implicit function theorem in float64: one linear system of the smaller of n and m, solved directly up to
        512, by conjugate gradients beyond.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options that do not fit; the message says what was expected.
        ValueError: NaN or ``-inf`` in the cost, a row or column without a finite cost whose weight must be
            transported; weights that are negative, NaN, infinite, all 0, or of different sums where both marginals
            must hold. These are looked for on the CPU in eager calls, and on CUDA where ``PYREG_CHECKS=1`` in the
            environment asks for it, at the price of waiting for the GPU.

    Warns:
        pyreg.transport.ConvergenceWarning: ``max_iter`` iterations have not brought ``marginal_error`` down to ``tol``.

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv 1306.0895; Chizat, Peyre, Schmitzer, Vialard, "Scaling
    Algorithms for Unbalanced Transport Problems", arXiv 1607.05816.

    Example:
        >>> transport = pyreg.functional.sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.5)
        >>> transport.value, transport.plan()
        (tensor(0.2831), tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]]))
    """
    _library.check_float("sinkhorn", "cost", cost)
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ValueError(
            "sinkhorn: expected cost of shape [n, m] or [..., n, m] with at least one row and one column, got "
            f"{list(cost.shape)}"
        )
    _check_device("sinkhorn", "cost", cost)
    batch = tuple(cost.shape[:-2])
    problems = Problems(batch, Entries((*batch, cost.shape[-2])), Entries((*batch, cost.shape[-1])))
    options = Options(*(a, b, epsilon, relative_epsilon, rho_a, rho_b, reference, max_iter, tol, epsilon_scaling, init))
    inside = computed(cost).reshape(-1, *cost.shape[-2:]).contiguous()
    return solve("sinkhorn", DenseCost(inside), problems, options, cost, "cost")


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: Cost = "sqeuclidean",
    epsilon: Number | None = None,
    relative_epsilon: float | None = None,
    rho_a: Number | None = None,
    rho_b: Number | None = None,
    reference: Reference = "product",
    max_iter: int = 1000,
    tol: float = 1e-6,
    epsilon_scaling: float | None = None,
    init: Start | None = None,
    x_offsets: Offsets | None = None,
    y_offsets: Offsets | None = None,
    streaming: bool | None = None,
    group: dist.ProcessGroup | bool | None = None,
) -> Transport:
    r"""Entropic optimal transport between point clouds: :func:`sinkhorn` under a cost of their points.

    .. code-block:: text

        "sqeuclidean"  C_ij = |x_i - y_j|^2
        "euclidean"    C_ij = |x_i - y_j|
        "cosine"       C_ij = 1 - x_i . y_j / (|x_i| |y_j|),  1 for a point at 0

    Args:
        x, y: points ``[n, d]`` and ``[m, d]``, or ``[..., n, d]`` and ``[..., m, d]``, a batch of independent problems;
            float64, float32, bfloat16 or float16.
        a, b: weights ``[n]`` or ``[..., n]`` and ``[m]`` or ``[..., m]`` of the points' dtype.
        cost: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"``, or a function of ``x [..., n, d]`` and
            ``y [..., m, d]`` that returns their costs ``[..., n, m]`` in their dtype: a matrix that is held, through
            which gradients flow by autograd. It gets 16-bit points in float32, and autocast is off inside.
        x_offsets, y_offsets: of a ragged batch, B + 1 ascending integers from 0 to N: x ``[N, d]`` has the points of
            all problems, those of problem k at ``x_offsets[k]`` to ``x_offsets[k + 1]``. Weights, potentials and what
            else is ``[..., n]`` are ``[N]`` then; numbers, and epsilon where it is a tensor, are ``[B]``. Tensors are
            read, which waits for a GPU.
        streaming: the matrix that an iteration multiplies with, ``exp((f + g - C) / epsilon)``, is formed anew each
            time (True), or held (False). By default it is held up to 128 MB, and from 8 dimensions on, where forming it
            takes long, up to a quarter of the memory that is left; on CUDA up to 32 MB of all problems, for more of it
            is not held whatever is asked for. All that is not the iteration, gradients included,
            needs O((n + m) d) memory in any case, but for ``Transport.plan()``.
        epsilon, relative_epsilon, rho_a, rho_b, reference, max_iter, tol, epsilon_scaling, init: as of
            :func:`sinkhorn`.
        group: a process group of :mod:`torch.distributed`, or True for the default one, whose ranks share the rows:
            ``x``, ``a`` and ``rho_a`` are this rank's, of any number above 0, everything else is the same on every
            rank. The problem is that of all rows together. Ranks exchange m numbers an iteration; the matrix is formed
            anew in each.

    Returns:
        :class:`~pyreg.transport.Transport`; its ``barycentric_map()`` needs no points, its ``map()`` takes new ones. Of
        ``group`` what goes with rows is that of this rank's rows, and everything else that of all rows: all ranks have
        to ask for ``marginals``, ``apply_transpose()`` and ``transport_cost()`` together.

    Gradient:
        With respect to ``x``, ``y``, ``a`` and ``b``, to any order, as of :func:`sinkhorn`:
        ``dvalue/dx_i = sum_j P_ij dC_ij/dx_i``. That of ``"euclidean"`` is 0 where two points meet, that of
        ``"cosine"`` at 0. Of ``group`` only ``value`` has one, of first order, on the condition that every rank has the
        same upstream gradient: that of ``y`` and ``b`` then is the whole one on every rank.

    Raises:
        ValueError, TypeError: as of :func:`sinkhorn`; dimensions of points that differ or are 0, clouds without points,
            NaN or infinite coordinates, offsets that do not fit; a function for cost that does not return such costs,
            or comes with offsets or ``streaming=True``.

    Warns:
        pyreg.transport.ConvergenceWarning: as of :func:`sinkhorn`.

    Source: as of :func:`sinkhorn`.

    Example:
        >>> x, y = torch.randn(50, 2, requires_grad=True), torch.randn(60, 2)
        >>> pyreg.functional.sinkhorn_points(x, y, epsilon=0.1).value.backward()
    """
    operator = "sinkhorn_points"
    options = Options(*(a, b, epsilon, relative_epsilon, rho_a, rho_b, reference, max_iter, tol, epsilon_scaling, init))
    if group is not None:
        _library.check_float(operator, "x", x)
        members = _ranks.process_group(operator, group, x)
        if members is not None:
            _check_shared(operator, cost, streaming, x_offsets, y_offsets)
            return _solve_together(operator, x, y, cost, options, members)
    check_cost(operator, cost, streaming, x_offsets, y_offsets)
    check_points(operator, x, y)
    problems = problems_of_points(operator, x, y, x_offsets, y_offsets)
    between = cost_between(operator, computed(x), computed(y), cost, problems, streaming)
    return solve(operator, between, problems, options, x, "x", problems.columns.inside(computed(y)))


def _check_shared(
    operator: str, cost: Cost, streaming: bool | None, x_offsets: Offsets | None, y_offsets: Offsets | None
) -> None:
    """What cannot be had with group; arguments that are the same on every rank."""
    check_cost(operator, cost, streaming, x_offsets, y_offsets)
    if callable(cost):
        raise ValueError(
            f"{operator}: expected cost to be 'sqeuclidean', 'euclidean' or 'cosine' with group, got a function"
        )
    for name, given in (("x_offsets", x_offsets), ("y_offsets", y_offsets)):
        if given is not None:
            raise ValueError(f"{operator}: expected no {name} with group; pad problems with points of weight 0")
    if streaming is False:
        raise ValueError(f"{operator}: expected streaming=True or None with group, got False; no matrix is held there")


def _solve_together(
    operator: str, x: Tensor, y: Tensor, cost: Cost, options: Options, group: dist.ProcessGroup
) -> Transport:
    """Of rows that the ranks of a group share."""
    rows = ShardedEntries(operator, tuple(x.shape[:-1]), group, x.device)
    rows.agree(lambda: check_points(operator, x, y))
    problems = Problems(tuple(x.shape[:-2]), rows, Entries(tuple(y.shape[:-1])))
    rows.check_alike(problems, x.shape[-1], x.dtype)
    points = rows.inside(computed(x)), problems.columns.inside(computed(y))
    between = ShardedPointCost(operator, *points, str(cost), problems)
    row, column, progress = solve_sides(operator, between, problems, options, x, "x")
    return Transport(operator, between, *between.guarded(row, column), progress, problems, points[1])


# ---- arguments ----


def computed(tensor: Tensor) -> Tensor:
    """In the dtype that is computed in."""
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor


def _check_device(operator: str, name: str, tensor: Tensor) -> None:
    if not _library.has_kernel(tensor):
        raise ValueError(
            f"{operator}: expected {name} on the CPU or CUDA, got {tensor.device}; move it with {name}.cpu()"
        )


def check_cost(
    operator: str,
    cost: Cost,
    streaming: bool | None,
    x_offsets: Offsets | None = None,
    y_offsets: Offsets | None = None,
) -> None:
    """What costs between points may be, and how the iteration may be made."""
    if not callable(cost) and cost not in _pairwise_cost.COSTS:
        raise ValueError(
            f"{operator}: expected cost to be 'sqeuclidean', 'euclidean', 'cosine' or a function of points, got "
            f"{cost!r}"
        )
    if streaming is not None and not isinstance(streaming, bool):
        raise TypeError(f"{operator}: expected streaming to be True, False or None, got {streaming!r}")
    if callable(cost) and streaming:
        raise ValueError(
            f"{operator}: expected cost to be 'sqeuclidean', 'euclidean' or 'cosine' with streaming=True, got a "
            "function, whose costs are held; leave streaming out"
        )
    if callable(cost) and (x_offsets is not None or y_offsets is not None):
        given = "y_offsets" if x_offsets is None else "x_offsets"
        raise ValueError(
            f"{operator}: expected cost to be 'sqeuclidean', 'euclidean' or 'cosine' with {given}, got a function; "
            "solve the problems one by one, or pad them with points of weight 0"
        )


def cost_between(
    operator: str, x: Tensor, y: Tensor, cost: Cost, problems: Problems, streaming: bool | None
) -> DenseCost | PointCost:
    """Of points in the dtype that is computed in."""
    if isinstance(cost, str):
        points = problems.rows.inside(x), problems.columns.inside(y)
        return PointCost(*points, cost, problems, streaming)
    with _library.no_autocast(x):
        costs = cost(x, y)
    if not isinstance(costs, Tensor):
        raise TypeError(f"{operator}: expected cost to return a tensor, got {type(costs).__name__}")
    expected = (*x.shape[:-1], y.shape[-2])
    if costs.shape != expected:
        raise ValueError(
            f"{operator}: expected cost to return costs of shape [..., n, m] = {list(expected)}, got "
            f"{list(costs.shape)}"
        )
    if costs.dtype != x.dtype or costs.device != x.device:
        raise TypeError(
            f"{operator}: expected cost to return costs of {x.dtype} on {x.device}, as its points are, got "
            f"{costs.dtype} on {costs.device}; end it with .to(x)"
        )
    return DenseCost(costs.reshape(-1, *costs.shape[-2:]).contiguous())


def check_points(operator: str, x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> None:
    """Points that a cost may be taken between; errors call them by the names given."""
    x_name, y_name = names
    for name, points, symbol in ((x_name, x, "n"), (y_name, y, "m")):
        _library.check_float(operator, name, points)
        _check_device(operator, name, points)
        if points.dim() < 2 or 0 in points.shape[-2:]:
            raise ValueError(
                f"{operator}: expected {name} of shape [{symbol}, d] or [..., {symbol}, d] with at least one point of "
                f"at least one dimension, got {list(points.shape)}"
                + ("; use unsqueeze(1) for points on a line" if points.dim() == 1 else "")
            )
        if _checks.reads_values(points):
            _checks.check_finite(operator, name, points)
    if y.device != x.device:
        raise ValueError(
            f"{operator}: expected {y_name} on the device of {x_name}, {x.device}, got {y.device}; move it with "
            f"{y_name}.to({x_name}.device)"
        )
    if y.dtype != x.dtype:
        raise TypeError(
            f"{operator}: expected {y_name} of the dtype of {x_name}, {x.dtype}, got {y.dtype}; convert it with "
            f"{y_name}.to({x_name}.dtype)"
        )
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{operator}: expected {x_name} [..., n, d] and {y_name} [..., m, d] with the same batch and dimension, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )


def problems_of_points(
    operator: str, x: Tensor, y: Tensor, x_offsets: Offsets | None, y_offsets: Offsets | None
) -> Problems:
    if x_offsets is None and y_offsets is None:
        batch = tuple(x.shape[:-2])
        return Problems(batch, Entries((*batch, x.shape[-2])), Entries((*batch, y.shape[-2])))
    if x_offsets is None or y_offsets is None:
        given = "y_offsets" if x_offsets is None else "x_offsets"
        raise ValueError(f"{operator}: expected x_offsets and y_offsets together, got {given} alone")
    rows = _offsets(operator, "x_offsets", x_offsets, x, "x")
    columns = _offsets(operator, "y_offsets", y_offsets, y, "y")
    if len(rows) != len(columns):
        raise ValueError(
            f"{operator}: expected as many y_offsets as x_offsets, {len(rows)}, got {len(columns)}; there is one more "
            "than there are problems"
        )
    return Problems((len(rows) - 1,), RaggedEntries(rows, x.device), RaggedEntries(columns, y.device))


def _offsets(operator: str, name: str, offsets: Offsets, points: Tensor, of: str) -> list[int]:
    if points.dim() != 2:
        raise ValueError(f"{operator}: expected {of} of shape [N, d] with {name}, got {list(points.shape)}")
    values: list[int] | None = None
    if isinstance(offsets, Tensor):
        if offsets.dim() == 1 and offsets.dtype in _checks.INTEGERS and offsets.layout == torch.strided:
            values = None if offsets.is_meta else offsets.tolist()
    elif isinstance(offsets, Sequence):
        values = list(offsets)
    if values is None or not all(type(value) is int for value in values):
        raise TypeError(f"{operator}: expected {name} to be integers [B + 1], got {offsets!r}")
    ascends = all(begin < end for begin, end in itertools.pairwise(values))
    if len(values) < 2 or values[0] != 0 or values[-1] != len(points) or not ascends:
        raise ValueError(
            f"{operator}: expected {name} to ascend from 0 to the number of points in {of}, {len(points)}, with at "
            f"least one point in each problem, got {values}"
        )
    return values

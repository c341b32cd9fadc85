"""Entropic optimal transport: the public functions and their argument checks.

Kernels: ``csrc/sinkhorn``. Operators and gradients: :mod:`pyreg.ops._potentials`. The result:
:mod:`pyreg.ops._transport`. Definition: :mod:`pyreg.reference.sinkhorn`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _contrastive, _library, _potentials
from pyreg.ops._transport import Batch, DenseCost, Progress, Transport

REFERENCES = ("product", "counting")

# Weights of a problem whose marginals must hold may have sums that differ by their rounding.
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Number = float | Tensor
Potentials = Transport | tuple[Tensor, Tensor]


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
    reference: str = "product",
    max_iter: int = 1000,
    tol: float = 1e-6,
    epsilon_scaling: float | None = None,
    init: Potentials | None = None,
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
        tol: what :attr:`Transport.marginal_error` has to come down to; 0 makes all iterations.
        epsilon_scaling: a factor between 0 and 1: the first iterations are made at an epsilon of the cost's range,
            which is multiplied by the factor every few of them until it is epsilon. Small epsilons converge much sooner
            so.
        init: where to begin: the :class:`Transport` of a similar problem, or potentials ``(f, g)`` as it has them.

    Returns:
        :class:`Transport`, which has the value, the potentials, the plan and what is computed with it. Iterations are
        made in float64 for float64 costs and in float32 otherwise, potentials and value kept in float64.

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
        >>> x, y = torch.randn(50, 2), torch.randn(60, 2)
        >>> transport = pyreg.functional.sinkhorn(torch.cdist(x, y), epsilon=0.1)
        >>> transport.value, transport.plan().shape
        (tensor(0.3120), torch.Size([50, 60]))
    """
    operator = "sinkhorn"
    _check_cost(operator, cost)
    return _solve(
        operator,
        cost,
        (a, b),
        epsilon=epsilon,
        relative_epsilon=relative_epsilon,
        rhos=(rho_a, rho_b),
        reference=reference,
        max_iter=max_iter,
        tol=tol,
        epsilon_scaling=epsilon_scaling,
        init=init,
    )


# ---- from public arguments to the operator's ----


def _solve(
    operator: str,
    cost: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    *,
    epsilon: Number | None,
    relative_epsilon: float | None,
    rhos: tuple[Number | None, Number | None],
    reference: str,
    max_iter: int,
    tol: float,
    epsilon_scaling: float | None,
    init: Potentials | None,
    points: tuple[Tensor, Tensor] | None = None,
) -> Transport:
    batch = Batch(tuple(cost.shape[:-2]), cost.shape[-2], cost.shape[-1])
    is_counting = _check_reference(operator, reference)
    max_iter, tol = _check_iterations(operator, max_iter, tol)
    inside = cost.reshape(-1, batch.n, batch.m).contiguous()
    if inside.dtype.itemsize == 2:
        inside = inside.float()

    a, b = (
        _weights(operator, name, values, shape, cost)
        for name, values, shape in zip("ab", weights, (batch.row_shape, batch.column_shape), strict=True)
    )
    rho_a, rho_b = (
        _rho(operator, name, rho, shape, cost)
        for name, rho, shape in zip(("rho_a", "rho_b"), rhos, (batch.row_shape, batch.column_shape), strict=True)
    )
    must_hold = _both_must_hold(a, rho_a, rho_b)
    b = _of_equal_mass(operator, a, b, must_hold, cost.dtype)
    if _contrastive.reads_values(inside):
        _check_costs(operator, inside, a, b, rho_a, rho_b)
    eps = _epsilon(operator, epsilon, relative_epsilon, inside, batch.shape)
    first, factor = _first_epsilon(operator, epsilon_scaling, inside, eps)
    start = _initial(operator, init, batch, is_counting, b, eps, first)

    dense = DenseCost(inside)
    f, g, error, iterations = dense.potentials(
        a, b, rho_a, rho_b, eps, first, factor, is_counting, max_iter, tol, start
    )
    row, column = (
        _potentials.Side(potentials, mass, rho, eps, is_counting)
        for potentials, mass, rho in ((f, a, rho_a), (g, b, rho_b))
    )
    shift = torch.where(must_hold, (row.sum(f) - column.sum(g)) / (a.sum(1) + b.sum(1)), 0).unsqueeze(1)
    row, column = row._replace(potentials=f - shift), column._replace(potentials=g + shift)
    progress = Progress(error, iterations, tol, max_iter)
    return Transport(operator, dense, row, column, progress, batch, inside.dtype, points)


def _check_cost(operator: str, cost: Tensor) -> None:
    _library.check_float(operator, "cost", cost)
    if cost.dim() < 2 or 0 in cost.shape:
        raise ValueError(
            f"{operator}: expected cost of shape [n, m] or [..., n, m] with at least one row and column, got "
            f"{list(cost.shape)}"
        )
    if not _library.has_kernel(cost):
        raise ValueError(f"{operator}: expected cost on the CPU or CUDA, got {cost.device}; move it with cost.cpu()")


def _check_reference(operator: str, reference: str) -> bool:
    """Whether it is the counting one."""
    if reference not in REFERENCES:
        raise ValueError(f"{operator}: expected reference to be 'product' or 'counting', got {reference!r}")
    return reference == "counting"


def _check_iterations(operator: str, max_iter: int, tol: float) -> tuple[int, float]:
    if not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"{operator}: expected max_iter to be an integer >= 1, got {max_iter!r}")
    return max_iter, _contrastive.check_number(operator, "tol", tol, 0, or_equal=True)


def _check_like(operator: str, name: str, tensor: Any, cost: Tensor, dtype: bool) -> None:
    """An error unless the argument is a tensor on the cost's device, and of its dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.device != cost.device:
        raise ValueError(
            f"{operator}: expected {name} on the cost's device {cost.device}, got {tensor.device}; move it with "
            f"{name}.to({str(cost.device)!r})"
        )
    if dtype and tensor.dtype != cost.dtype:
        raise TypeError(
            f"{operator}: expected {name} of the cost's dtype {cost.dtype}, got {tensor.dtype}; convert it with "
            f"{name}.to({cost.dtype})"
        )


def _expanded(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``[B, n]``, float64, from ``[n]`` or ``[..., n]``."""
    symbol = "n" if name.endswith(("a", "f")) else "m"
    if tensor.dim() == 0 or tensor.dim() > len(shape) or tensor.shape != shape[len(shape) - tensor.dim() :]:
        expected = f"[{symbol}] = [{shape[-1]}]"
        if len(shape) > 1:
            expected += f" or [..., {symbol}] = {list(shape)}"
        raise ValueError(f"{operator}: expected {name} of shape {expected}, got {list(tensor.shape)}")
    return tensor.double().expand(shape).reshape(-1, shape[-1]).contiguous()


def _weights(operator: str, name: str, weights: Tensor | None, shape: tuple[int, ...], cost: Tensor) -> Tensor:
    if weights is None:
        count = shape[-1]
        return cost.new_full((math.prod(shape[:-1]), count), 1 / count, dtype=torch.float64)
    _check_like(operator, name, weights, cost, dtype=True)
    if _contrastive.reads_values(weights):
        _contrastive.check_finite(operator, name, weights)
        if (least := weights.min().item()) < 0:
            raise ValueError(f"{operator}: expected {name} to be at least 0, got {least}")
    result = _expanded(operator, name, weights, shape)
    if _contrastive.reads_values(result) and not bool(result.any(1).all()):
        raise ValueError(f"{operator}: expected {name} with a weight above 0 in every problem, got a sum of 0")
    return result


def _rho(operator: str, name: str, rho: Number | None, shape: tuple[int, ...], cost: Tensor) -> Tensor | None:
    """``[B, n]``; None where all of it is known to be infinite."""
    if rho is None:
        return None
    if isinstance(rho, Tensor):
        _check_like(operator, name, rho, cost, dtype=False)
        _contrastive.check_constant(operator, name, rho)
        if _contrastive.reads_values(rho) and not bool((rho > 0).all()):
            raise ValueError(f"{operator}: expected {name} to be above 0, got {rho[~(rho > 0)].flatten()[0].item()}")
        rho = rho.detach()
        if _contrastive.reads_values(rho) and bool((rho == math.inf).all()):
            return None
        return _expanded(operator, name, rho.expand(shape) if rho.dim() == 0 else rho, shape)
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not rho > 0:
        raise ValueError(f"{operator}: expected {name} to be a number above 0, inf or a tensor of such, got {rho!r}")
    if rho == math.inf:
        return None
    return cost.new_full((math.prod(shape[:-1]), shape[-1]), float(rho), dtype=torch.float64)


def _both_must_hold(a: Tensor, rho_a: Tensor | None, rho_b: Tensor | None) -> Tensor:
    """``[B]``: which problems have no finite penalty."""
    result = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
    for rho in (rho_a, rho_b):
        if rho is not None:
            result = result & (rho == torch.inf).all(1)
    return result


def _of_equal_mass(operator: str, a: Tensor, b: Tensor, must_hold: Tensor, dtype: torch.dtype) -> Tensor:
    """b, of a's sum where both marginals must hold."""
    masses = a.detach().sum(1), b.detach().sum(1)
    if _contrastive.reads_values(masses[0]):
        apart = must_hold & ((masses[0] - masses[1]).abs() > _MASS_TOLERANCE[dtype] * masses[0])
        if bool(apart.any()):
            of_a, of_b = (mass[apart][0].item() for mass in masses)
            raise ValueError(
                f"{operator}: expected a and b of equal sums where both marginals must hold, got {of_a:.8g} and "
                f"{of_b:.8g}; divide them by their sums, or give rho_a or rho_b"
            )
    return b * torch.where(must_hold, masses[0] / masses[1], 1).unsqueeze(1)


def _check_costs(operator: str, cost: Tensor, a: Tensor, b: Tensor, rho_a: Tensor | None, rho_b: Tensor | None) -> None:
    # The sum of finite numbers is finite but for an overflow: one cheap pass.
    if math.isfinite(cost.sum().item()):
        return
    wrong = cost[~(cost > -torch.inf)]
    if wrong.numel() > 0:
        raise ValueError(f"{operator}: expected cost without NaN and -inf, got {wrong[0].item()}; +inf forbids a pair")
    is_forbidden = cost == torch.inf
    for name, weights, rho, dim in (("a", a, rho_a, 2), ("b", b, rho_b, 1)):
        stuck = is_forbidden.all(dim) & (weights > 0)
        if rho is not None:
            stuck &= rho == torch.inf
        if bool(stuck.any()):
            problem, entry = stuck.nonzero()[0].tolist()
            line = "row" if name == "a" else "column"
            raise ValueError(
                f"{operator}: every cost in {line} {entry} of problem {problem} is infinite, but its weight "
                f"{name} = {weights[problem, entry].item():.3g} must be transported; make it 0, or give rho_{name}"
            )


def _epsilon(
    operator: str, epsilon: Number | None, relative: float | None, cost: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """``[B]``, float64."""
    if (epsilon is None) == (relative is None):
        given = "neither" if epsilon is None else "both"
        raise ValueError(f"{operator}: expected either epsilon or relative_epsilon, got {given}")
    if relative is not None:
        factor = _contrastive.check_number(operator, "relative_epsilon", relative, 0, or_equal=False)
        is_there = cost < torch.inf
        means = torch.where(is_there, cost, 0).detach().sum((1, 2), dtype=torch.float64) / is_there.sum((1, 2))
        if _contrastive.reads_values(means) and not bool((means > 0).all()):
            raise ValueError(
                f"{operator}: relative_epsilon needs costs whose mean is above 0, got {means.min().item():.3g}; "
                "give epsilon"
            )
        return factor * means
    if not isinstance(epsilon, Tensor):
        epsilon = _contrastive.check_number(operator, "epsilon", epsilon, 0, or_equal=False)  # type: ignore[arg-type]
        return cost.new_full((cost.shape[0],), epsilon, dtype=torch.float64)
    _check_like(operator, "epsilon", epsilon, cost, dtype=False)
    _contrastive.check_constant(operator, "epsilon", epsilon)
    if epsilon.dim() > len(shape) or epsilon.shape != shape[len(shape) - epsilon.dim() :]:
        raise ValueError(
            f"{operator}: expected epsilon to be a number or of the batch's shape {list(shape)}, got "
            f"{list(epsilon.shape)}"
        )
    if _contrastive.reads_values(epsilon):
        _contrastive.check_finite(operator, "epsilon", epsilon)
        if (least := epsilon.min().item()) <= 0:
            raise ValueError(f"{operator}: expected epsilon to be above 0, got {least}")
    return epsilon.detach().double().expand(shape).reshape(-1).contiguous()


def _first_epsilon(operator: str, scaling: float | None, cost: Tensor, epsilon: Tensor) -> tuple[Tensor, float]:
    """Where stages of epsilon begin, ``[B]``, and the factor between them."""
    if scaling is None:
        return epsilon, 0.5
    factor = _contrastive.check_number(operator, "epsilon_scaling", scaling, 0, or_equal=False)
    if factor >= 1:
        raise ValueError(f"{operator}: expected epsilon_scaling to be a factor between 0 and 1, got {scaling!r}")
    costs = cost.detach()
    largest = torch.where(costs < torch.inf, costs, -torch.inf).amax((1, 2))
    return torch.maximum((largest - costs.amin((1, 2))).double(), epsilon), factor


def _initial(
    operator: str,
    init: Potentials | None,
    batch: Batch,
    is_counting: bool,
    b: Tensor,
    epsilon: Tensor,
    first_epsilon: Tensor,
) -> Tensor:
    """The columns' potentials with ``eps log b`` to begin with, ``[B, m]``."""
    weights = b.detach()
    if init is None:
        return first_epsilon.unsqueeze(1) * weights.log()
    if isinstance(init, Transport):
        f, g = init.potentials()
    elif isinstance(init, tuple) and len(init) == 2 and all(isinstance(part, Tensor) for part in init):
        f, g = init
    else:
        raise TypeError(f"{operator}: expected init to be a Transport or potentials (f, g), got {type(init).__name__}")
    if f.shape != batch.row_shape or g.shape != batch.column_shape or g.device != b.device:
        raise ValueError(
            f"{operator}: expected init with f of shape {list(batch.row_shape)} and g of shape "
            f"{list(batch.column_shape)} on {b.device}, got {list(f.shape)} and {list(g.shape)} on {g.device}"
        )
    start = batch.inside_columns(g.detach()).double()
    if _contrastive.reads_values(start):
        _contrastive.check_finite(operator, "init's g", start[weights > 0])
    if not is_counting:
        start = start + epsilon.unsqueeze(1) * weights.log()
    return torch.where(weights > 0, start, -torch.inf).contiguous()

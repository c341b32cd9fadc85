r"""Sinkhorn's iteration with both potentials brought up to date at once and averaged, between points and of points with
themselves: operators without gradients.

.. code-block:: text

    f'_i = -kappa eps log sum_j b_j exp((g_j - C_ij) / eps)        g'_j the same with the roles exchanged
    f <- (f + f') / 2                                              g <- (g + g') / 2

Slopes are the gradients of the last f' and g', by kappa, each by its own point, the other potentials being constants:
``slope_i = sum_j w_ij dC_ij / dx_i`` with the softmin's weights w. They are empty where they were not asked for, and
where the kernel has none.

Kernels: ``csrc/symmetric_sinkhorn``; on CUDA ``triton_kernels/symmetric_sinkhorn.py``, or torch's own operators, in
panels of rows, where Triton is not there.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _library, _pairwise_cost

# Iterations between two looks at whether all problems are done, each of which waits for a GPU.
_BETWEEN_CHECKS = 8

# Entries of a panel: 64 MB of double for each step of its computation.
_ENTRIES = 1 << 23


# ---- by torch's operators ----


def plain(
    x: Tensor,
    y: Tensor,
    point_cost: int,
    least_square: float,
    a: Tensor,
    b: Tensor,
    epsilons: list[float],
    rho: float,
    with_self: bool,
    slope_x: bool = False,
    slope_y: bool = False,
) -> tuple[Tensor, ...]:
    """What ``pyreg::symmetric_sinkhorn`` gives; without slopes."""

    def of_problem(
        points: tuple[Tensor, Tensor], logs: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        potentials = (torch.zeros_like(logs[0]), torch.zeros_like(logs[1]))

        def after(epsilon: float) -> tuple[Tensor, Tensor]:
            kappa = 1.0 if rho == math.inf else rho / (rho + epsilon)
            epsilon_of_each = logs[0].new_full(logs[0].shape[:1], epsilon)
            others = [h + potential / epsilon for h, potential in zip(logs, potentials, strict=True)]
            f = _log_sums(points, point_cost, least_square, others[1], epsilon_of_each)
            g = _log_sums(points[::-1], point_cost, least_square, others[0], epsilon_of_each)
            return -kappa * epsilon * f, -kappa * epsilon * g

        potentials = after(epsilons[0])
        for epsilon in epsilons:
            f, g = after(epsilon)
            potentials = (potentials[0] + f) / 2, (potentials[1] + g) / 2
        return potentials, after(epsilons[-1])

    log_a, log_b = a.log(), b.log()
    (f, g), (next_f, next_g) = of_problem((x, y), (log_a, log_b))
    no_slopes = tuple(x.new_empty((0, 0, 0)) for _ in range(4))
    if not with_self:
        nothing = tuple(a.new_empty((0, 0)) for _ in range(4))
        return f, g, nothing[0], nothing[1], next_f, next_g, nothing[2], nothing[3], *no_slopes
    (f_self, _), (next_f_self, _) = of_problem((x, x), (log_a, log_a))
    (g_self, _), (next_g_self, _) = of_problem((y, y), (log_b, log_b))
    return f, g, f_self, g_self, next_f, next_g, next_f_self, next_g_self, *no_slopes


def plain_self(
    x: Tensor,
    point_cost: int,
    a: Tensor,
    rho: Tensor | None,
    epsilon: Tensor,
    first_epsilon: Tensor,
    epsilon_factor: float,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``pyreg::symmetric_sinkhorn_self`` gives."""
    current, log_a, f = torch.maximum(epsilon, first_epsilon), a.log(), torch.zeros_like(a)
    error = torch.full_like(epsilon, torch.inf)
    iterations = torch.zeros_like(epsilon, dtype=torch.int64)
    can_wait = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    for iteration in range(max_iter):
        if iteration == max_iter - 1:
            current = epsilon
        elif iteration > 0:
            current = torch.maximum(current * epsilon_factor, epsilon)
        eps = current.unsqueeze(1)
        new = -eps * _log_sums((x, x), point_cost, 0.0, log_a + f / eps, current)
        if rho is None:
            error_now = torch.where(a > 0, a * torch.expm1((f - new) / eps).abs(), 0).sum(1)
        else:
            kappa = 1 / (1 + eps / rho)
            new = kappa * new
            error_now = (a * (new - f).abs() / (kappa * eps)).sum(1)
        is_done = error <= tol
        # Where a point has no weight no other's potential follows its own: the error does not tell how far that is off.
        stepped = new if iteration == 0 else torch.where(a > 0, (f + new) / 2, new)
        f = torch.where(is_done.unsqueeze(1), f, stepped)
        iterations += ~is_done
        error = torch.where(is_done, error, torch.where(current <= epsilon, error_now, torch.inf))
        if can_wait and iteration % _BETWEEN_CHECKS == _BETWEEN_CHECKS - 1 and bool((error <= tol).all()):
            break
    return f, error, iterations


def _log_sums(
    points: tuple[Tensor, Tensor], point_cost: int, least_square: float, others: Tensor, epsilon: Tensor
) -> Tensor:
    """``log sum_j exp(others_j - C_ij / eps) [B, n]``."""
    x, y = points
    rows = max(_ENTRIES // max(x.shape[0] * y.shape[1], 1), 1)
    result = torch.empty_like(x[..., 0], dtype=torch.float64)
    for first in range(0, x.shape[1], rows):
        costs = _pairwise_cost.cost_of_computed(x[:, first : first + rows], y, point_cost)
        if _pairwise_cost.COSTS[point_cost] == "euclidean":
            costs = costs.clamp(min=math.sqrt(least_square))
        exponents = others.unsqueeze(1) - costs / epsilon.view(-1, 1, 1)  # float64, for what costs cancel
        result[:, first : first + rows] = exponents.logsumexp(2)
    return result


# ---- operators ----


def _triton() -> Any:
    return importlib.import_module("pyreg.triton_kernels.symmetric_sinkhorn")


def _on_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    if not _library.has_triton():
        return plain(*arguments)
    points = arguments[0]
    found = _triton().symmetric_sinkhorn(*arguments[:-2])
    return *found, *(points.new_empty((0, 0, 0)) for _ in range(4))


def _self_on_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    return (_triton().symmetric_sinkhorn_self if _library.has_triton() else plain_self)(*arguments)


@_library.fake("symmetric_sinkhorn_self")
def _fake_self(x: Tensor, point_cost: int, a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    error, iterations = (a.new_empty((a.shape[0],), dtype=dtype) for dtype in (torch.float64, torch.int64))
    return torch.empty_like(a), error, iterations


_library.implement("symmetric_sinkhorn", _on_cuda, ["CUDA"])
_library.implement("symmetric_sinkhorn_self", _self_on_cuda, ["CUDA"])
_library.vmap_into_batch("symmetric_sinkhorn_self")
symmetric_sinkhorn = _library.operator("symmetric_sinkhorn")
symmetric_sinkhorn_self = _library.operator("symmetric_sinkhorn_self")

"""The Monge gap: how far a map is from the cheapest way to move points to where it moves them.

    gap = 1/n sum_i c(x_i, T(x_i)) - W
    W = min <P, C> - epsilon H(P)      H(P) = -sum P log P,   C_ij = c(x_i, T(x_j)),   P 1 = P^T 1 = 1/n

Points x_i and T(x_i) in pairs, `[..., n, d]`. The plan that moves each point by T has the entropy log n, so that the
gap is at least epsilon log n; where T is optimal it goes there as epsilon goes to 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sinkhorn import pairwise_cost


def monge_gap(
    source: Tensor,
    mapped: Tensor,
    epsilon: Tensor | float | None = None,
    cost: str = "sqeuclidean",
    max_iter: int = 1000,
    tol: float = 1e-12,
) -> Tensor:
    """`[...]`, iterated until no potential moves by more than `tol epsilon`; `epsilon` a number or `[...]`, by default
    `default_epsilon`. The gradient is that of the envelope theorem: potentials and epsilon count as constants."""
    costs = pairwise_cost(source, mapped, cost)
    displacement = costs.diagonal(dim1=-2, dim2=-1).mean(-1)
    eps = torch.as_tensor(default_epsilon(costs) if epsilon is None else epsilon, dtype=costs.dtype)[..., None]
    f, g = potentials(costs.detach(), eps, max_iter, tol)
    plan = ((f.unsqueeze(-1) + g.unsqueeze(-2) - costs) / eps[..., None]).exp()
    # The dual of the minimum, where P = exp((f_i + g_j - C_ij) / eps): its marginals are the gradients by f and g.
    transport = (f + g).mean(-1) - eps.squeeze(-1) * (plan.sum((-2, -1)) - 1)
    return displacement - transport


def potentials(costs: Tensor, eps: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """`f` and `g [..., n]` of `P = exp((f_i + g_j - C_ij) / eps)` with marginals 1/n."""
    f, g = torch.zeros_like(costs[..., 0]), torch.zeros_like(costs[..., 0])
    log_weight = -math.log(costs.shape[-1])
    for _ in range(max_iter):
        old = f
        f = eps * (log_weight - ((g.unsqueeze(-2) - costs) / eps[..., None]).logsumexp(-1))
        g = eps * (log_weight - ((f.unsqueeze(-1) - costs) / eps[..., None]).logsumexp(-2))
        if bool(((f - old).abs() <= tol * eps).all()):
            break
    return f, g


def default_epsilon(costs: Tensor) -> Tensor:
    """`[...]`, a constant: a twentieth of the standard deviation of all costs `[..., n, n]`."""
    return 0.05 * costs.detach().flatten(-2).std(-1, correction=0)

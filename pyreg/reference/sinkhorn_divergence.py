"""The Sinkhorn divergence between points x [n, d] with weights a [n] and y [m, d] with b [m], and geomloss's samples
loss, which makes one iteration at each of falling epsilons.

    S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + epsilon / 2 (sum a - sum b)^2

OT is the value of reference/sinkhorn.py's problem with one penalty rho for both marginals.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Cost = Callable[[Tensor, Tensor], Tensor]


def sinkhorn_divergence(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: Cost, epsilon: float, rho: float = math.inf, tol: float = 1e-13
) -> Tensor:
    """`[...]`; its gradient is that of the last iteration, whose potentials before are constants."""
    between = _value(cost(x, y), a, b, epsilon, rho, tol)
    of_x, of_y = _value(cost(x, x), a, a, epsilon, rho, tol), _value(cost(y, y), b, b, epsilon, rho, tol)
    return between - of_x / 2 - of_y / 2 + epsilon / 2 * (a.sum(-1) - b.sum(-1)).square()


def _value(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, rho: float, tol: float) -> Tensor:
    """The dual at the fixed point, both potentials averaged with what they were."""
    kappa = 1 if rho == math.inf else rho / (rho + epsilon)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    with torch.no_grad():
        for _ in range(100000):
            new_f, new_g = kappa * _softmin(cost, b, g, epsilon), kappa * _softmin(cost.mT, a, f, epsilon)
            step = max((new_f - f).abs().max().item(), (new_g - g).abs().max().item())
            f, g = (f + new_f) / 2, (g + new_g) / 2
            if step <= tol * epsilon:
                break
    exponents = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon
    mass = (a.unsqueeze(-1) * b.unsqueeze(-2) * torch.expm1(exponents)).sum((-2, -1))
    return (a * _penalised(f, rho)).sum(-1) + (b * _penalised(g, rho)).sum(-1) - epsilon * mass


def _penalised(f: Tensor, rho: float) -> Tensor:
    return f if rho == math.inf else -rho * torch.expm1(-f / rho)


def _softmin(cost: Tensor, b: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return -epsilon * ((g / epsilon + b.log()).unsqueeze(-2) - cost / epsilon).logsumexp(-1)


# ---- geomloss's ----


def epsilons(p: int, diameter: float, blur: float, scaling: float) -> list[float]:
    """`diameter^p`, then `diameter^p scaling^(p k)` as long as it is above `blur^p`, then that."""
    steps, scale = [diameter**p], diameter
    while scale > blur * (1 + 1e-12):
        steps.append(scale**p)
        scale *= scaling
    return [*steps, blur**p]


def samples_loss(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int, steps: list[float], rho: float = math.inf, debias: bool = True
) -> Tensor:
    """Of x [B, n, d]; `[B]`. Every cost's gradient is by its first argument."""
    f, g = _annealed(_p_cost(x, y.detach(), p), _p_cost(y, x.detach(), p), a, b, steps, rho)
    epsilon = steps[-1]
    if not debias:
        zero = torch.zeros((), dtype=f.dtype)
        return _sum(a, f, zero, epsilon, rho) + _sum(b, g, zero, epsilon, rho)
    cost = _p_cost(x, x.detach(), p)
    f_self, _ = _annealed(cost, cost, a, a, steps, rho)
    cost = _p_cost(y, y.detach(), p)
    g_self, _ = _annealed(cost, cost, b, b, steps, rho)
    return _sum(a, f, f_self, epsilon, rho) + _sum(b, g, g_self, epsilon, rho)


def _annealed(
    cost: Tensor, transposed: Tensor, a: Tensor, b: Tensor, steps: list[float], rho: float
) -> tuple[Tensor, Tensor]:
    def following(f: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        kappa = 1 if rho == math.inf else rho / (rho + epsilon)
        return kappa * _softmin(cost, b, g, epsilon), kappa * _softmin(transposed, a, f, epsilon)

    with torch.no_grad():
        f, g = following(torch.zeros_like(a), torch.zeros_like(b), steps[0])
        for epsilon in steps:
            new_f, new_g = following(f, g, epsilon)
            f, g = (f + new_f) / 2, (g + new_g) / 2
    return following(f, g, steps[-1])


def _sum(a: Tensor, f: Tensor, f_self: Tensor, epsilon: float, rho: float) -> Tensor:
    if rho == math.inf:
        return (a * (f - f_self)).sum(-1)
    return (a * (rho + epsilon / 2) * ((-f_self / rho).exp() - (-f / rho).exp())).sum(-1)


def _p_cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    """`|x - y|^2 / 2`, or `|x - y|`, at least 1e-4."""
    squares = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    return squares / 2 if p == 2 else squares.clamp(min=1e-8).sqrt()

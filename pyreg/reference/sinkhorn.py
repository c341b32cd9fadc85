"""Entropic optimal transport between weights a [n] and b [m] under a cost C [n, m], by Sinkhorn's iteration.

    minimise  <P, C> + epsilon H(P) + rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b)      KL(p | q) = sum p log(p / q) - p + q

    reference "product":   H(P) = KL(P | a b^T)            P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
    reference "counting":  H(P) = sum P log P - P          P_ij = exp((f_i + g_j - C_ij) / epsilon)

    f_i <- -kappa_i epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)                      "product"
    f_i <- kappa_i (epsilon log a_i - epsilon log sum_j exp((g_j - C_ij) / epsilon))       "counting"

and g the same with the roles exchanged; kappa = rho / (rho + epsilon), 1 where rho is infinite: that marginal must
hold. Potentials of a problem without a finite rho are known up to a constant: (f + c, g - c) give the same plan.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor | float,
    rho_a: Tensor | float = torch.inf,
    rho_b: Tensor | float = torch.inf,
    reference: str = "product",
    max_iter: int = 1000,
    tol: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """Potentials `f [..., n]` and `g [..., m]`, iterated until no f moves by more than `tol epsilon`.

    `cost [..., n, m]`, `a [..., n]`, `b [..., m]`; `epsilon` a number or `[...]`; `rho_a`, `rho_b` numbers or of the
    shapes of a and b."""
    f, g = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
    for _ in range(max_iter):
        old = f
        f = _potential(cost, a, b, g, epsilon, rho_a, reference)
        g = _potential(cost.mT, b, a, f, epsilon, rho_b, reference)
        step = (f - old).detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # infinite before and after: weights of 0
        if bool((step.abs() <= tol * _column(epsilon, f)).all()):
            break
    return f, g


def plan(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor | float, reference: str = "product"
) -> Tensor:
    """`P [..., n, m]`."""
    exponents = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / _column(epsilon, cost)
    exponents = exponents.masked_fill(cost == torch.inf, -torch.inf)
    weights = a.unsqueeze(-1) * b.unsqueeze(-2) if reference == "product" else 1
    return weights * exponents.exp()


def value(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor | float,
    rho_a: Tensor | float = torch.inf,
    rho_b: Tensor | float = torch.inf,
    reference: str = "product",
) -> Tensor:
    """`[...]`, what is minimised, by its dual:

        sum a phi_a(f) + sum b phi_b(g) - epsilon sum (P - Q),   phi(f) = f, or -rho (exp(-f / rho) - 1)

    with `Q = a b^T` for "product" and 0 for "counting"."""
    mass = plan(cost, a, b, f, g, epsilon, reference).sum((-2, -1))
    if reference == "product":
        mass = mass - a.sum(-1) * b.sum(-1)
    return (_of_weights(a, f, rho_a) + _of_weights(b, g, rho_b)).sub(epsilon * mass)


def pairwise_cost(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """`[..., n, m]` of points `x [..., n, d]` and `y [..., m, d]`: `|x - y|^2` ("sqeuclidean"), `|x - y|`
    ("euclidean") or `1 - x.y / (|x| |y|)` ("cosine"), 1 for a point at 0, which has no gradient."""
    if cost == "cosine":
        return 1 - _units(x) @ _units(y).mT
    squares = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if cost == "sqeuclidean":
        return squares
    return torch.where(squares > 0, squares, 1).sqrt().where(squares > 0, 0)  # its gradient at x = y is 0


def _units(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > 0, x, 0) / torch.where(length > 0, length, 1)


def _potential(
    cost: Tensor, a: Tensor, b: Tensor, g: Tensor, epsilon: Tensor | float, rho: Tensor | float, reference: str
) -> Tensor:
    eps = _column(epsilon, g)
    scaled = g / eps + b.log() if reference == "product" else g / eps
    exponents = scaled.unsqueeze(-2) - cost / _column(epsilon, cost)
    f = -eps * exponents.masked_fill(cost == torch.inf, -torch.inf).logsumexp(-1)
    if reference == "counting":
        f = f + eps * a.log()
    return f / (1 + eps / torch.as_tensor(rho, dtype=f.dtype, device=f.device))  # kappa f


def _of_weights(a: Tensor, f: Tensor, rho: Tensor | float) -> Tensor:
    """`sum a phi(f)`; a weight of 0 adds nothing."""
    rho = torch.as_tensor(rho, dtype=f.dtype, device=f.device)
    penalised = torch.where(rho < torch.inf, rho, 1)
    phi = torch.where(rho < torch.inf, -penalised * torch.expm1(-f / penalised), f)
    return torch.where(a > 0, a * phi, 0).sum(-1)


def _column(epsilon: Tensor | float, like: Tensor) -> Tensor | float:
    """`epsilon [...]` against the dimensions that follow those of the batch."""
    if not isinstance(epsilon, Tensor) or epsilon.dim() == 0:
        return epsilon
    return epsilon.reshape(*epsilon.shape, *[1] * (like.dim() - epsilon.dim()))

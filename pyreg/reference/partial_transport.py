"""Progressive partial transport: pseudo-labels that only a part of the samples' mass takes part in.

From logits [n, k], with the cost C = -log softmax(logits) and a virtual class of cost 0 in column k:

    minimise   <Q, C> + epsilon sum Q log Q - Q + gamma KL(Q^T 1 | target)        over Q [n, k + 1] >= 0
    subject to Q 1 = 1 / n,    column k of Q sums to 1 - mass

where target is mass / k, or mass times a class prior, and the penalty is of the k real classes. By scaling:

    K = exp(-[C, 0] / epsilon)
    a = (1 / n) / (K b),    b_j = (target_j / (K^T a)_j)^(gamma / (gamma + epsilon)),    b_k = (1 - mass) / (K^T a)_k

A factor that b gains and a loses changes no plan, but what the penalty asks for: the one that makes the dual largest,
(sum_j target_j b_j^(-epsilon / gamma) / mass)^(gamma / epsilon) over the real classes, is 1 at the solution, and
multiplied into b it saves the many iterations that are slow to find it where the mass is small.

The pseudo-labels are n Q without its last column. The semantic form subtracts semantic_weight <S, Q Q^T> for a
similarity S of samples; majorised at the Q before, that is the problem above with the cost
C - semantic_weight (S + S^T) Q, solved again and again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def progressive_partial_transport(
    logits: Tensor,
    mass: float,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    prior: Tensor | None = None,
    max_iter: int = 10000,
    tol: float = 1e-12,
) -> Tensor:
    """Pseudo-labels `[n, k]` of logits `[n, k]`, iterated until the columns' masses are within `tol` of what scalings
    and penalty ask for."""
    cost = -logits.log_softmax(1)
    return _solve(cost, _targets(cost, mass, prior), epsilon, gamma, max_iter, tol)


def semantic_partial_transport(
    logits: Tensor,
    similarity: Tensor,
    mass: float,
    semantic_weight: float = 0.5,
    mm_iter: int = 10,
    mm_tol: float = 0.0,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    prior: Tensor | None = None,
    max_iter: int = 10000,
    tol: float = 1e-12,
) -> Tensor:
    """The same with `similarity [n, n]`: `mm_iter` steps, or until the objective moves by no more than `mm_tol`."""
    cost = -logits.log_softmax(1)
    targets = _targets(cost, mass, prior)
    n, k = cost.shape
    q = torch.full_like(cost, mass / (n * k))
    objective = _objective(q, cost, similarity, semantic_weight, epsilon)
    for _ in range(mm_iter):
        majorised = cost - semantic_weight * (similarity + similarity.T) @ q
        q = _solve(majorised, targets, epsilon, gamma, max_iter, tol) / n
        before, objective = objective, _objective(q, cost, similarity, semantic_weight, epsilon)
        if abs(objective - before) <= mm_tol:
            break
    return n * q


def _targets(cost: Tensor, mass: float, prior: Tensor | None) -> Tensor:
    """Of all columns, `[k + 1]`. The largest share of a prior is that of the class with the largest cost."""
    k = cost.shape[1]
    shares = cost.new_full((k,), 1 / k)
    if prior is not None:
        order = cost.sum(0).argsort(descending=True, stable=True)
        shares[order] = prior.to(shares).sort(descending=True).values
    return torch.cat([mass * shares, shares.new_tensor([1 - mass])])


def _solve(cost: Tensor, targets: Tensor, epsilon: float, gamma: float, max_iter: int, tol: float) -> Tensor:
    """In the logarithms of the scalings."""
    n = len(cost)
    exponents = -torch.cat([cost, torch.zeros_like(cost[:, :1])], dim=1) / epsilon
    kappa = torch.full_like(targets, 1 / (1 + epsilon / gamma))
    kappa[-1] = 1
    log_b = torch.where(targets > 0, 0, -torch.inf).to(targets)
    for _ in range(max_iter):
        log_a = -exponents.add(log_b).logsumexp(1, keepdim=True)  # but for n
        masses = exponents.add(log_a).logsumexp(0)
        before, log_b = log_b, kappa * (targets.log() + math.log(n) - masses)
        if gamma < math.inf:
            log_b = log_b + _dual_shift(log_b[:-1], targets[:-1], epsilon / gamma)
        error = torch.where(targets > 0, targets * (log_b - before).abs() / kappa, 0).sum()
        if error <= tol:
            break
    return exponents.add(log_b).softmax(1)[:, :-1]


def _dual_shift(log_b: Tensor, targets: Tensor, rate: float) -> Tensor:
    """`log( sum target b^-rate / sum target ) / rate`, without rounding that a small rate would multiply."""
    least = log_b.masked_fill(targets == 0, torch.inf).amin()
    terms = targets * torch.expm1(-rate * (log_b - least).masked_fill(targets == 0, 0))
    return torch.log1p(terms.sum() / targets.sum()) / rate - least


def _objective(q: Tensor, cost: Tensor, similarity: Tensor, semantic_weight: float, epsilon: float) -> float:
    semantic = (similarity * (q @ q.T)).sum()
    return float((q * cost).sum() - semantic_weight * semantic + epsilon * torch.xlogy(q, q).sum())

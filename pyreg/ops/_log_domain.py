"""Sinkhorn's iteration by log-sum-exp in plain PyTorch: ``pyreg::sinkhorn`` where it has no kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Iterations between two looks at whether all problems are done, each of which waits for a GPU.
_BETWEEN_CHECKS = 16

# As in csrc/sinkhorn/sinkhorn.h: of each stage but the last.
_STAGE_ITERATIONS = 3


Update = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    rho_a: Tensor | None,
    rho_b: Tensor | None,
    epsilon: Tensor,
    first_epsilon: Tensor,
    epsilon_factor: float,
    is_counting: bool,
    max_iter: int,
    tol: float,
    initial: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials with ``eps log a``, ``eps log b``, errors and numbers of iterations, as ``csrc/sinkhorn/sinkhorn.h``
    has it."""
    is_balanced = rho_a is None and rho_b is None

    def update(f: Tensor, g: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new_f = new_potentials(log_sums(cost, g, current), log_a, rho_a, current, is_counting)
        new_g = new_potentials(log_sums(cost.mT, new_f, current), log_b, rho_b, current, is_counting)
        return new_f, new_g, error_of(new_f - f, a, rho_a, current, is_balanced)

    f = torch.zeros_like(log_a)
    return iterate(update, f, initial, epsilon, first_epsilon, epsilon_factor, max_iter, tol)


def iterate(
    update: Update,
    f: Tensor,
    initial: Tensor,
    epsilon: Tensor,
    first_epsilon: Tensor,
    epsilon_factor: float,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``update`` makes one iteration at an epsilon, from f and g, and says its error. Problems that are done keep what
    they have while others go on."""
    current = torch.maximum(epsilon, first_epsilon)  # of each problem
    g = initial.clone()
    error = torch.full_like(epsilon, torch.inf)
    iterations = torch.zeros_like(epsilon, dtype=torch.int64)
    between_checks = 1 if f.is_cpu else _BETWEEN_CHECKS
    can_wait = not (f.is_cuda and torch.cuda.is_current_stream_capturing())
    for iteration in range(max_iter):
        if iteration == max_iter - 1:
            current = epsilon
        elif iteration > 0 and iteration % _STAGE_ITERATIONS == 0:
            current = torch.maximum(current * epsilon_factor, epsilon)
        new_f, new_g, new_error = update(f, g, current)
        is_done = (error <= tol).unsqueeze(1)
        f, g = torch.where(is_done, f, new_f), torch.where(is_done, g, new_g)
        iterations += ~is_done.squeeze(1)
        # An error counts from where epsilon has come to its end.
        new_error = torch.where(current <= epsilon, new_error, torch.inf)
        error = torch.where(is_done.squeeze(1), error, new_error)
        if can_wait and (iteration + 1) % between_checks == 0 and bool((error <= tol).all()):
            break
    return f, g, error, iterations


def log_sums(cost: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    """``log sum_j exp((g_j - C_ij) / eps)``; in float64, for what costs cancel."""
    return ((g.unsqueeze(1) - cost) / epsilon.view(-1, 1, 1)).logsumexp(2)


def new_potentials(
    log_sums: Tensor, log_weights: Tensor, rho: Tensor | None, epsilon: Tensor, is_counting: bool
) -> Tensor:
    """Of rows with these sums."""
    eps = epsilon.unsqueeze(1)
    kappa = 1.0 if rho is None else 1 / (1 + eps / rho)
    new = eps * ((kappa * log_weights if is_counting else log_weights) - kappa * log_sums)
    return new.masked_fill(log_sums == -torch.inf, -torch.inf)


def error_of(change: Tensor, a: Tensor, rho: Tensor | None, epsilon: Tensor, is_balanced: bool) -> Tensor:
    """``[B]``, of rows whose potentials have moved so; for a marginal that must hold that is epsilon times the
    logarithm of the weight over the mass."""
    eps = epsilon.unsqueeze(1)
    step = (change / eps).nan_to_num(nan=torch.inf)  # the very first potentials are arbitrary
    if is_balanced:
        return torch.where(a > 0, a * torch.expm1(-step).abs(), 0).sum(1)
    kappa = 1.0 if rho is None else 1 / (1 + eps / rho)
    return torch.where(step.isfinite(), a * step.abs() / kappa, 0).sum(1)

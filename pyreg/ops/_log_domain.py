"""Sinkhorn's iteration by log-sum-exp in plain PyTorch: ``pyreg::sinkhorn`` where it has no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

# Iterations between two looks at whether all problems are done, each of which waits for a GPU.
_BETWEEN_CHECKS = 16

# As in csrc/sinkhorn/sinkhorn.h: of each stage but the last.
_STAGE_ITERATIONS = 3


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
    has it. Problems that are done keep what they have while others go on."""
    current = torch.maximum(epsilon, first_epsilon)  # of each problem
    f, g = torch.zeros_like(log_a), initial.clone()
    error = torch.full_like(epsilon, torch.inf)
    iterations = torch.zeros_like(epsilon, dtype=torch.int64)
    is_balanced = rho_a is None and rho_b is None
    can_wait = not (cost.is_cuda and torch.cuda.is_current_stream_capturing())
    for iteration in range(max_iter):
        if iteration == max_iter - 1:
            current = epsilon
        elif iteration > 0 and iteration % _STAGE_ITERATIONS == 0:
            current = torch.maximum(current * epsilon_factor, epsilon)
        new_f, step = _half_iteration(cost, log_a, rho_a, f, g, current, is_counting)
        new_g, _ = _half_iteration(cost.mT, log_b, rho_b, g, new_f, current, is_counting)
        if is_balanced:
            new_error = torch.where(a > 0, a * torch.expm1(-step).abs(), 0).sum(1)
        else:
            kappa = 1.0 if rho_a is None else 1 / (1 + current.unsqueeze(1) / rho_a)
            new_error = torch.where(step.isfinite(), a * step.abs() / kappa, 0).sum(1)
        is_done = (error <= tol).unsqueeze(1)
        f, g = torch.where(is_done, f, new_f), torch.where(is_done, g, new_g)
        iterations += ~is_done.squeeze(1)
        # An error counts from where epsilon has come to its end.
        new_error = torch.where(current <= epsilon, new_error, torch.inf)
        error = torch.where(is_done.squeeze(1), error, new_error)
        if can_wait and iteration % _BETWEEN_CHECKS == _BETWEEN_CHECKS - 1 and bool((error <= tol).all()):
            break
    return f, g, error, iterations


def _half_iteration(
    cost: Tensor, log_a: Tensor, rho: Tensor | None, f: Tensor, g: Tensor, epsilon: Tensor, is_counting: bool
) -> tuple[Tensor, Tensor]:
    """The rows' new potentials, and by how many epsilon they have moved; for a marginal that must hold that is the
    logarithm of the weight over the mass."""
    eps = epsilon.unsqueeze(1)
    log_sums = ((g.unsqueeze(1) - cost) / epsilon.view(-1, 1, 1)).logsumexp(2)  # float64, for what costs cancel
    kappa = 1.0 if rho is None else 1 / (1 + eps / rho)
    new = eps * ((kappa * log_a if is_counting else log_a) - kappa * log_sums)
    new = new.masked_fill(log_sums == -torch.inf, -torch.inf)
    # The very first potentials are arbitrary.
    return new, ((new - f) / eps).nan_to_num(nan=torch.inf)

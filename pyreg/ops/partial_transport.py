"""Progressive partial transport: the public functions, and how torch traces and batches them.

Kernel: ``csrc/partial_transport``; on CUDA ``csrc/sinkhorn`` and torch's own operators. Definition:
:mod:`pyreg.reference.partial_transport`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _checks, _convergence, _library
from pyreg.reference import partial_transport as reference

# A prior's sum may differ from 1 by what rounding leaves of it.
_PRIOR_TOLERANCE = 1e-3

# On CUDA, iterations between two shifts of all scalings: few at first, when shifts are large.
_FIRST_STAGE, _LONGEST_STAGE = 4, 64

# Entries whose exponents are formed in float64 at a time, whose digits a small epsilon needs.
_BLOCK_ENTRIES = 1 << 24


# ---- public functions ----


def progressive_partial_transport(
    logits: Tensor,
    *,
    mass: float,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    prior: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> Tensor:
    r"""Pseudo-labels for imbalanced clustering, of a part of the samples' mass: optimal transport from samples to
    classes, under which a virtual class takes what is not transported.

    .. code-block:: text

        C = -log softmax(logits),  and 0 in column k of the virtual class
        minimise   <Q, C> + epsilon sum (Q log Q - Q) + gamma KL(Q^T 1 | target)        over Q [n, k + 1] >= 0
        subject to Q 1 = 1 / n,    column k of Q sums to 1 - mass
        result     n Q without column k

    where ``target`` is ``mass / k`` for each class, or ``mass`` times ``prior``, and the penalty is of the k classes.
    Row i of the result is a softmax of ``beta_j - C_ij / epsilon`` without the virtual class: it sums to the share of
    the sample that takes part, the fewer the less sure its logits are. All rows together sum to ``n mass``.

    Args:
        logits: ``[n, k]`` with ``n >= k``; finite; float64, float32, bfloat16 or float16.
        mass: the part of all mass that is transported, in (0, 1]; it is to grow during training, see
            :class:`pyreg.nn.ProgressivePseudoLabels`.
        epsilon: above 0: the lower, the harder the labels.
        gamma: above 0: the higher, the nearer the classes' masses are to the target; ``math.inf`` makes them hold.
        prior: the classes' shares, ``[k]``, at least 0, of the sum 1; which class has which share is not known: the
            largest goes to the class with the largest sum of C, and so on down. ``1 / k`` each by default.
        max_iter: at least 1.
        tol: iterations end where ``sum_j target_j |step of beta_j| / kappa_j <= tol``, with ``kappa = gamma / (gamma +
            epsilon)``, and 1 for the virtual class; 0 makes all of them, and warns of nothing.

    Between iterations all scalings are multiplied by the factor that makes the dual largest, which changes no plan, and
    has the masses of the classes add up to ``mass``: at ``mass = 0.1`` that saves most of some thousand iterations.

    The released code ends where ``|b - b_old|_2 <= tol`` for the scalings ``b = exp(beta)``, which says more or less
    according to how large they are, and nothing where they overflow. Here steps are relative, and weighted by the
    classes' masses: to the first order the criterion is by how much those masses, all together 1, differ from what
    scalings and penalty ask for. On CUDA it is the steps of the rows' scalings, averaged: they are averages of
    the columns' and so at most as long.

    Returns:
        ``[n, k]``, in float64 for float64 logits and in float32 otherwise, in which the iteration is made too; on any
        device deterministic. Memory needed beside it: for 100 classes on the CPU 1.2 times the result's, from 7 classes
        on less than three times. Labels of less than 1e-30 may be 0.

    Gradient:
        None: pseudo-labels are targets, and logits are detached.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options that do not fit; the message says what was expected.
        ValueError: NaN or infinity in the logits; a prior that is negative or not finite, or whose sum is not 1. These
            are looked for on the CPU in eager calls, and on CUDA where ``PYREG_CHECKS=1`` in the environment asks for
            it, at the price of waiting for the GPU.

    Warns:
        pyreg.transport.ConvergenceWarning: ``max_iter`` iterations have not reached ``tol``; under the same conditions.

    Source: Zhang, Ren, He, "P^2OT: Progressive Partial Optimal Transport for Deep Imbalanced Clustering", ICLR 2024,
    arXiv 2401.09266; the same, "SP^2OT: Semantic-Regularized Progressive Partial Optimal Transport for Imbalanced
    Clustering", 2024, arXiv 2404.03446.

    Example:
        >>> logits = torch.randn(256, 10, requires_grad=True)
        >>> labels = pyreg.functional.progressive_partial_transport(logits, mass=0.3)
        >>> round(labels.sum().item() / 256, 4)
        0.3
        >>> loss = -(labels * logits.log_softmax(1)).sum() / labels.sum()
    """
    name = "progressive_partial_transport"
    options = _Options(name, logits, mass, epsilon, gamma, max_iter, tol)
    targets = options.targets(prior)
    logits = logits.detach()
    if not _library.has_kernel(logits):
        options_of_reference = (options.mass, options.epsilon, options.gamma, prior, max_iter, options.tol)
        return reference.progressive_partial_transport(logits.to(options.dtype), *options_of_reference)
    initial = torch.zeros_like(targets)
    labels, _, error, iterations, _ = _library.operator("partial_transport")(
        *(logits, None, targets, initial, options.epsilon, options.gamma, max_iter, options.tol, False)
    )
    options.warn_of(error, iterations)
    return labels  # type: ignore[no-any-return]


def semantic_partial_transport(
    logits: Tensor,
    similarity: Tensor | None = None,
    *,
    features: Tensor | None = None,
    mass: float,
    semantic_weight: float = 0.5,
    mm_iter: int = 10,
    mm_tol: float = 1e-6,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    prior: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> Tensor:
    r"""Pseudo-labels of :func:`progressive_partial_transport` that are alike for samples that are alike.

    .. code-block:: text

        minimise   <Q, C> - semantic_weight <S, Q Q^T> + epsilon sum (Q log Q - Q) + gamma KL(Q^T 1 | target)

    under the same constraints; S has the k classes only. By majorisation and minimisation: beginning with
    ``Q = mass / (n k)``, each step solves the problem without the semantic term and with the cost ``C - semantic_weight
    (S + S^T) Q``. A step's iteration begins with the scalings of the one before.

    Args:
        logits, mass, epsilon, gamma, prior, max_iter, tol: as of :func:`progressive_partial_transport`; ``max_iter``
            and ``tol`` are of every step.
        similarity: S, ``[n, n]``, finite; need not be symmetric. Of the logits' dtype.
        features: in its place z ``[n, d]``, of which S is the Gram matrix ``z z^T``: ``S Q`` is ``z (z^T Q)`` then, and
            nothing is ``[n, n]``. Normalise them for cosines. Of the logits' dtype.
        semantic_weight: at least 0. The paper has it fall as the mass grows, like ``1 - mass``.
        mm_iter: steps, at least 1.
        mm_tol: steps end where ``<Q, C> - semantic_weight <S, Q Q^T> + epsilon sum Q log Q`` moves by no more; 0 makes
            all of them. On CUDA each look waits for the GPU, but for 0; a CUDA graph takes all steps.

    Returns:
        ``[n, k]``, as of :func:`progressive_partial_transport`. Memory needed beside it: that of
        :func:`progressive_partial_transport`, and twice the result's.

    Gradient:
        None: all tensors are detached.

    Raises:
        ValueError, TypeError: as of :func:`progressive_partial_transport`; both or neither of similarity and features;
            NaN or infinity in them.

    Warns:
        pyreg.transport.ConvergenceWarning: the last step has not reached ``tol``.

    Source: as of :func:`progressive_partial_transport`.

    Example:
        >>> logits, z = torch.randn(256, 10), torch.nn.functional.normalize(torch.randn(256, 32))
        >>> labels = pyreg.functional.semantic_partial_transport(logits, features=z, mass=0.3, semantic_weight=0.35)
    """
    name = "semantic_partial_transport"
    options = _Options(name, logits, mass, epsilon, gamma, max_iter, tol)
    semantic_weight = _checks.check_number(name, "semantic_weight", semantic_weight, 0, or_equal=True)
    mm_tol = _checks.check_number(name, "mm_tol", mm_tol, 0, or_equal=True)
    if not isinstance(mm_iter, int) or mm_iter < 1:
        raise ValueError(f"{name}: expected mm_iter to be an integer >= 1, got {mm_iter!r}")
    alike = options.check_similarity(similarity, features)
    targets = options.targets(prior)
    logits, alike = logits.detach(), alike.detach()
    if not _library.has_kernel(logits):
        alike = alike.to(options.dtype)
        return reference.semantic_partial_transport(
            logits.to(options.dtype),
            alike if features is None else alike @ alike.mT,
            options.mass,
            semantic_weight,
            mm_iter,
            mm_tol,
            options.epsilon,
            options.gamma,
            prior,
            max_iter,
            options.tol,
        )
    labels, error, iterations = _library.operator("semantic_partial_transport")(
        *(logits, alike, features is not None, targets, semantic_weight, mm_iter, mm_tol),
        *(options.epsilon, options.gamma, max_iter, options.tol),
    )
    options.warn_of(error, iterations)
    return labels  # type: ignore[no-any-return]


# ---- arguments ----


class _Options:
    """What both functions take, checked."""

    def __init__(
        self, operator: str, logits: Tensor, mass: float, epsilon: float, gamma: float, max_iter: int, tol: float
    ) -> None:
        self._operator, self._logits, self._max_iter = operator, logits, max_iter
        _library.check_float(operator, "logits", logits)
        if logits.dim() != 2 or 0 in logits.shape:
            raise ValueError(
                f"{operator}: expected logits of shape [n, k] with at least one class, got {list(logits.shape)}"
                + ("; flatten all dimensions but the last" if logits.dim() > 2 else "")
            )
        n, k = logits.shape
        if n < k:
            raise ValueError(
                f"{operator}: expected logits [n, k] with at least as many samples as classes, got {[n, k]}; append "
                "those of earlier batches, as the memory bank of pyreg.nn.ProgressivePseudoLabels does"
            )
        self.mass = check_mass(operator, "mass", mass)
        self.epsilon = _checks.check_number(operator, "epsilon", epsilon, 0, or_equal=False)
        is_infinite = _checks.is_number(gamma) and gamma == math.inf
        self.gamma = math.inf if is_infinite else _checks.check_number(operator, "gamma", gamma, 0, or_equal=False)
        if not isinstance(max_iter, int) or max_iter < 1:
            raise ValueError(f"{operator}: expected max_iter to be an integer >= 1, got {max_iter!r}")
        self.tol = _checks.check_number(operator, "tol", tol, 0, or_equal=True)
        if _checks.reads_values(logits):
            _checks.check_finite(operator, "logits", logits.detach())

    @property
    def dtype(self) -> torch.dtype:
        return _library.accumulate_dtype(self._logits.dtype)

    def targets(self, prior: Tensor | None) -> Tensor:
        """Of all columns, ``[k + 1]``, float64."""
        k, logits = self._logits.shape[1], self._logits.detach()
        of_virtual = logits.new_full((1,), 1 - self.mass, dtype=torch.float64)
        if prior is None:
            return torch.cat([logits.new_full((k,), self.mass / k, dtype=torch.float64), of_virtual])
        shares = self._check_prior(prior)
        # In the order of the costs' sums, that of the logits' turned round.
        order = logits.sum(0, dtype=torch.float64).argsort(stable=True)
        handed = torch.zeros_like(shares).scatter(0, order, shares.sort(descending=True).values)
        return torch.cat([self.mass * handed, of_virtual])

    def _check_prior(self, prior: Tensor) -> Tensor:
        operator, k = self._operator, self._logits.shape[1]
        self._check_beside("prior", prior)
        if not prior.is_floating_point():
            raise TypeError(f"{operator}: expected prior to be floating, got {prior.dtype}; divide counts by their sum")
        if prior.shape != (k,):
            raise ValueError(f"{operator}: expected prior of shape [k] = [{k}], got {list(prior.shape)}")
        prior = prior.detach().double()
        if _checks.reads_values(prior):
            _checks.check_finite(operator, "prior", prior)
            if (least := prior.min().item()) < 0:
                raise ValueError(f"{operator}: expected prior to be at least 0, got {least:.8g}")
            if abs((total := prior.sum().item()) - 1) > _PRIOR_TOLERANCE:
                raise ValueError(
                    f"{operator}: expected prior to sum to 1, got {total:.8g}; divide it by its sum, prior / "
                    "prior.sum()"
                )
        return prior / prior.sum()

    def check_similarity(self, similarity: Tensor | None, features: Tensor | None) -> Tensor:
        """The one of them that is there."""
        operator, n = self._operator, self._logits.shape[0]
        if (similarity is None) == (features is None):
            given = "neither" if similarity is None else "both"
            raise ValueError(
                f"{operator}: expected either similarity [n, n] or features [n, d], got {given}; features=z stands for "
                "similarity=z @ z.T"
            )
        name, tensor = ("similarity", similarity) if features is None else ("features", features)
        assert tensor is not None
        self._check_beside(name, tensor)
        if tensor.dtype != self._logits.dtype:
            raise TypeError(
                f"{operator}: expected {name} of the dtype of logits, {self._logits.dtype}, got {tensor.dtype}; "
                f"convert it with {name}.to({self._logits.dtype})"
            )
        if features is None and tensor.shape != (n, n):
            hint = "; give features [n, d] as features=" if tensor.dim() == 2 and tensor.shape[0] == n else ""
            raise ValueError(
                f"{operator}: expected similarity of shape [n, n] = [{n}, {n}], got {list(tensor.shape)}{hint}"
            )
        if tensor.dim() != 2 or tensor.shape[0] != n or tensor.shape[1] == 0:
            raise ValueError(f"{operator}: expected features of shape [n, d] with n = {n}, got {list(tensor.shape)}")
        if _checks.reads_values(tensor):
            _checks.check_finite(operator, name, tensor.detach())
        return tensor

    def _check_beside(self, name: str, tensor: Any) -> None:
        _checks.check_beside(self._operator, name, tensor, self._logits, "logits")

    def warn_of(self, error: Tensor, iterations: Tensor) -> None:
        """Where the iteration has ended too early, and it costs no wait to look."""
        if self.tol == 0 or not _checks.reads_values(error):
            return
        if not (reached := error.item()) <= self.tol:
            _convergence.warn(
                f"{self._operator}: not converged: after {int(iterations.item())} iterations the error is "
                f"{reached:.3g}, above tol = {self.tol:.3g}; raise max_iter (here {self._max_iter}), epsilon or tol"
            )


def check_mass(operator: str, name: str, mass: float) -> float:
    if not (_checks.is_number(mass) and 0 < mass <= 1):
        raise ValueError(f"{operator}: expected {name} to be a number in (0, 1], got {mass!r}")
    return float(mass)


# ---- the operators ----


def _on_cuda(
    logits: Tensor,
    gain: Tensor | None,
    targets: Tensor,
    initial: Tensor,
    epsilon: float,
    gamma: float,
    max_iter: int,
    tol: float,
    with_energy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``pyreg::partial_transport`` by ``pyreg::sinkhorn`` on a cost of k + 1 columns, from which the rows' maxima are
    taken: rows hold, so that what their costs have in common is nothing to the plan. Scalings are shifted between
    stages of iterations, not after each; a stage that is done costs the one iteration that says so."""
    n, k = logits.shape
    dtype = _library.accumulate_dtype(logits.dtype)
    centred = logits.to(dtype)
    centred = centred - centred.amax(1, keepdim=True)
    log_sums = centred.logsumexp(1, keepdim=True)
    cost = torch.cat([-centred if gain is None else -centred - gain, -log_sums], dim=1)
    is_there = targets > 0
    a = logits.new_full((1, n), 1 / n, dtype=torch.float64)
    b = targets.unsqueeze(0).contiguous()
    rho = torch.full_like(b, gamma)
    rho[:, k] = math.inf
    g = torch.where(is_there, epsilon * initial, -torch.inf).unsqueeze(0).contiguous()
    at, log_a, log_b = a.new_full((1,), epsilon), a.log(), b.log()
    error, iterations = at, torch.zeros_like(at, dtype=torch.int64)
    for stage in _stages(max_iter):
        _, g, error, made = _library.operator("sinkhorn")(
            *(cost.unsqueeze(0), a, b, log_a, log_b, None, rho, at, at, 0.5, True, stage, tol, g)
        )
        iterations = iterations + made
        if gamma < math.inf:
            shift = epsilon * _dual_shift(g[0, :k] / epsilon, targets[:k], epsilon / gamma)
            g, error = g + shift, error + shift.abs() / epsilon
    plan = torch.empty_like(centred)
    rows = max(_BLOCK_ENTRIES // (k + 1), 1)
    for first in range(0, n, rows):
        block = slice(first, first + rows)
        plan[block] = ((g - cost[block]) / epsilon).softmax(1)[:, :k]
    energy = torch.zeros_like(error)
    if with_energy:
        q = plan / n
        energy = (q * (log_sums - centred) + epsilon * torch.xlogy(q, q)).sum(dtype=torch.float64).unsqueeze(0)
    return plan, torch.where(is_there, g[0] / epsilon, 0), error, iterations, energy


def _dual_shift(log_scalings: Tensor, targets: Tensor, rate: float) -> Tensor:
    """As in ``csrc/partial_transport/partial_transport_cpu.cpp``."""
    least = log_scalings.masked_fill(targets == 0, torch.inf).amin()
    terms = targets * torch.expm1(-rate * (log_scalings - least).masked_fill(targets == 0, 0))
    return torch.log1p(terms.sum() / targets.sum()) / rate - least


def _stages(max_iter: int) -> Iterator[int]:
    """Numbers of iterations that add up to all."""
    stage = _FIRST_STAGE
    while max_iter > 0:
        yield min(stage, max_iter)
        max_iter, stage = max_iter - stage, min(2 * stage, _LONGEST_STAGE)


def _semantic(
    logits: Tensor,
    similarity: Tensor,
    is_features: bool,
    targets: Tensor,
    semantic_weight: float,
    mm_iter: int,
    mm_tol: float,
    epsilon: float,
    gamma: float,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = logits.shape
    dtype = _library.accumulate_dtype(logits.dtype)
    similarity = similarity.to(dtype)
    can_look = mm_tol > 0 and not (logits.is_cuda and torch.cuda.is_current_stream_capturing())
    step = _library.operator("partial_transport")

    def gain_of(labels: Tensor) -> Tensor:
        """``semantic_weight (S + S^T) Q``."""
        scale = semantic_weight / n
        if is_features:
            return similarity @ (similarity.mT @ labels).mul_(2 * scale)
        gain = (similarity @ labels).mul_(scale)
        return gain.addmm_(similarity.mT, labels, alpha=scale)

    labels = (targets[:k].sum() / k).to(dtype).expand(n, k)
    scalings = torch.zeros_like(targets)
    gain, objective = gain_of(labels), math.nan
    for i in range(mm_iter):
        del labels
        labels, scalings, error, iterations, energy = step(
            logits, gain, targets, scalings, epsilon, gamma, max_iter, tol, can_look
        )
        if i + 1 == mm_iter:
            break
        gain = gain_of(labels)
        if can_look:
            before, objective = objective, energy.item() - 0.5 / n * torch.dot(labels.flatten(), gain.flatten()).item()
            if abs(objective - before) <= mm_tol:
                break
    return labels, error, iterations


@_library.fake("partial_transport")
def _(
    logits: Tensor, gain: Tensor | None, targets: Tensor, initial: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = logits.new_empty(logits.shape, dtype=_library.accumulate_dtype(logits.dtype))
    error, iterations, energy = (
        logits.new_empty((1,), dtype=dtype) for dtype in (torch.float64, torch.int64, torch.float64)
    )
    return plan, torch.empty_like(initial), error, iterations, energy


@_library.fake("semantic_partial_transport")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan = logits.new_empty(logits.shape, dtype=_library.accumulate_dtype(logits.dtype))
    error, iterations = (logits.new_empty((1,), dtype=dtype) for dtype in (torch.float64, torch.int64))
    return plan, error, iterations


_library.implement("partial_transport", _on_cuda, ["CUDA"])
_library.implement("semantic_partial_transport", _semantic)
_library.vmap_one_by_one("partial_transport")
_library.vmap_one_by_one("semantic_partial_transport")

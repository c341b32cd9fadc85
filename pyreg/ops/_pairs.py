"""The pairwise contrastive operators by torch's own, a block of rows at a time: no ``[N, N]`` tensor ever exists.

.. code-block:: text

    s_ij   = z_i . z_j / temperature
    l_i    = alpha_i lse_i - beta_i sum_{j in P_i} s_ij,   lse_i = log( sum_j a_ij exp(s_ij) + extra_i )
    G_ij   = alpha_i a_ij exp(s_ij - lse_i) - beta_i [j in P_i]
    dz_i   = sum_j (u_i G_ij + u_j G_ji) z_j / temperature

with ``alpha_i = beta_i |P_i|``, both 0 for a row that adds nothing, and ``u`` the upstream gradient of each row's loss.
Multipliers ``a`` are kept as logarithms, -inf where a pair does not count, and each row is shifted by its largest
exponent: nothing overflows, and no sum of exponentials underflows to 0. The statistics ``[3, N]`` that the gradient
takes are lse, alpha and beta. Sums are in float32, in float64 for float64.

They serve where the kernels do not: float64 on CUDA, and CUDA without Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyreg.ops import _library

VARIANTS = {"paper": 0, "agedb": 1, "nyud2": 2}
LABEL_NORMS = {1: 1, 2: 2, torch.inf: 0}

# Scores of a block of rows, of which some six copies exist at a time: they stay in a processor's last-level cache, and
# keep a GPU busy for longer than their launch takes.
_BLOCK_BYTES = 8 << 20


def _blocks(first_row: int, row_count: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Rows of all rows, and the same rows counted from ``first_row``."""
    step = max(_BLOCK_BYTES // (max(columns, 1) * dtype.itemsize), 1)
    for first in range(0, row_count, step):
        last = min(first + step, row_count)
        yield slice(first_row + first, first_row + last), slice(first, last)


# ---- features of length 1 ----


class _Units:
    """Features as rows ``z = f / max(|f|, 1e-12)``, or as they are."""

    def __init__(self, features: Tensor, normalize: bool) -> None:
        self.z = features.to(_library.accumulate_dtype(features.dtype))  # [N, D]
        self.normalize = normalize
        if not normalize:
            return
        # By way of each row's largest element, so that no square over- or underflows.
        largest = self.z.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(self.z.dtype).tiny)
        self.z = self.z / largest
        factor, limit = self.z.norm(dim=1, keepdim=True).reciprocal_(), largest * 1e12
        self.is_short = factor > limit  # [N, 1]: divided by 1e-12, a constant
        factor = torch.minimum(factor, limit)
        self.z.mul_(factor)
        self.inverse = factor.div_(largest)  # [N, 1]

    def gradient(self, rows: slice, by_z: Tensor) -> Tensor:
        """The gradient of some rows' features from that of their ``z``."""
        if not self.normalize:
            return by_z
        z = self.z[rows]
        radial = (z * by_z).sum(1, keepdim=True).masked_fill_(self.is_short[rows], 0)
        return (by_z - z * radial).mul_(self.inverse[rows])


# ---- rows of exponents ----


def _row_losses(
    exponents: Tensor, positive: Tensor, alpha: Tensor, beta: Tensor, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and lse of rows ``[B]`` from ``s_ij + log a_ij`` ``[B, N]``, in whose memory they are found.

    Both terms of the loss are shifted by the same constant, which ``alpha_i = beta_i |P_i|`` cancels.
    """
    largest = exponents.amax(1)
    largest = largest.clamp_min_(0) if extra is not None else largest.masked_fill_(largest == -torch.inf, 0)
    shifted = exponents.sub_(largest.unsqueeze(1))
    positive_sum = shifted.where(positive, 0).sum(1)
    total = shifted.exp_().sum(1)
    if extra is not None:
        total += extra * largest.neg().exp_()
    log_total = total.masked_fill_(alpha == 0, 1).log_()
    return alpha * log_total - beta * positive_sum, largest + log_total


def _reduced(losses: Tensor, reduction: int, divisor: Tensor | int, loss_dtype: torch.dtype) -> Tensor:
    if reduction == 0:
        return losses.to(loss_dtype)
    loss = losses.sum()
    return (loss / divisor if reduction == 1 else loss).to(loss_dtype)


class _Terms:
    """A row's weights in the gradient, its upstream gradient included; a row that adds nothing has 0 for both."""

    def __init__(self, statistics: Tensor, grad_rows: Tensor) -> None:
        self.lse, alpha, beta = statistics
        adds_nothing = alpha == 0
        self.alpha = (grad_rows * alpha).masked_fill_(adds_nothing, 0)
        self.beta = (grad_rows * beta).masked_fill_(adds_nothing, 0)

    def by_score(self, exponents: Tensor, positive: Tensor, rows: slice, axis: int) -> Tensor:
        """``u_i G_ij`` from ``s_ij + log a_ij``, in the latter's memory; row i runs along the axis."""
        lse, alpha, beta = (term[rows].unsqueeze(1 - axis) for term in (self.lse, self.alpha, self.beta))
        return exponents.sub_(lse).exp_().mul_(alpha).sub_(beta * positive)


_ALL = slice(None)


def _symmetric_gradient(
    grad_rows: Tensor,
    units: _Units,
    statistics: Tensor,
    temperature: float,
    first_row: int,
    row_count: int,
    pairs: Callable[[slice], tuple[Tensor, Tensor, Tensor]],
) -> Tensor:
    """Where rows and columns are the same features; ``pairs`` gives, of a block of rows, which are positive, and
    log a_ij and log a_ji. ``[row_count, D]``"""
    terms, z = _Terms(statistics, grad_rows), units.z
    result = _library.empty((row_count, z.shape[1]), z.dtype, z)
    for rows, own in _blocks(first_row, row_count, len(z), z.dtype):
        positive, log_a, log_a_transposed = pairs(rows)
        scores = (z[rows] @ z.t()).div_(temperature)
        by_score = terms.by_score(scores + log_a, positive, rows, 0)
        by_score += terms.by_score(scores.add_(log_a_transposed), positive, _ALL, 1)
        result[own] = units.gradient(rows, (by_score @ z).div_(temperature))
    return result


# ---- ConR ----


class _Labels:
    """Which pairs ConR's labels and predictions make positive and negative, and the push of the negative ones."""

    def __init__(
        self,
        targets: Tensor,
        preds: Tensor,
        weights: Tensor | None,
        window: float,
        eta: float,
        variant: int,
        label_norm: int,
        dtype: torch.dtype,
    ) -> None:
        self.targets, self.preds, self.window, self.eta = targets, preds, window, eta
        self.log_push, self.label_norm, self.dtype = variant == VARIANTS["nyud2"], label_norm, dtype
        self.log_weights = None if weights is None else weights.log()

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of a block of rows, positive, negative, and the push's logarithm but for the weights."""
        d = _distances(self.targets, rows, self.label_norm)
        positive = d <= self.window
        positive.diagonal(rows.start).fill_(False)
        negative = (d > self.window).logical_and_(_distances(self.preds, rows, self.label_norm) <= self.window)
        push = d.mul_(self.eta)
        return positive, negative, (push.log_() if self.log_push else push).to(self.dtype)

    def log_a(self, positive: Tensor, negative: Tensor, push: Tensor, rows: slice, axis: int) -> Tensor:
        """The logarithm of row i's multipliers, where row i runs along the axis."""
        if self.log_weights is not None:
            push = push + self.log_weights[rows].unsqueeze(1 - axis)
        return push.where(negative, -torch.inf).masked_fill_(positive, 0)

    def both_ways(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        pairs = self.pairs(rows)
        log_a = self.log_a(*pairs, rows, 0)
        return pairs[0], log_a, log_a if self.log_weights is None else self.log_a(*pairs, _ALL, 1)


def _distances(labels: Tensor, rows: slice, norm: int) -> Tensor:
    """``|y_i - y_j|`` of rows i and all j, ``[B, N]``, from labels ``[N, K]``; one of K at a time."""
    differences = ((y[rows].unsqueeze(1) - y).abs_() for y in labels.unbind(1))
    total = next(differences)
    if labels.shape[1] == 1:
        return total
    if norm == LABEL_NORMS[2]:
        total.square_()
    for difference in differences:
        if norm == LABEL_NORMS[torch.inf]:
            total = torch.maximum(total, difference)
        else:
            total += difference.square_() if norm == LABEL_NORMS[2] else difference
    return total.sqrt_() if norm == LABEL_NORMS[2] else total


def conr(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor | None,
    window: float,
    temperature: float,
    eta: float,
    variant: int,
    label_norm: int,
    reduction: int,
    loss_dtype: torch.dtype,
    first_row: int,
    row_count: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    units, count = _Units(features, normalize=True), len(features)
    labels = _Labels(targets, preds, weights, window, eta, variant, label_norm, units.z.dtype)
    losses, statistics = units.z.new_empty(row_count), units.z.new_empty(3, row_count)
    for rows, own in _blocks(first_row, row_count, count, units.z.dtype):
        positive, negative, push = labels.pairs(rows)
        positives = positive.sum(1)
        alpha = ((positives > 0) & negative.any(1)).to(units.z.dtype)
        if variant == VARIANTS["nyud2"]:
            beta = alpha / (positives + 1)
            alpha = beta * positives
        else:
            alpha = alpha if weights is None else alpha * weights[rows]
            beta = alpha / positives.clamp_min(1)
        exponents = (units.z[rows] @ units.z.t()).div_(temperature)
        exponents += labels.log_a(positive, negative, push, rows, 0)
        extra = None if variant == VARIANTS["paper"] else count - positives
        losses[own], lse = _row_losses(exponents, positive, alpha, beta, extra)
        torch.stack((lse, alpha, beta), out=statistics[:, own])
    gradient = units.z.new_empty(0)
    if with_gradient:
        share = 1 / count if reduction == 1 and count > 0 else 1.0
        gradient = _symmetric_gradient(
            units.z.new_full((count,), share), units, statistics, temperature, 0, count, labels.both_ways
        )
    return _reduced(losses, reduction, max(count, 1), loss_dtype), statistics, gradient


def conr_backward(
    grad_rows: Tensor,
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor | None,
    statistics: Tensor,
    window: float,
    temperature: float,
    eta: float,
    variant: int,
    label_norm: int,
    first_row: int,
    row_count: int,
) -> Tensor:
    units = _Units(features, normalize=True)
    labels = _Labels(targets, preds, weights, window, eta, variant, label_norm, units.z.dtype)
    return _symmetric_gradient(grad_rows, units, statistics, temperature, first_row, row_count, labels.both_ways).to(
        features.dtype
    )


# ---- SupCon ----


def _of_same_label(labels: Tensor, dtype: torch.dtype) -> Callable[[slice], tuple[Tensor, Tensor, Tensor]]:
    def pairs(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        positive = labels[rows].unsqueeze(1) == labels
        positive.diagonal(rows.start).fill_(False)
        log_a = torch.zeros(positive.shape, dtype=dtype, device=labels.device)
        log_a.diagonal(rows.start).fill_(-torch.inf)
        return positive, log_a, log_a

    return pairs


def supcon(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    normalize: bool,
    reduction: int,
    loss_dtype: torch.dtype,
    first_row: int,
    row_count: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    units, count = _Units(features, normalize), len(features)
    pairs = _of_same_label(labels, units.z.dtype)
    losses, statistics = units.z.new_empty(row_count), units.z.new_empty(3, row_count)
    for rows, own in _blocks(first_row, row_count, count, units.z.dtype):
        positive, log_a, _ = pairs(rows)
        positives = positive.sum(1)
        alpha = (positives > 0).to(units.z.dtype)
        beta = alpha / positives.clamp_min(1)
        exponents = (units.z[rows] @ units.z.t()).div_(temperature).add_(log_a)
        losses[own], lse = _row_losses(exponents, positive, alpha, beta)
        torch.stack((lse, alpha, beta), out=statistics[:, own])
    anchors = statistics[1].sum().clamp_min(1)
    gradient = units.z.new_empty(0)
    if with_gradient:
        share = 1 / anchors if reduction == 1 else torch.ones_like(anchors)
        gradient = _symmetric_gradient(share.expand(count), units, statistics, temperature, 0, count, pairs)
    return _reduced(losses, reduction, anchors, loss_dtype), statistics, gradient


def supcon_backward(
    grad_rows: Tensor,
    features: Tensor,
    labels: Tensor,
    statistics: Tensor,
    temperature: float,
    normalize: bool,
    first_row: int,
    row_count: int,
) -> Tensor:
    units = _Units(features, normalize)
    pairs = _of_same_label(labels, units.z.dtype)
    return _symmetric_gradient(grad_rows, units, statistics, temperature, first_row, row_count, pairs).to(
        features.dtype
    )


# ---- InfoNCE ----


class _Matches:
    """Which keys are the positives of queries, and which are left out because they share a query's id.

    The positive of query i is key i + offset, where there is one. Either may be the rows of a block.
    """

    def __init__(self, ids: Tensor | None, column_ids: Tensor | None, columns: int, offset: int, like: Tensor) -> None:
        self.ids, self.column_ids, self.columns, self.offset, self.like = ids, column_ids, columns, offset, like

    def positive(self, rows: slice) -> Tensor:
        positive = self.like.new_zeros((rows.stop - rows.start, self.columns), dtype=torch.bool)
        positive.diagonal(rows.start + self.offset).fill_(True)
        return positive

    def leave_out(self, exponents: Tensor, positive: Tensor, rows: slice) -> Tensor:
        if self.ids is None or self.column_ids is None:
            return exponents
        same = self.ids[rows].unsqueeze(1) == self.column_ids
        return exponents.masked_fill_(same & ~positive, -torch.inf)


def _direction(
    x: _Units, y: _Units, log_q: Tensor | None, matches: _Matches, temperature: float
) -> tuple[Tensor, Tensor]:
    """Losses and statistics of rows x among rows y."""
    losses, statistics = x.z.new_empty(len(x.z)), x.z.new_empty(3, len(x.z))
    for rows, _ in _blocks(0, len(x.z), len(y.z), x.z.dtype):
        exponents = (x.z[rows] @ y.z.t()).div_(temperature)
        if log_q is not None:
            exponents -= log_q
        positive = matches.positive(rows)
        alpha = positive.any(1).to(x.z.dtype)
        losses[rows], lse = _row_losses(matches.leave_out(exponents, positive, rows), positive, alpha, alpha)
        torch.stack((lse, alpha, alpha), out=statistics[:, rows])
    return losses, statistics


def info_nce(
    query: Tensor,
    key: Tensor,
    log_q: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float,
    normalize: bool,
    by_query: bool,
    by_key: bool,
    offset: int,
    reduction: int,
    loss_dtype: torch.dtype,
    with_gradient: list[bool],
) -> tuple[Tensor, ...]:
    """``with_gradient`` is not for these blocks, which know no sums of columns before the last row."""
    q, k = _Units(query, normalize), _Units(key, normalize)
    losses = []
    query_statistics, key_statistics = q.z.new_empty(3, 0), q.z.new_empty(3, 0)
    if by_query:
        matches = _Matches(query_ids, key_ids, len(key), offset, q.z)
        loss, query_statistics = _direction(q, k, log_q, matches, temperature)
        losses.append(loss)
    if by_key:
        matches = _Matches(key_ids, query_ids, len(query), -offset, q.z)
        loss, key_statistics = _direction(k, q, None, matches, temperature)
        losses.append(loss)
    mean = losses[0] if len(losses) == 1 else (losses[0] + losses[1]).div_(2)
    loss, none = _reduced(mean, reduction, max(len(query), 1), loss_dtype), q.z.new_empty(0)
    return loss, query_statistics, key_statistics, none, none.clone()


def info_nce_backward(
    grad_queries: Tensor,
    grad_keys: Tensor,
    query: Tensor,
    key: Tensor,
    log_q: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_statistics: Tensor,
    key_statistics: Tensor,
    temperature: float,
    normalize: bool,
    offset: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor]:
    q, k = _Units(query, normalize), _Units(key, normalize)
    matches = _Matches(query_ids, key_ids, len(key), offset, q.z)
    by_query = _Terms(query_statistics, grad_queries) if query_statistics.shape[1] > 0 else None
    by_key = _Terms(key_statistics, grad_keys) if key_statistics.shape[1] > 0 else None
    needs_query, needs_key = needs_grad
    grad_query = _library.empty(query.shape if needs_query else (0,), query.dtype, query)
    by_k = torch.zeros_like(k.z) if needs_key else None
    for rows, _ in _blocks(0, len(query), len(key), q.z.dtype):
        positive = matches.positive(rows)
        scores = matches.leave_out((q.z[rows] @ k.z.t()).div_(temperature), positive, rows)
        by_score = torch.zeros_like(scores)
        if by_query is not None:
            by_score += by_query.by_score(scores - log_q if log_q is not None else scores.clone(), positive, rows, 0)
        if by_key is not None:
            by_score += by_key.by_score(scores, positive, _ALL, 1)
        by_score.div_(temperature)
        if needs_query:
            grad_query[rows] = q.gradient(rows, by_score @ k.z)
        if by_k is not None:
            by_k.addmm_(by_score.t(), q.z[rows])
    if by_k is None:
        return grad_query, _library.empty((0,), key.dtype, key)
    return grad_query, k.gradient(_ALL, by_k).to(key.dtype)

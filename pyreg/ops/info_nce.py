"""InfoNCE: the public function, and how torch traces, differentiates and batches it.

Kernels: ``csrc/info_nce`` and, on CUDA, ``triton_kernels/contrastive.py``, or torch's own operators where Triton is not
there (``pyreg/ops/_pairs.py``). Definition: :mod:`pyreg.reference.info_nce`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyreg.ops import _checks, _contrastive, _library, _ranks
from pyreg.ops._options import Reduction
from pyreg.reference import info_nce as reference

if TYPE_CHECKING:
    import torch.distributed as dist

_NAME = "info_nce"


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    log_q: Tensor | None = None,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | bool | None = None,
) -> Tensor:
    r"""InfoNCE with in-batch negatives: query i is to find key i among all keys. In place of
    ``F.cross_entropy(query @ key.T / temperature, torch.arange(N))``.

    .. code-block:: text

        s_ij = q_i . k_j / temperature,   rows of q and k divided by max(|.|, 1e-12) with normalize
        l_i  = log( sum_j exp(s_ij - log_q_j) ) - (s_ii - log_q_i)

    ``symmetric`` (CLIP's loss) takes the mean of it and of key i's loss among all queries, which has no ``log_q``.
    Forward and backward form no ``[N, M]`` tensor: the memory needed is that of the rows, some numbers a row and tiles.

    Args:
        query: ``[N, D]``, or ``[N, ...]``, which is flattened to it; float64, float32, bfloat16 or float16.
        key: ``[M, D]`` of query's dtype, ``M >= N``; keys after the first N are negatives only.
        temperature: above 0; a constant. One that is trained, as CLIP's, goes into the query:
            ``info_nce(F.normalize(query) / t, F.normalize(key), temperature=1.0, normalize=False)``.
        normalize: whether rows are brought to length 1.
        symmetric: both directions; needs ``M = N``.
        log_q: ``[M]``, the logarithm of each key's probability of being sampled: the logQ correction of retrieval.
        ids: ``[M]``, integers: what each key is. Key j is left out of row i, and query i of column j, where
            ``ids[j] == ids[i]`` for ``j != i``: duplicates of a positive are not its negatives.
        reduction: ``"mean"`` over queries, ``"sum"`` or ``"none"``.
        group: a process group of :mod:`torch.distributed`, or True for the default one: the queries and keys are those
            of all ranks, and the loss is the same number on each (for ``"none"``, the losses of the rank's own
            queries). The gradient is that of the global loss times the number of ranks, right under
            DistributedDataParallel's averaging. Ranks may have different numbers of rows; finding them out waits for
            the GPU. Not for ``torch.compile``.

    Returns:
        The loss, ``[]``, or ``[N]`` for ``"none"``; of query's dtype, float32 under autocast. Products are summed in
        float32, in float64 for float64. 0 for ``N = 0``.

    Gradient:
        With respect to ``query`` and ``key``, each only where it is needed; for rows shorter than 1e-12, which are
        divided by 1e-12, too. To any order: under ``create_graph`` and in ``torch.func`` it is the plain formula's,
        which has ``[N, M]`` tensors; of ``group`` the first order alone.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options that do not fit; the message says what was expected.
        ValueError: NaN or infinity in ``log_q``, looked for on the CPU in eager calls, and on CUDA where
            ``PYREG_CHECKS=1`` in the environment asks for it. Elsewhere it makes the loss NaN or infinite.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748; log_q:
    Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019.

    Example:
        >>> image, text = torch.randn(64, 128, requires_grad=True), torch.randn(64, 128, requires_grad=True)
        >>> pyreg.functional.info_nce(image, text, temperature=0.07, symmetric=True).backward()
    """
    code = _library.reduction_code(_NAME, reduction)
    temperature = _contrastive.check_temperature(_NAME, temperature)
    _checks.check_flag(_NAME, "normalize", normalize)
    _checks.check_flag(_NAME, "symmetric", symmetric)
    q = _contrastive.feature_rows(_NAME, "query", query)
    k = _contrastive.feature_rows(_NAME, "key", key)
    q, k = _check_pair(q, k, symmetric)
    if log_q is not None:
        log_q = _correction(log_q, k)
    if ids is not None:
        ids = _contrastive.integer_rows(_NAME, "ids", ids, k.shape[0], "M", key)
    ranks = None if group is None else _ranks.process_group(_NAME, group, q)

    if not _library.has_kernel(query):
        loss = reference.info_nce(q, k, temperature, normalize, symmetric, log_q, ids, reduction)
        return loss.to(_contrastive.loss_dtype(q))
    if ranks is not None:
        numbers = (temperature, normalize, symmetric, code, _contrastive.loss_dtype(q))
        return _InfoNceOfAllRanks.apply(ranks, numbers, q, k, log_q, ids)  # type: ignore[no-any-return, no-untyped-call]
    if q.shape[0] == 0:
        return _contrastive.loss_of_no_rows(q, code) + k[:0].sum()  # which leads to k
    query_ids = None if ids is None else ids[: q.shape[0]]
    with_gradient = [False, False]
    is_formed = code != 0 and q.is_cpu and _contrastive.forms_gradients()
    if is_formed and (not symmetric or q.shape[0] <= _contrastive.HELD_ROWS):
        with_gradient = [q.requires_grad, k.requires_grad]
    options = (temperature, normalize, True, symmetric, 0, code, _contrastive.loss_dtype(q), with_gradient)
    return _differentiable(q, k, log_q, query_ids, ids, *options)[0]  # type: ignore[no-any-return]


# ---- argument checks ----


def _check_pair(query: Tensor, key: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Rows that fit each other; of one dtype, where autocast has left them with two."""
    if key.device != query.device:
        raise ValueError(
            f"{_NAME}: expected key on query's device {query.device}, got {key.device}; "
            f"move it with key.to({str(query.device)!r})"
        )
    if key.dtype != query.dtype:
        if not _library.is_autocast(query):
            raise TypeError(
                f"{_NAME}: expected key of query's dtype {query.dtype}, got {key.dtype}; "
                "convert it with key.to(query.dtype)"
            )
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{_NAME}: expected key of shape [M, D] with query's D = {query.shape[1]}, got {list(key.shape)}"
        )
    count, keys = query.shape[0], key.shape[0]
    if keys < count or (symmetric and keys != count):
        expected = f"M = N = {count}, as symmetric needs," if symmetric else f"M >= N = {count}"
        raise ValueError(f"{_NAME}: expected key of shape [M, D] with {expected} rows, got {list(key.shape)}")
    return query, key


def _correction(log_q: Tensor, key: Tensor) -> Tensor:
    """``[M]``, contiguous, in the dtype in which the operator sums."""
    _contrastive.check_beside(_NAME, "log_q", log_q, key)
    _library.check_float(_NAME, "log_q", log_q)
    _checks.check_constant(_NAME, "log_q", log_q)
    if log_q.shape != key.shape[:1]:
        raise ValueError(f"{_NAME}: expected log_q of shape [M] = [{key.shape[0]}], got {list(log_q.shape)}")
    log_q = log_q.detach().to(_library.accumulate_dtype(key.dtype)).contiguous()
    if _checks.reads_values(log_q):
        _checks.check_finite(_NAME, "log_q", log_q)
    return log_q


# ---- the operator ----


for _operator in ("info_nce", "info_nce_backward"):
    _library.implement(_operator, _contrastive.on_cuda(_operator), ["CUDA"])

_forward, _backward = _library.operator("info_nce"), _library.operator("info_nce_backward")

_TENSORS = 5  # query, key, log_q, query_ids, key_ids


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    statistics, gradients = output[1:3], output[3:]
    ctx.mark_non_differentiable(*statistics, *gradients)
    ctx.set_materialize_grads(False)
    ctx.once = getattr(ctx, "is_eager", False)
    if ctx.once:  # held where the first backward pass can let go of them
        ctx.gradients = gradients
    ctx.save_for_backward(*inputs[:_TENSORS], *statistics, *((None, None) if ctx.once else gradients))
    *ctx.options, ctx.with_gradient = inputs[_TENSORS:]


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    no_others = (None,) * 11
    if grad_loss is None:
        return None, None, *no_others
    *tensors, query_statistics, key_statistics, grad_query, grad_key = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *_dense_gradients(ctx, grad_loss, *tensors), *no_others
    needs_grad = ctx.needs_input_grad[:2]
    if any(ctx.with_gradient):
        held = _library.take(ctx, "gradients") if ctx.once else (grad_query, grad_key)
        if held is None:  # another pass had them: formed again in the same way, they have the same bits
            held = _forward(*tensors, *ctx.options, ctx.with_gradient)[3:]
        is_last = ctx.once and not _library.is_batched(grad_loss)
        formed = (_contrastive.scaled(g, grad_loss, is_last).to(tensors[0].dtype) for g in held)
        return *(g if needed else None for g, needed in zip(formed, needs_grad, strict=True)), *no_others
    temperature, normalize, _, symmetric, offset, reduction, _ = ctx.options
    rows = _upstream(grad_loss.to(query_statistics.dtype), reduction, query_statistics.shape[1], symmetric)
    gradients = _backward(
        *(rows, rows if symmetric else rows.new_empty(0), *tensors, query_statistics, key_statistics),
        *(temperature, normalize, offset, needs_grad),
    )
    return *(g if needed else None for g, needed in zip(gradients, needs_grad, strict=True)), *no_others


def _upstream(grad_loss: Tensor, reduction: int, queries: int, symmetric: bool) -> Tensor:
    """The upstream gradient of each query's loss, ``[N]``; of each direction's where there are two."""
    divisor = (queries if reduction == 1 else 1) * (2 if symmetric else 1)
    return (grad_loss / divisor if divisor != 1 else grad_loss).expand(queries).contiguous()


def _dense_gradients(
    ctx: Any, grad_loss: Tensor, query: Tensor, key: Tensor, log_q: Tensor | None, _: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For create_graph and torch.func: the reference's, which both can differentiate further."""
    temperature, normalize, _, symmetric, _, reduction, dtype = ctx.options
    name = _contrastive.name_of(_library.REDUCTIONS, reduction)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return reference.info_nce(q, k, temperature, normalize, symmetric, log_q, ids, name).to(dtype)

    with torch.autocast(query.device.type, enabled=False):
        gradients: tuple[Tensor, Tensor] = torch.func.vjp(loss, query, key)[1](grad_loss)
    return gradients


_differentiable = _library.differentiable("info_nce", setup_context=_setup_context, backward=_differentiate)


# ---- of all ranks ----


class _InfoNceOfAllRanks(torch.autograd.Function):
    """Each rank computes its own queries among the keys of all ranks and, where symmetric, its own keys among all
    queries. Gathered keys are the positives of all queries, in their order, and then all others."""

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        options: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        log_q: Tensor | None,
        ids: Tensor | None,
    ) -> Tensor:
        temperature, normalize, symmetric, reduction, dtype = options
        count = len(query)
        ranks = _ranks.Ranks(_NAME, group, {"query": query, "key": key, "log_q": log_q, "ids": ids})
        others = None if symmetric else _ranks.Ranks(_NAME, group, {"key": key[count:]})
        if ranks.total == 0:
            return query.new_zeros(() if reduction else (0,), dtype=dtype)

        def gather_keys(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            positives = ranks.gather(rows[:count])
            return positives if others is None else torch.cat([positives, others.gather(rows[count:])])

        queries, keys, log_qs, key_ids = ranks.gather(query), *map(gather_keys, (key, log_q, ids))
        query_ids = None if key_ids is None else key_ids[: ranks.total]
        first, total = ranks.first_row, _library.accumulate_dtype(query.dtype)
        own_ids = None if ids is None else ids[:count]
        numbers = (0, total, [False, False])
        losses, statistics, *_ = _forward(
            query, keys, log_qs, own_ids, key_ids, temperature, normalize, True, False, first, *numbers
        )
        if symmetric:
            key_losses, _, by_key, *_ = _forward(
                queries, key, None, query_ids, ids, temperature, normalize, False, True, -first, *numbers
            )
            losses, statistics = (losses + key_losses) / 2, torch.cat([statistics, by_key])
        table = ranks.gather(torch.cat([losses.unsqueeze(0), statistics]).t()).t().contiguous()  # [4 or 7, N]
        ctx.save_for_backward(query, key, log_q, ids, queries, keys, log_qs, query_ids, key_ids, table)
        ctx.ranks, ctx.options = ranks, options
        if reduction != 0:
            losses = table[0].sum()
        if reduction == 1:
            losses = losses / ranks.total
        return losses.to(dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        _ranks.refuse_create_graph(_NAME)
        if not ctx.saved_tensors:  # no rank has a row
            return (None,) * 6
        query, key, log_q, ids, queries, keys, log_qs, query_ids, key_ids, table = ctx.saved_tensors
        temperature, normalize, symmetric, reduction, _ = ctx.options
        ranks: _ranks.Ranks = ctx.ranks
        count, first = len(query), ranks.first_row
        # DistributedDataParallel divides by the number of ranks.
        grad_loss = ranks.world_size * grad_loss.to(table.dtype)
        rows = _upstream(ranks.gather(grad_loss) if reduction == 0 else grad_loss, reduction, ranks.total, symmetric)
        by_query, by_key = table[1:4], table[4:] if symmetric else table.new_empty(3, 0)
        rows_by_key = rows if symmetric else rows.new_empty(0)

        def own(of_all: Tensor) -> Tensor:
            return of_all[..., first : first + count].contiguous()

        def part(of_keys: Tensor | None, some: slice) -> Tensor | None:
            return None if of_keys is None else of_keys[some]

        def gradient_of_keys(some: slice, rows_by_key: Tensor, by_key: Tensor, offset: int) -> Tensor:
            tensors = (queries, key[some], part(log_q, some), query_ids, part(ids, some))
            options = (temperature, normalize, offset, [False, True])
            return _backward(rows, rows_by_key, *tensors, by_query, by_key, *options)[1]  # type: ignore[no-any-return]

        grad_query = grad_key = None
        positives, others = slice(0, count), slice(count, len(key))
        if ctx.needs_input_grad[2]:
            tensors = (query, keys, log_qs, part(ids, positives), key_ids)
            options = (temperature, normalize, first, [True, False])
            grad_query, _ = _backward(own(rows), rows_by_key, *tensors, own(by_query), by_key, *options)
        if ctx.needs_input_grad[3]:
            grad_key = gradient_of_keys(positives, own(rows_by_key), own(by_key), -first)
            if len(key) > count:  # a key that is no query's positive
                other = gradient_of_keys(others, rows.new_empty(0), table.new_empty(3, 0), -ranks.total)
                grad_key = torch.cat([grad_key, other])
        return None, None, grad_query, grad_key, None, None


# ---- tracing and batching ----


@_library.fake("info_nce")
def _(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, by_query, by_key, _, reduction, dtype, with_gradient = options
    total = _library.accumulate_dtype(query.dtype)
    losses = query.shape[0] if by_query else key.shape[0]
    return (
        query.new_empty((losses,) if reduction == 0 else (), dtype=dtype),
        query.new_empty((3, query.shape[0] if by_query else 0), dtype=total),
        query.new_empty((3, key.shape[0] if by_key else 0), dtype=total),
        *(x.new_empty(x.shape if g else (0,), dtype=total) for x, g in zip((query, key), with_gradient, strict=True)),
    )


@_library.fake("info_nce_backward")
def _(grad_queries: Tensor, grad_keys: Tensor, query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    needs_query, needs_key = options[-1]
    return (
        query.new_empty(query.shape if needs_query else (0,)),
        key.new_empty(key.shape if needs_key else (0,)),
    )


_library.vmap_one_by_one("info_nce")
_library.vmap_one_by_one("info_nce_backward")

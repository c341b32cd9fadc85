"""What the operators of the pairwise contrastive family share: argument checks, kernels of CUDA, gradient rules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyreg.ops import _checks, _library, _pairs
from pyreg.ops._ranks import Ranks, refuse_create_graph
from pyreg.ops.scale_rows import scale_rows_

if TYPE_CHECKING:
    import torch.distributed as dist

Tensors = tuple[Tensor | None, ...]

# Rows whose scores are held from the loss to its gradient, which is formed with it.
HELD_ROWS = 1024

# For row_count: a number that tracing need not know.
ALL_ROWS = -1


# ---- argument checks ----


def feature_rows(operator: str, name: str, features: Tensor) -> Tensor:
    """``[N, D]``, contiguous, from ``[N, ...]``."""
    _library.check_float(operator, name, features)
    if features.dim() < 2 or (features.numel() == 0 and 0 in features.shape[1:]):
        raise ValueError(
            f"{operator}: expected {name} of shape [N, D] or [N, ...] with at least one feature a sample, got "
            f"{list(features.shape)}" + ("; use unsqueeze(1) for one feature" if features.dim() == 1 else "")
        )
    return (features if features.dim() == 2 else features.flatten(1)).contiguous()


def check_temperature(operator: str, temperature: float) -> float:
    return _checks.check_number(operator, "temperature", temperature, 0, or_equal=False)


def check_beside(operator: str, name: str, tensor: Tensor, features: Tensor) -> None:
    """An error unless the argument is a dense tensor on the features' device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
    _library.check_dense(operator, name, tensor)
    if tensor.device != features.device:
        raise ValueError(
            f"{operator}: expected {name} on the features' device {features.device}, got {tensor.device}; "
            f"move it with {name}.to({str(features.device)!r})"
        )


def check_real(operator: str, name: str, tensor: Tensor, features: Tensor) -> None:
    check_beside(operator, name, tensor, features)
    _checks.check_real(operator, name, tensor)


def integer_rows(operator: str, name: str, labels: Tensor, count: int, symbol: str, features: Tensor) -> Tensor:
    """Labels or ids ``[count]`` as int64."""
    check_beside(operator, name, labels, features)
    if labels.dtype not in _checks.INTEGERS:
        raise TypeError(f"{operator}: expected {name} to be integers, got {labels.dtype}; use {name}.long()")
    if labels.shape != (count,):
        raise ValueError(f"{operator}: expected {name} of shape [{symbol}] = [{count}], got {list(labels.shape)}")
    return labels.long().contiguous()


def name_of(codes: dict[Any, int], code: int) -> Any:
    """The option for which the schema has this integer."""
    return next(name for name, value in codes.items() if value == code)


def loss_dtype(features: Tensor) -> torch.dtype:
    """float32 under autocast, as torch's own losses; else the features' own."""
    if features.dtype != torch.float64 and _library.is_autocast(features):
        return torch.float32
    return features.dtype


def loss_of_no_rows(features: Tensor, reduction: int) -> Tensor:
    """0, or ``[0]`` for reduction none, that features ``[0, D]`` lead to."""
    rows = features.to(loss_dtype(features)).sum(1)
    return rows if reduction == 0 else rows.sum()


def forms_gradients() -> bool:
    """Whether a forward pass may form gradients too. Not in an exported program, which is one for any number of rows,
    and seldom goes backward."""
    return torch.is_grad_enabled() and not torch.compiler.is_exporting()


def scaled(gradient: Tensor, grad_loss: Tensor, is_last: bool) -> Tensor:
    """A gradient formed in the forward pass times the upstream one; in its memory if nobody needs it again."""
    if not is_last:
        return gradient * grad_loss
    scale_rows_(gradient, grad_loss.to(gradient.dtype))
    return gradient


# ---- kernels ----


def on_cuda(name: str, row_count: int | None = None) -> Callable[..., Any]:
    """``pyreg::<name>`` for CUDA tensors; ``row_count`` is the position of the argument of that name."""

    def operation(*args: Any) -> Any:
        first, arguments = args[0], list(args)
        if row_count is not None and arguments[row_count] == ALL_ROWS:
            arguments[row_count] = first.shape[0]
        return getattr(_kernels(), name)(*arguments)

    return operation


def _kernels() -> ModuleType:
    """Where CUDA's operators come from: Triton's kernels, or torch's own operators without Triton."""
    return importlib.import_module("pyreg.triton_kernels.contrastive") if _library.has_triton() else _pairs


# ---- a loss of features against themselves ----


class SymmetricLoss:
    """A differentiable operator of features against themselves: ConR, SupCon.

    Its arguments are tensors, the features first, then numbers, and then ``reduction, loss_dtype, first_row, row_count,
    with_gradient``; its results the loss, the rows' statistics, and the features' gradient where the forward pass was
    asked for it.

    Args:
        name: the operator; its gradient is ``<name>_backward``.
        tensors: the names of its tensors.
        numbers: how many there are.
        reference: the dense loss of ``(*tensors, *numbers, reduction)``, which create_graph differentiates.
        divisor: what a mean divides by, from the statistics of all rows.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: tuple[str, ...],
        numbers: int,
        reference: Callable[..., Tensor],
        divisor: Callable[[Tensor], Tensor | int],
    ) -> None:
        self.tensors, self._numbers, self._reference, self.divisor = tensors, numbers, reference, divisor
        self.forward, self.backward = _library.operator(name), _library.operator(f"{name}_backward")
        _library.fake(name)(_fake_symmetric)
        _library.fake(f"{name}_backward")(_fake_symmetric_backward)
        _library.vmap_one_by_one(name)
        _library.vmap_one_by_one(f"{name}_backward")
        self._differentiable = _library.differentiable(name, setup_context=self._setup, backward=self._backward)

    def __call__(self, features: Tensor, others: Tensors, numbers: tuple[Any, ...], reduction: int) -> Tensor:
        is_formed = features.requires_grad and reduction != 0 and forms_gradients()
        with_gradient = is_formed and features.shape[0] <= HELD_ROWS
        options = (reduction, loss_dtype(features), 0, ALL_ROWS, with_gradient)
        return self._differentiable(features, *others, *numbers, *options)[0]  # type: ignore[no-any-return]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, statistics, gradient = output
        ctx.mark_non_differentiable(statistics, gradient)
        ctx.set_materialize_grads(False)
        first_number = len(self.tensors)
        ctx.once = getattr(ctx, "is_eager", False)
        if ctx.once:  # held where the first backward pass can let go of it
            ctx.gradient = gradient
        ctx.save_for_backward(*inputs[:first_number], statistics, None if ctx.once else gradient)
        ctx.numbers = inputs[first_number : first_number + self._numbers]
        ctx.reduction, ctx.loss_dtype, _, _, ctx.with_gradient = inputs[-5:]

    def _backward(self, ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        no_others = (None,) * (len(self.tensors) + self._numbers + 4)
        if grad_loss is None:
            return None, *no_others
        features, *others, statistics, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            return self._dense_gradient(ctx, grad_loss, features, others), *no_others
        if ctx.with_gradient:
            if ctx.once:
                gradient = _library.take(ctx, "gradient")
            if gradient is None:  # another pass had it: formed again in the same way, it has the same bits
                options = (ctx.reduction, ctx.loss_dtype, 0, ALL_ROWS, True)
                gradient = self.forward(features, *others, *ctx.numbers, *options)[2]
            is_last = ctx.once and not _library.is_batched(grad_loss)
            return scaled(gradient, grad_loss, is_last).to(features.dtype), *no_others
        rows = self.upstream(grad_loss, statistics, ctx.reduction)
        return self.backward(rows, features, *others, statistics, *ctx.numbers, 0, ALL_ROWS), *no_others

    def upstream(self, grad_loss: Tensor, statistics: Tensor, reduction: int) -> Tensor:
        """The upstream gradient ``[N]`` of each row's loss."""
        rows = grad_loss.to(statistics.dtype)
        if reduction == 0:  # a row that adds nothing has no part in the gradient, whatever comes from above
            return rows.masked_fill(statistics[1] == 0, 0)
        if reduction == 1:
            rows = rows / self.divisor(statistics)
        return rows.expand(statistics.shape[1]).contiguous()

    def _dense_gradient(self, ctx: Any, grad_loss: Tensor, features: Tensor, others: Sequence[Tensor | None]) -> Tensor:
        """For create_graph and torch.func: the reference's, which both can differentiate further."""

        def loss(x: Tensor) -> Tensor:
            return self._reference(x, *others, *ctx.numbers, ctx.reduction).to(ctx.loss_dtype)

        with torch.autocast(features.device.type, enabled=False):
            pullback = torch.func.vjp(loss, features)[1]
            gradient: Tensor = pullback(grad_loss)[0]
        return gradient

    def of_all_ranks(
        self,
        operator: str,
        group: dist.ProcessGroup,
        features: Tensor,
        others: Tensors,
        numbers: tuple[Any, ...],
        reduction: int,
    ) -> Tensor:
        """The loss of the group's rows together."""
        arguments = (self, operator, group, numbers, reduction, loss_dtype(features), features, *others)
        return _SymmetricLossOfAllRanks.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _SymmetricLossOfAllRanks(torch.autograd.Function):
    """Each rank computes its own rows of the pairs, against the gathered columns of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: SymmetricLoss,
        operator: str,
        group: dist.ProcessGroup,
        numbers: tuple[Any, ...],
        reduction: int,
        dtype: torch.dtype,
        features: Tensor,
        *others: Tensor | None,
    ) -> Tensor:
        local = (features, *others)
        ctx.operator = operator
        ranks = Ranks(operator, group, dict(zip(loss.tensors, local, strict=True)))
        if ranks.total == 0:
            return features.new_zeros(() if reduction else (0,), dtype=dtype)
        tensors = [None if tensor is None else ranks.gather(tensor) for tensor in local]
        total, own = _library.accumulate_dtype(features.dtype), (ranks.first_row, len(features))
        losses, statistics, _ = loss.forward(*tensors, *numbers, 0, total, *own, False)
        table = ranks.gather(torch.cat([statistics, losses.unsqueeze(0)]).t()).t().contiguous()  # [4, N]
        statistics = table[:3]
        ctx.save_for_backward(*tensors, statistics)
        ctx.loss, ctx.ranks, ctx.own, ctx.numbers, ctx.reduction = loss, ranks, own, numbers, reduction
        if reduction != 0:
            losses = table[3].sum()
        if reduction == 1:
            losses = losses / loss.divisor(statistics)
        return losses.to(dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph(ctx.operator)
        if not ctx.saved_tensors:  # no rank has a row
            return (None,) * len(ctx.needs_input_grad)
        *tensors, statistics = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        # DistributedDataParallel divides by the number of ranks.
        grad_loss = ranks.world_size * grad_loss.to(statistics.dtype)
        of_all = ranks.gather(grad_loss) if ctx.reduction == 0 else grad_loss
        rows = ctx.loss.upstream(of_all, statistics, ctx.reduction)
        gradient = ctx.loss.backward(rows, *tensors, statistics, *ctx.numbers, *ctx.own)
        return *(None,) * 6, gradient, *(None,) * (len(tensors) - 1)


def _fake_symmetric(features: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, dtype, _, row_count, with_gradient = options[-5:]
    row_count = _rows_of(features, row_count)
    total = _library.accumulate_dtype(features.dtype)
    return (
        features.new_empty((row_count,) if reduction == 0 else (), dtype=dtype),
        features.new_empty((3, row_count), dtype=total),
        features.new_empty(features.shape if with_gradient else (0,), dtype=total),
    )


def _fake_symmetric_backward(grad_rows: Tensor, features: Tensor, *options: Any) -> Tensor:
    return features.new_empty((_rows_of(features, options[-1]), features.shape[1]))


def _rows_of(features: Tensor, row_count: int) -> int:
    return features.shape[0] if row_count == ALL_ROWS else row_count

"""StableMax cross-entropy of a linear layer, whose logits exist a chunk of rows at a time.

A chunk's logits are the product of the weights with its rows. The kernels of :mod:`pyreg.ops.stablemax` turn them into
loss and gradient in their own memory, and two more products take them to the gradients of input and weight: three in
all, and no second pass over the rows. On CUDA, Triton kernels (``triton_kernels/linear_stablemax.py``) do the first
half inside the product. Definition: :mod:`pyreg.reference.linear_stablemax`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _classes, _library
from pyreg.ops.scale_rows import scale_rows_
from pyreg.ops.stablemax import stablemax_cross_entropy
from pyreg.reference import linear_stablemax as reference

_NAME = "linear_stablemax_cross_entropy"


def linear_stablemax_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""StableMax cross-entropy of ``input @ linear_weight.T + linear_bias``, in place of
    :func:`torch.nn.functional.linear_cross_entropy`: the loss of a language model's head without its logits.

    .. code-block:: text

        z = input @ linear_weight.T + linear_bias
        L = -sum_j q_j log stablemax(z)_j;   for a class index y:  log1p(R / s(z_y)),  R = sum_{k != y} s(z_k)

    The logits ``[N, C]`` exist for some hundred rows at a time: beside the gradients, the memory needed is a tenth of
    theirs. Where a gradient is needed it is formed together with the loss, in three matrix products: evaluate under
    :class:`torch.no_grad` to pay for one.

    Args:
        input: ``[H]``, ``[N, H]`` or ``[..., H]``; float64, float32, bfloat16 or float16.
        linear_weight: ``[C, H]``, of the input's dtype.
        target: class indices, of the input's shape without ``H``, int64; or probabilities, of the logits' shape, which
            are as large as the logits and so take the plain composition of the two operators.
        linear_bias: ``[C]``, or none.
        weight: class weights ``[C]``, or none.
        reduction: ``"mean"`` (over the weights of the targets), ``"sum"`` or ``"none"``.
        ignore_index: a class index whose rows add nothing to loss and gradient.
        label_smoothing: in ``[0, 1]``.

    Returns:
        The loss, ``[]``, or the target's shape for ``"none"``; of the input's dtype. Under autocast the products are
        made in autocast's dtype and the loss is float32. float16 is computed in float32 on the CPU.

    Gradient:
        With respect to ``input``, ``linear_weight`` and ``linear_bias``, each only where it is needed; the weight's is
        summed over rows in float32 (float64 for float64) and rounded once. To any order: under ``create_graph`` the
        gradient is that of the plain composition, logits included. With ``reduction="none"`` the backward pass makes
        the logits again for the gradients of weight and bias. ``weight`` has none.

    Raises:
        ValueError, TypeError: shapes, dtypes, options that do not fit; the message says what was expected.
        IndexError: a class index outside ``[0, C)``. On CUDA it makes the loss NaN instead; ``PYREG_CHECKS=1`` in the
            environment raises there too, at the price of waiting for the GPU.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> hidden, head = torch.randn(4096, 1024), torch.nn.Linear(1024, 32000, bias=False)
        >>> target = torch.randint(32000, (4096,))
        >>> pyreg.functional.linear_stablemax_cross_entropy(hidden, head.weight, target).backward()
    """
    code = _library.reduction_code(_NAME, reduction)
    smoothing = _classes.check_smoothing(_NAME, label_smoothing)
    labels = _check_tensors(input, linear_weight, target, linear_bias, ignore_index)
    compute = _compute_dtype(input)
    if weight is not None:
        weight = _classes.check_weight(_NAME, weight, linear_weight.shape[0], input)
    if not labels or _has_small_logits(input, linear_weight):
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        if input.dim() > 2:
            logits, target = logits.flatten(0, -2), target.flatten(0, -2 if not labels else -1)
        loss = stablemax_cross_entropy(logits, target, weight, ignore_index, reduction, smoothing)
        return loss.reshape(input.shape[:-1]) if code == 0 else loss
    rows, row_target = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1).long()
    if not _library.has_kernel(input):
        loss = reference.linear_stablemax_cross_entropy(
            rows, linear_weight, row_target, linear_bias, weight, ignore_index, reduction, smoothing
        )
        return loss.reshape(target.shape) if code == 0 else loss
    grad_enabled = torch.is_grad_enabled()
    needs_grad = [
        grad_enabled and tensor is not None and tensor.requires_grad for tensor in (input, linear_weight, linear_bias)
    ]
    loss_dtype = torch.float32 if _is_autocast(input) else input.dtype
    loss = _differentiable(
        *(rows, linear_weight, row_target, linear_bias, weight, code, ignore_index, smoothing),
        *(compute, loss_dtype, needs_grad),
    )[0]
    return loss.reshape(target.shape) if code == 0 else loss  # type: ignore[no-any-return]


# Logits that stay in cache cost nothing to hold, and one loss less of Python's time than chunks of rows: at
# 64 x 128 -> 113 on 2 cores 100 us where a chunk takes 260.
_SMALL_LOGITS_BYTES = 1 << 20


def _has_small_logits(input: Tensor, linear_weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    logits = input.numel() // max(input.shape[-1], 1) * linear_weight.shape[0]
    return 0 < 4 * logits <= _SMALL_LOGITS_BYTES and _library.has_kernel(input)


# ---- argument checks ----


def _check_tensors(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, ignore_index: int
) -> bool:
    """Whether the target holds class indices; errors where the tensors do not fit each other."""
    named = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        named["linear_bias"] = linear_bias
    for name, tensor in named.items():
        _library.check_float(_NAME, name, tensor)
    if not isinstance(target, Tensor):
        raise TypeError(f"{_NAME}: expected target to be a tensor, got {type(target).__name__}")
    for name, tensor in {**named, "target": target}.items():
        if tensor.device != input.device:
            raise ValueError(
                f"{_NAME}: expected {name} on input's device {input.device}, got {tensor.device}; "
                f"move it with {name}.to(input.device)"
            )
        if name != "target" and tensor.dtype != input.dtype and not _is_autocast(input):
            raise TypeError(
                f"{_NAME}: expected {name} of input's dtype {input.dtype}, got {tensor.dtype}; "
                f"convert it with {name}.to(input.dtype)"
            )
    if input.dim() == 0:
        raise ValueError(f"{_NAME}: expected input of shape [H], [N, H] or [..., H], got a 0-d tensor")
    hidden = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != hidden:
        raise ValueError(
            f"{_NAME}: expected linear_weight of shape [C, H] = [C, {hidden}] for input "
            f"{_library.shape_text(input)}, got {list(linear_weight.shape)}"
        )
    classes = linear_weight.shape[0]
    if classes == 0:
        shape = _library.shape_text(linear_weight)
        raise ValueError(f"{_NAME}: expected at least one class, got linear_weight {shape}")
    if linear_bias is not None and linear_bias.shape != (classes,):
        raise ValueError(f"{_NAME}: expected linear_bias of shape [C] = [{classes}], got {list(linear_bias.shape)}")
    if target.shape == (*input.shape[:-1], classes) and target.is_floating_point():
        if ignore_index >= 0:
            raise ValueError(
                f"{_NAME}: ignore_index is for class indices; target holds probabilities, got ignore_index = "
                f"{ignore_index}. Give the rows to leave out a target of zeros"
            )
        return False
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{_NAME}: expected target of shape {list(input.shape[:-1])} (class indices) or "
            f"{[*input.shape[:-1], classes]} (probabilities) for input [..., H] = {list(input.shape)}, got "
            f"{list(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{_NAME}: expected class indices of dtype int64, got {target.dtype}; use target.long()")
    return True


def _is_autocast(input: Tensor) -> bool:
    return torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64


def _compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the matrix products' operands."""
    dtype = torch.get_autocast_dtype(input.device.type) if _is_autocast(input) else input.dtype
    # The CPU's own float16 products take several times float32's time, and gradients without the upstream factor, the
    # loss scale, would underflow.
    return torch.float32 if dtype == torch.float16 else dtype


# ---- chunks of rows ----

# The logits of a chunk are an eleventh of all logits of float32, but not fewer than 16 MB; more than 1024 rows gain
# nothing. The products like multiples of 32 rows: with 4096 rows of 1024 features and 32,000 classes on 2 cores, chunks
# of 352 take 2.61 s, of 410 2.92 s, and undivided products 2.52 s.
_CHUNK_SHARE = 11
_LEAST_CHUNK_BYTES = 16 << 20
_MOST_CHUNK_ROWS = 1024
_CHUNK_MULTIPLE = 32

# Classes whose 16-bit products are added to float32 sums at a time: 4 MB at 1024 features.
_CLASS_BLOCK = 1024


def _chunk_rows(rows: int, classes: int) -> int:
    chunk = max(rows // _CHUNK_SHARE, _LEAST_CHUNK_BYTES // (4 * classes))
    return max(min(chunk, _MOST_CHUNK_ROWS) // _CHUNK_MULTIPLE, 1) * _CHUNK_MULTIPLE


class _Sums:
    """The gradients for losses that are summed, or weighted by an upstream gradient; empty where not needed."""

    def __init__(self, input: Tensor, linear_weight: Tensor, compute: torch.dtype, needs_grad: list[bool]) -> None:
        rows, hidden = input.shape
        classes = linear_weight.shape[0]
        total = _library.accumulate_dtype(compute)
        self.needs_input, self.needs_weight, self.needs_bias = needs_grad
        self.input = _library.empty((rows, hidden) if self.needs_input else (0,), input.dtype, input)
        self.weight = _library.empty((classes, hidden) if self.needs_weight else (0,), total, input)
        self.bias = _library.empty((classes,) if self.needs_bias else (0,), total, input)

    def add(self, rows: slice, gradient: Tensor, x: Tensor, linear_weight: Tensor, upstream: Tensor | None) -> None:
        """Takes the gradient ``[C, n]`` of the logits of some rows ``x [n, H]``; ``upstream [n]`` weights the rows."""
        keep = rows.start > 0
        if self.needs_input:
            if upstream is None and gradient.dtype == self.input.dtype:
                torch.mm(gradient.t(), linear_weight, out=self.input[rows])
            else:
                product = gradient.t() @ linear_weight
                self.input[rows] = product if upstream is None else product * upstream.unsqueeze(1)
        if self.needs_weight:
            weighted = x if upstream is None else (x * upstream.unsqueeze(1)).to(x.dtype)
            _add_product(self.weight, gradient, weighted, keep)
        if self.needs_bias:
            ones = self.bias.new_ones(x.shape[0], 1) if upstream is None else upstream.unsqueeze(1)
            _add_product(self.bias.unsqueeze(1), gradient, ones, keep)

    def as_tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input, self.weight, self.bias


def _add_product(total: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """``total += left @ right``, summed in total's dtype; ``total = left @ right`` without ``keep``."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right, beta=float(keep))
        return
    for first in range(0, left.shape[0], _CLASS_BLOCK):
        block = slice(first, first + _CLASS_BLOCK)
        product = (left[block].to(right.dtype) @ right).to(total.dtype)
        total[block] = total[block] + product if keep else product


def _run_chunks(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: tuple[Any, ...],
    compute: torch.dtype,
    losses: Tensor,
    sums: _Sums | None,
    upstream: Tensor | None,
) -> None:
    """Fills ``losses [N]`` and, where given, ``sums``. Options: class weights, reduction, ignore_index, smoothing."""
    classes, count = linear_weight.shape[0], input.shape[0]
    linear_weight = linear_weight.to(compute)
    bias = None if linear_bias is None else linear_bias.to(compute).unsqueeze(1)
    step = _chunk_rows(count, classes)
    memory = _library.empty((classes * min(step, count),), compute, input)
    if count == 0 and sums is not None:
        sums.weight.zero_()
        sums.bias.zero_()
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        x, y = input[rows].to(compute), target[rows].unsqueeze(0)
        # Classes first: the faster layout for the products that make and take the logits.
        logits = memory[: classes * x.shape[0]].view(classes, x.shape[0])
        if bias is None:
            torch.mm(linear_weight, x.t(), out=logits)
        else:
            torch.addmm(bias, linear_weight, x.t(), out=logits)
        if sums is None:
            losses[rows] = _cross_entropy(logits.unsqueeze(0), y, *options, losses.dtype)[0].squeeze(0)
        else:
            losses[rows] = _cross_entropy_in_place(logits.unsqueeze(0), y, *options, losses.dtype).squeeze(0)
            sums.add(rows, logits, x, linear_weight, None if upstream is None else upstream[rows])


_cross_entropy = _library.operator("stablemax_cross_entropy")
_cross_entropy_in_place = _library.operator("stablemax_cross_entropy_")


def _total_weight(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides by."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum().to(dtype)
    return (weight[target.clamp(0, weight.shape[0] - 1)] * counts).sum().to(dtype)


# ---- the operators ----


def _forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    compute: torch.dtype,
    loss_dtype: torch.dtype,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, a mean's divisor, and the gradients for the sum of the losses, as far as they are needed and one
    upstream gradient serves all rows."""
    if target.is_cpu or _library.checks_values():
        _classes.check_labels(_NAME, target, linear_weight.shape[0], ignore_index)
    total = _library.accumulate_dtype(compute)
    losses = input.new_empty(input.shape[0], dtype=total)
    needs_grad = _formed_in_forward(reduction, needs_grad)
    sums = _Sums(input, linear_weight, compute, needs_grad)
    options = (weight, 0, ignore_index, label_smoothing)
    _run_chunks(
        input, linear_weight, target, linear_bias, options, compute, losses, sums if any(needs_grad) else None, None
    )
    total_weight = _total_weight(target, weight, ignore_index, total)
    loss = losses if reduction == 0 else losses.sum()
    if reduction == 1:
        loss = loss / total_weight
    return loss.to(loss_dtype), total_weight, *sums.as_tuple()


def _formed_in_forward(reduction: int, needs_grad: list[bool]) -> list[bool]:
    """Of losses that are not reduced, each row has an upstream gradient of its own, by which only input's gradient can
    be multiplied afterwards."""
    needs_input, needs_weight, needs_bias = needs_grad
    if reduction == 0 and (needs_weight or needs_bias):
        return [False, False, False]
    return [needs_input, needs_weight, needs_bias]


def _backward_chunks(
    grad_rows: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    compute: torch.dtype,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients where row ``i``'s loss has the upstream gradient ``grad_rows[i]``."""
    total = _library.accumulate_dtype(compute)
    losses = input.new_empty(input.shape[0], dtype=total)
    sums = _Sums(input, linear_weight, compute, needs_grad)
    upstream = grad_rows.to(total).masked_fill(target == ignore_index, 0)
    options = (weight, 0, ignore_index, label_smoothing)
    _run_chunks(input, linear_weight, target, linear_bias, options, compute, losses, sums, upstream)
    return sums.as_tuple()


_library.implement(_NAME, _forward)
_library.implement(f"{_NAME}_backward", _backward_chunks)

_recompute = _library.operator(f"{_NAME}_backward")


# ---- gradient ----

_PARAMETERS = (0, 1, 3)  # input, linear_weight and linear_bias among the operator's arguments


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reduction, ctx.ignore_index, ctx.smoothing, ctx.compute, _, ctx.needs_grad = inputs
    total_weight, *gradients = output[1:]
    ctx.mark_non_differentiable(total_weight, *gradients)
    ctx.set_materialize_grads(False)
    ctx.formed = _formed_in_forward(ctx.reduction, ctx.needs_grad)
    ctx.once = getattr(ctx, "is_eager", False)
    if ctx.once:  # held where the first backward pass can let go of them
        ctx.gradients = gradients
        gradients = []
    ctx.save_for_backward(*tensors, total_weight, *gradients)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    input, linear_weight, target, linear_bias, weight, total_weight, *gradients = ctx.saved_tensors
    parameters = (input, linear_weight, linear_bias)
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad_loss, parameters, target, weight)
    factor = grad_loss.to(total_weight.dtype)
    if ctx.reduction == 1:
        factor = factor / total_weight.where(total_weight != 0, 1)  # every row's gradient is 0 then
    in_place = ctx.once and not _library.is_batched(grad_loss)
    if ctx.once:
        gradients = ctx.gradients
        if in_place:
            ctx.gradients = None
    wanted = [ctx.needs_input_grad[index] for index in _PARAMETERS]
    if gradients is None or any(want and not have for want, have in zip(wanted, ctx.formed, strict=True)):
        # One upstream gradient for all rows is multiplied in afterwards, so that this result has the other's bits.
        rows = factor if ctx.reduction == 0 else total_weight.new_ones(target.shape)
        gradients = _recompute(
            *(rows, input, linear_weight, target, linear_bias, weight),
            *(ctx.ignore_index, ctx.smoothing, ctx.compute, wanted),
        )
        factor = torch.ones_like(total_weight) if ctx.reduction == 0 else factor
    elif ctx.reduction == 0:
        factor = factor.masked_fill(target == ctx.ignore_index, 0)
    result: list[Tensor | None] = [None] * 11
    for index, gradient, parameter, want in zip(_PARAMETERS, gradients, parameters, wanted, strict=True):
        if want:
            result[index] = _times(gradient, factor, parameter.dtype, in_place)
    return tuple(result)


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """``gradient * factor``, one factor for all or one a row, rounded once."""
    if in_place and gradient.dtype == dtype:
        scale_rows_(gradient, factor)
        return gradient
    if factor.dim() > 0:
        factor = factor.view(-1, *[1] * (gradient.dim() - 1))
    return (gradient * factor).to(dtype)


def _differentiable_backward(
    ctx: Any, grad_loss: Tensor, parameters: tuple[Tensor | None, ...], target: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """For create_graph: the gradient of the plain composition, which autograd can follow further."""
    with torch.autocast(target.device.type, enabled=False):
        operands = [None if tensor is None else tensor.to(ctx.compute) for tensor in parameters]
        logits = torch.nn.functional.linear(*operands)  # type: ignore[arg-type]
        reduction = ("none", "mean", "sum")[ctx.reduction]
        loss = stablemax_cross_entropy(logits, target, weight, ctx.ignore_index, reduction, ctx.smoothing)
        wanted = {
            index: tensor
            for index, tensor in zip(_PARAMETERS, parameters, strict=True)
            if tensor is not None and ctx.needs_input_grad[index]
        }
        gradients = torch.autograd.grad(loss, tuple(wanted.values()), grad_loss.to(loss.dtype), create_graph=True)
    found = dict(zip(wanted, gradients, strict=True))
    return tuple(found.get(index) for index in range(11))


_differentiable = _library.differentiable(_NAME, setup_context=_setup_context, backward=_backward)


# ---- tracing and batching ----


@_library.fake(_NAME)
def _(input: Tensor, linear_weight: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, _, compute, loss_dtype, needs_grad = options
    loss = input.new_empty(target.shape if reduction == 0 else (), dtype=loss_dtype)
    total_weight = input.new_empty((), dtype=_library.accumulate_dtype(compute))
    sums = _Sums(input, linear_weight, compute, _formed_in_forward(reduction, needs_grad))
    return loss, total_weight, *sums.as_tuple()


@_library.fake(f"{_NAME}_backward")
def _(grad_rows: Tensor, input: Tensor, linear_weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, compute, needs_grad = options
    return _Sums(input, linear_weight, compute, needs_grad).as_tuple()


_library.vmap_one_by_one(_NAME)
_library.vmap_one_by_one(f"{_NAME}_backward")

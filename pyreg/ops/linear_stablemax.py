"""StableMax cross-entropy of a linear layer, whose logits exist a chunk of rows at a time.

A chunk's logits are the product of the weights with its rows. The kernels of :mod:`pyreg.ops.stablemax` turn them into
loss and gradient in their own memory, and two more products take them to the gradients of input and weight: three in
all, and no second pass over the rows. On CUDA, Triton kernels (``triton_kernels/linear_stablemax.py``) do the first
half inside the product. Definition: :mod:`pyreg.reference.linear_stablemax`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyreg.ops import _classes, _library
from pyreg.ops.scale_rows import scale_rows_
from pyreg.ops.stablemax import cross_entropy_as, gradient_expression
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
    theirs; 16-bit weights, whose gradient is summed in float32, need that sum and, where products are made in another
    dtype, a copy besides. Where a gradient is needed it is formed together with the loss, in three matrix products:
    evaluate under :class:`torch.no_grad` to pay for one.

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
        >>> hidden, head = torch.randn(256, 64), torch.nn.Linear(64, 8000, bias=False)
        >>> target = torch.randint(8000, (256,))
        >>> pyreg.functional.linear_stablemax_cross_entropy(hidden, head.weight, target).backward()
    """
    code = _library.reduction_code(_NAME, reduction)
    smoothing = _classes.check_smoothing(_NAME, label_smoothing)
    _classes.check_ignore_index(_NAME, ignore_index)
    labels = _check_tensors(input, linear_weight, target, linear_bias, ignore_index)
    compute = _compute_dtype(input, smoothing)
    if weight is not None:
        weight = _classes.check_weight(_NAME, weight, linear_weight.shape[0], input)
    if not labels or _has_small_logits(input, linear_weight):
        logits = _held_logits(input, linear_weight, linear_bias, compute)
        if input.dim() > 2:
            logits, target = logits.flatten(0, -2), target.flatten(0, -2 if not labels else -1)
        loss = cross_entropy_as(_NAME, logits, target, weight, ignore_index, reduction, smoothing)
        loss = loss.to(_loss_dtype(input))
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
    loss = _differentiable(
        *(rows, linear_weight, row_target, linear_bias, weight, code, ignore_index, smoothing),
        *(compute, _loss_dtype(input), needs_grad),
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


def _held_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, compute: torch.dtype) -> Tensor:
    """All of them; in float32 where float16 is not computed in, whose largest number is soon reached."""
    if compute == torch.float32 and torch.float16 in (input.dtype, _autocast_dtype(input)):
        with _library.no_autocast(input):
            bias = None if linear_bias is None else linear_bias.to(compute)
            return torch.nn.functional.linear(input.to(compute), linear_weight.to(compute), bias)
    return torch.nn.functional.linear(input, linear_weight, linear_bias)


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
        _classes.check_nothing_ignored(_NAME, ignore_index)
        return False
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{_NAME}: expected target of shape {list(input.shape[:-1])} (class indices) or "
            f"{[*input.shape[:-1], classes]} (probabilities) for input [..., H] = {list(input.shape)}, got "
            f"{list(target.shape)}"
        )
    _classes.check_label_dtype(_NAME, target)
    return True


def _is_autocast(input: Tensor) -> bool:
    return input.dtype != torch.float64 and _library.is_autocast(input)


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    return torch.get_autocast_dtype(input.device.type) if _is_autocast(input) else None


def _loss_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if _is_autocast(input) else input.dtype


def _compute_dtype(input: Tensor, smoothing: float) -> torch.dtype:
    """The dtype of the matrix products' operands."""
    dtype = _autocast_dtype(input) or input.dtype
    # The logits' gradients, some of a millionth, are below float16's numbers: only the tiles keep them at a scale of
    # their own. The CPU's float16 products take several times float32's time besides.
    has_tiles = smoothing == 0 and _has_tiles(input)
    return torch.float32 if dtype == torch.float16 and not has_tiles else dtype


# ---- chunks of rows ----

# The logits of a chunk are a thirteenth of all logits of float32, but not fewer than 16 MB; more than 1024 rows gain
# nothing. The products like multiples of 32 rows: with 4096 rows of 1024 features and 32,000 classes on 2 cores, chunks
# of 288 take 2.69 s, of 352 2.61 s, of 410 2.92 s, and undivided products 2.52 s.
_CHUNK_SHARE = 13
_LEAST_CHUNK_BYTES = 16 << 20
_MOST_CHUNK_ROWS = 1024
_CHUNK_MULTIPLE = 32
# On a GPU a chunk's 16-bit derivatives take as much memory as the gradient of the weight, and adding to the latter's
# float32 sum, 8 bytes for every 2 H operations, stays below the time of the product.
_LEAST_TILED_ROWS = 1024
_TILED_MULTIPLE = 128

# Classes whose 16-bit products are added to float32 sums at a time: 4 MB at 1024 features.
_CLASS_BLOCK = 1024


class _Problem(NamedTuple):
    """What both ways through the chunks take."""

    input: Tensor  # [N, H]
    linear_weight: Tensor  # [C, H]
    target: Tensor  # [N]
    linear_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    compute: torch.dtype

    @property
    def total(self) -> torch.dtype:
        return _library.accumulate_dtype(self.compute)

    @property
    def is_tiled(self) -> bool:
        """Whether the Triton kernels do it."""
        return self.label_smoothing == 0 and self.compute != torch.float64 and _has_tiles(self.input)

    @property
    def chunk_rows(self) -> int:
        count, hidden = self.input.shape
        if self.is_tiled:
            chunks = max(-(-count // max(hidden, _LEAST_TILED_ROWS)), 1)
            return max(-(-count // (chunks * _TILED_MULTIPLE)), 1) * _TILED_MULTIPLE
        chunk = max(count // _CHUNK_SHARE, _LEAST_CHUNK_BYTES // (4 * self.linear_weight.shape[0]))
        return max(min(chunk, _MOST_CHUNK_ROWS) // _CHUNK_MULTIPLE, 1) * _CHUNK_MULTIPLE

    @property
    def chunks(self) -> list[slice]:
        step = self.chunk_rows
        return [slice(first, min(first + step, self.input.shape[0])) for first in range(0, self.input.shape[0], step)]

    def divides_in_forward(self, reduction: int) -> bool:
        """Whether the gradients that the forward pass forms are those of the mean, or of the sum.

        Of 16-bit operands, only the tiles' can be multiplied by a number without being rounded anew; in float16 the
        result would be below the smallest number.
        """
        exact = self.compute.itemsize > 2 or (self.is_tiled and self.compute == torch.bfloat16)
        return reduction == 1 and exact

    @property
    def input_total(self) -> torch.dtype:
        """The dtype of the input's gradient until its upstream gradient is known: in float16 that is the loss scale,
        which lifts it above the smallest number."""
        return self.total if self.input.dtype == torch.float16 else self.input.dtype

    @property
    def weight_total(self) -> torch.dtype:
        """The dtype of the weight's gradient until its upstream gradient is known: one chunk's bfloat16 product is
        rounded once, at its end."""
        alone = self.is_tiled and self.compute == self.linear_weight.dtype == torch.bfloat16
        return torch.bfloat16 if alone and self.input.shape[0] <= self.chunk_rows else self.total


def _has_tiles(input: Tensor) -> bool:
    return input.is_cuda and _library.has_triton()


class _Gradients:
    """Of the losses' sum, weighted by an upstream gradient where there is one; empty where not needed."""

    def __init__(self, problem: _Problem, needs_grad: list[bool]) -> None:
        input, linear_weight = problem.input, problem.linear_weight
        self.needs_input, self.needs_weight, self.needs_bias = needs_grad
        self.input = _library.empty(input.shape if self.needs_input else (0,), problem.input_total, input)
        shape = linear_weight.shape if self.needs_weight else (0,)
        self.weight = _library.empty(shape, problem.weight_total, input)
        self.bias = input.new_zeros(linear_weight.shape[:1] if self.needs_bias else (0,), dtype=problem.total)

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


def _run(problem: _Problem, losses: Tensor, gradients: _Gradients | None, upstream: Tensor | None) -> None:
    """Fills ``losses [N]`` and, where given, the gradients, row ``i``'s weighted by ``upstream[i]``."""
    if gradients is not None and problem.input.shape[0] == 0:
        gradients.weight.zero_()
    elif problem.is_tiled:
        _run_tiles(problem, losses, gradients, upstream)
    else:
        _run_products(problem, losses, gradients, upstream)


def _run_products(problem: _Problem, losses: Tensor, gradients: _Gradients | None, upstream: Tensor | None) -> None:
    """By torch's products and the kernels of the loss, which turn the logits' memory into their gradient."""
    input, linear_weight, target, linear_bias, weight, ignore_index, smoothing, compute = problem
    classes = linear_weight.shape[0]
    linear_weight = linear_weight.to(compute)
    bias = None if linear_bias is None else linear_bias.to(compute).unsqueeze(1)
    memory = _library.empty((classes * min(problem.chunk_rows, len(input)),), compute, input)
    options = (weight, 0, ignore_index, smoothing, losses.dtype)
    for rows in problem.chunks:
        x, y = input[rows].to(compute), target[rows].unsqueeze(0)
        # Classes first: the faster layout for the products that make and take the logits.
        logits = memory[: classes * x.shape[0]].view(classes, x.shape[0])
        if bias is None:
            torch.mm(linear_weight, x.t(), out=logits)
        else:
            torch.addmm(bias, linear_weight, x.t(), out=logits)
        if gradients is None:
            losses[rows] = _cross_entropy(logits.unsqueeze(0), y, *options)[0].squeeze(0)
        else:
            losses[rows] = _cross_entropy_in_place(logits.unsqueeze(0), y, *options).squeeze(0)
            gradients.add(rows, logits, x, linear_weight, None if upstream is None else upstream[rows])


def _run_tiles(problem: _Problem, losses: Tensor, gradients: _Gradients | None, upstream: Tensor | None) -> None:
    """By Triton kernels, whose product leaves the derivatives ``s'(z)`` of a chunk in place of its logits."""
    kernels = importlib.import_module("pyreg.triton_kernels.linear_stablemax")
    linear_weight = problem.linear_weight.to(problem.compute)
    classes, count = linear_weight.shape[0], problem.input.shape[0]
    is_class = (problem.target >= 0) & (problem.target < classes) & (problem.target != problem.ignore_index)
    labels = problem.target.where(is_class, -1)
    memory = weight_gradient = None
    if gradients is not None:
        memory = kernels.new_derivatives(min(problem.chunk_rows, count), linear_weight)
        if gradients.needs_weight:
            weight_gradient = kernels.WeightGradient(linear_weight, problem.weight_total)
    for rows in problem.chunks:
        x, y = problem.input[rows].to(problem.compute), labels[rows]
        derivatives = None if memory is None else memory[: len(x)]
        terms = kernels.forward(x, linear_weight, problem.linear_bias, y, problem.weight, derivatives)
        losses[rows] = terms.loss
        if gradients is None:
            continue
        factors = terms[1:] if upstream is None else [term * upstream[rows] for term in terms[1:]]
        if gradients.needs_input:
            kernels.input_gradient(derivatives, linear_weight, y, *factors, out=gradients.input[rows])
        if weight_gradient is not None:
            weight_gradient.add(derivatives, x, y, *factors)
        if gradients.needs_bias:
            kernels.add_bias_gradient(gradients.bias, derivatives, y, *factors)
    if gradients is not None and weight_gradient is not None:
        gradients.weight = weight_gradient.result(problem.weight_total)
    losses.masked_fill_(~is_class & (problem.target != problem.ignore_index), torch.nan)


_cross_entropy = _library.operator("stablemax_cross_entropy")
_cross_entropy_in_place = _library.operator("stablemax_cross_entropy_")


def _total_weight(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides by."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum().to(dtype)
    return (weight[target.clamp(0, weight.shape[0] - 1)] * counts).sum().to(dtype)


def _share(total_weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """By what the mean's gradients differ from the sum's. Where no row counts these are 0, and stay so; where the
    weights of rows that count add up to 0 the mean is not finite, and its gradients neither."""
    return 1 / total_weight.where((target != ignore_index).any(), 1)


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
    """The loss, a mean's divisor, and the gradients for an upstream gradient of 1, as far as they are needed and one
    upstream gradient serves all rows."""
    if target.is_cpu or _library.checks_values():
        _classes.check_labels(_NAME, target, linear_weight.shape[0], ignore_index)
    problem = _Problem(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing, compute)
    losses = input.new_empty(input.shape[0], dtype=problem.total)
    total_weight = _total_weight(target, weight, ignore_index, problem.total)
    needs_grad = _formed_in_forward(reduction, needs_grad)
    gradients = _Gradients(problem, needs_grad)
    divides = problem.divides_in_forward(reduction)
    upstream = _share(total_weight, target, ignore_index).expand(target.shape) if divides else None
    _run(problem, losses, gradients if any(needs_grad) else None, upstream)
    loss = losses if reduction == 0 else losses.sum()
    if reduction == 1:
        loss = loss / total_weight
    return loss.to(loss_dtype), total_weight, *gradients.as_tuple()


def _formed_in_forward(reduction: int, needs_grad: list[bool]) -> list[bool]:
    """Of losses that are not reduced, each row has an upstream gradient of its own, by which only input's gradient can
    be multiplied afterwards."""
    needs_input, needs_weight, needs_bias = needs_grad
    if reduction == 0 and (needs_weight or needs_bias):
        return [False, False, False]
    return [needs_input, needs_weight, needs_bias]


def _recompute_gradients(
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
    problem = _Problem(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing, compute)
    losses = input.new_empty(input.shape[0], dtype=problem.total)
    gradients = _Gradients(problem, needs_grad)
    upstream = grad_rows.to(problem.total).masked_fill(target == ignore_index, 0)
    _run(problem, losses, gradients, upstream)
    return gradients.as_tuple()


_library.implement(_NAME, _forward)
_library.implement(f"{_NAME}_backward", _recompute_gradients)

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
        return _differentiable_backward(ctx, grad_loss, parameters, target, weight, total_weight)
    factor = grad_loss.to(total_weight.dtype)
    problem = _Problem(input, linear_weight, target, linear_bias, weight, ctx.ignore_index, ctx.smoothing, ctx.compute)
    divides_in_forward = problem.divides_in_forward(ctx.reduction)
    if ctx.reduction == 1 and not divides_in_forward:
        factor = factor * _share(total_weight, target, ctx.ignore_index)
    in_place = ctx.once and not _library.is_batched(grad_loss)
    if ctx.once:
        gradients = _library.take(ctx, "gradients")
    wanted = [ctx.needs_input_grad[index] for index in _PARAMETERS]
    if gradients is None or any(want and not have for want, have in zip(wanted, ctx.formed, strict=True)):
        # One upstream gradient for all rows is multiplied in afterwards, so that this result has the other's bits.
        rows = factor
        if ctx.reduction != 0:
            share = _share(total_weight, target, ctx.ignore_index)
            rows = (share if divides_in_forward else torch.ones_like(share)).expand(target.shape)
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
    if in_place:
        scale_rows_(gradient, factor)
        return gradient.to(dtype)
    if factor.dim() > 0:
        factor = factor.view(-1, *[1] * (gradient.dim() - 1))
    return (gradient * factor).to(dtype)


def _differentiable_backward(
    ctx: Any,
    grad_loss: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
) -> tuple[Tensor | None, ...]:
    """For create_graph: expressions of the whole logits, which autograd can follow further."""
    input, linear_weight, bias = parameters
    scale = grad_loss.to(total_weight.dtype)
    if ctx.reduction != 2:
        scale = scale.unsqueeze(1) if ctx.reduction == 0 else scale / total_weight
    result: list[Tensor | None] = [None] * 11
    with torch.autocast(target.device.type, enabled=False):
        x, head = input.to(ctx.compute), linear_weight.to(ctx.compute)
        logits = torch.nn.functional.linear(x, head, None if bias is None else bias.to(ctx.compute))
        gradient = gradient_expression(
            scale, logits.to(scale.dtype), target, weight, ctx.ignore_index, ctx.smoothing
        ).to(ctx.compute)
        if ctx.needs_input_grad[0]:
            result[0] = (gradient @ head).to(input.dtype)
        if ctx.needs_input_grad[1]:
            result[1] = (gradient.t() @ x).to(linear_weight.dtype)
        if bias is not None and ctx.needs_input_grad[3]:
            result[3] = gradient.sum(0).to(bias.dtype)
    return tuple(result)


_differentiable = _library.differentiable(_NAME, setup_context=_setup_context, backward=_backward)


# ---- tracing and batching ----


@_library.fake(_NAME)
def _(input: Tensor, linear_weight: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, smoothing, compute, loss_dtype, needs_grad = options
    loss = input.new_empty(target.shape if reduction == 0 else (), dtype=loss_dtype)
    total_weight = input.new_empty((), dtype=_library.accumulate_dtype(compute))
    problem = _Problem(input, linear_weight, target, None, None, 0, smoothing, compute)
    gradients = _Gradients(problem, _formed_in_forward(reduction, needs_grad))
    return loss, total_weight, *gradients.as_tuple()


@_library.fake(f"{_NAME}_backward")
def _(grad_rows: Tensor, input: Tensor, linear_weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, smoothing, compute, needs_grad = options
    problem = _Problem(input, linear_weight, grad_rows, None, None, 0, smoothing, compute)
    return _Gradients(problem, needs_grad).as_tuple()


_library.vmap_one_by_one(_NAME)
_library.vmap_one_by_one(f"{_NAME}_backward")

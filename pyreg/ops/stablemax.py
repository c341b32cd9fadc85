"""StableMax: the public functions, and how torch traces, differentiates and batches them.

Kernels: ``csrc/stablemax``. Definition, and path of devices without a kernel: :mod:`pyreg.reference.stablemax`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyreg.ops import _class_shards, _classes, _library
from pyreg.ops.scale_rows import scale_rows_
from pyreg.reference import stablemax as reference

_PAPER = "arXiv 2501.04697"


# ---- public functions ----


def stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    r"""StableMax along ``dim``, in place of :func:`torch.softmax`.

    .. code-block:: text

        s(x) = x + 1  for x >= 0,   1 / (1 - x)  for x < 0
        stablemax(x)_j = s(x_j) / S,   S = sum_k s(x_k)

    Args:
        input: any shape; float64, float32, bfloat16 or float16. ``-inf`` masks a class: its share is 0.
        dim: the dimension that sums to 1.
        dtype: the dtype of the result, to which the input is cast first; the input's own by default. Under CUDA's
            autocast a 16-bit input gives float32, as :func:`torch.softmax` does.

    Returns:
        A contiguous tensor of the input's shape. Sums are kept in float32, in float64 for float64.

    Gradient:
        ``dx_j = s'(x_j) / S (g_j - sum_k g_k p_k)``, differentiable to any order.

    Raises:
        TypeError: the input is no tensor of these dtypes.
        IndexError: ``dim`` is out of range.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> pyreg.functional.stablemax(torch.tensor([0.0, 1.0, -1.0]))
        tensor([0.2857, 0.5714, 0.1429])
    """
    return _rows("stablemax", input, dim, dtype)


def log_stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    r"""The logarithm of :func:`stablemax`, in place of :func:`torch.log_softmax`.

    .. code-block:: text

        log_stablemax(x)_j = log(s(x_j) / S);   of the largest class -log1p((S - s_max) / s_max)

    so that the result keeps its digits however dominant one class is.

    Args:
        input, dim, dtype: as of :func:`stablemax`; a class at ``-inf`` gives ``-inf``.

    Returns:
        A contiguous tensor of the input's shape. Sums are kept in float32, in float64 for float64.

    Gradient:
        ``dx_j = (g_j - p_j sum_k g_k) / (1 + |x_j|)``, differentiable to any order.

    Raises:
        TypeError, IndexError: as of :func:`stablemax`.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> pyreg.functional.log_stablemax(torch.tensor([0.0, 1.0, -1.0]))
        tensor([-1.2528, -0.5596, -1.9459])
    """
    return _rows("log_stablemax", input, dim, dtype)


def stablemax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: dist.ProcessGroup | bool | None = None,
    num_classes: int | None = None,
) -> Tensor:
    r"""Cross-entropy under StableMax, in place of :func:`torch.nn.functional.cross_entropy`.

    .. code-block:: text

        L = -sum_j q_j log stablemax(x)_j;   for a class index y:  log1p(R / s(x_y)),  R = sum_{k != y} s(x_k)

    The sum leaves the target out, so loss and gradient stay right where the target dominates: float32 gives a correct
    non-zero gradient at a target logit of 1e12.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ..., dk]``; float64, float32, bfloat16 or float16. Logits
            whose class dimension lies innermost in memory (``[N, T, C].transpose(1, 2)``) are read as they lie.
        target: class indices ``[]``, ``[N]`` or ``[N, d1, ..., dk]``, int64, or probabilities of the input's shape.
        weight: class weights ``[C]``, or none.
        ignore_index: a class index whose rows add nothing to loss and gradient. Class indices only.
        reduction: ``"mean"`` (over the weights of the targets), ``"sum"`` or ``"none"``.
        label_smoothing: in ``[0, 1]``.
        group: a process group of :mod:`torch.distributed`, or True for the default one, whose ranks hold slices of the
            class dimension one after another, as tensor-parallel language models do: ``input`` and ``weight`` are this
            rank's slice, ``target`` holds indices among all classes and is the same on every rank. Ranks exchange three
            numbers a row, no logits; all get the loss, and the gradient of their own slice for their own upstream
            gradient, which has to be the same on every rank.
        num_classes: with ``group`` the number of all classes; slices then are those of :func:`torch.chunk`, the last of
            them shorter or empty. By default every rank has as many as this one.

    Returns:
        The loss, ``[]``, or the target's shape for ``"none"``; of the input's dtype, float32 for 16-bit logits under
        autocast. A mean over no row is NaN, as in torch.

    Gradient:
        ``dL/dx_j = (sum_k q_k) s'(x_j) / S - q_j / (1 + |x_j|)`` with respect to ``input`` and, for probabilities,
        ``target``, to any order; the first order is fused. Under ``create_graph`` all orders are plain expressions,
        which lose digits where one class dominates. ``weight`` has none. With ``group`` there is the first order alone,
        and class indices alone.
        For large logits that need a gradient it is formed together with the loss, in one pass over memory: evaluate
        under :class:`torch.no_grad`, as always, to have the loss alone.

    Raises:
        ValueError, TypeError: shapes, dtypes, options that do not fit; the message says what was expected.
        IndexError: a class index outside ``[0, C)``. On CUDA it makes that row's loss and gradient NaN instead;
            ``PYREG_CHECKS=1`` in the environment raises there too, at the price of waiting for the GPU.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]], requires_grad=True)  # s = [2, 1]
        >>> loss = pyreg.functional.stablemax_cross_entropy(logits, torch.tensor([0]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad  # log 1.5, and 1 / 3 - 1 / 2 and 1 / 3
        (tensor(0.4055), tensor([[-0.1667,  0.3333]]))
    """
    if group is None and num_classes is None:
        return _cross_entropy(
            "stablemax_cross_entropy", input, target, weight, ignore_index, reduction, label_smoothing, in_place=False
        )
    return _sharded_cross_entropy(
        *("stablemax_cross_entropy", input, target, weight, ignore_index, reduction, label_smoothing),
        *(group, num_classes),
    )


def stablemax_cross_entropy_(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r""":func:`stablemax_cross_entropy` that spends the logits: their memory receives their gradient.

    .. code-block:: text

        loss = stablemax_cross_entropy(input, target),    input <- dloss / dinput

    in one pass over the logits; no second ``[N, C]`` tensor exists. Where no gradient is needed, under
    ``torch.compile``, and in float16, whose gradients need the loss scale before they are rounded, the logits are left
    alone.

    Args:
        input: logits as of :func:`stablemax_cross_entropy`, contiguous, and the result of an operation, not a leaf;
            nothing else may use their values afterwards (autograd notices a backward pass that would).
        target: class indices.
        weight, ignore_index, reduction, label_smoothing: as of :func:`stablemax_cross_entropy`.

    Returns:
        The loss, as of :func:`stablemax_cross_entropy`.

    Gradient:
        Of first order, and asked for once: it lies in the memory of the logits.

    Raises:
        ValueError, TypeError, IndexError: as of :func:`stablemax_cross_entropy`; probabilities as target; logits that
            are a leaf or not contiguous.
        RuntimeError: a second backward pass (``retain_graph=True``), or second order.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> layer, x = torch.nn.Linear(8, 113), torch.randn(16, 8)
        >>> pyreg.functional.stablemax_cross_entropy_(layer(x), torch.randint(113, (16,))).backward()
    """
    arguments = input, target, weight, ignore_index, reduction, label_smoothing
    return cross_entropy_as("stablemax_cross_entropy_", *arguments, in_place=True)


def cross_entropy_as(operator: str, *arguments: Any, in_place: bool = False) -> Tensor:
    """:func:`stablemax_cross_entropy` for an operator with another name, by which errors call it."""
    try:
        return _cross_entropy(operator, *arguments, in_place=in_place)
    except IndexError as error:  # the kernel's
        raise IndexError(str(error).replace("stablemax_cross_entropy:", f"{operator}:", 1)) from None


# ---- argument checks and shapes ----


def _autocast_dtype(input: Tensor) -> torch.dtype:
    if input.dtype.itemsize == 2 and _library.is_autocast(input):
        return torch.float32
    return input.dtype


def _rows(operator: str, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    _library.check_float(operator, "input", input)
    if not isinstance(dim, (int, torch.SymInt)):
        raise TypeError(f"{operator}: expected dim to be an integer, got {dim!r}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{operator}: expected dtype to be a torch.dtype or None, got {dtype!r}")
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        shape = _library.shape_text(input)
        raise IndexError(f"{operator}: expected dim in [{-rank}, {rank - 1}] for input {shape}, got {dim}")
    if dtype is None:
        dtype = _autocast_dtype(input) if input.is_cuda else input.dtype
    elif dtype != input.dtype and not (input.dtype.itemsize == 2 and dtype == torch.float32):
        input = input.to(dtype)
        _library.check_float(operator, "dtype", input)
    if not _library.has_kernel(input):
        return getattr(reference, operator)(input, dim, dtype)  # type: ignore[no-any-return]
    if input.dim() == 0:
        return _ROW_OPERATORS[operator](input.reshape(1), 0, dtype).reshape(())  # type: ignore[no-any-return]
    return _ROW_OPERATORS[operator](input, dim % rank, dtype)  # type: ignore[no-any-return]


def _cross_entropy(
    operator: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    *,
    in_place: bool,
) -> Tensor:
    code, smoothing = _check_options(operator, input, target, ignore_index, reduction, label_smoothing)
    labels = _check_target(operator, input, target, ignore_index)
    if weight is not None:
        weight = _classes.check_weight(operator, weight, _class_count(input), input)
    if in_place:
        _check_in_place(operator, input, labels)
    if not _library.has_kernel(input):
        return reference.stablemax_cross_entropy(input, target, weight, ignore_index, reduction, smoothing)
    if labels and target.dtype != torch.int64:
        target = target.long()
    if labels and input.is_cuda and _library.checks_values():
        _classes.check_labels(operator, target, _class_count(input), ignore_index)

    rows, row_target = _as_rows(input, target, labels)
    arguments = (rows, row_target, weight, code, ignore_index, smoothing, _autocast_dtype(input))
    in_forward = labels and _may_form_gradient_in_forward(rows)
    if in_forward and in_place:
        loss = _InPlaceCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    elif in_forward and code != 0 and _gains_from_one_pass(rows):
        loss = _OnePassCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        loss = _differentiable_cross_entropy(*arguments)[0]
    if code == 0 and rows is not input:
        return loss.reshape(target.shape if labels else _without_classes(input))  # type: ignore[no-any-return]
    return loss  # type: ignore[no-any-return]


def _check_options(
    operator: str, input: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[int, float]:
    """The schema's reduction and label smoothing."""
    _library.check_float(operator, "input", input)
    if not isinstance(target, Tensor):
        raise TypeError(f"{operator}: expected target to be a tensor, got {type(target).__name__}")
    code = _library.reduction_code(operator, reduction)
    smoothing = _classes.check_smoothing(operator, label_smoothing)
    _classes.check_ignore_index(operator, ignore_index)
    return code, smoothing


def _sharded_cross_entropy(
    operator: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    group: dist.ProcessGroup | bool | None,
    num_classes: int | None,
) -> Tensor:
    code, smoothing = _check_options(operator, input, target, ignore_index, reduction, label_smoothing)
    if group is None or group is False:
        raise ValueError(f"{operator}: num_classes goes with group, whose ranks share the classes; got group={group!r}")
    shard = _class_shards.shard(operator, group, num_classes, input, _class_count(input)) if input.dim() > 0 else None
    if shard is None:
        return _cross_entropy(operator, input, target, weight, ignore_index, reduction, label_smoothing, in_place=False)
    if target.shape == input.shape and target.is_floating_point():
        raise ValueError(
            f"{operator}: expected class indices in target with group, got {target.dtype} of input's shape; "
            "probabilities need all classes in one place"
        )
    _check_labels_of(operator, input, target)
    if weight is not None:
        weight = _classes.check_weight(operator, weight, shard.own, input)
    target = target if target.dtype == torch.int64 else target.long()
    if input.is_cuda and _library.checks_values():
        _classes.check_labels(operator, target, shard.classes, ignore_index)
    rows, row_target = _as_rows(input, target, labels=True)
    options = code, ignore_index, smoothing, _autocast_dtype(input), shard.first, shard.classes, shard.group
    loss: Tensor = _class_shards.cross_entropy(rows, row_target, weight, *options)[0]
    return loss.reshape(target.shape) if code == 0 else loss


def _class_count(input: Tensor) -> int:
    return input.shape[min(input.dim() - 1, 1)]


def _without_classes(input: Tensor) -> tuple[int, ...]:
    return (input.shape[0], *input.shape[2:]) if input.dim() > 1 else ()


def _check_target(operator: str, input: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Whether the target holds class indices; errors where it fits neither form."""
    _check_beside(operator, input, target)
    if input.shape[min(input.dim() - 1, 1)] == 0 and math.prod(_without_classes(input)) > 0:
        raise ValueError(f"{operator}: expected at least one class, got input {_library.shape_text(input)}")
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(
                f"{operator}: target {_library.shape_text(target)} equals input's shape and so holds probabilities: "
                f"expected a floating dtype, got {target.dtype}; class indices have shape "
                f"{list(_without_classes(input))}"
            )
        _classes.check_nothing_ignored(operator, ignore_index)
        return False
    _check_labels_of(operator, input, target)
    return True


def _check_beside(operator: str, input: Tensor, target: Tensor) -> None:
    _library.check_dense(operator, "target", target)
    if target.device != input.device:
        raise ValueError(
            f"{operator}: expected target on input's device {input.device}, got {target.device}; "
            f"move it with target.to(input.device)"
        )
    if input.dim() == 0:
        raise ValueError(f"{operator}: expected input of shape [C], [N, C] or [N, C, d1, ..., dk], got a 0-d tensor")


def _check_labels_of(operator: str, input: Tensor, target: Tensor) -> None:
    _check_beside(operator, input, target)
    expected = _without_classes(input)
    if target.shape != expected:
        form = "[C]" if input.dim() == 1 else "[N, C]" if input.dim() == 2 else "[N, C, d1, ..., dk]"
        raise ValueError(
            f"{operator}: expected target of shape {list(expected)} (class indices) or {list(input.shape)} "
            f"(probabilities) for input {form} = {list(input.shape)}, got {list(target.shape)}"
        )
    _classes.check_label_dtype(operator, target)


def _belongs_to_leaf(input: Tensor) -> bool:
    owner = input._base if input._is_view() else input
    return owner is not None and owner.is_leaf and owner.requires_grad


def _check_in_place(operator: str, input: Tensor, labels: bool) -> None:
    if not labels:
        raise ValueError(f"{operator}: expected class indices in target; use stablemax_cross_entropy for probabilities")
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and _belongs_to_leaf(input):
        raise RuntimeError(
            f"{operator}: expected the result of an operation, whose memory the gradient takes over, got a leaf that "
            f"requires grad, or a view of one; use stablemax_cross_entropy"
        )
    if not input.is_contiguous():
        raise ValueError(
            f"{operator}: expected a contiguous input, whose memory the gradient takes over, got strides "
            f"{list(input.stride())} for shape {list(input.shape)}; use stablemax_cross_entropy"
        )


def _as_rows(input: Tensor, target: Tensor, labels: bool) -> tuple[Tensor, Tensor]:
    """Input as [N, C] or [N, C, inner], target to match; views wherever strides allow."""
    if input.dim() == 2:
        rows = input
    elif input.dim() == 1:
        rows = input.unsqueeze(0)
        return rows, target.reshape(1) if labels else _cast(target, input).unsqueeze(0)
    elif input.stride(1) == 1 and (last := input.movedim(1, -1)).is_contiguous():
        rows = last.flatten(0, -2)
        return rows, target.reshape(-1) if labels else _cast(target, input).movedim(1, -1).reshape(rows.shape)
    else:
        rows = input.flatten(2)
        target = target.flatten(1) if labels else target.flatten(2)
    return rows, target if labels else _cast(target, input)


def _cast(target: Tensor, input: Tensor) -> Tensor:
    return target if target.dtype == input.dtype else target.to(input.dtype)


# ---- gradients ----


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, dim, dtype = inputs
    ctx.save_for_backward(input)
    ctx.dim, ctx.dtype = dim, dtype


def _rows_backward(operator: str) -> Any:
    fused = _library.operator(f"{operator}_backward")

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        (input,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return fused(grad_output, input, ctx.dim), None, None
        # create_graph: the gradient as an expression of differentiable operators
        share = stablemax(input, ctx.dim, ctx.dtype)
        slope = _slope(input.to(ctx.dtype))
        if operator == "stablemax":
            gradient = slope * share * (grad_output - (grad_output * share).sum(ctx.dim, keepdim=True))
        else:
            gradient = slope * (grad_output - share * grad_output.sum(ctx.dim, keepdim=True))
        return gradient.to(input.dtype), None, None

    return backward


def _slope(input: Tensor) -> Tensor:
    """h = d log s / dx"""
    return torch.reciprocal(1 + input.abs())


_ROW_OPERATORS = {
    name: _library.differentiable(name, setup_context=_setup_rows, backward=_rows_backward(name))
    for name in ("stablemax", "log_stablemax")
}

_cross_entropy_backward = _library.operator("stablemax_cross_entropy_backward")
_cross_entropy_in_place = _library.operator("stablemax_cross_entropy_")
_cross_entropy_with_gradient = _library.operator("stablemax_cross_entropy_with_gradient")


def _setup_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, weight, *ctx.options, _ = inputs
    saved = output[1]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, saved)


def _backward_cross_entropy(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    input, target, weight, saved = ctx.saved_tensors
    reduction, ignore_index, smoothing = ctx.options
    grads: list[Tensor | None] = [None] * 7
    if grad_loss is None:
        return tuple(grads)
    needs_input, needs_target = ctx.needs_input_grad[:2]
    if needs_input and not torch.is_grad_enabled():
        grads[0] = _cross_entropy_backward(grad_loss, input, target, weight, saved, reduction, ignore_index, smoothing)
        needs_input = False
    if needs_input or needs_target:
        # Expressions of differentiable operators: for create_graph, and for the gradient of probabilities.
        x = input.to(saved.dtype)
        scale = grad_loss.unsqueeze(1) if reduction == 0 else grad_loss
        if reduction == 1:
            scale = scale / saved[-1]
        if needs_input:
            grads[0] = gradient_expression(scale, x, target, weight, ignore_index, smoothing).to(input.dtype)
        if needs_target:
            grads[1] = _weighted((smoothing - 1) * scale * log_stablemax(x, 1), weight).to(target.dtype)
    return tuple(grads)


def gradient_expression(
    scale: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """The gradient of logits ``[N, C, ...]`` by differentiable operators; ``scale`` is the upstream gradient of each
    row's loss, ``[]`` or ``[N, 1, ...]``."""
    counts = None if target.is_floating_point() else (target != ignore_index).unsqueeze(1)
    if counts is not None:  # whatever an ignored row holds, its gradient is 0
        logits, target = logits.where(counts, 0), target.where(counts.squeeze(1), 0)
    q = _target_distribution(target, logits, weight, smoothing)
    gradient = scale * _slope(logits) * (q.sum(1, keepdim=True) * stablemax(logits, 1) - q)
    return gradient if counts is None else gradient.where(counts, 0)


def _target_distribution(target: Tensor, input: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """q of ``L = -sum_j q_j log p_j``, weights and smoothing included, in input's shape and dtype."""
    if target.is_floating_point():
        chosen = target.to(input.dtype)
    else:
        chosen = torch.zeros_like(input).scatter(1, target.unsqueeze(1), 1.0)
    return _weighted((1 - smoothing) * chosen + smoothing / input.shape[1], weight)


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    """``values [N, C, ...]`` times class weights ``[C]``."""
    return values if weight is None else values * weight.view(-1, *[1] * (values.dim() - 2))


_differentiable_cross_entropy = _library.differentiable(
    "stablemax_cross_entropy", setup_context=_setup_cross_entropy, backward=_backward_cross_entropy
)


# Where the logits are read from memory and not from cache, the gradient is formed beside the loss in one pass: at
# 4096 x 32000 in float32 on 2 cores 61 ms where two passes take 84. Short rows gain nothing on a CPU.
_ONE_PASS_BYTES = 1 << 22
_ONE_PASS_CLASSES = 512


def _gains_from_one_pass(rows: Tensor) -> bool:
    return rows.numel() * rows.element_size() >= _ONE_PASS_BYTES and rows.shape[1] >= _ONE_PASS_CLASSES


def _may_form_gradient_in_forward(rows: Tensor) -> bool:
    """Whether a gradient is needed, and may be rounded before its upstream gradient is known.

    In float16 it may not: the share of one of many logits in a mean is below the smallest float16, and the upstream
    gradient is the loss scale that lifts it.
    """
    return (
        rows.requires_grad
        and rows.dtype != torch.float16
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _OnePassCrossEntropy(torch.autograd.Function):
    """The gradient for an upstream gradient of 1 is formed in the forward pass; the first backward pass takes it.

    Any later backward pass, and create_graph, find it gone and do what the operator's own rule does.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss, saved, gradient = _cross_entropy_with_gradient(*arguments)
        input, target, weight, *ctx.options, _ = arguments
        ctx.save_for_backward(input, target, weight, saved)
        ctx.gradient = gradient
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        can_take = not (torch.is_grad_enabled() or _library.is_batched(grad_loss))
        gradient = _library.take(ctx, "gradient") if can_take else None
        if gradient is None:
            return _backward_cross_entropy(ctx, grad_loss, None)
        ctx.saved_tensors  # noqa: B018 - raises if the logits were changed in place meanwhile
        scale_rows_(gradient, grad_loss)
        return (gradient, *[None] * 6)


class _InPlaceCrossEntropy(torch.autograd.Function):
    """The gradient is formed in the forward pass, in the logits' memory."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *arguments: Any) -> Tensor:
        loss: Tensor = _cross_entropy_in_place(input, *arguments)
        # Whatever else saved the logits' values for its own backward pass will say that they have changed.
        torch.autograd.graph.increment_version(input)
        ctx.gradient = input.detach()
        ctx.version = input._version
        ctx.ignored = arguments[0] == arguments[3] if loss.dim() > 0 else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        can_take = not (torch.is_grad_enabled() or _library.is_batched(grad_loss))
        gradient = _library.take(ctx, "gradient") if can_take else None
        if gradient is None:
            raise RuntimeError(
                "stablemax_cross_entropy_: its gradient can be asked for once and to first order, for it lies in the "
                "logits' memory; use stablemax_cross_entropy"
            )
        if gradient._version != ctx.version:
            raise RuntimeError(
                "stablemax_cross_entropy_: the logits' memory, which holds their gradient, has been modified by an "
                "inplace operation since; use stablemax_cross_entropy"
            )
        if ctx.ignored is not None:  # 0 times an infinite upstream gradient would be NaN
            grad_loss = grad_loss.masked_fill(ctx.ignored, 0)
        if grad_loss.dim() == 2:  # [N, C, inner] with a loss for each of [N, inner]
            gradient.mul_(grad_loss.unsqueeze(1))
        else:
            scale_rows_(gradient, grad_loss)
        return (gradient, *[None] * 6)


# ---- tracing ----


@_library.fake("stablemax")
@_library.fake("log_stablemax")
def _(input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(input.shape, dtype=dtype, device=input.device)


@_library.fake("stablemax_backward")
@_library.fake("log_stablemax_backward")
def _(grad_output: Tensor, input: Tensor, dim: int) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _empty_loss(input: Tensor, reduction: int, loss_dtype: torch.dtype) -> Tensor:
    shape = _without_classes(input) if reduction == 0 else ()
    return torch.empty(shape, dtype=loss_dtype, device=input.device)


@_library.fake("stablemax_cross_entropy")
def _fake_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = math.prod(_without_classes(input))
    fields = 4 if target.is_floating_point() else 3  # kSavedFields in stablemax.h
    saved = torch.empty((fields * rows + 1,), dtype=_library.accumulate_dtype(input.dtype), device=input.device)
    return _empty_loss(input, reduction, loss_dtype), saved


@_library.fake("stablemax_cross_entropy_with_gradient")
def _(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, saved = _fake_cross_entropy(input, target, *options)
    return loss, saved, torch.empty(input.shape, dtype=input.dtype, device=input.device)


@_library.fake("stablemax_cross_entropy_backward")
def _(grad_loss: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


@_library.fake("stablemax_cross_entropy_")
def _(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    loss: Tensor = _fake_cross_entropy(input, target, *options)[0]
    return loss


# ---- batching ----


def _at_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with its batch dimension first; one that has none is expanded."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_rows(operator: str) -> None:
    forward, backward = _library.operator(operator), _library.operator(f"{operator}_backward")

    @_library.vmap(operator)
    def _(info: Any, in_dims: Any, input: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        return forward(input.movedim(in_dims[0], 0), dim + 1, dtype), 0

    @_library.vmap(f"{operator}_backward")
    def _(info: Any, in_dims: Any, grad_output: Tensor, input: Tensor, dim: int) -> tuple[Tensor, int]:
        grad_output, input = (
            _at_front(tensor, in_dims[index], info.batch_size) for index, tensor in enumerate((grad_output, input))
        )
        return backward(grad_output, input, dim + 1), 0


for _name in _ROW_OPERATORS:
    _vmap_rows(_name)


@_library.vmap("stablemax_cross_entropy")
def _(
    info: Any,
    in_dims: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    loss_dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The samples of the batch become rows of one call; their losses are reduced sample by sample."""
    size = info.batch_size
    _refuse_batched_weight(in_dims)
    input, target = _at_front(input, in_dims[0], size), _at_front(target, in_dims[1], size)
    losses, saved = _library.operator("stablemax_cross_entropy")(
        input.flatten(0, 1), target.flatten(0, 1), weight, 0, ignore_index, label_smoothing, loss_dtype
    )
    rows = losses.numel() // size
    total = _row_weights(target, weight, ignore_index, saved.dtype).reshape(size, -1).sum(1)
    # [fields, size * rows] + [1]  ->  size x ([fields, rows] + [1])
    saved = saved[:-1].reshape(-1, size, rows).transpose(0, 1).flatten(1)
    saved = torch.cat([saved, total.unsqueeze(1)], 1)
    if reduction == 0:
        return (losses.reshape(size, *_without_classes(input[0])), saved), (0, 0)
    row_losses = saved[:, 2 * rows : 3 * rows].sum(1)  # the field SavedRows::loss, not yet rounded to the loss dtype
    loss = row_losses / total if reduction == 1 else row_losses
    return (loss.to(loss_dtype), saved), (0, 0)


@_library.vmap("stablemax_cross_entropy_backward")
def _(
    info: Any,
    in_dims: Any,
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, int]:
    size = info.batch_size
    _refuse_batched_weight(in_dims[1:])
    grad_loss, input, target, saved = (
        _at_front(tensor, dim, size)
        for tensor, dim in zip((grad_loss, input, target, saved), (*in_dims[:3], in_dims[4]), strict=True)
    )
    if reduction == 1:
        grad_loss = grad_loss / saved[:, -1]
    if reduction != 0:
        rows = _without_classes(input[0])
        grad_loss = grad_loss.reshape(size, *[1] * len(rows)).expand(size, *rows)
    fields = (saved.shape[1] - 1) // (grad_loss.numel() // size)
    saved = torch.cat([saved[:, :-1].reshape(size, fields, -1).transpose(0, 1).flatten(), saved[0, -1:]])
    gradient = _cross_entropy_backward(
        grad_loss.flatten(0, 1).contiguous(),
        input.flatten(0, 1),
        target.flatten(0, 1),
        weight,
        saved,
        0,
        ignore_index,
        label_smoothing,
    )
    return gradient.reshape(input.shape), 0


def _row_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each row of class indices adds to a mean's divisor; 1 for a row of probabilities ``[size, N, C, ...]``."""
    if target.is_floating_point():
        return torch.ones_like(target.select(2, 0), dtype=dtype)
    counts = target != ignore_index
    return counts.to(dtype) if weight is None else weight[target.where(counts, 0)] * counts


def _refuse_batched_weight(in_dims: Any) -> None:
    if in_dims[2] is not None:
        raise ValueError("stablemax_cross_entropy: vmap over weight is not supported; map over input and target")

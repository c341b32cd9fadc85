"""What every ``pyreg/ops/<op>.py`` needs: the operator handles, and one call for fake, autograd and vmap rules."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyreg import _extension

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def reduction_code(operator: str, reduction: str) -> int:
    """The schema's integer for a reduction's name."""
    try:
        return REDUCTIONS[reduction]
    except (KeyError, TypeError):
        raise ValueError(f"{operator}: expected reduction to be 'none', 'mean' or 'sum', got {reduction!r}") from None


def operator(name: str) -> Callable[..., Any]:
    """The operator ``pyreg::<name>``, or a function that raises the reason why it is not there."""
    error = _extension.lacks(name)
    if error is None:
        return getattr(torch.ops.pyreg, name).default  # type: ignore[no-any-return]

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ImportError(*error.args) from error.__cause__

    return refuse


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function gives shapes and dtypes of ``pyreg::<name>`` for tracing."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _extension.lacks(name) is None:
            torch.library.register_fake(f"pyreg::{name}")(function)
        return function

    return register


def vmap(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function ``(info, in_dims, *args) -> (outputs, out_dims)`` is the batching rule."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _extension.lacks(name) is None:
            torch.library.register_vmap(f"pyreg::{name}")(function)
        return function

    return register


def vmap_one_by_one(name: str) -> None:
    """The batching rule of an operator that gains nothing from a batch: one call a sample, results stacked."""
    operation = operator(name)

    @vmap(name)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        def sample(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return operation(*(arg.select(dim, i).contiguous() if isinstance(dim, int) else arg for arg, dim in pairs))

        samples = [sample(i) for i in range(info.batch_size)]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])


def vmap_into_batch(name: str) -> None:
    """The batching rule of an operator all of whose tensors have a first dimension of independent problems: samples are
    further problems."""
    operation = operator(name)

    @vmap(name)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        def problems(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            samples = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return samples.flatten(0, 1).contiguous()

        result = operation(*map(problems, args, in_dims))
        if isinstance(result, Tensor):
            return result.reshape(info.batch_size, -1, *result.shape[1:]), 0
        return tuple(part.reshape(info.batch_size, -1, *part.shape[1:]) for part in result), (0,) * len(result)


_rules = torch.library.Library("pyreg", "FRAGMENT")  # type: ignore[no-untyped-call]


def implement(name: str, function: Callable[..., Any], keys: Sequence[str] = ("CPU", "CUDA")) -> None:
    """Makes a Python function, which calls kernels and torch's own operators, the operator for these dispatch keys.

    Autocast is off inside: it has been decided before the operator is called.
    """

    def without_autocast(first: Tensor, *args: Any) -> Any:
        with no_autocast(first):
            return function(first, *args)

    if _extension.lacks(name) is None:
        for key in keys:
            _rules.impl(name, without_autocast, key)  # type: ignore[no-untyped-call]


def count_versions(name: str, argument: int) -> None:
    """Tells autograd that ``pyreg::<name>`` changes the list of tensors that is its argument of this number: a graph
    that has saved one of them (create_graph) then refuses to run."""
    if _extension.lacks(name) is not None:
        return
    changing = operator(name)

    def kernel(keyset: torch.DispatchKeySet, *args: Any) -> None:
        torch.autograd.graph.increment_version(args[argument])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            changing.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)  # type: ignore[attr-defined]

    _rules.impl(name, kernel, "ADInplaceOrView", with_keyset=True)  # type: ignore[no-untyped-call]


@functools.cache
def has_triton() -> bool:
    """Whether ``triton_kernels`` can be had, for CUDA tensors; it is imported when one comes."""
    return importlib.util.find_spec("triton") is not None


def differentiable(
    name: str,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Gives ``pyreg::<name>`` its gradient and returns the function that public operators call.

    In plain eager calls, where the context is nobody's but the rule's own, ``ctx.is_eager`` is set.

    The rule is registered with the operator itself, for tracing (``torch.compile``, ``torch.export``). Eager calls and
    ``torch.func`` take the same rule through a plain ``torch.autograd.Function``: the registered one spends tens of
    microseconds a call in Python and knows no ``torch.func``.
    """
    forward = operator(name)
    if _extension.lacks(name) is not None:
        return forward
    torch.library.register_autograd(f"pyreg::{name}", backward, setup_context=setup_context)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*args)

    def eager_forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(*args)
        ctx.is_eager = True
        setup_context(ctx, args, output)
        return output

    def function(suffix: str, **methods: Any) -> Callable[..., Any]:
        methods["backward"] = staticmethod(backward)
        return type(f"pyreg_{name}{suffix}", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined, no-any-return]

    # torch.func wants setup_context apart, for which every call inspects forward's signature: 10 us.
    eager = function("", forward=staticmethod(eager_forward))
    transformed = function(
        "_func",
        forward=staticmethod(below_autograd),
        setup_context=staticmethod(setup_context),
        generate_vmap_rule=True,
    )
    is_compiling, transforms_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active

    def call(*args: Any) -> Any:
        if is_compiling():
            return forward(*args)
        if transforms_active():
            return transformed(*args)
        # A Function that nothing will be asked of costs as much as a small kernel.
        is_asked = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        return eager(*args) if is_asked or forward_ad._current_level >= 0 else below_autograd(*args)

    return call


def take(ctx: Any, name: str) -> Any:
    """An attribute of a context, for the first who asks; None after that. In one step: several threads may go backward
    on one graph, and what they take may be changed in place."""
    return vars(ctx).pop(name, None)


_LARGE_BYTES = 4 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Uninitialised, on like's device; large CPU tensors on huge pages, whose first touch costs a third."""
    tensor = like.new_empty(shape, dtype=dtype)
    if type(tensor) is Tensor and tensor.is_cpu and tensor.nbytes >= _LARGE_BYTES:  # not while tracing
        importlib.import_module(_extension.CPU.name).advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels sum: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_kernel(tensor: Tensor) -> bool:
    """Whether the tensor's device has kernels; the others take the plain PyTorch reference.

    A CUDA tensor without CUDA kernels is an error that says why they are not there, not a slow success.
    """
    if tensor.is_cuda and _extension.CUDA.error is not None:
        _extension.CUDA.raise_error()
    return tensor.is_cpu or tensor.is_cuda or tensor.is_meta


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap maps over the tensor, as ``is_grads_batched`` does over upstream gradients by its older
    implementation."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; meta tensors know none."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast is off inside, on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else contextlib.nullcontext()


def can_read(tensor: Tensor) -> bool:
    """Whether values are there to be looked at, be it by waiting for a GPU: not while tracing or capturing, nor inside
    of ``torch.func``, where a tensor may stand for many."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def checks_values() -> bool:
    """Whether ``PYREG_CHECKS=1`` asks for checks that read whole tensors or wait for a GPU."""
    return os.environ.get("PYREG_CHECKS") == "1" and not torch.compiler.is_compiling()


def check_float(operator: str, name: str, tensor: Any) -> None:
    """An error unless the argument ``name`` is a tensor of a dtype that kernels take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{operator}: expected {name} to be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
            f"convert it with {name}.float()"
        )
    check_dense(operator, name, tensor)


def check_dense(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{operator}: expected {name} to be dense, got layout {tensor.layout}; use {name}.to_dense()")


def shape_text(tensor: Tensor) -> str:
    return f"of shape {list(tensor.shape)}"


FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

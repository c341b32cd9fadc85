"""OrthoGrad's public function and operator; kernels: ``csrc/orthograd``. The optimizer: :mod:`pyreg.optim`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _library, _orthograd_shards
from pyreg.reference import orthograd as reference

_NAME = "orthogonalize_gradients_"


def orthogonalize_gradients_(params: Iterable[Tensor] | Tensor) -> None:
    r"""Takes out of every gradient its part along the weights and brings the rest to the gradient's norm, in place.

    .. code-block:: text

        g_perp = g - (w.g / (w.w + 1e-30)) w
        g'     = g_perp |g| / (|g_perp| + 1e-30)

    for each parameter ``w`` with gradient ``g``, both flattened. Call it between ``loss.backward()`` and the step of an
    optimizer, where :func:`torch.nn.utils.clip_grad_norm_` is called; :class:`pyreg.optim.OrthoGrad` does so itself.

    A zero weight leaves ``g`` as it is, to the bit; a zero gradient stays zero. Where ``|g_perp| < 2^-45 |g|``, below
    what float64 resolves, ``g`` is parallel to ``w`` and ``g'`` is 0, where the formula would bring rounding noise up
    to ``|g|``: a parameter of one element gets gradient 0. NaN and infinity give NaN as the formula does.

    Args:
        params: parameters or one of them, of any shapes and strides, as from ``model.parameters()``; float64, float32,
            bfloat16 or float16, mixed at will, on one or several devices. Those whose ``grad`` is None are left out;
            a parameter that comes twice counts once. A gradient that is expanded, so that elements share memory, is
            replaced by a dense one. Gradients of another dtype than their parameter and devices without kernels take
            plain PyTorch. Of DTensors, as of FSDP2 and tensor parallelism, the whole parameter counts: every rank
            of their mesh makes this call with the same parameters in the same order, and ranks exchange four numbers a
            parameter, in two messages a mesh.

    Gradient:
        None: it runs under ``torch.no_grad``. The sums ``w.w``, ``w.g``, ``g.g`` are kept in float64 for every dtype.

    Raises:
        TypeError: ``params`` holds something else than such tensors; a gradient is sparse or complex.

    Source: perpGrad in Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> pyreg.optim.orthogonalize_gradients_(w)
        >>> w.grad
        tensor([0., 5.])
    """
    with_kernel: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    sharded = []
    for param in _unique(params):
        grad = param.grad
        if grad is None:
            continue
        _check(param, grad)
        if _orthograd_shards.is_sharded(param):
            sharded.append(param)
            continue
        if _is_expanded(grad):
            param.grad = grad = grad.clone(memory_format=torch.contiguous_format)
        if _library.has_kernel(param) and grad.dtype == param.dtype:
            weights, grads = with_kernel.setdefault(param.device, ([], []))
            weights.append(param)
            grads.append(grad)
        else:
            reference.orthogonalize_gradients_([param])
    with torch.no_grad():
        for weights, grads in with_kernel.values():
            _operator(weights, grads)
        if sharded:
            _orthograd_shards.orthogonalize_(sharded)


def _unique(params: Iterable[Tensor] | Tensor) -> Iterable[Tensor]:
    if isinstance(params, Tensor):
        return (params,)
    if isinstance(params, torch.nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            f"{_NAME}: expected params to be a tensor or an iterable of tensors, got {type(params).__name__}; "
            "pass model.parameters()"
        )
    params = list(params)
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(
                f"{_NAME}: expected params to hold tensors, got {type(param).__name__} at position {i}; pass "
                "model.parameters(), not named_parameters() or an optimizer's param_groups"
            )
    return dict.fromkeys(params)


def _is_expanded(grad: Tensor) -> bool:
    if grad.is_contiguous():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True))


def _check(param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise TypeError(
            f"{_NAME}: expected dense gradients, got layout {grad.layout} for a parameter of shape "
            f"{list(param.shape)}; use Embedding(sparse=False) or param.grad = param.grad.to_dense()"
        )
    for tensor in (param, grad):
        if tensor.dtype not in _library.FLOAT_DTYPES:
            advice = "; view it with torch.view_as_real" if tensor.is_complex() else ""
            raise TypeError(
                f"{_NAME}: expected float64, float32, bfloat16 or float16, got {tensor.dtype} for a "
                f"{'gradient' if tensor is grad else 'parameter'} of shape {list(param.shape)}{advice}"
            )


# ---- the operator's rules ----


_operator = _library.operator(_NAME)


@_library.fake(_NAME)
def _fake(params: list[Tensor], grads: list[Tensor]) -> None:
    return None


@_library.vmap(_NAME)
def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError(f"{_NAME}: vmap is not supported: norms are over whole tensors; pass a list of tensors")


_library.count_versions(_NAME, 1)

"""The property: an operator agrees with its reference computed in float64.

Forward and gradients. An error may be twice that of the reference in the operator's own dtype, plus what the problem
makes of a rounding of its arguments (the reference in float64 on arguments that are moved by one roundoff), plus a
floor of a few roundoffs of the result. The same call gives the same bits again and leaves its arguments as they were;
where the reference has a number that the dtype holds, so has the operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.oracle import ROUNDOFF

Function = Callable[..., Any]

# Of the result's largest elements: sums of some hundred terms in any order, and one rounding at their end.
FLOOR = {torch.float64: 256.0, torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}

# A sample of one or three moves underestimates the condition of the problem, by what this factor makes good.
_MOVED = 8.0


def assert_agrees(
    ours: Function,
    reference: Function,
    tensors: Sequence[Tensor],
    trained: Sequence[bool],
    *,
    seed: int = 0,
    floor: float = 1.0,
    scale: float = 0.0,
    plain: Function | None = None,
    compute: torch.dtype | None = None,
    repeat: bool = True,
    nan_must_stay: bool = True,
    moves: int = 3,
) -> None:
    """``ours(*tensors)`` against ``reference(*tensors)``, and their gradients by those that are trained.

    Args:
        floor: by how many times FLOOR is to be raised.
        scale: what results are differences of, where that is more than themselves.
        plain: the reference as it is run in the tensors' own dtype; ``reference`` by default.
        compute: the dtype whose roundings arguments are moved by; the coarsest of the tensors' by default.
        moves: how often arguments are moved.
        nan_must_stay: where the reference is NaN or infinite, so is the operator; forward only.
    """
    before = [tensor.clone() for tensor in tensors]
    results = _run(ours, tensors, trained, seed)
    if repeat:
        again = _run(ours, tensors, trained, seed)
        for first, second in zip(results, again, strict=True):
            torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor.detach(), old, rtol=0, atol=0, equal_nan=True)

    exact = [_double(tensor) for tensor in tensors]
    truths = _run(reference, exact, trained, seed)
    by_plain = _try(plain or reference, tensors, trained, seed)
    if compute is None:
        compute = max((t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: ROUNDOFF[dtype])
    moves = [_run(reference, _moved(exact, ROUNDOFF[compute], k), trained, seed) for k in range(moves)]
    forward = len(results) - sum(trained)
    if not all(result.isfinite() for result in truths[:forward] if result.dim() == 0):
        results, truths = results[:forward], truths[:forward]  # gradients of a loss that is no number
    for index, (result, truth) in enumerate(zip(results, truths, strict=True)):
        name = f"result {index}" if index < forward else f"gradient {index - forward}"
        plain_result = None if by_plain is None else by_plain[index]
        moved = [move[index] for move in moves]
        must_stay = nan_must_stay and index < forward
        _assert_close(name, result, truth, plain_result, moved, floor, scale, must_stay)


def _assert_close(
    name: str,
    result: Tensor,
    truth: Tensor,
    plain: Tensor | None,
    moved: list[Tensor],
    floor: float,
    scale: float,
    nan_must_stay: bool,
) -> None:
    assert result.shape == truth.shape, f"{name}: shape {list(result.shape)}, expected {list(truth.shape)}"
    dtype = result.dtype
    largest = torch.finfo(dtype).max * (1 - 8 * ROUNDOFF[dtype])
    is_number = truth.abs() <= largest
    for other in moved:  # on the edge to overflow, or to a branch without a number
        is_number &= other.abs() <= largest
    found = result.double()
    wrong = is_number & ~found.isfinite()
    assert not wrong.any(), f"{name}: {found[wrong][0]} where the reference is {truth[wrong][0]}"
    if nan_must_stay:
        lost = ~truth.isfinite() & found.isfinite()
        for other in moved:
            lost &= ~other.isfinite()
        assert not lost.any(), f"{name}: {found[lost][0]} where the reference is {truth[lost][0]}"
    if not is_number.any():
        return

    def error(x: Tensor) -> float:
        return float((x.double()[is_number] - truth[is_number]).norm())

    plain_error = 0.0 if plain is None else error(plain)
    if plain_error != plain_error:
        plain_error = torch.inf
    moved_error = max(map(error, moved))
    roundoffs = floor * FLOOR[dtype] * ROUNDOFF[dtype]
    size = float(truth[is_number].norm()) + scale
    least = torch.finfo(dtype).tiny * 4 * is_number.sum().item() ** 0.5
    limit = 2 * plain_error + _MOVED * moved_error + roundoffs * size + least
    assert error(result) <= limit, (
        f"{name}: error {error(result):.3e}, limit {limit:.3e}: plain {plain_error:.2e}, moved {moved_error:.2e}, "
        f"floor {roundoffs * size:.2e}, of {size:.3e}"
    )


def _run(function: Function, tensors: Sequence[Tensor], trained: Sequence[bool], seed: int) -> list[Tensor]:
    """Results and gradients, in this order."""
    inputs = [t.detach().requires_grad_() if train else t.detach() for t, train in zip(tensors, trained, strict=True)]
    output = function(*inputs)
    results = [output] if isinstance(output, Tensor) else list(output)
    if not any(trained):
        return [result.detach() for result in results]
    upstream = [uneven(result, seed + k) for k, result in enumerate(results)]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    pairs = [(result, grad) for result, grad in zip(results, upstream, strict=True) if result.requires_grad]
    outputs, upstreams = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, wanted, upstreams, allow_unused=True)
    return [
        *(result.detach() for result in results),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True)),
    ]


def _try(function: Function, *arguments: Any) -> list[Tensor] | None:
    with contextlib.suppress(RuntimeError, NotImplementedError):  # torch has no such kernel in 16 bits
        return _run(function, *arguments)
    return None


def uneven(like: Tensor, seed: int) -> Tensor:
    """An upstream gradient of exact numbers in every dtype; expanded, transposed or contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shape = list(like.shape)
    if seed % 3 == 0:
        return torch.full((), 0.75).to(like).expand(shape)
    values = torch.randint(-8, 9, shape, generator=generator).div(4).to(like.dtype)
    return values.mT.contiguous().mT if seed % 3 == 1 and len(shape) > 1 else values


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _moved(tensors: Sequence[Tensor], roundoff: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        t * (1 + roundoff * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))
        if t.is_floating_point()
        else t
        for t in tensors
    ]

"""OrthoGrad: the gradients of a whole model, projected in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pyreg.optim

from . import floor
from .harness import FLOOR, OURS, Call, Contender, Workload, compiled
from .sweep import Sweep, doubling, only

OPERATOR = "orthograd"
EPSILON = 1e-30
LAYERS = 16  # of a sweep

Parameters = list[Tensor]  # each with its .grad
Projection = Callable[[list[Tensor], list[Tensor]], None]  # weights, gradients: writes the gradients


def resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """The parameters of a ResNet-50, in order: a stem, four stages of bottleneck blocks, a linear head."""

    def convolution(out: int, width: int, kernel: int) -> Iterator[tuple[int, ...]]:
        yield out, width, kernel, kernel
        yield (out,)  # the batch norm's weight
        yield (out,)  # and its bias

    yield from convolution(64, 3, 7)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            yield from convolution(width, channels, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, channels, 1)  # the shortcut
            channels = 4 * width
    yield 1000, channels
    yield (1000,)


def formula_(weight: Tensor, grad: Tensor) -> None:
    """The released code, for one parameter tensor."""
    w, g = weight.view(-1), grad.view(-1)
    projection = torch.dot(w, g) / (torch.dot(w, w) + EPSILON)
    g_perp = g - projection * w
    scaled = g_perp * (g.norm(2) / (g_perp.norm(2) + EPSILON))
    grad.copy_(scaled.view_as(grad))


def released_(weights: list[Tensor], grads: list[Tensor]) -> None:
    for weight, grad in zip(weights, grads, strict=True):
        formula_(weight, grad)


def foreach_(weights: list[Tensor], grads: list[Tensor]) -> None:
    """The formula with torch's multi-tensor functions, which have norms but no dot product."""
    weights_dot_grads = torch.stack([product.sum() for product in torch._foreach_mul(weights, grads)])
    weights_squared = torch.stack(torch._foreach_norm(weights)).square()
    projections = (weights_dot_grads / (weights_squared + EPSILON)).unbind()
    grads_perp = torch._foreach_sub(grads, torch._foreach_mul(weights, projections))
    norms, norms_perp = torch.stack(torch._foreach_norm(grads)), torch.stack(torch._foreach_norm(grads_perp))
    torch._foreach_mul_(grads_perp, (norms / (norms_perp + EPSILON)).unbind())
    torch._foreach_copy_(grads, grads_perp)


def split(params: Parameters) -> tuple[list[Tensor], list[Tensor]]:
    return [param.detach() for param in params], [param.grad for param in params]


def projecting(projection: Projection) -> Callable[[Parameters], Call]:
    def prepare(params: Parameters) -> Call:
        weights, grads = split(params)
        return lambda: projection(weights, grads)

    return prepare


def prepare_compiled(params: Parameters) -> Call:
    """One graph for the whole list: it takes a minute to compile, and runs faster than one graph for any tensor."""
    call = projecting(compiled(released_, dynamic=False))(params)
    call()  # compiles
    return call


def prepare_floor(params: Parameters) -> Call:
    """20 bytes a parameter in fp32: read weights and gradients; read both again and write the gradients."""
    weights, grads = split(params)
    if weights[0].is_cuda:
        moved = sum(2 * weight.nbytes + 3 * grad.nbytes for weight, grad in zip(weights, grads, strict=True))
        return floor.device_copy(moved, "cuda")
    return floor.in_sequence(floor.read(*weights, *grads), floor.update(weights, grads))


CONTENDERS = [
    Contender(OURS, lambda params: lambda: pyreg.optim.orthogonalize_gradients_(params)),
    Contender("released formula", projecting(released_)),
    Contender("torch._foreach", projecting(foreach_)),
    Contender("compiled formula", prepare_compiled, slow=True),
    Contender(FLOOR, prepare_floor),
]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    shapes = list(resnet50_shapes())[: 8 if smoke else None]
    return [_workload(device, "ResNet-50", shapes, CONTENDERS)]


def _workload(device: str, name: str, shapes: list[tuple[int, ...]], contenders: list[Contender]) -> Workload:
    def make_inputs(generator: torch.Generator) -> Parameters:
        return [_parameter(shape, generator, device) for shape in shapes]

    return Workload(OPERATOR, name, "float32", device, make_inputs, contenders)


def _parameter(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    """Projecting a gradient twice does to it what projecting it once does, so the calls need no fresh gradients."""
    fan_in = max(1, torch.Size(shape[1:]).numel())
    param = torch.randn(shape, generator=generator, device=device).mul_(fan_in**-0.5).requires_grad_()
    param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3)
    return param


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "released formula")

    def of(elements: int) -> Workload:
        return _workload(device, f"{LAYERS} layers of {elements}", [(elements // LAYERS // 64, 64)] * LAYERS, both)

    return [Sweep(OPERATOR, f"elements, in {LAYERS} layers", doubling(1 << 18, 1 << 25), of)]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

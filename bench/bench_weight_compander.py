"""The weight compander, forward and backward, with a and b learned: the gradients of v, a and b.

One large tensor, and the 54 weight tensors of a ResNet-50 with an a and a b for each layer, as a training step needs
them: all of them once forward, then all gradients for upstream gradients that lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyreg.ops.weight_compander import weight_companders

from . import floor
from .bench_orthograd import resnet50_shapes
from .harness import FLOOR, OURS, Call, Contender, Workload, compiled
from .sweep import Sweep, doubling, only

OPERATOR = "weight_compander"
ELEMENTS = 25_000_000

Inputs = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # v, dL/dw, a, b of each layer
Companders = Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]  # v, a, b to w


def formula(vs: list[Tensor], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Layer by layer, as the parametrization of a layer does it."""
    return [scale * torch.atan(v / width) for v, scale, width in zip(vs, a, b, strict=True)]


def step(companders: Companders) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        vs, grads, a, b = inputs
        leaves = [*vs, *a, *b]
        return lambda: torch.autograd.grad(companders(vs, a, b), leaves, grads)

    return prepare


def compiled_step(inputs: Inputs) -> Call:
    call = step(compiled(formula, dynamic=False))(inputs)
    call()  # compiles
    return call


def prepare_floor(inputs: Inputs) -> Call:
    """20 bytes an element in fp32: read v and write w; read v and dL/dw and write dL/dv."""
    vs, grads = ([tensor.detach() for tensor in list_] for list_ in inputs[:2])
    if vs[0].is_cuda:
        return floor.device_copy(5 * sum(v.nbytes for v in vs), "cuda")
    return floor.in_sequence(floor.copy(*vs), floor.read(*grads), floor.copy(*vs))


CONTENDERS = [
    Contender(OURS, step(weight_companders)),
    Contender("eager formula", step(formula)),
    Contender("compiled formula", compiled_step, slow=True),
    Contender(FLOOR, prepare_floor),
]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    layers = [shape for shape in resnet50_shapes() if len(shape) > 1][: 4 if smoke else None]
    large = [(10_007 if smoke else ELEMENTS,)]
    table = [
        ("25M", large, torch.float32),
        ("25M", large, torch.bfloat16),
        ("ResNet-50", layers, torch.float32),
        ("ResNet-50", layers, torch.bfloat16),
    ]
    return [_workload(device, name, shapes, dtype, CONTENDERS) for name, shapes, dtype in table]


def _workload(
    device: str, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, contenders: list[Contender]
) -> Workload:
    def make_inputs(generator: torch.Generator) -> Inputs:
        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        def constants(value: float) -> list[Tensor]:
            return [torch.tensor(value, dtype=dtype, device=device, requires_grad=True) for _ in shapes]

        vs = [normal(shape).requires_grad_() for shape in shapes]
        return vs, [normal(shape) for shape in shapes], constants(0.5), constants(1.0)

    return Workload(OPERATOR, name, str(dtype).removeprefix("torch."), device, make_inputs, contenders)


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "eager formula")
    make = lambda elements: _workload(device, str(elements), [(elements,)], torch.float32, both)  # noqa: E731
    return [Sweep(OPERATOR, "elements, of one tensor", doubling(1 << 18, 1 << 25), make)]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

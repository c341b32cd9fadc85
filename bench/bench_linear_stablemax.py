"""Linear + StableMax cross-entropy, forward and backward, mean reduction: the head of a language model.

The softmax heads of torch and of Liger do the same products; they are what a user has today. The floor are the three
bare products, with the logits in memory: `x W^T`, `G W`, `G^T x`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pyreg.functional

from .bench_stablemax import formula_fp32
from .harness import FLOOR, OURS, Call, Contender, Workload, compiled_step, step
from .sweep import Sweep, doubling, only

OPERATOR = "linear_stablemax_cross_entropy"

Inputs = tuple[Tensor, Tensor, Tensor]  # input [N, H], weight [C, H], class indices [N]


def eager_logits(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return pyreg.functional.stablemax_cross_entropy(F.linear(input, weight), target)


def formula(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return formula_fp32(F.linear(input, weight), target)


def chunked_softmax(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(input, weight, target, options=options)


def liger_softmax(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(input, weight, target)  # type: ignore[no-any-return]


def prepare_products(inputs: Inputs) -> Call:
    input, weight = (tensor.detach() for tensor in inputs[:2])
    logits = input.new_empty(input.shape[0], weight.shape[0])
    grad_input, grad_weight = torch.empty_like(input), torch.empty_like(weight)

    def call() -> None:
        torch.mm(input, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_input)
        torch.mm(logits.t(), input, out=grad_weight)

    return call


CONTENDERS = [
    Contender(OURS, step(lambda x, weight, target: pyreg.functional.linear_stablemax_cross_entropy(x, weight, target))),
    Contender("logits + ours", step(eager_logits)),
    Contender("F.linear_cross_entropy", step(lambda *arguments: F.linear_cross_entropy(*arguments)), slow=True),
    Contender("F.linear_cross_entropy chunked", step(chunked_softmax), slow=True),
    Contender("compiled logits + formula", compiled_step(formula), slow=True),
    Contender(FLOOR, prepare_products),
]
if not hasattr(F, "linear_cross_entropy"):  # torch < 2.13
    CONTENDERS = [contender for contender in CONTENDERS if not contender.name.startswith("F.")]
LIGER = (
    [Contender("Liger", step(liger_softmax), imports="liger_kernel.transformers.functional")]
    if importlib.util.find_spec("liger_kernel")
    else []
)


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    if device == "cuda":
        return [_workload(device, smoke, 4096, 4096, 128256, torch.bfloat16, CONTENDERS + LIGER)]
    return [_workload(device, smoke, 4096, 1024, 32000, dtype, CONTENDERS) for dtype in (torch.float32, torch.bfloat16)]


def _workload(
    device: str, smoke: bool, rows: int, features: int, classes: int, dtype: torch.dtype, contenders: list[Contender]
) -> Workload:
    n, h, c = (min(size, 64) for size in (rows, features, classes)) if smoke else (rows, features, classes)

    def make_inputs(generator: torch.Generator) -> Inputs:
        options = {"generator": generator, "device": device}
        input = torch.randn(n, h, **options).to(dtype).requires_grad_()  # type: ignore[arg-type]
        weight = torch.randn(c, h, **options).mul_(h**-0.5).to(dtype).requires_grad_()  # type: ignore[arg-type]
        return input, weight, torch.randint(c, (n,), **options)  # type: ignore[arg-type]

    name, dtype_name = f"{rows}x{features}->{classes}", str(dtype).removeprefix("torch.")
    return Workload(OPERATOR, name, dtype_name, device, make_inputs, contenders)


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "logits + ours")
    make = lambda v: _workload(device, False, 1024, 256, v, torch.float32, both)  # noqa: E731
    return [Sweep(OPERATOR, "V, of 1024 x 256 -> V", doubling(1000, 64000), make)]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

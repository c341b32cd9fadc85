"""StableMax cross-entropy, forward and backward, mean reduction.

What is timed is what a training step does to a loss: the forward, `loss.backward()` down to the logits, and the release
of the logits' gradient. The logits are a leaf, so that nothing but the loss is in the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyreg.functional

from . import floor
from .harness import FLOOR, OURS, Call, Contender, Workload, compiled_step, step
from .sweep import Sweep, doubling, only

OPERATOR = "stablemax_cross_entropy"

Inputs = tuple[Tensor, Tensor]  # logits [N, C], class indices [N]


def formula(logits: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The released code; it computes in fp64."""
    x = logits.to(dtype)
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    log_probs = torch.log(s / s.sum(-1, keepdim=True))
    return -log_probs.gather(-1, target[:, None]).mean()


def formula_fp64(logits: Tensor, target: Tensor) -> Tensor:
    return formula(logits, target, torch.float64)


def formula_fp32(logits: Tensor, target: Tensor) -> Tensor:
    return formula(logits, target, torch.float32)


class _Head(torch.autograd.Function):
    """Stands for the layer that makes the logits: autograd lets nobody write into a leaf."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: list[Tensor]) -> Tensor:
        return logits[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def in_place_step(inputs: Inputs) -> Call:
    """The loss that turns the memory of the logits into their gradient, on a copy that it may consume."""
    logits, target = inputs[0].detach().clone(), inputs[1]
    anchor = torch.zeros((), device=logits.device, requires_grad=True)

    def call() -> None:
        pyreg.functional.stablemax_cross_entropy_(_Head.apply(anchor, [logits]), target).backward()

    return call


def prepare_floor(inputs: Inputs) -> Call:
    """CPU: read the logits; read them and write the gradient. CUDA, where a row stays on the chip: read and write."""
    logits = inputs[0].detach()
    if logits.is_cuda:
        return floor.device_copy(2 * logits.nbytes, "cuda")
    return floor.in_sequence(floor.read(logits), floor.copy(logits))


CONTENDERS = [
    Contender(OURS, step(lambda logits, target: pyreg.functional.stablemax_cross_entropy(logits, target))),
    Contender("ours in place", in_place_step, consumes_inputs=True),
    Contender("F.cross_entropy", step(F.cross_entropy)),
    Contender("compiled fp32 formula", compiled_step(formula_fp32), slow=True),
    Contender(FLOOR, prepare_floor),
]
# Eager formulas hold many copies of the logits: gigabytes at the largest shapes.
EAGER = [
    Contender("eager fp32 formula", step(formula_fp32)),
    Contender("released fp64 formula", step(formula_fp64)),
]
SLOW_EAGER = [Contender(one.name, one.prepare, slow=True) for one in EAGER]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        table = [(8192, 131072, bf16, CONTENDERS, False), (4096, 32000, bf16, CONTENDERS + EAGER, False)]
    else:
        # A loss over 113 classes finds its logits, a megabyte or two, where the matrix product before it left them.
        table = [
            (4096, 32000, fp32, CONTENDERS + SLOW_EAGER, False),
            (4096, 32000, bf16, CONTENDERS, False),
            (5107, 113, fp32, CONTENDERS + EAGER, True),
            (128, 113, fp32, CONTENDERS + EAGER, True),
            (262144, 12, fp32, CONTENDERS + EAGER, False),
        ]
    return [_workload(device, smoke, *row) for row in table]


def _workload(
    device: str, smoke: bool, rows: int, classes: int, dtype: torch.dtype, contenders: list[Contender], cached: bool
) -> Workload:
    shape = (min(rows, 64), min(classes, 128)) if smoke else (rows, classes)

    def make_inputs(generator: torch.Generator) -> Inputs:
        logits = torch.randn(shape, generator=generator, dtype=dtype, device=device).requires_grad_()
        return logits, torch.randint(shape[1], shape[:1], generator=generator, device=device)

    dtype_name = str(dtype).removeprefix("torch.")
    return Workload(OPERATOR, f"{rows}x{classes}", dtype_name, device, make_inputs, contenders, cached)


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "F.cross_entropy")

    def of(rows: int, classes: int) -> Workload:
        return _workload(device, False, rows, classes, torch.float32, both, False)

    return [
        Sweep(OPERATOR, "V, of 1024 x V", doubling(1000, 64000), lambda v: of(1024, v)),
        Sweep(OPERATOR, "N, of N x 1000", doubling(512, 65536), lambda n: of(n, 1000)),
    ]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

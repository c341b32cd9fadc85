"""ConR, forward and backward, mean reduction: the gradient of the features of a batch.

Labels are from 0 to 100, the window is 1. Predictions know nothing of the labels, as early in training, so that every
tile of pairs has something to compute; in the workload "predictions near labels" they are off by 2 in the root mean
square, and of the rows in the order of their labels most pairs of tiles are far apart in both: skipped.

The eager formulas hold up to eleven N x N tensors at a time, 12 GB at N = 16384: there they are not run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pyreg.functional

from .harness import FLOOR, OURS, Call, Contender, Inputs, Workload, compiled_step, step
from .sweep import Sweep, doubling, only

OPERATOR = "conr"

WINDOW, TEMPERATURE, ETA = 1.0, 0.07, 0.01
LARGEST_LABEL = 100
NEAR = 2.0
FLOOR_ROWS = 4096  # of the scores that the floor has in memory at a time


def masks(targets: Tensor, preds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distances of the labels, the positives and the negatives, [N, N] each."""
    d = (targets[:, None] - targets[None, :]).abs()
    e = (preds[:, None] - preds[None, :]).abs()
    itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    return d, (d <= WINDOW) & ~itself, (d > WINDOW) & (e <= WINDOW)


def released(features: Tensor, targets: Tensor, preds: Tensor) -> Tensor:
    """As the released code computes it: masks are factors, and what they mask enters the sum of positives as exp(0). It
    is NaN where a row has no positive, as in the small workloads, and takes as long."""
    z = F.normalize(features, dim=1)
    scores = z @ z.t() / TEMPERATURE
    d, positive, negative = masks(targets, preds)
    positive, negative = positive.to(z.dtype), negative.to(z.dtype)
    positives = torch.exp(scores * positive).sum(1, keepdim=True)
    negatives = (torch.exp(ETA * d) * negative * torch.exp(scores * negative)).sum(1, keepdim=True)
    log_prob = positive * torch.log(torch.exp(scores * positive) / (positives + negatives))
    losses = -log_prob.sum(1) / positive.sum(1)
    return (losses * (negative.sum(1) > 0)).mean()


def formula(features: Tensor, targets: Tensor, preds: Tensor) -> Tensor:
    """The paper's, with logsumexp; a row without positives or without negatives gives 0."""
    z = F.normalize(features, dim=1)
    scores = z @ z.t() / TEMPERATURE
    d, positive, negative = masks(targets, preds)
    logits = torch.where(negative, scores + ETA * d, scores)
    logits = logits.masked_fill(~(positive | negative), torch.finfo(logits.dtype).min)
    count = positive.sum(1)
    losses = logits.logsumexp(1) - (scores * positive).sum(1) / count.clamp(min=1)
    return (losses * ((count > 0) & negative.any(1))).mean()


def fused(features: Tensor, targets: Tensor, preds: Tensor) -> Tensor:
    return pyreg.functional.conr_loss(features, targets, preds, window=WINDOW, temperature=TEMPERATURE, eta=ETA)


def forward(inputs: Inputs) -> Call:
    return lambda: fused(*inputs)


def symmetric_products(inputs: Inputs) -> Call:
    """The floor of a loss of all pairs of one batch: one and a half Gram products z z^T, and one product G z."""
    z = inputs[0].detach()
    count = min(len(z), FLOOR_ROWS)
    half = z[: (len(z) + 1) // 2]
    scores, half_scores = z.new_empty(count, len(z)), z.new_empty(count, len(half))
    grad = torch.empty_like(z)

    def call() -> None:
        for rows, grad_rows in zip(z.split(count), grad.split(count), strict=True):
            torch.mm(rows, half.t(), out=half_scores[: len(rows)])
            torch.mm(rows, z.t(), out=scores[: len(rows)])
            torch.mm(scores[: len(rows)], z, out=grad_rows)

    return call


CONTENDERS = [
    Contender(OURS, step(fused)),
    Contender("released formula", step(released)),
    Contender("eager formula", step(formula)),
    Contender("compiled formula", compiled_step(formula), slow=True),
    Contender(FLOOR, symmetric_products),
]
WITHOUT_SCORES = [one for one in CONTENDERS if one.name in (OURS, FLOOR)]


def make_labels(kind: str, count: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Targets and predictions."""
    continuous, preds = LARGEST_LABEL * torch.rand(2, count, generator=generator, device=device)
    integers = torch.randint(LARGEST_LABEL + 1, (count,), generator=generator, device=device).float()
    targets = continuous if kind == "continuous labels" else integers
    if kind == "predictions near labels":
        preds = targets + NEAR * torch.randn(count, generator=generator, device=device)
    return targets, preds


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        table = [
            ("32768x512", bf16, WITHOUT_SCORES),
            ("32768x512 predictions near labels", bf16, WITHOUT_SCORES),
            ("4096x512", fp32, CONTENDERS),
            ("256x2048", fp32, CONTENDERS),
            ("256x2048 forward", fp32, [Contender(OURS, forward)]),
        ]
    else:
        table = [
            ("4096x512", fp32, CONTENDERS),
            ("4096x512 continuous labels", fp32, CONTENDERS),
            ("4096x512 predictions near labels", fp32, CONTENDERS),
            ("1024x2048", fp32, CONTENDERS),
            ("256x2048", fp32, CONTENDERS),
            ("128x512", fp32, CONTENDERS),
            ("16384x512", fp32, WITHOUT_SCORES),
        ]
    return [_workload(device, smoke, *row) for row in table]


def _workload(device: str, smoke: bool, name: str, dtype: torch.dtype, contenders: list[Contender]) -> Workload:
    shape, _, kind = name.partition(" ")
    n, d = (min(int(size), 64) if smoke else int(size) for size in shape.split("x"))

    def make_inputs(generator: torch.Generator) -> Inputs:
        features = torch.randn(n, d, generator=generator, device=device).to(dtype).requires_grad_()
        return features, *make_labels(kind, n, generator, device)

    # The network has just computed the features: they are where it left them.
    return Workload(OPERATOR, name, str(dtype).removeprefix("torch."), device, make_inputs, contenders, cached=True)


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "eager formula")
    make = lambda n: _workload(device, False, f"{n}x512", torch.float32, both)  # noqa: E731
    return [Sweep(OPERATOR, "N, of N x 512", doubling(256, 8192), make)]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

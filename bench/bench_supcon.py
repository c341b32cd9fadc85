"""Supervised contrastive loss, forward and backward, mean reduction: the gradient of the features of a batch."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pyreg.functional

from .bench_conr import symmetric_products
from .harness import FLOOR, OURS, Contender, Inputs, Workload, compiled_step, step
from .sweep import Sweep, doubling, only

OPERATOR = "supcon"

TEMPERATURE = 0.1
LIBRARY = "pytorch-metric-learning"
HAS_LIBRARY = importlib.util.find_spec("pytorch_metric_learning") is not None


def fused(features: Tensor, labels: Tensor) -> Tensor:
    return pyreg.functional.supcon_loss(features, labels, temperature=TEMPERATURE)


def formula(features: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(features, dim=1)
    scores = z @ z.t() / TEMPERATURE
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    count = positive.sum(1)
    losses = scores.masked_fill(itself, -torch.inf).logsumexp(1) - (scores * positive).sum(1) / count.clamp(min=1)
    return (losses * (count > 0)).sum() / (count > 0).sum()


@functools.cache
def library_loss() -> torch.nn.Module:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)  # type: ignore[no-any-return]


def library(features: Tensor, labels: Tensor) -> Tensor:
    return library_loss()(features, labels)  # type: ignore[no-any-return]


CONTENDERS = [
    Contender(OURS, step(fused)),
    *([Contender(LIBRARY, step(library), imports="pytorch_metric_learning.losses")] if HAS_LIBRARY else []),
    Contender("eager formula", step(formula)),
    Contender("compiled formula", compiled_step(formula), slow=True),
    Contender(FLOOR, symmetric_products),
]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    return [_workload(device, smoke, 4096, 512, 100, CONTENDERS), _workload(device, smoke, 256, 128, 10, CONTENDERS)]


def _workload(
    device: str, smoke: bool, rows: int, features: int, classes: int, contenders: list[Contender]
) -> Workload:
    n, d = (min(size, 64) for size in (rows, features)) if smoke else (rows, features)

    def make_inputs(generator: torch.Generator) -> Inputs:
        x = torch.randn(n, d, generator=generator, device=device).requires_grad_()
        return x, torch.randint(classes, (n,), generator=generator, device=device)

    # The network has just computed the features: they are where it left them.
    return Workload(OPERATOR, f"{rows}x{features}", "float32", device, make_inputs, contenders, cached=True)


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "eager formula")
    make = lambda n: _workload(device, False, n, 512, 100, both)  # noqa: E731
    return [Sweep(OPERATOR, "N, of N x 512", doubling(256, 8192), make)]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

"""InfoNCE of two views, forward and backward, mean reduction: the gradients of queries and keys.

pytorch-metric-learning has the same value under two names. `NTXentLoss` holds every positive beside all negative pairs,
N x N^2 numbers: it is run at N = 256 only. `SupConLoss` of queries and keys, each a class of its own, holds N x N.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pyreg.functional

from .harness import FLOOR, OURS, Call, Contender, Inputs, Workload, compiled_step, step
from .sweep import Sweep, doubling, only

OPERATOR = "info_nce"

TEMPERATURE = 0.07
NTXENT, SUPCON = "pytorch-metric-learning NTXentLoss", "pytorch-metric-learning SupConLoss"
HAS_LIBRARY = importlib.util.find_spec("pytorch_metric_learning") is not None


def fused(query: Tensor, key: Tensor) -> Tensor:
    return pyreg.functional.info_nce(query, key, temperature=TEMPERATURE)


def fused_symmetric(query: Tensor, key: Tensor) -> Tensor:
    return pyreg.functional.info_nce(query, key, temperature=TEMPERATURE, symmetric=True)


def scores(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N], and where the positive of each row is."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / TEMPERATURE
    return logits, torch.arange(len(query), device=query.device)


def cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    return F.cross_entropy(*scores(query, key))


def clip(query: Tensor, key: Tensor) -> Tensor:
    logits, positive = scores(query, key)
    return (F.cross_entropy(logits, positive) + F.cross_entropy(logits.t(), positive)) / 2


@functools.cache
def library_loss(name: str) -> torch.nn.Module:
    import pytorch_metric_learning.losses

    return getattr(pytorch_metric_learning.losses, name)(temperature=TEMPERATURE)  # type: ignore[no-any-return]


def library(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(query: Tensor, key: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        # Given the same tensor of labels twice, it takes row i of the keys for row i of the queries itself.
        return library_loss(name)(query, labels, ref_emb=key, ref_labels=labels.clone())  # type: ignore[no-any-return]

    return loss


def products(inputs: Inputs) -> Call:
    """The floor: three bare products, with the scores in memory: `q k^T`, `G k`, `G^T q`."""
    query, key = (tensor.detach() for tensor in inputs)
    logits = query.new_empty(len(query), len(key))
    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)

    def call() -> None:
        torch.mm(query, key.t(), out=logits)
        torch.mm(logits, key, out=grad_query)
        torch.mm(logits.t(), query, out=grad_key)

    return call


CONTENDERS = [
    Contender(OURS, step(fused)),
    Contender("F.cross_entropy", step(cross_entropy)),
    Contender("compiled F.cross_entropy", compiled_step(cross_entropy), slow=True),
    *(
        [Contender(SUPCON, step(library("SupConLoss")), slow=True, imports="pytorch_metric_learning.losses")]
        if HAS_LIBRARY
        else []
    ),
    Contender(FLOOR, products),
]
SMALL = [
    *CONTENDERS,
    *(
        [Contender(NTXENT, step(library("NTXentLoss")), imports="pytorch_metric_learning.losses")]
        if HAS_LIBRARY
        else []
    ),
]
SYMMETRIC = [
    Contender(OURS, step(fused_symmetric)),
    Contender("CLIP formula", step(clip)),
    Contender("compiled CLIP formula", compiled_step(clip), slow=True),
    Contender(FLOOR, products),
]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    table = [
        ("8192x256", CONTENDERS),
        ("8192x256 symmetric", SYMMETRIC),
        ("256x128", SMALL),
        ("256x128 symmetric", SYMMETRIC),
    ]
    return [_workload(device, smoke, *row) for row in table]


def _workload(device: str, smoke: bool, name: str, contenders: list[Contender]) -> Workload:
    n, d = (min(int(size), 64) if smoke else int(size) for size in name.split()[0].split("x"))

    def make_inputs(generator: torch.Generator) -> Inputs:
        """Two views that resemble each other."""
        query, noise = torch.randn(2, n, d, generator=generator, device=device)
        return query.requires_grad_(), (query.detach() + noise).requires_grad_()

    # The network has just computed both: they are where it left them.
    return Workload(OPERATOR, name, "float32", device, make_inputs, contenders, cached=True)


def sweeps(device: str) -> list[Sweep]:
    both = only(CONTENDERS, OURS, "F.cross_entropy")
    make = lambda n: _workload(device, False, f"{n}x256", both)  # noqa: E731
    return [Sweep(OPERATOR, "N, of N x 256", doubling(256, 8192), make)]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

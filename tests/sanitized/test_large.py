"""Shapes beyond those of tests/fuzz: blocks of columns, tiles of rows, tiles that are skipped, rows shared by threads.

What the kernels compute there is compared elsewhere; here every access of theirs is looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyreg import functional as F
from pyreg.nn import SamplesLoss
from pyreg.ops.weight_compander import rescale_steps_, to_weight_gradients_
from pyreg.optim import orthogonalize_gradients_
from tests.oracle import FLOAT_DTYPES

pytestmark = pytest.mark.sanitized


def _features(n: int, d: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, d).to(dtype).requires_grad_()


def _cross_entropy(shape: tuple[int, ...], **options: Any) -> Callable[[torch.dtype], Tensor]:
    def loss(dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape).to(dtype).requires_grad_()
        return F.stablemax_cross_entropy(x, torch.randint(shape[1], (shape[0], *shape[2:])), **options)

    return loss


def _conr(n: int, d: int, spread: float, **options: Any) -> Callable[[torch.dtype], Tensor]:
    def loss(dtype: torch.dtype) -> Tensor:
        targets = spread * torch.rand(n)
        return F.conr_loss(_features(n, d, dtype), targets, targets + 0.3 * torch.randn(n), **options)

    return loss


def _points(function: Callable[..., Any], n: int, m: int, d: int, **options: Any) -> Callable[[torch.dtype], Tensor]:
    def value(dtype: torch.dtype) -> Tensor:
        result = function(_features(n, d, dtype), _features(m, d, dtype), **options)
        return result if isinstance(result, Tensor) else result.value + result.plan().sum()

    return value


def _rows(name: str, shape: tuple[int, ...], dim: int) -> Callable[[torch.dtype], Tensor]:
    def rows(dtype: torch.dtype) -> Tensor:
        return getattr(F, name)(torch.randn(shape).to(dtype).requires_grad_(), dim)  # type: ignore[no-any-return]

    return rows


_SOLVER = {"epsilon": 1.0, "max_iter": 12, "tol": 0.0}
CALLS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "stablemax of long rows": _rows("stablemax", (3, 70_001), 1),
    "log_stablemax of strided rows": _rows("log_stablemax", (5, 601, 67), 1),
    "cross-entropy in one pass": _cross_entropy((2051, 1031)),
    "cross-entropy of classes apart": _cross_entropy((7, 301, 129), reduction="none"),
    "cross-entropy, smoothed": _cross_entropy((129, 2049), label_smoothing=0.1, weight=torch.rand(2049)),
    "linear cross-entropy": lambda dtype: F.linear_stablemax_cross_entropy(
        _features(301, 67, dtype), _features(1031, 67, dtype), torch.randint(1031, (301,))
    ),
    "ConR, all tiles": _conr(1100, 33, 3.0),
    "ConR, tiles that are skipped": _conr(1337, 16, 400.0),
    "ConR of the released code": _conr(700, 65, 40.0, variant="agedb", weights=torch.rand(700)),
    "SupCon": lambda dtype: F.supcon_loss(_features(1100, 65, dtype), torch.randint(9, (1100,))),
    "InfoNCE": lambda dtype: F.info_nce(_features(701, 33, dtype), _features(1300, 33, dtype)),
    "InfoNCE, both ways": lambda dtype: F.info_nce(
        _features(1100, 33, dtype), _features(1100, 33, dtype), symmetric=True, ids=torch.randint(900, (1100,))
    ),
    "transport under a cost": lambda dtype: F.sinkhorn(_features(517, 803, dtype), **_SOLVER).plan().sum(),
    "unbalanced transport": lambda dtype: F.sinkhorn(_features(517, 203, dtype), rho_a=1.0, **_SOLVER).value,
    "transport between points": _points(F.sinkhorn_points, 611, 403, 3, **_SOLVER),
    "transport between points, streamed": _points(F.sinkhorn_points, 611, 403, 17, streaming=True, **_SOLVER),
    "divergence": _points(F.sinkhorn_divergence, 411, 303, 5, **_SOLVER),
    "samples loss": _points(SamplesLoss(p=1, blur=0.5, reach=1.0, diameter=4.0), 411, 303, 5),
    "Monge gap": _points(F.monge_gap, 403, 403, 3, cost="euclidean", **_SOLVER),
    "compander": lambda dtype: F.weight_compander(
        _features(33, 40_001, dtype), torch.rand(33) + 0.5, torch.tensor(0.7), "arsinh"
    ),
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_loss_and_gradient(name: str, dtype: torch.dtype) -> None:
    result = CALLS[name](dtype)
    assert result.isfinite().all()
    result.sum().backward()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_what_has_no_gradient(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = F.progressive_partial_transport(torch.randn(3001, 33).to(dtype), mass=0.3, max_iter=10)
    assert labels.isfinite().all()
    params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (1, 4097, 300_001)]
    for param in params:
        param.grad = torch.randn_like(param)
    orthogonalize_gradients_(params)
    grads, numbers = [param.grad for param in params if param.grad is not None], [0.7] * len(params)
    to_weight_gradients_(grads, params, numbers, numbers, "arctan", 0.1)
    rescale_steps_(params, [param.detach() + 1 for param in params], numbers, numbers)
    assert all(tensor.isfinite().all() for tensor in (*params, *grads))

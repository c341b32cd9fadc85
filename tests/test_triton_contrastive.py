"""The Triton kernels of the pairwise losses: interpreted on the CPU, compiled where there is a GPU. The tests of the
public functions run on a GPU by themselves; these are for the kernels as operators, and for what only they have."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pyreg.reference.conr import conr_loss
from tests.oracle import FLOAT_DTYPES, assert_as_accurate
from tests.pairwise import LOSSES, Loss, in_float64, value_and_gradients
from tests.test_contrastive import operator_arguments

# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SELF = [name for name in LOSSES if not name.startswith("info_nce")]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def kernels(triton_device: torch.device) -> Any:
    return importlib.import_module("pyreg.triton_kernels.contrastive")


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES[request.param]


def gradients(kernels: Any, loss: Loss, forward: tuple[Any, ...], statistics: Any, rows: Tensor) -> list[Tensor]:
    """For the upstream gradients of the rows' losses."""
    backward, count = getattr(kernels, f"{loss.operator}_backward"), len(forward[0])
    if loss.operator == "info_nce":
        symmetric = forward[8]
        rows = rows / 2 if symmetric else rows
        sides = (rows, rows if symmetric else rows[:0])
        return list(backward(*sides, *forward[:5], *statistics[:2], *forward[5:7], 0, [True, True]))
    tensors = {"conr": 4, "supcon": 2}[loss.operator]
    return [backward(rows, *forward[:tensors], statistics[0], *forward[tensors:-5], 0, count)]


def results(kernels: Any, loss: Loss, features: list[Tensor], arguments: dict[str, Any], reduction: int) -> list[Tensor]:
    """The loss, and the gradients for the upstream gradient that `value_and_gradients` takes."""
    forward = operator_arguments(loss, features, arguments, reduction)
    value, *statistics = getattr(kernels, loss.operator)(*forward)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=statistics[0].dtype, device=value.device)
    divisor: Tensor | int = {0: 1, 1: len(features[0]), 2: 1}[reduction]
    if loss.operator == "supcon" and reduction == 1:
        divisor = statistics[0][1].sum()
    rows = (upstream.reshape(value.shape) / divisor).expand(len(features[0])).contiguous()
    return [value, *gradients(kernels, loss, forward, statistics, rows)]


def problem(loss: Loss, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Any]:
    return [tensor.detach() for tensor in loss.features(shape, dtype, device)], loss.arguments(shape[0], device)


# Every dtype at one size that no tile divides; other sizes and reductions once: the interpreter takes a second for each.
CASES = [
    *(((37, 19), dtype, "none") for dtype in FLOAT_DTYPES),
    ((1, 2), torch.float32, "mean"), ((2, 3), torch.float32, "mean"), ((48, 16), torch.float32, "sum"),
]  # fmt: skip


@pytest.mark.parametrize("shape, dtype, reduction", CASES, ids=str)
def test_against_reference(
    kernels: Any, triton_device: torch.device, loss: Loss, shape: tuple[int, int], dtype: torch.dtype, reduction: str
) -> None:
    features, arguments = problem(loss, shape, dtype, triton_device)
    ours = results(kernels, loss, features, arguments, ["none", "mean", "sum"].index(reduction))
    leaves = [tensor.clone().requires_grad_() for tensor in features]
    theirs = value_and_gradients(loss.plain, leaves, reduction=reduction, **arguments)
    truth = value_and_gradients(loss.plain, in_float64(leaves), reduction=reduction, **arguments)
    for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
        assert actual.dtype == dtype
        assert_as_accurate(actual, same_dtype, expected, floor=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("conr")])
def test_skipped_tiles_change_nothing(
    kernels: Any, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    loss = LOSSES[name]
    features, arguments = problem(loss, (67, 8), dtype, triton_device)
    monkeypatch.setattr(kernels, "_skips", lambda features: False)
    all_tiles = results(kernels, loss, features, arguments, 0)
    monkeypatch.setattr(kernels, "_skips", lambda features: True)
    some_tiles = results(kernels, loss, features, arguments, 0)
    # The rows of another order are summed in another order; bfloat16 rounds what is off by that.
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, expected in zip(some_tiles, all_tiles, strict=True):
        assert (ours - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("first", [0, 11])
def test_some_rows_of_all(kernels: Any, triton_device: torch.device, name: str, first: int) -> None:
    """As each rank of a process group computes them."""
    loss, count, rows = LOSSES[name], 53, 13
    features, arguments = problem(loss, (count, 6), torch.float64, triton_device)
    forward = operator_arguments(loss, features, arguments, 0)
    losses, statistics, _ = getattr(kernels, loss.operator)(*forward)
    some, some_statistics, none = getattr(kernels, loss.operator)(*forward[:-3], first, rows, False)
    own = slice(first, first + rows)
    torch.testing.assert_close([some, some_statistics], [losses[own], statistics[:, own]], **EXACT)
    assert none.shape == (0,)
    tensors = {"conr": 4, "supcon": 2}[loss.operator]
    upstream = torch.rand(count, dtype=torch.float64, device=triton_device)
    backward = getattr(kernels, f"{loss.operator}_backward")
    options = (upstream, *forward[:tensors], statistics, *forward[tensors:-5])
    torch.testing.assert_close(backward(*options, first, rows), backward(*options, 0, count)[own], **EXACT)


@pytest.mark.parametrize("offset", [5, -4])
@pytest.mark.parametrize("by_key", [False, True])
def test_one_direction_with_positives_elsewhere(
    kernels: Any, triton_device: torch.device, offset: int, by_key: bool
) -> None:
    """Query i and key i + offset, where there is one: the others have no loss, but are still negatives."""
    queries, keys = 22, 37
    query = torch.randn(queries, 6, dtype=torch.float64, device=triton_device, requires_grad=True)
    key = torch.randn(keys, 6, dtype=torch.float64, device=triton_device, requires_grad=True)
    ids = torch.randint(9, (keys,), device=triton_device)
    options = (None, ids[:queries].contiguous(), ids, 0.3, True, not by_key, by_key, offset, 0)
    losses, *statistics = kernels.info_nce(query.detach(), key.detach(), *options, torch.float64, [False, False])[:3]
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).t() / 0.3
    expected = torch.zeros(keys if by_key else queries, dtype=torch.float64, device=triton_device)
    for i in range(queries):
        j = i + offset
        if not 0 <= j < keys:
            continue
        same = ids[:queries] == ids[j] if by_key else ids == ids[i]
        same[i if by_key else j] = False
        row = (scores[:, j] if by_key else scores[i]).masked_fill(same, -torch.inf)
        expected[j if by_key else i] = row.logsumexp(0) - scores[i, j]
    torch.testing.assert_close(losses, expected.detach(), **EXACT)
    upstream = torch.rand_like(losses)
    sides = (upstream[:0], upstream) if by_key else (upstream, upstream[:0])
    ours = kernels.info_nce_backward(
        *sides, query.detach(), key.detach(), *options[:3], *statistics, 0.3, True, offset, [True, True]
    )
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (query, key), upstream), **EXACT)


@pytest.mark.parametrize("norm", [1, 2, 0])
@pytest.mark.parametrize("labels", [torch.float32, torch.float64])
def test_labels_of_several_values(kernels: Any, triton_device: torch.device, norm: int, labels: torch.dtype) -> None:
    features = torch.randn(53, 9, device=triton_device)
    targets = torch.randint(6, (53, 3), device=triton_device).to(labels)
    preds = targets + torch.randint(-3, 3, (53, 3), device=triton_device)
    numbers = (2.0, 0.2, 0.05, 0, norm)
    ours, statistics, _ = kernels.conr(features, targets, preds, None, *numbers, 2, torch.float32, 0, 53, False)
    leaf = features.double().requires_grad_()
    name = {1: 1, 2: 2, 0: torch.inf}[norm]
    expected = conr_loss(leaf, targets.double(), preds.double(), 2.0, 0.2, 0.05, None, label_norm=name, reduction="sum")
    gradient = kernels.conr_backward(
        torch.ones(53, device=triton_device), features, targets, preds, None, statistics, *numbers, 0, 53
    )
    # Sums of 53 terms of float32 scores up to 5, whose error exp multiplies.
    torch.testing.assert_close(ours.double(), expected.detach(), rtol=1e-5, atol=0)
    (truth,) = torch.autograd.grad(expected, leaf)
    assert (gradient - truth).norm() <= 1e-5 * truth.norm()


WIDE = [
    *(("conr-paper", *options) for options in ((0.01, 0.05), (0.2, 10.0), (0.01, 10.0))),
    ("conr-agedb", 0.01, 10.0), ("conr-nyud2", 0.01, 10.0), ("supcon", 0.01, 0), ("info_nce-symmetric", 0.01, 0),
]  # fmt: skip


@pytest.mark.parametrize("name, temperature, eta", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_ranges(
    kernels: Any, triton_device: torch.device, name: str, temperature: float, eta: float, dtype: torch.dtype
) -> None:
    """Exponents that span hundreds: nothing underflows to the logarithm of 0, nothing overflows."""
    loss = LOSSES[name]
    features, arguments = problem(loss, (37, 8), dtype, triton_device)
    arguments |= {"temperature": temperature} | ({"eta": eta} if loss.operator == "conr" else {})
    ours = results(kernels, loss, features, arguments, 2)
    leaves = [tensor.clone().requires_grad_() for tensor in features]
    theirs = value_and_gradients(loss.plain, leaves, reduction="sum", **arguments)
    truth = value_and_gradients(loss.plain, in_float64(leaves), reduction="sum", **arguments)
    for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
        assert actual.isfinite().all()
        assert_as_accurate(actual, same_dtype, expected, floor=8)


def test_same_bits_on_every_run(kernels: Any, triton_device: torch.device, loss: Loss) -> None:
    features, arguments = problem(loss, (37, 8), torch.float32, triton_device)
    first, second = (results(kernels, loss, features, arguments, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_zero_tiny_and_huge_rows(kernels: Any, triton_device: torch.device, size: float) -> None:
    loss = LOSSES["conr-paper"]
    features, arguments = problem(loss, (37, 8), torch.float32, triton_device)
    features[0][3] = 0
    features[0][5:8] *= size
    ours = results(kernels, loss, features, arguments, 2)
    truth = value_and_gradients(loss.reference, in_float64([features[0].requires_grad_()]), reduction="sum", **arguments)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=0)
    for rows in (slice(0, 3), slice(3, 4), slice(5, 8), slice(8, 37)):
        assert (ours[1][rows] - truth[1][rows]).norm() <= 1e-4 * truth[1][rows].norm()

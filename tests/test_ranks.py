"""Losses of the global batch: two processes, each with its share of the rows, against one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pyreg
from pyreg.functional import conr_loss, info_nce, supcon_loss
from tests.ranks import RANKS, found_by_ranks, message_of

# Which rows of all rows a rank has: as many each, or not, or one rank alone.
EVEN = [[0, 1, 2, 3], [4, 5, 6, 7]]
UNEVEN = [[0, 1, 2, 3, 4], [5, 6, 7]]
ALONE = [[0, 1, 2, 3, 4, 5, 6, 7], []]
WITH_OTHER_KEYS = [[0, 1, 2, 3, 4, 8, 9], [5, 6, 7, 10]]

# Sums of some dozens of float64 terms, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


class Case:
    """A loss of rows, of which the first ``trained`` tensors have gradients."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        tensors: list[Tensor | None],
        trained: int = 1,
        rows: list[list[int]] = UNEVEN,
        other_rows: list[list[int]] | None = None,
    ) -> None:
        self.loss, self.tensors, self.trained = loss, tensors, trained
        self.rows = [rows, *[rows if other_rows is None else other_rows] * (len(tensors) - 1)]

    def of_rank(self, tensors: list[Any], rank: int) -> list[Any]:
        """A rank's share of the tensors."""
        pairs = zip(tensors, self.rows, strict=False)
        return [None if tensor is None else tensor[rows[rank]] for tensor, rows in pairs]

    def run(self, tensors: list[Any], upstream: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss and gradients of some rows."""
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[: self.trained]]
        loss = self.loss(*leaves, *tensors[self.trained :], **options)
        return loss.detach(), list(torch.autograd.grad(loss, leaves, upstream.expand(loss.shape)))

    def upstream(self, rank: int | None) -> Tensor:
        """Uneven over the rows of all ranks."""
        if self.loss.keywords.get("reduction") != "none":
            return torch.tensor(0.7, dtype=torch.float64)
        everyone = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
        return everyone if rank is None else everyone[self.rows[0][rank]]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def cases() -> dict[str, Case]:
    features, weights = numbers(8, 4), numbers(8).abs() + 0.1
    labels, preds = torch.tensor([0, 1, 3, 1, 3, 9, 0, 4]), torch.tensor([0, 3, 3, 1, 9, 9, 1, 3])
    keys = [numbers(8, 4).flip(0), numbers(8).sigmoid().log(), labels]
    more_keys = [numbers(11, 4), numbers(11).sigmoid().log(), torch.tensor([*labels, 3, 1, 7])]

    def conr(f: Tensor, y: Tensor, p: Tensor, w: Tensor | None = None, **options: Any) -> Tensor:
        return conr_loss(f, y, p, weights=w, temperature=0.3, eta=0.2, **options)

    def nce(q: Tensor, k: Tensor, log_q: Tensor | None = None, ids: Tensor | None = None, **options: Any) -> Tensor:
        return info_nce(q, k, log_q=log_q, ids=ids, temperature=0.3, **options)

    found = {}
    for reduction in ("mean", "sum", "none"):
        of = functools.partial(functools.partial, reduction=reduction)
        for variant in ("paper", "agedb", "nyud2"):
            found[f"conr-{variant}-{reduction}"] = Case(of(conr, variant=variant), [features, labels, preds, weights])
        found[f"supcon-{reduction}"] = Case(of(supcon_loss), [features, labels])
        found[f"info_nce-{reduction}"] = Case(of(nce), [features, *keys], 2)
        found[f"info_nce-symmetric-{reduction}"] = Case(of(nce, symmetric=True), [features, *keys], 2)
        found[f"info_nce-more-keys-{reduction}"] = Case(of(nce), [features, *more_keys], 2, UNEVEN, WITH_OTHER_KEYS)
    of = functools.partial
    found["conr-without-weights"] = Case(of(conr), [features, labels.double(), preds.double()], rows=EVEN)
    found["conr-wide-labels"] = Case(of(conr), [features, numbers(8, 3), numbers(8, 3).flip(0)])
    found["conr-alone"] = Case(of(conr), [features, labels, preds], rows=ALONE)
    found["supcon-raw"] = Case(of(supcon_loss, normalize=False, temperature=1.0), [features, labels], rows=EVEN)
    found["supcon-no-positives"] = Case(of(supcon_loss), [features, torch.arange(8)])
    found["supcon-alone"] = Case(of(supcon_loss), [features, labels], rows=ALONE)
    found["info_nce-raw"] = Case(of(nce, normalize=False, symmetric=True), [features, keys[0]], 2, EVEN)
    found["info_nce-alone"] = Case(of(nce, symmetric=True), [features, *keys], 2, ALONE)
    return found


CASES = cases()
INPUTS = numbers(8, 6)
DDP_LOSSES = {name: CASES[name] for name in ("conr-paper-mean", "supcon-mean", "info_nce-symmetric-mean")}


def train_through(case: Case, model: torch.nn.Module, rank: int | None, **options: Any) -> list[Tensor]:
    """Gradients of a model's parameters, whose output for some rows are features, or queries and keys."""
    tensors = case.tensors if rank is None else case.of_rank(case.tensors, rank)
    inputs = INPUTS if rank is None else INPUTS[case.rows[0][rank]]
    model.zero_grad()
    features = model(inputs)
    trained = [features] if case.trained == 1 else [features, features.roll(1, dims=1)]
    case.loss(*trained, *tensors[case.trained :], **options).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4, dtype=torch.float64)


def in_16_bits(dtype: torch.dtype, rank: int) -> tuple[Tensor, Tensor]:
    case = CASES["conr-paper-mean"]
    tensors = case.of_rank([case.tensors[0].to(dtype), *case.tensors[1:]], rank)
    loss, gradients = case.run(tensors, torch.tensor(1.0, dtype=dtype), group=True)
    return loss, gradients[0]


def run_rank(rank: int, found: dict[str, Any]) -> None:
    for name, case in CASES.items():
        found[name] = case.run(case.of_rank(case.tensors, rank), case.upstream(rank), group=True)
    model = torch.nn.parallel.DistributedDataParallel(linear())
    for name, case in DDP_LOSSES.items():
        found[f"ddp-{name}"] = train_through(case, model, rank, group=dist.group.WORLD)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found[f"conr-{dtype}"] = in_16_bits(dtype, rank)

    features, labels = numbers(4, 3 + rank), torch.arange(4) // 2
    found["widths differ"] = message_of(lambda: supcon_loss(features, labels, group=True))
    other_kind = numbers(4, 3).to(torch.float32 if rank else torch.float64)
    found["kinds differ"] = message_of(lambda: conr_loss(other_kind, labels, labels, group=True))
    weights = numbers(4).abs() if rank else None
    found["weights differ"] = message_of(lambda: conr_loss(numbers(4, 3), labels, labels, weights=weights, group=True))
    leaf = numbers(4, 3).requires_grad_()
    for name, loss in (
        ("supcon", supcon_loss(leaf, labels, group=True)),
        ("info_nce", info_nce(leaf, leaf, group=True)),
    ):
        found[f"second order, {name}"] = message_of(lambda x=loss: torch.autograd.grad(x, leaf, create_graph=True))
    compiled = torch.compile(lambda x: supcon_loss(x, labels, group=True), fullgraph=True, backend="eager")
    found["compiled"] = message_of(lambda: compiled(numbers(4, 3)))
    found["empty"] = supcon_loss(leaf[:0], labels[:0], group=True)
    found["empty"].backward()
    alone = dist.new_group([0])
    if rank == 0:
        found["group of one"] = supcon_loss(numbers(4, 3), labels, group=alone)
    else:
        found["not in group"] = message_of(lambda: supcon_loss(numbers(4, 3), labels, group=alone))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    loss, gradients = case.run(case.tensors, case.upstream(None))
    for rank in range(RANKS):
        own_loss, own_gradients = ranks[rank][name]
        expected = case.of_rank([loss], rank)[0] if loss.dim() == 1 else loss
        torch.testing.assert_close(own_loss, expected, **EXACT)
        expected_gradients = case.of_rank(gradients, rank)
        torch.testing.assert_close(own_gradients, [RANKS * gradient for gradient in expected_gradients], **EXACT)
    if loss.dim() == 0:
        assert ranks[0][name][0].equal(ranks[1][name][0])  # to the bit


@pytest.mark.parametrize("name", DDP_LOSSES)
def test_gradients_through_data_parallel_training(ranks: list[dict[str, Any]], name: str) -> None:
    expected = train_through(CASES[name], linear(), None)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    for rank in range(RANKS):
        torch.testing.assert_close(ranks[rank][f"ddp-{name}"], expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(ranks: list[dict[str, Any]], dtype: torch.dtype) -> None:
    case = CASES["conr-paper-mean"]
    tensors = [case.tensors[0].to(dtype), *case.tensors[1:]]
    loss, gradients = case.run(tensors, torch.tensor(1.0, dtype=dtype))
    for rank in range(RANKS):
        own_loss, own_gradient = ranks[rank][f"conr-{dtype}"]
        # one rounding each, of numbers that are the same but for the order of float32 sums
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(own_loss, loss, **tolerance)
        torch.testing.assert_close(own_gradient, RANKS * case.of_rank(gradients, rank)[0], **tolerance)


def test_misuse_is_told(ranks: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        found = ranks[rank]
        assert "supcon_loss: expected features with rows alike on all ranks of group, got" in found["widths differ"]
        assert "['3 torch.float64', '4 torch.float64']" in found["widths differ"]
        assert "['3 torch.float64', '3 torch.float32']" in found["kinds differ"]
        assert "conr_loss: expected weights with rows alike on all ranks" in found["weights differ"]
        assert "['none', '1 torch.float64']" in found["weights differ"]
        assert "supcon_loss: with group there are gradients of first order alone" in found["second order, supcon"]
        assert "info_nce: with group there are gradients of first order alone" in found["second order, info_nce"]
        assert "supcon_loss: group is not for torch.compile" in found["compiled"]
        assert found["empty"].item() == 0
    expected = supcon_loss(numbers(4, 3), torch.arange(4) // 2)
    torch.testing.assert_close(ranks[0]["group of one"], expected)
    assert "this process is not in group" in ranks[1]["not in group"]


def test_group_without_processes() -> None:
    features, labels = numbers(4, 3), torch.arange(4)
    message = "needs torch.distributed.init_process_group to have been called"
    for call in (
        lambda group: supcon_loss(features, labels, group=group),
        lambda group: conr_loss(features, labels, labels, group=group),
        lambda group: pyreg.nn.InfoNCELoss(group=group)(features, features),
    ):
        with pytest.raises(ValueError, match=message):
            call(True)
        assert call(False).isfinite()

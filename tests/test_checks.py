"""Argument checks that operators share: whatever comes, the error names operator, argument and what came."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyreg import functional as F
from pyreg.nn import SamplesLoss
from pyreg.ops._checks import check_flag, check_number

X, LABELS = torch.rand(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    "value", [None, 1j, "x", [1.0], {}, torch.zeros(0), torch.ones(2), torch.tensor(1j), torch.ones(1, device="meta")]
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^op: expected size to be a finite number > 0, got "):
        check_number("op", "size", value, 0, or_equal=False)


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2.0), torch.tensor([2]), torch.tensor(2, dtype=torch.int8)])
def test_what_is_a_number(value: Any) -> None:
    assert check_number("op", "size", value, 0, or_equal=False) == 2.0


@pytest.mark.parametrize("value", [None, 1, "x", torch.ones(2), torch.tensor(True)])
def test_what_is_no_flag(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^op: expected fast to be True or False, got "):
        check_flag("op", "fast", value)


SPARSE = X.to_sparse()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (F.stablemax, {"input": SPARSE}, "input"),
        (F.stablemax_cross_entropy, {"input": X, "target": LABELS.to_sparse()}, "target"),
        (F.stablemax_cross_entropy, {"input": X, "target": SPARSE}, "target"),
        (F.supcon_loss, {"features": SPARSE, "labels": LABELS}, "features"),
        (F.conr_loss, {"features": X, "targets": torch.ones(4).to_sparse(), "preds": torch.ones(4)}, "targets"),
        (F.info_nce, {"query": X, "key": SPARSE}, "key"),
        (F.sinkhorn, {"cost": SPARSE, "epsilon": 1.0}, "cost"),
        (F.sinkhorn, {"cost": X, "epsilon": 1.0, "rho_a": torch.ones(4).to_sparse()}, "rho_a"),
        (F.sinkhorn_points, {"x": X, "y": SPARSE, "epsilon": 1.0}, "y"),
        (F.progressive_partial_transport, {"logits": SPARSE, "mass": 0.5}, "logits"),
        (F.semantic_partial_transport, {"logits": X, "features": SPARSE, "mass": 0.5}, "features"),
    ],
)
def test_sparse_tensors(function: Any, arguments: dict[str, Any], name: str) -> None:
    match = rf"^{function.__name__}: expected {name} to be dense, got layout torch.sparse_coo; use {name}.to_dense\(\)$"
    with pytest.raises(TypeError, match=match):
        function(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dim": None}, TypeError, "expected dim to be an integer, got None"),
        ({"dim": 0.5}, TypeError, "expected dim to be an integer, got 0.5"),
        ({"dtype": "float32"}, TypeError, "expected dtype to be a torch.dtype or None, got 'float32'"),
    ],
)
def test_rows(options: dict[str, Any], error: type[Exception], match: str) -> None:
    for function in (F.stablemax, F.log_stablemax):
        with pytest.raises(error, match=f"^{function.__name__}: {match}$"):
            function(X, **options)


@pytest.mark.parametrize("value", [None, 0.5, "x", 2**63])
def test_ignore_index(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^stablemax_cross_entropy: expected ignore_index to be an integer of 64 bits"):
        F.stablemax_cross_entropy(X, LABELS, ignore_index=value)


def test_a_wrong_label_is_the_called_operators() -> None:
    wrong = torch.tensor([0, 1, 2, 3])
    with pytest.raises(IndexError, match=r"^stablemax_cross_entropy_: target has class 3"):
        F.stablemax_cross_entropy_(X.clone(), wrong)
    with pytest.raises(IndexError, match=r"^linear_stablemax_cross_entropy: target has class 3"):
        F.linear_stablemax_cross_entropy(X, X[:3], wrong)


@pytest.mark.parametrize("value", [1e-320, 1e300])
@pytest.mark.parametrize("name", ["blur", "reach", "diameter"])
def test_lengths_whose_powers_are_no_numbers(name: str, value: float) -> None:
    match = rf"^SamplesLoss: expected {name} whose power {name}\^p = {name}\^2 is a number above 0"
    with pytest.raises(ValueError, match=match):
        SamplesLoss(**{name: value})
    SamplesLoss(reach=math.inf)


@pytest.mark.parametrize(
    "offsets", [0.5, "x", None, [0.0, 4.0], torch.tensor(4), torch.ones(2), torch.tensor([[0, 4]])]
)
def test_offsets_that_are_no_integers(offsets: Any) -> None:
    match = r"^sinkhorn_points: expected (y_offsets to be integers|x_offsets and y_offsets together)"
    with pytest.raises((TypeError, ValueError), match=match):
        F.sinkhorn_points(X, X, epsilon=1.0, x_offsets=[0, 4], y_offsets=offsets)


@pytest.mark.parametrize("rho", [torch.tensor(1j), torch.tensor([True] * 4)])
def test_penalties_that_are_no_numbers(rho: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"^sinkhorn: expected rho_a to hold floating numbers or integers, got "):
        F.sinkhorn(X, epsilon=1.0, rho_a=rho)


@pytest.mark.parametrize("target", [None, [1, 2], LABELS.to_sparse()])
def test_diagnostics(target: Any) -> None:
    from pyreg.diagnostics import softmax_collapse_rate

    with pytest.raises(TypeError, match=r"^softmax_collapse_rate: .*target"):
        softmax_collapse_rate(X, target)

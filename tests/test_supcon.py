"""Supervised contrastive loss: labels. What it shares with other losses: ``test_contrastive.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.functional import supcon_loss
from pyreg.reference.supcon import supcon_loss as reference
from tests.oracle import FLOAT_DTYPES
from tests.pairwise import REDUCTIONS, value_and_gradients

pytestmark = pytest.mark.not_emulated

# The same float64 numbers in another order of summation.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def features_like(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [31, 600])
def test_against_the_derivative_by_hand(device: torch.device, normalize: bool, count: int) -> None:
    """Another algebra: one softmax over all others, the mean of its logarithms over positives, and its Jacobian."""
    features, labels, tau = features_like((count, 7), device), torch.randint(count // 3, (count,), device=device), 0.3
    loss = supcon_loss(features, labels, temperature=tau, normalize=normalize, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, features)
    with torch.no_grad():
        lengths = features.norm(dim=1, keepdim=True) if normalize else torch.ones_like(features[:, :1])
        z = features / lengths
        softmax = (z @ z.t() / tau).fill_diagonal_(-math.inf).softmax(1)
        positive = (labels[:, None] == labels).double().fill_diagonal_(0)
        positives = positive.sum(1, keepdim=True)
        expected = -(positive / positives.clamp(min=1) * (softmax + torch.eye(count, device=device)).log()).sum()
        g = (positives > 0) * softmax - positive / positives.clamp(min=1)
        by_z = (g + g.t()) @ z / tau
        by_features = (by_z - z * (z * by_z).sum(1, keepdim=True)) / lengths if normalize else by_z
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, by_features, **EXACT)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [41, 530])
def test_options(device: torch.device, normalize: bool, temperature: float, count: int) -> None:
    features, labels = features_like((count, 5), device), torch.randint(count // 4, (count,), device=device)
    for reduction in REDUCTIONS:
        options = {"labels": labels, "normalize": normalize, "temperature": temperature, "reduction": reduction}
        ours, theirs = (value_and_gradients(f, [features], **options) for f in (supcon_loss, reference))
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("normalize", [True, False])
def test_two_views_are_a_cross_entropy_among_all_others(device: torch.device, normalize: bool) -> None:
    """SimCLR's NT-Xent."""
    features, labels = features_like((30, 6), device), torch.arange(15, device=device).repeat(2)
    z = F.normalize(features) if normalize else features
    scores = (z @ z.t() / 0.5).masked_fill(torch.eye(30, dtype=torch.bool, device=device), -math.inf)
    expected = F.cross_entropy(scores, torch.arange(30, device=device).roll(15))
    loss = supcon_loss(features, labels, temperature=0.5, normalize=normalize)
    torch.testing.assert_close(loss, expected, **EXACT)
    gradients = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("count", [30, 600])
def test_rows_without_positives_add_nothing(device: torch.device, dtype: torch.dtype, count: int) -> None:
    features, labels = features_like((count, 8), device, dtype), torch.arange(count, device=device)
    for reduction in REDUCTIONS:
        loss, gradient = value_and_gradients(
            supcon_loss, [features], labels=labels, temperature=0.01, reduction=reduction
        )
        assert (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("count", [30, 600])
def test_a_mean_is_over_rows_with_positives(device: torch.device, count: int) -> None:
    features, labels = features_like((count, 8), device), torch.arange(count, device=device)
    labels[7] = labels[20] = labels[3]
    losses = supcon_loss(features, labels, reduction="none")
    assert (losses > 0).nonzero().flatten().tolist() == [3, 7, 20]
    loss = supcon_loss(features, labels)
    torch.testing.assert_close(loss, losses.sum() / 3, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(loss, features), torch.autograd.grad(losses.sum() / 3, features, retain_graph=True), **EXACT
    )
    upstream = torch.full_like(losses, math.inf)
    upstream[[3, 7, 20]] = 1 / 3
    torch.testing.assert_close(
        torch.autograd.grad(losses, features, upstream), torch.autograd.grad(supcon_loss(features, labels), features)
    )


@pytest.mark.parametrize("count", [30, 600])
def test_all_of_one_label(device: torch.device, count: int) -> None:
    features, labels = features_like((count, 8), device), torch.full((count,), -3, device=device)
    ours, theirs = (value_and_gradients(f, [features], labels=labels) for f in (supcon_loss, reference))
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("count", [60, 700])
def test_names_and_order_of_labels_do_not_matter(device: torch.device, count: int) -> None:
    """Labels that agree in their lower and in their upper 32 bits too."""
    features, labels = features_like((count, 6), device), torch.randint(9, (count,), device=device)
    losses = supcon_loss(features, labels, reduction="none")
    far = torch.tensor([0, 2**32, 2**62, -(2**63), 2**63 - 1, -1, 2**31, -(2**31), 2**53 + 1], device=device)
    torch.testing.assert_close(supcon_loss(features, far[labels], reduction="none"), losses, **EXACT)
    order = torch.randperm(count, device=device)
    shuffled = supcon_loss(features[order], labels[order], reduction="none")
    torch.testing.assert_close(shuffled, losses[order], **EXACT)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    features, labels = features_like((30, 6), device), torch.randint(9, (30,), device=device)
    assert torch.equal(supcon_loss(features, labels.to(dtype)), supcon_loss(features, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_without_normalisation(device: torch.device, dtype: torch.dtype) -> None:
    """Scores of some ten thousands: losses like a hinge."""
    features = (30 * features_like((200, 16), device, dtype).detach()).requires_grad_()
    labels = torch.randint(20, (200,), device=device)
    loss, gradient = value_and_gradients(supcon_loss, [features], labels=labels, temperature=0.5, normalize=False)
    exact = features.detach().double().requires_grad_()
    truth = value_and_gradients(reference, [exact], labels=labels, temperature=0.5, normalize=False)
    assert truth[0] > 1e3
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), truth[0], rtol=4 * eps, atol=0)
    # Of exponents of 3e4, a rounding of float32 is worth 2e-3.
    error = (gradient.double() - truth[1]).norm() / truth[1].norm()
    assert error < 4 * eps + 1e-2


# ---- hard to misuse ----

X, Y = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "list": (TypeError, r"expected features to be a tensor, got list", lambda: supcon_loss([1.0], Y)),  # type: ignore[arg-type]
    "integers": (TypeError, r"expected features to be float64.* got torch.int64", lambda: supcon_loss(X.long(), Y)),
    "one dimension": (ValueError, r"expected features of shape \[N, D\]", lambda: supcon_loss(X[:, 0], Y)),
    "no features": (ValueError, r"expected features .* got \[6, 0\]", lambda: supcon_loss(X[:, :0], Y)),
    "labels": (TypeError, r"expected labels to be a tensor, got list", lambda: supcon_loss(X, [0])),  # type: ignore[arg-type]
    "float labels": (
        TypeError,
        r"expected labels to be integers, got torch.float32; use labels.long\(\)",
        lambda: supcon_loss(X, Y.float()),
    ),
    "bool labels": (TypeError, r"expected labels to be integers, got torch.bool", lambda: supcon_loss(X, Y == 0)),
    "fewer labels": (ValueError, r"expected labels of shape \[N\] = \[6\], got \[5\]", lambda: supcon_loss(X, Y[:5])),
    "a column": (
        ValueError,
        r"expected labels of shape \[N\] = \[6\], got \[6, 1\]",
        lambda: supcon_loss(X, Y[:, None]),
    ),
    "temperature": (
        ValueError,
        r"expected temperature to be a finite number > 0, got 0.0",
        lambda: supcon_loss(X, Y, temperature=0.0),
    ),
    "NaN temperature": (
        ValueError,
        r"expected temperature .* got nan",
        lambda: supcon_loss(X, Y, temperature=math.nan),
    ),
    "reduction": (ValueError, r"expected reduction to be .* got None", lambda: supcon_loss(X, Y, reduction=None)),  # type: ignore[arg-type]
    "device": (
        ValueError,
        r"expected labels on the features' device cpu, got meta; move it with labels.to\('cpu'\)",
        lambda: supcon_loss(X, Y.to("meta")),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^supcon_loss: {message}"):
        call()

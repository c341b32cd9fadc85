"""ConR: labels, predictions, weights and variants. What it shares with other losses: ``test_contrastive.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.functional import conr_loss
from pyreg.ops import _checks, _library
from pyreg.reference.conr import conr_loss as reference
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_as_accurate, relative_error
from tests.pairwise import LOSSES, REDUCTIONS, in_float64, value_and_gradients

pytestmark = pytest.mark.not_emulated

GOLDEN = Path(__file__).parent / "golden"
INF = math.inf
VARIANTS = ["paper", "agedb", "nyud2"]

# The same float64 numbers in another order of summation.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def features_like(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def assert_is_the_reference(features: Tensor, **arguments: Any) -> None:
    for reduction in REDUCTIONS if len(features) < 512 else ["mean"]:
        ours, theirs = (
            value_and_gradients(f, [features], reduction=reduction, **arguments) for f in (conr_loss, reference)
        )
        torch.testing.assert_close(ours, theirs, **EXACT)


# ---- right ----


@pytest.mark.parametrize("file", ["agedb_0", "agedb_1", "agedb_2", "nyud2_0"])
def test_golden(device: torch.device, file: str) -> None:
    """Loss and gradient of the released code."""
    golden = {key: torch.from_numpy(array).to(device) for key, array in np.load(GOLDEN / f"conr_{file}.npz").items()}
    numbers = {name: golden[name].item() for name in ("window", "temperature", "eta")}
    features = golden["features"].requires_grad_()
    weights = golden["weights"] if golden["weights"].dim() > 0 else None
    variant = file.split("_")[0]
    loss = conr_loss(features, golden["targets"], golden["preds"], weights=weights, variant=variant, **numbers)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, golden["grad_features"], rtol=1e-10, atol=1e-14)


def by_hand(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor,
    variant: str,
    window: float,
    tau: float,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Another algebra: the loss as a mean of log-quotients, the gradient (G + G^T) z / tau from the written-out G."""
    count = len(features)
    lengths = features.square().sum(1, keepdim=True).sqrt()
    z = features / lengths
    exponentials = (z @ z.t() / tau).exp()
    d, e = (torch.cdist(labels, labels) for labels in (targets, preds))
    itself = torch.eye(count, dtype=torch.bool, device=features.device)
    positive, negative = ((d <= window) & ~itself).double(), ((d > window) & (e <= window)).double()
    push = weights[:, None] * (eta * d if variant == "nyud2" else (eta * d).exp())
    positives = positive.sum(1)
    active = (positives > 0) & (negative.sum(1) > 0)
    total = ((positive + negative * push) * exponentials).sum(1) + (count - positives) * (variant != "paper")
    share = active / (positives + 1) if variant == "nyud2" else active * weights / positives.clamp(min=1)
    losses = share * (positive * (total[:, None] / exponentials).log()).sum(1)
    g = share[:, None] * (positives[:, None] * (positive + negative * push) * exponentials / total[:, None] - positive)
    by_z = (g + g.t()) @ z / tau
    return losses.sum(), (by_z - z * (z * by_z).sum(1, keepdim=True)) / lengths


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [31, 600])
def test_against_the_derivative_by_hand(device: torch.device, variant: str, count: int) -> None:
    features = features_like((count, 7), device)
    targets = torch.randint(count, (count, 1)).double().to(device) / 4
    preds = targets + 5 * torch.randn(count, 1, dtype=torch.float64).to(device)
    weights = torch.rand(count, dtype=torch.float64).to(device) + 0.1
    loss = conr_loss(
        features, targets, preds, weights=weights, variant=variant, temperature=0.3, eta=0.1, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, features)
    expected, by_features = by_hand(features.detach(), targets, preds, weights, variant, 1.0, 0.3, 0.1)
    assert expected > 0
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, by_features, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [41, 530])
def test_options(device: torch.device, variant: str, weighted: bool, count: int) -> None:
    targets = (torch.randint(4 * count, (count,)) / 8).to(device)
    preds = targets + torch.randint(-80, 80, (count,)).to(device) / 8
    weights = torch.rand(count, device=device) + 0.1 if weighted else None
    for window, temperature, eta in ((1.0, 0.07, 0.01), (0.125, 1.0, 0.0), (20.0, 0.3, 0.5)):
        options = {"window": window, "temperature": temperature, "eta": eta, "variant": variant}
        features = features_like((count, 5), device)
        assert_is_the_reference(features, targets=targets, preds=preds, weights=weights, **options)


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("count", [37, 530])
def test_labels_of_several_values(device: torch.device, norm: float, count: int) -> None:
    """Whole numbers, whose distances are the same in every order of summation."""
    targets, preds = torch.randint(6, (2, count, 3), device=device)
    features = features_like((count, 5), device)
    window = {1: 3, 2: math.sqrt(5), INF: 1}[norm]
    assert_is_the_reference(features, targets=targets, preds=preds, window=window, label_norm=norm, temperature=0.3)


def test_averaged_labels(device: torch.device) -> None:
    """nyud2 takes maps of labels, one a sample; features are flattened."""
    targets, preds, weights = torch.rand(3, 24, 1, 6, 5, dtype=torch.float64, device=device)
    features = features_like((24, 4, 3, 3), device)
    options = {"variant": "nyud2", "window": 0.05, "eta": 0.3}
    assert_is_the_reference(features, targets=targets, preds=preds, weights=weights, **options)
    loss = conr_loss(features, targets, preds, weights=weights, **options)
    means = (labels.flatten(1).mean(1) for labels in (targets, preds, weights))
    targets, preds, weights = means
    torch.testing.assert_close(loss, conr_loss(features, targets, preds, weights=weights, **options), **EXACT)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiles_without_pairs(device: torch.device, labels: int, dtype: torch.dtype) -> None:
    """Clusters of labels far apart, each with predictions of its own: most tiles have no pair. A few predictions lie in
    another cluster, and the rows are shuffled."""
    count = 1031
    cluster = torch.randint(9, (count, 1)) * 50.0
    targets = cluster + torch.randint(40, (count, labels)) / 8
    preds = targets + torch.randint(-8, 8, (count, labels)) / 8
    preds[::97] += 50
    targets, preds = targets.to(device), preds.to(device)
    features = features_like((count, 6), device, dtype)
    ours, theirs = (value_and_gradients(f, [features], targets=targets, preds=preds) for f in (conr_loss, reference))
    truth = value_and_gradients(reference, in_float64([features]), targets=targets, preds=preds)
    for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
        assert_as_accurate(actual, same_dtype, expected, floor=8)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """What is read before it is written makes a result NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def labels_of_few_pairs(count: int) -> tuple[Tensor, Tensor]:
    """Of the pairs of most tiles fewer than one in eight is positive or negative; those of the first 200 rows, whose
    predictions are all alike, are."""
    targets, preds = torch.randint(2 * count, (2, count)) / 8
    preds[:200] = -1
    targets[:200] = torch.randint(3, (200,)) * count / 8
    related = (targets[:, None] - targets).abs() <= 1
    related |= (preds[:, None] - preds).abs() <= 1
    assert related[200:, 200:].double().mean() < 0.1
    assert related[:200, :200].all()
    return targets, preds


@pytest.mark.parametrize("temperature", [0.2, 0.02])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("count", "width"), [(330, 160), (1100, 130)])
def test_few_pairs(
    device: torch.device,
    nan_in_new_memory: None,
    variant: str,
    count: int,
    width: int,
    dtype: torch.dtype,
    temperature: float,
) -> None:
    """Scores that are made pair by pair beside some that are products, loss and gradient at once and one by one."""
    targets, preds = (labels.to(device) for labels in labels_of_few_pairs(count))
    features = [features_like((count, width), device, dtype)]
    weights = torch.rand(count, device=device, dtype=torch.float64).to(_library.accumulate_dtype(dtype))
    arguments = {"targets": targets, "preds": preds, "weights": weights}
    arguments |= {"variant": variant, "temperature": temperature, "eta": 0.05}
    for reduction in ("mean", "none"):
        ours = value_and_gradients(conr_loss, features, reduction=reduction, **arguments)
        LOSSES[f"conr-{variant}"].assert_as_accurate(features, {**arguments, "reduction": reduction}, ours, floor=8)


def test_few_pairs_of_some_rows(device: torch.device) -> None:
    """The operator's own rows, as a process of several calls it."""
    count, first, own = 700, 150, 300
    targets, preds = (labels.to(device, torch.float64)[:, None] for labels in labels_of_few_pairs(count))
    features = features_like((count, 40), device).detach()

    def losses(first: int, own: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.pyreg.conr(  # type: ignore[no-any-return]
            features, targets, preds, None, 1.0, 0.2, 0.05, 0, 1, 0, features.dtype, first, own, False
        )

    upstream = torch.rand(count, dtype=torch.float64, device=device)
    loss, statistics, _ = losses(0, count)
    torch.testing.assert_close(losses(first, own)[0], loss[first : first + own], **EXACT)
    arguments = (upstream, features, targets, preds, None, statistics, 1.0, 0.2, 0.05, 0, 1)
    whole, part = (torch.ops.pyreg.conr_backward(*arguments, *rows) for rows in ((0, count), (first, own)))
    torch.testing.assert_close(part, whole[first : first + own], **EXACT)


def test_few_pairs_sum_in_one_order(device: torch.device) -> None:
    """The same bits, whatever the number of threads."""
    targets, preds = (labels.to(device) for labels in labels_of_few_pairs(700))
    features = features_like((700, 600), device, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(value_and_gradients(conr_loss, [features], targets=targets, preds=preds, reduction="none"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_a_distance_that_is_rounded_to_the_window(device: torch.device) -> None:
    """Labels a little more than the window apart, whose difference in float32 is the window: no tile is skipped."""
    targets = torch.tensor([-(2.0**-25), 1.0, 50.0]).repeat_interleave(torch.tensor([256, 256, 64])).to(device)
    preds = targets.clone()
    preds[512:] = 0.5
    features = features_like((576, 6), device, torch.float32)
    losses, expected = (
        f(features, targets, preds, window=1.0, temperature=0.5, reduction="none") for f in (conr_loss, reference)
    )
    torch.testing.assert_close(losses, expected, rtol=64 * ROUNDOFF[torch.float32], atol=0)


@pytest.mark.parametrize("norm", [1, 2, INF])
def test_a_push_as_large_as_the_norm_makes_it(device: torch.device, norm: float) -> None:
    """45 a label: up to 180 of four, whose exponential is beyond float32."""
    targets = torch.zeros(12, 4, device=device)
    targets[6:] = 45
    preds, features = torch.zeros_like(targets), features_like((12, 3), device, torch.float32)
    options = {"eta": 1.0, "temperature": 1.0, "label_norm": norm}
    (value, gradient), (expected, expected_gradient) = (
        value_and_gradients(f, [features], targets=targets, preds=preds, **options) for f in (conr_loss, reference)
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)  # roundoffs of 180 in an exponent


@pytest.mark.parametrize("count", [60, 700])
def test_the_order_of_rows_does_not_matter(device: torch.device, count: int) -> None:
    features = features_like((count, 6), device)
    targets, preds = torch.randint(count, (2, count), device=device)
    weights, order = torch.rand(count, device=device), torch.randperm(count, device=device)
    upstream = torch.rand(count, dtype=torch.float64, device=device)
    losses = conr_loss(features, targets, preds, weights=weights, window=3, reduction="none")
    (gradient,) = torch.autograd.grad(losses, features, upstream)
    shuffled = features.detach()[order].requires_grad_()
    others = (targets[order], preds[order])
    moved = conr_loss(shuffled, *others, weights=weights[order], window=3, reduction="none")
    (moved_gradient,) = torch.autograd.grad(moved, shuffled, upstream[order])
    torch.testing.assert_close(moved, losses[order], **EXACT)
    torch.testing.assert_close(moved_gradient, gradient[order], **EXACT)


# ---- labels ----


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_labels(device: torch.device, dtype: torch.dtype) -> None:
    features = features_like((50, 4), device, torch.float32)
    targets, preds = torch.randint(30, (2, 50), device=device)
    loss = conr_loss(features, targets.to(dtype), preds.to(dtype), eta=0.3)
    torch.testing.assert_close(loss, conr_loss(features, targets.double(), preds.double(), eta=0.3), rtol=0, atol=0)
    assert loss > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_labels_are_widened(device: torch.device, dtype: torch.dtype) -> None:
    features = features_like((50, 4), device, dtype)
    targets, preds = 30 * torch.rand(2, 50, device=device)
    targets, preds = targets.to(dtype), preds.to(dtype)
    loss = conr_loss(features, targets, preds, eta=0.3)
    torch.testing.assert_close(loss, conr_loss(features, targets.float(), preds.float(), eta=0.3), rtol=0, atol=0)
    assert loss > 0


def test_labels_beyond_float32_are_told_apart(device: torch.device) -> None:
    """Integers above 2^24 and float64 labels are compared in float64, whatever the features."""
    features = features_like((3, 4), device, torch.float32)
    preds = torch.zeros(3, device=device)
    whole = torch.tensor([2**24, 2**24 + 2, 2**24 + 3], device=device)
    fine = torch.tensor([0.0, 1 + 1e-12, 0.5], dtype=torch.float64, device=device)
    for targets, expected in ((whole, [False, True, True]), (fine, [True, True, False])):
        options = {"temperature": 1.0, "reduction": "none"}
        assert (conr_loss(features, targets, preds, **options) > 0).tolist() == expected
        assert (conr_loss(features, targets.float(), preds, **options) == 0).all()


def test_window_includes_its_border(device: torch.device) -> None:
    targets, preds = torch.tensor([0.0, 1.0, 2.5], device=device), torch.tensor([0.0, 1.0, 2.0], device=device)
    losses = conr_loss(features_like((3, 4), device), targets, preds, reduction="none")
    # 0 and 1 are positives; 1 and 2.5 negatives, whose predictions are one apart; 0 and 2.5 neither.
    assert (losses > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [40, 600])
def test_window_of_zero(device: torch.device, variant: str, count: int) -> None:
    targets, preds = torch.randint(count // 4, (2, count), device=device)
    features = features_like((count, 5), device)
    assert_is_the_reference(features, targets=targets, preds=preds, window=0.0, variant=variant, temperature=0.3)
    assert conr_loss(features, targets, preds, window=0) > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["no positives", "no negatives", "equal labels", "equal labels, far predictions"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("count", [30, 600])
def test_rows_without_pairs_add_nothing(
    device: torch.device, variant: str, case: str, dtype: torch.dtype, count: int
) -> None:
    index = torch.arange(count, device=device)
    targets = {"no positives": 3 * index, "no negatives": index // 2 * 10}.get(case, 0 * index)
    preds = 100 * index if "negatives" in case or "far" in case else 0 * index
    features = features_like((count, 8), device, dtype)
    for reduction in REDUCTIONS:
        loss, gradient = value_and_gradients(
            conr_loss, [features], targets=targets, preds=preds, variant=variant, reduction=reduction, temperature=0.01
        )
        assert (loss == 0).all()
        assert (gradient == 0).all()


def test_rows_that_add_nothing_take_no_part_whatever_their_upstream_gradient(device: torch.device) -> None:
    targets = torch.tensor([0, 0, 50, 90, 90], device=device)
    preds = torch.tensor([0, 7, 0, 30, 40], device=device)  # of the first four only row 0 has a negative
    for count in (5, 600):
        features = features_like((count, 4), device)
        own_targets, own_preds = (F.pad(labels, (0, count - 5), value=10**6) for labels in (targets, preds))
        own_preds[5:] = 100 * torch.arange(count - 5, device=device) + 10**6
        losses = conr_loss(features, own_targets, own_preds, reduction="none", temperature=1.0)
        assert (losses > 0).nonzero().flatten().tolist() == [0]
        upstream = torch.ones_like(losses)
        (expected,) = torch.autograd.grad(losses, features, upstream, retain_graph=True)
        upstream[1:] = INF
        (actual,) = torch.autograd.grad(losses, features, upstream)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- push and weights ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [60, 530])
def test_a_large_push(device: torch.device, variant: str, scale: float, dtype: torch.dtype, count: int) -> None:
    """exp(eta d) up to e^(6e7): beyond all numbers but as a logarithm."""
    targets = (torch.randint(4 * count, (count,)) / 8 * scale).to(device)
    options = {"targets": targets, "preds": torch.zeros(count, device=device), "window": scale, "variant": variant}
    features = features_like((count, 8), device, dtype)
    loss, gradient = value_and_gradients(conr_loss, [features], eta=0.2, temperature=0.2, **options)
    theirs = value_and_gradients(reference, [features], eta=0.2, temperature=0.2, **options)
    truth = value_and_gradients(reference, in_float64([features]), eta=0.2, temperature=0.2, **options)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    # Exponents up to 60 are taken as they are, and each is worth as many roundoffs of its exponential.
    assert_as_accurate(loss, theirs[0], truth[0], floor=64)
    assert_as_accurate(gradient, theirs[1], truth[1], floor=64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [60, 530])
def test_zero_tiny_and_huge_weights(device: torch.device, variant: str, dtype: torch.dtype, count: int) -> None:
    targets, preds = torch.randint(20, (2, count), device=device)
    weights = torch.rand(count, dtype=torch.float64) + 0.1
    weights[:12] = torch.tensor([0.0, 1e-30, 1e-10, 1e10]).double().repeat(3)
    features = features_like((count, 6), device, dtype)
    arguments = {"targets": targets, "preds": preds, "weights": weights.to(device), "variant": variant}
    ours, theirs = (
        value_and_gradients(f, [features], reduction="none", temperature=0.3, **arguments)
        for f in (conr_loss, reference)
    )
    truth = value_and_gradients(reference, in_float64([features]), reduction="none", temperature=0.3, **arguments)
    assert ours[0].isfinite().all()
    for i in range(12):
        assert relative_error(ours[0][i], truth[0][i]) <= 64 * ROUNDOFF[dtype]
    assert_as_accurate(ours[1], theirs[1], truth[1], floor=64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [12, 530])
def test_a_row_opposite_to_all_others(device: torch.device, variant: str, dtype: torch.dtype, count: int) -> None:
    """At a temperature of 0.01 its exponentials are e^-100, beside the released forms' N - |P_i|."""
    features = (features_like((count, 3), device).detach() / 50 + torch.tensor([1.0, 0.0, 0.0], device=device)).to(
        dtype
    )
    features[0] *= -1
    features.requires_grad_()
    targets = (torch.arange(count, device=device) // 3).float()
    preds = torch.zeros(count, device=device)
    arguments = {"targets": targets, "preds": preds, "temperature": 0.01, "variant": variant, "reduction": "none"}
    ours = value_and_gradients(conr_loss, [features], **arguments)
    truth = value_and_gradients(reference, in_float64([features]), **arguments)
    assert truth[0][0] > 0
    limit = 1024 * ROUNDOFF[dtype]  # exponents of 100, whose roundings add up
    assert relative_error(ours[0][0], truth[0][0]) <= limit
    assert all(relative_error(actual, expected) <= limit for actual, expected in zip(ours, truth, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero", ["weights", "eta"])
@pytest.mark.parametrize("temperature", [0.02, 0.001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_factor_of_zero_beside_the_largest_score(
    device: torch.device, variant: str, zero: str, temperature: float, dtype: torch.dtype
) -> None:
    """Beside exp(1 / temperature), which adds nothing, all other terms are below the smallest number."""
    slant = 5 * temperature  # the cosine of positives
    near, far = [1.0, 0.0], [slant, math.sqrt(1 - slant**2)]
    opposite, targets = [-1.0, 0.0], torch.tensor([0, 0, 10, 10, 20, 20, 0, 10], device=device)
    features = torch.tensor([near, far, near, far, near, opposite, far, opposite], dtype=dtype, device=device)
    arguments = {"targets": targets, "preds": torch.zeros(8, device=device), "temperature": temperature}
    arguments |= {"eta": 0.0} if zero == "eta" else {"weights": torch.tensor([0.0, 1, 1, 1, 0, 0, 1, 0]).to(device)}
    (losses, gradient), (expected, expected_gradient) = (
        value_and_gradients(f, [x.requires_grad_()], variant=variant, reduction="none", **arguments)
        for f, x in ((conr_loss, features), (reference, features.detach().double()))
    )
    # Exponents of this size carry as many roundoffs, the gradient 1 / temperature times as many.
    noise = 4 * ROUNDOFF[dtype] / temperature
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=noise)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=8 * noise / temperature)


def test_weights_of_one_are_none(device: torch.device) -> None:
    targets, preds = torch.randint(20, (2, 50), device=device)
    features = features_like((50, 6), device)
    for weights in (torch.ones(50, device=device), torch.ones(50, 1, dtype=torch.int64, device=device)):
        for variant in VARIANTS:
            losses = conr_loss(features, targets, preds, weights=weights, variant=variant)
            torch.testing.assert_close(losses, conr_loss(features, targets, preds, variant=variant), **EXACT)


# ---- constants ----


def test_predictions_get_no_gradient(device: torch.device) -> None:
    features = features_like((20, 4), device)
    targets = torch.randint(9, (20, 1), device=device)
    preds = torch.rand(20, 1, device=device, requires_grad=True)
    loss = conr_loss(features, targets, preds * 2)
    loss.backward()
    assert preds.grad is None
    assert features.grad is not None
    assert not conr_loss(features.detach(), targets, preds).requires_grad


@pytest.mark.parametrize("count", [40, 600])
def test_rows_of_bad_labels_and_weights_are_in_no_pair(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Where values are not read: on a GPU, in compiled and in mapped calls."""
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    features = features_like((count, 4), device)
    targets, preds = torch.randint(20, (2, count), device=device).double()
    weights = torch.rand(count, dtype=torch.float64, device=device) + 0.1
    bad, good = torch.tensor([3, 4, 5, 6]), torch.arange(count) >= 7
    good[:3] = True
    targets[3] = math.nan
    weights[4:7] = torch.tensor([math.nan, -1.0, INF])
    losses = conr_loss(features, targets, preds, weights=weights, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), features)
    kept = features.detach()[good].requires_grad_()
    expected = conr_loss(kept, targets[good], preds[good], weights=weights[good], reduction="none")
    torch.testing.assert_close(losses[good], expected, **EXACT)
    torch.testing.assert_close(gradient[good], torch.autograd.grad(expected.sum(), kept)[0], **EXACT)
    assert (losses[bad] == 0).all()
    assert (gradient[bad] == 0).all()
    preds[8] = math.nan  # positives remain
    losses = conr_loss(features, targets, preds, weights=weights, reduction="none")
    assert losses[8] == 0
    assert losses.isfinite().all()


def test_tiles_of_nan_on_the_diagonal(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows in the order of labels miss another label and its prediction: they are in no pair."""
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    features = features_like((600, 4), device)
    targets = torch.stack([torch.arange(600) / 8, torch.zeros(600)], 1).to(device)
    preds = targets.roll(5, 0)
    targets[:70, 1] = preds[:70, 1] = math.nan
    value, gradient = value_and_gradients(conr_loss, [features], targets=targets, preds=preds, reduction="sum")
    kept = features.detach()[70:].requires_grad_()
    expected = value_and_gradients(conr_loss, [kept], targets=targets[70:], preds=preds[70:], reduction="sum")
    torch.testing.assert_close([value, gradient[70:]], expected, **EXACT)
    assert (gradient[:70] == 0).all()


# ---- hard to misuse ----

X, Y, P = torch.randn(6, 4), torch.arange(6.0), torch.zeros(6, 1)
W = torch.ones(6)
NAN = torch.tensor([0.0, 1.0, math.nan, 3.0, 4.0, 5.0])
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "list": (TypeError, r"expected features to be a tensor, got list", lambda: conr_loss([1.0], Y, P)),  # type: ignore[arg-type]
    "integer features": (
        TypeError,
        r"expected features to be float64, float32, .* got torch.int64; convert it with features.float\(\)",
        lambda: conr_loss(X.long(), Y, P),
    ),
    "one dimension": (
        ValueError,
        r"expected features of shape \[N, D\] or \[N, \.\.\.\] .* got \[6\]; use unsqueeze\(1\)",
        lambda: conr_loss(X[:, 0], Y, P),
    ),
    "no features": (
        ValueError,
        r"expected features .* at least one feature a sample, got \[6, 0\]",
        lambda: conr_loss(X[:, :0], Y, P),
    ),
    "targets": (TypeError, r"expected targets to be a tensor, got list", lambda: conr_loss(X, [0.0], P)),  # type: ignore[arg-type]
    "bool targets": (
        TypeError,
        r"expected targets to hold floating numbers or integers, got torch.bool",
        lambda: conr_loss(X, Y > 2, P),
    ),
    "complex preds": (TypeError, r"expected preds to hold .* got torch.complex64", lambda: conr_loss(X, Y, P.cfloat())),
    "fewer targets": (
        ValueError,
        r"expected targets of shape \[N\], \[N, 1\] or \[N, K\] with N = 6, got \[5\]",
        lambda: conr_loss(X, Y[:5], P),
    ),
    "fewer preds": (ValueError, r"expected preds of shape .* with N = 6, got \[5, 1\]", lambda: conr_loss(X, Y, P[:5])),
    "0-d targets": (ValueError, r"expected targets of shape .* got \[\]", lambda: conr_loss(X, Y[0], P)),
    "maps": (
        ValueError,
        r"expected preds of shape \[N\], \[N, 1\] or .* got \[6, 1, 1\]",
        lambda: conr_loss(X, Y, P[..., None]),
    ),
    "no values": (
        ValueError,
        r"expected targets of shape \[N, \.\.\.\] .* got \[6, 0\]",
        lambda: conr_loss(X, P[:, :0], P, variant="nyud2"),
    ),
    "widths": (
        ValueError,
        r"expected preds with as many values a sample as targets, 1, got 3",
        lambda: conr_loss(X, Y, P.expand(6, 3)),
    ),
    "NaN targets": (ValueError, r"expected finite numbers in targets, got nan", lambda: conr_loss(X, NAN, P)),
    "infinite preds": (ValueError, r"expected finite numbers in preds, got inf", lambda: conr_loss(X, Y, Y + INF)),
    "list of weights": (
        TypeError,
        r"expected weights to be a tensor, got list",
        lambda: conr_loss(X, Y, P, weights=[1.0]),
    ),  # type: ignore[arg-type]
    "weights' shape": (
        ValueError,
        r"expected weights of shape \[N\] or \[N, 1\] with N = 6, got \[6, 2\]",
        lambda: conr_loss(X, Y, P, weights=torch.ones(6, 2)),
    ),
    "fewer weights": (ValueError, r"expected weights of shape .* got \[5\]", lambda: conr_loss(X, Y, P, weights=W[:5])),
    "scalar weight": (ValueError, r"expected weights of shape .* got \[\]", lambda: conr_loss(X, Y, P, weights=W[0])),
    "negative weights": (
        ValueError,
        r"expected weights to be at least 0, got -1.0",
        lambda: conr_loss(X, Y, P, weights=-W),
    ),
    "NaN weights": (
        ValueError,
        r"expected finite numbers in weights, got nan",
        lambda: conr_loss(X, Y, P, weights=NAN),
    ),
    "trained weights": (
        ValueError,
        r"weights has no gradient; pass weights.detach\(\)",
        lambda: conr_loss(X, Y, P, weights=torch.ones(6, requires_grad=True)),
    ),
    "window": (
        ValueError,
        r"expected window to be a finite number >= 0, got -1",
        lambda: conr_loss(X, Y, P, window=-1),
    ),
    "NaN window": (ValueError, r"expected window .* got nan", lambda: conr_loss(X, Y, P, window=math.nan)),
    "temperature": (
        ValueError,
        r"expected temperature to be a finite number > 0, got 0",
        lambda: conr_loss(X, Y, P, temperature=0),
    ),
    "negative temperature": (
        ValueError,
        r"expected temperature .* got -0.1",
        lambda: conr_loss(X, Y, P, temperature=-0.1),
    ),
    "text": (ValueError, r"expected temperature .* got 'cold'", lambda: conr_loss(X, Y, P, temperature="cold")),  # type: ignore[arg-type]
    "eta": (ValueError, r"expected eta to be a finite number >= 0, got inf", lambda: conr_loss(X, Y, P, eta=INF)),
    "variant": (
        ValueError,
        r"expected variant to be 'paper', 'agedb' or 'nyud2', got 'nyu'",
        lambda: conr_loss(X, Y, P, variant="nyu"),
    ),
    "variants": (
        ValueError,
        r"expected variant to be .* got \['paper'\]",
        lambda: conr_loss(X, Y, P, variant=["paper"]),
    ),  # type: ignore[arg-type]
    "label norm": (
        ValueError,
        r"expected label_norm to be 1, 2 or math.inf, got 3",
        lambda: conr_loss(X, Y, P, label_norm=3),
    ),
    "reduction": (
        ValueError,
        r"expected reduction to be 'none', 'mean' or 'sum', got 'avg'",
        lambda: conr_loss(X, Y, P, reduction="avg"),
    ),
    "device": (
        ValueError,
        r"expected preds on the features' device cpu, got meta; move it with preds.to\('cpu'\)",
        lambda: conr_loss(X, Y, P.to("meta")),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^conr_loss: {message}"):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_on_a_gpu_are_read_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets, preds, bad = (tensor.cuda() for tensor in (X, Y, P, NAN))
    assert conr_loss(features, bad, preds).isfinite()
    monkeypatch.setenv("PYREG_CHECKS", "1")
    with pytest.raises(ValueError, match="expected finite numbers in targets, got nan"):
        conr_loss(features, bad, preds)
    with pytest.raises(ValueError, match="expected weights to be at least 0, got -2"):
        conr_loss(features, targets, preds, weights=-2 * W.cuda())

"""StableMax's operators against the reference, theory, torch's own rules, and the ways they are used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import pyreg
from pyreg.functional import log_stablemax, stablemax, stablemax_cross_entropy, stablemax_cross_entropy_
from pyreg.reference import stablemax as reference
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_as_accurate, relative_error

INF = math.inf
GOLDEN = Path(__file__).parent / "golden"

# Class counts around every boundary a kernel has: lanes of a SIMD vector (4 to 16), four vectors, a warp, a chunk of
# 4096 summed elements, primes; rows that are interleaved in memory (inner > 1), in and beyond a tile of 16, a SIMD
# vector, and a block of four.
SHAPES = [
    (3, 1), (4, 2), (7, 11), (1, 16), (5, 17), (2, 31), (3, 32), (9, 63), (2, 65), (33, 113), (3, 257), (2, 1031),
    (2, 4099), (5, 3, 2), (2, 19, 5, 7), (1, 40, 17), (3, 130, 2), (2, 70, 8), (1, 131, 16), (1, 67, 64), (9, 3, 131),
]  # fmt: skip
ids = lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None  # noqa: E731


def logits_like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 4.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)


def labels_like(shape: tuple[int, ...], device: torch.device, ignored: int | None = None) -> Tensor:
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    if ignored is not None:
        labels.view(-1)[::3] = ignored
    return labels.to(device)


def probabilities_like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).softmax(1).to(dtype).to(device)


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and the gradients of the floating inputs, for an uneven cotangent of the result's dtype."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result = function(*leaves)
    cotangent = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).reshape(result.shape)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(result, wanted, cotangent.to(result))
    return [result.detach(), *gradients]


def assert_operator_is_as_accurate(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, floor: float = 4.0
) -> None:
    """Value and gradients: ours, and plain PyTorch in the same dtype, both against plain PyTorch in float64."""
    ours = value_and_gradients(fused, *inputs)
    theirs = value_and_gradients(plain, *inputs)
    truth = value_and_gradients(plain, *(x.double() if x.is_floating_point() else x for x in inputs))
    for actual, same_dtype, exact, input in zip(ours, theirs, truth, [inputs[0], *inputs], strict=False):
        assert actual.dtype == same_dtype.dtype == input.dtype
        assert_as_accurate(actual, same_dtype, exact, floor=floor)


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape takes the path of large logits, whose gradient is formed in the forward pass."""
    monkeypatch.setattr(pyreg.ops.stablemax, "_ONE_PASS_BYTES", 0)
    monkeypatch.setattr(pyreg.ops.stablemax, "_ONE_PASS_CLASSES", 0)


@pytest.fixture(params=["two passes", "one pass"])
def passes(request: pytest.FixtureRequest) -> None:
    """Both ways to the gradient, whatever the shape."""
    if request.param == "one pass":
        request.getfixturevalue("one_pass")


# ---- right in every dtype ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("name", ["stablemax", "log_stablemax"])
def test_rows_against_reference(device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fused, plain = getattr(pyreg.functional, name), getattr(reference, name)
    x = logits_like(shape, dtype, device)
    for dim in {1, -1, 0}:
        assert_operator_is_as_accurate(lambda a, dim=dim: fused(a, dim), lambda a, dim=dim: plain(a, dim), x)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.2, "reduction": "sum"},
]


def with_weight(options: dict[str, Any], classes: int, device: torch.device) -> Callable[[Tensor], dict[str, Any]]:
    weight = torch.linspace(0.5, 2.0, classes, dtype=torch.float64)

    def of(x: Tensor) -> dict[str, Any]:
        return {**options, "weight": weight.to(x)} if options.get("weight") else options

    return of


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_class_indices_against_reference(
    device: torch.device, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, y = logits_like(shape, dtype, device), labels_like(shape, device, ignored=-100)
    y.view(-1)[-1] = 0  # at least one row counts
    of = with_weight(options, shape[1], device)
    assert_operator_is_as_accurate(
        lambda a: stablemax_cross_entropy(a, y, **of(a)), lambda a: reference.stablemax_cross_entropy(a, y, **of(a)), x
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_probabilities_against_reference(
    device: torch.device, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, q = logits_like(shape, dtype, device), probabilities_like(shape, dtype, device)
    of = with_weight(options, shape[1], device)
    assert_operator_is_as_accurate(
        lambda a, b: stablemax_cross_entropy(a, b, **of(a)),
        lambda a, b: reference.stablemax_cross_entropy(a, b, **of(a)),
        x,
        q,
    )


def test_float32_loss_is_within_1e_6(device: torch.device) -> None:
    for shape in [(64, 113), (16, 1000), (4, 5003)]:
        x, y = logits_like(shape, torch.float32, device), labels_like(shape, device)
        loss = stablemax_cross_entropy(x, y)
        assert relative_error(loss, reference.stablemax_cross_entropy(x.double(), y)) < 1e-6


@pytest.mark.large
@pytest.mark.parametrize("shape", [(3, 262_144), (1_000_003, 2), (70_001, 12), (37, 32_000)], ids=ids)
def test_large_shapes(device: torch.device, shape: tuple[int, ...]) -> None:
    x, y = logits_like(shape, torch.float32, device), labels_like(shape, device)
    assert_operator_is_as_accurate(
        lambda a: stablemax_cross_entropy(a, y), lambda a: reference.stablemax_cross_entropy(a, y), x
    )


# ---- a second truth, with different algebra ----


def test_against_log_softmax_of_the_signed_logarithm(device: torch.device) -> None:
    """stablemax(x) = softmax(sign(x) log1p |x|), in float64."""
    x, y = logits_like((40, 57), torch.float64, device), labels_like((40, 57), device)
    z = lambda a: a.sign() * a.abs().log1p()  # noqa: E731
    torch.testing.assert_close(stablemax(x), z(x).softmax(-1), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(log_stablemax(x), z(x).log_softmax(-1), rtol=1e-13, atol=1e-13)
    ours = value_and_gradients(lambda a: stablemax_cross_entropy(a, y, label_smoothing=0.1), x)
    truth = value_and_gradients(lambda a: F.cross_entropy(z(a), y, label_smoothing=0.1), x)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-15)  # some 50 roundings of 1e-16, cancellation 1e2


@pytest.mark.parametrize("index", range(3))
def test_golden_files_of_the_released_code(device: torch.device, index: int) -> None:
    golden = np.load(GOLDEN / f"stablemax_{index}.npz")
    x = torch.from_numpy(golden["logits"]).to(device)
    y = torch.from_numpy(golden["labels"]).to(device)
    leaf = x.clone().requires_grad_()
    loss = stablemax_cross_entropy(leaf, y)
    loss.backward()
    # The released code adds 1e-30 in denominators and sums in another order: fp64 roundings only.
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(log_stablemax(x).cpu().numpy(), golden["log_stablemax"], **close)
    torch.testing.assert_close(loss.item(), golden["loss"].item(), **close)
    torch.testing.assert_close(leaf.grad.cpu().numpy(), golden["grad_logits"], **close)


# ---- numerics that the plain form loses ----


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [2, 5, 8, 12, 20])
def test_gradient_at_a_dominant_target(device: torch.device, dtype: torch.dtype, exponent: int) -> None:
    """Closed form: one logit z, 112 zeros (R): dL/dz = -R / (S (1 + z)), dL/dx_j = 1 / S, L = log1p(R / (1 + z))."""
    z, others = 10.0**exponent, 112
    x = torch.zeros(1, others + 1, dtype=dtype, device=device)
    x[0, 5] = z
    loss, gradient = value_and_gradients(lambda a: stablemax_cross_entropy(a, torch.tensor([5], device=device)), x)
    total = 1 + z + others
    gradient = gradient / 0.5  # value_and_gradients' cotangent of a scalar
    assert loss.item() == pytest.approx(math.log1p(others / (1 + z)), rel=4 * ROUNDOFF[dtype], abs=0)
    assert gradient[0, 5].item() == pytest.approx(-others / (total * (1 + z)), rel=8 * ROUNDOFF[dtype], abs=0)
    assert gradient[0, 0].item() == pytest.approx(1 / total, rel=8 * ROUNDOFF[dtype], abs=0)


def test_one_hot_probabilities_equal_class_indices_at_a_dominant_target(device: torch.device) -> None:
    x = torch.zeros(2, 50, device=device)
    x[0, 7], x[1, 0] = 1e12, 3e5
    y = torch.tensor([7, 0], device=device)
    one_hot = F.one_hot(y, 50).float()
    by_index = value_and_gradients(lambda a: stablemax_cross_entropy(a, y), x)
    by_mass = value_and_gradients(lambda a: stablemax_cross_entropy(a, one_hot), x)
    torch.testing.assert_close(by_mass, by_index, rtol=1e-6, atol=0)


def test_log_probability_of_a_dominant_class(device: torch.device) -> None:
    x = torch.zeros(3, 1001, device=device)
    x[0, 1000], x[1, 3], x[2, 500] = 1e12, 1e7, 2.0
    result = log_stablemax(x)
    expected = -torch.log1p(1000 / (1 + torch.tensor([1e12, 1e7, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(
        result[[0, 1, 2], [1000, 3, 500]].double().cpu(), expected, rtol=3 * ROUNDOFF[torch.float32], atol=0
    )
    # 1 - p is kept too: d log p_j / dx_j = (1 - p_j) / (1 + x_j)
    leaf = x.clone().requires_grad_()
    log_stablemax(leaf)[0, 1000].backward()
    assert leaf.grad[0, 1000].item() == pytest.approx(1000 / 1e24, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_beyond_the_largest_number(device: torch.device, dtype: torch.dtype) -> None:
    """Finite logits whose row sum overflows the dtype."""
    largest = torch.finfo(dtype).max
    x = torch.full((2, 300), largest / 2, dtype=dtype, device=device)
    x[1, 0] = -largest
    y = torch.tensor([3, 0], device=device)
    torch.testing.assert_close(stablemax(x)[0], torch.full_like(x[0], 1 / 300), rtol=1e-6, atol=0)
    losses = stablemax_cross_entropy(x, y, reduction="none").double().cpu()
    log_largest = math.log(largest)
    expected = torch.tensor([math.log(300), math.log(299) + 2 * log_largest - math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_stablemax(x)[0], torch.full_like(x[0], -math.log(300)), rtol=1e-6, atol=0)
    assert value_and_gradients(lambda a: stablemax_cross_entropy(a, y), x)[1].isfinite().all()
    assert value_and_gradients(log_stablemax, x)[1].isfinite().all()


@pytest.mark.usefixtures("passes")
def test_sums_below_the_smallest_number(device: torch.device) -> None:
    """Every logit far below zero: s'(x) alone underflows, s'(x) / S does not."""
    x = torch.full((1, 10), -1e25, device=device)
    y = torch.tensor([4], device=device)
    loss, gradient = value_and_gradients(lambda a: stablemax_cross_entropy(a, y, reduction="sum"), x)
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)
    expected = torch.full((1, 10), 0.5 * 1e-26, dtype=torch.float64)  # h / 10, times the cotangent 0.5
    expected[0, 4] = -0.5 * 9e-26
    torch.testing.assert_close(gradient.double().cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_special_points(device: torch.device, dtype: torch.dtype) -> None:
    """0 and 1 (where the released code's fp32 gradient is NaN), both zeros, and the smallest numbers."""
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, 2.0, torch.finfo(dtype).tiny]], dtype=dtype, device=device)
    y = torch.tensor([2], device=device)
    assert_operator_is_as_accurate(
        lambda a: stablemax_cross_entropy(a, y), lambda a: reference.stablemax_cross_entropy(a, y), x
    )
    assert_operator_is_as_accurate(stablemax, reference.stablemax, x)
    assert_operator_is_as_accurate(log_stablemax, reference.log_stablemax, x)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("classes", [5, 70, 1200])
def test_masked_classes(device: torch.device, classes: int) -> None:
    """-inf logits have share 0 and gradient 0, and leave the rest as if they were not there."""
    x = logits_like((4, classes), torch.float32, device)
    masked = torch.arange(classes, device=device) % 3 == 1
    hidden = x.masked_fill(masked, -INF)
    y = torch.tensor([0, 2, 3, 0], device=device)
    kept = (~masked).nonzero().squeeze(1)
    position = torch.stack([(kept == label).nonzero()[0, 0] for label in y])
    for options in ({}, {"reduction": "none"}):
        loss, gradient = value_and_gradients(lambda a, o=options: stablemax_cross_entropy(a, y, **o), hidden)
        bare = value_and_gradients(lambda a, o=options: stablemax_cross_entropy(a, position, **o), x[:, kept])
        torch.testing.assert_close([loss, gradient[:, kept]], bare, rtol=1e-6, atol=1e-9)
        assert (gradient[:, masked] == 0).all()
    share, gradient = value_and_gradients(stablemax, hidden)
    assert (share[:, masked] == 0).all()
    assert (gradient[:, masked] == 0).all()
    log_share = log_stablemax(hidden)
    assert (log_share[:, masked] == -INF).all()
    assert log_share[:, kept].isfinite().all()
    # A target that is masked is impossible, as under softmax.
    assert stablemax_cross_entropy(hidden, torch.tensor([1] * 4, device=device)).item() == INF
    # All masked: 0 / 0, as torch.softmax.
    assert stablemax(torch.full((1, classes), -INF, device=device)).isnan().all()


@pytest.mark.parametrize("classes", [3, 40, 1200])
@pytest.mark.parametrize("special", [math.nan, INF])
def test_nan_and_infinity_spread_to_their_row_alone(device: torch.device, classes: int, special: float) -> None:
    x = logits_like((3, classes), torch.float32, device)
    x[1, classes // 2] = special
    y = torch.zeros(3, dtype=torch.long, device=device)
    losses = stablemax_cross_entropy(x, y, reduction="none")
    assert losses.isnan().tolist() == F.cross_entropy(x, y, reduction="none").isnan().tolist() == [False, True, False]
    expected = reference.stablemax_cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(losses[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-6)
    gradient = value_and_gradients(lambda a: stablemax_cross_entropy(a, y, reduction="none"), x)[1]
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[1].isnan().any()
    for function in (stablemax, log_stablemax):
        result = function(x)
        assert result[[0, 2]].isfinite().all()
        assert result[1].isnan().any()


# ---- shapes, strides and torch's own rules ----


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_side_by_side_equal_rows_apart(device: torch.device, dtype: torch.dtype, smoothing: float) -> None:
    """Every edge in one call, in neighbouring lanes: none disturbs the others."""
    rows = logits_like((21, 75), dtype, device)
    labels = labels_like((21, 75), device, ignored=-100)
    rows[1, labels[1]] = 1e12  # a dominant target
    rows[2] = torch.finfo(dtype).max / 4  # a sum beyond the largest number
    rows[4] = -1e30
    rows[5, 10:] = -INF
    labels[5] = 3
    rows[7, 5] = math.nan
    rows[8, 5] = INF
    rows[9] = math.nan  # in an ignored row
    rows[18] = INF
    assert (labels[[9, 18]] == -100).all()

    def apart(x: Tensor) -> Tensor:
        return stablemax_cross_entropy(x, labels, reduction="none", label_smoothing=smoothing)

    def side_by_side(x: Tensor) -> Tensor:
        flat = x.t().unsqueeze(0).contiguous()
        loss = stablemax_cross_entropy(flat, labels.unsqueeze(0), reduction="none", label_smoothing=smoothing)
        return loss.squeeze(0)

    # Both sum 75 terms in float64 or in partial sums of float32: a few roundings apart. Under label smoothing the loss
    # is a difference of logarithms of up to 100 times its size, the gradient one of terms up to 0.1 / 75.
    roundings, spread = (64, 16 * smoothing / 75) if smoothing > 0 else (16, 0)
    rtol, atol = roundings * ROUNDOFF[dtype], spread * ROUNDOFF[dtype]
    for ours, expected in zip(value_and_gradients(side_by_side, rows), value_and_gradients(apart, rows), strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unbatched(device: torch.device, reduction: str) -> None:
    x = logits_like((1, 9), torch.float64, device)[0]
    y = torch.tensor(4, device=device)
    for target in (y, torch.rand(9, dtype=torch.float64, device=device).softmax(0)):
        ours = value_and_gradients(lambda a, t=target: stablemax_cross_entropy(a, t, reduction=reduction), x)
        plain = value_and_gradients(lambda a, t=target: reference.stablemax_cross_entropy(a, t, reduction=reduction), x)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_every_combination_of_options(
    device: torch.device, reduction: str, smoothing: float, weighted: bool, ignored: str
) -> None:
    shape = (6, 7, 3)
    x, y = logits_like(shape, torch.float64, device), labels_like(shape, device)
    y = {"none": y, "some": y.masked_fill(y % 2 == 0, 5), "all": torch.full_like(y, 5)}[ignored]
    options = {
        "weight": torch.linspace(0.0, 2.0, 7, dtype=torch.float64, device=device) if weighted else None,
        "ignore_index": -100 if ignored == "none" else 5,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    ours = value_and_gradients(lambda a: stablemax_cross_entropy(a, y, **options), x)
    plain = value_and_gradients(lambda a: reference.stablemax_cross_entropy(a, y, **options), x)
    if ignored == "all" and reduction == "mean":  # a mean over nothing: NaN, as F.cross_entropy
        assert ours[0].isnan()
        assert F.cross_entropy(x, y, ignore_index=5).isnan()
        return
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize(
    "shape", [(0, 5), (0, 5, 3), (2, 5, 0), (2, 5, 0, 4), (0, 5, 0, 2), (2, 0, 0), (0, 0), (0, 0, 8)], ids=ids
)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    y = torch.zeros((shape[0], *shape[2:]), dtype=torch.long, device=device)
    for reduction in ("mean", "sum", "none"):
        loss = stablemax_cross_entropy(x, y, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(x, y, reduction=reduction), equal_nan=True)
        loss.sum().backward()
        assert x.grad.shape == shape
    assert stablemax(x, 1).shape == shape
    assert log_stablemax(x, 0).shape == shape


def test_ignored_rows_have_no_gradient_whatever_they_hold(device: torch.device) -> None:
    x = logits_like((4, 6), torch.float64, device)
    x[1], x[2] = math.nan, -INF
    y = torch.tensor([0, -100, -100, 3], device=device)
    for target in (y, torch.full_like(y, -100)):
        gradients = []
        for create_graph in (False, True):
            leaf = x.clone().requires_grad_()
            loss = stablemax_cross_entropy(leaf, target)
            gradients.append(torch.autograd.grad(loss, leaf, create_graph=create_graph)[0].detach())
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-15)
        assert (gradients[0][target == -100] == 0).all()
    leaf = x.clone().requires_grad_()
    losses = stablemax_cross_entropy_(leaf * 1, y, reduction="none")
    upstream = torch.tensor([1.0, math.nan, INF, 2.0], dtype=torch.float64, device=device)
    (gradient,) = torch.autograd.grad(losses, leaf, upstream)
    assert (gradient[[1, 2]] == 0).all()
    assert gradient[[0, 3]].isfinite().all()


def test_probabilities_of_another_dtype(device: torch.device) -> None:
    for shape in ((9,), (4, 9), (2, 9, 3)):
        x = logits_like((4, *shape), torch.float32, device)[0]
        q = torch.rand(shape, dtype=torch.float64, device=device)
        torch.testing.assert_close(stablemax_cross_entropy(x, q), stablemax_cross_entropy(x, q.float()))


def test_scalar_input_of_rows(device: torch.device) -> None:
    x = torch.tensor(3.0, device=device)
    assert stablemax(x).item() == torch.softmax(x, -1).item() == 1.0
    assert log_stablemax(x, 0).item() == 0.0


@pytest.mark.usefixtures("passes")
def test_strides(device: torch.device) -> None:
    """Views give what their contiguous copies give, and gradients of the view's shape."""
    base = logits_like((6, 5, 40), torch.float32, device)
    cases = {
        "padded vocabulary": logits_like((30, 40), torch.float32, device)[:, :33],
        "transposed": logits_like((33, 30), torch.float32, device).T,
        "every second": logits_like((30, 66), torch.float32, device)[:, ::2],
        "expanded": logits_like((1, 33), torch.float32, device).expand(30, 33),
        "expanded class": logits_like((30, 1), torch.float32, device).expand(30, 33),
        "classes innermost": base.transpose(1, 2),
        "channels last": logits_like((2, 7, 4, 3), torch.float32, device).contiguous(memory_format=torch.channels_last),
        "offset": logits_like((31, 33), torch.float32, device)[1:],
    }
    for name, x in cases.items():
        y = labels_like(tuple(x.shape), device, ignored=-100)
        for reduction in ("mean", "none"):
            f = lambda a, y=y, r=reduction: stablemax_cross_entropy(a, y, reduction=r)  # noqa: E731
            leaf = x.detach().requires_grad_()
            loss = f(leaf)
            cotangent = torch.linspace(0.5, 1.5, loss.numel(), device=device).reshape(loss.shape)
            gradient = torch.autograd.grad(loss, leaf, cotangent)[0]
            expected = value_and_gradients(f, x.contiguous())
            torch.testing.assert_close([loss.detach(), gradient], expected, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(stablemax(x, 1), stablemax(x.contiguous(), 1))


def test_logits_with_classes_innermost_are_not_copied(device: torch.device) -> None:
    """[N, T, C].transpose(1, 2): the gradient comes back in the logits' own layout."""
    x = logits_like((4, 6, 33), torch.float32, device).requires_grad_()
    stablemax_cross_entropy(x.transpose(1, 2), labels_like((4, 33, 6), device)).backward()
    assert x.grad.is_contiguous()


def test_rows_result_is_the_same_alone_and_in_a_batch(device: torch.device) -> None:
    x, y = logits_like((50, 129), torch.float32, device), labels_like((50, 129), device)
    together = stablemax_cross_entropy(x, y, reduction="none")
    alone = torch.stack([stablemax_cross_entropy(a, b) for a, b in zip(x, y, strict=True)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("shape", [(5107, 113), (64, 4099), (3, 50, 400)], ids=ids)
def test_same_bits_on_every_run_and_number_of_threads(device: torch.device, shape: tuple[int, ...]) -> None:
    x, y = logits_like(shape, torch.float32, device), labels_like(shape, device)
    function = lambda a: stablemax_cross_entropy(a, y, label_smoothing=0.1)  # noqa: E731
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = value_and_gradients(function, x)
        for count in (2, 3):
            torch.set_num_threads(count)
            for _ in range(2):
                for a, b in zip(first, value_and_gradients(function, x), strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


# ---- gradients of every order ----


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_gradcheck(device: torch.device, options: dict[str, Any]) -> None:
    shape = (3, 5, 2)
    x = logits_like(shape, torch.float64, device, scale=1.5).requires_grad_()
    y = labels_like(shape, device)
    y[0, 0] = -100
    q = probabilities_like(shape, torch.float64, device).requires_grad_()
    options = with_weight(options, 5, device)(x)
    indices = lambda a: stablemax_cross_entropy(a, y, **options)  # noqa: E731
    masses = lambda a, b: stablemax_cross_entropy(a, b, **options)  # noqa: E731
    assert torch.autograd.gradcheck(indices, (x,))
    assert torch.autograd.gradgradcheck(indices, (x,))
    assert torch.autograd.gradcheck(masses, (x, q))
    assert torch.autograd.gradgradcheck(masses, (x, q))


@pytest.mark.parametrize("function", [stablemax, log_stablemax])
def test_gradcheck_of_rows(device: torch.device, function: Callable[..., Tensor]) -> None:
    x = logits_like((4, 5), torch.float64, device, scale=1.5).requires_grad_()
    for dim in (0, 1):
        assert torch.autograd.gradcheck(lambda a, dim=dim: function(a, dim), (x,))
        assert torch.autograd.gradgradcheck(lambda a, dim=dim: function(a, dim), (x,))


def test_third_order(device: torch.device) -> None:
    x, y = logits_like((2, 4), torch.float64, device, scale=1.0), labels_like((2, 4), device)

    def third(loss_of: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss_of(leaf, y), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf, create_graph=True)
        return torch.autograd.grad(second.sum(), leaf)[0]

    torch.testing.assert_close(third(stablemax_cross_entropy), third(reference.stablemax_cross_entropy))


def test_gradient_only_where_it_is_asked_for(device: torch.device) -> None:
    x = logits_like((3, 4), torch.float32, device)
    q = probabilities_like((3, 4), torch.float32, device).requires_grad_()
    stablemax_cross_entropy(x, q).backward()
    assert x.grad is None
    assert q.grad.shape == (3, 4)
    assert not stablemax_cross_entropy(x, q.detach()).requires_grad


# ---- the gradient formed in the forward pass ----


@pytest.mark.usefixtures("one_pass")
def test_one_pass_gradient_is_asked_for_again(device: torch.device) -> None:
    """A second backward pass, another upstream gradient, create_graph, and logits changed in between."""
    x, y = logits_like((6, 40), torch.float64, device), labels_like((6, 40), device)
    expected = torch.func.grad(lambda a: reference.stablemax_cross_entropy(a, y))(x)
    leaf = x.clone().requires_grad_()
    loss = stablemax_cross_entropy(leaf, y)
    assert "OnePass" in type(loss.grad_fn).__name__
    for factor in (1.0, 1.0, -3.0):
        upstream = torch.tensor(factor, dtype=torch.float64, device=device)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)
        gradient.zero_()  # belongs to the caller
    (scaled,) = torch.autograd.grad(stablemax_cross_entropy(leaf, y) * 5, leaf)
    torch.testing.assert_close(scaled, 5 * expected)
    upstreams = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device)
    loss = stablemax_cross_entropy(leaf, y)
    (batched,) = torch.autograd.grad(loss, leaf, upstreams, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, 2 * expected]))
    small = x[:2, :5].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: stablemax_cross_entropy(a, y[:2] % 5), (small,))
    logits = leaf * 1
    loss = stablemax_cross_entropy(logits, y)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("loss_of", [stablemax_cross_entropy, lambda a, y: stablemax_cross_entropy_(a * 1, y)])
def test_float16_gradients_wait_for_the_loss_scale(device: torch.device, loss_of: Callable[..., Tensor]) -> None:
    """Half of these gradients are below the smallest float16 until they are multiplied by the scale."""
    scale = 2.0**14
    x, y = logits_like((8, 3000), torch.float16, device, scale=300.0).requires_grad_(), labels_like((8, 3000), device)
    (loss_of(x, y).float() * scale).backward()
    exact = x.detach().double().requires_grad_()
    (reference.stablemax_cross_entropy(exact, y) * scale).backward()
    assert ((exact.grad / scale).half() == 0).double().mean() > 0.4
    assert relative_error(x.grad, exact.grad) < 4 * ROUNDOFF[torch.float16]
    lifted = exact.grad.abs() > 2 * torch.finfo(torch.float16).smallest_normal
    assert lifted.double().mean() > 0.4
    torch.testing.assert_close(x.grad[lifted].double(), exact.grad[lifted], rtol=4 * ROUNDOFF[torch.float16], atol=0)


@pytest.mark.large
def test_large_logits_take_one_pass(device: torch.device) -> None:
    x, y = torch.randn(64, 32_768, device=device, requires_grad=True), torch.randint(32_768, (64,), device=device)
    assert "OnePass" in type(stablemax_cross_entropy(x, y).grad_fn).__name__
    assert "OnePass" not in type(stablemax_cross_entropy(x[:8], y[:8]).grad_fn).__name__
    with torch.no_grad():
        assert not stablemax_cross_entropy(x, y).requires_grad


# ---- in place ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(7, 11), (33, 113), (2, 4099), (2, 19, 5, 7), (1, 3), (3, 1)], ids=ids)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_in_place_equals_out_of_place(
    device: torch.device, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, y = logits_like(shape, dtype, device), labels_like(shape, device, ignored=-100)
    y.view(-1)[-1] = 0
    of = with_weight(options, shape[1], device)
    out_of_place = value_and_gradients(lambda a: stablemax_cross_entropy(a * 1, y, **of(a)), x)
    in_place = value_and_gradients(lambda a: stablemax_cross_entropy_(a * 1, y, **of(a)), x)
    # A gradient that is formed before the upstream gradient is known is rounded once more.
    assert relative_error(in_place[0], out_of_place[0]) <= 4 * ROUNDOFF[dtype]
    assert relative_error(in_place[1], out_of_place[1]) <= 4 * ROUNDOFF[dtype]


def test_in_place_takes_the_logits_memory(device: torch.device) -> None:
    leaf, y = logits_like((8, 30), torch.float32, device).requires_grad_(), labels_like((8, 30), device)
    logits = leaf * 1
    loss = stablemax_cross_entropy_(logits, y)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    expected = torch.autograd.grad(stablemax_cross_entropy(leaf, y), leaf)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_in_place_misuse_is_an_error(device: torch.device) -> None:
    leaf, y = logits_like((8, 30), torch.float32, device).requires_grad_(), labels_like((8, 30), device)
    with pytest.raises(RuntimeError, match="leaf"):
        stablemax_cross_entropy_(leaf, y)
    for view in (leaf.view(30, 8).view(8, 30), leaf[:8]):
        with pytest.raises(RuntimeError, match="a leaf that requires grad, or a view of one"):
            stablemax_cross_entropy_(view, y)
    for change in (lambda z: z.detach().zero_(), lambda z: stablemax_cross_entropy_(z, y)):
        logits = leaf * 1
        loss = stablemax_cross_entropy_(logits, y)
        change(logits)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation since"):
            loss.backward()
    logits = leaf * 1
    loss = stablemax_cross_entropy_(logits, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="stablemax_cross_entropy_: its gradient can be asked for once"):
        loss.backward()
    logits = leaf * 1
    with pytest.raises(RuntimeError, match="asked for once and to first order"):
        torch.autograd.grad(stablemax_cross_entropy_(logits, y), leaf, create_graph=True)
    hidden = leaf.exp()  # saves its result for its own backward pass
    loss = stablemax_cross_entropy_(hidden, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"stablemax_cross_entropy_: expected a contiguous input"):
        stablemax_cross_entropy_((leaf * 1)[:, ::2], y % 15)
    with pytest.raises(ValueError, match="expected class indices"):
        stablemax_cross_entropy_(leaf * 1, torch.rand(8, 30, device=device))


def test_in_place_without_gradient_leaves_the_logits(device: torch.device) -> None:
    x, y = logits_like((8, 30), torch.float32, device), labels_like((8, 30), device)
    before = x.clone()
    loss = stablemax_cross_entropy_(x, y)
    assert torch.equal(x, before)
    assert loss == stablemax_cross_entropy(x, y)


@pytest.mark.usefixtures("passes")
def test_inputs_are_not_written(device: torch.device) -> None:
    x, y = logits_like((9, 33), torch.float32, device), labels_like((9, 33), device)
    weight = torch.rand(33, device=device)
    copies = [t.clone() for t in (x, y, weight)]
    value_and_gradients(lambda a: stablemax_cross_entropy(a, y, weight, label_smoothing=0.1), x)
    for now, before in zip((x, y, weight), copies, strict=True):
        assert torch.equal(now, before)


# ---- a citizen of torch ----


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: torch.device, requires_grad: bool) -> None:
    operators = torch.ops.pyreg
    x = logits_like((6, 9), torch.float32, device)
    leaf = x.clone().requires_grad_(requires_grad)
    y, weight = labels_like((6, 9), device), torch.rand(9, device=device)
    q = probabilities_like((6, 9), torch.float32, device)
    for name in ("stablemax", "log_stablemax"):
        opcheck(getattr(operators, name).default, (leaf, 1, torch.float32))
        opcheck(getattr(operators, f"{name}_backward").default, (torch.ones_like(x), x, 1))
    for target, reduction in itertools.product((y, q), (0, 1, 2)):
        arguments = (target, weight, reduction, -100, 0.1)
        opcheck(operators.stablemax_cross_entropy.default, (leaf, *arguments, torch.float32))
        loss, saved = operators.stablemax_cross_entropy(x, *arguments, torch.float32)
        backward = (torch.ones_like(loss), x, target, weight, saved, *arguments[2:])
        opcheck(operators.stablemax_cross_entropy_backward.default, backward)
    opcheck(operators.stablemax_cross_entropy_with_gradient.default, (x, y, weight, 1, -100, 0.1, torch.float32))
    opcheck(operators.stablemax_cross_entropy_.default, (x.clone(), y, None, 1, -100, 0.0, torch.float32))


@pytest.mark.needs_compiler
@pytest.mark.cpu_only
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities", "transposed", "in place", "rows"])
def test_compile(device: torch.device, kind: str, dynamic: bool) -> None:
    weight = torch.randn(5, 9, requires_grad=True)

    def step(weight: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
        logits = inputs @ weight
        if kind == "rows":
            return (stablemax(logits) * log_stablemax(logits)).sum()
        if kind == "transposed":
            return stablemax_cross_entropy(logits.unflatten(0, (2, -1)).transpose(1, 2), target.unflatten(0, (2, -1)))
        loss_of = stablemax_cross_entropy_ if kind == "in place" else stablemax_cross_entropy
        return loss_of(logits, target, label_smoothing=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (6, 10) if dynamic else (6,):
        inputs = torch.randn(rows, 5)
        target = torch.rand(rows, 9).softmax(1) if kind == "probabilities" else torch.randint(9, (rows,))
        if kind != "probabilities":
            target[0] = -100
        ours = torch.autograd.grad(loss := compiled(weight, inputs, target), weight)
        plain = torch.autograd.grad(expected := step(weight, inputs, target), weight)
        torch.testing.assert_close([loss, *ours], [expected, *plain])


@pytest.mark.cpu_only
def test_export(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(5, 9)
            self.loss = pyreg.nn.StableMaxCrossEntropyLoss(label_smoothing=0.1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.linear(x), y)

    model, inputs = Model(), (torch.randn(6, 5), torch.randint(9, (6,)))
    exported = torch.export.export(model, inputs)
    assert "pyreg.stablemax_cross_entropy.default" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_a_float32_loss_from_16_bit_logits(device: torch.device, dtype: torch.dtype) -> None:
    x, y = logits_like((20, 50), dtype, device).requires_grad_(), labels_like((20, 50), device)
    with torch.autocast(device.type, dtype=dtype):
        loss = stablemax_cross_entropy(x, y)
        assert loss.dtype == F.cross_entropy(x, y).dtype == torch.float32
        assert stablemax(x).dtype == torch.softmax(x, -1).dtype
    loss.backward()
    assert x.grad.dtype == dtype
    exact = reference.stablemax_cross_entropy(x.double(), y)
    assert relative_error(loss, exact) < 4 * ROUNDOFF[torch.float32]


def test_dtype_argument(device: torch.device) -> None:
    x = logits_like((5, 33), torch.bfloat16, device)
    for function, plain in ((stablemax, reference.stablemax), (log_stablemax, reference.log_stablemax)):
        for dtype in (torch.float32, torch.float64):
            ours = value_and_gradients(lambda a, d=dtype, f=function: f(a, -1, d), x)
            expected = value_and_gradients(lambda a, d=dtype, f=plain: f(a, -1, torch.float64).to(d), x)
            assert ours[0].dtype == dtype
            assert ours[1].dtype == torch.bfloat16
            assert relative_error(ours[0], expected[0]) < 4 * ROUNDOFF[torch.float32]
            assert relative_error(ours[1], expected[1]) < 2 * ROUNDOFF[torch.bfloat16]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_vmap(device: torch.device, options: dict[str, Any]) -> None:
    x, q = logits_like((4, 6, 9), torch.float64, device), torch.rand(4, 6, 9, dtype=torch.float64, device=device)
    y = torch.randint(9, (4, 6), device=device)
    y[0, 0] = -100
    options = with_weight(options, 9, device)(x)
    loss_of = lambda a, t: stablemax_cross_entropy(a, t, **options)  # noqa: E731
    summed = lambda a, t: loss_of(a, t).sum()  # noqa: E731
    for target in (y, q.softmax(-1)):
        one_by_one = torch.stack([loss_of(a, t) for a, t in zip(x, target, strict=True)])
        gradients = torch.stack([torch.func.grad(summed)(a, t) for a, t in zip(x, target, strict=True)])
        mapped = torch.func.vmap(loss_of)(x, target)
        torch.testing.assert_close(mapped, one_by_one, rtol=1e-12, atol=1e-14)
        middle = torch.func.vmap(loss_of, (1, 1))(x.transpose(0, 1), target.transpose(0, 1))
        torch.testing.assert_close(middle, one_by_one, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(summed))(x, target), gradients)
        leaf = x.clone().requires_grad_()
        torch.func.vmap(loss_of)(leaf, target).sum().backward()
        torch.testing.assert_close(leaf.grad, gradients)
    shared = torch.func.vmap(loss_of, (0, None))(x, y[1])
    torch.testing.assert_close(shared, torch.stack([loss_of(a, y[1]) for a in x]))


def test_vmap_of_rows_and_batched_gradients(device: torch.device) -> None:
    x = logits_like((4, 6, 9), torch.float64, device)
    for function in (stablemax, log_stablemax):
        torch.testing.assert_close(torch.func.vmap(lambda a, f=function: f(a, 0))(x), function(x, 1))
        leaf = x[0].clone().requires_grad_()
        out = function(leaf, 1)
        basis = torch.randn(3, *out.shape, dtype=torch.float64, device=device)
        batched = torch.autograd.grad(out, leaf, basis, is_grads_batched=True, retain_graph=True)[0]
        single = torch.stack([torch.autograd.grad(out, leaf, v, retain_graph=True)[0] for v in basis])
        torch.testing.assert_close(batched, single)
    leaf, y = x[0].clone().requires_grad_(), torch.randint(9, (6,), device=device)
    losses = stablemax_cross_entropy(leaf, y, reduction="none")
    identity = torch.eye(6, dtype=torch.float64, device=device)
    (jacobian,) = torch.autograd.grad(losses, leaf, identity, is_grads_batched=True)
    gradient = torch.func.grad(lambda a: stablemax_cross_entropy(a, y, reduction="sum"))(x[0])
    torch.testing.assert_close(jacobian.diagonal(0, 0, 1).T, gradient, rtol=1e-12, atol=1e-14)
    weights = torch.rand(4, 9, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="vmap over weight is not supported"):
        torch.func.vmap(lambda w: stablemax_cross_entropy(x[0], y, w))(weights)


def test_module(device: torch.device) -> None:
    weight = torch.rand(9, device=device)
    module = pyreg.nn.StableMaxCrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.2)
    x, y = logits_like((20, 9), torch.float32, device), labels_like((20, 9), device)
    expected = reference.stablemax_cross_entropy(x, y, weight, 2, "sum", 0.2)
    torch.testing.assert_close(module(x, y), expected)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert list(module.state_dict()) == list(torch.nn.CrossEntropyLoss(weight).state_dict())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_cuda_graph() -> None:
    x = torch.randn(64, 1000, device="cuda", requires_grad=True)
    y = torch.randint(1000, (64,), device="cuda")
    expected = value_and_gradients(lambda a: stablemax_cross_entropy(a, y), x)
    step = torch.cuda.make_graphed_callables(lambda a: stablemax_cross_entropy(a, y), (x,))
    loss = step(x)
    loss.backward()
    torch.testing.assert_close([loss.detach(), x.grad], [expected[0], expected[1] / 0.5])


@needs_gpu
def test_no_wait_for_the_gpu() -> None:
    x = torch.randn(64, 1000, device="cuda", requires_grad=True)
    y, q = torch.randint(1000, (64,), device="cuda"), torch.rand(64, 1000, device="cuda")
    weight = torch.rand(1000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for target in (y, q):
            stablemax_cross_entropy(x, target, weight, label_smoothing=0.1).backward()
        stablemax_cross_entropy_(x * 1, y).backward()
        (stablemax(x) * log_stablemax(x)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()


# ---- bad input ----


def bad_calls(device: torch.device) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    x = torch.randn(4, 7, device=device)
    y = torch.tensor([0, 1, 2, 3], device=device)
    ce = stablemax_cross_entropy
    return {
        "no tensor": (lambda: ce([1.0], y), TypeError, "expected input to be a tensor, got list"),
        "no target": (lambda: ce(x, 3), TypeError, "expected target to be a tensor, got int"),
        "integer logits": (lambda: ce(x.long(), y), TypeError, "expected input to be float64, .* got torch.int64"),
        "complex logits": (lambda: ce(x.cfloat(), y), TypeError, "got torch.complex64"),
        "0-d logits": (lambda: ce(x.sum(), y), ValueError, r"expected input of shape \[C\], \[N, C\]"),
        "too few labels": (lambda: ce(x, y[:3]), ValueError, r"expected target of shape \[4\] .*got \[3\]"),
        "labels as a column": (lambda: ce(x, y[:, None]), ValueError, r"expected target of shape \[4\] .*got \[4, 1\]"),
        "float labels": (lambda: ce(x, y.float()), TypeError, r"class indices of dtype int64.*target.long\(\)"),
        "int32 labels": (lambda: ce(x, y.int()), TypeError, "int64, got torch.int32"),
        "integer probabilities": (lambda: ce(x, x.long()), TypeError, "holds probabilities: expected a floating dtype"),
        "ignore_index": (lambda: ce(x, x.softmax(1), ignore_index=1), ValueError, "ignore_index is for class indices"),
        "weight shape": (lambda: ce(x, y, x[0, :6]), ValueError, r"expected weight of shape \[C\] = \[7\], got \[6\]"),
        "weight dtype": (lambda: ce(x, y, y[:1]), TypeError, "expected weight to be float64"),
        "weight gradient": (
            lambda: ce(x, y, torch.rand(7, device=device, requires_grad=True)), ValueError, "weight has no gradient"),
        "reduction": (lambda: ce(x, y, reduction="avg"), ValueError, "'none', 'mean' or 'sum', got 'avg'"),
        "smoothing": (lambda: ce(x, y, label_smoothing=1.5), ValueError, r"label_smoothing in \[0, 1\], got 1.5"),
        "smoothing NaN": (lambda: ce(x, y, label_smoothing=math.nan), ValueError, "label_smoothing"),
        "no class": (lambda: ce(x[:, :0], y), ValueError, "at least one class"),
        "no class, probabilities": (lambda: ce(x[:, :0], x[:, :0]), ValueError, "at least one class"),
        "no class, unbatched": (lambda: ce(x[0, :0], x[0, :0]), ValueError, "at least one class"),
        "dim": (lambda: stablemax(x, 2), IndexError, r"expected dim in \[-2, 1\] .* got 2"),
        "rows of integers": (lambda: log_stablemax(y), TypeError, "log_stablemax: expected input to be float64"),
        "rows to integers": (lambda: stablemax(x, dtype=torch.int32), TypeError, "expected dtype to be float64"),
        "device": (lambda: ce(x, y.to("meta")), ValueError, "expected target on input's device"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls(torch.device("cpu")))
def test_bad_input(device: torch.device, case: str) -> None:
    call, error, message = bad_calls(device)[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cpu_only
@pytest.mark.parametrize("label", [7, -1, 2**40, -(2**62)])
def test_out_of_range_label_is_an_index_error(device: torch.device, label: int) -> None:
    x = torch.randn(4, 7)
    y = torch.tensor([0, label, 2, 3])
    with pytest.raises(IndexError, match=f"target has class {label}, which is out of bounds for input with 7 classes"):
        stablemax_cross_entropy(x, y)
    logits = x.clone().requires_grad_() * 1
    with pytest.raises(IndexError, match="out of bounds"):
        stablemax_cross_entropy_(logits, y)
    assert torch.equal(logits, x)


@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_direct_backward_with_an_out_of_range_label_reads_nothing_outside(device: torch.device, label: int) -> None:
    """A label that became wrong between forward and backward: its row is zero or NaN, the others are right."""
    x, y = torch.randn(3, 7, device=device), torch.tensor([0, 1, 2], device=device)
    operators = torch.ops.pyreg
    _, saved = operators.stablemax_cross_entropy(x, y, None, 1, -100, 0.0, torch.float32)
    one = torch.ones((), device=device)
    right = operators.stablemax_cross_entropy_backward(one, x, y, None, saved, 1, -100, 0.0)
    y[1] = label
    wrong = operators.stablemax_cross_entropy_backward(one, x, y, None, saved, 1, -100, 0.0)
    assert torch.equal(wrong[[0, 2]], right[[0, 2]])
    assert ((wrong[1] == 0) | wrong[1].isnan()).all()


def test_direct_calls_that_would_read_out_of_bounds(device: torch.device) -> None:
    """The operators themselves refuse what the public functions never pass on."""
    operators, x, y = torch.ops.pyreg, torch.randn(4, 7, device=device), torch.tensor([0, 1, 2, 3], device=device)
    good = (x, y, None, 1, -100, 0.0, torch.float32)
    loss, saved = operators.stablemax_cross_entropy(*good)
    calls = {
        "class indices in target": lambda: operators.stablemax_cross_entropy(x, y[:2], *good[2:]),
        "expected weight": lambda: operators.stablemax_cross_entropy(x, y, x[0, :5], *good[3:]),
        "expected reduction": lambda: operators.stablemax_cross_entropy(x, y, None, 3, *good[4:]),
        "saved is not": lambda: operators.stablemax_cross_entropy_backward(loss, x, y, None, saved[1:], 1, -100, 0.0),
        "one gradient a loss": lambda: operators.stablemax_cross_entropy_backward(x, x, y, None, saved, 1, -100, 0.0),
        "at least one class": lambda: operators.stablemax_cross_entropy(x[:, :0], x[:, :0], *good[2:]),
        "out of range": lambda: operators.stablemax(x, 2, torch.float32),
        "grad_output of input's shape": lambda: operators.stablemax_backward(x[:2], x, 1),
        "expected a contiguous input": lambda: operators.stablemax_cross_entropy_(x[:, ::2], y, *good[2:]),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()

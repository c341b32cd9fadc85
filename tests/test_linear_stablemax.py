"""Linear + StableMax cross-entropy against the composition, theory, and the ways it is used."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import pyreg
from bench.memory import peak_extra_bytes
from pyreg.functional import linear_stablemax_cross_entropy, stablemax_cross_entropy
from pyreg.ops import linear_stablemax as implementation
from pyreg.reference.linear_stablemax import linear_stablemax_cross_entropy as reference
from pyreg.reference.stablemax import stablemax_cross_entropy as stablemax_reference
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_as_accurate

INF = math.inf

# [N, H, C]: one row, one class, one feature; primes; chunks of rows and blocks of classes left incomplete.
SHAPES = [(1, 3, 2), (5, 1, 7), (4, 3, 1), (37, 19, 53), (130, 16, 64), (67, 31, 1030)]
ids = lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None  # noqa: E731
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"bias": False},
    {"bias": False, "reduction": "none"},
    {"label_smoothing": 0.1},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.2, "reduction": "none"},
]


@pytest.fixture(autouse=True)
def _no_small_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' logits are small, and would take the composition."""
    monkeypatch.setattr(implementation, "_SMALL_LOGITS_BYTES", 0)


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows however few the rows are."""
    monkeypatch.setattr(implementation, "_LEAST_CHUNK_BYTES", 0)
    monkeypatch.setattr(implementation, "_MOST_CHUNK_ROWS", 32)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest) -> None:
    if request.param == "many chunks":
        request.getfixturevalue("many_chunks")


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, bias: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias as leaves, and labels of which every third is ignored, but not the last."""
    rows, hidden, classes = shape
    tensors = [torch.randn(rows, hidden), 2 * torch.randn(classes, hidden) / hidden**0.5]
    if bias:
        tensors.append(torch.randn(classes))
    labels = torch.randint(classes, (rows,))
    labels[::3] = -100
    labels[-1] = classes - 1
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors], labels.to(device)


def plain(*tensors: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """The composition; 16-bit logits go on in float32, as torch's own losses do inside."""
    input, linear_weight, *bias = tensors
    if input.dtype.itemsize > 2:
        return reference(input, linear_weight, target, bias[0] if bias else None, weight, **options)
    weight = None if weight is None else weight.float()
    return stablemax_reference(F.linear(*tensors).float(), target, weight, **options).to(input.dtype)


def fused(*tensors: Tensor, target: Tensor, **options: Any) -> Tensor:
    if len(tensors) == 3:
        options["linear_bias"] = tensors[2]
    return linear_stablemax_cross_entropy(*tensors[:2], target, **options)


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss and its gradients, for an uneven cotangent."""
    loss = function(*tensors, **options)
    cotangent = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, cotangent.to(loss))]


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def of_dtype(options: dict[str, Any], classes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if not options.get("weight"):
        return options
    return {**options, "weight": torch.linspace(0.5, 2.0, classes, dtype=torch.float64).to(device, dtype)}


# ---- right in every dtype ----


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_against_reference(
    device: torch.device, options: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    options = dict(options)
    tensors, target = operands(shape, dtype, device, options.pop("bias", True))
    ours, theirs = (
        value_and_gradients(f, tensors, target=target, **of_dtype(options, shape[2], dtype, device))
        for f in (fused, plain)
    )
    exact = of_dtype(options, shape[2], dtype, device)
    if "weight" in exact:
        exact = {**exact, "weight": exact["weight"].double()}
    truth = value_and_gradients(plain, in_float64(tensors), target=target, **exact)
    for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
        assert actual.dtype == same_dtype.dtype == dtype
        assert_as_accurate(actual, same_dtype, expected, floor=4)


def test_against_the_derivative_by_hand(device: torch.device) -> None:
    """Another algebra: ``log s(z) = sign(z) log1p(|z|)`` and softmax of it, differentiated by its Jacobian."""
    (x, weight), target = operands((40, 9, 23), torch.float64, device, bias=False)
    loss, grad_x, grad_weight = value_and_gradients(fused, [x, weight], target=target, reduction="sum")
    with torch.no_grad():
        z = x @ weight.t()
        signed = z.sign() * z.abs().log1p()
        counts = target != -100
        one_hot = F.one_hot(target.where(counts, 0), 23) * counts.unsqueeze(1)
        expected = -(signed.log_softmax(1) * one_hot).sum()
        grad_z = (signed.softmax(1) * counts.unsqueeze(1) - one_hot) / (1 + z.abs()) * 0.5  # the cotangent of one loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad_x, grad_z @ weight)
    torch.testing.assert_close(grad_weight, grad_z.t() @ x)


@pytest.mark.usefixtures("chunks")
def test_sum_of_many_chunks_is_rounded_once(device: torch.device) -> None:
    """bfloat16's weight gradient over 4096 rows of equal sign: added up in bfloat16 it would stop growing at 2^8 terms
    of equal size; summed in float32 it is within a rounding of the float64 result."""
    x = torch.full((4096, 1), 1.0, dtype=torch.bfloat16, device=device)
    weight = torch.zeros((3, 1), dtype=torch.bfloat16, device=device, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.int64, device=device)
    linear_stablemax_cross_entropy(x, weight, target, reduction="sum").backward()
    assert weight.grad is not None
    # Equal logits: p = 1/3 each, h = 1.
    expected = 4096 * torch.tensor([[-2 / 3], [1 / 3], [1 / 3]], dtype=torch.float64)
    # The logits' gradients and each chunk's product are rounded to bfloat16.
    torch.testing.assert_close(weight.grad.double().cpu(), expected, rtol=3 * ROUNDOFF[torch.bfloat16], atol=0)


# ---- edges ----


@pytest.mark.parametrize("exponent", [2, 8, 12])
def test_gradient_at_a_dominant_target(device: torch.device, exponent: int) -> None:
    """One logit of 10^exponent against logits of 0: ``dL/dz_y = -R / (S (1 + z_y))``, to float32's rounding."""
    size, classes = 10.0**exponent, 5
    x = torch.tensor([[size, 1.0]], device=device, requires_grad=True)
    weight = torch.zeros((classes, 2), device=device)
    weight[2, 0] = 1
    linear_stablemax_cross_entropy(x, weight, torch.tensor([2], device=device)).backward()
    assert x.grad is not None
    rest = classes - 1
    expected = -rest / ((rest + 1 + size) * (1 + size))
    assert x.grad[0, 0].item() == pytest.approx(expected, rel=8 * ROUNDOFF[torch.float32], abs=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(device: torch.device, reduction: str) -> None:
    tensors, _ = operands((3, 4, 5), torch.float32, device)
    empty = tensors[0].detach()[:0].requires_grad_()
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = fused(empty, *tensors[1:], target=target, reduction=reduction)
    expected = plain(empty, *tensors[1:], target=target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 4)
    assert all(tensor.grad is not None and (tensor.grad == 0).all() for tensor in tensors[1:])


def test_no_features(device: torch.device) -> None:
    """The logits are the bias alone."""
    bias = torch.randn(5, device=device, requires_grad=True)
    target = torch.tensor([0, 4, 2], device=device)
    input, weight = torch.empty(3, 0, device=device), torch.empty(5, 0, device=device)
    loss = linear_stablemax_cross_entropy(input, weight, target, linear_bias=bias)
    expected = stablemax_cross_entropy(bias.expand(3, 5), target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, bias), torch.autograd.grad(expected, bias))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(device: torch.device, reduction: str) -> None:
    tensors, target = operands((40, 4, 5), torch.float32, device)
    target.fill_(-100)
    loss, *gradients = value_and_gradients(fused, tensors, target=target, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_over_rows_without_weight(device: torch.device, smoothing: float, dtype: torch.dtype) -> None:
    """Rows that count, of classes of weight 0: the mean divides by 0, and its gradients do too, as in torch."""
    tensors, target = operands((40, 4, 5), dtype, device)
    target[target != -100] = 3
    weight = torch.ones(5, device=device)
    weight[3] = 0
    loss, *gradients = value_and_gradients(fused, tensors, target=target, weight=weight, label_smoothing=smoothing)
    assert not loss.isfinite()
    counts = target != -100
    assert not gradients[0][counts].isfinite().any()
    assert not any(gradient.isfinite().any() for gradient in gradients[1:])


def test_ignored_rows_take_no_part_whatever_their_upstream_gradient(device: torch.device) -> None:
    tensors, target = operands((10, 4, 5), torch.float32, device)
    upstream = torch.ones(10, device=device)
    expected = torch.autograd.grad(fused(*tensors, target=target, reduction="none"), tensors, upstream)
    upstream[target == -100] = INF
    for wanted in (tensors, tensors[:1]):
        actual = torch.autograd.grad(fused(*tensors, target=target, reduction="none"), wanted, upstream)
        torch.testing.assert_close(actual, expected[: len(wanted)])


@pytest.mark.parametrize("special", [math.nan, INF])
def test_nan_and_infinity_spread_to_their_row_alone(device: torch.device, special: float) -> None:
    tensors, target = operands((20, 4, 5), torch.float32, device)
    target.clamp_(min=0)
    with torch.no_grad():
        tensors[0][7, 2] = special
    loss, grad_input, *_ = value_and_gradients(fused, tensors, target=target, reduction="none")
    spread = torch.zeros(20, dtype=torch.bool, device=device)
    spread[7] = True
    assert torch.equal(loss.isnan(), spread)
    assert torch.equal(grad_input.isnan().any(1), spread)


def test_masked_classes(device: torch.device) -> None:
    """A bias of -inf masks a class: the result is that without it."""
    tensors, target = operands((20, 4, 9), torch.float64, device)
    target.clamp_(max=5)
    target[-1] = 5
    with torch.no_grad():
        tensors[2][6:] = -INF
    loss, *gradients = value_and_gradients(fused, tensors, target=target)
    smaller = [tensors[0], *(tensor.detach()[:6].requires_grad_() for tensor in tensors[1:])]
    expected, *expected_gradients = value_and_gradients(fused, smaller, target=target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients[0], expected_gradients[0])
    for gradient, wanted in zip(gradients[1:], expected_gradients[1:], strict=True):
        torch.testing.assert_close(gradient[:6], wanted)
        assert (gradient[6:] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_small_logits_take_the_composition(
    device: torch.device, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(options)
    tensors, target = operands((24, 4, 5), dtype, device, options.pop("bias", True))
    options = of_dtype(options, 5, dtype, device)
    expected = value_and_gradients(fused, tensors, target=target, **options)
    monkeypatch.setattr(implementation, "_SMALL_LOGITS_BYTES", 1 << 20)
    monkeypatch.delattr(implementation, "_differentiable")
    actual = value_and_gradients(fused, tensors, target=target, **options)
    # 16-bit logits and their gradients are rounded on the way there.
    torch.testing.assert_close(actual, expected, rtol=32 * ROUNDOFF[dtype], atol=8 * ROUNDOFF[dtype])
    if options.get("reduction") == "none":
        deep = fused(tensors[0].view(2, 3, 4, 4), *tensors[1:], target=target.view(2, 3, 4), **options)
        assert torch.equal(deep, actual[0].view(2, 3, 4))


def test_shapes_of_input(device: torch.device) -> None:
    tensors, target = operands((24, 4, 5), torch.float64, device)
    input, *rest = tensors
    expected = fused(*tensors, target=target, reduction="none")
    batched = fused(input.view(2, 3, 4, 4), *rest, target=target.view(2, 3, 4), reduction="none")
    torch.testing.assert_close(batched, expected.view(2, 3, 4))
    single = fused(input[1], *rest, target=target[1], reduction="none")
    assert single.shape == ()
    torch.testing.assert_close(single, expected[1])
    torch.testing.assert_close(fused(input[1], *rest, target=target[1]), expected[1])
    bytes_ = fused(*tensors, target=target.clamp(min=0).to(torch.uint8))
    torch.testing.assert_close(bytes_, fused(*tensors, target=target.clamp(min=0)))


def test_strides(device: torch.device) -> None:
    tensors, target = operands((24, 6, 5), torch.float64, device)
    expected = value_and_gradients(fused, tensors, target=target)
    transposed = [tensors[0].detach().t().contiguous().t(), tensors[1].detach().t().contiguous().t()]
    spread = tensors[2].detach().repeat_interleave(2)[::2]
    strided = [tensor.requires_grad_() for tensor in (*transposed, spread)]
    actual = value_and_gradients(fused, strided, target=target.repeat_interleave(3)[::3])
    torch.testing.assert_close(actual, expected)
    row = tensors[0].detach()[:1]
    expanded, copied = (
        value_and_gradients(fused, [rows.requires_grad_(), *tensors[1:]], target=target)
        for rows in (row.expand(24, 6), row.repeat(24, 1))
    )
    torch.testing.assert_close(expanded, copied)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities(device: torch.device, reduction: str) -> None:
    tensors, _ = operands((12, 4, 5), torch.float64, device)
    target = torch.rand(12, 5, dtype=torch.float64, device=device).softmax(1).requires_grad_()
    loss = fused(*tensors, target=target, reduction=reduction)
    expected = stablemax_cross_entropy(F.linear(*tensors), target, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), (*tensors, target)), torch.autograd.grad(expected.sum(), (*tensors, target))
    )
    deep = fused(tensors[0].view(3, 4, 4), *tensors[1:], target=target.view(3, 4, 5), reduction=reduction)
    torch.testing.assert_close(deep, expected.view(3, 4) if reduction == "none" else expected)


# ---- gradients ----


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_gradcheck(device: torch.device, options: dict[str, Any]) -> None:
    options = dict(options)
    tensors, target = operands((35, 3, 4), torch.float64, device, options.pop("bias", True))
    options = of_dtype(options, 4, torch.float64, device)
    torch.autograd.gradcheck(lambda *t: fused(*t, target=target, **options), tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_gradgradcheck(device: torch.device, options: dict[str, Any]) -> None:
    options = dict(options)
    tensors, target = operands((4, 3, 4), torch.float64, device, options.pop("bias", True))
    options = of_dtype(options, 4, torch.float64, device)
    torch.autograd.gradgradcheck(lambda *t: fused(*t, target=target, **options), tensors)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_only_where_needed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, needed: tuple[int, ...], reduction: str
) -> None:
    tensors, target = operands((70, 6, 8), torch.float64, device)
    expected = value_and_gradients(fused, tensors, target=target, reduction=reduction)[1:]
    products = []
    made = implementation._Gradients.__init__

    def watch(self: Any, *args: Any) -> None:
        made(self, *args)
        products.append([tensor.numel() for tensor in self.as_tuple()])

    monkeypatch.setattr(implementation._Gradients, "__init__", watch)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in needed)
    actual = value_and_gradients(fused, tensors, target=target, reduction=reduction)[1:]
    torch.testing.assert_close(actual, [expected[index] for index in needed])
    for sizes in products:
        assert all(size == 0 for index, size in enumerate(sizes) if index not in needed)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_is_asked_for_again(device: torch.device, reduction: str) -> None:
    tensors, target = operands((40, 6, 8), torch.float64, device)
    loss = fused(*tensors, target=target, reduction=reduction)
    upstream = torch.rand_like(loss)
    first = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(loss, tensors, 2 * upstream, retain_graph=True)
    partly = torch.autograd.grad(loss, tensors[1:2], upstream)
    torch.testing.assert_close(first, tuple(kept))
    torch.testing.assert_close(again, tuple(2 * gradient for gradient in kept))
    torch.testing.assert_close(partly[0], kept[1])


def test_gradients_of_a_batch_of_upstream_gradients(device: torch.device) -> None:
    tensors, target = operands((10, 3, 4), torch.float64, device)
    loss = fused(*tensors, target=target)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    batched = torch.autograd.grad(loss, tensors, scales, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(loss, tensors)
    for many, one in zip(batched, single, strict=True):
        torch.testing.assert_close(many, scales.view(-1, *[1] * one.dim()) * one)


@pytest.mark.parametrize("order", ["first", "second"])
def test_parameters_made_of_one_tensor(device: torch.device, order: str) -> None:
    """A tied embedding, whose input and bias come from the weight: each way to it counts once."""
    (_, embedding), target = operands((20, 4, 7), torch.float64, device, bias=False)
    tokens = torch.randint(7, (20,), device=device)

    def loss(head: Callable[..., Tensor], weight: Tensor) -> Tensor:
        return head(weight[tokens] * weight[0], weight, weight[:, 0], target=target)

    expected, actual, functional = (
        torch.autograd.grad(loss(plain, embedding), embedding, create_graph=True)[0],
        torch.autograd.grad(loss(fused, embedding), embedding, create_graph=True)[0],
        torch.func.grad(lambda weight: loss(fused, weight))(embedding.detach()),
    )
    if order == "first":
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(functional, expected)
    else:
        torch.testing.assert_close(
            *(torch.autograd.grad(gradient.square().sum(), embedding) for gradient in (actual, expected))
        )


def test_input_changed_between_forward_and_backward_is_an_error(device: torch.device) -> None:
    tensors, target = operands((10, 3, 4), torch.float32, device)
    input = tensors[0] * 1
    loss = fused(input, *tensors[1:], target=target)
    input.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("chunks")
def test_float16_gradients_wait_for_the_loss_scale(device: torch.device) -> None:
    """A mean over many rows: without the loss scale its gradients are below the smallest float16."""
    rows, classes, scale = 2048, 100, 2.0**14
    (x, weight), _ = operands((rows, 8, classes), torch.float16, device, bias=False)
    target = torch.randint(classes, (rows,), device=device)
    (scale * fused(x, weight, target=target).float()).backward()
    exact = in_float64([x, weight])
    truth = torch.autograd.grad(scale * plain(*exact, target=target), exact)
    for tensor, expected in zip((x, weight), truth, strict=True):
        assert tensor.grad is not None
        error = (tensor.grad.double() - expected).norm() / expected.norm()
        assert error < 4 * ROUNDOFF[torch.float16]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float16_gradient_of_a_dominant_target_waits_for_the_loss_scale(device: torch.device, reduction: str) -> None:
    """One logit of 10^4: its gradient is 4e-8, below the smallest float16, and times the loss scale 7e-4."""
    size, classes, scale = 1e4, 5, 2.0**14
    x = torch.tensor([[size, 1.0]], dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.zeros((classes, 2), dtype=torch.float16, device=device)
    weight[2, 0] = 1
    loss = linear_stablemax_cross_entropy(x, weight, torch.tensor([2], device=device), reduction=reduction)
    (scale * loss.float()).sum().backward()
    assert x.grad is not None
    rest = classes - 1
    expected = -scale * rest / ((rest + 1 + size) * (1 + size))
    assert x.grad[0, 0].item() == pytest.approx(expected, rel=2 * ROUNDOFF[torch.float16], abs=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_same_bits_on_every_run(device: torch.device, dtype: torch.dtype) -> None:
    tensors, target = operands((300, 32, 200), dtype, device)
    first = value_and_gradients(fused, tensors, target=target)
    for _ in range(3):
        again = value_and_gradients(fused, tensors, target=target)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("many_chunks")
def test_inputs_are_not_written(device: torch.device) -> None:
    tensors, target = operands((70, 6, 8), torch.float32, device)
    before = [tensor.detach().clone() for tensor in (*tensors, target)]
    value_and_gradients(fused, tensors, target=target)
    value_and_gradients(fused, tensors, target=target, reduction="none")
    assert all(torch.equal(tensor, old) for tensor, old in zip((*tensors, target), before, strict=True))


# ---- Triton's kernels ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_tiles(
    triton_device: torch.device, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through the Triton kernels, several chunks of it, also where only the interpreter runs them."""
    monkeypatch.setattr(implementation, "_has_tiles", lambda input: True)
    monkeypatch.setattr(implementation, "_LEAST_TILED_ROWS", 32)
    monkeypatch.setattr(implementation, "_TILED_MULTIPLE", 32)
    options = dict(options)
    tensors, target = operands((70, 24, 45), dtype, triton_device, options.pop("bias", True))
    in_dtype = of_dtype(options, 45, dtype, triton_device)
    if "label_smoothing" not in options:
        monkeypatch.setattr(implementation, "_run_products", None)
    ours = value_and_gradients(fused, tensors, target=target, **in_dtype)
    theirs = value_and_gradients(plain, tensors, target=target, **in_dtype)
    if "weight" in in_dtype:
        in_dtype = {**in_dtype, "weight": in_dtype["weight"].double()}
    truth = value_and_gradients(plain, in_float64(tensors), target=target, **in_dtype)
    for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
        assert actual.dtype == dtype
        assert_as_accurate(actual, same_dtype, expected, floor=4)
    again = value_and_gradients(fused, tensors, target=target, **of_dtype(options, 45, dtype, triton_device))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_tiles_of_one_chunk_sum_in_bfloat16(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_has_tiles", lambda input: True)
    tensors, target = operands((70, 24, 45), torch.bfloat16, triton_device)
    loss = fused(*tensors, target=target)
    assert [gradient.dtype for gradient in loss.grad_fn.gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
    gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors)  # made anew
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    exact = in_float64(tensors)
    truth = torch.autograd.grad(plain(*exact, target=target), exact)
    theirs = torch.autograd.grad(plain(*tensors, target=target), tensors)
    for actual, same_dtype, expected in zip(gradients, theirs, truth, strict=True):
        assert_as_accurate(actual, same_dtype, expected, floor=4)


def test_tiles_make_the_loss_of_an_out_of_range_label_nan(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "_has_tiles", lambda input: True)
    monkeypatch.setattr(implementation._classes, "check_labels", lambda *_: None)
    tensors, target = operands((20, 8, 5), torch.float32, triton_device)
    target[[3, 7]] = torch.tensor([5, -1], device=triton_device)
    loss = fused(*tensors, target=target, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3, 7]
    assert fused(*tensors, target=target).isnan()


# ---- memory ----


@pytest.mark.large
def test_memory_is_a_tenth_of_the_logits(device: torch.device) -> None:
    rows, hidden, classes = 4096, 64, 16384
    (x, weight), _ = operands((rows, hidden, classes), torch.float32, device, bias=False)
    target = torch.randint(classes, (rows,), device=device)
    step = lambda: torch.autograd.grad(linear_stablemax_cross_entropy(x, weight, target), (x, weight))  # noqa: E731
    step()
    gc.collect()
    peak = peak_extra_bytes(step, device.type, 0)  # what torch's allocators hand out
    gradients = x.nbytes + weight.nbytes
    assert peak - gradients <= 0.1 * 4 * rows * classes


@pytest.mark.large
@pytest.mark.cpu_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_of_a_16_bit_head(device: torch.device, reduction: str) -> None:
    """Besides that tenth the weight's gradient in float32, once."""
    rows, hidden, classes = 2048, 256, 16384
    (x, weight), _ = operands((rows, hidden, classes), torch.bfloat16, device, bias=False)
    target = torch.randint(classes, (rows,), device=device)

    def step() -> object:
        return torch.autograd.grad(fused(x, weight, target=target, reduction=reduction).sum(), (x, weight))

    step()
    gc.collect()
    peak = peak_extra_bytes(step, device.type, 0)
    gradients = x.nbytes + weight.nbytes
    assert peak - gradients <= 0.1 * 4 * rows * classes + 4 * weight.numel()


# ---- a citizen of torch ----


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("needs_grad", [[False] * 3, [True] * 3])
def test_opcheck(device: torch.device, reduction: int, needs_grad: list[bool]) -> None:
    tensors, target = operands((20, 4, 5), torch.float32, device)
    if not any(needs_grad):
        tensors = [tensor.detach() for tensor in tensors]
    input, weight, bias = tensors
    dtype = torch.float32
    arguments = (input, weight, target, bias, None, reduction, -100, 0.0, dtype, dtype, needs_grad)
    opcheck(torch.ops.pyreg.linear_stablemax_cross_entropy.default, arguments)
    rows = torch.rand(20, device=device)
    backward = (rows, *(t.detach() for t in (input, weight)), target, bias.detach(), None, -100, 0.1, dtype, [True] * 3)
    opcheck(torch.ops.pyreg.linear_stablemax_cross_entropy_backward.default, backward)


@pytest.mark.needs_compiler
@pytest.mark.cpu_only
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_compile(device: torch.device, options: dict[str, Any], dynamic: bool) -> None:
    torch._dynamo.reset()
    options = dict(options)
    tensors, target = operands((20, 4, 5), torch.float64, device, options.pop("bias", True))
    options = of_dtype(options, 5, torch.float64, device)
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic)
    actual = value_and_gradients(compiled, tensors, target=target, **options)
    torch.testing.assert_close(actual, value_and_gradients(fused, tensors, target=target, **options))


@pytest.mark.cpu_only
def test_export(device: torch.device) -> None:
    loss = pyreg.nn.LinearStableMaxCrossEntropyLoss(4, 7, bias=True)
    x, y = torch.randn(6, 4), torch.randint(7, (6,))
    exported = torch.export.export(loss, (x, y))
    torch.testing.assert_close(exported.module()(x, y), loss(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors(dtype: torch.dtype) -> None:
    (x, weight, bias), target = operands((20, 4, 5), dtype, torch.device("meta"))
    loss = fused(x, weight, bias, target=target)
    assert (loss.shape, loss.dtype, loss.is_meta) == ((), dtype, True)
    loss.backward()
    assert [tensor.grad.shape for tensor in (x, weight, bias)] == [(20, 4), (5, 4), (5,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """The products are made of 16-bit operands; loss and gradients are float32."""
    tensors, target = operands((100, 16, 50), torch.float32, device)
    with torch.autocast(device.type, dtype=dtype):
        ours = value_and_gradients(fused, tensors, target=target)
        theirs = value_and_gradients(plain, tensors, target=target)
    truth = value_and_gradients(plain, in_float64(tensors), target=target)
    for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_as_accurate(actual.to(dtype), same_dtype.to(dtype), expected, floor=4)
    with torch.autocast(device.type, dtype=dtype):  # a layer before has left 16 bits, the head has float32 weights
        mixed = fused(tensors[0].to(dtype), *tensors[1:], target=target)
    torch.testing.assert_close(mixed, ours[0], rtol=8 * ROUNDOFF[dtype], atol=0)
    assert mixed.dtype == torch.float32


def test_functional_transforms(device: torch.device) -> None:
    tensors, target = operands((20, 4, 5), torch.float64, device)
    plain_tensors = tuple(tensor.detach() for tensor in tensors)
    expected = value_and_gradients(fused, tensors, target=target, reduction="sum")[1:]
    actual = torch.func.grad(lambda *t: fused(*t, target=target, reduction="sum"), argnums=(0, 1, 2))(*plain_tensors)
    torch.testing.assert_close(actual, tuple(2 * gradient for gradient in expected))  # the cotangent there is 1/2

    def row_loss(x: Tensor, y: Tensor, *head: Tensor) -> Tensor:
        return fused(x, *head, target=y, reduction="sum")

    rows = torch.vmap(row_loss, in_dims=(0, 0, None, None))(plain_tensors[0], target, *plain_tensors[1:])
    torch.testing.assert_close(rows, fused(*plain_tensors, target=target, reduction="none"))
    each = torch.vmap(torch.func.grad(row_loss, argnums=2), in_dims=(0, 0, None, None))
    samples = each(plain_tensors[0], target, *plain_tensors[1:])
    torch.testing.assert_close(samples.sum(0), actual[1])


def test_pullbacks(device: torch.device) -> None:
    """vjp calls the backward pass where its transform has ended; jacrev maps over it."""
    tensors, target = operands((20, 4, 5), torch.float64, device)
    heads = tuple(tensor.detach() for tensor in tensors)
    _, pullback = torch.func.vjp(lambda *head: fused(*head, target=target), *heads)
    expected = value_and_gradients(fused, tensors, target=target)[1:]  # whose cotangent is 1/2
    torch.testing.assert_close(pullback(torch.tensor(0.5, dtype=torch.float64, device=device)), tuple(expected))
    rows, expected_rows = (
        torch.func.jacrev(lambda *head, f=f: f(*head, target=target, reduction="none"), argnums=(0, 1, 2))(*heads)
        for f in (fused, plain)
    )
    torch.testing.assert_close(rows, expected_rows)


def test_module(device: torch.device) -> None:
    weight = torch.rand(7, device=device)
    loss = pyreg.nn.LinearStableMaxCrossEntropyLoss(
        4, 7, bias=True, device=device, weight=weight, reduction="sum", ignore_index=2, label_smoothing=0.1
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in loss.named_parameters()}
    assert shapes == {"linear.weight": (7, 4), "linear.bias": (7,)}
    x, y = torch.randn(6, 4, device=device), torch.randint(7, (6,), device=device)
    expected = stablemax_cross_entropy(loss.linear(x), y, weight, 2, "sum", 0.1)
    torch.testing.assert_close(loss(x, y), expected)
    copy = pyreg.nn.LinearStableMaxCrossEntropyLoss(4, 7, bias=True, device=device, weight=weight)
    copy.load_state_dict(loss.state_dict())
    torch.testing.assert_close(copy.linear.weight, loss.linear.weight)
    embedding = torch.nn.Embedding(7, 4, device=device)
    loss.linear.weight = embedding.weight  # tied to an embedding
    loss(embedding(y), y).backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.abs().sum() > 0
    assert "reduction='sum', ignore_index=2, label_smoothing=0.1, weight=[7]" in repr(loss)


# ---- hard to misuse ----

X, W, Y = torch.randn(6, 4), torch.randn(7, 4), torch.zeros(6, dtype=torch.int64)
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "list": (TypeError, r"expected input to be a tensor, got list", lambda: fused([1.0], W, target=Y)),  # type: ignore[arg-type]
    "integers": (TypeError, r"expected input to be float64.*got torch.int64", lambda: fused(X.long(), W, target=Y)),
    "target": (TypeError, r"expected target to be a tensor, got list", lambda: fused(X, W, target=[0])),  # type: ignore[arg-type]
    "0-d": (ValueError, r"expected input of shape \[H\], \[N, H\]", lambda: fused(X[0, 0], W, target=Y)),
    "features": (
        ValueError,
        r"expected linear_weight of shape \[C, H\] = \[C, 4\].*got \[7, 3\]",
        lambda: fused(X, W[:, :3], target=Y),
    ),
    "vector": (ValueError, r"expected linear_weight of shape \[C, H\].*got \[4\]", lambda: fused(X, W[0], target=Y)),
    "no class": (ValueError, r"expected at least one class", lambda: fused(X, W[:0], target=Y)),
    "bias": (
        ValueError,
        r"expected linear_bias of shape \[C\] = \[7\], got \[6\]",
        lambda: fused(X, W, torch.zeros(6), target=Y),
    ),
    "dtypes": (
        TypeError,
        r"expected linear_weight of input's dtype torch.float32, got torch.float64",
        lambda: fused(X, W.double(), target=Y),
    ),
    "rows": (
        ValueError,
        r"expected target of shape \[6\] \(class indices\) or \[6, 7\] \(probabilities\).*got \[5\]",
        lambda: fused(X, W, target=Y[:5]),
    ),
    "float labels": (
        TypeError,
        r"expected class indices of dtype int64, got torch.float32; use target.long\(\)",
        lambda: fused(X, W, target=Y.float()),
    ),
    "ignored probabilities": (
        ValueError,
        r"ignore_index is for class indices",
        lambda: fused(X, W, target=torch.rand(6, 7), ignore_index=3),
    ),
    "reduction": (
        ValueError,
        r"expected reduction to be 'none', 'mean' or 'sum', got 'avg'",
        lambda: fused(X, W, target=Y, reduction="avg"),
    ),
    "smoothing": (
        ValueError,
        r"expected label_smoothing in \[0, 1\], got 1.5",
        lambda: fused(X, W, target=Y, label_smoothing=1.5),
    ),
    "class weights": (
        ValueError,
        r"expected weight of shape \[C\] = \[7\], got \[6\]",
        lambda: fused(X, W, target=Y, weight=torch.rand(6)),
    ),
    "device": (
        ValueError,
        r"expected linear_weight on input's device cpu, got meta",
        lambda: fused(X, W.to("meta"), target=Y),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^linear_stablemax_cross_entropy: {message}"):
        call()


@pytest.mark.cpu_only
@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_out_of_range_label_is_an_index_error(
    device: torch.device, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Y.clone()
    target[3] = label
    message = rf"target has class {label}, which is out of bounds for input with 7 classes"
    for small in (0, 1 << 20):
        monkeypatch.setattr(implementation, "_SMALL_LOGITS_BYTES", small)
        with pytest.raises(IndexError, match=message):
            fused(X, W, target=target)


@pytest.mark.not_emulated
@pytest.mark.parametrize("target", ["labels", "probabilities"])
def test_logits_beyond_float16_on_the_cpu(target: str) -> None:
    """They are float32: a loss of few classes is as right as that of many, which goes by chunks."""
    x, weight = torch.full((3, 64), 100.0).half(), torch.full((5, 64), 20.0).half()
    weight[1:] = -1.0
    of = torch.zeros(3, dtype=torch.int64)
    if target == "probabilities":
        of = torch.nn.functional.one_hot(of, 5).half()
    x.requires_grad_()
    loss = linear_stablemax_cross_entropy(x, weight, of)
    assert loss.dtype == torch.float16
    (gradient,) = torch.autograd.grad(loss, x)
    exact = x.detach().double().requires_grad_()
    expected = linear_stablemax_cross_entropy(exact, weight.double(), of if target == "labels" else of.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-2, atol=1e-7)

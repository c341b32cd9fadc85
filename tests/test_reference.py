"""The reference is the oracle of every kernel, so it is held against torch, the released code and a second algebra."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.reference import (
    conr,
    info_nce,
    monge_gap,
    orthograd,
    partial_transport,
    sinkhorn,
    stablemax,
    supcon,
    weight_compander,
)

GOLDEN = Path(__file__).parent / "golden"
INF = math.inf

# Two orders of summation of fp64 terms: a few units in the last place of values near 1, times a few hundred terms.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

# `[C]`, `[N, C]`, one row, one class, and one and three trailing dimensions.
SHAPES = [(7,), (5, 7), (1, 7), (5, 1), (3, 7, 2), (2, 5, 3, 1, 2)]
REDUCTIONS = ["mean", "sum", "none"]
SMOOTHING = [0.0, 0.1, 1.0]
IGNORED = ["no row", "some rows", "all rows"]


def logits_of(shape: tuple[int, ...], scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def class_dim(shape: tuple[int, ...]) -> int:
    return 0 if len(shape) == 1 else 1


def class_weights(shape: tuple[int, ...]) -> Tensor:
    """Positive, different, and zero for one class if there is another."""
    classes = shape[class_dim(shape)]
    weight = torch.linspace(0.5, 2.0, classes, dtype=torch.float64)
    weight[-1] = 0.0 if classes > 1 else 0.7
    return weight


def class_indices(shape: tuple[int, ...], ignored: str = "no row", ignore_index: int = -100) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    rows = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(shape[class_dim(shape)], rows, generator=generator)
    if ignored == "no row":
        return target
    mask = torch.ones(rows, dtype=torch.bool)
    if ignored == "some rows":
        mask = (torch.arange(target.numel()) % 3 == 1).reshape(rows)
    return target.masked_fill(mask, ignore_index)


def class_probabilities(shape: tuple[int, ...]) -> Tensor:
    return logits_of(shape, scale=1.0).flip(0).softmax(class_dim(shape))


def value_and_gradients(loss_of, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients under a cotangent that is 1 for a scalar and uneven for a tensor."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    cotangent = torch.linspace(1.0, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, cotangent))


def assert_all_close(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **EXACT)


def softmax_cross_entropy(input: Tensor, *args, **kwargs) -> Tensor:
    """F.cross_entropy by way of the reference's machinery."""
    log_probs = F.log_softmax(input, dim=class_dim(input.shape))
    return stablemax.cross_entropy_from_log_probabilities(log_probs, *args, **kwargs)


def torch_stablemax_cross_entropy(input: Tensor, *args, **kwargs) -> Tensor:
    """The second truth: stablemax(x) = softmax(log s(x)), so torch's own loss of log s(x), with log s written anew."""
    return F.cross_entropy(input.sign() * input.abs().log1p(), *args, **kwargs)


PAIRS = [
    pytest.param(softmax_cross_entropy, F.cross_entropy, id="softmax"),
    pytest.param(stablemax.stablemax_cross_entropy, torch_stablemax_cross_entropy, id="stablemax"),
]


@pytest.mark.parametrize(("ours", "truth"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestCrossEntropyIsTorchs:
    def test_class_indices(self, ours, truth, shape) -> None:
        x = logits_of(shape)
        weights = [None, class_weights(shape)]
        for reduction, smoothing, weight, ignored in itertools.product(REDUCTIONS, SMOOTHING, weights, IGNORED):
            target = class_indices(shape, ignored)
            options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
            assert_all_close(
                value_and_gradients(lambda x, t=target, o=options: ours(x, t, **o), x),
                value_and_gradients(lambda x, t=target, o=options: truth(x, t, **o), x),
            )

    @pytest.mark.parametrize("ignore_index", [-1, 0, 3, 1000])
    def test_ignore_index(self, ours, truth, shape, ignore_index) -> None:
        x, target = logits_of(shape), class_indices(shape, "some rows", ignore_index)
        for reduction, smoothing in itertools.product(REDUCTIONS, SMOOTHING):
            options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
            assert_all_close(
                value_and_gradients(lambda x, o=options: ours(x, target, **o), x),
                value_and_gradients(lambda x, o=options: truth(x, target, **o), x),
            )

    def test_class_probabilities(self, ours, truth, shape) -> None:
        x, target = logits_of(shape), class_probabilities(shape)
        weights = [None, class_weights(shape)]
        for reduction, smoothing, weight in itertools.product(REDUCTIONS, SMOOTHING, weights):
            options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
            assert_all_close(
                value_and_gradients(lambda x, q, o=options: ours(x, q, **o), x, target),
                value_and_gradients(lambda x, q, o=options: truth(x, q, **o), x, target),
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "smoothing"), [((0, 4), 0.0), ((0, 4), 0.1), ((3, 4, 0), 0.0), ((3, 4, 0), 0.1), ((3, 0), 0.0)], ids=str
)
def test_empty_input_gives_torchs_result(shape, smoothing, reduction) -> None:
    x = torch.zeros(shape, dtype=torch.float64)
    indices = torch.full((shape[0], *shape[2:]), -100)
    for target in (x, indices):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        assert_all_close([softmax_cross_entropy(x, target, **options)], [F.cross_entropy(x, target, **options)])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [-0.5, 0.0, 0.1, math.nan])
def test_masked_classes_give_torchs_result(smoothing, reduction) -> None:
    """A masked class costs inf as a target or under smoothing, and NaN (0 x inf) as a probability of 0: as in torch."""
    x = logits_of((4, 5))
    x[:, 2] = -INF
    for target in (torch.tensor([0, 1, 4, -100]), torch.tensor([0, 2, 4, -100]), class_probabilities((4, 5))):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        assert_all_close([softmax_cross_entropy(x, target, **options)], [F.cross_entropy(x, target, **options)])


def test_mixed_dtypes_promote_as_torch() -> None:
    x, target = logits_of((5, 7)), class_probabilities((5, 7))
    for input, probabilities in ((x.half(), target.float()), (x.bfloat16(), target), (x.float(), target.half())):
        ours, truth = softmax_cross_entropy(input, probabilities), F.cross_entropy(input, probabilities)
        assert ours.dtype == truth.dtype
        torch.testing.assert_close(ours, truth, rtol=1e-2, atol=0)  # bf16 keeps 8 bits


X = torch.zeros(3, 4)
BAD_CALLS = [
    pytest.param((X, torch.tensor([0, 1, 4])), {}, id="label too large"),
    pytest.param((X, torch.tensor([0, 1])), {}, id="rows differ"),
    pytest.param((X, torch.tensor([0.0, 1.0, 2.0])), {}, id="float labels"),
    pytest.param((X, torch.zeros(3, 4, dtype=torch.long)), {}, id="integer probabilities"),
    pytest.param((X, torch.zeros(3, dtype=torch.int32)), {}, id="int32 labels"),
    pytest.param((torch.tensor(1.0), torch.tensor(0)), {}, id="0-d"),
    pytest.param((X, torch.full((3, 4), 0.25)), {"ignore_index": 0}, id="ignore_index with probabilities"),
    pytest.param((X, torch.tensor([0, 1, 2])), {"label_smoothing": 1.5}, id="smoothing above 1"),
    pytest.param((X, torch.full((3, 4), 0.25)), {"label_smoothing": 1.5}, id="smoothing above 1, probabilities"),
    pytest.param((X, torch.tensor([0, 1, 2])), {"reduction": "max"}, id="reduction"),
    pytest.param((X, torch.full((3, 4), 0.25)), {"reduction": "max"}, id="reduction, probabilities"),
    pytest.param((X, torch.tensor([0, 1, 2])), {"weight": torch.ones(3)}, id="weight"),
    pytest.param((X, torch.full((3, 4), 0.25)), {"weight": torch.ones(3)}, id="weight, probabilities"),
]


@pytest.mark.parametrize(("args", "kwargs"), BAD_CALLS)
def test_what_torch_refuses_is_refused(args, kwargs) -> None:
    errors = (ValueError, RuntimeError, IndexError)
    with pytest.raises(errors) as theirs:
        F.cross_entropy(*args, **kwargs)
    with pytest.raises(errors) as ours:
        stablemax.stablemax_cross_entropy(*args, **kwargs)
    beginning = str(theirs.value)[:25]
    assert str(ours.value).startswith(beginning)


class TestS:
    X = (-INF, -1e300, -3.0, -1.0, -1e-300, 0.0, 1e-300, 1.0, 3.0, 1e300)
    S = (0.0, 1e-300, 0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 1e300)
    S_PRIME = (0.0, 0.0, 1 / 16, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    LOG_S_PRIME = (0.0, 1e-300, 0.25, 0.5, 1.0, 1.0, 1.0, 0.5, 0.25, 1e-300)

    def test_values_and_slopes(self) -> None:
        x = torch.tensor(self.X, dtype=torch.float64)
        _, slopes = value_and_gradients(lambda x: stablemax.s(x).sum(), x)
        torch.testing.assert_close(stablemax.s(x), torch.tensor(self.S, dtype=torch.float64), rtol=1e-15, atol=0)
        torch.testing.assert_close(slopes, torch.tensor(self.S_PRIME, dtype=torch.float64), rtol=1e-15, atol=0)

    def test_logarithm_and_its_slopes(self) -> None:
        x = torch.tensor(self.X, dtype=torch.float64)
        _, slopes = value_and_gradients(lambda x: stablemax.log_s(x).sum(), x)
        torch.testing.assert_close(stablemax.log_s(x), stablemax.s(x).log(), rtol=1e-15, atol=1e-299)
        torch.testing.assert_close(slopes, torch.tensor(self.LOG_S_PRIME, dtype=torch.float64), rtol=1e-15, atol=0)

    def test_second_derivatives_are_finite(self) -> None:
        x = torch.tensor(self.X, dtype=torch.float64, requires_grad=True)
        for f, curvature_at_minus_3 in ((stablemax.s, 2 / 64), (stablemax.log_s, 1 / 16)):
            (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), x)
            assert curvature.isfinite().all()
            assert curvature[2].item() == pytest.approx(curvature_at_minus_3, rel=1e-15)

    def test_nan_stays_nan(self) -> None:
        x = torch.tensor([math.nan, 1.0])
        assert stablemax.s(x).isnan().tolist() == [True, False]
        assert stablemax.log_s(x).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_stablemax_is_softmax_of_log_s(dim) -> None:
    x = logits_of((4, 5, 6), scale=100.0)
    log_s = x.sign() * x.abs().log1p()
    assert_all_close(
        [stablemax.stablemax(x, dim), stablemax.log_stablemax(x, dim)], [log_s.softmax(dim), log_s.log_softmax(dim)]
    )


def test_dtype_casts_the_input_first() -> None:
    x = logits_of((4, 5)).bfloat16()
    for f in (stablemax.stablemax, stablemax.log_stablemax):
        assert f(x, dtype=torch.float64).equal(f(x.double()))
        assert f(x).dtype == torch.bfloat16


def test_gradient_is_the_written_one() -> None:
    """dL/dx_j = (sum_k q_k) s'(x_j) / S - q_j / (1 + |x_j|), at 0 and at 1 too, with q that does not sum to 1."""
    x = torch.tensor([[0.0, 1.0, -1.0, 2.5, -40.0, 1e6]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.3, 0.1, 0.0, 0.2, 0.1, 0.1]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(stablemax.stablemax_cross_entropy(x, q, reduction="sum"), x)
    s = torch.tensor([[1.0, 2.0, 0.5, 3.5, 1 / 41, 1e6 + 1]], dtype=torch.float64)
    s_prime = torch.tensor([[1.0, 1.0, 0.25, 1.0, 1 / 41**2, 1.0]], dtype=torch.float64)
    expected = q.sum() * s_prime / s.sum() - q / (1 + x.detach().abs())
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-17)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_class_is_as_good_as_absent(dtype) -> None:
    x, target = logits_of((4, 5)).to(dtype), torch.tensor([0, 1, 3, 4])
    masked = torch.cat([x[:, :2], torch.full((4, 1), -INF, dtype=dtype), x[:, 2:]], dim=1)
    loss, gradient = value_and_gradients(lambda x: stablemax.stablemax_cross_entropy(x, target), x)
    moved = target + (target >= 2)
    masked_loss, masked_gradient = value_and_gradients(lambda x: stablemax.stablemax_cross_entropy(x, moved), masked)
    torch.testing.assert_close(masked_loss, loss)
    assert masked_gradient[:, 2].tolist() == [0.0] * 4
    torch.testing.assert_close(masked_gradient[:, [0, 1, 3, 4, 5]], gradient)


def test_huge_logits_have_finite_gradients() -> None:
    x = torch.tensor([[1e300, -1e300, 0.0], [-1e300, 1e300, 1.0]], dtype=torch.float64)
    loss, gradient = value_and_gradients(lambda x: stablemax.stablemax_cross_entropy(x, torch.tensor([0, 0])), x)
    assert loss.item() == pytest.approx(300 * math.log(10), rel=1e-12)  # the mean of 0 and log 1e600
    assert gradient.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_first_and_second_order(smoothing) -> None:
    x, indices = logits_of((3, 4)).requires_grad_(), torch.tensor([0, 3, -100])
    weight = class_weights((3, 4))
    q = class_probabilities((3, 4)).requires_grad_()
    losses = [
        (lambda x: stablemax.stablemax_cross_entropy(x, indices, weight, label_smoothing=smoothing), (x,)),
        (lambda x, q: stablemax.stablemax_cross_entropy(x, q, weight, label_smoothing=smoothing), (x, q)),
        (lambda x: stablemax.stablemax(x, 0), (x,)),
        (lambda x: stablemax.log_stablemax(x, 1), (x,)),
    ]
    for loss_of, inputs in losses:
        assert torch.autograd.gradcheck(loss_of, inputs)
        assert torch.autograd.gradgradcheck(loss_of, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_traces_into_one_graph(smoothing) -> None:
    x, target = logits_of((5, 7)), class_indices((5, 7), "some rows")
    weight = class_weights((5, 7))

    def loss_of(x: Tensor) -> Tensor:
        return stablemax.stablemax_cross_entropy(x, target, weight, label_smoothing=smoothing)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    assert_all_close(value_and_gradients(compiled, x), value_and_gradients(loss_of, x))


@pytest.mark.parametrize("file", ["stablemax_0", "stablemax_1", "stablemax_2"])
def test_stablemax_golden(file) -> None:
    """The released code divides before it takes the logarithm, which sets them apart by the rounding of fp64."""
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{file}.npz").items()}
    labels = golden["labels"]
    loss, gradient = value_and_gradients(lambda x: stablemax.stablemax_cross_entropy(x, labels), golden["logits"])
    log_stablemax = stablemax.log_stablemax(golden["logits"])
    torch.testing.assert_close(log_stablemax, golden["log_stablemax"], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, golden["grad_logits"], rtol=1e-10, atol=1e-16)


class TestOrthograd:
    def test_by_hand(self) -> None:
        weight, grad = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0])
        assert orthograd.orthogonalize_gradient(weight, grad).tolist() == [0.0, 5.0]

    @pytest.mark.parametrize("shape", [(11,), (4, 5), (2, 3, 4)], ids=str)
    def test_against_the_projector_matrix(self, shape) -> None:
        weight, grad = logits_of(shape), logits_of(shape, scale=0.1).flip(0)
        direction = weight.flatten() / weight.norm()
        projector = torch.eye(weight.numel(), dtype=torch.float64) - torch.outer(direction, direction)
        expected = F.normalize(projector @ grad.flatten(), dim=0) * grad.norm()
        ours = orthograd.orthogonalize_gradient(weight, grad)
        torch.testing.assert_close(ours, expected.view(shape), **EXACT)
        assert ours.flatten().dot(weight.flatten()).item() == pytest.approx(0.0, abs=1e-13)
        assert ours.norm().item() == pytest.approx(grad.norm().item(), rel=1e-14)

    def test_nearly_parallel(self) -> None:
        """g = w + 1e-6 d with d orthogonal to w: g' = |g| d / |d|, to 1e-16 / 1e-6."""
        weight = torch.ones(1000, dtype=torch.float64)
        direction = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(500)
        ours = orthograd.orthogonalize_gradient(weight, weight + 1e-6 * direction)
        torch.testing.assert_close(ours, direction, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_zeros(self, dtype) -> None:
        values, zeros = torch.tensor([1.0, -2.0, 2.0], dtype=dtype), torch.zeros(3, dtype=dtype)
        assert orthograd.orthogonalize_gradient(zeros, values).equal(values)
        assert orthograd.orthogonalize_gradient(values, zeros).equal(zeros)

    def test_layout_does_not_matter(self) -> None:
        weight, grad = logits_of((4, 6)), logits_of((6, 4)).t()
        ours = orthograd.orthogonalize_gradient(weight, grad)
        torch.testing.assert_close(ours, orthograd.orthogonalize_gradient(weight, grad.contiguous()), **EXACT)

    def test_in_place_skips_parameters_without_gradient(self) -> None:
        used, unused = (torch.nn.Parameter(torch.tensor([2.0, 0.0])) for _ in range(2))
        used.grad = torch.tensor([3.0, 4.0])
        storage = used.grad.data_ptr()
        orthograd.orthogonalize_gradients_([used, unused])
        assert used.grad.tolist() == [0.0, 5.0]
        assert used.grad.data_ptr() == storage
        assert unused.grad is None

    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_golden(self, name) -> None:
        """Gradients and the steps taken with them; a second fp64 evaluation order sets the tolerance."""
        golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"orthograd_{name}.npz").items()}
        settings = {key[3:]: value.item() for key, value in golden.items() if key.startswith("hp_")}
        params = [torch.nn.Parameter(golden[f"p{i}_0"].clone()) for i in range(3)]
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name](params, **settings)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = golden[f"g{i}_{step}"].clone()
            orthograd.orthogonalize_gradients_(params)
            assert_all_close([p.grad for p in params], [golden[f"og{i}_{step}"] for i in range(3)])
            optimizer.step()
            assert_all_close([p.detach() for p in params], [golden[f"p{i}_{step + 1}"] for i in range(3)])


KINDS = ["arctan", "arsinh", "erf"]


class TestWeightCompander:
    def test_by_hand(self) -> None:
        v = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
        limits = {"arctan": 0.5 * math.pi / 4, "arsinh": 0.5 * math.log(1 + math.sqrt(2)), "erf": 0.5 * math.erf(1)}
        slopes = {"arctan": 1 / 2, "arsinh": 1 / math.sqrt(2), "erf": 2 / math.sqrt(math.pi) / math.e}
        for kind in KINDS:
            w = weight_compander.weight_compander(v, 0.5, 3.0, kind)
            torch.testing.assert_close(w, limits[kind] * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), **EXACT)
            slope = weight_compander.slope(v, 0.5, 3.0, kind)[2].item()
            assert slope == pytest.approx(slopes[kind] * 0.5 / 3, rel=1e-14)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("by_slice", [False, True])
    def test_slope_is_the_derivative_and_the_inverse_inverts(self, kind, by_slice) -> None:
        v = logits_of((4, 3, 2), scale=1.0).requires_grad_()
        shape = (4,) if by_slice else ()
        a, b = 0.5 + torch.rand(2, *shape, dtype=torch.float64)
        w = weight_compander.weight_compander(v, a, -b, kind)
        (derivative,) = torch.autograd.grad(w.sum(), v)
        torch.testing.assert_close(weight_compander.slope(v, a, -b, kind), derivative, **EXACT)
        torch.testing.assert_close(weight_compander.inverse(w, a, -b, kind), v, rtol=1e-10, atol=1e-10)
        assert torch.autograd.gradcheck(lambda *x: weight_compander.weight_compander(*x, kind), (v, a, b))

    def test_slices_have_their_own_constants(self) -> None:
        v = logits_of((3, 4))
        a, b = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([[1.0], [2.0], [-3.0]])
        w = weight_compander.weight_compander(v, a, b)
        for i in range(3):
            torch.testing.assert_close(w[i], a[i].double() * torch.atan(v[i] / b[i].double()), **EXACT)

    def test_a_step_on_w(self) -> None:
        """SGD by the gradient of w, scaled back, is v - lr (dL/dw + 2 decay w) p."""
        v, by_w = logits_of((5,)), logits_of((6,))[:5]
        p = weight_compander.slope(v, 0.5, 2.0)
        grad = by_w * p
        weight_compander.to_weight_gradient_(grad, v, 0.5, 2.0, "arctan", decay=0.1)
        w = weight_compander.weight_compander(v, 0.5, 2.0)
        torch.testing.assert_close(grad, by_w + 0.2 * w, **EXACT)
        stepped = v - 0.3 * grad
        weight_compander.rescale_step_(stepped, v, 0.5, 2.0, "arctan")
        torch.testing.assert_close(stepped, v - 0.3 * (by_w + 0.2 * w) * p, **EXACT)
        by_v = by_w * p
        weight_compander.to_weight_gradient_(by_v, v, 0.5, 2.0, "arctan", decay=0.1, decay_on="v")
        torch.testing.assert_close(by_v * p, by_w * p + 0.2 * v, **EXACT)


def pairs_by_rows(
    features: np.ndarray,
    multiplier: np.ndarray,
    positive: np.ndarray,
    alpha: np.ndarray,
    beta: np.ndarray,
    temperature: float,
    extra: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The second truth of the pairwise losses: row by row and pair by pair, in logarithms of quotients.

        l_i = alpha_i log( sum_j a_ij exp(s_ij) + extra_i ) - beta_i sum_{j in P_i} s_ij

    with alpha_i = beta_i |P_i|, and the gradient of the sum of all rows, by Jacobians of z = f / |f|. [N], [N, D]
    """
    count, width = features.shape
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in features.tolist()]
    z = [row / length for row, length in zip(features, lengths, strict=True)]
    losses, by_z = np.zeros(count), np.zeros((count, width))
    for i in range(count):
        if alpha[i] == 0:
            continue
        scores = [math.fsum(z[i] * z[j]) / temperature for j in range(count)]
        terms = [multiplier[i, j] * math.exp(scores[j]) for j in range(count)]
        total = math.fsum([*terms, extra[i]])
        quotients = [math.log(total / math.exp(scores[j])) for j in range(count) if positive[i, j]]
        losses[i] = beta[i] * math.fsum(quotients)
        for j in range(count):
            by_score = alpha[i] * terms[j] / total - beta[i] * positive[i, j]
            by_z[i] += by_score * z[j] / temperature
            by_z[j] += by_score * z[i] / temperature
    jacobians = [(np.eye(width) - np.outer(z[i], z[i])) / lengths[i] for i in range(count)]
    return losses, np.stack([jacobians[i] @ by_z[i] for i in range(count)])


def assert_is_sum_of(losses_of, features: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> None:
    x = torch.from_numpy(features).requires_grad_()
    losses = losses_of(x)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    for actual, wanted in zip((losses.detach(), gradient), expected, strict=True):
        # sums of some dozens of terms, each right to a few units of the last place of numbers up to 1 / temperature
        torch.testing.assert_close(actual, torch.from_numpy(wanted), rtol=1e-11, atol=1e-11)


VARIANTS = ["paper", "agedb", "nyud2"]


class TestConr:
    @pytest.mark.parametrize("file", ["agedb_0", "agedb_1", "agedb_2", "nyud2_0"])
    def test_golden(self, file) -> None:
        golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"conr_{file}.npz").items()}
        numbers = {name: golden[name].item() for name in ("window", "temperature", "eta")}
        weights = golden["weights"] if golden["weights"].dim() > 0 else None

        def loss_of(features: Tensor) -> Tensor:
            return conr.conr_loss(
                features, golden["targets"], golden["preds"], weights=weights, variant=file.split("_")[0], **numbers
            )

        loss, gradient = value_and_gradients(loss_of, golden["features"])
        torch.testing.assert_close(loss, golden["loss"], rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, golden["grad_features"], rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(("outputs", "norm"), [(1, 2), (3, 1), (3, 2), (3, INF)])
    def test_pair_by_pair(self, variant, weighted, outputs, norm) -> None:
        rng = np.random.default_rng(outputs)
        count, window, temperature, eta = 17, 1.0, 0.2, 0.3
        features = rng.normal(size=(count, 5))
        y, e = rng.integers(0, 4, size=(count, outputs)), rng.integers(0, 4, size=(count, outputs))
        y[-1], e[0] = 100, 100  # no positive; no negative
        w = rng.uniform(0.2, 2.0, size=count) if weighted else np.ones(count)
        multiplier, positive = np.zeros((count, count)), np.zeros((count, count), dtype=bool)
        alpha, beta, extra = np.zeros(count), np.zeros(count), np.zeros(count)
        d = np.zeros((count, count))
        if variant == "nyud2":
            y, e, outputs = y.mean(1, keepdims=True), e.mean(1, keepdims=True), 1
        length = {1: lambda v: sum(abs(v)), 2: lambda v: math.sqrt(sum(v * v)), INF: lambda v: max(abs(v))}[norm]
        for i, j in itertools.product(range(count), repeat=2):
            d[i, j] = length(y[i] - y[j])
            if d[i, j] <= window:
                positive[i, j], multiplier[i, j] = i != j, i != j
            elif length(e[i] - e[j]) <= window:
                multiplier[i, j] = w[i] * (eta * d[i, j] if variant == "nyud2" else math.exp(eta * d[i, j]))
        for i in range(count):
            if positive[i].any() and (multiplier[i] > 0).sum() > positive[i].sum():
                number = positive[i].sum()
                beta[i] = 1 / (number + 1) if variant == "nyud2" else w[i] / number
                alpha[i] = beta[i] * number
                extra[i] = 0 if variant == "paper" else count - number
        assert 0 < (alpha > 0).sum() < count
        options = {"window": window, "temperature": temperature, "eta": eta, "variant": variant, "label_norm": norm}
        assert_is_sum_of(
            lambda x: conr.conr_loss(
                x,
                torch.from_numpy(y),
                torch.from_numpy(e),
                weights=torch.from_numpy(w) if weighted else None,
                reduction="none",
                **options,
            ),
            features,
            pairs_by_rows(features, multiplier, positive, alpha, beta, temperature, extra),
        )

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("case", ["no positives", "no negatives", "one row", "no row", "zeros", "cold", "far"])
    def test_edges_are_finite(self, variant, case) -> None:
        count = {"one row": 1, "no row": 0}.get(case, 6)
        labels = torch.arange(count) // 2
        labels = {"no positives": 100 * torch.arange(count), "no negatives": 0 * labels}.get(case, 100 * labels)
        labels = labels * 10**6 if case == "far" else labels
        features = logits_of((count, 4)) * (case != "zeros")
        options = {"temperature": 0.002 if case == "cold" else 0.1, "eta": 0.1}
        preds = torch.zeros(count)
        losses, gradient = value_and_gradients(
            lambda x: conr.conr_loss(x, labels, preds, variant=variant, reduction="none", **options), features
        )
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        if case in ("no positives", "no negatives", "one row"):
            assert (losses == 0).all()
            assert (gradient == 0).all()
        else:
            assert (losses > 0).all()
        for reduction, scale in (("sum", 1), ("mean", 1 / max(count, 1))):
            loss = conr.conr_loss(features, labels, preds, variant=variant, reduction=reduction, **options)
            torch.testing.assert_close(loss, scale * losses.sum())

    def test_labels_beyond_float32_are_told_apart(self) -> None:
        features = logits_of((3, 4)).float()
        labels, preds = torch.tensor([2**24, 2**24 + 2, 2**24 + 3]), torch.zeros(3)
        losses = conr.conr_loss(features, labels, preds, temperature=1.0, reduction="none")
        assert (losses > 0).tolist() == [False, True, True]
        rounded = conr.conr_loss(features, labels.float(), preds, temperature=1.0, reduction="none")
        assert (rounded == 0).all()


class TestSupcon:
    @pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0, 3], [5] * 7, list(range(7))], ids=str)
    def test_pair_by_pair(self, labels) -> None:
        features = np.random.default_rng(0).normal(size=(7, 4))
        y = np.array(labels)
        positive = (y[:, None] == y[None]) & ~np.eye(7, dtype=bool)
        positives = positive.sum(1)
        alpha, beta = (positives > 0).astype(float), (positives > 0) / np.maximum(positives, 1)
        expected = pairs_by_rows(features, 1 - np.eye(7), positive, alpha, beta, 0.2, np.zeros(7))
        target = torch.from_numpy(y)
        assert_is_sum_of(lambda x: supcon.supcon_loss(x, target, 0.2, reduction="none"), features, expected)
        mean = supcon.supcon_loss(torch.from_numpy(features), target, 0.2)
        assert mean.item() == pytest.approx(expected[0].sum() / max(alpha.sum(), 1), rel=1e-12)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_pairs_of_views_are_info_nce_among_all(self, normalize) -> None:
        """One positive each: the cross-entropy over all others (SimCLR's NT-Xent)."""
        features, labels = logits_of((10, 3)), torch.arange(5).repeat(2)
        z = F.normalize(features) if normalize else features
        scores = (z @ z.t() / 0.3).fill_diagonal_(-INF)
        expected = F.cross_entropy(scores, torch.arange(10).roll(5))
        torch.testing.assert_close(supcon.supcon_loss(features, labels, 0.3, normalize), expected, **EXACT)

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_few_rows(self, count) -> None:
        loss, gradient = value_and_gradients(
            lambda x: supcon.supcon_loss(x, torch.arange(count), normalize=False), logits_of((count, 3))
        )
        assert loss.item() == 0
        assert (gradient == 0).all()


class TestInfoNce:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_is_torchs_cross_entropy(self, normalize) -> None:
        query, key, log_q = logits_of((5, 3)), logits_of((8, 3)), torch.rand(8, dtype=torch.float64).log()

        def torchs(q: Tensor, k: Tensor) -> Tensor:
            q, k = (F.normalize(q), F.normalize(k)) if normalize else (q, k)
            return F.cross_entropy(q @ k.t() / 0.3 - log_q, torch.arange(5))

        assert_all_close(
            value_and_gradients(lambda q, k: info_nce.info_nce(q, k, 0.3, normalize, log_q=log_q), query, key),
            value_and_gradients(torchs, query, key),
        )

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_symmetric_is_the_mean_of_both_directions(self, reduction) -> None:
        query, key, log_q = logits_of((6, 3)), logits_of((6, 3)).flip(0), torch.rand(6, dtype=torch.float64).log()
        ids = torch.tensor([0, 1, 0, 2, 3, 1])
        options = {"temperature": 0.3, "ids": ids, "reduction": reduction}

        def one_by_one(q: Tensor, k: Tensor) -> Tensor:
            ways = (
                info_nce.info_nce(q, k, log_q=log_q, **options),
                info_nce.info_nce(k, q, **options),
            )
            return (ways[0] + ways[1]) / 2

        assert_all_close(
            value_and_gradients(
                lambda q, k: info_nce.info_nce(q, k, symmetric=True, log_q=log_q, **options), query, key
            ),
            value_and_gradients(one_by_one, query, key),
        )

    def test_keys_with_the_query_s_id_are_as_good_as_absent(self) -> None:
        query, key, ids = logits_of((4, 3)), logits_of((7, 3)), torch.tensor([0, 1, 0, 2, 1, 0, 5])
        losses = info_nce.info_nce(query, key, ids=ids, reduction="none")
        for i in range(4):
            others = [j for j in range(7) if j != i and ids[j] != ids[i]]
            alone = info_nce.info_nce(query[i : i + 1], key[[i, *others]])
            torch.testing.assert_close(losses[i], alone, **EXACT)

    @pytest.mark.parametrize("count", [0, 1])
    def test_few_rows(self, count) -> None:
        loss, *gradients = value_and_gradients(info_nce.info_nce, logits_of((count, 3)), logits_of((count, 3)))
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in gradients)


def labelled() -> tuple[Tensor, Tensor]:
    """Labels of which one stands alone, and predictions that bring some of them together."""
    return torch.tensor([0.0, 0.5, 3.0, 3.5, 9.0, 0.2]), torch.tensor([1.0, 5.0, 1.5, 4.5, 4.0, 0.5])


PAIRWISE = {
    **{
        f"conr {variant}": lambda x, v=variant: conr.conr_loss(x, *labelled(), temperature=0.5, eta=0.2, variant=v)
        for variant in VARIANTS
    },
    "supcon": lambda x: supcon.supcon_loss(x, torch.tensor([0, 1, 0, 1, 2, 1]), 0.5),
    "info_nce": lambda x: info_nce.info_nce(x, x.flip(1), 0.5, ids=torch.tensor([0, 1, 0, 1, 2, 1]), symmetric=True),
}


@pytest.mark.parametrize("name", PAIRWISE)
class TestPairwise:
    def test_first_and_second_order(self, name) -> None:
        x = logits_of((6, 3), scale=1.0).requires_grad_()
        assert PAIRWISE[name](x).item() > 0
        assert torch.autograd.gradcheck(PAIRWISE[name], x)
        assert torch.autograd.gradgradcheck(PAIRWISE[name], x)

    def test_traces_into_one_graph(self, name) -> None:
        x = logits_of((6, 3))
        compiled = torch.compile(PAIRWISE[name], fullgraph=True, backend="aot_eager")
        assert_all_close(value_and_gradients(compiled, x), value_and_gradients(PAIRWISE[name], x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_16_bits_compute_in_float32(self, name, dtype) -> None:
        x = logits_of((6, 3)).to(dtype)
        loss, gradient = value_and_gradients(PAIRWISE[name], x)
        expected, expected_gradient = value_and_gradients(PAIRWISE[name], x.double())
        assert loss.dtype == gradient.dtype == dtype
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), expected, rtol=4 * rounding, atol=0)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=4 * rounding, atol=1e-5)


def transport_problem(batch: tuple[int, ...] = (), n: int = 5, m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    cost = torch.rand(*batch, n, m, dtype=torch.float64, generator=generator)
    a, b = (torch.rand(*batch, k, dtype=torch.float64, generator=generator) + 0.1 for k in (n, m))
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


PENALTIES = {
    "balanced": (INF, INF),
    "unbalanced": (0.7, 0.3),
    "semi-relaxed": (INF, 0.5),
    "an entry each": (
        torch.tensor([0.3, INF, 1.0, 0.2, INF], dtype=torch.float64),
        torch.tensor([INF, 0.5, INF, 0.1, 2.0, 0.4, 1.0], dtype=torch.float64),
    ),
}


class TestSinkhorn:
    @pytest.mark.parametrize("number", range(6))
    def test_golden(self, number) -> None:
        golden = np.load(GOLDEN / f"sinkhorn_{number}.npz")
        x, y, a, b = (torch.from_numpy(golden[key]) for key in "xyab")
        epsilon, rho_a, rho_b = (golden[key].item() for key in ("epsilon", "rho_a", "rho_b"))
        x.requires_grad_()
        y.requires_grad_()
        cost = sinkhorn.pairwise_cost(x, y, golden["cost"].item())
        with torch.no_grad():
            f, g = sinkhorn.sinkhorn(cost, a, b, epsilon, rho_a, rho_b, max_iter=5000)
            plan = sinkhorn.plan(cost, a, b, f, g, epsilon)
        # The files' own potentials have been iterated to 1e-11, and their cosine adds 1e-8 to the product of norms.
        torch.testing.assert_close(plan, torch.from_numpy(golden["plan"]), rtol=0, atol=1e-9)
        value = sinkhorn.value(cost, a, b, f, g, epsilon, rho_a, rho_b)
        assert value.item() == pytest.approx(golden["reg_ot_cost"].item(), rel=1e-8)
        value.backward()
        for points, key in ((x, "grad_x"), (y, "grad_y")):
            torch.testing.assert_close(points.grad, torch.from_numpy(golden[key]), rtol=0, atol=1e-8)
        difference = f + epsilon * a.log() - torch.from_numpy(golden["f"])
        if rho_b == INF:
            difference -= difference.mean()
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("reference", ["product", "counting"])
    @pytest.mark.parametrize("penalties", PENALTIES)
    def test_is_stationary_and_primal_equals_dual(self, penalties, reference) -> None:
        """The dual is concave: where its gradient by the potentials is 0 it is largest."""
        cost, a, b = transport_problem()
        rho_a, rho_b = PENALTIES[penalties]
        f, g = sinkhorn.sinkhorn(cost, a, b, 0.1, rho_a, rho_b, reference, max_iter=5000, tol=1e-15)
        f.requires_grad_()
        g.requires_grad_()
        dual = sinkhorn.value(cost, a, b, f, g, 0.1, rho_a, rho_b, reference)
        for gradient in torch.autograd.grad(dual, (f, g)):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)
        plan = sinkhorn.plan(cost, a, b, f, g, 0.1, reference).detach()
        entropy = plan * plan.log() - plan
        if reference == "product":
            product = a.unsqueeze(1) * b
            entropy = plan * (plan / product).log() - plan + product
        primal = (plan * cost).sum() + 0.1 * entropy.sum()
        for marginal, weights, rho in ((plan.sum(1), a, rho_a), (plan.sum(0), b, rho_b)):
            rho = torch.as_tensor(rho, dtype=torch.float64).expand(len(weights))
            divergence = marginal * (marginal / weights).log() - marginal + weights
            torch.testing.assert_close(marginal[rho == INF], weights[rho == INF], **EXACT)
            primal += (rho * divergence)[rho < INF].sum()
        assert dual.item() == pytest.approx(primal.item(), rel=1e-12)

    def test_balanced_plan_is_the_same_by_either_reference(self) -> None:
        cost, a, b = transport_problem()
        plans = [
            sinkhorn.plan(cost, a, b, *sinkhorn.sinkhorn(cost, a, b, 0.1, reference=reference), 0.1, reference)
            for reference in ("product", "counting")
        ]
        torch.testing.assert_close(*plans, **EXACT)

    @pytest.mark.parametrize("reference", ["product", "counting"])
    def test_batch_is_its_problems_one_by_one(self, reference) -> None:
        cost, a, b = transport_problem((2, 3))
        epsilon, rho = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64), b + 0.5
        f, g = sinkhorn.sinkhorn(cost, a, b, epsilon, rho_b=rho, reference=reference)
        values = sinkhorn.value(cost, a, b, f, g, epsilon, rho_b=rho, reference=reference)
        for i in itertools.product(range(2), range(3)):
            alone = sinkhorn.sinkhorn(cost[i], a[i], b[i], epsilon[i], rho_b=rho[i], reference=reference)
            assert_all_close((f[i], g[i]), alone)
            value = sinkhorn.value(cost[i], a[i], b[i], *alone, epsilon[i], rho_b=rho[i], reference=reference)
            torch.testing.assert_close(values[i], value, **EXACT)

    @pytest.mark.parametrize("reference", ["product", "counting"])
    def test_weights_of_zero_and_infinite_costs(self, reference) -> None:
        """Such a row or column is as good as absent; a forbidden pair has no part in the plan."""
        cost, a, b = transport_problem()
        a[1] = b[2] = b[3] = 0
        a, b = a / a.sum(), b / b.sum()
        cost[0, 0] = cost[3, 1] = INF
        plan, value = (
            function(cost, a, b, *sinkhorn.sinkhorn(cost, a, b, 0.1, reference=reference), 0.1, reference=reference)
            for function in (sinkhorn.plan, sinkhorn.value)
        )
        rows, columns = a.nonzero().squeeze(1), b.nonzero().squeeze(1)
        less = cost[rows][:, columns], a[rows], b[columns]
        potentials = sinkhorn.sinkhorn(*less, 0.1, reference=reference)
        assert (plan[1] == 0).all()
        assert (plan[:, 2:4] == 0).all()
        assert plan[0, 0] == plan[3, 1] == 0
        torch.testing.assert_close(plan[rows][:, columns], sinkhorn.plan(*less, *potentials, 0.1, reference), **EXACT)
        torch.testing.assert_close(value, sinkhorn.value(*less, *potentials, 0.1, reference=reference), **EXACT)

    @pytest.mark.parametrize("penalties", PENALTIES)
    def test_envelope_theorem(self, penalties) -> None:
        """Through all iterations the value's gradient is that at fixed potentials."""
        cost, a, b = transport_problem()
        cost.requires_grad_()
        f, g = sinkhorn.sinkhorn(cost, a, b, 0.1, *PENALTIES[penalties], max_iter=300)
        unrolled = torch.autograd.grad(sinkhorn.value(cost, a, b, f, g, 0.1, *PENALTIES[penalties]), cost)[0]
        plan = sinkhorn.plan(cost, a, b, f, g, 0.1).detach()
        torch.testing.assert_close(unrolled, plan, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
    def test_pairwise_cost(self, cost) -> None:
        x, y = logits_of((4, 3)), logits_of((5, 3))
        y[2] = x[1]
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        expected = {"sqeuclidean": distance**2, "euclidean": distance}.get(
            cost, 1 - torch.cosine_similarity(x.unsqueeze(1), y, dim=-1)
        )
        torch.testing.assert_close(sinkhorn.pairwise_cost(x, y, cost), expected, **EXACT)
        y[0] = 0
        _, *gradients = value_and_gradients(lambda *points: sinkhorn.pairwise_cost(*points, cost), x, y)
        assert all(gradient.isfinite().all() for gradient in gradients)


class TestPartialTransport:
    @pytest.mark.parametrize("number", range(2))
    def test_golden(self, number) -> None:
        golden = np.load(GOLDEN / f"ppot_{number}.npz")
        logits, similarity = (torch.from_numpy(golden[key]) for key in ("logits", "similarity"))
        problem = {
            name: golden[key].item() for name, key in (("mass", "rho"), ("gamma", "gamma"), ("epsilon", "epsilon"))
        }
        labels = partial_transport.progressive_partial_transport(logits, **problem)
        # The files' own scalings have been iterated to some 1e-7.
        torch.testing.assert_close(labels, torch.from_numpy(golden["ppot_plan_times_n"]).double(), rtol=0, atol=1e-7)
        labels = partial_transport.semantic_partial_transport(
            logits, similarity, semantic_weight=golden["mm_lambda"].item(), mm_iter=golden["mm_iters"].item(), **problem
        )
        torch.testing.assert_close(labels, torch.from_numpy(golden["sp2ot_plan_times_n"]), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("gamma", [0.5, INF])
    @pytest.mark.parametrize("mass", [0.3, 1.0])
    def test_iteration_without_logarithms(self, mass, gamma) -> None:
        """As it is written in the papers, without a factor that moves all scalings."""
        logits, epsilon = logits_of((20, 4)), 0.2
        prior = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)
        cost = torch.cat([-logits.log_softmax(1), torch.zeros(20, 1, dtype=torch.float64)], dim=1)
        shares = torch.empty_like(prior)
        for rank, column in enumerate(cost[:, :4].sum(0).argsort(descending=True).tolist()):
            shares[column] = prior.sort(descending=True).values[rank]
        targets = torch.cat([mass * shares, torch.tensor([1 - mass], dtype=torch.float64)])
        kernel, b = (-cost / epsilon).exp(), torch.ones(5, dtype=torch.float64)
        for _ in range(20000):
            a = 1 / 20 / (kernel @ b)
            b = targets / (kernel.mT @ a)
            b[:4] **= 1 / (1 + epsilon / gamma)
        plan = 20 * (a.unsqueeze(1) * kernel * b)[:, :4]
        labels = partial_transport.progressive_partial_transport(logits, mass, epsilon, gamma, prior)
        torch.testing.assert_close(labels, plan, rtol=1e-9, atol=1e-10)


class TestMongeGap:
    @pytest.mark.parametrize("number", range(3))
    def test_golden(self, number) -> None:
        golden = np.load(GOLDEN / f"monge_gap_{number}.npz")
        source, mapped = (torch.from_numpy(golden[key]).requires_grad_() for key in ("source", "mapped"))
        epsilon, cost = golden["epsilon"].item(), golden["cost"].item()
        gap = monge_gap.monge_gap(source, mapped, epsilon, cost, max_iter=5000)
        assert gap.item() == pytest.approx(golden["monge_gap"].item(), rel=1e-12)
        gap.backward()
        for points, key in ((source, "grad_source"), (mapped, "grad_mapped")):
            torch.testing.assert_close(points.grad, torch.from_numpy(golden[key]), rtol=0, atol=1e-8)
        costs = sinkhorn.pairwise_cost(source, mapped, cost).detach()
        displacement = costs.diagonal().mean().item()
        assert displacement - gap.item() == pytest.approx(golden["ent_reg_cost"].item(), rel=1e-12)
        # The dual is the primal: transport cost and entropy of the plan.
        f, g = monge_gap.potentials(costs, torch.tensor([epsilon], dtype=torch.float64), max_iter=5000, tol=1e-14)
        plan = ((f.unsqueeze(1) + g - costs) / epsilon).exp()
        primal = (plan * costs).sum() + epsilon * (plan * plan.log()).sum()
        assert displacement - gap.item() == pytest.approx(primal.item(), rel=1e-12)

    @pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
    def test_is_that_of_sinkhorn(self, cost) -> None:
        """Whose entropy is relative to the weights: 2 log n more."""
        source, mapped = (torch.randn(2, 7, 3, dtype=torch.float64) for _ in range(2))
        costs, epsilon = sinkhorn.pairwise_cost(source, mapped, cost), torch.tensor([0.3, 0.7], dtype=torch.float64)
        weights = torch.full((2, 7), 1 / 7, dtype=torch.float64)
        potentials = sinkhorn.sinkhorn(costs, weights, weights, epsilon, max_iter=5000)
        value = sinkhorn.value(costs, weights, weights, *potentials, epsilon) - 2 * epsilon * math.log(7)
        expected = costs.diagonal(dim1=1, dim2=2).mean(1) - value
        torch.testing.assert_close(monge_gap.monge_gap(source, mapped, epsilon, cost, max_iter=5000), expected, **EXACT)

    @pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
    def test_golden_default_epsilon(self, cost) -> None:
        golden = np.load(GOLDEN / "monge_gap_epsilons.npz")
        source, mapped = (torch.from_numpy(golden[key]) for key in ("source", "mapped"))
        epsilon = monge_gap.default_epsilon(monge_gap.pairwise_cost(source, mapped, cost)).item()
        assert epsilon == pytest.approx(golden[f"{cost}_std_epsilon"].item(), rel=1e-12)
        gap = monge_gap.monge_gap(source, mapped, cost=cost, max_iter=20_000, tol=1e-10)
        assert gap.item() == pytest.approx(golden[f"{cost}_std_monge_gap"].item(), rel=1e-9)

    def test_default_epsilon(self) -> None:
        costs = torch.rand(2, 3, 3, dtype=torch.float64)
        for each, epsilon in zip(costs, monge_gap.default_epsilon(costs), strict=True):
            assert epsilon.item() == pytest.approx(0.05 * np.std(each.numpy()), rel=1e-12)

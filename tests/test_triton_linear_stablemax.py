"""The Triton kernels of linear_stablemax_cross_entropy: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.reference import stablemax as reference
from tests.oracle import ROUNDOFF, assert_as_accurate, assert_runs_without_waiting_and_in_a_graph, relative_error

# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows, features, classes: one of each, primes, multiples of a tile, one more, one less.
SHAPES = [
    (1, 1, 1), (1, 1, 2), (3, 7, 2), (2, 130, 3), (5, 33, 31), (16, 16, 32), (32, 48, 96), (33, 17, 97), (37, 50, 70),
    (15, 24, 257), (67, 8, 5),
]  # fmt: skip
ids = lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None  # noqa: E731


@pytest.fixture
def kernels(triton_device: torch.device) -> Any:
    return importlib.import_module("pyreg.triton_kernels.linear_stablemax")


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    class_weight: Tensor | None = None


class Results(NamedTuple):
    """Losses of rows, and the gradients of their sum weighted by `upstream`."""

    loss: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None


def problem_like(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, **options: bool) -> Problem:
    n_rows, n_features, n_classes = shape
    random = lambda *size: torch.randn(size, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    labels = torch.randint(n_classes, (n_rows,))
    if options.get("ignored"):
        labels[1::3] = -1
    return Problem(
        random(n_rows, n_features),
        random(n_classes, n_features),
        random(n_classes) if options.get("bias") else None,
        labels.to(device),
        torch.linspace(0.5, 2.0, n_classes, device=device) if options.get("class_weight") else None,
    )


def upstream(problem: Problem) -> Tensor:
    return torch.linspace(0.5, 1.5, len(problem.labels), device=problem.labels.device)


def fused(kernels: Any, problem: Problem, chunks: int = 1) -> Results:
    x, weight, bias, labels, class_weight = problem
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = kernels.WeightGradient(weight)
    grad_bias = torch.zeros(len(weight), device=x.device)
    losses = []
    size = -(-len(x) // chunks)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        derivatives = kernels.new_derivatives(len(x[rows]), weight)
        loss, c, t = kernels.forward(x[rows], weight, bias, labels[rows], class_weight, derivatives)
        assert torch.equal(loss, kernels.forward(x[rows], weight, bias, labels[rows], class_weight).loss) or (
            loss.isnan().any()
        )
        c, t = (gradient * upstream(problem)[rows] for gradient in (c, t))
        kernels.input_gradient(derivatives, weight, labels[rows], c, t, grad_x[rows])
        grad_weight.add(derivatives, x[rows], labels[rows], c, t)
        kernels.add_bias_gradient(grad_bias, derivatives, labels[rows], c, t)
        losses.append(loss)
    bias_result = None if bias is None else grad_bias.to(bias.dtype)
    return Results(torch.cat(losses), grad_x, grad_weight.result(weight.dtype), bias_result)


def plain(problem: Problem, dtype: torch.dtype | None = None) -> Results:
    """PyTorch's own operators, in the problem's dtype or the one given."""
    dtype = dtype or problem.x.dtype
    leaves = [None if leaf is None else leaf.detach().to(dtype).requires_grad_() for leaf in problem[:3]]
    x, weight, bias = leaves
    class_weight = None if problem.class_weight is None else problem.class_weight.to(dtype)
    losses = reference.stablemax_cross_entropy(
        F.linear(x, weight, bias), problem.labels, class_weight, ignore_index=-1, reduction="none"
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = list(torch.autograd.grad(losses, wanted, upstream(problem).to(dtype)))
    return Results(losses.detach(), *gradients, *([None] * (3 - len(gradients))))


def assert_kernels_are_as_accurate(kernels: Any, problem: Problem, chunks: int = 1, floor: float = 4.0) -> None:
    actual, same_dtype, truth = fused(kernels, problem, chunks), plain(problem), plain(problem, torch.float64)
    for name, ours, theirs, exact in zip(Results._fields, actual, same_dtype, truth, strict=True):
        if exact is None:
            continue
        # Gradients that cancel to nothing (a single class) are held to a rounding of what cancels.
        if exact.norm() == 0:
            assert ours.abs().max() == 0, name
        else:
            assert_as_accurate(ours, theirs, exact, floor=floor)


# ---- right in every dtype ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("options", [(), ("bias",), ("bias", "class_weight", "ignored")], ids=lambda o: "-".join(o))
def test_against_plain_pytorch(
    kernels: Any, triton_device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, options: tuple[str, ...]
) -> None:
    problem = problem_like(shape, dtype, triton_device, **dict.fromkeys(options, True))
    assert_kernels_are_as_accurate(kernels, problem)
    if shape[0] > 2:
        assert_kernels_are_as_accurate(kernels, problem, chunks=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_another_truth(kernels: Any, triton_device: torch.device, dtype: torch.dtype) -> None:
    """stablemax(z) = softmax(sign(z) log1p |z|), in float64; the loss is in float32 whatever the inputs."""
    problem = problem_like((40, 30, 57), dtype, triton_device, bias=True)
    ours = fused(kernels, problem)
    leaves = [leaf.double().requires_grad_() for leaf in problem[:3]]
    z = F.linear(*leaves)
    losses = F.cross_entropy(z.sign() * z.abs().log1p(), problem.labels, reduction="none")
    truth = torch.autograd.grad(losses, leaves, upstream(problem).double())
    assert relative_error(ours.loss, losses.detach()) < 1e-6
    # Three roundings to the dtype: of E, of c x, of the result; products of float32 lose some more.
    limit = 3 * ROUNDOFF[dtype] + 8 * ROUNDOFF[torch.float32]
    for actual, exact in zip(ours[1:], truth, strict=True):
        assert relative_error(actual, exact) < limit


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("descriptors", [False, True])
def test_every_form_of_the_kernel(
    kernels: Any,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
    descriptors: bool,
) -> None:
    def choose(*_: Any) -> Any:
        if triton_device.type == "cpu":
            return kernels._EMULATED_TILES._replace(parts=parts, descriptors=descriptors)
        descriptors_here = descriptors and torch.cuda.get_device_capability()[0] >= 9
        return kernels.Tiles(64, 64, 32, parts=parts, warps=4, stages=2, descriptors=descriptors_here)

    monkeypatch.setattr(kernels, "_choose_tiles", choose)
    shapes = [(3, 8, 8), (37, 40, 72)] if triton_device.type == "cpu" else [(3, 8, 8), (37, 40, 72), (300, 136, 520)]
    for shape in shapes:
        for dtype in DTYPES:
            problem = problem_like(shape, dtype, triton_device, bias=shape[1] == 40)
            assert_kernels_are_as_accurate(kernels, problem)


def test_sums_of_a_chunk_alone_may_be_bfloat16(kernels: Any, triton_device: torch.device) -> None:
    x, weight, _, labels, _ = problem = problem_like((37, 50, 70), torch.bfloat16, triton_device)
    derivatives = kernels.new_derivatives(len(x), weight)
    _, c, t = kernels.forward(x, weight, None, labels, None, derivatives)
    gradient = kernels.WeightGradient(weight, torch.bfloat16)
    c, t = c * upstream(problem), t * upstream(problem)
    gradient.add(derivatives, x, labels, c, t)
    assert_as_accurate(gradient.result(weight.dtype), plain(problem).weight, plain(problem, torch.float64).weight)
    with pytest.raises(ValueError, match="takes one chunk"):
        gradient.add(derivatives, x, labels, c, t)
    with pytest.raises(TypeError, match=r"expected float32, or bfloat16 for a bfloat16 weight, got torch\.float16"):
        kernels.WeightGradient(weight.half(), torch.float16)


def test_a_factor_of_the_result(kernels: Any, triton_device: torch.device) -> None:
    for dtype in DTYPES:
        x, weight, _, labels, _ = problem_like((9, 20, 30), dtype, triton_device)
        derivatives = kernels.new_derivatives(len(x), weight)
        _, c, t = kernels.forward(x, weight, None, labels, None, derivatives)
        gradient = kernels.WeightGradient(weight)
        gradient.add(derivatives, x, labels, c, t)
        factor = torch.tensor(0.25, device=triton_device)
        torch.testing.assert_close(
            gradient.result(torch.float32, factor), 0.25 * gradient.result(torch.float32), rtol=1e-6, atol=0
        )


# ---- ranges ----


def uniform(z: float, dtype: torch.dtype, device: torch.device, n_classes: int, n_features: int = 2) -> Problem:
    """One row whose logits are all z < 0, as a product of sqrt(|z|)'s."""
    root = math.sqrt(-z / n_features)
    x = torch.full((1, n_features), root, dtype=dtype, device=device)
    weight = torch.full((n_classes, n_features), -root, dtype=dtype, device=device)
    return Problem(x, weight, None, torch.tensor([1], device=device))


@pytest.mark.parametrize(
    ("dtype", "z"),
    [(dtype, -(2.0**k)) for dtype in DTYPES for k in (1, 7, 15)]
    + [(dtype, -(2.0**k)) for dtype in DTYPES[:2] for k in (41, 61)],
)
def test_all_logits_far_below_zero(kernels: Any, triton_device: torch.device, dtype: torch.dtype, z: float) -> None:
    """L = log V; dL/dz = h / V at the others, -(1 - 1/V) h at the target, h = 1 / (1 - z)."""
    n_classes = 40
    problem = uniform(z, dtype, triton_device, n_classes)
    ours = fused(kernels, problem)
    slope = 1 / (1 - (problem.x.double() @ problem.weight.double().T)[0])
    share = torch.full((n_classes,), 1 / n_classes, dtype=torch.float64, device=triton_device)
    share[1] -= 1
    gradient = 0.5 * share * slope  # of the logits; upstream is 0.5
    assert ours.loss.item() == pytest.approx(math.log(n_classes), rel=1e-6, abs=0)
    limit = 4 * ROUNDOFF[dtype]
    assert relative_error(ours.weight, gradient[:, None] * problem.x.double()) < limit
    # Over all classes the gradient cancels to nothing; what is left is a rounding of what has cancelled.
    scale = (gradient.abs()[:, None] * problem.weight.double().abs()).sum(0)
    assert (ours.x.double().abs() < limit * scale).all()


@pytest.mark.parametrize(
    ("dtype", "exponent"), [*itertools.product(DTYPES, (4, 28)), *itertools.product(DTYPES[:2], (40, 56))]
)
def test_a_dominant_target(kernels: Any, triton_device: torch.device, dtype: torch.dtype, exponent: int) -> None:
    """One logit z, n zeros, S = 1 + z + n: L = log1p(n / (1 + z)), dL/dz = -n / (S (1 + z)), at the others 1 / S."""
    n, root = 113, 2.0 ** (exponent / 2)
    z = root * root
    x = torch.zeros(1, 8, dtype=dtype, device=triton_device)
    weight = torch.zeros(n + 1, 8, dtype=dtype, device=triton_device)
    x[0, 3] = root
    weight[5, 3], weight[6, 4] = root, 1.0
    derivatives = kernels.new_derivatives(1, weight)
    labels = torch.tensor([5], device=triton_device)
    loss, c, t = kernels.forward(x, weight, None, labels, None, derivatives)
    total = 1 + z + n
    assert loss.item() == pytest.approx(math.log1p(n / (1 + z)), rel=1e-6, abs=0)
    assert c.item() == pytest.approx(1 / total, rel=1e-6, abs=0)
    assert t.item() == pytest.approx(-n / (total * (1 + z)), rel=1e-6, abs=0)
    factor = z  # what upstream must bring for the gradients to be numbers of the dtype
    grad_x = torch.empty_like(x)
    kernels.input_gradient(derivatives, weight, labels, c * factor, t * factor, grad_x)
    grad_weight = kernels.WeightGradient(weight)
    grad_weight.add(derivatives, x, labels, c * factor, t * factor)
    close = {"rel": 4 * ROUNDOFF[dtype], "abs": 0}
    if dtype != torch.float16 or exponent < 20:
        assert grad_x[0, 3].item() == pytest.approx(-n * z / (total * (1 + z)) * root, **close)
    assert grad_x[0, 4].item() == pytest.approx(z / total, **close)
    exact = torch.full((n + 1,), z / total * root, dtype=torch.float64)
    exact[5] = -n * z / (total * (1 + z)) * root
    assert relative_error(grad_weight.result(torch.float32)[:, 3], exact) < 4 * ROUNDOFF[dtype]


def test_sums_beyond_the_largest_number(kernels: Any, triton_device: torch.device) -> None:
    """Finite logits whose row sum overflows float32; a tile's sum too."""
    n_classes = 300
    x = torch.tensor([[2.0**63], [2.0**63]], device=triton_device)
    weight = torch.full((n_classes, 1), 1.5 * 2.0**64, device=triton_device)
    weight[7] = -1.0
    z = 1.5 * 2.0**127
    labels = torch.tensor([3, 7], device=triton_device)
    loss, c, t = kernels.forward(x, weight, None, labels)
    low = math.log1p(2.0**63)
    expected = torch.tensor([math.log(n_classes - 1), math.log(n_classes - 1) + math.log(z) + low])
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(c.cpu(), torch.zeros(2), rtol=0, atol=2.0**-126)  # 1 / S is below the normal numbers
    assert t[1].item() == pytest.approx(-1 / (1 + 2.0**63), rel=1e-6, abs=0)


def test_float16_chunks_of_ever_larger_gradients(kernels: Any, triton_device: torch.device) -> None:
    """The scale of c x follows: 2^-20 to 2^20, and back."""
    shape = (8, 20, 30)
    problems = [problem_like(shape, torch.float16, triton_device) for _ in range(5)]
    weight = problems[0].weight
    gradient = kernels.WeightGradient(weight)
    truth = torch.zeros(weight.shape, dtype=torch.float64, device=triton_device)
    for problem, exponent in zip(problems, (-20, 0, 12, 20, -20), strict=True):
        problem = problem._replace(weight=weight)
        derivatives = kernels.new_derivatives(shape[0], weight)
        _, c, t = kernels.forward(problem.x, weight, None, problem.labels, None, derivatives)
        c, t = (gradient * upstream(problem) * 2.0**exponent for gradient in (c, t))
        gradient.add(derivatives, problem.x, problem.labels, c, t)
        truth += plain(problem, torch.float64).weight * 2.0**exponent
        assert relative_error(gradient.result(torch.float32), truth) < 2 * ROUNDOFF[torch.float16]


# ---- special values ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_classes(kernels: Any, triton_device: torch.device, dtype: torch.dtype) -> None:
    """A bias of -inf masks a class: all is as if it were not there."""
    problem = problem_like((6, 20, 70), dtype, triton_device, bias=True)
    masked = torch.arange(70, device=triton_device) % 3 == 1
    kept = (~masked).nonzero().squeeze(1)
    labels = torch.tensor([0, 2, 3, 69, 5, 6], device=triton_device)
    positions = torch.stack([(kept == label).nonzero()[0, 0] for label in labels])
    hidden = problem._replace(bias=problem.bias.masked_fill(masked, -INF), labels=labels)
    bare = problem._replace(weight=problem.weight[kept], bias=problem.bias[kept], labels=positions)
    ours, theirs = fused(kernels, hidden), fused(kernels, bare)
    close = {"rtol": 4 * ROUNDOFF[dtype], "atol": 4 * ROUNDOFF[dtype]}
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.x, theirs.x, **close)
    torch.testing.assert_close(ours.weight[kept], theirs.weight, **close)
    assert (ours.weight[masked] == 0).all()
    assert (ours.bias[masked] == 0).all()
    # A target that is masked is impossible; with all classes masked nothing is possible.
    impossible = hidden._replace(labels=torch.full_like(labels, 1))
    assert (kernels.forward(*impossible).loss == INF).all()
    nothing = hidden._replace(bias=torch.full_like(problem.bias, -INF))
    assert kernels.forward(*nothing).loss.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [math.nan, INF])
def test_nan_and_infinity_spread_to_their_row_alone(
    kernels: Any, triton_device: torch.device, dtype: torch.dtype, special: float
) -> None:
    problem = problem_like((5, 20, 40), dtype, triton_device)
    problem.x[2, 3] = special
    ours = fused(kernels, problem)
    assert ours.loss.isnan().tolist() == [False, False, True, False, False]
    assert ours.x.isnan().any(1).tolist() == [False, False, True, False, False]
    assert ours.weight.isnan().any()
    if special != special:  # one logit that is NaN, not the target's
        broken = problem_like((5, 20, 40), dtype, triton_device, bias=True)
        broken.labels.clamp_(max=30)
        broken.bias[35] = special
        assert kernels.forward(*broken).loss.isnan().all()
    # A row that does not count may hold anything.
    problem.labels[2] = -1
    ours = fused(kernels, problem)
    rest = torch.tensor([0, 1, 3, 4], device=triton_device)
    clean = problem._replace(x=problem.x.nan_to_num(0, 0, 0))
    expected = fused(kernels, clean)
    assert ours.loss[2].item() == 0
    assert (ours.x[2] == 0).all()
    torch.testing.assert_close(ours.loss[rest], expected.loss[rest], rtol=0, atol=0)
    torch.testing.assert_close(ours[1:3], expected[1:3], rtol=0, atol=0)


def test_labels_outside_the_classes_do_not_count(kernels: Any, triton_device: torch.device) -> None:
    problem = problem_like((6, 20, 40), torch.float32, triton_device, bias=True, class_weight=True)
    outside = torch.tensor([-1, -100, 40, 2**40 + 3, -(2**40), 7], device=triton_device)
    ours = fused(kernels, problem._replace(labels=outside))
    assert (ours.loss[:5] == 0).all()
    assert (ours.x[:5] == 0).all()
    ignored = torch.tensor([-1] * 5 + [7], device=triton_device)
    torch.testing.assert_close(ours, fused(kernels, problem._replace(labels=ignored)), rtol=0, atol=0)
    assert ours.loss[5] > 0


# ---- layouts, repetition ----


def test_no_rows(kernels: Any, triton_device: torch.device) -> None:
    problem = problem_like((0, 5, 7), torch.float32, triton_device)
    derivatives = kernels.new_derivatives(0, problem.weight)
    terms = kernels.forward(*problem, derivatives=derivatives)
    assert [term.shape for term in terms] == [(0,)] * 3
    gradient = kernels.WeightGradient(problem.weight)
    gradient.add(derivatives, problem.x, problem.labels, *terms[1:])
    assert (gradient.result(torch.float32) == 0).all()
    grad_bias = torch.zeros(7, device=triton_device)
    kernels.add_bias_gradient(grad_bias, derivatives, problem.labels, *terms[1:])
    assert (grad_bias == 0).all()
    kernels.input_gradient(derivatives, problem.weight, problem.labels, *terms[1:], torch.empty_like(problem.x))


def test_strides(kernels: Any, triton_device: torch.device) -> None:
    x, weight, bias, labels, _ = problem_like((20, 30, 40), torch.float32, triton_device, bias=True)
    expected = fused(kernels, Problem(x, weight, bias, labels))
    wide = torch.full((20, 37), math.nan, device=triton_device)
    wide[:, 3:33] = x
    tall = torch.full((80, 30), math.nan, device=triton_device)
    tall[::2] = weight
    for same_x in (wide[:, 3:33], x.T.contiguous().T):
        for same_weight in (tall[::2], weight.T.contiguous().T):
            ours = fused(kernels, Problem(same_x, same_weight, bias, labels))
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    spread = lambda vector: torch.stack([vector, torch.zeros_like(vector)], 1)[:, 0]  # noqa: E731
    class_weight = torch.linspace(1, 2, 40, device=triton_device)
    torch.testing.assert_close(
        fused(kernels, Problem(x, weight, spread(bias), spread(labels), spread(class_weight))),
        fused(kernels, Problem(x, weight, bias, labels, class_weight)),
        rtol=0,
        atol=0,
    )
    derivatives = kernels.new_derivatives(20, weight)
    _, c, t = kernels.forward(x, weight, bias, labels, None, derivatives)
    gradients = []
    for vectors in [(labels, c, t), tuple(map(spread, (labels, c, t)))]:
        grad_x, grad_weight = torch.empty_like(x), kernels.WeightGradient(weight)
        kernels.input_gradient(derivatives, weight, *vectors, grad_x)
        grad_weight.add(derivatives, x, *vectors)
        grad_bias = torch.zeros(40, device=triton_device)
        kernels.add_bias_gradient(grad_bias, derivatives, *vectors)
        gradients.append([grad_x, grad_weight.result(x.dtype), grad_bias])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    row = x[:1].expand(20, 30)
    torch.testing.assert_close(
        fused(kernels, Problem(row, weight, bias, labels)),
        fused(kernels, Problem(row.contiguous(), weight, bias, labels)),
        rtol=0,
        atol=0,
    )


def test_derivatives_start_rows_on_16_bytes(kernels: Any, triton_device: torch.device) -> None:
    for dtype in DTYPES:
        derivatives = kernels.new_derivatives(3, torch.empty(50257, 1, dtype=dtype, device=triton_device))
        assert derivatives.shape == (3, 50257)
        assert derivatives.stride(0) * derivatives.element_size() % 16 == 0
        assert derivatives.stride(0) - 50257 < 8


def test_the_same_bits_on_every_run(kernels: Any, triton_device: torch.device) -> None:
    for dtype in DTYPES:
        problem = problem_like((40, 20, 70), dtype, triton_device, bias=True)
        problem.labels[::2] = 3
        first = fused(kernels, problem, chunks=2)
        for _ in range(2):
            torch.testing.assert_close(fused(kernels, problem, chunks=2), first, rtol=0, atol=0)


def test_float32_products_follow_torch(kernels: Any) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in [("highest", "ieee"), ("high", "tf32")]:
            torch.set_float32_matmul_precision(setting)
            assert kernels.product_precision(torch.float32) == expected
            assert kernels.product_precision(torch.bfloat16) == kernels.product_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
@pytest.mark.parametrize("kind", ["16 bits", "tf32"])
def test_every_gpu_has_tiles(kernels: Any, capability: tuple[int, int], kind: str) -> None:
    tiles = kernels._TILES[kernels._family(*capability), kind]
    element = 2 if kind == "16 bits" else 4
    staged = (tiles.stages - 1) * (tiles.rows + tiles.classes) * tiles.features * element
    limit = {8: 163 if capability[1] in (0, 7) else 99, 9: 227, 10: 227, 12: 99}[capability[0]]
    assert staged <= limit * 1024
    assert not tiles.descriptors or capability[0] >= 9


# ---- on a GPU alone ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_without_waiting_and_in_a_graph(kernels: Any, triton_device: torch.device, dtype: torch.dtype) -> None:
    if triton_device.type != "cuda":
        pytest.skip("needs a GPU")
    problem = problem_like((70, 64, 200), dtype, triton_device, bias=True)
    x, weight, bias, labels, _ = problem

    def step() -> list[Tensor]:
        derivatives = kernels.new_derivatives(len(x), weight)
        loss, c, t = kernels.forward(x, weight, bias, labels, None, derivatives)
        grad_x = torch.empty_like(x)
        kernels.input_gradient(derivatives, weight, labels, c, t, grad_x)
        grad_weight = kernels.WeightGradient(weight)
        for _ in range(2):
            grad_weight.add(derivatives, x, labels, c, t)
        grad_bias = torch.zeros(len(weight), device=triton_device)
        kernels.add_bias_gradient(grad_bias, derivatives, labels, c, t)
        return [loss, grad_x, grad_weight.result(dtype), grad_bias]

    assert_runs_without_waiting_and_in_a_graph(step)


@pytest.mark.large
def test_more_logits_than_32_bits_count(kernels: Any, triton_device: torch.device) -> None:
    shape = (40_000, 16, 60_000)
    problem = problem_like(shape, torch.bfloat16, triton_device)
    x, weight, _, labels, _ = problem
    derivatives = kernels.new_derivatives(shape[0], weight)
    loss, c, t = kernels.forward(x, weight, None, labels, None, derivatives)
    grad_x = torch.empty_like(x)
    kernels.input_gradient(derivatives, weight, labels, c, t, grad_x)
    last = slice(shape[0] - 50, None)
    few = problem._replace(x=x[last], labels=labels[last])
    truth = plain(few, torch.float64)
    assert relative_error(loss[last], truth.loss) < 1e-5
    exact = truth.x / upstream(few).double()[:, None]
    assert relative_error(grad_x[last], exact) < 4 * ROUNDOFF[torch.bfloat16]

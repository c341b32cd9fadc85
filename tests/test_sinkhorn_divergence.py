"""The Sinkhorn divergence: against golden files, its reference, closed forms and laws; gradients to second order."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from bench import memory
from pyreg.functional import sinkhorn_divergence, sinkhorn_points
from pyreg.ops import _pairwise_cost
from pyreg.reference import sinkhorn as reference_of_sinkhorn
from pyreg.reference import sinkhorn_divergence as reference
from pyreg.transport import ConvergenceWarning
from tests.oracle import ROUNDOFF, relative_error

GOLDEN = Path(__file__).parent / "golden"
DOUBLE = torch.float64
CONVERGED: dict[str, Any] = {"tol": 1e-13, "max_iter": 20000}
pytestmark = [
    pytest.mark.filterwarnings("error::pyreg.transport.ConvergenceWarning"),
    pytest.mark.not_emulated,
]
COSTS = _pairwise_cost.COSTS


def weights_of(*shape: int) -> Tensor:
    weights = torch.rand(*shape, dtype=DOUBLE) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def clouds(*batch: int, n: int = 6, m: int = 7, d: int = 3) -> tuple[Tensor, ...]:
    x, y = torch.rand(*batch, n, d, dtype=DOUBLE), torch.rand(*batch, m, d, dtype=DOUBLE) + 0.2
    return x, y, weights_of(*batch, n), weights_of(*batch, m)


def gradients(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def expected(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, epsilon: float, rho: float = math.inf) -> Tensor:
    def of(x: Tensor, y: Tensor) -> Tensor:
        return reference_of_sinkhorn.pairwise_cost(x, y, cost)

    return reference.sinkhorn_divergence(x, y, a, b, of, epsilon, rho)


# ---- right ----


@pytest.mark.parametrize("number", range(2))
def test_golden(device: torch.device, number: int) -> None:
    golden = np.load(GOLDEN / f"sinkhorn_divergence_{number}.npz")
    x, y = (torch.from_numpy(golden[key]).to(device).requires_grad_() for key in "xy")
    epsilon, cost = golden["epsilon"].item(), golden["cost"].item()
    divergence = sinkhorn_divergence(x, y, cost=cost, epsilon=epsilon, **CONVERGED)
    assert divergence.item() == pytest.approx(golden["divergence"].item(), rel=1e-10)
    divergence.backward()
    for points, key in ((x, "grad_x"), (y, "grad_y")):
        torch.testing.assert_close(points.grad.cpu(), torch.from_numpy(golden[key]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rho", [None, 0.6])
@pytest.mark.parametrize("cost", COSTS)
def test_against_reference(device: torch.device, cost: str, rho: float | None) -> None:
    x, y, a, b = clouds(2)
    if rho is not None:
        b = 1.4 * b
    penalty = math.inf if rho is None else rho
    truth = expected(x, y, a, b, cost, 0.1, penalty)
    of_truth = gradients(lambda *tensors: expected(*tensors, cost, 0.1, penalty), x, y, a, b)
    options = {"cost": cost, "epsilon": 0.1, "rho": rho, **CONVERGED}
    there = [tensor.to(device) for tensor in (x, y, a, b)]
    torch.testing.assert_close(sinkhorn_divergence(*there, **options).cpu(), truth, rtol=1e-10, atol=1e-12)
    found = gradients(lambda *tensors: sinkhorn_divergence(*tensors, **options), *there)
    for index, (one, other) in enumerate(zip(found, of_truth, strict=True)):
        one, other = one.cpu(), other
        if index >= 2 and rho is None:  # by weights of equal sums: up to a constant between a and b
            one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_as_three_problems() -> None:
    """Other algebra: the values of sinkhorn_points, whose iteration alternates."""
    for rho in (None, 0.4):
        x, y, a, b = clouds(n=30, m=40)
        options = {"epsilon": 0.05, **CONVERGED}

        def value(
            x: Tensor, y: Tensor, a: Tensor, b: Tensor, rho: float | None = rho, options: Any = options
        ) -> Tensor:
            return sinkhorn_points(x, y, a, b, rho_a=rho, rho_b=rho, **options).value

        masses = 0.05 / 2 * (a.sum() - b.sum()).square()
        truth = value(x, y, a, b) - value(x, x, a, a) / 2 - value(y, y, b, b) / 2 + masses
        torch.testing.assert_close(sinkhorn_divergence(x, y, a, b, rho=rho, **options), truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rho", [None, 0.4])
def test_cost_of_a_function(device: torch.device, rho: float | None) -> None:
    x, y, a, b = (tensor.to(device) for tensor in clouds(2))

    def squares(x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)

    for weights in ((), (a, b)):
        for options in ({"epsilon": 0.1}, {"relative_epsilon": 0.2}):

            def divergence(x: Tensor, y: Tensor, cost: Any, weights: Any = weights, options: Any = options) -> Tensor:
                return sinkhorn_divergence(x, y, *weights, cost=cost, rho=rho, **options, **CONVERGED)

            expected = divergence(x, y, "sqeuclidean")
            torch.testing.assert_close(divergence(x, y, squares), expected, rtol=1e-9, atol=1e-11)
            if "epsilon" in options:  # a share of the mean is a constant in one gradient and in the other
                ours = gradients(lambda x, y, f=divergence: f(x, y, squares), x, y)
                theirs = gradients(lambda x, y, f=divergence: f(x, y, "sqeuclidean"), x, y)
                torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_gaussians() -> None:
    """Of Gaussians of one covariance: |m_x - m_y|^2, whatever epsilon. Samples shifted against each other are so, too:
    the plan between them is that of the samples with themselves."""
    x = torch.randn(200, 3, dtype=DOUBLE)
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=DOUBLE)
    for epsilon in (1.0, 4.0):
        divergence = sinkhorn_divergence(x, x + shift, epsilon=epsilon, tol=1e-8, max_iter=20000)
        assert divergence.item() == pytest.approx(shift.square().sum().item(), rel=1e-6)


def test_far_epsilon_is_a_distance_of_means() -> None:
    """As epsilon grows the divergence of squared distances becomes |mean x - mean y|^2."""
    x, y, a, b = clouds(n=40, m=30)
    means = ((a.unsqueeze(1) * x).sum(0) - (b.unsqueeze(1) * y).sum(0)).square().sum()
    divergence = sinkhorn_divergence(x, y, a, b, epsilon=1e4, tol=1e-13)
    assert divergence.item() == pytest.approx(means.item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    """Against float64 on the same points; plain PyTorch in the dtype that is computed in loses as much."""
    x, y = (points.to(dtype) for points in clouds(n=60, m=50)[:2])
    truth = sinkhorn_divergence(x.double(), y.double(), epsilon=0.1, **CONVERGED)
    of_truth = gradients(lambda *t: sinkhorn_divergence(*t, epsilon=0.1, **CONVERGED), x.double(), y.double())
    compute = DOUBLE if dtype == DOUBLE else torch.float32
    options = {"epsilon": 0.1, "tol": 1e-12 if dtype == DOUBLE else 1e-6, "max_iter": 20000}
    there = x.to(device), y.to(device)
    actual = sinkhorn_divergence(*there, **options)
    assert actual.dtype == compute
    a, b = (torch.full((len(points),), 1 / len(points), dtype=compute) for points in (x, y))
    plain = reference.sinkhorn_divergence(
        x.to(compute), y.to(compute), a, b, lambda x, y: torch.cdist(x, y).square(), 0.1, tol=1e-6
    )
    # The divergence is what is left of values twenty times as large: a rounding of those is as good as twenty of it.
    floor = 64 * ROUNDOFF[compute] + (1e-6 if compute != DOUBLE else 1e-12)
    assert relative_error(actual, truth) <= 2 * relative_error(plain, truth) + floor
    found = gradients(lambda *tensors: sinkhorn_divergence(*tensors, **options), *there)
    for one, other in zip(found, of_truth, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) <= 2 * ROUNDOFF[dtype] + (1e-5 if dtype != DOUBLE else 1e-10)


# ---- laws ----


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["sqeuclidean", "euclidean"]),
    st.sampled_from([0.2, 0.5, 2.0]),
    st.sampled_from([None, 0.5]),
)
def test_never_negative_and_zero_at_itself(
    seed: int, n: int, m: int, cost: str, epsilon: float, rho: float | None
) -> None:
    torch.manual_seed(seed)
    x, y, a, b = clouds(n=n, m=m, d=2)
    options = {"cost": cost, "epsilon": epsilon, "rho": rho, "tol": 1e-10, "max_iter": 100000}
    between, back = sinkhorn_divergence(x, y, a, b, **options), sinkhorn_divergence(y, x, b, a, **options)
    assert between.item() >= -1e-9
    assert between.item() == pytest.approx(back.item(), rel=1e-7, abs=1e-9)
    order = torch.randperm(n)
    assert abs(sinkhorn_divergence(x, x[order], a, a[order], **options).item()) <= 1e-9
    (by_x,) = gradients(lambda z: sinkhorn_divergence(z, x, a, a, **options), x)
    assert by_x.abs().max().item() <= 1e-6


def test_scale() -> None:
    """Costs, epsilon and divergence of points twice as far apart: four times as large."""
    x, y, a, b = clouds()
    once = sinkhorn_divergence(x, y, a, b, epsilon=0.1, **CONVERGED)
    twice = sinkhorn_divergence(2 * x, 2 * y, a, b, epsilon=0.4, **CONVERGED)
    torch.testing.assert_close(twice, 4 * once, rtol=1e-9, atol=1e-12)


# ---- problems together ----


@pytest.mark.parametrize("rho", [None, 0.5])
def test_batched_and_ragged_equal_looped(device: torch.device, rho: float | None) -> None:
    x, y, a, b = (tensor.to(device) for tensor in clouds(3, n=5, m=5))
    options = {"rho": rho, **CONVERGED}
    epsilon = torch.tensor([0.1, 0.3, 1.0], dtype=DOUBLE, device=device)
    batched = sinkhorn_divergence(x, y, a, b, epsilon=epsilon, **options)
    for k in range(3):
        alone = sinkhorn_divergence(x[k], y[k], a[k], b[k], epsilon=epsilon[k].item(), **options)
        torch.testing.assert_close(batched[k], alone, rtol=1e-10, atol=1e-12)
    n, m = [3, 1, 6], [4, 5, 2]
    offsets = [[0, *itertools.accumulate(sizes)] for sizes in (n, m)]
    x, y = torch.randn(10, 2, dtype=DOUBLE, device=device), torch.randn(11, 2, dtype=DOUBLE, device=device)
    where = {"x_offsets": offsets[0], "y_offsets": offsets[1]}
    ragged = sinkhorn_divergence(x, y, epsilon=0.5, **where, **options)
    by_x, by_y = gradients(lambda x, y: sinkhorn_divergence(x, y, epsilon=0.5, **where, **options), x, y)
    for k in range(3):
        i, j = (slice(*bounds[k : k + 2]) for bounds in offsets)
        torch.testing.assert_close(
            ragged[k], sinkhorn_divergence(x[i], y[j], epsilon=0.5, **options), rtol=1e-10, atol=1e-11
        )
        for found, alone, part in zip(
            (by_x, by_y),
            gradients(lambda x, y: sinkhorn_divergence(x, y, epsilon=0.5, **options), x[i], y[j]),
            (i, j),
            strict=True,
        ):
            torch.testing.assert_close(found[part], alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 17, 4), (31, 2, 1), (127, 131, 5), (40, 40, 70)], ids=str)
def test_sizes(device: torch.device, n: int, m: int, d: int) -> None:
    x, y, a, b = clouds(n=n, m=m, d=d)
    epsilon = 0.1 * d
    truth = expected(x, y, a, b, "sqeuclidean", epsilon)
    strided = torch.stack([x, x], 2)[..., 0].to(device)
    found = sinkhorn_divergence(strided, y.to(device), a.to(device), b.to(device), epsilon=epsilon, **CONVERGED)
    torch.testing.assert_close(found.cpu(), truth, rtol=1e-9, atol=1e-11)


def test_no_problems() -> None:
    x, y = torch.rand(0, 4, 2, requires_grad=True), torch.rand(0, 5, 2)
    divergence = sinkhorn_divergence(x, y, epsilon=0.1)
    assert divergence.shape == (0,)
    divergence.sum().backward()
    assert x.grad.shape == x.shape


def test_weights_of_zero_are_absent(device: torch.device) -> None:
    x, y, a, b = (tensor.to(device) for tensor in clouds(n=12, m=9))
    a[[1, 5]], b[3] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    there = a > 0, b > 0
    options = {"epsilon": 0.1, **CONVERGED}
    present = [x[there[0]], y[there[1]], a[there[0]], b[there[1]]]
    torch.testing.assert_close(
        sinkhorn_divergence(x, y, a, b, **options), sinkhorn_divergence(*present, **options), rtol=1e-10, atol=1e-12
    )
    by_x, by_y = gradients(lambda x, y: sinkhorn_divergence(x, y, a, b, **options), x, y)
    assert by_x[~there[0]].abs().max() == 0
    assert by_y[~there[1]].abs().max() == 0


@pytest.mark.large
@pytest.mark.cpu_only
def test_memory(device: torch.device) -> None:
    """6000 x 6000 costs would be 144 MB."""
    x, y = torch.rand(6000, 3, requires_grad=True), torch.rand(6000, 3, requires_grad=True)

    def call() -> None:
        sinkhorn_divergence(x, y, epsilon=0.5, tol=1e-2, max_iter=20).backward()

    call()
    if not memory._reset_peak_resident():
        pytest.skip("the peak of resident memory cannot be reset")
    assert memory._resident(call) <= 48 << 20


# ---- gradients ----


@pytest.mark.parametrize("rho", [None, 0.6])
@pytest.mark.parametrize("cost", COSTS)
def test_first_and_second_order(cost: str, rho: float | None) -> None:
    x, y, a, b = clouds(n=4, m=5, d=2)

    def function(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = a / a.sum(), b / b.sum()
        return sinkhorn_divergence(x, y, a, b, cost=cost, epsilon=0.3, rho=rho, **CONVERGED)

    leaves = [tensor.requires_grad_() for tensor in (x, y, a, b)]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-6)


# ---- a citizen of torch ----


def test_compile() -> None:
    x, y = torch.rand(20, 3, dtype=DOUBLE), torch.rand(21, 3, dtype=DOUBLE)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, epsilon=0.1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), function(x, y), rtol=0, atol=0)
    for one, other in zip(gradients(compiled, x, y), gradients(function, x, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_torch_func() -> None:
    x, y, _, _ = clouds(3)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, epsilon=0.2, **CONVERGED)

    batched = torch.func.vmap(function)(x, y)
    torch.testing.assert_close(batched, function(x, y), rtol=1e-10, atol=1e-12)
    each = torch.func.vmap(torch.func.grad(function))(x, y)
    torch.testing.assert_close(each, gradients(function, x, y)[0], rtol=1e-8, atol=1e-10)


def test_opcheck() -> None:
    x, _, a, _ = clouds(2)
    epsilon = torch.full((2,), 0.2, dtype=DOUBLE)
    rho = torch.full_like(a, 0.5)
    for penalty in (None, rho):
        options = (penalty, epsilon, epsilon, 0.5, 0, 100, 1e-9, None)
        opcheck(torch.ops.pyreg.sinkhorn_self_potentials.default, (x.requires_grad_(), a.requires_grad_(), *options))
        f = torch.rand_like(a)
        opcheck(torch.ops.pyreg.sinkhorn_self_value.default, (x, a, f, penalty, epsilon, 0))


def test_autocast_changes_nothing() -> None:
    x, y, _, _ = clouds()
    expected = sinkhorn_divergence(x, y, epsilon=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sinkhorn_divergence(x, y, epsilon=0.1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_arguments_are_left_alone() -> None:
    tensors = clouds()
    copies = [tensor.clone() for tensor in tensors]
    sinkhorn_divergence(*(tensor.requires_grad_() for tensor in tensors), epsilon=0.1).backward()
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0)


# ---- hard to misuse ----


def test_warning() -> None:
    x, y, _, _ = clouds(n=30, m=30)
    with pytest.warns(ConvergenceWarning, match=r"sinkhorn_divergence: the iteration has not converged: after 3 iter"):
        sinkhorn_divergence(x, y, epsilon=1e-3, max_iter=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        sinkhorn_divergence(x, y, epsilon=1e-3, max_iter=3, tol=0)


X, Y = torch.rand(5, 2), torch.rand(6, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((X, Y), {}, ValueError, "sinkhorn_divergence: expected either epsilon or relative_epsilon, got neither"),
        ((X, Y), {"epsilon": -1.0}, ValueError, "sinkhorn_divergence: expected epsilon to be a finite number > 0"),
        ((X, Y), {"epsilon": 0.1, "rho": 0}, ValueError, "expected rho to be a number above 0, inf or None, got 0"),
        ((X, Y), {"epsilon": 0.1, "rho": X}, ValueError, "expected rho to be a number above 0, inf or None"),
        ((X, Y), {"epsilon": 0.1, "cost": "l2"}, ValueError, "sinkhorn_divergence: expected cost to be 'sqeuclidean'"),
        ((X, Y[:, :1]), {"epsilon": 0.1}, ValueError, "with the same batch and dimension, got"),
        ((X[0], Y), {"epsilon": 0.1}, ValueError, "expected x of shape"),
        ((X, Y.double()), {"epsilon": 0.1}, TypeError, "expected y of the dtype of x"),
        ((X, Y, X[:, 0]), {"epsilon": 0.1}, ValueError, "sinkhorn_divergence: expected a and b of equal sums"),
        ((X, Y, -X[:, 0]), {"epsilon": 0.1}, ValueError, "expected a to be at least 0"),
        ((X / 0, Y), {"epsilon": 0.1}, ValueError, "expected finite numbers in x"),
        ((X, Y), {"epsilon": 0.1, "max_iter": 0}, ValueError, "expected max_iter to be an integer >= 1"),
        ((X, Y), {"epsilon": 0.1, "x_offsets": [0, 5]}, ValueError, "x_offsets and y_offsets together"),
        ((X, Y), {"epsilon": 0.1, "cost": torch.cdist, "streaming": True}, ValueError, "whose costs are held"),
        ((X, Y), {"epsilon": 0.1, "cost": lambda x, y: x}, ValueError, "expected cost to return costs of shape"),
        ((X, Y), {"epsilon": 0.1, "streaming": 1}, TypeError, "expected streaming to be True, False or None"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sinkhorn_divergence(*arguments, **options)

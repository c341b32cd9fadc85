"""The symmetric iteration's kernels: against plain PyTorch in float64, and slopes against autograd through it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from pyreg.ops import _pairwise_cost
from pyreg.ops import _symmetric_sinkhorn as operators
from tests.oracle import ROUNDOFF, relative_error

INF = math.inf
DOUBLE, SINGLE = torch.float64, torch.float32

# No dimension is a multiple of a vector, a panel or a block; the last ones are shared by threads.
SHAPES = [(1, 1, 1), (7, 5, 2), (37, 53, 3), (129, 200, 5), (280, 250, 17)]
FALLING = [2.0, 1.0, 0.5, 0.25, 0.1, 0.05]

# Potentials are of the size of costs, here up to 3, found through log-sums of some hundred terms; in float32 exponents
# of some 60 have lost as many roundings, of which the logarithm keeps one part in 1 / eps.
CLOSE = {DOUBLE: 1e-11, SINGLE: 64 * ROUNDOFF[SINGLE]}


def clouds(n: int, m: int, d: int, cost: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    x, y = torch.rand(batch, n, d, dtype=dtype), torch.rand(batch, m, d, dtype=dtype) + 0.1
    if cost == 2:
        x, y = _pairwise_cost.units(x), _pairwise_cost.units(y)
    a, b = torch.rand(batch, n, dtype=DOUBLE) + 0.1, torch.rand(batch, m, dtype=DOUBLE) + 0.1
    if n > 5:
        a[:, 3], b[:, 2] = 0, 0
    return x, y, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return
    torch.testing.assert_close(actual, expected, rtol=0, atol=CLOSE[dtype] * max(expected.abs().max().item(), 1.0))


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("cost", range(3), ids=_pairwise_cost.COSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_falling_epsilons(shape: tuple[int, int, int], cost: int, dtype: torch.dtype) -> None:
    for rho, with_self in itertools.product((INF, 0.5), (True, False)):
        x, y, a, b = clouds(*shape, cost, dtype)
        options = (cost, 1e-8, a, b, FALLING, rho, with_self)
        actual = operators.symmetric_sinkhorn(x, y, *options, False, False)
        expected = operators.plain(x.double(), y.double(), *options)
        for one, other in zip(actual, expected, strict=True):
            assert_near(one, other.to(one.dtype), dtype)


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("epsilons", [[5.0, 1e-3, 1e-3], [1e-4], [10.0, 1e-6]], ids=str)
def test_sums_that_are_lost_are_found_again(epsilons: list[float], dtype: torch.dtype) -> None:
    """Epsilon falls so fast that exponentials leave the numbers."""
    for shape in ((37, 53, 3), (129, 200, 5)):
        x, y, a, b = clouds(*shape, 0, dtype)
        options = (0, 0.0, a, b, epsilons, INF, True)
        actual = operators.symmetric_sinkhorn(x, y, *options, False, False)
        expected = operators.plain(x.double(), y.double(), *options)
        for one, other in zip(actual[:8], expected[:8], strict=True):
            assert_near(one, other, dtype)


def expected_slopes(x: Tensor, y: Tensor, g: Tensor, b: Tensor, cost: int, epsilon: float) -> Tensor:
    """Of ``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, by autograd."""
    x, y = x.detach().clone().double().requires_grad_(), y.double()
    costs = _pairwise_cost.cost_of_computed(x, y, cost)
    softmin = -epsilon * (b.log().unsqueeze(1) + (g.unsqueeze(1) - costs) / epsilon).logsumexp(2)
    return torch.autograd.grad(softmin.sum(), x)[0]


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("cost", range(3), ids=_pairwise_cost.COSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epsilons", [FALLING, [3.0, 1e-3]], ids=["falling", "lost sums"])
def test_slopes(epsilons: list[float], shape: tuple[int, int, int], cost: int, dtype: torch.dtype) -> None:
    x, y, a, b = clouds(*shape, cost, dtype)
    found = operators.symmetric_sinkhorn(x, y, cost, 0.0, a, b, epsilons, INF, True, True, True)
    f, g, f_self, g_self, *_ = found
    expected = [
        expected_slopes(*problem, cost, epsilons[-1])
        for problem in ((x, y, g, b), (y, x, f, a), (x, x, f_self, a), (y, y, g_self, b))
    ]
    # Weights of float32 carry the roundings of exponents, of which there are up to 1 / eps.
    tolerance = {DOUBLE: 1e-9, SINGLE: 8 * ROUNDOFF[SINGLE] / min(epsilons[-1], 1e-1)}[dtype]
    for slope, truth in zip(found[8:], expected, strict=True):
        assert slope.dtype == dtype
        if truth.abs().max() > 0:
            assert relative_error(slope, truth) < tolerance
        else:
            assert slope.abs().max() == 0


def test_slopes_that_were_not_asked_for_are_empty() -> None:
    x, y, a, b = clouds(30, 20, 5, 0, SINGLE)
    for need_x, need_y in itertools.product((False, True), (False, True)):
        slopes = operators.symmetric_sinkhorn(x, y, 0, 0.0, a, b, FALLING, INF, True, need_x, need_y)[8:]
        assert [slope.numel() > 0 for slope in slopes] == [need_x, need_y, need_x, need_y]


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("cost", range(3), ids=_pairwise_cost.COSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_points_with_themselves(shape: tuple[int, int, int], cost: int, dtype: torch.dtype) -> None:
    """The fixed point, from wherever epsilon begins."""
    x, _, a, _ = clouds(*shape, cost, dtype)
    epsilon = torch.tensor([0.02, 0.5], dtype=DOUBLE)
    for rho, first in itertools.product((None, torch.full_like(a, 0.7)), (epsilon, torch.full_like(epsilon, 2.0))):
        f, error, iterations = operators.symmetric_sinkhorn_self(x, cost, a, rho, epsilon, first, 0.5, 200, 1e-6)
        assert (error <= 1e-6).all()
        assert (iterations < 40).all()  # the error is halved at least, from 1 down to 1e-6, and epsilon seven times
        exact, *_ = operators.plain_self(x.double(), cost, a, rho, epsilon, epsilon, 0.5, 500, 1e-14)
        # The error is a sum over weights of the potentials' steps by epsilon, each of which is halved then.
        atol = (epsilon * 1e-6 / 2 / a[a > 0].min()).amax().item() + CLOSE[dtype]
        torch.testing.assert_close(f[a > 0], exact[a > 0], rtol=0, atol=atol)


@pytest.mark.parametrize("tol", [1e-6, 0.0])
def test_as_many_iterations_as_by_torch(tol: float) -> None:
    x, _, a, _ = clouds(37, 53, 3, 0, DOUBLE, batch=3)
    epsilon = torch.tensor([0.02, 0.1, 0.5], dtype=DOUBLE)
    options = (0, a, None, epsilon, 4 * epsilon, 0.5, 30, tol)
    actual, expected = operators.symmetric_sinkhorn_self(x, *options), operators.plain_self(x, *options)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-13)
    torch.testing.assert_close(actual[2], expected[2])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("d", [2, 6])
def test_the_same_bits(threads: None, d: int) -> None:
    """On every run, with any number of threads, alone and in a batch."""
    x, y, a, b = clouds(330, 290, d, 0, SINGLE, batch=3)

    def run(problems: slice) -> list[Tensor]:
        cut = (x[problems], y[problems], 0, 0.0, a[problems], b[problems], FALLING, INF, True, True, True)
        own = (x[problems], 0, a[problems], None, *(torch.full((len(x[problems]),), 0.1, dtype=DOUBLE),) * 2, 0.5, 50)
        return [*operators.symmetric_sinkhorn(*cut), *operators.symmetric_sinkhorn_self(*own, 1e-7)]

    whole = run(slice(0, 3))
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for again, first in zip(run(slice(0, 3)), whole, strict=True):
            torch.testing.assert_close(again, first, rtol=0, atol=0)
    for alone, first in zip(run(slice(1, 2)), whole, strict=True):
        torch.testing.assert_close(alone, first[1:2], rtol=0, atol=0)


def test_costs_that_are_too_many_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """9000 x 9000 of four dimensions: costs are formed anew; potentials as of a tenth of the points, ten times each."""
    x, y, a, b = clouds(900, 900, 4, 0, SINGLE, batch=1)
    times = [points.repeat_interleave(10, 1) for points in (x, y)]
    weights = [w.repeat_interleave(10, 1) / 10 for w in (a, b)]
    options = ([2.0, 0.5], INF, False)
    few = operators.symmetric_sinkhorn(x, y, 0, 0.0, a, b, *options, True, True)
    many = operators.symmetric_sinkhorn(*times, 0, 0.0, *weights, *options, True, True)
    assert_near(many[4][:, ::10], few[4], SINGLE)
    assert_near(many[5][:, ::10], few[5], SINGLE)
    assert all(slope.numel() == 0 for slope in many[8:])


def test_nan_stays_nan() -> None:
    x, y, a, b = clouds(30, 20, 3, 0, SINGLE)
    x[0, 4, 1] = math.nan
    f, g, *_ = operators.symmetric_sinkhorn(x, y, 0, 0.0, a, b, FALLING, INF, False, False, False)
    assert f[0].isnan().all()
    assert g[0].isnan().all()
    assert f[1].isfinite().all()


def test_operators() -> None:
    x, y, a, b = clouds(9, 7, 3, 0, DOUBLE)
    epsilon = torch.full((2,), 0.1, dtype=DOUBLE)
    opcheck(torch.ops.pyreg.symmetric_sinkhorn_self.default, (x, 0, a, None, epsilon, epsilon, 0.5, 50, 1e-6))
    with pytest.raises(ValueError, match="expected epsilons above 0"):
        operators.symmetric_sinkhorn(x, y, 0, 0.0, a, b, [0.0], INF, True, False, False)
    with pytest.raises(ValueError, match="expected at least one epsilon"):
        operators.symmetric_sinkhorn(x, y, 0, 0.0, a, b, [], INF, True, False, False)
    with pytest.raises(ValueError, match="float64 weights"):
        operators.symmetric_sinkhorn(x, y, 0, 0.0, a.float(), b, [1.0], INF, True, False, False)
    with pytest.raises(ValueError, match="point_cost"):
        operators.symmetric_sinkhorn(x, y, 3, 0.0, a, b, [1.0], INF, True, False, False)
    with pytest.raises(ValueError, match="epsilon_factor below 1"):
        operators.symmetric_sinkhorn_self(x, 0, a, None, epsilon, epsilon, 1.0, 50, 1e-6)

"""The Monge gap: against golden files, the reference, other algebra and laws; its gradients to second order."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyreg.nn
from pyreg.functional import monge_gap, sinkhorn_points
from pyreg.reference import monge_gap as reference
from pyreg.transport import ConvergenceWarning
from tests import oracle

GOLDEN = Path(__file__).parent / "golden"
DOUBLE = torch.float64
COSTS = ["sqeuclidean", "euclidean", "cosine"]

# Converged to rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
CONVERGED: dict[str, Any] = {"tol": 1e-14, "max_iter": 5000}
pytestmark = [
    pytest.mark.filterwarnings("error::pyreg.transport.ConvergenceWarning"),
    pytest.mark.not_emulated,
]


def pairs(*shape: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    """Points, and a map of them that is not optimal."""
    source = torch.rand(*shape, dtype=DOUBLE)
    return source.to(dtype), (source.flip(-1) + 0.2 * torch.randn(*shape, dtype=DOUBLE)).to(dtype)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def dense(cost: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: reference.pairwise_cost(x, y, cost)


# ---- right ----


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("number", range(3))
def test_golden(device: torch.device, number: int, is_function: bool) -> None:
    golden = np.load(GOLDEN / f"monge_gap_{number}.npz")
    source, mapped = (torch.from_numpy(golden[key]).to(device).requires_grad_() for key in ("source", "mapped"))
    cost = golden["cost"].item()
    gap = monge_gap(
        source, mapped, epsilon=golden["epsilon"].item(), cost=dense(cost) if is_function else cost, **CONVERGED
    )
    assert gap.item() == pytest.approx(golden["monge_gap"].item(), rel=1e-7)
    gap.backward()
    for points, key in ((source, "grad_source"), (mapped, "grad_mapped")):
        torch.testing.assert_close(points.grad.cpu(), torch.from_numpy(golden[key]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", ["std", "mean"])
@pytest.mark.parametrize("cost", COSTS)
def test_golden_epsilons(device: torch.device, cost: str, scale: str) -> None:
    """OTT-JAX 0.6.0's without an epsilon ("std"), and with relative_epsilon="mean"."""
    golden = np.load(GOLDEN / "monge_gap_epsilons.npz")
    source, mapped = (torch.from_numpy(golden[key]).to(device).requires_grad_() for key in ("source", "mapped"))
    options = {"cost": cost, "tol": 1e-10, "max_iter": 20_000}
    if scale == "mean":
        options["relative_epsilon"] = golden["relative_epsilon"].item()
    gap = monge_gap(source, mapped, **options)
    assert gap.item() == pytest.approx(golden[f"{cost}_{scale}_monge_gap"].item(), rel=1e-9)
    gap.backward()
    for points, key in ((source, "grad_source"), (mapped, "grad_mapped")):
        expected = torch.from_numpy(golden[f"{cost}_{scale}_{key}"])
        torch.testing.assert_close(points.grad.cpu(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 11, 1), (2, 17, 5)])
@pytest.mark.parametrize("cost", COSTS)
def test_against_reference(device: torch.device, cost: str, shape: tuple[int, ...], streaming: bool) -> None:
    source, mapped = pairs(*shape)
    expected = reference.monge_gap(source, mapped, 0.3, cost, max_iter=5000)
    on_device = source.to(device), mapped.to(device)
    options = {"epsilon": 0.3, "cost": cost, **CONVERGED}
    gap = monge_gap(*on_device, streaming=streaming, **options)
    assert gap.shape == shape[:-2]
    torch.testing.assert_close(gap.cpu(), expected, **EXACT)
    by_function = monge_gap(*on_device, **{**options, "cost": dense(cost)})
    torch.testing.assert_close(by_function.cpu(), expected, **EXACT)
    actual = gradients(lambda *points: monge_gap(*points, streaming=streaming, **options), *on_device)
    truth = gradients(lambda *points: reference.monge_gap(*points, 0.3, cost, max_iter=5000), source, mapped)
    for found, exact in zip(actual, truth, strict=True):
        torch.testing.assert_close(found.cpu(), exact, **EXACT)


@pytest.mark.parametrize("cost", COSTS)
def test_is_the_logarithm_of_the_plan_s_diagonal(cost: str) -> None:
    """-epsilon / n sum log P_ii, by scalings of exp(-C / epsilon), with a graph through all of its iterations."""
    epsilon, n = 0.7, 13
    source, mapped = pairs(n, 3)

    def by_scaling(source: Tensor, mapped: Tensor) -> Tensor:
        kernel = (-reference.pairwise_cost(source, mapped, cost) / epsilon).exp()
        v = torch.ones(n, dtype=DOUBLE)
        for _ in range(1000):
            u = 1 / (n * (kernel @ v))
            v = 1 / (n * (kernel.T @ u))
        return -epsilon * (u * kernel.diagonal() * v).log().mean()

    def found(source: Tensor, mapped: Tensor) -> Tensor:
        return monge_gap(source, mapped, epsilon=epsilon, cost=cost, **CONVERGED)

    torch.testing.assert_close(found(source, mapped), by_scaling(source, mapped), **EXACT)
    for actual, expected in zip(gradients(found, source, mapped), gradients(by_scaling, source, mapped), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", oracle.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_dtypes(cost: str, dtype: torch.dtype) -> None:
    source, mapped = pairs(50, 4, dtype=dtype)
    exact = source.double(), mapped.double()

    def plain(source: Tensor, mapped: Tensor) -> Tensor:
        return reference.monge_gap(source, mapped, 0.5, cost, max_iter=5000, tol=oracle.ROUNDOFF[dtype])

    def fused(source: Tensor, mapped: Tensor) -> Tensor:
        tol = 1e-14 if dtype == DOUBLE else 1e-6
        return monge_gap(source, mapped, epsilon=0.5, cost=cost, tol=tol, max_iter=5000)

    gap = fused(source, mapped)
    assert gap.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    with torch.no_grad():
        oracle.assert_as_accurate(gap, plain(source, mapped), plain(*exact))
    expected = gradients(lambda *points: reference.monge_gap(*points, 0.5, cost, max_iter=5000), *exact)
    for actual, by_plain, truth in zip(
        gradients(fused, source, mapped), gradients(plain, source, mapped), expected, strict=True
    ):
        assert actual.dtype == dtype
        # The tolerance of the marginals is 17 roundings of float32.
        oracle.assert_as_accurate(actual, by_plain, truth, floor=64)


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize(("n", "d"), [(40, 3), (5, 30)])
@pytest.mark.parametrize("cost", COSTS)
def test_default_epsilon(cost: str, n: int, d: int, shift: float) -> None:
    """A constant; of moments in few dimensions and in many, and of a function's costs."""
    source, mapped = (points + shift for points in pairs(2, n, d))
    epsilon = reference.default_epsilon(reference.pairwise_cost(source, mapped, cost))
    options = {"max_iter": 20, "tol": 0.0}
    torch.testing.assert_close(
        monge_gap(source, mapped, cost=cost, **options),
        monge_gap(source, mapped, cost=cost, epsilon=epsilon, **options),
        rtol=1e-8 if shift == 0 else 1e-5,
        atol=0,
    )
    for which in (cost, dense(cost)):
        actual = gradients(lambda *points, which=which: monge_gap(*points, cost=which, **options), source, mapped)
        given = gradients(
            lambda *points, which=which: monge_gap(*points, cost=which, epsilon=epsilon, **options), source, mapped
        )
        for found, expected in zip(actual, given, strict=True):
            assert oracle.relative_error(found, expected) <= (1e-7 if shift == 0 else 1e-4)


@pytest.mark.parametrize("cost", COSTS)
def test_relative_epsilon_is_of_the_mean_cost(cost: str) -> None:
    source, mapped = pairs(9, 3)
    mean = reference.pairwise_cost(source, mapped, cost).mean().item()
    expected = monge_gap(source, mapped, epsilon=0.3 * mean, cost=cost, **CONVERGED)
    torch.testing.assert_close(monge_gap(source, mapped, relative_epsilon=0.3, cost=cost, **CONVERGED), expected)


# ---- laws ----


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 20),
    d=st.integers(1, 6),
    cost=st.sampled_from(COSTS),
    dtype=st.sampled_from([DOUBLE, torch.float32]),
    share=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    shift=st.sampled_from([0.0, 1.0, 1000.0]),
    noise=st.sampled_from([0.0, 1e-3, 1.0]),
    max_iter=st.sampled_from([1, 2, 50]),
)
def test_is_never_negative(
    seed: int,
    n: int,
    d: int,
    cost: str,
    dtype: torch.dtype,
    share: float,
    shift: float,
    noise: float,
    max_iter: int,
) -> None:
    """At least epsilon log n, and with fewer iterations no less."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, d, generator=generator, dtype=dtype) + 0.5
    mapped = source + shift + noise * torch.randn(n, d, generator=generator, dtype=dtype)
    scale = max(reference.pairwise_cost(source, mapped, cost).mean().item(), 1e-3)
    epsilon = share * scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        gap = monge_gap(source, mapped, epsilon=epsilon, cost=cost, max_iter=max_iter).item()
    assert gap >= 0
    assert gap >= epsilon * math.log(n) * (1 - 2 * oracle.ROUNDOFF[dtype])


@pytest.mark.parametrize("map_of", ["sorted points", "translation", "gradient of a convex function"])
def test_goes_to_zero_for_an_optimal_map(map_of: str) -> None:
    if map_of == "sorted points":
        source, mapped = (torch.rand(12, 1, dtype=DOUBLE).sort(0).values for _ in range(2))
    else:
        source = torch.rand(12, 2, dtype=DOUBLE)
        root = torch.randn(2, 2, dtype=DOUBLE)
        mapped = source + torch.tensor([3.0, -1.0]) if map_of == "translation" else source @ (root @ root.T)
    options = {"epsilon_scaling": 0.5, "max_iter": 100_000}
    previous = math.inf
    for epsilon in (1e-1, 1e-2, 1e-3, 1e-4):
        gap = monge_gap(source, mapped, epsilon=epsilon, **options).item()
        # Between that and what it would be if all plans had the same cost.
        assert epsilon * math.log(12) * (1 - 1e-9) <= gap <= 2 * epsilon * math.log(12)
        assert gap < previous
        previous = gap
    # The same places in another order: what the assignment is cheaper by.
    cost = reference.pairwise_cost(source, mapped.roll(1, 0), "sqeuclidean")
    rows, columns = linear_sum_assignment(cost.numpy())
    excess = (cost.diagonal().mean() - cost[rows, columns].mean()).item()
    gap = monge_gap(source, mapped.roll(1, 0), epsilon=1e-4, **options).item()
    assert excess > 0.01
    assert excess <= gap <= excess + 2e-4 * math.log(12)


def test_grows_with_epsilon_and_scales_with_the_cost() -> None:
    source, mapped = pairs(9, 3)
    gaps = [monge_gap(source, mapped, epsilon=epsilon, **CONVERGED).item() for epsilon in (0.3, 1.0, 3.0)]
    assert gaps == sorted(gaps)
    scaled = monge_gap(2 * source, 2 * mapped, epsilon=4.0, **CONVERGED)
    assert scaled.item() == pytest.approx(4 * gaps[1], rel=1e-12)


def test_is_that_of_the_transport_s_value() -> None:
    source, mapped = pairs(30, 2)
    value = sinkhorn_points(source, mapped, epsilon=0.4, **CONVERGED).value
    expected = (source - mapped).square().sum(1).mean() - value + 2 * 0.4 * math.log(30)
    torch.testing.assert_close(monge_gap(source, mapped, epsilon=0.4, **CONVERGED), expected, **EXACT)


def test_fits_a_map() -> None:
    """Descent on the gap alone makes a map the cheapest one to where it leads."""
    source = torch.rand(30, 2)
    mapped = (source.roll(1, 0) + torch.randn(30, 2)).requires_grad_()
    optimizer = torch.optim.Adam([mapped], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        gap = monge_gap(source, mapped, epsilon=0.1, tol=1e-3)
        gap.backward()
        optimizer.step()
    assert gap.item() <= 1.5 * 0.1 * math.log(30)


# ---- edges ----


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
def test_one_point(cost: str, dtype: torch.dtype) -> None:
    """There is one plan."""
    source, mapped = pairs(3, 1, 5, dtype=dtype)
    gap = monge_gap(source, mapped, epsilon=0.1, cost=cost)
    assert (gap >= 0).all()
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=64 * oracle.ROUNDOFF[dtype])
    for gradient in gradients(lambda *points: monge_gap(*points, epsilon=0.1, cost=cost), source, mapped):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=64 * oracle.ROUNDOFF[dtype])


@pytest.mark.parametrize("cost", COSTS)
def test_constant_clouds(cost: str) -> None:
    """All plans have the same cost: 2 epsilon log n is left of the entropies; gradients stay finite."""
    source, mapped = (torch.full((7, 3), value, dtype=DOUBLE) for value in (2.0, 3.0))
    for other in (mapped, source):
        gap = monge_gap(source, other, epsilon=0.3, cost=cost)
        assert gap.item() == pytest.approx(2 * 0.3 * math.log(7), rel=1e-12)
        for gradient in gradients(lambda *points: monge_gap(*points, epsilon=0.3, cost=cost), source, other):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("cost", COSTS)
def test_duplicates_and_fixed_points(cost: str) -> None:
    source, mapped = pairs(11, 2)
    source[3], mapped[5], mapped[7] = source[2], mapped[4], source[7]

    def found(*points: Tensor) -> Tensor:
        return monge_gap(*points, epsilon=0.3, cost=cost, **CONVERGED)

    def truth(*points: Tensor) -> Tensor:
        return reference.monge_gap(*points, 0.3, cost, max_iter=5000)

    torch.testing.assert_close(found(source, mapped), truth(source, mapped), **EXACT)
    for actual, expected in zip(gradients(found, source, mapped), gradients(truth, source, mapped), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("n", [2, 31, 257])
def test_layouts_and_determinism(n: int) -> None:
    """Strided, transposed and expanded points have the bits of contiguous ones, as has every run."""
    for dtype in (DOUBLE, torch.float32):
        source, mapped = pairs(n, 6, dtype=dtype)
        options = {"epsilon": 0.5, "tol": 1e-5}

        def all_of(*points: Tensor, options: Any = options) -> tuple[Tensor, ...]:
            gap = monge_gap(*points, **options)
            return gap.detach(), *gradients(lambda *points: monge_gap(*points, **options), *points)

        expected = all_of(source, mapped)
        strided = torch.stack([source, source], 2)[..., 0], mapped.T.contiguous().T
        for again in (all_of(source, mapped), all_of(*strided)):
            assert all(torch.equal(x, y) for x, y in zip(again, expected, strict=True))
        batch = monge_gap(source.expand(2, n, 6), mapped.expand(2, n, 6), **options)
        assert torch.equal(batch, expected[0].expand(2))


def test_no_problems() -> None:
    source, mapped = (torch.zeros(0, 5, 2, requires_grad=True) for _ in range(2))
    gap = monge_gap(source, mapped, epsilon=0.1)
    assert gap.shape == (0,)
    gap.sum().backward()
    assert source.grad.shape == mapped.grad.shape == (0, 5, 2)


def test_arguments_are_left_alone() -> None:
    points = pairs(5, 2)
    before = [x.clone() for x in points]
    gradients(lambda *points: monge_gap(*points), *points)
    assert all(torch.equal(x, y) for x, y in zip(points, before, strict=True))


# ---- gradients ----


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("cost", COSTS)
def test_first_and_second_order(cost: str, is_function: bool) -> None:
    def function(source: Tensor, mapped: Tensor) -> Tensor:
        return monge_gap(
            source, mapped, epsilon=0.5, cost=dense(cost) if is_function else cost, tol=1e-15, max_iter=300
        )

    inputs = [points.requires_grad_() for points in pairs(2, 3, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-15 is below rounding
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


class Calls(TorchDispatchMode):
    """Counts pyreg's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "pyreg":
            self.count[function.name().removeprefix("pyreg::")] += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("epsilon", [0.5, None])
def test_passes_over_the_pairs(epsilon: float | None) -> None:
    """Beside the iteration one, which gives both gradients; the default epsilon is found without any."""
    source, mapped = (points.requires_grad_() for points in pairs(20, 3))
    with Calls() as calls:
        gap = monge_gap(source, mapped, epsilon=epsilon)
        torch.autograd.grad(gap, (source, mapped))
    assert calls.count["sinkhorn_points_potentials"] == 1
    assert calls.count["point_plan"] == 1
    assert calls.count["sinkhorn_points_adjoint"] == 0


# ---- a citizen of torch ----


def loss(source: Tensor, mapped: Tensor) -> Tensor:
    return monge_gap(source, mapped, epsilon=0.4, **CONVERGED).sum()


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "a function"])
def test_compile(cost: str) -> None:
    torch.compiler.reset()
    which = dense("sqeuclidean") if cost == "a function" else cost

    def function(source: Tensor, mapped: Tensor) -> Tensor:
        return monge_gap(source, mapped, cost=which, max_iter=30, tol=0.0)

    inputs = pairs(2, 7, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), **EXACT)
    for actual, expected in zip(gradients(compiled, *inputs), gradients(function, *inputs), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("is_function", [False, True])
def test_torch_func(is_function: bool) -> None:
    def function(source: Tensor, mapped: Tensor) -> Tensor:
        cost = dense("sqeuclidean") if is_function else "sqeuclidean"
        return monge_gap(source, mapped, epsilon=0.4, cost=cost, **CONVERGED)

    inputs = pairs(3, 7, 2)
    torch.testing.assert_close(torch.func.vmap(function)(*inputs), function(*inputs), **EXACT)
    expected = gradients(function, *inputs)
    mapped = torch.func.vmap(torch.func.grad(function, argnums=(0, 1)))(*inputs)
    for actual, truth in zip(mapped, expected, strict=True):
        torch.testing.assert_close(actual, truth, **EXACT)


def test_autocast_changes_nothing() -> None:
    source, mapped = pairs(40, 3, dtype=torch.float32)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (x.square().sum(-1)[..., None] - 2 * x @ y.mT + y.square().sum(-1)[..., None, :]).exp().log1p()

    for cost in (*COSTS, product):
        expected = monge_gap(source, mapped, cost=cost)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(monge_gap(source, mapped, cost=cost), expected)


def test_module() -> None:
    source, mapped = pairs(9, 3)
    options = {"epsilon": 0.4, "cost": "euclidean", "max_iter": 5000, "tol": 1e-9, "epsilon_scaling": 0.5}
    module = pyreg.nn.MongeGap(**options, streaming=True)
    assert torch.equal(module(source, mapped), monge_gap(source, mapped, **options, streaming=True))
    assert repr(module) == (
        "MongeGap(epsilon=0.4, relative_epsilon=None, cost='euclidean', max_iter=5000, tol=1e-09, epsilon_scaling=0.5)"
    )
    relative = pyreg.nn.MongeGap(relative_epsilon=0.2, cost=reference_cost)
    assert torch.equal(relative(source, mapped), monge_gap(source, mapped, relative_epsilon=0.2, cost=reference_cost))
    assert "relative_epsilon=0.2, cost='reference_cost', max_iter=2000, tol=0.001" in repr(relative)
    assert torch.equal(pyreg.nn.MongeGap()(source, mapped), monge_gap(source, mapped))


def reference_cost(x: Tensor, y: Tensor) -> Tensor:
    return reference.pairwise_cost(x, y, "sqeuclidean")


def test_warm_start() -> None:
    source, mapped = pairs(9, 3)
    transport = sinkhorn_points(source, mapped, epsilon=0.3, tol=1e-10, max_iter=5000)
    expected = monge_gap(source, mapped, epsilon=0.3, **CONVERGED)
    for init in (transport, transport.potentials()):
        gap = monge_gap(source, mapped, epsilon=0.3, init=init, max_iter=2)
        torch.testing.assert_close(gap, expected, rtol=1e-8, atol=0)


# ---- messages ----


def test_warning() -> None:
    source, mapped = pairs(9, 3)
    with pytest.warns(ConvergenceWarning, match="^monge_gap: the iteration has not converged: after 3 .* 0.001; raise"):
        monge_gap(source, mapped, epsilon=0.01, max_iter=3)


X, Y = torch.zeros(3, 2), torch.ones(3, 2)
NAN = math.nan


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((None, Y), {}, TypeError, "expected source to be a tensor, got NoneType"),
        ((X, [1.0]), {}, TypeError, "expected mapped to be a tensor, got list"),
        ((X.long(), Y), {}, TypeError, "expected source to be float64, .* got torch.int64; convert it with source.fl"),
        ((X, Y[0]), {}, ValueError, r"expected mapped of shape \[m, d\] or .* got \[2\]; use unsqueeze\(1\) for point"),
        ((X[:0], Y[:0]), {}, ValueError, r"expected source of shape \[n, d\] .* got \[0, 2\]"),
        ((X, Y[:2]), {}, ValueError, r"mapped of the shape of source, \[3, 2\], its points one by one, got \[2, 2\]"),
        ((X, Y[:, :1]), {}, ValueError, r"source \[..., n, d\] and mapped \[..., m, d\] with the same batch and dim"),
        ((X, Y.double()), {}, TypeError, r"mapped of the dtype of source, torch.float32, got .*mapped.to\(source.dty"),
        ((X, Y.to("meta")), {}, ValueError, r"mapped on the device of source, cpu, got meta; .*mapped.to\(source.dev"),
        ((X + NAN, Y), {}, ValueError, "expected finite numbers in source, got nan"),
        ((X, Y * math.inf), {}, ValueError, "expected finite numbers in mapped, got inf"),
        ((X, Y), {"cost": "l1"}, ValueError, "'euclidean', 'cosine' or a function of points, got 'l1'"),
        ((X, Y), {"streaming": 1}, TypeError, "expected streaming to be True, False or None, got 1"),
        ((X, Y), {"cost": dense("sqeuclidean"), "streaming": True}, ValueError, "with streaming=True, got a function"),
        ((X, Y), {"cost": lambda x, y: 1.0}, TypeError, "expected cost to return a tensor, got float"),
        ((X, Y), {"cost": lambda x, y: x}, ValueError, r"costs of shape \[..., n, m\] = \[3, 3\], got \[3, 2\]"),
        ((X, Y), {"cost": lambda x, y: (x @ y.T).double()}, TypeError, r"got torch.float64 on cpu; end it with .to\(x"),
        ((X, Y), {"cost": lambda x, y: x @ y.T / 0}, ValueError, "expected cost without NaN and -inf, got nan"),
        ((X, Y), {"epsilon": 0.0}, ValueError, "expected epsilon to be a finite number > 0, got 0.0"),
        ((X, Y), {"relative_epsilon": 0.1}, ValueError, "expected either epsilon or relative_epsilon, got both"),
        ((X, Y), {"epsilon": None}, ValueError, "expected costs that differ, .* all the same; give epsilon"),
        ((X, Y), {"epsilon": torch.ones(2)}, ValueError, r"to be a number or of the batch's shape \[\], got \[2\]"),
        ((X, Y), {"max_iter": 0}, ValueError, "expected max_iter to be an integer >= 1, got 0"),
        ((X, Y), {"tol": -1.0}, ValueError, "expected tol to be a finite number >= 0, got -1.0"),
        ((X, Y), {"epsilon_scaling": 2.0}, ValueError, "epsilon_scaling to be a factor between 0 and 1, got 2.0"),
        ((X, Y), {"init": 1.0}, TypeError, r"init to be a Transport or potentials \(f, g\), got float"),
        ((1e30 * X + 1e30, Y), {}, ValueError, "expected points whose squared distances are numbers of torch.float32"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^monge_gap: .*{text}"):
        monge_gap(*arguments, **{"epsilon": 0.1, **options})

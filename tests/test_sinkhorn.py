"""Sinkhorn transport: against golden files, the reference, closed forms and laws; its gradients to second order."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
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
from torch.library import opcheck

from bench import memory
from pyreg.functional import sinkhorn, sinkhorn_points
from pyreg.ops import _adjoint, _log_domain, _memory, _point_plan, _point_potentials, _potentials, _streaming
from pyreg.reference import sinkhorn as reference
from pyreg.transport import ConvergenceWarning, Transport
from tests.oracle import relative_error

GOLDEN = Path(__file__).parent / "golden"
INF = math.inf
DOUBLE = torch.float64
REFERENCES = ["product", "counting"]

# Converged to rounding: sums of some dozens of terms, through some hundred iterations.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
CONVERGED: dict[str, Any] = {"tol": 1e-14, "max_iter": 5000}
pytestmark = pytest.mark.filterwarnings("error::pyreg.transport.ConvergenceWarning")


def weights_of(*shape: int) -> Tensor:
    weights = torch.rand(*shape, dtype=DOUBLE) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def problem(*batch: int, n: int = 5, m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(*batch, n, m, dtype=DOUBLE), weights_of(*batch, n), weights_of(*batch, m)


def penalties(kind: str, n: int = 5, m: int = 7) -> dict[str, Any]:
    """rho_a and rho_b, as arguments of both the function and the reference."""
    each = [torch.rand(k, dtype=DOUBLE) + 0.2 for k in (n, m)]
    for rho in each:
        rho[::2] = INF
    return {
        "balanced": {},
        "unbalanced": {"rho_a": 0.7, "rho_b": 0.3},
        "semi-relaxed": {"rho_b": 0.5},
        "an entry each": {"rho_a": each[0], "rho_b": each[1]},
    }[kind]


KINDS = ["balanced", "unbalanced", "semi-relaxed", "an entry each"]


def same_up_to_a_constant(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    difference = actual.double() - expected
    difference = difference - difference.mean(-1, keepdim=True)
    torch.testing.assert_close(difference, torch.zeros_like(difference), **(tolerance or EXACT))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


# ---- right: golden files, the reference, other algebra ----


@pytest.mark.parametrize("number", range(6))
def test_golden(device: torch.device, number: int) -> None:
    golden = np.load(GOLDEN / f"sinkhorn_{number}.npz")
    x, y, a, b = (torch.from_numpy(golden[key]).to(device) for key in "xyab")
    epsilon, rho_a, rho_b = (golden[key].item() for key in ("epsilon", "rho_a", "rho_b"))
    x.requires_grad_()
    y.requires_grad_()
    transport = sinkhorn_points(
        x, y, a, b, cost=golden["cost"].item(), epsilon=epsilon, rho_a=rho_a, rho_b=rho_b, **CONVERGED
    )
    assert transport.value.item() == pytest.approx(golden["reg_ot_cost"].item(), rel=1e-8)
    transport.value.backward()
    close = {"rtol": 0, "atol": 1e-8}
    for actual, key in ((transport.plan(), "plan"), (x.grad, "grad_x"), (y.grad, "grad_y")):
        torch.testing.assert_close(actual.detach().cpu(), torch.from_numpy(golden[key]), **close)
    # The files' potentials hold epsilon log a and epsilon log b.
    for potentials, weights, key in ((transport.f, a, "f"), (transport.g, b, "g")):
        actual = (potentials.detach() + epsilon * weights.log()).cpu()
        if rho_b == INF:
            same_up_to_a_constant(actual, torch.from_numpy(golden[key]), **close)
        else:
            torch.testing.assert_close(actual, torch.from_numpy(golden[key]), **close)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_reference(device: torch.device, kind: str, name: str) -> None:
    cost, a, b = problem()
    rhos = penalties(kind)
    expected = reference.sinkhorn(cost, a, b, 0.1, **rhos, reference=name, max_iter=5000, tol=1e-14)
    on_device = [x.to(device) for x in (cost, a, b)]
    rhos_there = {key: rho.to(device) if isinstance(rho, Tensor) else rho for key, rho in rhos.items()}
    transport = sinkhorn(*on_device, epsilon=0.1, **rhos_there, reference=name, **CONVERGED)
    value = reference.value(cost, a, b, *expected, 0.1, **rhos, reference=name)
    plan = reference.plan(cost, a, b, *expected, 0.1, reference=name)
    torch.testing.assert_close(transport.value.cpu(), value, **EXACT)
    torch.testing.assert_close(transport.plan().cpu(), plan, **EXACT)
    for actual, truth in zip((transport.f.cpu(), transport.g.cpu()), expected, strict=True):
        if kind == "balanced":
            same_up_to_a_constant(actual, truth)
        else:
            torch.testing.assert_close(actual, truth, **EXACT)
    torch.testing.assert_close(transport.transport_cost().cpu(), (plan * cost).sum(), **EXACT)
    for marginal, dim in zip(transport.marginals, (1, 0), strict=True):
        torch.testing.assert_close(marginal.cpu(), plan.sum(dim), **EXACT)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_primal_equals_dual_and_marginals_hold(kind: str, name: str) -> None:
    """The value is the dual's; the primal comes from the plan alone."""
    cost, a, b = problem()
    a, b = 1.7 * a, 1.7 * b
    rhos = penalties(kind)
    transport = sinkhorn(cost, a, b, epsilon=0.1, **rhos, reference=name, **CONVERGED)
    plan = transport.plan()
    product = a.unsqueeze(1) * b if name == "product" else torch.ones_like(plan)
    primal = (plan * cost).sum() + 0.1 * (plan * (plan / product).log() - plan).sum()
    if name == "product":
        primal += 0.1 * product.sum()
    potentials = transport.f, transport.g
    for marginal, weights, key, f in zip(transport.marginals, (a, b), ("rho_a", "rho_b"), potentials, strict=True):
        rho = torch.as_tensor(rhos.get(key, INF), dtype=DOUBLE).expand(len(weights))
        torch.testing.assert_close(marginal, weights * torch.exp(-f / rho), **EXACT)
        divergence = marginal * (marginal / weights).log() - marginal + weights
        primal += (rho * divergence)[rho < INF].sum()
    torch.testing.assert_close(transport.value, primal, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    """float32 to its rounding; 16 bits are computed, and come out, in float32."""
    cost, a, b = (x.to(dtype) for x in problem())
    rhos = {"rho_a": 0.7, "rho_b": 0.3}
    exact = sinkhorn(cost.double(), a.double(), b.double(), epsilon=0.1, **rhos, **CONVERGED)
    transport = sinkhorn(*(x.to(device) for x in (cost, a, b)), epsilon=0.1, **rhos, tol=1e-6)
    for what in ("value", "f", "g"):
        actual = getattr(transport, what)
        assert actual.dtype == torch.float32
        # tol is 17 roundings of float32
        torch.testing.assert_close(actual.cpu().double(), getattr(exact, what), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(transport.plan().cpu().double(), exact.plan(), rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("cost_of", ["points", "numbers"])
def test_float32_at_small_epsilon(epsilon: float, cost_of: str) -> None:
    """Within 1e-5 of a float64 solver in the log domain, of the value and of the costs' range, which is 1."""
    n, m = 40, 50
    cost = torch.cdist(torch.rand(n, 2), torch.rand(m, 2)).square() if cost_of == "points" else torch.rand(n, m)
    cost = (cost - cost.min()) / (cost.max() - cost.min())
    a, b = weights_of(n).float(), weights_of(m).float()
    truth = sinkhorn(
        cost.double(), a.double(), b.double(), epsilon=epsilon, epsilon_scaling=0.5, tol=1e-10, max_iter=300_000
    )
    # That the truth is one: iterations in the log domain leave it where it is.
    f, g = truth.f, truth.g
    for _ in range(3):
        f = reference._potential(cost.double(), a.double(), b.double(), g, epsilon, INF, "product")
        g = reference._potential(cost.double().mT, b.double(), a.double(), f, epsilon, INF, "product")
    same_up_to_a_constant(f, truth.f, rtol=0, atol=1e-9)
    same_up_to_a_constant(g, truth.g, rtol=0, atol=1e-9)

    transport = sinkhorn(cost, a, b, epsilon=epsilon, epsilon_scaling=0.5, tol=1e-6, max_iter=100_000)
    assert transport.converged
    assert transport.value.item() == pytest.approx(truth.value.item(), rel=1e-5)
    assert transport.transport_cost().item() == pytest.approx(truth.transport_cost().item(), rel=1e-5)
    if cost_of == "points" or epsilon >= 1e-2:  # others are so ill conditioned that the tolerance decides
        same_up_to_a_constant(transport.f, truth.f, rtol=0, atol=1e-5)
        same_up_to_a_constant(transport.g, truth.g, rtol=0, atol=1e-5)
    # The marginals are as good as the error says: twice, for it is summed in float32.
    rows, columns = transport.marginals
    assert (rows - a).abs().sum() <= 2e-6
    assert (columns - b).abs().sum() <= 2e-6


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(
    ("cost", "dimension"), [("sqeuclidean", 3), ("sqeuclidean", 64), ("euclidean", 2), ("cosine", 5)]
)
def test_float32_points_at_small_epsilon(cost: str, dimension: int, epsilon: float) -> None:
    """Far from the origin, where products of coordinates would lose what differences keep."""
    shift = 0.0 if cost == "cosine" else 10.0
    x, y = torch.rand(40, dimension) + shift, torch.rand(50, dimension) + shift
    costs = reference.pairwise_cost(x.double(), y.double(), cost)
    epsilon = epsilon * (costs.max() - costs.min()).item()
    a, b = weights_of(40).float(), weights_of(50).float()
    options = {"cost": cost, "epsilon": epsilon, "epsilon_scaling": 0.5, "max_iter": 300_000}
    leaves = [points.double().requires_grad_() for points in (x, y)]
    truth = sinkhorn_points(*leaves, a.double(), b.double(), tol=1e-10, **options)
    expected = torch.autograd.grad(truth.value, leaves)
    for streaming in (True, False):
        leaves = [points.clone().requires_grad_() for points in (x, y)]
        transport = sinkhorn_points(*leaves, a, b, tol=1e-6, streaming=streaming, **options)
        assert transport.converged
        assert transport.value.item() == pytest.approx(truth.value.item(), rel=1e-5)
        assert transport.transport_cost().item() == pytest.approx(truth.transport_cost().item(), rel=1e-5)
        for actual, exact in zip(torch.autograd.grad(transport.value, leaves), expected, strict=True):
            # That of one point is as far off as its marginal, 1e-6 of 1 / 40.
            assert relative_error(actual, exact) <= 4e-5
        rows, columns = transport.marginals
        assert (rows - a).abs().sum() <= 2e-6
        assert (columns - b).abs().sum() <= 2e-6


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("rho_a", "rho_b"), [(INF, 0.03), (0.03, INF), (0.03, 30.0)])
@pytest.mark.parametrize("size", [(1, 2), (40, 50), (150, 200)])
@pytest.mark.parametrize("kind", ["dense", "points"])
def test_float32_at_rho_far_below_epsilon(
    device: torch.device, kind: str, size: tuple[int, int], rho_a: float, rho_b: float, name: str
) -> None:
    """Values and gradients take exp(-f / rho): f is right to rho's rounding, not only to epsilon's."""
    epsilon = 100.0
    inputs = [torch.rand(*size)] if kind == "dense" else [torch.rand(count, 3) for count in size]
    inputs += [weights_of(count).float() for count in size]
    results = []
    for dtype in (DOUBLE, torch.float32):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        options = {"epsilon": epsilon, "rho_a": rho_a, "rho_b": rho_b, "reference": name}
        function = sinkhorn if kind == "dense" else sinkhorn_points
        value = function(*leaves, tol=1e-12 if dtype == DOUBLE else 1e-6, max_iter=100_000, **options).value
        results.append([value, *torch.autograd.grad(value, leaves)])
    # Some dozen roundings of the value and, of the weights' gradients, of the largest: of the last ones the constant
    # that is free where both must hold is not.
    limits = [2e-6] + [5e-6] * (len(inputs) - 2) + [4e-6] * 2
    for actual, exact, limit in zip(results[1], results[0], limits, strict=True):
        scale = max(exact.abs().max().item(), 0.0 if exact.ndim == 2 else epsilon)
        assert (actual.double() - exact).abs().max().item() <= limit * scale


def test_rows_that_lose_all_mass_keep_right_potentials() -> None:
    """exp(-f / rho) is below float32's numbers."""
    for name, scale in itertools.product(REFERENCES, (10.0, 100.0, 1000.0)):
        cost, a, b = (x.float() for x in problem())
        cost[3] += scale
        cost[:, 2] += scale
        rhos = {"rho_a": 0.05, "rho_b": 0.1, "reference": name}
        truth = reference.sinkhorn(cost.double(), a.double(), b.double(), 0.05, **rhos, max_iter=3000)
        transport = sinkhorn(cost, a, b, epsilon=0.05, **rhos, tol=1e-6)
        for actual, expected in zip((transport.f, transport.g), truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


# ---- right: theory ----


def test_diracs(device: torch.device) -> None:
    """One point on a side: the only plan is the product."""
    cost, b = torch.rand(1, 7, dtype=DOUBLE, device=device), weights_of(7).to(device)
    transport = sinkhorn(cost, None, b, epsilon=0.3)
    torch.testing.assert_close(transport.plan(), b.unsqueeze(0), **EXACT)
    torch.testing.assert_close(transport.value, (b * cost).sum(), **EXACT)
    assert sinkhorn(cost[:, :1], epsilon=0.3).value.item() == pytest.approx(cost[0, 0].item(), rel=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_unbalanced_diracs(name: str) -> None:
    """The minimum of p c + eps H(p) + rho KL(p | alpha) + sigma KL(p | beta) over one number p."""
    alpha, beta, c, epsilon, rho, sigma = 0.7, 1.9, 0.6, 0.3, 0.5, 0.8
    base = alpha * beta if name == "product" else 1.0
    p = math.exp(
        (epsilon * math.log(base) + rho * math.log(alpha) + sigma * math.log(beta) - c) / (epsilon + rho + sigma)
    )

    def divergence(p: float, q: float) -> float:
        return p * math.log(p / q) - p + q

    entropy = divergence(p, base) if name == "product" else p * math.log(p) - p
    value = p * c + epsilon * entropy + rho * divergence(p, alpha) + sigma * divergence(p, beta)
    a, b = (torch.tensor([x], dtype=DOUBLE) for x in (alpha, beta))
    cost = torch.tensor([[c]], dtype=DOUBLE)
    transport = sinkhorn(cost, a, b, epsilon=epsilon, rho_a=rho, rho_b=sigma, reference=name, **CONVERGED)
    assert transport.plan().item() == pytest.approx(p, rel=1e-12)
    assert transport.value.item() == pytest.approx(value, rel=1e-12)


def test_permutation_as_epsilon_falls() -> None:
    cost = torch.rand(6, 6, dtype=DOUBLE)
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost[rows, columns].mean().item()
    previous = INF
    for epsilon in (0.3, 0.1, 0.03, 0.01, 0.003):
        transport = sinkhorn(cost, epsilon=epsilon, epsilon_scaling=0.5, tol=1e-4, max_iter=10_000)
        excess = transport.transport_cost().item() - best
        # No plan of these marginals has less, and the entropy is worth at most epsilon log n; costs are below 1.
        assert -1e-4 <= excess <= epsilon * math.log(6)
        assert excess < previous
        previous = excess
    plan = torch.zeros(6, 6, dtype=DOUBLE)
    plan[rows, columns] = 1 / 6
    torch.testing.assert_close(transport.plan(), plan, rtol=0, atol=1e-3)


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_gaussians(epsilon: float) -> None:
    """Janati, Muzellec, Peyre, Cuturi 2020, of one dimension, with 2 sigma^2 = epsilon; on a grid, whose sums of smooth
    functions that vanish at its ends are integrals but for exponentially little."""
    (mean_x, deviation_x), (mean_y, deviation_y) = (0.2, 0.8), (-0.5, 1.1)

    def grid(mean: float, deviation: float) -> tuple[Tensor, Tensor]:
        x = torch.linspace(mean - 7 * deviation, mean + 7 * deviation, 160, dtype=DOUBLE)
        weights = torch.exp(-(((x - mean) / deviation) ** 2) / 2)
        return x.unsqueeze(1), weights / weights.sum()

    x, a = grid(mean_x, deviation_x)
    y, b = grid(mean_y, deviation_y)
    transport = sinkhorn_points(x, y, a, b, epsilon=epsilon, tol=1e-11)
    s = epsilon / 2
    root = math.sqrt(4 * deviation_x**2 * deviation_y**2 + s**2)
    value = (mean_x - mean_y) ** 2 + deviation_x**2 + deviation_y**2 - root
    value += s * (1 - math.log(2 * s)) + s * math.log(root + s)
    assert transport.value.item() == pytest.approx(value, rel=1e-8)
    slope = (root - s) / 2 / deviation_x**2
    inner = slice(40, 120)  # half as wide as the grid
    expected = mean_y + slope * (x[inner] - mean_x)
    torch.testing.assert_close(transport.barycentric_map()[inner], expected, rtol=1e-6, atol=1e-6)


SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 10_000)


def drawn(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return problem(n=n, m=m)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SIZES, SIZES, st.sampled_from(KINDS), st.sampled_from(REFERENCES))
def test_symmetry_and_scaling(seed: int, n: int, m: int, kind: str, name: str) -> None:
    cost, a, b = drawn(seed, n, m)
    rhos = penalties(kind, n, m)
    options = {"reference": name, **CONVERGED}
    one = sinkhorn(cost, a, b, epsilon=0.2, **rhos, **options)
    swapped = sinkhorn(cost.t(), b, a, epsilon=0.2, rho_a=rhos.get("rho_b"), rho_b=rhos.get("rho_a"), **options)
    torch.testing.assert_close(swapped.plan().t(), one.plan(), **EXACT)
    torch.testing.assert_close(swapped.value, one.value, **EXACT)
    torch.testing.assert_close(swapped.f, one.g, **EXACT)
    scaled = sinkhorn(3 * cost, a, b, epsilon=0.6, **{key: 3 * rho for key, rho in rhos.items()}, **options)
    torch.testing.assert_close(scaled.plan(), one.plan(), **EXACT)
    torch.testing.assert_close(scaled.value, 3 * one.value, **EXACT)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SIZES, SIZES, st.sampled_from(REFERENCES))
def test_translation_and_the_free_constant(seed: int, n: int, m: int, name: str) -> None:
    """A cost plus u_i + v_j has the same balanced plan, and potentials plus u and v."""
    cost, a, b = drawn(seed, n, m)
    u, v = torch.randn(n, dtype=DOUBLE), torch.randn(m, dtype=DOUBLE)
    one = sinkhorn(cost, a, b, epsilon=0.2, reference=name, **CONVERGED)
    other = sinkhorn(cost + u.unsqueeze(1) + v, a, b, epsilon=0.2, reference=name, **CONVERGED)
    torch.testing.assert_close(other.plan(), one.plan(), **EXACT)
    torch.testing.assert_close(other.value, one.value + a.dot(u) + b.dot(v), **EXACT)
    same_up_to_a_constant(other.f, one.f + u)
    same_up_to_a_constant(other.g, one.g + v)
    moved = reference.plan(cost, a, b, one.f + 5, one.g - 5, 0.2, name)
    torch.testing.assert_close(moved, one.plan(), **EXACT)
    if name == "product":
        torch.testing.assert_close(a.dot(one.f), b.dot(one.g), **EXACT)


@settings(max_examples=15, deadline=None)
@given(SEEDS, SIZES, SIZES, st.sampled_from(["sqeuclidean", "euclidean"]))
def test_points_move_together(seed: int, n: int, m: int, cost: str) -> None:
    torch.manual_seed(seed)
    x, y = torch.rand(n, 3, dtype=DOUBLE), torch.rand(m, 3, dtype=DOUBLE)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE)).Q
    shift = torch.randn(3, dtype=DOUBLE)
    one = sinkhorn_points(x, y, cost=cost, epsilon=0.5, **CONVERGED)
    moved = sinkhorn_points(x @ rotation + shift, y @ rotation + shift, cost=cost, epsilon=0.5, **CONVERGED)
    torch.testing.assert_close(moved.plan(), one.plan(), rtol=1e-8, atol=1e-10)
    expected = one.barycentric_map() @ rotation + shift
    torch.testing.assert_close(moved.barycentric_map(), expected, rtol=1e-8, atol=1e-9)
    order = torch.randperm(n)
    torch.testing.assert_close(
        sinkhorn_points(x[order], y, cost=cost, epsilon=0.5, **CONVERGED).f, one.f[order], rtol=1e-8, atol=1e-10
    )


# ---- batches, and costs of points ----


def test_batched_equals_looped(device: torch.device) -> None:
    cost, a, b = (x.to(device) for x in problem(2, 3))
    epsilon = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=DOUBLE, device=device)
    rho = b + 0.5
    batch = sinkhorn(cost, a, b, epsilon=epsilon, rho_b=rho, **CONVERGED)
    z, w = torch.rand(2, 3, 7, 2, dtype=DOUBLE, device=device), torch.rand(2, 3, 5, dtype=DOUBLE, device=device)
    assert batch.value.shape == batch.n_iter.shape == batch.converged.shape == batch.marginal_error.shape == (2, 3)
    for i in itertools.product(range(2), range(3)):
        alone = sinkhorn(cost[i], a[i], b[i], epsilon=epsilon[i], rho_b=rho[i], **CONVERGED)
        for what in ("value", "f", "g", "n_iter", "marginal_error", "converged", "epsilon"):
            assert torch.equal(getattr(batch, what)[i], getattr(alone, what))
        assert torch.equal(batch.plan()[i], alone.plan())
        torch.testing.assert_close(batch.transport_cost()[i], alone.transport_cost(), **EXACT)
        torch.testing.assert_close(batch.apply(z)[i], alone.plan() @ z[i], **EXACT)
        torch.testing.assert_close(batch.apply_transpose(w)[i], alone.plan().t() @ w[i], **EXACT)
        torch.testing.assert_close(batch.barycentric_map(z)[i], alone.barycentric_map(z[i]), **EXACT)


def test_weights_penalties_and_epsilon_of_all_problems() -> None:
    """``[n]`` serves the whole batch."""
    cost, a, b = problem(3)
    batch = sinkhorn(cost, a[0], b[0], epsilon=torch.tensor(0.2), rho_a=a[0] + 1, rho_b=torch.tensor(0.4), **CONVERGED)
    for i in range(3):
        alone = sinkhorn(cost[i], a[0], b[0], epsilon=0.2, rho_a=a[0] + 1, rho_b=0.4, **CONVERGED)
        torch.testing.assert_close(batch.value[i], alone.value, rtol=1e-7, atol=0)  # float32's 0.2 and 0.4


COSTS = ["sqeuclidean", "euclidean", "cosine"]


@pytest.mark.parametrize("dimension", [1, 2, 3, 9])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("cost", COSTS)
def test_points_equal_dense(device: torch.device, cost: str, streaming: bool, dimension: int) -> None:
    x, y = torch.randn(2, 6, dimension, dtype=DOUBLE), torch.randn(2, 8, dimension, dtype=DOUBLE)
    y[0, 1], x[1, 3] = x[0, 2], 0
    a, b = weights_of(2, 6), weights_of(2, 8)
    a[0, 2] = b[1, :2] = 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    options = {"relative_epsilon": 0.3, "epsilon_scaling": 0.5, "rho_b": torch.rand(8, dtype=DOUBLE) + 0.5, **CONVERGED}
    expected = sinkhorn(reference.pairwise_cost(x, y, cost), a, b, **options)
    options["rho_b"] = options["rho_b"].to(device)
    on_device = [tensor.to(device) for tensor in (x, y, a, b)]
    transport = sinkhorn_points(*on_device, cost=cost, streaming=streaming, **options)
    for what in ("value", "f", "g", "epsilon"):
        torch.testing.assert_close(getattr(transport, what).cpu(), getattr(expected, what), **EXACT)
    torch.testing.assert_close(transport.plan().cpu(), expected.plan(), **EXACT)
    torch.testing.assert_close(transport.barycentric_map().cpu(), expected.barycentric_map(y), **EXACT)
    torch.testing.assert_close(transport.transport_cost().cpu(), expected.transport_cost(), **EXACT)
    for actual, truth in zip(transport.marginals, expected.marginals, strict=True):
        torch.testing.assert_close(actual.cpu(), truth, **EXACT)
    z, w = torch.randn(2, 8, 4, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)
    torch.testing.assert_close(transport.apply(z.to(device)).cpu(), expected.apply(z), **EXACT)
    torch.testing.assert_close(transport.apply_transpose(w.to(device)).cpu(), expected.apply_transpose(w), **EXACT)


def test_points_in_several_panels() -> None:
    """Of rows and of threads; one problem after another."""
    x, y = torch.rand(2, 1100, 2, dtype=DOUBLE), torch.rand(2, 1300, 2, dtype=DOUBLE)
    cost = reference.pairwise_cost(x, y, "euclidean")
    expected = sinkhorn(cost, epsilon=0.2, tol=1e-9)
    leaves = [points.clone().requires_grad_() for points in (x, y)]
    transport = sinkhorn_points(*leaves, cost="euclidean", epsilon=0.2, tol=1e-9)
    torch.testing.assert_close(transport.apply(y).detach(), expected.plan() @ y, **EXACT)
    torch.testing.assert_close(transport.apply_transpose(x).detach(), expected.plan().mT @ x, **EXACT)
    pull = torch.where(cost > 0, expected.plan() / cost, 0)
    by_x = pull.sum(2, keepdim=True) * x - pull @ y
    by_y = pull.sum(1).unsqueeze(2) * y - pull.mT @ x
    for actual, truth in zip(torch.autograd.grad(transport.value.sum(), leaves), (by_x, by_y), strict=True):
        torch.testing.assert_close(actual, truth, **EXACT)


@pytest.mark.parametrize("code", range(3))
def test_kernel_of_the_plan_is_that_of_plain_operators(code: int) -> None:
    """``pyreg::point_plan`` where it has no kernel; float32 to some roundings of exponents of up to 24."""
    for n, m, d, k in itertools.product((1, 7), (3, 70), (1, 2, 3, 8), (1, 3)):
        x, y = torch.randn(2, n, d).double(), torch.randn(2, m, d).double()
        x[:, 0] = y[:, 1]
        f, g = torch.randn(2, n, dtype=DOUBLE), torch.randn(2, m, dtype=DOUBLE)
        g[0, 2] = -INF
        u, z = torch.randn(2, n, k, dtype=DOUBLE), torch.randn(2, m, k, dtype=DOUBLE)
        epsilon = torch.tensor([0.5, 0.8], dtype=DOUBLE)
        for flags in ((False, *[True] * 4), (False, False, False, True, True), (True, *[True] * 4)):
            expected = _point_plan._plain(x, y, f, g, epsilon, u, z, code, *flags)
            for actual, truth in zip(
                torch.ops.pyreg.point_plan(x, y, f, g, epsilon, u, z, code, *flags), expected, strict=True
            ):
                torch.testing.assert_close(actual, truth, **EXACT)
            single = torch.ops.pyreg.point_plan(x.float(), y.float(), f, g, epsilon, u.float(), z.float(), code, *flags)
            for actual, truth in zip(single, expected, strict=True):
                assert (actual - truth).norm() <= 100 * 2**-24 * max(truth.norm().item(), 1)


def test_exponents_beyond_all_numbers() -> None:
    """As between two weights of 0: large, but a number."""
    x, f = torch.zeros(1, 2, 1), torch.tensor([[0.0, 1e4]], dtype=DOUBLE)
    ones, epsilon = torch.ones(1, 2, 1), torch.ones(1, dtype=DOUBLE)
    rows, *_ = torch.ops.pyreg.point_plan(x, x, f, f, epsilon, ones, ones, 0, False, True, False, False, False)
    assert rows.isfinite().all()
    assert rows.min() > 1e30


def test_memory_of_points() -> None:
    """K alone would take 144 MB; value and gradients of everything that streams."""
    x, y = torch.rand(6000, 3, requires_grad=True), torch.rand(6000, 3, requires_grad=True)

    def call() -> None:
        transport = sinkhorn_points(x, y, epsilon=0.5, tol=1e-2, max_iter=20)
        loss = transport.value + transport.barycentric_map().square().sum() * 1e-3 + transport.transport_cost()
        loss.backward()

    def second_order() -> None:
        value = sinkhorn_points(x, y, epsilon=0.5, tol=1e-2, max_iter=20).value
        (by_x,) = torch.autograd.grad(value, x, create_graph=True)
        by_x.square().sum().backward()

    call()
    if not memory._reset_peak_resident():
        pytest.skip("the peak of resident memory cannot be reset")
    for what in (call, second_order):
        assert memory._resident(what) <= 48 << 20


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("epsilon", [{"epsilon": 0.5}, {"relative_epsilon": 0.2}], ids=str)
def test_ragged_equals_looped(device: torch.device, epsilon: dict[str, float], scaling: float | None) -> None:
    n, m = [3, 1, 6], [4, 5, 2]
    x, y = torch.randn(10, 2, dtype=DOUBLE, device=device), torch.randn(11, 2, dtype=DOUBLE, device=device)
    a, b = (torch.rand(k, dtype=DOUBLE, device=device) + 0.5 for k in (10, 11))
    rho = torch.rand(11, dtype=DOUBLE, device=device) + 0.5
    offsets = [[0, *itertools.accumulate(sizes)] for sizes in (n, m)]
    options = {**epsilon, "epsilon_scaling": scaling, **CONVERGED}

    def ragged(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, **rhos: Any) -> Transport:
        return sinkhorn_points(x, y, a, b, x_offsets=offsets[0], y_offsets=torch.tensor(offsets[1]), **rhos, **options)

    transport, uniform = ragged(x, y, a, b, rho_b=rho), ragged(x, y, None, None)
    weights = torch.rand(3, dtype=DOUBLE, device=device)
    by_x, by_a = gradients(lambda x, a: ragged(x, y, a, b, rho_b=rho).value.dot(weights), x, a)
    for k in range(3):
        i, j = (slice(*bounds[k : k + 2]) for bounds in offsets)
        alone = sinkhorn_points(x[i], y[j], a[i], b[j], rho_b=rho[j], **options)
        torch.testing.assert_close(transport.value[k], alone.value, **EXACT)
        torch.testing.assert_close(transport.epsilon[k], alone.epsilon, **EXACT)
        torch.testing.assert_close(transport.f[i], alone.f, **EXACT)
        torch.testing.assert_close(transport.g[j], alone.g, **EXACT)
        torch.testing.assert_close(transport.plan()[k], alone.plan(), **EXACT)
        torch.testing.assert_close(transport.barycentric_map()[i], alone.barycentric_map(), **EXACT)
        torch.testing.assert_close(transport.apply_transpose(a)[j], alone.apply_transpose(a[i]), **EXACT)
        torch.testing.assert_close(transport.marginals[0][i], alone.marginals[0], **EXACT)
        expected = gradients(
            lambda x, a, k=k, j=j: weights[k] * sinkhorn_points(x, y[j], a, b[j], rho_b=rho[j], **options).value,
            *(x[i], a[i]),
        )
        torch.testing.assert_close(by_x[i], expected[0], **EXACT)
        torch.testing.assert_close(by_a[i], expected[1], **EXACT)
        torch.testing.assert_close(uniform.value[k], sinkhorn_points(x[i], y[j], **options).value, **EXACT)


@pytest.mark.parametrize("reference", ["product", "counting"])
def test_second_order_of_ragged_equals_looped(device: torch.device, reference: str) -> None:
    n, m = [3, 1, 4], [2, 5, 3]
    offsets = [[0, *itertools.accumulate(sizes)] for sizes in (n, m)]
    inputs = [torch.randn(sum(n), 2, dtype=DOUBLE, device=device), torch.randn(sum(m), 2, dtype=DOUBLE, device=device)]
    inputs += [torch.rand(sum(sizes), dtype=DOUBLE, device=device) + 0.5 for sizes in (n, m)]
    direction = [torch.randn_like(tensor) for tensor in inputs]

    def loss(transport: Transport, x: Tensor) -> Tensor:
        return transport.value.sum() + transport.f.sin().sum() + (transport.apply_transpose(x) ** 2).sum()

    options = {"epsilon": 0.5, "rho_a": 0.7, "rho_b": 0.9, "reference": reference, **CONVERGED}

    def ragged(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return loss(sinkhorn_points(x, y, a, b, x_offsets=offsets[0], y_offsets=offsets[1], **options), x)

    def looped(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        total = x.new_zeros(())
        for k in range(3):
            i, j = (slice(*bounds[k : k + 2]) for bounds in offsets)
            total = total + loss(sinkhorn_points(x[i], y[j], a[i], b[j], **options), x[i])
        return total

    def along(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        found = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        return sum((gradient * by).sum() for gradient, by in zip(found, direction, strict=True))  # type: ignore[return-value]

    for function in (lambda f: gradients(f, *inputs), lambda f: gradients(functools.partial(along, f), *inputs)):
        for actual, expected in zip(function(ragged), function(looped), strict=True):
            torch.testing.assert_close(actual, expected, **EXACT)


# Sizes below and above those that threads share, in one block of rows and in several.
SIZES = [(3, 5), (700, 40), (300, 260), (1, 1), (420, 430), (1100, 1000), (40, 700)]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("dimension", [2, 6])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_padding_is_not_looked_at(is_streaming: bool, dimension: int, dtype: torch.dtype) -> None:
    """Of a ragged batch problems have the bits that they have alone, and what stands beyond them is never read: NaN."""
    n, m = (max(sizes) for sizes in zip(*SIZES, strict=True))
    batch = len(SIZES)
    x, y = (torch.full((batch, count, dimension), math.nan, dtype=dtype) for count in (n, m))
    a, b = (torch.zeros(batch, count, dtype=DOUBLE) for count in (n, m))
    for k, (rows, columns) in enumerate(SIZES):
        x[k, :rows], y[k, :columns] = torch.rand(rows, dimension), torch.rand(columns, dimension)
        a[k, :rows], b[k, :columns] = 1 / rows, 1 / columns
    epsilon = torch.full((batch,), 0.05, dtype=DOUBLE)
    u, z = (weights.unsqueeze(2).to(dtype).expand(-1, -1, 2).contiguous() for weights in (a, b))

    def solve(which: slice, n: int, m: int) -> tuple[Tensor, ...]:
        points, weights = (x[which, :n].contiguous(), y[which, :m].contiguous()), (a[which, :n], b[which, :m])
        weights = tuple(each.contiguous() for each in weights)
        logarithms = tuple(each.log() for each in weights)
        found = torch.ops.pyreg.sinkhorn_points(
            *(*points, 0, is_streaming, *weights, *logarithms, None, None, epsilon[which], epsilon[which], 0.5),
            *(False, 5, 0.0, epsilon[which].unsqueeze(1) * logarithms[1]),
        )
        factors = u[which, :n].contiguous(), z[which, :m].contiguous()
        passed = torch.ops.pyreg.point_plan(
            *points, found[0], found[1], epsilon[which], *factors, 0, False, True, True, True, True
        )
        return *found, *passed

    together = solve(slice(0, batch), n, m)
    for k, (rows, columns) in enumerate(SIZES):
        alone = solve(slice(k, k + 1), rows, columns)
        counts = (rows, columns, 0, 0, rows, columns, rows, columns)
        for actual, expected, count in zip(together, alone, counts, strict=True):
            if count == 0:
                assert torch.equal(actual[k], expected[0])
            else:
                assert expected.isfinite().all()
                assert torch.equal(actual[k, :count], expected[0])
                if actual.dim() == 2:
                    assert (actual[k, count:] == -torch.inf).all()
                else:
                    assert actual[k, count:].count_nonzero() == 0


@pytest.mark.parametrize("cost", COSTS)
def test_where_stages_begin_between_points(cost: str) -> None:
    """The bound on the costs' range holds them all, and is not far off where clouds are round."""
    options = {"epsilon": 1e-3, "max_iter": 1, "tol": 0.0, "cost": cost}
    for dimension, most in ((1, 1.5), (3, 3.0), (64, 4.5)):
        x, y = torch.randn(40, dimension, dtype=DOUBLE), torch.randn(50, dimension, dtype=DOUBLE) + 2
        costs = reference.pairwise_cost(x, y, cost)
        found = sinkhorn_points(x, y, **options)._cost.range().item()
        exact = (costs.max() - costs.min()).item()
        assert exact <= found
        assert found <= (2 if cost == "cosine" else most * costs.max().item())


# ---- a cost that a function returns ----


def weighted(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances, of which coordinates have a share each."""
    shares = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return (shares * (x.unsqueeze(-2) - y.unsqueeze(-3)).square()).sum(-1)


@pytest.mark.parametrize("kind", ["balanced", "unbalanced"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_function_as_a_cost(device: torch.device, batch: tuple[int, ...], kind: str) -> None:
    """It is the transport under the costs that it returns, and its chain rule is autograd's."""
    points = [torch.randn(*batch, count, 3, dtype=DOUBLE).to(device) for count in (5, 7)]
    weights = [weights.to(device) for weights in problem(*batch)[1:]]
    options = {"epsilon": 2.0, **penalties(kind), **CONVERGED}

    def by_function(x: Tensor, y: Tensor) -> Tensor:
        transport = sinkhorn_points(x, y, *weights, cost=weighted, **options)
        return transport.value.sum() + transport.barycentric_map().sin().sum()

    def by_hand(x: Tensor, y: Tensor) -> Tensor:
        transport = sinkhorn(weighted(x, y), *weights, **options)
        return transport.value.sum() + transport.barycentric_map(y).sin().sum()

    torch.testing.assert_close(by_function(*points), by_hand(*points), **EXACT)
    for actual, expected in zip(gradients(by_function, *points), gradients(by_hand, *points), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)
    same = sinkhorn_points(*points, *weights, cost=lambda x, y: reference.pairwise_cost(x, y, "euclidean"), **options)
    named = sinkhorn_points(*points, *weights, cost="euclidean", **options)
    torch.testing.assert_close(same.value, named.value, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_function_gets_the_dtype_that_is_computed_in(dtype: torch.dtype) -> None:
    x, y = torch.rand(5, 2).to(dtype).requires_grad_(), torch.rand(7, 2).to(dtype)
    seen = []

    def cost(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.dtype, y.dtype, torch.is_autocast_enabled("cpu")))
        return weighted(x, y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        sinkhorn_points(x, y, cost=cost, epsilon=0.5).value.backward()
    assert seen == [(torch.float32, torch.float32, False)]
    assert x.grad.dtype == dtype


def test_first_and_second_order_of_a_function() -> None:
    inputs = [torch.randn(count, 2, dtype=DOUBLE, requires_grad=True) for count in (3, 4)]

    def function(x: Tensor, y: Tensor) -> Tensor:
        transport = sinkhorn_points(x, y, cost=weighted, epsilon=2.0, tol=1e-15, max_iter=300)
        return torch.stack([transport.value, transport.f.cos().sum() + transport.barycentric_map().square().sum()])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-15 is below rounding
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("cost", "options", "error", "text"),
    [
        (lambda x, y: 1.0, {}, TypeError, "expected cost to return a tensor, got float"),
        (lambda x, y: x @ y.T + x[0, 0], {"x_offsets": [0, 3], "y_offsets": [0, 4]}, ValueError, "with x_offsets, got"),
        (lambda x, y: x @ y.T, {"y_offsets": [0, 4]}, ValueError, "'cosine' with y_offsets, got a function; solve"),
        (lambda x, y: x @ y.T, {"streaming": True}, ValueError, "'cosine' with streaming=True, got a function, whose"),
        (lambda x, y: y @ x.T, {}, ValueError, r"to return costs of shape \[..., n, m\] = \[3, 4\], got \[4, 3\]"),
        (lambda x, y: (x @ y.T).half(), {}, TypeError, "costs of torch.float32 on cpu, as its points are, got torch"),
        (lambda x, y: (x @ y.T).long(), {}, TypeError, r"got torch.int64 on cpu; end it with .to\(x\)"),
        (lambda x, y: x @ y.T + NAN, {}, ValueError, r"expected cost without NaN and -inf, got nan; \+inf forbids"),
        ([1.0], {}, ValueError, r"'cosine' or a function of points, got \[1.0\]"),
    ],
)  # fmt: skip
def test_bad_function(cost: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^sinkhorn_points: .*{text}"):
        sinkhorn_points(torch.zeros(3, 2), torch.ones(4, 2), cost=cost, **{"epsilon": 0.1, **options})


# ---- the map of new points ----


def mapped_by_hand(q: Tensor, y: Tensor, b: Tensor, g: Tensor, epsilon: float, cost: str) -> Tensor:
    """A softmax of what the columns' potentials leave of the costs."""
    exponents = (g.unsqueeze(-2) - reference.pairwise_cost(q, y, cost)) / epsilon
    return (exponents + b.log().unsqueeze(-2)).softmax(-1) @ y


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_map(device: torch.device, cost: str, kind: str, batch: tuple[int, ...]) -> None:
    x, y, q = (torch.randn(*batch, count, 2, dtype=DOUBLE).to(device) for count in (5, 7, 11))
    a, b = (weights.to(device) for weights in problem(*batch)[1:])
    rhos = {key: rho.to(device) if isinstance(rho, Tensor) else rho for key, rho in penalties(kind).items()}
    transport = sinkhorn_points(x, y, a, b, cost=cost, epsilon=0.5, **rhos, **CONVERGED)
    torch.testing.assert_close(transport.map(x), transport.barycentric_map(), **EXACT)
    expected = mapped_by_hand(q, y, b, transport.g, 0.5, cost)
    torch.testing.assert_close(transport.map(q), expected, **EXACT)
    assert transport.map(q[..., :1, :]).shape == (*batch, 1, 2)
    assert transport.map(q[..., :0, :]).shape == (*batch, 0, 2)
    counting = sinkhorn_points(x, y, a, b, cost=cost, epsilon=0.5, **rhos, reference="counting", **CONVERGED)
    torch.testing.assert_close(counting.map(x), counting.barycentric_map(), **EXACT)
    if kind == "balanced":
        torch.testing.assert_close(counting.map(q), expected, **EXACT)


def test_map_far_away_and_in_float32() -> None:
    """Where all exponentials are 0 there is a nearest point; a weight of 0 draws nothing, however near it is."""
    x, y, b = torch.rand(20, 3), torch.rand(30, 3), weights_of(30).float()
    b[4] = 0
    b = b / b.sum()
    transport = sinkhorn_points(x, y, None, b, epsilon=0.05, tol=1e-6)
    exact = sinkhorn_points(x.double(), y.double(), None, b.double(), epsilon=0.05, tol=1e-6)
    q = torch.cat([torch.rand(10, 3), y[4:5], 100 * torch.randn(10, 3)])
    found, expected = transport.map(q), exact.map(q.double())
    assert found.isfinite().all()
    torch.testing.assert_close(found[:11].double(), expected[:11], rtol=0, atol=1e-4)
    # Costs of 10 000 have 1e-3 to themselves in float32: 0.02 of an exponent.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    least, most = y.amin(0), y.amax(0)
    assert ((found >= least - 1e-6) & (found <= most + 1e-6)).all()


def test_map_of_a_ragged_batch() -> None:
    x, y, q = torch.rand(8, 2, dtype=DOUBLE), torch.rand(11, 2, dtype=DOUBLE), torch.rand(2, 4, 2, dtype=DOUBLE)
    transport = sinkhorn_points(x, y, epsilon=0.2, x_offsets=[0, 3, 8], y_offsets=[0, 7, 11], **CONVERGED)
    for k, (i, j) in enumerate(((slice(0, 3), slice(0, 7)), (slice(3, 8), slice(7, 11)))):
        alone = sinkhorn_points(x[i], y[j], epsilon=0.2, **CONVERGED)
        torch.testing.assert_close(transport.map(q)[k], alone.map(q[k]), **EXACT)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_first_and_second_order_of_map(cost: str) -> None:
    inputs = [torch.randn(count, 2, dtype=DOUBLE, requires_grad=True) for count in (3, 4, 2)]

    def function(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return sinkhorn_points(x, y, cost=cost, epsilon=1.0, tol=1e-15, max_iter=300).map(q)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-15 is below rounding
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_map_compiled_and_mapped() -> None:
    x, y, q = (torch.randn(2, count, 2, dtype=DOUBLE) for count in (5, 7, 4))

    def function(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return sinkhorn_points(x, y, epsilon=1.0, **CONVERGED).map(q)

    expected, by_points = function(x, y, q), gradients(lambda *points: function(*points).sin().sum(), x, y, q)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, q), expected, **EXACT)
    for actual, truth in zip(gradients(lambda *points: compiled(*points).sin().sum(), x, y, q), by_points, strict=True):
        torch.testing.assert_close(actual, truth, **EXACT)
    torch.testing.assert_close(torch.func.vmap(function)(x, y, q), expected, **EXACT)
    by_func = torch.func.grad(lambda *points: function(*points).sin().sum(), argnums=(0, 1, 2))(x, y, q)
    for actual, truth in zip(by_func, by_points, strict=True):
        torch.testing.assert_close(actual, truth, **EXACT)


# ---- edges ----


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_zero_are_absent(device: torch.device, kind: str, name: str) -> None:
    cost, a, b = (x.to(device) for x in problem())
    rhos = {key: rho.to(device) if isinstance(rho, Tensor) else rho for key, rho in penalties(kind).items()}
    a[1] = b[2] = b[5] = 0
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a.nonzero().squeeze(1), b.nonzero().squeeze(1)
    fewer = {
        key: rho[rows if key == "rho_a" else columns] if isinstance(rho, Tensor) else rho for key, rho in rhos.items()
    }
    full = sinkhorn(cost, a, b, epsilon=0.1, **rhos, reference=name, **CONVERGED)
    less = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon=0.1, **fewer, reference=name, **CONVERGED)
    torch.testing.assert_close(full.value, less.value, **EXACT)
    torch.testing.assert_close(full.plan()[rows][:, columns], less.plan(), **EXACT)
    torch.testing.assert_close(full.f[rows], less.f, **EXACT)
    torch.testing.assert_close(full.g[columns], less.g, **EXACT)
    assert full.plan()[1].abs().max() == full.plan()[:, [2, 5]].abs().max() == 0
    z = torch.rand(7, 2, dtype=DOUBLE, device=device)
    torch.testing.assert_close(full.apply(z), full.plan() @ z, **EXACT)
    if name == "counting":
        assert full.f[1] == full.g[2] == -INF
    else:  # as of a row of next to no weight, and so goes its map
        nearly = sinkhorn(cost, a.clamp_min(1e-12), b, epsilon=0.1, **rhos, reference=name, **CONVERGED)
        torch.testing.assert_close(full.f[1], nearly.f[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(full.barycentric_map(z)[1], nearly.barycentric_map(z)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("kind", ["balanced", "unbalanced"])
def test_forbidden_pairs(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """As good as a cost of a thousand epsilon."""
    cost, a, b = (x.to(dtype).to(device) for x in problem())
    forbidden = torch.zeros(5, 7, dtype=torch.bool, device=device)
    forbidden[0, 0] = forbidden[2, 1:] = forbidden[3:, 4] = True
    a[2], b[0] = 0.05, 0.5  # so that a plan exists
    a, b = a / a.sum(), b / b.sum()
    options = {"epsilon": 0.1, **penalties(kind), "tol": 1e-6 if dtype == torch.float32 else 1e-13, "max_iter": 5000}
    transport = sinkhorn(cost.masked_fill(forbidden, INF), a, b, **options)
    expected = sinkhorn(cost.masked_fill(forbidden, 100.0), a, b, **options)
    assert (transport.plan()[forbidden] == 0).all()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else EXACT
    for what in ("value", "f", "g"):
        torch.testing.assert_close(getattr(transport, what), getattr(expected, what), **close)
    torch.testing.assert_close(transport.transport_cost(), expected.transport_cost(), **close)
    (by_cost,) = gradients(lambda x: sinkhorn(x, a, b, **options).f.square().sum(), cost.masked_fill(forbidden, INF))
    (truth,) = gradients(lambda x: sinkhorn(x, a, b, **options).f.square().sum(), cost.masked_fill(forbidden, 100.0))
    torch.testing.assert_close(by_cost, truth, **close)


def test_row_that_may_go_nowhere() -> None:
    """With a penalty it stays: it costs rho a_i."""
    cost, a, b = problem()
    cost[2] = INF
    transport = sinkhorn(cost, a, b, epsilon=0.1, rho_a=0.7, rho_b=0.3, **CONVERGED)
    rows = torch.tensor([0, 1, 3, 4])
    less = sinkhorn(cost[rows], a[rows], b, epsilon=0.1, rho_a=0.7, rho_b=0.3, **CONVERGED)
    # Its part of the product of weights, which the entropy is relative to, stays too.
    torch.testing.assert_close(transport.value, less.value + 0.7 * a[2] + 0.1 * a[2] * b.sum(), **EXACT)
    assert transport.f[2] == INF
    assert transport.plan()[2].abs().max() == 0
    assert transport.barycentric_map(torch.ones(7, 1, dtype=DOUBLE))[2] == 0


def test_no_problems() -> None:
    cost, a, b = problem(0)
    inputs = [x.requires_grad_() for x in (cost, a, b)]
    transport = sinkhorn(*inputs, epsilon=torch.rand(0, dtype=DOUBLE), rho_a=a.detach() + 1)
    assert transport.value.shape == transport.converged.shape == (0,)
    assert transport.plan().shape == (0, 5, 7)
    (transport.value.sum() + transport.f.sum()).backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
    assert repr(transport) == "Transport(n=5, m=7, batch=[0], reference='product')"


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (13, 1), (17, 31), (64, 65), (257, 300)])
def test_sizes(device: torch.device, n: int, m: int) -> None:
    """Around vectors, four rows, and blocks for threads: marginals hold, and a strided cost is the same one."""
    for dtype, limit in ((DOUBLE, 1e-11), (torch.float32, 3e-6)):
        cost, a, b = (x.to(dtype).to(device) for x in problem(n=n, m=m))
        transport = sinkhorn(cost, a, b, epsilon=0.2, tol=limit / 3, max_iter=2000)
        rows, columns = transport.marginals
        assert (rows - a).abs().sum() + (columns - b).abs().sum() <= limit
        strided = cost.t().contiguous().t()
        assert torch.equal(sinkhorn(strided, a, b, epsilon=0.2, tol=limit / 3, max_iter=2000).f, transport.f)


def test_same_bits_for_any_number_of_threads() -> None:
    cost, a, b = (x.float() for x in problem(n=300, m=257))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            transport = sinkhorn(cost, a, b, epsilon=0.01, tol=1e-6, epsilon_scaling=0.5)
            results.append((transport.f, transport.g, transport.plan()))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_arguments_are_left_alone() -> None:
    cost, a, b = problem()
    start = torch.zeros(5, dtype=DOUBLE), torch.zeros(7, dtype=DOUBLE)
    tensors = (cost, a, b, *start)
    before = [x.clone() for x in tensors]
    sinkhorn(cost, a, b, epsilon=0.1, init=start).plan()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


# ---- gradients ----


def all_results(transport: Transport, z: Tensor) -> Tensor:
    """Three numbers that depend on everything that a transport gives but its value."""
    parts = (
        *(transport.f, transport.g, transport.plan(), transport.barycentric_map(z), transport.transport_cost()),
        *(transport.apply(z), transport.apply_transpose(transport.f), *transport.marginals),
    )
    flat = torch.cat([part.flatten() for part in parts])
    return torch.stack([(flat * torch.cos(k * torch.arange(len(flat), dtype=DOUBLE))).sum() for k in (1, 2, 3)])


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["value", "the rest"])
def test_first_and_second_order(what: str, kind: str, name: str) -> None:
    """Weights as a softmax: of equal sums, as they must be where both marginals hold."""
    cost, a, b = problem(n=3, m=4)
    z, rhos = torch.randn(4, 2, dtype=DOUBLE), penalties(kind, 3, 4)

    def function(cost: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        a, b = 1.3 * log_a.softmax(0), 1.3 * log_b.softmax(0)
        transport = sinkhorn(cost, a, b, epsilon=0.2, **rhos, reference=name, tol=1e-15, max_iter=500)
        return transport.value if what == "value" else all_results(transport, z)

    inputs = [x.requires_grad_() for x in (cost, a.log(), b.log())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-15 is below rounding
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(("kind", "name"), [("balanced", "product"), ("an entry each", "counting")])
@pytest.mark.parametrize("cost", COSTS)
def test_first_and_second_order_of_points(
    monkeypatch: pytest.MonkeyPatch, cost: str, kind: str, name: str, held: bool
) -> None:
    """With the plan held, and never held, for the implicit derivatives."""
    if not held:
        monkeypatch.setattr(_point_potentials, "_MOST_HELD", 0)
        monkeypatch.setattr(_streaming, "_ENTRIES", 8)  # two rows
    x, y = (torch.randn(k, 2, dtype=DOUBLE, requires_grad=True) for k in (3, 4))
    log_a, log_b = (torch.randn(k, dtype=DOUBLE, requires_grad=True) for k in (3, 4))
    rhos = penalties(kind, 3, 4)

    def function(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        a, b = 1.3 * log_a.softmax(0), 1.3 * log_b.softmax(0)
        transport = sinkhorn_points(x, y, a, b, cost=cost, epsilon=0.5, **rhos, reference=name, tol=1e-15, max_iter=300)
        rest = (transport.f.cos(), transport.barycentric_map(), transport.apply_transpose(x), *transport.marginals)
        numbers = torch.cat([part.flatten() for part in rest])
        weights = torch.arange(len(numbers), dtype=DOUBLE).cos()
        return torch.stack([transport.value, numbers.dot(weights) + transport.transport_cost()])

    inputs = (x, y, log_a, log_b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1e-15 is below rounding
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("code", range(3))
@pytest.mark.parametrize("asked", ["rows", "columns", "by_x", "by_y", "everything", "times_cost"])
def test_first_and_second_order_of_a_pass_over_the_plan(asked: str, code: int) -> None:
    names = ["rows", "columns", "by_x", "by_y"] if asked == "everything" else ["rows", asked]
    x, y = torch.randn(2, 3, 2, dtype=DOUBLE), torch.randn(2, 2, 2, dtype=DOUBLE)
    f, g = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 2, dtype=DOUBLE)
    u, z = torch.randn(2, 3, 2, dtype=DOUBLE), torch.randn(2, 2, 2, dtype=DOUBLE)
    inputs = [tensor.requires_grad_() for tensor in (x, y, f, g, u, z)]
    epsilon = torch.tensor([0.5, 0.8], dtype=DOUBLE)

    def function(x: Tensor, y: Tensor, f: Tensor, g: Tensor, u: Tensor, z: Tensor) -> Tensor:
        asked_for = dict.fromkeys(names, True)
        parts = _point_plan.point_plan((x, y), (f, g), epsilon, code, u, z, **asked_for)
        flat = torch.cat([part.flatten() for part in parts])
        return flat.dot(torch.arange(len(flat), dtype=DOUBLE).cos())

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("held", [True, False])
def test_gradients_of_points_are_those_of_their_costs(monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """By autograd through the dense operators, in float32, whose float64 truth has both."""
    if not held:
        monkeypatch.setattr(_point_potentials, "_MOST_HELD", 0)
    x, y = torch.randn(20, 3), torch.randn(30, 3)

    def between_points(x: Tensor, y: Tensor) -> Tensor:
        transport = sinkhorn_points(x, y, epsilon=0.5, tol=1e-6, max_iter=5000)
        return transport.value + transport.barycentric_map().square().sum() + transport.g.square().sum()

    def dense(x: Tensor, y: Tensor) -> Tensor:
        transport = sinkhorn(reference.pairwise_cost(x, y, "sqeuclidean"), epsilon=0.5, tol=1e-12, max_iter=5000)
        return transport.value + transport.barycentric_map(y).square().sum() + transport.g.square().sum()

    expected = gradients(dense, x.double(), y.double())
    for actual, truth in zip(gradients(between_points, x, y), expected, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, truth) <= 1e-4  # 100 times the tolerance, as of dense costs


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_implicit_gradients_are_those_through_all_iterations(kind: str, name: str) -> None:
    """The second truth: automatic differentiation of the reference's loop."""
    cost, a, b = problem()
    rhos = penalties(kind)
    weights = torch.randn(5, 7, dtype=DOUBLE)

    def unrolled(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        f, g = reference.sinkhorn(cost, a, b, 0.2, **rhos, reference=name, max_iter=300, tol=0)
        value = reference.value(cost, a, b, f, g, 0.2, **rhos, reference=name)
        return value + (weights * reference.plan(cost, a, b, f, g, 0.2, name)).sum()

    def implicit(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        transport = sinkhorn(cost, a, b, epsilon=0.2, **rhos, reference=name, **CONVERGED)
        return transport.value + (weights * transport.plan()).sum()

    expected, actual = gradients(unrolled, cost, a, b), gradients(implicit, cost, a, b)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-8, atol=1e-9)
    for x, y in zip(actual[1:], expected[1:], strict=True):
        if kind == "balanced":
            same_up_to_a_constant(x, y, rtol=1e-8, atol=1e-9)
        else:
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "semi-relaxed"])
def test_gradients_at_weights_of_zero(kind: str) -> None:
    """One-sided differences, along which the sums stay."""
    cost = torch.rand(5, 6, dtype=DOUBLE)
    a = torch.tensor([0.2, 0.0, 0.3, 0.5, 0.0], dtype=DOUBLE)
    b = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4, 0.0], dtype=DOUBLE)
    z, rhos = torch.randn(6, 2, dtype=DOUBLE), penalties(kind)

    def function(a: Tensor, b: Tensor) -> Tensor:
        transport = sinkhorn(cost, a, b, epsilon=0.2, **rhos, **CONVERGED)
        return torch.cat([transport.value.view(1), all_results(transport, z)])

    h, here = 1e-5, function(a, b)
    for output in range(4):
        by_a, by_b = gradients(lambda a, b, output=output: function(a, b)[output], a, b)
        for i, j in ((1, 0), (4, 0), (0, 2), (0, 5)):
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            if i > 0:
                da[i], da[0] = 1, -1
            else:
                db[j], db[1] = 1, -1
            near, far = (function(a + step * da, b + step * db) for step in (h, 2 * h))
            difference = ((4 * near - 3 * here - far) / (2 * h))[output].item()
            # The third derivatives are of the order of 1 / epsilon^2 and more, times h^2.
            assert (by_a.dot(da) + by_b.dot(db)).item() == pytest.approx(difference, rel=1e-4, abs=1e-5)


def test_gradient_of_float32() -> None:
    cost, a, b = (x.float() for x in problem(n=20, m=30))

    def function(cost: Tensor, a: Tensor, b: Tensor, tol: float) -> Tensor:
        transport = sinkhorn(cost, a, b, epsilon=0.05, rho_a=0.5, tol=tol, max_iter=5000)
        return transport.value + transport.f.square().sum() + transport.plan().square().sum()

    expected = gradients(lambda *x: function(*x, 1e-13), cost.double(), a.double(), b.double())
    for actual, truth in zip(gradients(lambda *x: function(*x, 1e-6), cost, a, b), expected, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, truth) <= 1e-4  # 100 times the tolerance; float64 with it has 4.5e-5


def test_value_alone_solves_no_system(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, a, b = problem()

    def refuse(*_: Any) -> None:
        raise AssertionError("the envelope theorem needs no derivative of potentials")

    monkeypatch.setattr(_adjoint, "solve", refuse)
    by_cost, by_a, by_b = gradients(lambda *x: sinkhorn(*x, epsilon=0.1, **CONVERGED).value, cost, a, b)
    transport = sinkhorn(cost, a, b, epsilon=0.1, **CONVERGED)
    torch.testing.assert_close(by_cost, transport.plan(), **EXACT)
    torch.testing.assert_close(by_a, transport.f, **EXACT)
    torch.testing.assert_close(by_b, transport.g, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(5, 7), (7, 5)])
def test_conjugate_gradients(monkeypatch: pytest.MonkeyPatch, n: int, m: int, kind: str) -> None:
    """In place of the direct solution; problems of a batch end at different times."""
    cost, a, b = problem(3, n=n, m=m)
    a[1, 2] = 0
    a = a / a.sum(1, keepdim=True)
    rhos = penalties(kind, n, m)
    epsilon = torch.tensor([0.05, 0.2, 1.0], dtype=DOUBLE)

    def function(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        transport = sinkhorn(cost, a, b, epsilon=epsilon, **rhos, **CONVERGED)
        return transport.f.square().sum() + transport.plan().square().sum()

    direct = gradients(function, cost, a, b)
    monkeypatch.setattr(_adjoint, "_MOST_DIRECT", 0)
    for actual, expected in zip(gradients(function, cost, a, b), direct, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    monkeypatch.setattr(_adjoint, "_MOST_ITERATIONS", 2)
    with pytest.warns(ConvergenceWarning, match="2 conjugate gradients left a residual of .* raise epsilon"):
        gradients(function, cost, a, b)


def test_parts_without_exchange_of_mass() -> None:
    """Forbidden pairs split the problem in two, each of which leaves a constant free; the plan's gradient is right."""
    cost, a, b = problem(n=6, m=6)
    cost[:3, 3:] = cost[3:, :3] = INF
    a[:3], a[3:], b[:3], b[3:] = (x / (2 * x.sum()) for x in (a[:3], a[3:], b[:3], b[3:]))
    weights = torch.randn(6, 6, dtype=DOUBLE)

    def whole(cost: Tensor) -> Tensor:
        return (weights * sinkhorn(cost, a, b, epsilon=0.2, **CONVERGED).plan()).sum()

    def parts(cost: Tensor) -> Tensor:
        return sum(
            (weights[i, i] * sinkhorn(cost[i, i], a[i], b[i], epsilon=0.2, **CONVERGED).plan()).sum()
            for i in (slice(0, 3), slice(3, 6))
        )

    torch.testing.assert_close(gradients(whole, cost)[0], gradients(parts, cost)[0], **EXACT)


# ---- convergence ----


def test_warning() -> None:
    cost, a, b = problem()
    with pytest.warns(ConvergenceWarning) as caught:
        transport = sinkhorn(cost, a, b, epsilon=0.01, max_iter=3)
    text = str(caught[0].message)
    assert "sinkhorn: the iteration has not converged: after 3 iterations marginal_error is" in text
    assert f"{transport.marginal_error.item():.2g}, above tol = 1e-06; raise max_iter (here 3)" in text
    assert caught[0].filename == __file__
    assert not transport.converged
    assert "not converged after 3 iterations" in repr(transport)
    # The error is the marginals', before the last iteration: it is no larger after.
    rows, columns = transport.marginals
    assert 0 < (rows - a).abs().sum() <= transport.marginal_error
    torch.testing.assert_close(columns, b, **EXACT)
    with pytest.warns(ConvergenceWarning, match="sinkhorn: 1 of 2 problems have not converged"):
        sinkhorn(cost.expand(2, 5, 7), a, b, epsilon=torch.tensor([0.001, 10.0]), max_iter=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sinkhorn(cost, a, b, epsilon=0.1).converged


@pytest.mark.parametrize("max_iter", [1, 2, 3, 4, 7, 10])
def test_stages_that_do_not_come_to_an_end_have_not_converged(max_iter: int) -> None:
    cost, a, b = problem()
    with pytest.warns(ConvergenceWarning):
        transport = sinkhorn(cost, a, b, epsilon=1e-3, epsilon_scaling=0.9, max_iter=max_iter, tol=1e-2)
    assert transport.n_iter == max_iter
    # What there is belongs to the epsilon that was asked for: the columns' marginal holds.
    torch.testing.assert_close(transport.marginals[1], b, **EXACT)


def test_epsilon_scaling_needs_fewer_iterations() -> None:
    x, y = torch.rand(60, 2, dtype=DOUBLE), torch.rand(50, 2, dtype=DOUBLE)
    options = {"epsilon": 3e-3, "tol": 1e-3, "max_iter": 10_000}
    plain, scaled = sinkhorn_points(x, y, **options), sinkhorn_points(x, y, epsilon_scaling=0.5, **options)
    assert scaled.n_iter < 0.8 * plain.n_iter
    options["tol"] = 1e-10
    plain, scaled = sinkhorn_points(x, y, **options), sinkhorn_points(x, y, epsilon_scaling=0.5, **options)
    torch.testing.assert_close(scaled.plan(), plain.plan(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", REFERENCES)
def test_warm_start(name: str) -> None:
    cost, a, b = problem()
    b[3] = 0
    b = b / b.sum()
    options = {"epsilon": 0.02, "reference": name, "tol": 1e-9, "max_iter": 5000}
    cold = sinkhorn(cost, a, b, **options)
    assert cold.n_iter > 20
    for init in (cold, (cold.f, cold.g)):
        warm = sinkhorn(cost, a, b, init=init, **options)
        assert warm.n_iter <= 2
        torch.testing.assert_close(warm.plan(), cold.plan(), rtol=0, atol=1e-8)


def test_relative_epsilon_is_of_the_mean_finite_cost() -> None:
    cost, a, b = problem(2)
    cost[0, 0, 0] = INF
    transport = sinkhorn(cost, a, b, relative_epsilon=0.3, rho_a=1.0)
    expected = torch.stack([0.3 * cost[0][cost[0] < INF].mean(), 0.3 * cost[1].mean()])
    torch.testing.assert_close(transport.epsilon, expected, **EXACT)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_loop_is_the_kernel_s(kind: str, name: str) -> None:
    """``pyreg::sinkhorn`` where there is no kernel."""
    cost, a, b = problem(3)
    a[0, 1] = 0
    a = a / a.sum(1, keepdim=True)
    cost[1, 2, 3] = INF
    rho_a, rho_b = (
        None if rho is None else torch.as_tensor(rho, dtype=DOUBLE).expand(3, k).contiguous()
        for rho, k in ((penalties(kind).get("rho_a"), 5), (penalties(kind).get("rho_b"), 7))
    )
    epsilon = torch.tensor([0.05, 0.1, 0.2], dtype=DOUBLE)
    arguments = (
        *(cost, a, b, a.log(), b.log(), rho_a, rho_b, epsilon, torch.ones_like(epsilon), 0.5, name == "counting"),
        *(2000, 1e-12, torch.zeros(3, 7, dtype=DOUBLE)),
    )
    plain, kernel = _log_domain.sinkhorn(*arguments), torch.ops.pyreg.sinkhorn(*arguments)
    assert (plain[2] <= 1e-12).all()
    assert (plain[3] < 2000).all()
    for f, g, *_ in (plain, kernel):
        assert f[0, 1] == -INF
        assert g.isfinite().all()
    plans = [
        torch.exp((f.unsqueeze(2) + g.unsqueeze(1) - cost) / epsilon.view(3, 1, 1)) for f, g, *_ in (plain, kernel)
    ]
    torch.testing.assert_close(*plans, rtol=1e-9, atol=1e-10)
    for cut in (1, 5):
        stopped = [
            function(*arguments[:11], cut, *arguments[12:])
            for function in (_log_domain.sinkhorn, torch.ops.pyreg.sinkhorn)
        ]
        assert (stopped[0][3] == cut).all()
        for actual, expected in zip(*stopped, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_unknown_potentials_with_and_without_waiting() -> None:
    cost, others = torch.rand(3, 500, 200, dtype=DOUBLE), torch.randn(3, 200, dtype=DOUBLE)
    cost[0, 3] = INF
    is_unknown = torch.rand(3, 500) < 0.3
    is_unknown[0, 3] = True
    results = [torch.zeros(3, 500, dtype=DOUBLE) for _ in range(2)]
    for fill, result in zip(
        (_potentials._fill_unknown, _potentials._fill_unknown_without_waiting), results, strict=True
    ):
        fill(result, is_unknown, cost, others, -torch.ones(3, 500, dtype=DOUBLE), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(*results, **EXACT)
    assert results[0][0, 3] == INF
    assert results[0][~is_unknown].abs().max() == 0
    assert results[0][is_unknown].abs().min() > 0


# ---- a citizen of torch ----


def test_opcheck() -> None:
    cost, a, b = (x.requires_grad_() for x in problem(2))
    f, g = (torch.randn(2, k, dtype=DOUBLE, requires_grad=True) for k in (5, 7))
    rho, epsilon = torch.rand(2, 7, dtype=DOUBLE) + 0.5, torch.tensor([0.2, 0.3], dtype=DOUBLE)
    rest = (None, rho, epsilon, epsilon, 0.5, True, 100, 1e-12, torch.zeros(2, 7, dtype=DOUBLE))
    constants = [x.detach() for x in (cost, a, b)]
    opcheck(torch.ops.pyreg.sinkhorn.default, (*constants, constants[1].log(), constants[2].log(), *rest))
    opcheck(torch.ops.pyreg.sinkhorn_potentials.default, (cost, a, b, *rest))
    opcheck(torch.ops.pyreg.sinkhorn_value.default, (cost, a, b, f.detach(), g.detach(), None, rho, epsilon, True))
    opcheck(torch.ops.pyreg.sinkhorn_plan.default, (cost, f, g, epsilon, DOUBLE))
    plan, ones = torch.rand(2, 5, 7, dtype=DOUBLE, requires_grad=True), torch.ones(2, 7, dtype=DOUBLE)
    for transposed in (False, True):
        arguments = (plan, ones[:, :5].clone(), ones, 0.7 * ones[:, :5], 0.8 * ones, f, g, transposed)
        opcheck(torch.ops.pyreg.sinkhorn_adjoint.default, arguments)


def test_opcheck_points() -> None:
    x, y = (torch.randn(2, k, 3, dtype=DOUBLE, requires_grad=True) for k in (5, 7))
    _, a, b = (tensor.requires_grad_() for tensor in problem(2))
    f, g = (torch.randn(2, k, dtype=DOUBLE, requires_grad=True) for k in (5, 7))
    rho, epsilon = torch.rand(2, 7, dtype=DOUBLE) + 0.5, torch.tensor([0.2, 0.3], dtype=DOUBLE)
    rest = (None, rho, epsilon, epsilon, 0.5, True, 100, 1e-12, torch.zeros(2, 7, dtype=DOUBLE))
    points, weights = (x.detach(), y.detach()), (a.detach(), b.detach())
    logarithms = tuple(each.log() for each in weights)
    opcheck(torch.ops.pyreg.sinkhorn_points.default, (*points, 1, True, *weights, *logarithms, *rest))
    opcheck(torch.ops.pyreg.sinkhorn_points_potentials.default, (x, y, 1, False, a, b, *rest, None, None))
    is_padding = torch.tensor([[False] * 4 + [True], [False] * 5])
    padded = (x, y, 1, False, a.detach().masked_fill(is_padding, 0).requires_grad_(), b, *rest, is_padding, None)
    opcheck(torch.ops.pyreg.sinkhorn_points_potentials.default, padded)
    arguments = (x, y, a, b, f.detach(), g.detach(), None, rho, epsilon, 0, True)
    opcheck(torch.ops.pyreg.sinkhorn_points_value.default, arguments)
    u, z = (torch.randn(2, k, 2, dtype=DOUBLE, requires_grad=True) for k in (5, 7))
    flags = (2, False, True, True, True, True)
    opcheck(torch.ops.pyreg.point_plan.default, (x, y, f, g, epsilon, u, z, *flags))
    ones = torch.ones(2, 7, dtype=DOUBLE)
    factors = ones[:, :5].clone(), ones, 0.7 * ones[:, :5], 0.8 * ones
    arguments = (x, y, f.detach(), g.detach(), epsilon, *factors, f, g, 0, False)
    opcheck(torch.ops.pyreg.sinkhorn_points_adjoint.default, arguments)


def loss_of_everything(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    transport = sinkhorn(cost, a, b, epsilon=0.2, rho_b=0.5, **CONVERGED)
    return transport.value.sum() + all_results(transport, torch.ones(*b.shape, 2, dtype=DOUBLE)).sum()


def test_compile() -> None:
    inputs = problem(2)
    compiled = torch.compile(loss_of_everything, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled, *inputs), gradients(loss_of_everything, *inputs), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


def loss_of_points(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    transport = sinkhorn_points(x, y, a, b, cost="euclidean", epsilon=0.2, rho_b=0.5, **CONVERGED)
    rest = (transport.value, transport.f, transport.barycentric_map(), *transport.marginals, transport.transport_cost())
    return sum(part.square().sum() for part in rest)


def test_compile_points() -> None:
    inputs = torch.randn(2, 5, 2, dtype=DOUBLE), torch.randn(2, 7, 2, dtype=DOUBLE), *problem(2)[1:]
    compiled = torch.compile(loss_of_points, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled, *inputs), gradients(loss_of_points, *inputs), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_torch_func_of_points() -> None:
    inputs = torch.randn(2, 5, 2, dtype=DOUBLE), torch.randn(2, 7, 2, dtype=DOUBLE), *problem(2)[1:]
    expected, every = gradients(loss_of_points, *inputs), (0, 1, 2, 3)
    for actual, truth in zip(torch.func.grad(loss_of_points, argnums=every)(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, truth, **EXACT)
    alone = [gradients(loss_of_points, *(tensor[i] for tensor in inputs)) for i in range(2)]
    mapped = torch.func.vmap(torch.func.grad(loss_of_points, argnums=every))(*inputs)
    for actual, *ones in zip(mapped, *alone, strict=True):
        torch.testing.assert_close(actual, torch.stack(ones), **EXACT)


def test_torch_func() -> None:
    cost, a, b = problem(2)
    expected = gradients(loss_of_everything, cost, a, b)
    assert all(
        torch.equal(x, y)
        for x, y in zip(torch.func.grad(loss_of_everything, argnums=(0, 1, 2))(cost, a, b), expected, strict=True)
    )
    alone = [gradients(loss_of_everything, cost[i], a[i], b[i]) for i in range(2)]
    mapped = torch.func.vmap(torch.func.grad(loss_of_everything, argnums=(0, 1, 2)))(cost, a, b)
    for actual, *ones in zip(mapped, *alone, strict=True):
        torch.testing.assert_close(actual, torch.stack(ones), **EXACT)


def test_autocast_changes_nothing() -> None:
    x, y = torch.randn(6, 3), torch.randn(7, 3)
    expected = sinkhorn_points(x, y, cost="cosine", epsilon=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        transport = sinkhorn_points(x, y, cost="cosine", epsilon=0.2)
        assert torch.equal(transport.value, expected.value)
        assert torch.equal(transport.apply(y), expected.apply(y))
        assert torch.equal(transport.barycentric_map(), expected.barycentric_map())


# ---- what a transport gives ----


def test_plan_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = sinkhorn(*problem(), epsilon=0.2)
    between_points = sinkhorn_points(torch.rand(5, 2), torch.rand(9, 2), epsilon=0.2)
    monkeypatch.setattr(_memory, "available_bytes", lambda device: 5 * 7 * 8 - 1)
    with pytest.raises(ValueError, match=r"sinkhorn: plan\(\) of shape \[1, 5, 7\] takes 0.0 GiB.*use apply"):
        transport.plan()
    monkeypatch.setattr(_memory, "available_bytes", lambda device: 5 * 9 * 4 - 1)
    with pytest.raises(ValueError, match=r"sinkhorn_points: plan\(\) of shape \[1, 5, 9\] takes"):
        between_points.plan()
    assert between_points.apply(torch.ones(9)).shape == (5,)
    monkeypatch.setattr(_memory, "available_bytes", lambda device: None)
    assert transport.plan().shape == (5, 7)


def test_available_memory_is_known() -> None:
    assert _memory.available_bytes(torch.device("cpu")) > 1 << 20


def test_repr() -> None:
    cost, a, b = problem(2)
    assert repr(sinkhorn(cost, a, b, epsilon=5.0, reference="counting")).startswith(
        "Transport(n=5, m=7, batch=[2], reference='counting', 2 of 2 converged after"
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda t: t.apply([1.0]), TypeError, "sinkhorn: apply: expected z to be a tensor, got list"),
        (
            lambda t: t.apply(torch.ones(7)),
            TypeError,
            "sinkhorn: apply: expected z of torch.float64 on cpu, got",
        ),
        (lambda t: t.apply(torch.ones(5).double()), ValueError, r"apply: expected z of shape \[..., m\] = \[7\] or"),
        (
            lambda t: t.apply_transpose(torch.ones(7, 2).double()),
            ValueError,
            r"\[..., n\] = \[5\] or .*\[7, 2\]",
        ),
        (lambda t: t.barycentric_map(), ValueError, r"barycentric_map: expected points y \[..., m, d\].*got None"),
        (lambda t: t.barycentric_map(torch.ones(7).double()), ValueError, r"got \[7\]; use points.unsqueeze\(-1\)"),
    ],
)
def test_bad_arguments_of_methods(call: Callable[[Transport], Any], error: type[Exception], text: str) -> None:
    transport = sinkhorn(*problem(), epsilon=0.2)
    with pytest.raises(error, match=text):
        call(transport)


# ---- bad input ----

C = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(3)
NAN = float("nan")


def entry(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[1] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((None,), {}, TypeError, "expected cost to be a tensor, got NoneType"),
        ((C.long(),), {}, TypeError, r"expected cost to be float64, .* got torch.int64; convert"),
        ((C[0],), {}, ValueError, r"expected cost of shape \[n, m\] or \[..., n, m\].* got \[4\]"),
        ((C[:0],), {}, ValueError, r"at least one row and one column, got \[0, 4\]"),
        ((C[:, :0],), {}, ValueError, r"at least one row and one column, got \[3, 0\]"),
        ((entry(C, NAN),), {}, ValueError, r"expected cost without NaN and -inf, got nan; \+inf forbids a pair"),
        ((entry(C, -INF),), {}, ValueError, "expected cost without NaN and -inf, got -inf"),
        ((C, [1, 2, 3]), {}, TypeError, "expected a to be a tensor, got list"),
        ((C, ONES.double()), {}, TypeError, r"expected a of the dtype of cost, torch.float32, got torch.float64; conv"),
        ((C, ONES.to("meta")), {}, ValueError, r"expected a on the device of cost, cpu, got meta; move it with a.to"),
        ((C, torch.ones(4)), {}, ValueError, r"expected a of shape \[n\] = \[3\], got \[4\]"),
        ((C, None, torch.ones(2, 4)), {}, ValueError, r"expected b of shape \[m\] = \[4\], got \[2, 4\]"),
        ((C.expand(2, 3, 4), torch.ones(3, 3)), {}, ValueError, r"a of shape \[n\] = \[3\] or \[..., n\] = \[2, 3\]"),
        ((C, entry(ONES, -0.5)), {}, ValueError, "expected a to be at least 0, got -0.5"),
        ((C, entry(ONES, NAN)), {}, ValueError, "expected finite numbers in a, got nan"),
        ((C, None, entry(torch.ones(4), INF)), {}, ValueError, "expected finite numbers in b, got inf"),
        ((C, 0 * ONES), {}, ValueError, "expected a with a weight above 0 in every problem, got all 0"),
        ((C, ONES), {}, ValueError, r"a and b of equal sums where both marginals must hold, got 3 and 1; divide them"),
        ((C,), {"epsilon": 0.0}, ValueError, "expected epsilon to be a finite number > 0, got 0.0"),
        ((C,), {"epsilon": -1}, ValueError, "expected epsilon to be a finite number > 0, got -1"),
        ((C,), {"epsilon": NAN}, ValueError, "expected epsilon to be a finite number > 0, got nan"),
        ((C,), {"epsilon": "0.1"}, ValueError, "expected epsilon to be a finite number > 0, got '0.1'"),
        ((C,), {"epsilon": None}, ValueError, "expected either epsilon or relative_epsilon, got neither"),
        ((C,), {"relative_epsilon": 0.1}, ValueError, "expected either epsilon or relative_epsilon, got both"),
        ((C,), {"epsilon": torch.ones(2)}, ValueError, r"to be a number or of the batch's shape \[\], got \[2\]"),
        ((C,), {"epsilon": torch.tensor(0.0)}, ValueError, "expected epsilon to be above 0, got 0.0"),
        ((C,), {"epsilon": torch.tensor(0.1, requires_grad=True)}, ValueError, r"epsilon has no gradient; pass eps"),
        ((0 * C,), {"epsilon": None, "relative_epsilon": 0.1}, ValueError, "mean above 0 for relative_epsilon, got 0;"),
        ((C,), {"epsilon": None, "relative_epsilon": 0}, ValueError, "relative_epsilon to be a finite number > 0"),
        ((C,), {"rho_a": 0.0}, ValueError, "expected rho_a to be a number above 0, inf, or a tensor of such, got 0.0"),
        ((C,), {"rho_b": NAN}, ValueError, "expected rho_b to be a number above 0, .* got nan"),
        ((C,), {"rho_b": "inf"}, ValueError, "expected rho_b to be a number above 0, .* got 'inf'"),
        ((C,), {"rho_a": entry(ONES, 0.0)}, ValueError, "expected rho_a to be above 0, got 0.0"),
        ((C,), {"rho_a": torch.ones(4)}, ValueError, r"expected rho_a of shape \[n\] = \[3\], got \[4\]"),
        ((C,), {"rho_a": ONES.clone().requires_grad_()}, ValueError, r"rho_a has no gradient; pass rho_a.detach\(\)"),
        ((C,), {"reference": "uniform"}, ValueError, "expected reference to be 'product' or 'counting', got 'uniform'"),
        ((C,), {"max_iter": 0}, ValueError, "expected max_iter to be an integer >= 1, got 0"),
        ((C,), {"max_iter": 1.5}, ValueError, "expected max_iter to be an integer >= 1, got 1.5"),
        ((C,), {"tol": -1e-3}, ValueError, "expected tol to be a finite number >= 0, got -0.001"),
        ((C,), {"epsilon_scaling": 1.0}, ValueError, "epsilon_scaling to be a factor between 0 and 1, got 1.0"),
        ((C,), {"epsilon_scaling": 0}, ValueError, "expected epsilon_scaling to be a finite number > 0, got 0"),
        ((C,), {"init": torch.zeros(4)}, TypeError, r"init to be a Transport or potentials \(f, g\), got Tensor"),
        ((C,), {"init": (torch.zeros(3), torch.zeros(3))}, ValueError, r"g of shape \[4\] on cpu, got \[3\] and \[3\]"),
        ((C,), {"init": (torch.zeros(3), torch.full((4,), NAN))}, ValueError, "finite numbers in init's g, got nan"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^sinkhorn: .*{text}" if not text.startswith("^") else text):
        sinkhorn(*arguments, **{"epsilon": 0.1, **options})


def test_weight_that_cannot_be_transported() -> None:
    cost, a, b = problem()
    cost[2] = INF
    text = r"every cost in row 2 of problem 0 is infinite.* but a = .* must be transported; make it 0, or give rho_a"
    with pytest.raises(ValueError, match=text):
        sinkhorn(cost, a, b, epsilon=0.1)
    cost, a, b = problem(2)
    cost[1, 1:, 3] = INF
    a[1, 0] = 0  # which is all that column 3 could have come from
    a = a / a.sum(1, keepdim=True)
    with pytest.raises(ValueError, match=r"every cost in column 3 of problem 1 .* but b = .* give rho_b"):
        sinkhorn(cost, a, b, epsilon=0.1)
    assert sinkhorn(cost, a, b, epsilon=0.1, rho_b=1.0).value.isfinite().all()


X, Y = torch.zeros(3, 2), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((None, Y), {}, TypeError, "expected x to be a tensor, got NoneType"),
        ((X.long(), Y), {}, TypeError, "expected x to be float64, .* got torch.int64"),
        ((X[0], Y), {}, ValueError, r"x of shape \[n, d\] or .* got \[2\]; use unsqueeze\(1\) for points on a line"),
        ((X[:0], Y), {}, ValueError, r"with at least one point of at least one dimension, got \[0, 2\]"),
        ((X, Y[:0]), {}, ValueError, r"expected y of shape \[m, d\] .* got \[0, 2\]"),
        ((X[:, :0], Y[:, :0]), {}, ValueError, r"at least one dimension, got \[3, 0\]"),
        ((X, Y[:, :1]), {}, ValueError, r"with the same batch and dimension, got \[3, 2\] and \[4, 1\]"),
        ((X, Y.expand(2, 4, 2)), {}, ValueError, r"with the same batch and dimension, got \[3, 2\] and \[2, 4, 2\]"),
        ((X, Y.double()), {}, TypeError, "expected y of the dtype of x, torch.float32, got torch.float64"),
        ((X, Y.to("meta")), {}, ValueError, "expected y on the device of x, cpu, got meta"),
        ((entry(X, NAN), Y), {}, ValueError, "expected finite numbers in x, got nan"),
        ((X, entry(Y, INF)), {}, ValueError, "expected finite numbers in y, got inf"),
        ((X, Y), {"cost": "l1"}, ValueError, "'cosine' or a function of points, got 'l1'"),
        ((X, Y, torch.ones(4)), {}, ValueError, r"expected a of shape \[n\] = \[3\], got \[4\]"),
        ((X, Y), {"x_offsets": [0, 3]}, ValueError, "expected x_offsets and y_offsets together, got x_offsets alone"),
        ((X, Y), {"x_offsets": [0, 3], "y_offsets": [0, 1, 4]}, ValueError, "as many y_offsets as x_offsets, 2, got 3"),
        ((X, Y), {"x_offsets": [0, 2], "y_offsets": [0, 4]}, ValueError, r"number of points in x, 3, .* got \[0, 2\]"),
        ((X, Y), {"x_offsets": [0, 0, 3], "y_offsets": [0, 1, 4]}, ValueError, "at least one point in each problem"),
        ((X, Y), {"x_offsets": [0.0, 3.0], "y_offsets": [0, 4]}, TypeError, r"x_offsets to be integers \[B \+ 1\]"),
        ((X[None], Y[None]), {"x_offsets": [0, 1], "y_offsets": [0, 1]}, ValueError, r"x of shape \[N, d\] with x_off"),
    ],
)  # fmt: skip
def test_bad_points(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^sinkhorn_points: .*{text}"):
        sinkhorn_points(*arguments, **{"epsilon": 0.1, **options})


def test_points_too_far_apart() -> None:
    far = torch.tensor([[0.0], [1e20]])
    text = (
        "sinkhorn_points: expected points whose squared distances are numbers of torch.float32, got some 1e\\+20 apart"
    )
    with pytest.raises(ValueError, match=text):
        sinkhorn_points(far, far, epsilon=0.1)
    assert sinkhorn_points(far.double(), far.double(), epsilon=1e40).converged


@pytest.mark.parametrize(
    ("points", "error", "text"),
    [
        ([1.0], TypeError, "map: expected points to be a tensor, got list"),
        (torch.ones(5, 2).double(), TypeError, "map: expected points of torch.float32 on cpu, got torch.float64"),
        (
            torch.ones(2),
            ValueError,
            r"of shape \[..., q, d\] = \[q, 2\], got \[2\]; use points.unsqueeze\(-2\) for",
        ),
        (torch.ones(5, 3), ValueError, r"\[..., q, d\] = \[q, 2\], got \[5, 3\]"),
        (torch.ones(1, 5, 2), ValueError, r"\[..., q, d\] = \[q, 2\], got \[1, 5, 2\]"),
    ],
)
def test_bad_points_of_map(points: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^sinkhorn_points: .*{text}"):
        sinkhorn_points(X, Y, epsilon=0.1).map(points)


def test_map_needs_a_cost_between_points() -> None:
    for transport in (sinkhorn(*problem(), epsilon=0.2), sinkhorn_points(X, Y, epsilon=0.2, cost=weighted)):
        with pytest.raises(ValueError, match="map: a problem that is given by its costs knows none of other points"):
            transport.map(X)


def test_streaming_is_a_choice() -> None:
    with pytest.raises(TypeError, match="sinkhorn_points: expected streaming to be True, False or None, got 1"):
        sinkhorn_points(X, Y, epsilon=0.1, streaming=1)


def test_pass_over_the_plan_refuses_what_would_read_beyond() -> None:
    x, y = torch.randn(2, 5, 3, dtype=DOUBLE), torch.randn(2, 7, 3, dtype=DOUBLE)
    u, z, epsilon = x[..., :2].contiguous(), y[..., :2].contiguous(), torch.ones(2, dtype=DOUBLE)
    good = [x, y, x[..., 0].contiguous(), y[..., 0].contiguous(), epsilon, u, z, 0, False, True, True, True, True]
    torch.ops.pyreg.point_plan(*good)
    for position, bad, text in (
        (1, y[..., :2], "expected points x"),
        (2, good[2][:, :3], "potentials"),
        (3, good[3][:1], "potentials"),
        (4, epsilon[:1], "epsilon"),
        (5, u[:, :3], "expected u"),
        (6, z[..., :1], "expected u"),
        (6, z.float(), "of the dtype and device of x"),
        (7, 3, "point_cost to be 0, 1 or 2"),
    ):
        with pytest.raises(ValueError, match=f"pyreg::point_plan: .*{text}"):
            torch.ops.pyreg.point_plan(*good[:position], bad, *good[position + 1 :])


def test_operators_refuse_what_would_read_beyond() -> None:
    cost, a, b = problem(2)
    epsilon, start = torch.ones(2, dtype=DOUBLE), torch.zeros(2, 7, dtype=DOUBLE)
    good = [cost, a, b, a.log(), b.log(), None, None, epsilon, epsilon, 0.5, False, 5, 1e-3, start]
    torch.ops.pyreg.sinkhorn(*good)
    for position, bad in (
        (1, a[:, :3]),
        (2, b[:1]),
        (3, a.log()[:, :3].contiguous()),
        (7, epsilon[:1]),
        (13, start[:, :3]),
    ):
        arguments = [*good[:position], bad, *good[position + 1 :]]
        with pytest.raises(ValueError, match="pyreg::sinkhorn: expected contiguous float64 tensors of shape"):
            torch.ops.pyreg.sinkhorn(*arguments)


@pytest.mark.parametrize(("dtype", "lengths"), [(torch.float32, (1e-30, 1e30)), (torch.float64, (1e-200, 1e200))])
def test_cosines_know_no_lengths(dtype: torch.dtype, lengths: tuple[float, float]) -> None:
    """Whose squares may be no numbers."""
    x, y = torch.randn(5, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    options: dict[str, Any] = {"cost": "cosine", "epsilon": 0.3}
    expected = sinkhorn_points(x, y, **options)
    moved = sinkhorn_points(x * lengths[0], y * lengths[1], **options)
    eps = torch.finfo(dtype).eps  # lengths are rounded, and what is divided by them
    torch.testing.assert_close(moved.value, expected.value, rtol=32 * eps, atol=32 * eps)
    torch.testing.assert_close(moved.plan(), expected.plan(), rtol=256 * eps, atol=0)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_point_at_0_has_no_gradient_by_cosines(streaming: bool) -> None:
    x, y = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=DOUBLE), torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=DOUBLE)
    (gradient,) = gradients(lambda x: sinkhorn_points(x, y, cost="cosine", epsilon=0.5, streaming=streaming).value, x)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()

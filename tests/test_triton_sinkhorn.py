"""The Triton kernels of Sinkhorn's iteration and plan between points: interpreted on the CPU, or run by a GPU."""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyreg.functional import monge_gap, sinkhorn, sinkhorn_points
from pyreg.ops import _library, _pairwise_cost, _point_plan, _point_potentials, _potentials
from pyreg.reference import monge_gap as definition
from pyreg.reference import sinkhorn as reference
from tests.oracle import assert_runs_without_waiting_and_in_a_graph, relative_error

# The interpreter computes with numpy, which warns where a GPU does not. New memory is NaN here, by an option of torch's
# that warns of what else has no fixed order.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

INF, DOUBLE, FLOAT = math.inf, torch.float64, torch.float32
SQEUCLIDEAN, EUCLIDEAN, COSINE = range(3)
REFERENCES = ("product", "counting")
KINDS = ("balanced", "semi-relaxed", "an entry each")
# Sums of some dozens of terms, through some iterations.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(scope="module")
def iteration(triton_device: torch.device) -> ModuleType:
    return importlib.import_module("pyreg.triton_kernels.sinkhorn_points")


@pytest.fixture(scope="module")
def plan(triton_device: torch.device) -> ModuleType:
    return importlib.import_module("pyreg.triton_kernels.point_plan")


@pytest.fixture
def tiling(triton_device: torch.device) -> ModuleType:
    return importlib.import_module("pyreg.triton_kernels._points")


@pytest.fixture
def large_tiles(tiling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the interpreter: few programs, for tests of many iterations."""
    monkeypatch.setattr(tiling, "_EMULATED_TILES", (64, 64))


@contextlib.contextmanager
def in_place_of_the_cpus(iteration: ModuleType, plan: ModuleType) -> Iterator[None]:
    library = torch.library.Library("pyreg", "IMPL", "CPU")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel.*")
            library.impl("sinkhorn_points", iteration.sinkhorn_points, allow_override=True)
            library.impl("point_plan", plan.point_plan, allow_override=True)
        yield
    finally:
        library._destroy()


@pytest.fixture
def device(triton_device: torch.device, iteration: ModuleType, plan: ModuleType) -> Iterator[torch.device]:
    """Of tests of the public functions."""
    with in_place_of_the_cpus(iteration, plan) if triton_device.type == "cpu" else contextlib.nullcontext():
        yield triton_device


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weights_of(*shape: int) -> Tensor:
    weights = torch.rand(*shape, dtype=DOUBLE) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def clouds(cost: int, n: int, m: int, d: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """In float64, of float32's numbers; a point of each meets one of the other, away from the origin."""
    x, y = torch.randn(batch, n, d), torch.randn(batch, m, d)
    if cost == COSINE:
        x, y = _pairwise_cost.units(x), _pairwise_cost.units(y)
    else:
        x, y = x + 3, y + 3
    if n * m > 1:
        y[:, -1] = x[:, 0]
    return x.double(), y.double()


def problem_of(
    cost: int, d: int, kind: str = "balanced", name: str = "product", n: int = 37, m: int = 29, **changes: Any
) -> list[Any]:
    """The arguments of ``pyreg::sinkhorn_points``: two problems, with weights of 0, in three stages of epsilon."""
    x, y = clouds(cost, n, m, d)
    a, b = weights_of(2, n), weights_of(2, m)
    if n > 3 and m > 3:
        a[0, 2] = b[1, :2] = 0
        a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    rho_a = rho_b = None
    if kind != "balanced":
        rho_b = torch.rand(2, m, dtype=DOUBLE) + 0.3
    if kind == "an entry each":
        rho_a = torch.rand(2, n, dtype=DOUBLE) + 0.3
        rho_a[:, ::3] = INF
    scale = torch.stack([_pairwise_cost.cost_of_computed(x, y, cost).mean((1, 2))]).squeeze(0)
    epsilon = torch.tensor([0.05, 0.1], dtype=DOUBLE) * scale
    arguments = {
        "x": x, "y": y, "point_cost": cost, "is_streaming": True, "a": a, "b": b, "log_a": a.log(), "log_b": b.log(),
        "rho_a": rho_a, "rho_b": rho_b, "epsilon": epsilon, "first_epsilon": 4 * epsilon, "epsilon_factor": 0.5,
        "is_counting": name == "counting", "max_iter": 7, "tol": 0.0, "initial": torch.zeros_like(b),
    }  # fmt: skip
    return list({**arguments, **changes}.values())


def run(
    iteration: ModuleType, arguments: list[Any], device: torch.device, dtype: torch.dtype = DOUBLE
) -> tuple[Tensor, ...]:
    x, y, *rest = (arg.to(device) if isinstance(arg, Tensor) else arg for arg in arguments)
    return tuple(part.cpu() for part in iteration.sinkhorn_points(x.to(dtype), y.to(dtype), *rest))


def on_the_cpu(arguments: list[Any]) -> tuple[Tensor, ...]:
    return torch.ops.pyreg.sinkhorn_points(*arguments)  # type: ignore[no-any-return]


def assert_same_iterations(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float) -> None:
    """Potentials within ``limit`` of their range, at the same number of iterations."""
    for ours, truth in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(ours == -INF, truth == -INF)
        finite = truth.isfinite()
        assert (ours - truth)[finite].abs().max() <= limit * max(truth[finite].abs().max().item(), 1)
    torch.testing.assert_close(actual[2], expected[2], rtol=100 * limit, atol=10 * limit)
    assert torch.equal(actual[3], expected[3])


# ---- the iteration ----


DIMENSIONS = [(SQEUCLIDEAN, 1), (SQEUCLIDEAN, 20), (SQEUCLIDEAN, 150), (EUCLIDEAN, 2), (EUCLIDEAN, 11), (COSINE, 5),
              (COSINE, 20)]  # fmt: skip


@pytest.mark.parametrize(("cost", "d"), DIMENSIONS)
def test_iterations_are_the_cpus(iteration: ModuleType, triton_device: torch.device, cost: int, d: int) -> None:
    """One by one, through stages of epsilon: float64 to its rounding, float32 to that of the largest cost."""
    n, m = (37, 29) if d < 100 else (17, 20)
    arguments = problem_of(cost, d, n=n, m=m, max_iter=5)
    expected = on_the_cpu(arguments)
    assert_same_iterations(run(iteration, arguments, triton_device, FLOAT), expected, 4e-6)
    if d < 20:
        assert_same_iterations(run(iteration, arguments, triton_device), expected, 1e-12)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_penalties(iteration: ModuleType, triton_device: torch.device, large_tiles: None, kind: str, name: str) -> None:
    arguments = problem_of(SQEUCLIDEAN, 3, kind, name)
    assert_same_iterations(run(iteration, arguments, triton_device), on_the_cpu(arguments), 1e-12)
    arguments = problem_of(SQEUCLIDEAN, 10, kind, name)
    assert_same_iterations(run(iteration, arguments, triton_device, FLOAT), on_the_cpu(arguments), 4e-6)


@pytest.mark.parametrize("max_iter", [1, 2, 4, 7])
@pytest.mark.parametrize("first", [0.5, 3.0])
def test_stages(
    iteration: ModuleType, triton_device: torch.device, large_tiles: None, max_iter: int, first: float
) -> None:
    """Wherever the last iteration falls, it is made at the epsilon that was asked for."""
    arguments = problem_of(EUCLIDEAN, 2, max_iter=max_iter, n=13, m=11)
    arguments[11] = first * arguments[10]
    assert_same_iterations(run(iteration, arguments, triton_device), on_the_cpu(arguments), 1e-12)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_each_problem_ends_at_its_tolerance(
    iteration: ModuleType, triton_device: torch.device, large_tiles: None, kind: str
) -> None:
    arguments = problem_of(EUCLIDEAN, 2, kind, n=13, m=11, max_iter=400, tol=1e-2)
    arguments[10][1] *= 5
    actual, expected = run(iteration, arguments, triton_device), on_the_cpu(arguments)
    assert len(set(expected[3].tolist())) == 2
    assert (expected[3] < 400).all()
    assert (actual[2] <= 1e-2).all()
    assert_same_iterations(actual, expected, 1e-12)


def test_warm_start(iteration: ModuleType, triton_device: torch.device, large_tiles: None) -> None:
    arguments = problem_of(SQEUCLIDEAN, 2, n=13, m=11, max_iter=10)
    arguments[11] = arguments[10]
    _, g, error, _ = run(iteration, arguments, triton_device)
    arguments[-3:] = [2, 0.0, g]  # the first potentials are arbitrary, and their error is
    actual = run(iteration, arguments, triton_device)
    assert (actual[2] < 1.01 * error).all()
    assert_same_iterations(actual, on_the_cpu(arguments), 1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 37), (101, 1), (16, 16), (17, 103)])
def test_sizes(iteration: ModuleType, triton_device: torch.device, n: int, m: int) -> None:
    arguments = problem_of(SQEUCLIDEAN, 9, n=n, m=m, max_iter=2)
    assert_same_iterations(run(iteration, arguments, triton_device, FLOAT), on_the_cpu(arguments), 4e-6)


@pytest.mark.parametrize(("splits", "d", "dtype"), [(1, 2, DOUBLE), (3, 2, DOUBLE), (3, 2, FLOAT), (3, 12, FLOAT)])
def test_splits_of_the_columns(
    iteration: ModuleType,
    tiling: ModuleType,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    splits: int,
    d: int,
    dtype: torch.dtype,
) -> None:
    """Some of which a row is far from, and has nothing of; some that weigh nothing."""
    monkeypatch.setattr(tiling, "_EMULATED_PROGRAMS" if triton_device.type == "cpu" else "_PROGRAMS", 6 * splits)
    arguments = problem_of(SQEUCLIDEAN, d, n=37, m=70, max_iter=4)
    arguments[0][:, 18:] += 50
    arguments[1][:, 40:] += 50
    arguments[:2] = [points.float().double() for points in arguments[:2]]
    arguments[5][0, 32:64] = 0
    arguments[7] = arguments[5].log()
    # Of float32 that of the largest squares, which are some thousands.
    limit = 1e-12 if dtype == DOUBLE else 1e-6 if d == 2 else 2e-4
    assert_same_iterations(run(iteration, arguments, triton_device, dtype), on_the_cpu(arguments), limit)


@pytest.mark.parametrize("d", [2, 12])
@pytest.mark.parametrize("has_stages", [True, False])
def test_small_epsilon(
    iteration: ModuleType, triton_device: torch.device, large_tiles: None, d: int, has_stages: bool
) -> None:
    """Potentials move by thousands of epsilon, and sums leave all numbers: float32 keeps the digits of the costs."""
    arguments = problem_of(SQEUCLIDEAN, d, max_iter=24)
    arguments[10] = arguments[10] / 500
    arguments[11] = 2000 * arguments[10] if has_stages else arguments[10]
    expected = on_the_cpu(arguments)
    actual = run(iteration, arguments, triton_device, FLOAT)
    costs = _pairwise_cost.cost_of_computed(*arguments[:2], SQEUCLIDEAN)
    for ours, truth in zip(actual[:2], expected[:2], strict=True):
        finite = truth.isfinite()
        assert torch.equal(ours == -INF, ~finite)
        assert (ours - truth)[finite].abs().max() <= 2e-6 * costs.max()
    assert actual[2].isfinite().all()


@pytest.mark.parametrize("d", [2, 12])
def test_potentials_of_many_epsilon(
    iteration: ModuleType, plan: ModuleType, triton_device: torch.device, large_tiles: None, d: int
) -> None:
    """Of exponents that are differences of thousands every digit counts: columns have just been summed to b."""
    arguments = problem_of(SQEUCLIDEAN, d, max_iter=6)
    arguments[10] = arguments[11] = arguments[10] / 500
    f, g, *_ = run(iteration, arguments, triton_device, FLOAT)
    there = (tensor.to(triton_device) for tensor in (f, g, arguments[10]))
    x, y = (points.to(triton_device, FLOAT) for points in arguments[:2])
    asked = (SQEUCLIDEAN, False, False, True, False, False)
    _, columns, *_ = plan.point_plan(x, y, *there, x.new_ones(2, 37, 1), y.new_ones(2, 29, 1), *asked)
    b = arguments[5]
    assert (columns.squeeze(2).cpu() - b).abs().max() <= 1e-5 * b.max()


def test_float32_marginals_are_as_good_as_the_error_says(device: torch.device, large_tiles: None) -> None:
    """Iteration and plan agree on every exponent, however large what it is a difference of."""
    x, y = torch.rand(1, 40, 12, device=device) + 10, torch.rand(1, 50, 12, device=device) + 10
    transport = sinkhorn_points(x, y, epsilon=0.1, epsilon_scaling=0.5, tol=1e-4, max_iter=300, streaming=True)
    assert transport.converged.all()
    rows, columns = transport.marginals
    assert (rows - 1 / 40).abs().sum() <= 1.1e-4
    assert (columns - 1 / 50).abs().sum() <= 4e-6


def test_nan_is_not_lost(iteration: ModuleType, triton_device: torch.device) -> None:
    for cost, d in ((SQEUCLIDEAN, 3), (SQEUCLIDEAN, 9), (COSINE, 9)):
        for kind in KINDS[:2]:
            arguments = problem_of(cost, d, kind, max_iter=2)
            arguments[0][0, 5, 1] = math.nan
            f, g, error, iterations = run(iteration, arguments, triton_device, FLOAT)
            assert f[0, 5].isnan()
            assert g[0].isnan().all()
            assert error[0].isnan()
            assert f[1, 0].isfinite()
            assert (iterations == 2).all()


def test_no_problems(iteration: ModuleType, triton_device: torch.device) -> None:
    arguments = problem_of(SQEUCLIDEAN, 3)
    empty = [arg[:0] if isinstance(arg, Tensor) else arg for arg in arguments]
    assert [part.shape for part in run(iteration, empty, triton_device)] == [(0, 37), (0, 29), (0,), (0,)]


@pytest.mark.parametrize(("cost", "d", "dtype"), [(SQEUCLIDEAN, 3, DOUBLE), (SQEUCLIDEAN, 9, FLOAT)])
def test_rows_without_a_weight(
    iteration: ModuleType, triton_device: torch.device, cost: int, d: int, dtype: torch.dtype
) -> None:
    """Without waiting, what is found on the CPU one by one."""
    x, y = clouds(cost, 70, 40, d)
    g, epsilon = torch.randn(2, 40, dtype=DOUBLE), torch.tensor([0.5, 0.8], dtype=DOUBLE)
    g[0, 3] = -INF
    f = torch.zeros(2, 70, dtype=DOUBLE)
    f[0, 20], f[1, 64:] = -INF, -INF
    side = _potentials.Side(f, torch.rand_like(f), torch.rand_like(f) + 0.5, epsilon, True)
    expected = _point_potentials._filled((x, y), cost, side, g, side.potentials == -INF)
    there = _potentials.Side(
        *(part.to(triton_device) if isinstance(part, Tensor) else part for part in vars(side).values())
    )
    points = x.to(triton_device, dtype), y.to(triton_device, dtype)
    actual = _point_potentials._filled_without_waiting(
        points, cost, there, g.to(triton_device), there.potentials == -INF
    ).cpu()
    limit = EXACT if dtype == DOUBLE else {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(actual, expected, **limit)


# ---- the plan ----


PLANS = [(cost, *of) for cost in range(3) for of in ((3, 1), (12, 3), (9, 1), (140, 2), (1, 130))]
PLANS.remove((EUCLIDEAN, 140, 2))  # of differences, as 12


def plan_arguments(cost: int, d: int, k: int, n: int = 19, m: int = 18) -> list[Any]:
    x, y = clouds(cost, n, m, d)
    f, g = torch.randn(2, n, dtype=DOUBLE), torch.randn(2, m, dtype=DOUBLE)
    g += _pairwise_cost.cost_of_computed(x, y, cost).mean((1, 2)).unsqueeze(1)
    g[:, -1] = 0  # of a point that another meets
    g[0, 2] = -INF
    u, z = torch.randn(2, n, k).double(), torch.randn(2, m, k).double()
    return [x, y, f, g, torch.tensor([0.5, 0.8], dtype=DOUBLE) * d**0.5, u, z, cost]


@pytest.mark.parametrize(("cost", "d", "k"), PLANS)
def test_plan(plan: ModuleType, triton_device: torch.device, cost: int, d: int, k: int) -> None:
    n, m = (19, 18) if d < 100 else (5, 19)
    arguments = plan_arguments(cost, d, k, n, m)
    for times_cost in (False, True):
        flags = (times_cost, True, True, True, True)
        expected = _point_plan._plain(*arguments, *flags)
        for dtype in (DOUBLE, FLOAT) if d < 100 else (FLOAT,):
            there = [arg.to(triton_device) if isinstance(arg, Tensor) else arg for arg in arguments]
            for index in (0, 1, 5, 6):
                there[index] = there[index].to(dtype)
            plain = _point_plan._plain(*there, *flags)
            for ours, theirs, truth in zip(plan.point_plan(*there, *flags), plain, expected, strict=True):
                assert ours.dtype == dtype
                error = relative_error(ours, truth)
                # Exponents of some units, of costs that are some dozens: 100 roundings.
                floor = 100 * 2.0 ** (-24 if dtype == FLOAT else -53)
                assert error <= 2 * relative_error(theirs, truth) + floor


def test_what_is_not_asked_for_is_zero(plan: ModuleType, triton_device: torch.device) -> None:
    arguments = [
        arg.to(triton_device) if isinstance(arg, Tensor) else arg for arg in plan_arguments(SQEUCLIDEAN, 2, 2, 8, 9)
    ]
    everything = plan.point_plan(*arguments, False, True, True, True, True)
    for asked in range(4):
        results = plan.point_plan(*arguments, False, *(asked == i for i in range(4)))
        for i, (result, whole) in enumerate(zip(results, everything, strict=True)):
            assert torch.equal(result, whole if i == asked else torch.zeros_like(whole))


def test_exponents_beyond_all_numbers(plan: ModuleType, triton_device: torch.device) -> None:
    x, f = torch.zeros(1, 2, 1), torch.tensor([[0.0, 1e4]], dtype=DOUBLE)
    ones, epsilon = torch.ones(1, 2, 1), torch.ones(1, dtype=DOUBLE)
    there = [tensor.to(triton_device) for tensor in (x, x, f, f, epsilon, ones, ones)]
    rows, *_ = plan.point_plan(*there, SQEUCLIDEAN, False, True, False, False, False)
    assert rows.isfinite().all()
    assert rows.min() > 1e30


def test_empty_passes(plan: ModuleType, triton_device: torch.device) -> None:
    for n, m, k in ((0, 3, 1), (3, 0, 2), (3, 2, 0)):
        x, y = torch.zeros(2, n, 2, device=triton_device), torch.zeros(2, m, 2, device=triton_device)
        f, g = x[..., 0].double(), y[..., 0].double()
        u, z = (points.new_zeros(2, points.shape[1], k) for points in (x, y))
        results = plan.point_plan(x, y, f, g, f.new_ones(2), u, z, SQEUCLIDEAN, False, True, True, True, True)
        for result, like in zip(results, (u, z, x, y), strict=True):
            assert torch.equal(result, torch.zeros_like(like))


@pytest.mark.parametrize(("cost", "d"), [(SQEUCLIDEAN, 2), (SQEUCLIDEAN, 12), (EUCLIDEAN, 2), (COSINE, 3)])
def test_gradients_of_the_plan(device: torch.device, cost: int, d: int) -> None:
    """Of E z and E^T u: passes over the plan again; and of by_x and by_y. Against automatic differentiation of E."""
    *tensors, _ = plan_arguments(cost, d, 2, 7, 6)
    tensors[3] = tensors[3].nan_to_num(neginf=-1.0)
    y = tensors[1]
    tensors[1] = y + 0.1 * torch.randn_like(y)  # distances have no derivative where points meet
    x, y, f, g, epsilon, u, z = (tensor.to(device) for tensor in tensors)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, f, g, u, z)]

    def through_kernels(x: Tensor, y: Tensor, f: Tensor, g: Tensor, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        asked = dict.fromkeys(("rows", "columns", "by_x", "by_y"), True)
        return _point_plan.point_plan((x, y), (f, g), epsilon, cost, u, z, **asked)

    def plainly(x: Tensor, y: Tensor, f: Tensor, g: Tensor, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        if cost == COSINE:
            costs = 1 - x @ y.mT
        else:
            squares = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3)
            costs = squares if cost == SQEUCLIDEAN else squares.sqrt()
        e = torch.exp((f.unsqueeze(2) + g.unsqueeze(1) - costs) / epsilon.view(-1, 1, 1))
        weights = e * (u @ z.mT)
        return e @ z, e.mT @ u, *torch.autograd.grad(costs, (x, y), weights, create_graph=True)

    above = [torch.randn_like(leaves[i]) for i in (4, 5, 0, 1)]
    for chosen in (slice(0, 2), slice(0, 4)):
        gradients = [
            torch.autograd.grad(function(*leaves)[chosen], leaves, above[chosen])
            for function in (through_kernels, plainly)
        ]
        torch.testing.assert_close(*gradients, **EXACT)


# ---- the public functions ----


@pytest.mark.parametrize(
    ("cost", "d", "kind", "name"),
    [
        ("sqeuclidean", 2, "balanced", "product"),
        ("euclidean", 2, "an entry each", "counting"),
        ("cosine", 3, "semi-relaxed", "product"),
    ],
)
def test_transport(device: torch.device, large_tiles: None, cost: str, d: int, kind: str, name: str) -> None:
    """Value, potentials, plan and what is made of it, and their gradients: those of the dense transport."""
    x, y, a, b = torch.randn(11, d).double(), torch.randn(13, d).double(), weights_of(11), weights_of(13)
    a[4] = 0
    a = a / a.sum()
    rhos: dict[str, Any] = {} if kind == "balanced" else {"rho_b": torch.rand(13, dtype=DOUBLE) + 0.5}
    if kind == "an entry each":
        rhos["rho_a"] = torch.rand(11, dtype=DOUBLE) + 0.5
    rhos = {key: rho.to(device) for key, rho in rhos.items()}
    options = {"epsilon": 0.6, "reference": name, "tol": 1e-11, "max_iter": 200, **rhos}
    z, above = torch.randn(13, 2, dtype=DOUBLE, device=device), torch.randn(11, dtype=DOUBLE, device=device)

    def results(solve: Callable[..., Any]) -> list[Tensor]:
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (x, y, a, b)]
        transport = solve(*leaves)
        assert transport.converged
        found = [transport.value, transport.apply(z), transport.transport_cost(), *transport.marginals]
        f = transport.f
        by_value = torch.autograd.grad(transport.value, leaves, create_graph=True)
        by_others = torch.autograd.grad(
            (f - f.mean()).dot(above) + found[1].square().sum() + found[2], leaves, retain_graph=True
        )
        (second,) = torch.autograd.grad(by_value[0].square().sum(), leaves[0])
        return [*found, *by_value, *by_others, second]

    ours = results(lambda x, y, a, b: sinkhorn_points(x, y, a, b, cost=cost, streaming=True, **options))
    dense = results(
        lambda x, y, a, b: sinkhorn(_pairwise_cost.pairwise_cost(x[None], y[None], cost)[0], a, b, **options)
    )
    # What is left of the tolerance, and of the adjoint equations'.
    for actual, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_map(device: torch.device, large_tiles: None, cost: str) -> None:
    """Of new points a softmax of what the columns' potentials leave of the costs, with its gradients."""
    x, y, q, b = torch.randn(11, 3).double(), torch.randn(13, 3).double(), torch.randn(7, 3).double(), weights_of(13)
    b[4] = 0
    b = b / b.sum()
    x, y, q, b = (tensor.to(device) for tensor in (x, y, q, b))
    transport = sinkhorn_points(x, y, None, b, cost=cost, epsilon=0.6, tol=1e-11, streaming=True)
    torch.testing.assert_close(transport.map(x), transport.barycentric_map(), rtol=1e-8, atol=1e-9)
    g, leaf = transport.g.detach(), q.clone().requires_grad_()
    exponents = (g - reference.pairwise_cost(leaf, y, cost)) / 0.6 + b.log()
    expected, found = exponents.softmax(1) @ y, transport.map(leaf)
    torch.testing.assert_close(found, expected, **EXACT)
    by_found, by_expected = (torch.autograd.grad(each.sin().sum(), leaf)[0] for each in (found, expected))
    torch.testing.assert_close(by_found, by_expected, **EXACT)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_monge_gap(device: torch.device, large_tiles: None, cost: str) -> None:
    source, mapped = (torch.rand(2, 13, 3, dtype=DOUBLE).to(device).requires_grad_() for _ in range(2))
    gap = monge_gap(source, mapped, epsilon=0.3, cost=cost, tol=1e-11, streaming=True)
    expected = definition.monge_gap(source, mapped, 0.3, cost)
    torch.testing.assert_close(gap, expected, **EXACT)
    for actual, truth in zip(
        *(torch.autograd.grad(each.sum(), (source, mapped)) for each in (gap, expected)), strict=True
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-8, atol=1e-9)
    relative = monge_gap(source, mapped, cost=cost, tol=0.0, max_iter=20, streaming=True)
    costs = reference.pairwise_cost(source, mapped, cost)
    epsilon = definition.default_epsilon(costs)
    torch.testing.assert_close(
        relative, monge_gap(source, mapped, epsilon=epsilon, cost=cost, tol=0.0, max_iter=20, streaming=True)
    )


def test_against_reference_in_float32(device: torch.device, large_tiles: None) -> None:
    x, y, a, b = torch.randn(30, 10), torch.randn(20, 10), weights_of(30).float(), weights_of(20).float()
    rhos = {"rho_a": 4.0, "rho_b": 2.0}
    costs = reference.pairwise_cost(x.double(), y.double(), "sqeuclidean")
    expected = reference.sinkhorn(costs, a.double(), b.double(), 2.0, **rhos, max_iter=300, tol=1e-13)
    value = reference.value(costs, a.double(), b.double(), *expected, 2.0, **rhos)
    transport = sinkhorn_points(*(t.to(device) for t in (x, y, a, b)), epsilon=2.0, **rhos, streaming=True)
    assert transport.value.item() == pytest.approx(value.item(), rel=2e-6)
    for actual, truth in zip((transport.f, transport.g), expected, strict=True):
        torch.testing.assert_close(actual.double().cpu(), truth, rtol=1e-5, atol=2e-5)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_matrix(triton_device: torch.device, large_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA's operators, which are chosen by their dispatch key: forward and for all gradients of the first order."""
    n, m, d = 190, 210, 3
    monkeypatch.setattr(_point_potentials, "_MOST_DENSE", 0)
    a, b = (torch.full((1, k), 1 / k, dtype=DOUBLE, device=triton_device) for k in (n, m))
    a[0, :3] = 0
    x, y = torch.rand(1, n, d, device=triton_device), torch.rand(1, m, d, device=triton_device)
    epsilon = torch.full((1,), 0.1, dtype=DOUBLE, device=triton_device)
    with _Largest() as largest:
        for is_streaming in (True, False):
            f, g, *_ = _point_potentials._on_cuda(
                x, y, SQEUCLIDEAN, is_streaming, a, b, a.log(), b.log(), None, None, epsilon, epsilon, 0.5, False, 2,
                0.0, torch.zeros_like(b),
            )  # fmt: skip
        side = _potentials.Side(f, a, None, epsilon, False)
        _point_potentials._filled_without_waiting((x, y), SQEUCLIDEAN, side, g, side.potentials == -INF)
        ones = x.new_ones(1, n, 1), y.new_ones(1, m, 1)
        _point_plan._on_cuda(x, y, f, g, epsilon, *ones, SQEUCLIDEAN, False, True, True, True, True)
    assert n * d <= largest.elements <= 16 * m * d


def test_small_problems_are_dense(
    triton_device: torch.device, iteration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where their costs are not to stream: csrc/sinkhorn holds them through all iterations."""
    arguments = problem_of(SQEUCLIDEAN, 2, n=5, m=4, max_iter=3)
    x, y, cost, _, *rest = (arg.to(triton_device) if isinstance(arg, Tensor) else arg for arg in arguments)
    called = []
    monkeypatch.setattr(iteration, "sinkhorn_points", lambda *args: called.append(args))
    dense = _point_potentials._on_cuda(x, y, cost, False, *rest)
    assert not called
    torch.testing.assert_close(dense[0].cpu(), on_the_cpu(arguments)[0], **EXACT)
    _point_potentials._on_cuda(x, y, cost, True, *rest)
    assert len(called) == 1
    monkeypatch.setattr(_library, "has_triton", lambda: False)
    plain = _point_potentials._on_cuda(x, y, cost, True, *rest)
    torch.testing.assert_close(plain[0], dense[0], **EXACT)


# ---- launchers ----


def test_same_bits_on_every_run(iteration: ModuleType, plan: ModuleType, triton_device: torch.device) -> None:
    for d in (3, 9):
        arguments = problem_of(SQEUCLIDEAN, d, max_iter=3)
        first, second = (run(iteration, arguments, triton_device, FLOAT) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        arguments = [
            arg.to(triton_device) if isinstance(arg, Tensor) else arg for arg in plan_arguments(SQEUCLIDEAN, d, 3)
        ]
        passes = (plan.point_plan(*arguments, False, True, True, True, True) for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(*passes, strict=True))


def test_float32_products_follow_torch(tiling: ModuleType) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "tf32x3"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert tiling.product_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_arguments_are_left_alone(iteration: ModuleType, triton_device: torch.device) -> None:
    arguments = problem_of(SQEUCLIDEAN, 9, "an entry each", max_iter=2)
    there = [arg.to(triton_device) if isinstance(arg, Tensor) else arg for arg in arguments]
    iteration.sinkhorn_points(*there)
    for before, after in zip(arguments, there, strict=True):
        if isinstance(before, Tensor):
            torch.testing.assert_close(after.cpu(), before, rtol=0, atol=0)


# ---- on a GPU alone ----


@pytest.mark.parametrize(("cost", "d"), DIMENSIONS)
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_runs_without_waiting_and_in_a_graph(device: torch.device, cost: int, d: int, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    name = _pairwise_cost.COSTS[cost]
    x, y = (torch.randn(k, d, dtype=dtype, device=device, requires_grad=True) for k in (300, 250))

    def step() -> list[Tensor]:
        value = sinkhorn_points(x, y, cost=name, epsilon=0.5 * d, tol=0.0, max_iter=12, streaming=True).value
        return [value.detach(), *torch.autograd.grad(value, (x, y))]

    assert_runs_without_waiting_and_in_a_graph(step)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("epsilon", [1.0, None])
def test_monge_gap_and_map_run_without_waiting_and_in_a_graph(
    device: torch.device, epsilon: float | None, cost: str
) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x, y = (torch.randn(300, 4, device=device, requires_grad=True) for _ in range(2))

    def step() -> list[Tensor]:
        gap = monge_gap(x, y, epsilon=epsilon, cost=cost, tol=0.0, max_iter=12, streaming=True)
        moved = sinkhorn_points(x, y, cost=cost, epsilon=1.0, tol=0.0, max_iter=12, streaming=True).map(x)
        return [gap.detach(), moved.detach(), *torch.autograd.grad(gap, (x, y))]

    assert_runs_without_waiting_and_in_a_graph(step)


@pytest.mark.large
@pytest.mark.parametrize(("cost", "d"), [(SQEUCLIDEAN, 3), (SQEUCLIDEAN, 64), (EUCLIDEAN, 2), (COSINE, 16)])
def test_many_points(iteration: ModuleType, plan: ModuleType, triton_device: torch.device, cost: int, d: int) -> None:
    """The tiles of real use; more pairs than 32 bits count, of which some rows are checked."""
    n, m, few = 70_000, 65_000, slice(69_900, 69_950)
    x, y = (torch.randn(1, k, d, device=triton_device) for k in (n, m))
    if cost == COSINE:
        x, y = _pairwise_cost.units(x), _pairwise_cost.units(y)
    a, b = (torch.full((1, k), 1 / k, dtype=DOUBLE, device=triton_device) for k in (n, m))
    epsilon = torch.full((1,), 0.1 * d, dtype=DOUBLE, device=triton_device)
    rest = (a, b, a.log(), b.log(), None, None, epsilon, 4 * epsilon, 0.5, False, 9, 0.0, torch.zeros_like(b))
    f, g, *_ = iteration.sinkhorn_points(x, y, cost, True, *rest)
    costs = _pairwise_cost.cost_of_computed(x[:, few].double(), y.double(), cost)
    exponents = (g.unsqueeze(1) - costs) / epsilon
    potentials = epsilon * (math.log(1 / n) - exponents.logsumexp(2))
    # One iteration later potentials have hardly moved; the plan's rows sum to 1 / n.
    assert (potentials - f[:, few]).abs().max() < 0.05 * epsilon.item() + 1e-5 * costs.max()
    rows, _, by_x, _ = plan.point_plan(
        x, y, potentials.new_zeros(1, n).copy_(f), g, epsilon, x.new_ones(1, n, 1), y.new_ones(1, m, 1), cost, False,
        True, False, True, False,
    )  # fmt: skip
    e = torch.exp(exponents + f[:, few].unsqueeze(2) / epsilon)
    assert relative_error(rows[:, few, 0], e.sum(2)) < 1e-4
    pulled, _ = _pairwise_cost.pull(e, x[:, few].double(), y.double(), costs, cost)
    assert relative_error(by_x[:, few], pulled) < 1e-3


@pytest.mark.parametrize("cost", [SQEUCLIDEAN, EUCLIDEAN, COSINE])
@pytest.mark.parametrize("d", [3, 20])
def test_padding_is_not_looked_at(
    iteration: ModuleType, plan: ModuleType, triton_device: torch.device, d: int, cost: int
) -> None:
    """Beyond a problem's points, here some tiles of them, it is NaN; results are those of the problem alone."""
    sizes, n, m = [(37, 20), (5, 51), (1, 1)], 60, 51
    x, y = (torch.full((3, count, d), math.nan) for count in (n, m))
    a, b = (torch.zeros(3, count, dtype=DOUBLE) for count in (n, m))
    for k, (rows, columns) in enumerate(sizes):
        x[k : k + 1, :rows], y[k : k + 1, :columns] = (each.float() for each in clouds(cost, rows, columns, d, 1))
        a[k, :rows], b[k, :columns] = 1 / rows, 1 / columns
    x, y, a, b = (each.to(triton_device) for each in (x, y, a, b))
    epsilon = torch.full((3,), 0.3 if cost == COSINE else 2.0, dtype=DOUBLE, device=triton_device)

    def solve(which: slice, n: int, m: int) -> tuple[Tensor, ...]:
        points, weights = (x[which, :n], y[which, :m]), (a[which, :n], b[which, :m])
        own, logarithms = epsilon[which], tuple(each.log() for each in weights)
        start = own.unsqueeze(1) * logarithms[1]
        found = iteration.sinkhorn_points(
            *(*points, cost, True, *weights, *logarithms, None, None, own, own, 0.5, False, 4, 0.0, start)
        )
        factors = (each.float().unsqueeze(2).expand(-1, -1, 2) for each in weights)
        passed = plan.point_plan(*points, *found[:2], own, *factors, cost, False, True, True, True, True)
        return *found, *passed

    together = solve(slice(0, 3), n, m)
    for k, (rows, columns) in enumerate(sizes):
        alone = solve(slice(k, k + 1), rows, columns)
        counts = (rows, columns, 0, 0, rows, columns, rows, columns)
        for actual, expected, count in zip(together, alone, counts, strict=True):
            own = actual[k, :count] if count else actual[k]
            # Float32 sums of some dozens of terms, whose order depends on how the columns are split.
            torch.testing.assert_close(own.double(), expected[0].double(), rtol=1e-4, atol=1e-6)
            if count and actual.dim() == 2:
                assert (actual[k, count:] == -INF).all()
            elif count:
                assert actual[k, count:].count_nonzero() == 0

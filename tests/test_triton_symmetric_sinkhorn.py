"""The Triton kernels of the averaged Sinkhorn iteration between points: interpreted on the CPU, or run by a GPU.

They give what ``plain`` and ``plain_self`` of pyreg/ops/_symmetric_sinkhorn.py give, of the same points in float64.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pyreg.nn import SamplesLoss
from pyreg.ops import _pairwise_cost, _symmetric_sinkhorn, samples_loss
from pyreg.ops._symmetric_sinkhorn import plain, plain_self
from tests.oracle import ROUNDOFF, assert_runs_without_waiting_and_in_a_graph

# The interpreter computes with numpy, which warns where a GPU does not. New memory is NaN here, by an option of torch's
# that warns of what else has no fixed order.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

INF, DOUBLE, FLOAT = math.inf, torch.float64, torch.float32
SQEUCLIDEAN, EUCLIDEAN, COSINE = range(3)


@pytest.fixture(scope="module")
def kernels(triton_device: torch.device) -> ModuleType:
    return importlib.import_module("pyreg.triton_kernels.symmetric_sinkhorn")


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    """Of the interpreter: few programs, of which most tests need no more."""
    monkeypatch.setattr(importlib.import_module("pyreg.triton_kernels._points"), "_EMULATED_TILES", (32, 32))


def weights_of(*shape: int) -> Tensor:
    weights = torch.rand(*shape, dtype=DOUBLE) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def cloud(cost: int, batch: int, n: int, d: int, centre: float = 3.0) -> Tensor:
    """In float64, of float32's numbers."""
    points = torch.randn(batch, n, d)
    return (_pairwise_cost.units(points) if cost == COSINE else points + centre).double()


def problem_of(cost: int, d: int, n: int = 37, m: int = 29, batch: int = 2, **changes: Any) -> dict[str, Any]:
    """The arguments of ``symmetric_sinkhorn``, with weights of 0: at the end of one problem, and amid another."""
    x, y, a, b = cloud(cost, batch, n, d), cloud(cost, batch, m, d, 3.5), weights_of(batch, n), weights_of(batch, m)
    if n > 3 and m > 3:
        y[:, 2] = x[:, 0]
        a[0, 2] = b[-1, m // 2 :] = 0
    scale = _pairwise_cost.cost_of_computed(x, y, cost).mean().item()
    arguments = {
        "x": x, "y": y, "point_cost": cost, "least_square": 0.1 if cost == EUCLIDEAN else 0.0, "a": a, "b": b,
        "epsilons": [scale, 0.2 * scale], "rho": INF, "with_self": True,
    }  # fmt: skip
    return arguments | changes


def self_problem_of(cost: int, d: int, n: int = 37, **changes: Any) -> dict[str, Any]:
    """The arguments of ``symmetric_sinkhorn_self``, with weights of 0."""
    x, a = cloud(cost, 2, n, d), weights_of(2, n)
    if n > 3:
        a[0, 2] = a[1, n // 2 :] = 0
    scale = _pairwise_cost.cost_of_computed(x, x, cost).mean().item() if n > 1 else 1.0
    epsilon = torch.tensor([0.05, 0.2], dtype=DOUBLE) * scale
    arguments = {
        "x": x, "point_cost": cost, "a": a, "rho": None, "epsilon": epsilon, "first_epsilon": 4 * epsilon,
        "epsilon_factor": 0.5, "max_iter": 5, "tol": 0.0,
    }  # fmt: skip
    return arguments | changes


def run(function: Any, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    there = [
        (value.to(device, dtype) if key in ("x", "y") else value.to(device)) if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    ]
    return tuple(part.cpu() for part in function(*there))


def potentials(*arguments: Any) -> tuple[Tensor, ...]:
    """Of what the operator gives, what the kernels do."""
    return plain(*arguments)[:8]


def assert_as_plain(
    kernels: ModuleType, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype = DOUBLE
) -> tuple[Tensor, ...]:
    """Float64's to rounding; float32's to twice plain's error, and some roundings of the largest cost or potential."""
    is_own = "y" not in arguments
    function, ours = (plain_self, "symmetric_sinkhorn_self") if is_own else (potentials, "symmetric_sinkhorn")
    actual = run(getattr(kernels, ours), arguments, device, dtype)
    truth = function(*arguments.values())
    if dtype == FLOAT:
        x, y = arguments["x"], arguments["x" if is_own else "y"]
        largest = max(_pairwise_cost.cost_of_computed(*pair, arguments["point_cost"]).max().item()
                      for pair in ((x, y), (x, x), (y, y)))  # fmt: skip
        in_float = run(function, arguments, torch.device("cpu"), FLOAT)
    for k in range(1 if is_own else len(truth)):
        assert actual[k].shape == truth[k].shape
        assert actual[k].dtype == DOUBLE
        if truth[k].numel() == 0:
            continue
        error = (actual[k] - truth[k]).abs().max().item()
        if dtype == DOUBLE:
            assert error <= 1e-11 * max(truth[k].abs().max().item(), 1)
        else:
            floor = 4 * ROUNDOFF[FLOAT] * max(largest, truth[k].abs().max().item(), 1)
            assert error <= 2 * (in_float[k] - truth[k]).abs().max().item() + floor
    if is_own:
        limit = {"rtol": 1e-9, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(actual[1], truth[1], **limit)
        assert torch.equal(actual[2], truth[2])
    return actual


# ---- between points ----


DIMENSIONS = [(SQEUCLIDEAN, 1), (SQEUCLIDEAN, 2), (SQEUCLIDEAN, 3), (SQEUCLIDEAN, 16), (SQEUCLIDEAN, 64),
              (SQEUCLIDEAN, 70), (EUCLIDEAN, 2), (EUCLIDEAN, 11), (COSINE, 5), (COSINE, 16)]  # fmt: skip


@pytest.mark.parametrize(("cost", "d"), DIMENSIONS)
def test_float32(kernels: ModuleType, triton_device: torch.device, large_tiles: None, cost: int, d: int) -> None:
    assert_as_plain(kernels, problem_of(cost, d), triton_device, FLOAT)


@pytest.mark.parametrize(
    ("cost", "d", "with_self", "rho"),
    [
        (SQEUCLIDEAN, 1, True, INF),
        (SQEUCLIDEAN, 5, False, 0.8),
        (SQEUCLIDEAN, 16, True, 0.8),
        (EUCLIDEAN, 3, True, 0.8),
        (EUCLIDEAN, 3, False, INF),
        (COSINE, 3, True, INF),
    ],
)
def test_float64(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, cost: int, d: int, with_self: bool, rho: float
) -> None:
    arguments = problem_of(cost, d, n=37 if with_self else 19, m=23, with_self=with_self, rho=rho)
    actual = assert_as_plain(kernels, arguments, triton_device)
    assert all((part.numel() > 0) == (with_self or k % 4 < 2) for k, part in enumerate(actual))


@pytest.mark.parametrize(("n", "m", "batch"), [(1, 1, 1), (1, 37, 2), (67, 1, 1), (16, 16, 2), (17, 53, 1)])
def test_sizes(kernels: ModuleType, triton_device: torch.device, n: int, m: int, batch: int) -> None:
    arguments = problem_of(SQEUCLIDEAN, 9, n=n, m=m, batch=batch)
    assert_as_plain(kernels, arguments | {"epsilons": arguments["epsilons"][-1:]}, triton_device, FLOAT)


@pytest.mark.parametrize(("groups", "tiles"), [(1, (16, 16)), (2, (32, 16)), (4, (16, 16))])
def test_blocks(
    kernels: ModuleType,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    groups: int,
    tiles: tuple[int, int],
) -> None:
    """Of several tiles, and of one, whose rows are more than its columns, as on a GPU, or as many."""
    monkeypatch.setattr(kernels, "_EMULATED_GROUPS" if triton_device.type == "cpu" else "_MOST_GROUPS", groups)
    monkeypatch.setattr(importlib.import_module("pyreg.triton_kernels._points"), "_EMULATED_TILES", tiles)
    arguments = problem_of(SQEUCLIDEAN, 2, n=85 if tiles[0] > 16 else 55, m=40, batch=1, epsilons=[2.0])
    assert_as_plain(kernels, arguments, triton_device)


@pytest.mark.parametrize("factor", [1e-4, 1e-7])
@pytest.mark.parametrize(("d", "dtype"), [(2, DOUBLE), (2, FLOAT), (12, FLOAT)])
def test_sums_beyond_all_numbers(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, d: int, dtype: torch.dtype, factor: float
) -> None:
    """Where epsilon falls at once, and where it begins small."""
    for epsilons in ([5.0, 5 * factor], [5 * factor]):
        arguments = problem_of(SQEUCLIDEAN, d, n=19, m=17, epsilons=epsilons)
        assert_as_plain(kernels, arguments, triton_device, dtype)


def test_only_what_is_lost_is_found_again(kernels: ModuleType, triton_device: torch.device) -> None:
    """A point that is far from all others, but the tile of another that is not."""
    arguments = problem_of(SQEUCLIDEAN, 2, n=19, m=17, batch=1, epsilons=[1.0, 1.0])
    near = run(kernels.symmetric_sinkhorn, arguments, triton_device, FLOAT)
    arguments["x"][0, 3] += 100
    arguments["a"][0, 3] = 0
    far = assert_as_plain(kernels, arguments, triton_device, FLOAT)
    assert far[0][0, 3] > 1e4
    assert torch.isfinite(near[0]).all()


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT])
def test_points_that_weigh_nothing(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, dtype: torch.dtype
) -> None:
    """Two of them meet far from all others, whose exponent is beyond all numbers; none of the others is."""
    arguments = problem_of(SQEUCLIDEAN, 3, n=19, m=17, batch=1, epsilons=[2.0, 0.5])
    for points, weights in (("x", "a"), ("y", "b")):
        arguments[points][0, 5:7] = 60.0
        arguments[weights][0, 5:7] = 0
    assert_as_plain(kernels, arguments, triton_device, dtype)
    without = {
        key: torch.cat([value[:, :5], value[:, 7:]], 1) if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    if dtype == DOUBLE:
        for actual, expected in zip(*(run(kernels.symmetric_sinkhorn, each, triton_device, dtype)
                                      for each in (arguments, without)), strict=True):  # fmt: skip
            torch.testing.assert_close(torch.cat([actual[:, :5], actual[:, 7:]], 1), expected, rtol=1e-12, atol=1e-12)


def test_weights_of_every_size(kernels: ModuleType, triton_device: torch.device, large_tiles: None) -> None:
    """From ordinary ones to those that float32 does not have, and sums of all that are none of its numbers."""
    arguments = problem_of(SQEUCLIDEAN, 2, n=19, m=17, epsilons=[4.0, 1.0])
    arguments["a"][0] *= torch.logspace(0, -60, 19, dtype=DOUBLE)
    arguments["b"][1] *= 1e-60
    assert_as_plain(kernels, arguments, triton_device)
    # A point that weighs 1e-60 moves a potential of float32 in its last digits.
    assert_as_plain(kernels, arguments, triton_device, FLOAT)


def test_padding(kernels: ModuleType, triton_device: torch.device) -> None:
    """Some tiles of it: potentials of points are those of the problem alone, in bits."""
    sizes, n, m = [(18, 20), (5, 33)], 35, 33
    arguments = problem_of(SQEUCLIDEAN, 3, n=n, m=m, epsilons=[1.0])
    for k, (rows, columns) in enumerate(sizes):
        arguments["a"][k, rows:] = arguments["b"][k, columns:] = 0
        arguments["a"][k, rows - 1] = arguments["b"][k, columns - 1] = 0.1
    together = assert_as_plain(kernels, arguments, triton_device, FLOAT)
    for k in range(2):
        alone = {key: value[k : k + 1] if isinstance(value, Tensor) else value for key, value in arguments.items()}
        found = run(kernels.symmetric_sinkhorn, alone, triton_device, FLOAT)
        assert all(torch.equal(own[0], all_[k]) for own, all_ in zip(found, together, strict=True))


# ---- of points with themselves, to a tolerance ----


@pytest.mark.parametrize(("cost", "d"), [(SQEUCLIDEAN, 2), (SQEUCLIDEAN, 70), (EUCLIDEAN, 5), (COSINE, 16)])
@pytest.mark.parametrize("is_balanced", [True, False])
def test_self(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, cost: int, d: int, is_balanced: bool
) -> None:
    arguments = self_problem_of(cost, d)
    if not is_balanced:
        arguments["rho"] = torch.rand(2, 37, dtype=DOUBLE) + 0.3
        arguments["rho"][:, ::3] = INF
    assert_as_plain(kernels, arguments, triton_device, FLOAT)
    if d < 16:
        assert_as_plain(kernels, arguments, triton_device)


@pytest.mark.parametrize(("max_iter", "first"), [(1, 8.0), (2, 8.0), (3, 8.0), (3, 0.5), (7, 8.0)])
def test_falling_epsilon(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, max_iter: int, first: float
) -> None:
    """Wherever the last iteration falls, it is made at the epsilon that was asked for."""
    arguments = self_problem_of(EUCLIDEAN, 2, n=13, max_iter=max_iter)
    assert_as_plain(kernels, arguments | {"first_epsilon": first * arguments["epsilon"]}, triton_device)


@pytest.mark.parametrize("is_balanced", [True, False])
@pytest.mark.parametrize(("d", "dtype"), [(2, DOUBLE), (9, FLOAT)])
def test_each_problem_ends_at_its_tolerance(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, is_balanced: bool, d: int, dtype: torch.dtype
) -> None:
    """Early or late, with the bits that it has alone."""
    arguments = self_problem_of(SQEUCLIDEAN, d, n=19, max_iter=40, tol=1e-3)
    arguments["epsilon"][1] *= 20
    arguments["a"][0, 2] = 0.1
    arguments["a"][1] = arguments["a"][0]  # a problem alone is centred with points that weigh nothing
    if not is_balanced:
        arguments["rho"] = torch.rand(2, 19, dtype=DOUBLE) + 0.3
    f, error, iterations = assert_as_plain(kernels, arguments, triton_device, dtype)
    assert iterations[0] != iterations[1]
    assert (iterations < 40).all()
    assert (error <= 1e-3).all()
    for k in range(2):
        alone = {key: value[k : k + 1] if isinstance(value, Tensor) else value for key, value in arguments.items()}
        found = run(kernels.symmetric_sinkhorn_self, alone, triton_device, dtype)
        assert all(torch.equal(own[0], all_[k]) for own, all_ in zip(found, (f, error, iterations), strict=True))


@pytest.mark.parametrize(("d", "dtype"), [(2, DOUBLE), (12, FLOAT)])
def test_self_of_a_small_first_epsilon(
    kernels: ModuleType, triton_device: torch.device, large_tiles: None, d: int, dtype: torch.dtype
) -> None:
    arguments = self_problem_of(SQEUCLIDEAN, d, n=19, max_iter=4, tol=-1.0)  # errors of 0 are no end
    arguments["epsilon"] = arguments["first_epsilon"] = arguments["epsilon"] * 1e-4
    assert_as_plain(kernels, arguments, triton_device, dtype)
    arguments["first_epsilon"], arguments["epsilon_factor"] = 1e5 * arguments["epsilon"], 1e-5
    arguments["max_iter"] = 6
    assert_as_plain(kernels, arguments, triton_device, dtype)


@pytest.mark.parametrize("n", [1, 2, 17, 53])
def test_sizes_of_self(kernels: ModuleType, triton_device: torch.device, n: int) -> None:
    arguments = self_problem_of(SQEUCLIDEAN, 3, n=n, max_iter=3)
    assert_as_plain(kernels, arguments, triton_device)


# ---- launchers ----


def test_same_bits_on_every_run(kernels: ModuleType, triton_device: torch.device) -> None:
    for d in (3,) if triton_device.type == "cpu" else (3, 9):
        pair, own = problem_of(SQEUCLIDEAN, d, epsilons=[1.0]), self_problem_of(SQEUCLIDEAN, d, max_iter=3)
        for function, arguments in ((kernels.symmetric_sinkhorn, pair), (kernels.symmetric_sinkhorn_self, own)):
            first, second = (run(function, arguments, triton_device, FLOAT) for _ in range(2))
            assert all(torch.equal(*both) for both in zip(first, second, strict=True))


def test_nan_is_not_lost(kernels: ModuleType, triton_device: torch.device, large_tiles: None) -> None:
    for cost, d in ((SQEUCLIDEAN, 3), (SQEUCLIDEAN, 9), (COSINE, 9)):
        arguments = problem_of(cost, d, n=13, m=11, epsilons=[1.0])
        arguments["x"][0, 5, 1] = math.nan
        f, g, f_own, g_own, *_ = run(kernels.symmetric_sinkhorn, arguments, triton_device, FLOAT)
        assert f[0, 5].isnan()
        assert g[0].isnan().all()
        assert f_own[0].isnan().all()
        assert all(part[1].isfinite().all() for part in (f, g, f_own, g_own))
        assert g_own[0].isfinite().all()


def test_nothing(kernels: ModuleType, triton_device: torch.device) -> None:
    arguments = problem_of(SQEUCLIDEAN, 3, n=5, m=4)
    empty = {key: value[:0] if isinstance(value, Tensor) else value for key, value in arguments.items()}
    shapes = [part.shape for part in run(kernels.symmetric_sinkhorn, empty, triton_device, FLOAT)]
    assert shapes == [(0, 5), (0, 4), (0, 5), (0, 4)] * 2
    arguments = self_problem_of(SQEUCLIDEAN, 3, n=5)
    empty = {key: value[:0] if isinstance(value, Tensor) else value for key, value in arguments.items()}
    shapes = [part.shape for part in run(kernels.symmetric_sinkhorn_self, empty, triton_device, FLOAT)]
    assert shapes == [(0, 5), (0,), (0,)]


def test_arguments_are_left_alone(kernels: ModuleType, triton_device: torch.device) -> None:
    for function, arguments in (
        (kernels.symmetric_sinkhorn, problem_of(SQEUCLIDEAN, 2, n=5, m=4)),
        (kernels.symmetric_sinkhorn_self, self_problem_of(SQEUCLIDEAN, 2, n=5)),
    ):
        there = [value.to(triton_device) if isinstance(value, Tensor) else value for value in arguments.values()]
        before = [value.clone() if isinstance(value, Tensor) else value for value in there]
        results = function(*there)
        owners = [part.untyped_storage().data_ptr() for part in (*results, *there) if isinstance(part, Tensor)]
        owners = [owner for owner in owners if owner != 0]
        assert len(set(owners)) == len(owners)
        for value, after in zip(before, there, strict=True):
            assert torch.equal(value, after) if isinstance(value, Tensor) else value == after


def test_samples_loss_of_these_kernels(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, triton_device: torch.device, large_tiles: None
) -> None:
    """They leave no slopes, which are passes over the plan then."""
    x, y = (torch.rand(count, 3, dtype=DOUBLE) for count in (21, 18))
    loss = SamplesLoss(p=2, blur=0.3, reach=0.7)

    def run_on(device: torch.device) -> list[Tensor]:
        leaves = [points.to(device).requires_grad_() for points in (x, y)]
        value = loss(*leaves)
        return [part.cpu() for part in (value, *torch.autograd.grad(value, leaves))]

    expected = run_on(torch.device("cpu"))
    if triton_device.type == "cpu":
        monkeypatch.setattr(samples_loss, "symmetric_sinkhorn", _symmetric_sinkhorn._on_cuda)
    for actual, truth in zip(run_on(triton_device), expected, strict=True):
        torch.testing.assert_close(actual.detach(), truth.detach(), rtol=1e-10, atol=1e-12)


# ---- on a GPU alone ----


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize(("cost", "d"), [(SQEUCLIDEAN, 3), (SQEUCLIDEAN, 20), (EUCLIDEAN, 11), (COSINE, 20)])
def test_runs_without_waiting_and_in_a_graph(
    kernels: ModuleType, triton_device: torch.device, cost: int, d: int, dtype: torch.dtype
) -> None:
    if triton_device.type != "cuda":
        pytest.skip("needs a GPU")
    pair, own = (
        [value.to(triton_device) if isinstance(value, Tensor) else value for value in arguments.values()]
        for arguments in (problem_of(cost, d, n=300, m=250), self_problem_of(cost, d, n=300))
    )
    pair[:2], own[0] = [points.to(dtype) for points in pair[:2]], own[0].to(dtype)

    def step() -> list[Tensor]:
        found = kernels.symmetric_sinkhorn_self(*own)
        return [*kernels.symmetric_sinkhorn(*pair), *found]

    assert_runs_without_waiting_and_in_a_graph(step)


@pytest.mark.large
@pytest.mark.parametrize(("cost", "d"), [(SQEUCLIDEAN, 3), (SQEUCLIDEAN, 64), (EUCLIDEAN, 2), (COSINE, 16)])
def test_many_points(kernels: ModuleType, triton_device: torch.device, cost: int, d: int) -> None:
    """The tiles of real use; more pairs than 32 bits count, of which some rows are checked."""
    n, m, few = 70_000, 65_000, slice(69_900, 69_950)
    x, y = (torch.randn(1, k, d, device=triton_device) for k in (n, m))
    if cost == COSINE:
        x, y = _pairwise_cost.units(x), _pairwise_cost.units(y)
    a, b = (torch.full((1, k), 1 / k, dtype=DOUBLE, device=triton_device) for k in (n, m))
    epsilon = 0.1 * d if cost != COSINE else 0.1
    f, g, f_own, _, next_f, _, next_f_own, _ = kernels.symmetric_sinkhorn(
        x, y, cost, 0.0, a, b, [4 * epsilon, 2 * epsilon, epsilon], INF, True
    )
    for points, potentials, following, weight in ((y, g, next_f, 1 / m), (x, f_own, next_f_own, 1 / n)):
        costs = _pairwise_cost.cost_of_computed(x[:, few].double(), points.double(), cost)
        expected = -epsilon * ((potentials.unsqueeze(1) - costs) / epsilon + math.log(weight)).logsumexp(2)
        assert (following[:, few] - expected).abs().max() < 1e-5 * costs.max()
    assert f.isfinite().all()

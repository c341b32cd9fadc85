"""Sinkhorn's CUDA kernels on the emulation in every way that they use a device, against log-sum-exp in float64."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulation import CSRC, HERE, build_library
from torch import Tensor

from pyreg.ops import _log_domain

DOUBLE = torch.float64
INF = math.inf
ORDERS = [(0, 0), (1, 0), (2, 1), (2, 2)]


pytestmark = pytest.mark.needs_compiler


class Side(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("targets", "rhos", "weights", "potentials")]


class Args(ctypes.Structure):
    """SinkhornArgs of csrc/sinkhorn/sinkhorn.h."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("cost", ctypes.c_void_p),
        ("point_cost", ctypes.c_int32),
        ("dimension", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("is_streaming", ctypes.c_bool),
        ("batch", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row", Side),
        ("column", Side),
        ("is_counting", ctypes.c_bool),
        ("epsilon", ctypes.c_void_p),
        ("first_epsilon", ctypes.c_void_p),
        ("epsilon_factor", ctypes.c_double),
        ("max_iterations", ctypes.c_int64),
        ("tolerance", ctypes.c_double),
        ("error", ctypes.c_void_p),
        ("iterations", ctypes.c_void_p),
        ("way", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int64),
        ("may_hold_in_registers", ctypes.c_bool),
        ("workspace", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Way:
    """SinkhornLimits."""

    way: int
    shared_bytes: int = 1 << 40
    may_hold_in_registers: bool = False


FASTEST, BLOCK, GRID, LAUNCHES = range(4)
WAYS = {
    "fastest": Way(FASTEST),
    "block, K in registers": Way(BLOCK, may_hold_in_registers=True),
    "block, K in shared memory": Way(BLOCK),
    "block, streaming": Way(BLOCK, 2500),
    "grid, K in shared memory": Way(GRID),
    "grid, streaming": Way(GRID, 2500),
    "launches": Way(LAUNCHES),
}


@pytest.fixture(scope="module")
def library(device: torch.device) -> ctypes.CDLL:
    sources = (CSRC / "sinkhorn" / "sinkhorn_cuda.cu", HERE / "sinkhorn_ways.cpp")
    library = ctypes.CDLL(str(build_library("sinkhorn_ways", sources)))
    library.run_sinkhorn.restype = ctypes.c_char_p
    library.sinkhorn_workspace_bytes.restype = ctypes.c_int64
    library.pyreg_emulation_set_thread_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.pyreg_emulation_set_thread_order(*ORDERS[2])
    return library


Result = tuple[Tensor, Tensor, Tensor, Tensor]


def prepare(way: Way, arguments: list[Any]) -> tuple[Args, Result]:
    """The kernels' arguments, and where their results will be, from the arguments of ``pyreg::sinkhorn``."""
    cost, a, b, log_a, log_b, rho_a, rho_b, epsilon, first, factor, is_counting, max_iter, tol, initial = arguments
    batch, n, m = cost.shape
    f, g = torch.zeros_like(log_a), initial.clone()
    error, iterations = torch.empty(batch, dtype=DOUBLE), torch.empty(batch, dtype=torch.int64)

    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    row = Side(*map(pointer, (log_a, rho_a, a, f)))
    column = Side(*map(pointer, (log_b, rho_b, b, g)))
    args = Args(
        *(0 if cost.dtype == DOUBLE else 1, pointer(cost), 0, 0, None, None, False, batch, n, m, row, column),
        *(is_counting, pointer(epsilon), pointer(first), factor, max_iter, tol, pointer(error), pointer(iterations)),
        *(way.way, way.shared_bytes, way.may_hold_in_registers, None, None),
    )
    return args, (f, g, error, iterations)


def solve(library: ctypes.CDLL, way: Way, arguments: list[Any]) -> Result:
    args, result = prepare(way, arguments)
    message = library.run_sinkhorn(ctypes.byref(args))
    if message is not None:
        raise RuntimeError(message.decode())
    return result


def weights_of(*shape: int) -> Tensor:
    weights = torch.rand(*shape, dtype=DOUBLE) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def problem(
    batch: int,
    n: int,
    m: int,
    *,
    kind: str = "balanced",
    is_counting: bool = False,
    dtype: torch.dtype = DOUBLE,
    epsilon: float = 0.05,
    first: float = 0.05,
    factor: float = 0.5,
    max_iter: int = 30,
    tol: float = 1e-5,
) -> list[Any]:
    cost = torch.rand(batch, n, m, dtype=DOUBLE).to(dtype)
    a, b = weights_of(batch, n), weights_of(batch, m)
    rho_a, rho_b = {
        "balanced": (None, None),
        "unbalanced": (torch.full((batch, n), 0.7, dtype=DOUBLE), torch.full((batch, m), 0.3, dtype=DOUBLE)),
        "an entry each": (None, torch.where(torch.rand(batch, m) < 0.5, torch.rand(batch, m, dtype=DOUBLE) + 0.2, INF)),
    }[kind]
    if kind != "balanced" and m > 1:  # what no marginal must have: no weight, no partner
        a[:, n // 2] = 0
        cost[:, :, m // 3] = INF
        if rho_b is not None:
            rho_b[:, m // 3] = 0.4
    epsilons = torch.full((batch,), epsilon, dtype=DOUBLE) * torch.linspace(1, 1.5, batch, dtype=DOUBLE)
    firsts = torch.full((batch,), first, dtype=DOUBLE)
    start = firsts.unsqueeze(1) * b.log()
    return [cost, a, b, a.log(), b.log(), rho_a, rho_b, epsilons, firsts, factor, is_counting, max_iter, tol, start]


def in_float64(arguments: list[Any]) -> Result:
    f, g, error, iterations = _log_domain.sinkhorn(arguments[0].double(), *arguments[1:])
    return f, g, error, iterations


def check(actual: Result, expected: Result, epsilon: float, dtype: torch.dtype) -> None:
    """Rounding of sums and of a few hundred logarithms. float32: of costs of 1 and exponents of some 1 / epsilon."""
    tolerance = 1e-11 if dtype == DOUBLE else max(2e-7, 3e-6 * epsilon)
    for potentials, truth in zip(actual[:2], expected[:2], strict=True):
        assert not potentials.isnan().any()
        torch.testing.assert_close(potentials, truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-13 if dtype == DOUBLE else 1e-6)
    assert torch.equal(actual[3], expected[3])


SIZES = [(2, 5, 7), (1, 40, 50), (7, 3, 1), (1, 1, 40), (4, 33, 129)]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "an entry each"])
@pytest.mark.parametrize("way", WAYS)
def test_ways(library: ctypes.CDLL, way: str, kind: str, dtype: torch.dtype) -> None:
    for (batch, n, m), is_counting in zip(SIZES, itertools.cycle((False, True))):
        arguments = problem(batch, n, m, kind=kind, is_counting=is_counting, dtype=dtype, max_iter=12)
        check(solve(library, WAYS[way], arguments), in_float64(arguments), 0.05, dtype)


@pytest.mark.parametrize("is_counting", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_float32_at_rho_far_below_epsilon(library: ctypes.CDLL, way: str, is_counting: bool) -> None:
    """Potentials in units of rho, which exp(-f / rho) takes: to the rounding of sums."""
    arguments = problem(
        2, 20, 40, kind="unbalanced", is_counting=is_counting, dtype=torch.float32, epsilon=1000.0, first=1000.0, tol=0
    )
    actual, expected = solve(library, WAYS[way], arguments), in_float64(arguments)
    sides = zip(actual[:2], expected[:2], arguments[3:5], arguments[5:7], strict=True)
    for potentials, truth, log_weights, rho in sides:
        found = truth > -INF
        assert torch.equal(potentials > -INF, found)
        difference = ((potentials - truth) / rho)[found]
        assert difference.abs().max() <= 1e-6 * (1 + log_weights[found].abs().max())


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("way", WAYS)
def test_float32_at_small_epsilon(library: ctypes.CDLL, way: str, epsilon: float) -> None:
    """Within 1e-5 of the costs' range, iteration by iteration, through all stages of epsilon."""
    arguments = problem(1, 20, 40, dtype=torch.float32, epsilon=epsilon, first=1.0, max_iter=60, tol=0.0)
    x, y = torch.rand(20, 2), torch.rand(40, 2)
    arguments[0] = torch.cdist(x, y).square().unsqueeze(0)
    arguments[0] /= arguments[0].max()
    actual, expected = solve(library, WAYS[way], arguments), in_float64(arguments)
    for potentials, truth in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(potentials, truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["balanced", "unbalanced"])
@pytest.mark.parametrize("way", WAYS)
def test_sums_out_of_range(library: ctypes.CDLL, way: str, kind: str, dtype: torch.dtype) -> None:
    """Potentials that start thousands of epsilon off: rows are formed around their largest entries, columns go by
    log-sum-exp, and scalings are absorbed again and again."""
    arguments = problem(2, 20, 40, kind=kind, dtype=dtype, epsilon=3e-4, first=3e-4, max_iter=40, tol=0.0)
    arguments[-1] = torch.where(arguments[2] > 0, 2 * torch.rand(2, 40, dtype=DOUBLE), -INF)
    actual, expected = solve(library, WAYS[way], arguments), in_float64(arguments)
    for potentials, truth in zip(actual[:2], expected[:2], strict=True):
        # Each iteration adds the rounding of exponents in the thousands.
        torch.testing.assert_close(potentials, truth, rtol=0, atol=1e-11 if dtype == DOUBLE else 5e-6)


@pytest.mark.parametrize(("dtype", "least"), [(DOUBLE, 1.2e-100), (torch.float32, 1.2e-15)], ids=["float64", "float32"])
@pytest.mark.parametrize("way", WAYS)
def test_scalings_that_lose_a_sum(library: ctypes.CDLL, way: str, dtype: torch.dtype, least: float) -> None:
    """Weights at the end of what scalings can do: just above it when K is formed, below it an iteration later."""
    for seed in range(4):
        torch.manual_seed(seed)
        arguments = problem(1, 20, 40, dtype=dtype, epsilon=0.02, first=0.02, max_iter=20, tol=0.0)
        arguments[1][0, ::4] = least
        arguments[3] = arguments[1].log()
        check(solve(library, WAYS[way], arguments), in_float64(arguments), 0.05, dtype)


LONG_ROWS = {
    "block, K in shared memory": Way(BLOCK),
    "block, rows in shared memory": Way(BLOCK, 160_000),
    "block, rows formed twice": Way(BLOCK, 20_000),
    "block, sums in memory": Way(BLOCK, 3000),
    "grid, K in shared memory": Way(GRID),
    "grid, rows formed twice": Way(GRID, 20_000),
    "grid, sums in memory": Way(GRID, 3000),
    "launches": Way(LAUNCHES, 20_000),
}


@pytest.mark.parametrize(("dtype", "m"), [(DOUBLE, 1030), (torch.float32, 2100)], ids=["float64", "float32"])
@pytest.mark.parametrize("way", LONG_ROWS)
def test_rows_longer_than_a_team(library: ctypes.CDLL, way: str, dtype: torch.dtype, m: int) -> None:
    arguments = problem(1, 17, m, kind="an entry each", dtype=dtype, max_iter=5)
    check(solve(library, LONG_ROWS[way], arguments), in_float64(arguments), 0.05, dtype)


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_in_every_order_of_threads(library: ctypes.CDLL, way: str) -> None:
    arguments = problem(4, 21, 70, kind="an entry each", dtype=torch.float32, epsilon=1e-2, first=0.5, max_iter=15)
    results = []
    for order in ORDERS:
        library.pyreg_emulation_set_thread_order(*order)
        results.append(solve(library, WAYS[way], arguments))
    library.pyreg_emulation_set_thread_order(*ORDERS[2])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_one_iteration_and_none(library: ctypes.CDLL, way: str) -> None:
    arguments = problem(2, 6, 9, first=1.0, max_iter=1)
    check(solve(library, WAYS[way], arguments), in_float64(arguments), 0.05, DOUBLE)
    arguments[-3] = 0
    f, g, error, iterations = solve(library, WAYS[way], arguments)
    assert torch.equal(g, arguments[-1])
    assert f.abs().max() == 0
    assert (error == INF).all()
    assert (iterations == 0).all()


def test_problems_that_end_at_different_times(library: ctypes.CDLL) -> None:
    arguments = problem(6, 12, 20, max_iter=200, tol=1e-8)
    arguments[7] = torch.tensor([1.0, 0.03, 0.3, 0.05, 0.1, 0.02], dtype=DOUBLE)
    expected = in_float64(arguments)
    assert len(set(expected[3].tolist())) > 3
    for way in WAYS.values():
        check(solve(library, way, arguments), expected, 0.05, DOUBLE)


@pytest.mark.parametrize(
    ("batch", "n", "m", "chosen"),
    [
        (1, 128, 128, Way(BLOCK, may_hold_in_registers=True)),
        (100, 128, 128, Way(BLOCK, may_hold_in_registers=True)),
        (1, 200, 200, Way(BLOCK)),  # K in shared memory
        (1, 250, 250, Way(BLOCK)),  # streaming takes less than two barriers
        (1, 400, 400, Way(GRID)),
        (1, 1000, 1000, Way(GRID)),
        (300, 400, 400, Way(BLOCK)),
    ],
)
def test_the_fastest_way(library: ctypes.CDLL, batch: int, n: int, m: int, chosen: Way) -> None:
    """On the emulated device of 3 multiprocessors; ways have workspaces of different sizes."""

    def workspace(way: Way) -> int:
        args = prepare(way, problem(1, 1, 1, dtype=torch.float32))[0]
        args.batch, args.rows, args.columns = batch, n, m
        return int(library.sinkhorn_workspace_bytes(ctypes.byref(args)))

    assert workspace(Way(FASTEST, may_hold_in_registers=True)) == workspace(chosen)
    assert workspace(Way(BLOCK if chosen.way == GRID else GRID)) != workspace(chosen)


@pytest.fixture
def without_cooperative_launch(library: ctypes.CDLL) -> Iterator[None]:
    library.pyreg_emulation_set_device(1)
    yield
    library.pyreg_emulation_set_device(0)


@pytest.mark.usefixtures("without_cooperative_launch")
def test_launches_where_there_is_no_cooperative_launch(library: ctypes.CDLL) -> None:
    arguments = problem(1, 600, 1000, dtype=torch.float32, epsilon=0.1, max_iter=3)
    by_itself = solve(library, WAYS["fastest"], arguments)
    check(by_itself, in_float64(arguments), 0.1, torch.float32)
    for found, expected in zip(by_itself, solve(library, WAYS["launches"], arguments), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="pyreg::sinkhorn: no cooperative launch of this size here"):
        solve(library, WAYS["grid, streaming"], arguments)


def test_too_many_iterations_is_an_error(library: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match=r"pyreg::sinkhorn: CUDA kernels make fewer than 2\^31 iterations, got max"):
        solve(library, WAYS["launches"], problem(1, 2, 2, max_iter=1 << 31))

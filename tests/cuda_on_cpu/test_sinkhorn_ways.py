"""Sinkhorn's CUDA kernels on the emulation in every way that they use a device, against log-sum-exp in float64."""

from __future__ import annotations

import ctypes
import itertools
import math
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
    "block, streaming": Way(BLOCK, 6000),
    "grid, K in shared memory": Way(GRID),
    "grid, streaming": Way(GRID, 6000),
    "launches": Way(LAUNCHES),
}


@pytest.fixture(scope="module")
def library(device: torch.device) -> ctypes.CDLL:
    sources = (CSRC / "sinkhorn" / "sinkhorn_cuda.cu", HERE / "sinkhorn_ways.cpp")
    library = ctypes.CDLL(str(build_library("sinkhorn_ways", sources)))
    library.run_sinkhorn.restype = ctypes.c_char_p
    library.pyreg_emulation_set_thread_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.pyreg_emulation_set_thread_order(*ORDERS[2])
    return library


Result = tuple[Tensor, Tensor, Tensor, Tensor]


def solve(library: ctypes.CDLL, way: Way, *arguments: Any) -> Result:
    """The arguments and results of ``pyreg::sinkhorn``."""
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
    message = library.run_sinkhorn(ctypes.byref(args))
    if message is not None:
        raise RuntimeError(message.decode())
    return f, g, error, iterations


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


SIZES = [(2, 5, 7), (1, 40, 50), (7, 3, 1), (1, 1, 40), (2, 33, 129)]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "an entry each"])
@pytest.mark.parametrize("way", WAYS)
def test_ways(library: ctypes.CDLL, way: str, kind: str, dtype: torch.dtype) -> None:
    for (batch, n, m), is_counting in zip(SIZES, itertools.cycle((False, True))):
        arguments = problem(batch, n, m, kind=kind, is_counting=is_counting, dtype=dtype, max_iter=12)
        check(solve(library, WAYS[way], *arguments), in_float64(arguments), 0.05, dtype)

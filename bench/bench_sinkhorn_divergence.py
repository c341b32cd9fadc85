"""The debiased Sinkhorn loss between points: value and both gradients, of points uniform in the unit cube.

nn.SamplesLoss is timed beside geomloss with its own options: the same epsilons, the same values. `sinkhorn_divergence`,
which works to a tolerance, is asked for a thousandth of the mass in at most 100
iterations, and stands beside them.

The floor is one exponential for every pair, of x and y, and of halves among x and among y, and iteration; in many
dimensions also the products that costs and slopes are.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import pyreg.functional
from pyreg.nn import SamplesLoss
from pyreg.ops._symmetric_sinkhorn import symmetric_sinkhorn
from pyreg.reference import sinkhorn_divergence as reference

from . import floor
from .bench_sinkhorn import geomloss_contender, gradients, unconverged
from .harness import FLOOR, OURS, Call, Contender, Inputs, Workload
from .sweep import Sweep, doubling, only

OPERATOR = "sinkhorn_divergence"

BLUR, SCALING = 0.05, 0.5
TENSORIZED, ONLINE, BY_TOLERANCE = "geomloss tensorized", "geomloss online", "ours to a tolerance"
PLAIN = "ours, plain iterations"
HAS_GEOMLOSS, HAS_KEOPS = (importlib.util.find_spec(name) is not None for name in ("geomloss", "pykeops"))

# In more dimensions costs are products; in fewer they are formed beside the exponentials.
MOST_DIRECT = 3


def steps(dimension: int) -> list[float]:
    """Epsilons of points that fill the unit cube."""
    return reference.epsilons(2, math.sqrt(dimension), BLUR, SCALING)


def geomloss(x: Tensor, y: Tensor, backend: str) -> Tensor:
    from geomloss import SamplesLoss

    return SamplesLoss("sinkhorn", p=2, blur=BLUR, scaling=SCALING, backend=backend)(x, y)  # type: ignore[no-any-return]


def divergence(x: Tensor, y: Tensor) -> Tensor:
    with unconverged():
        options = {"epsilon_scaling": SCALING, "max_iter": 100, "tol": 1e-3}
        return pyreg.functional.sinkhorn_divergence(x, y, epsilon=2 * BLUR**2, **options) / 2  # type: ignore[arg-type]


def floor_of(x: Tensor, y: Tensor) -> Callable[[], None]:
    n, m, d = len(x), len(y), x.shape[1]
    pairs = n * m + (n * n + m * m) // 2
    calls = [floor.exponentials(pairs * (len(steps(d)) + 2))]
    if d > MOST_DIRECT:
        plan = torch.rand(n, m)
        with torch.no_grad():
            x, y = x.detach(), y.detach()
            products = [(x, y.mT), (plan, y), (plan.mT, x)]  # and half of a cost each, and a slope each, for x and y
            outs = [torch.empty(a.shape[0], b.shape[1]) for a, b in products]

        def multiply() -> None:
            for (a, b), out in zip(products, outs, strict=True):
                torch.mm(a, b, out=out)

        calls += [multiply, multiply]
    return floor.in_sequence(*calls)


def contenders(d: int, smoke: bool) -> list[Contender]:
    def by_geomloss(name: str, backend: str) -> Contender:
        return geomloss_contender(name, lambda x, y: geomloss(x, y, backend))

    def by_floor(inputs: Inputs) -> Call:
        return floor_of(*inputs)

    ours = SamplesLoss("sinkhorn", p=2, blur=BLUR, scaling=SCALING)
    found = [Contender(OURS, gradients(ours)), Contender(BY_TOLERANCE, gradients(divergence))]
    if HAS_GEOMLOSS or not smoke:
        found.append(by_geomloss(TENSORIZED, "tensorized"))
    if (HAS_GEOMLOSS and HAS_KEOPS) or not smoke:
        found.append(by_geomloss(ONLINE, "online"))
    return [*found, Contender(FLOOR, by_floor)]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    if device == "cuda":
        return [_iterations(n, d, smoke) for n, d in ((10000, 64), (10000, 3), (50000, 64))]
    return [_points(n, d, smoke) for n, d in ((5000, 3), (2000, 64), (256, 2))]


def _points(n: int, d: int, smoke: bool) -> Workload:
    count = 64 if smoke else n

    def make_inputs(generator: torch.Generator) -> Inputs:
        x, y = (torch.rand(count, d, generator=generator).requires_grad_() for _ in range(2))
        return x, y

    name = f"{n}x{d}"
    found = contenders(d, smoke)
    return Workload(OPERATOR, name, "float32", "cpu", make_inputs, found, cached=True, resident=True)


def _iterations(n: int, d: int, smoke: bool) -> Workload:
    """Iterations alone, on a GPU: of the three problems of a debiased loss, and of the one between x and y that
    `sinkhorn_points` makes, which brings one side up to date after the other. The floor is that one's products."""
    count, made, epsilon = (64 if smoke else n), 3 if smoke else 20, 2 * BLUR**2

    def make_inputs(generator: torch.Generator) -> Inputs:
        x, y = (torch.rand(count, d, generator=generator, device=generator.device) for _ in range(2))
        return x, y

    def debiased(inputs: Inputs) -> Call:
        x, y = (points.unsqueeze(0) for points in inputs)
        weights = x.new_full((1, count), 1 / count, dtype=torch.float64)
        options = (0, 0.0, weights, weights, [epsilon] * (made - 2), math.inf, True, False, False)
        return lambda: symmetric_sinkhorn(x, y, *options)

    def plain(inputs: Inputs) -> Call:
        return lambda: pyreg.functional.sinkhorn_points(*inputs, epsilon=epsilon, max_iter=made, tol=0).value

    def products(inputs: Inputs) -> Call:
        x, y = inputs
        out = torch.empty(min(count, 8192), count, device=x.device)

        def call() -> None:
            for _ in range(2 * made):
                for first in range(0, count, len(out)):
                    rows = x[first : first + len(out)]
                    torch.mm(rows, y.mT, out=out[: len(rows)])

        return call

    found = [Contender(OURS, debiased), Contender(PLAIN, plain), Contender(FLOOR, products)]
    return Workload(OPERATOR, f"iterations {n}x{d}", "float32", "cuda", make_inputs, found, cached=True)


def sweeps(device: str) -> list[Sweep]:
    if device == "cuda":
        return []
    return [Sweep(OPERATOR, "n, of n x 3", doubling(250, 8000), _of_two)]


def _of_two(n: int) -> Workload:
    workload = _points(n, 3, smoke=False)
    return replace(workload, contenders=only(workload.contenders, OURS, TENSORIZED))


def test_speed(measure: Callable[[], None]) -> None:
    measure()

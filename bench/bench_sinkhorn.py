"""Sinkhorn transport, balanced, weights uniform: the value on a dense cost, value and gradients between points.

All contenders make the same number of iterations at the same epsilon, none stops early. Costs are of points in the unit
cube; epsilon is a twentieth of their mean, so that the exponentials of POT's plain form are numbers.

POT, geomloss and pykeops are timed where they are installed, OTT-JAX where `ott_jax.py` finds it. geomloss makes its
iterations at falling epsilons, as many of them, the last at the same epsilon; its cost is half of the squared distance.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import pyreg.functional
from pyreg.transport import ConvergenceWarning

from . import floor, ott_jax
from .harness import FLOOR, OURS, Call, Contender, Inputs, Workload, compiled
from .sweep import Sweep, doubling, only

OPERATOR = "sinkhorn"

SHARE_OF_MEAN = 0.05
DENSE_ITERATIONS = 100
ITERATIONS = {5000: 30, 20000: 20}  # of so many points
SMOKE_ITERATIONS = 3

POT, POT_LOG, POT_BATCH = "POT sinkhorn", "POT sinkhorn_log", "POT batch"
TENSORIZED, ONLINE, OTT = "geomloss tensorized", "geomloss online", "OTT-JAX"
HAS_POT, HAS_GEOMLOSS, HAS_KEOPS = (
    importlib.util.find_spec(name) is not None for name in ("ot", "geomloss", "pykeops")
)

# |x - y|^2 of uniform points has the mean d / 6.
SQUARES_PER_DIMENSION = 1 / 6


@contextmanager
def unconverged() -> Iterator[None]:
    """Nobody is to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


# ---- dense ----


def fused(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    with unconverged():
        return pyreg.functional.sinkhorn(cost, epsilon=epsilon, max_iter=iterations, tol=0).value


def iteration(cost: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Of potentials, the weights uniform: f, and then g."""
    n, m = cost.shape[-2:]
    f = -epsilon * ((g.unsqueeze(-2) - cost) / epsilon - math.log(m)).logsumexp(-1)
    return f, -epsilon * ((f.unsqueeze(-1) - cost) / epsilon - math.log(n)).logsumexp(-2)


Iteration = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def loop(cost: Tensor, epsilon: float, iterations: int, one: Iteration = iteration) -> Tensor:
    """By log-sum-exp, as most write it; the value is the dual's, where the columns' marginal holds."""
    f, g = cost[..., 0], torch.zeros_like(cost[..., 0, :])
    for _ in range(iterations):
        f, g = one(cost, g, epsilon)
    return f.mean(-1) + g.mean(-1)


def compiled_loop(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    return loop(cost, epsilon, iterations, compiled(iteration, dynamic=False))


def pot(cost: Tensor, epsilon: float, iterations: int, method: str) -> Tensor:
    import ot

    options = {"numItermax": iterations, "stopThr": 0.0, "warn": False}
    each = cost if cost.dim() == 3 else [cost]
    a, b = (cost.new_full((count,), 1 / count) for count in cost.shape[-2:])
    return torch.stack([ot.sinkhorn2(a, b, one, epsilon, method=method, **options) for one in each])


def pot_batch(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    import ot

    return ot.batch.solve_batch(cost, reg=epsilon, max_iter=iterations, tol=0.0).value_linear  # type: ignore[no-any-return]


Solver = Callable[[Tensor, float, int], Tensor]


def contender(
    name: str, solve: Solver, epsilon: float, iterations: int, slow: bool = False, imports: str = ""
) -> Contender:
    def prepare(inputs: Inputs) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return solve(inputs[0], epsilon, iterations)

        if slow:
            call()  # compiles
        return call

    return Contender(name, prepare, slow=slow, imports=imports)


def dense_contenders(epsilon: float, iterations: int, is_batch: bool, smoke: bool) -> list[Contender]:
    def one_read(inputs: Inputs) -> Call:
        read = floor.read(inputs[0])

        def call() -> None:
            for _ in range(iterations):
                read()

        return call

    def by_ott(inputs: Inputs) -> Call:
        return ott_jax.solver(epsilon, iterations, cost=inputs[0])

    def of(name: str, solve: Solver, slow: bool = False, imports: str = "") -> Contender:
        return contender(name, solve, epsilon, iterations, slow, imports)

    found = [of(OURS, fused), of("eager loop", loop), of("compiled loop", compiled_loop, slow=True)]
    if HAS_POT or not smoke:
        found.append(of(POT, lambda *problem: pot(*problem, method="sinkhorn"), imports="ot"))
        found.append(of(POT_LOG, lambda *problem: pot(*problem, method="sinkhorn_log"), imports="ot"))
        found += [of(POT_BATCH, pot_batch, imports="ot")] if is_batch else []
    if ott_jax.is_there() or not smoke:
        found.append(Contender(OTT, by_ott, elsewhere=True))
    return [*found, Contender(FLOOR, one_read)]


# ---- between points ----


def gradients(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        return lambda: torch.autograd.grad(value(*inputs), inputs)

    return prepare


def fused_points(x: Tensor, y: Tensor, epsilon: float, iterations: int) -> Tensor:
    with unconverged():
        return pyreg.functional.sinkhorn_points(x, y, epsilon=epsilon, max_iter=iterations, tol=0).value


def loop_points(x: Tensor, y: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Potentials without a graph, and one more half-iteration that has one: its gradient is that of the envelope."""
    cost = torch.cdist(x, y).square()
    with torch.no_grad():
        g = torch.zeros_like(cost[0])
        for _ in range(iterations):
            f, g = iteration(cost, g, epsilon)
    last = -epsilon * ((f.unsqueeze(1) - cost) / epsilon - math.log(len(x))).logsumexp(0)
    return f.mean() + last.mean()


def geomloss_points(x: Tensor, y: Tensor, epsilon: float, iterations: int, backend: str) -> Tensor:
    from geomloss import SamplesLoss

    blur, diameter = math.sqrt(epsilon / 2), math.sqrt(x.shape[1])
    # Its epsilons are those of the diameter, of diameter * scaling^k down to blur, and of blur.
    scaling = (blur / diameter) ** (1 / max(iterations - 2, 1))
    options = {"blur": blur, "diameter": diameter, "scaling": scaling, "debias": False, "backend": backend}
    return 2 * SamplesLoss("sinkhorn", p=2, **options)(x, y)  # type: ignore[no-any-return]


def geomloss_contender(name: str, value: Callable[[Tensor, Tensor], Tensor]) -> Contender:
    """Compiles, where KeOps does, by a call of a few points."""
    step = gradients(value)

    def prepare(inputs: Inputs) -> Call:
        step(tuple(points[:8].detach().requires_grad_() for points in inputs))()
        return step(inputs)

    return Contender(name, prepare, slow=True, imports="geomloss")


def point_contenders(epsilon: float, iterations: int, has_room: bool, smoke: bool) -> list[Contender]:
    """`has_room`: for the costs of all pairs, and more of their size."""

    def of(name: str, value: Callable[..., Tensor]) -> Contender:
        return Contender(name, gradients(lambda x, y: value(x, y, epsilon, iterations)), slow=value is not fused_points)

    def by_geomloss(name: str, backend: str) -> Contender:
        return geomloss_contender(name, lambda x, y: geomloss_points(x, y, epsilon, iterations, backend))

    def by_ott(inputs: Inputs) -> Call:
        x, y = inputs
        return ott_jax.solver(epsilon, iterations, x=x, y=y)

    found = [of(OURS, fused_points)]
    if has_room:
        found.append(of("eager loop", loop_points))
        if HAS_GEOMLOSS or not smoke:
            found.append(by_geomloss(TENSORIZED, "tensorized"))
    if (HAS_GEOMLOSS and HAS_KEOPS) or not smoke:
        found.append(by_geomloss(ONLINE, "online"))
    if has_room and (ott_jax.is_there() or not smoke):
        found.append(Contender(OTT, by_ott, elsewhere=True))
    return found


# ---- workloads ----


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    if device == "cuda":
        return []
    dense = [(500, 500), (2000, 2000), (64, 128, 128)]
    points = [(5000, 3), (5000, 64), (20000, 3)]
    return [*(_dense(shape, smoke) for shape in dense), *(_points(n, d, smoke, ITERATIONS[n]) for n, d in points)]


def _dense(shape: tuple[int, ...], smoke: bool, iterations: int = DENSE_ITERATIONS) -> Workload:
    *batch, n, m = (min(size, 16) if smoke else size for size in shape)

    def make_inputs(generator: torch.Generator) -> Inputs:
        x, y = (torch.rand(*batch, count, 2, generator=generator) for count in (n, m))
        return (torch.cdist(x, y).square(),)

    epsilon = SHARE_OF_MEAN * 2 * SQUARES_PER_DIMENSION
    contenders = dense_contenders(epsilon, SMOKE_ITERATIONS if smoke else iterations, len(shape) == 3, smoke)
    # An iteration finds the cost where the one before it has left it.
    name = "x".join(map(str, shape)) if len(shape) == 2 else f"{shape[0]}x({shape[1]}x{shape[2]})"
    return Workload(OPERATOR, name, "float32", "cpu", make_inputs, contenders, cached=True, resident=True)


def _points(n: int, d: int, smoke: bool, iterations: int) -> Workload:
    count, iterations = (64, SMOKE_ITERATIONS) if smoke else (n, iterations)

    def make_inputs(generator: torch.Generator) -> Inputs:
        x, y = (torch.rand(count, d, generator=generator).requires_grad_() for _ in range(2))
        return x, y

    epsilon = SHARE_OF_MEAN * d * SQUARES_PER_DIMENSION
    contenders = point_contenders(epsilon, iterations, n <= 5000, smoke)
    name = f"points {n}x{d}"
    return Workload(OPERATOR, name, "float32", "cpu", make_inputs, contenders, cached=True, resident=True)


def sweeps(device: str) -> list[Sweep]:
    if device == "cuda":
        return []
    return [
        Sweep(OPERATOR, "n, of n x n", doubling(125, 4000), lambda n: _of_two(_dense((n, n), False))),
        Sweep(OPERATOR, "iterations, of 500 x 500", doubling(10, 640), lambda t: _of_two(_dense((500, 500), False, t))),
        Sweep(OPERATOR, "n, of points n x 3", doubling(500, 16000), lambda n: _of_two(_points(n, 3, False, 20))),
    ]


def _of_two(workload: Workload) -> Workload:
    return replace(workload, contenders=only(workload.contenders, OURS, "eager loop"))


def test_speed(measure: Callable[[], None]) -> None:
    measure()

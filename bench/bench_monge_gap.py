"""The Monge gap of a map, with its gradients by source and mapped points.

All contenders make the same number of iterations at the same epsilon, none stops early. The map exchanges coordinates
and adds noise; epsilon is a twentieth of the mean cost. The eager formula is what one would write who knows the
envelope theorem: potentials without a graph, and one more half-iteration that has one, which costs several times less
than a graph of all iterations. Compiled are its iteration and that last part.

OTT-JAX is timed where `ott_jax.py` finds it. The floor reads a matrix of all pairs once an iteration, and multiplies it
by the points twice, as both gradients do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import pyreg.functional

from . import floor, ott_jax
from .harness import FLOOR, OURS, Call, Contender, Inputs, Workload, compiled
from .sweep import Sweep, doubling, only

OPERATOR = "monge_gap"

SHARE_OF_MEAN = 0.05
ITERATIONS, SMOKE_ITERATIONS = 100, 3
NOISE = 0.3

EAGER, COMPILED, OTT = "eager formula", "compiled formula", "OTT-JAX"


def fused(source: Tensor, mapped: Tensor, epsilon: float, iterations: int) -> Tensor:
    return pyreg.functional.monge_gap(source, mapped, epsilon=epsilon, max_iter=iterations, tol=0)


def iteration(cost: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """f, and then g; plans are exp((f_i + g_j - C_ij) / epsilon)."""
    log_weight = -math.log(len(cost))
    f = epsilon * (log_weight - ((g - cost) / epsilon).logsumexp(1))
    return f, epsilon * (log_weight - ((f.unsqueeze(1) - cost) / epsilon).logsumexp(0))


def squared_distances(source: Tensor, mapped: Tensor) -> Tensor:
    return torch.cdist(source, mapped).square()


def gap_of_potentials(source: Tensor, mapped: Tensor, f: Tensor, epsilon: float) -> Tensor:
    cost = squared_distances(source, mapped)
    g = epsilon * (-math.log(len(cost)) - ((f.unsqueeze(1) - cost) / epsilon).logsumexp(0))
    return (source - mapped).square().sum(1).mean() - (f.mean() + g.mean())


def formula(
    source: Tensor,
    mapped: Tensor,
    epsilon: float,
    iterations: int,
    one: Callable[..., tuple[Tensor, Tensor]] = iteration,
    last: Callable[..., Tensor] = gap_of_potentials,
) -> Tensor:
    with torch.no_grad():
        cost = squared_distances(source, mapped)
        g = torch.zeros_like(cost[0])
        for _ in range(iterations):
            f, g = one(cost, g, epsilon)
    return last(source, mapped, f, epsilon)


def compiled_formula(source: Tensor, mapped: Tensor, epsilon: float, iterations: int) -> Tensor:
    parts = compiled(iteration, dynamic=False), compiled(gap_of_potentials, dynamic=False)
    return formula(source, mapped, epsilon, iterations, *parts)


def contenders(epsilon: float, iterations: int, smoke: bool) -> list[Contender]:
    def of(name: str, gap: Callable[..., Tensor], compiles: bool = False) -> Contender:
        def prepare(inputs: Inputs) -> Call:
            def call() -> tuple[Tensor, ...]:
                value = gap(*inputs, epsilon, iterations)
                return value, *torch.autograd.grad(value, inputs)

            if compiles:
                call()
            return call

        return Contender(name, prepare, slow=compiles)

    def by_ott(inputs: Inputs) -> Call:
        source, mapped = inputs
        return ott_jax.solver(epsilon, iterations, source=source, mapped=mapped)

    def least(inputs: Inputs) -> Call:
        pairs = torch.rand(len(inputs[0]), len(inputs[0]))
        read = floor.read(pairs)
        source, mapped = (points.detach() for points in inputs)

        def call() -> None:
            for _ in range(iterations):
                read()
            torch.mm(pairs, mapped)
            torch.mm(pairs.T, source)

        return call

    found = [of(OURS, fused), of(EAGER, formula), of(COMPILED, compiled_formula, compiles=True)]
    if ott_jax.is_there() or not smoke:
        found.append(Contender(OTT, by_ott, elsewhere=True))
    return [*found, Contender(FLOOR, least)]


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    if device == "cuda":
        return []
    count, d, iterations = (32, 4, SMOKE_ITERATIONS) if smoke else (1024, 32, ITERATIONS)
    return [_workload(count, d, contenders(_epsilon(d), iterations, smoke))]


def _epsilon(d: int) -> float:
    """|x - y|^2 of uniform coordinates has the mean 1 / 6."""
    return SHARE_OF_MEAN * d * (1 / 6 + NOISE**2)


def _workload(count: int, d: int, everyone: list[Contender]) -> Workload:
    def make_inputs(generator: torch.Generator) -> Inputs:
        source = torch.rand(count, d, generator=generator)
        mapped = source.roll(1, dims=1) + NOISE * torch.randn(count, d, generator=generator)
        return source.requires_grad_(), mapped.requires_grad_()

    # An iteration finds the pairs where the one before it has left them.
    return Workload(OPERATOR, f"{count}x{d}", "float32", "cpu", make_inputs, everyone, cached=True, resident=True)


def sweeps(device: str) -> list[Sweep]:
    if device == "cuda":
        return []
    both = only(contenders(_epsilon(32), ITERATIONS, smoke=True), OURS, EAGER)
    return [Sweep(OPERATOR, "n, of n x 32", doubling(128, 4096), lambda n: _workload(n, 32, both))]


def test_speed(measure: Callable[[], None]) -> None:
    measure()

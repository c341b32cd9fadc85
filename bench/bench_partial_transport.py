"""Progressive partial transport: pseudo-labels of logits, 100 iterations at mass 0.5, none stops early.

The released formula is in float64 and by exponentials of the cost itself, two products of a matrix and a vector an
iteration; epsilon is the released 0.1, at which those exponentials are numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import pyreg.functional

from . import floor
from .harness import FLOOR, OURS, Call, Contender, Inputs, Workload, compiled
from .sweep import Sweep, doubling, only

OPERATOR = "partial_transport"

MASS, EPSILON, GAMMA = 0.5, 0.1, 1.0
ITERATIONS, SMOKE_ITERATIONS = 100, 3
SEMANTIC_WEIGHT, SEMANTIC_STEPS, FEATURES = 0.5, 10, 128

RELEASED, COMPILED, RELEASED_32 = "released fp64 formula", "compiled fp64 formula", "released formula in fp32"


def fused(logits: Tensor, iterations: int) -> Tensor:
    return pyreg.functional.progressive_partial_transport(
        logits, mass=MASS, epsilon=EPSILON, gamma=GAMMA, max_iter=iterations, tol=0
    )


def iteration(kernel: Tensor, b: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scalings of the rows and the columns, and how far the latter have moved."""
    a = rows / (kernel @ b)
    new = targets / (kernel.mT @ a)
    new = torch.cat([new[:-1] ** (GAMMA / (GAMMA + EPSILON)), new[-1:]])
    return a, new, (new - b).norm()


Iteration = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def scaled(cost: Tensor, iterations: int, one: Iteration = iteration) -> Tensor:
    n, k = cost.shape
    kernel = torch.exp(-torch.cat([cost, cost.new_zeros(n, 1)], dim=1) / EPSILON)
    targets = cost.new_full((k + 1, 1), MASS / k)
    targets[k] = 1 - MASS
    rows, b = cost.new_full((n, 1), 1 / n), cost.new_full((k + 1, 1), 1 / (k + 1))
    for _ in range(iterations):
        a, b, moved = one(kernel, b, targets, rows)
        if moved.item() < 0:  # the tolerance
            break
    return (n * a * kernel * b.mT)[:, :k]


def released(logits: Tensor, iterations: int) -> Tensor:
    return scaled(-logits.double().log_softmax(1), iterations)


def released_32(logits: Tensor, iterations: int) -> Tensor:
    return scaled(-logits.log_softmax(1), iterations)


def released_compiled(logits: Tensor, iterations: int) -> Tensor:
    return scaled(-logits.double().log_softmax(1), iterations, compiled(iteration, dynamic=False))


# ---- with similarities ----


def fused_semantic(logits: Tensor, z: Tensor, iterations: int) -> Tensor:
    return pyreg.functional.semantic_partial_transport(
        logits,
        features=z,
        mass=MASS,
        epsilon=EPSILON,
        gamma=GAMMA,
        semantic_weight=SEMANTIC_WEIGHT,
        mm_iter=SEMANTIC_STEPS,
        mm_tol=0,
        max_iter=iterations,
        tol=0,
    )


def released_semantic(logits: Tensor, z: Tensor, iterations: int) -> Tensor:
    """Float64, and the dense similarity."""
    logits, z = logits.double(), z.double()
    n, k = logits.shape
    similarity = z @ z.mT
    scores = logits.log_softmax(1)
    q = torch.full_like(logits, MASS / (n * k))
    for _ in range(SEMANTIC_STEPS):
        cost = -scores - SEMANTIC_WEIGHT * (similarity + similarity.mT) @ q
        q = scaled(cost, iterations) / n
    return n * q


# ---- workloads ----


def contender(name: str, solve: Callable[..., Tensor], iterations: int, slow: bool = False) -> Contender:
    def prepare(inputs: Inputs) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return solve(*inputs, iterations)

        if slow:
            call()  # compiles
        return call

    return Contender(name, prepare, slow=slow)


def workloads(device: str, smoke: bool = False) -> list[Workload]:
    if device == "cuda":
        return []
    sizes = [(50000, 100), (8192, 1000), (1024, 10)]
    return [*(_plain(n, k, smoke) for n, k in sizes), _semantic(5120, 100, smoke)]


def _plain(n: int, k: int, smoke: bool) -> Workload:
    rows, classes, iterations = (32, 8, SMOKE_ITERATIONS) if smoke else (n, k, ITERATIONS)

    def make_inputs(generator: torch.Generator) -> Inputs:
        return (2 * torch.randn(rows, classes, generator=generator),)

    def reads(inputs: Inputs) -> Call:
        read = floor.read(inputs[0])

        def call() -> None:
            for _ in range(iterations):
                read()

        return call

    contenders = [
        contender(OURS, fused, iterations),
        contender(RELEASED, released, iterations),
        contender(RELEASED_32, released_32, iterations),
        contender(COMPILED, released_compiled, iterations, slow=True),
        Contender(FLOOR, reads),
    ]
    # An iteration finds the kernel matrix where the one before it has left it.
    return Workload(OPERATOR, f"{n}x{k}", "float32", "cpu", make_inputs, contenders, cached=True, resident=True)


def _semantic(n: int, k: int, smoke: bool) -> Workload:
    rows, classes, iterations = (32, 8, SMOKE_ITERATIONS) if smoke else (n, k, ITERATIONS)

    def make_inputs(generator: torch.Generator) -> Inputs:
        z = torch.randn(rows, FEATURES, generator=generator)
        return 2 * torch.randn(rows, classes, generator=generator), torch.nn.functional.normalize(z)

    contenders = [contender(OURS, fused_semantic, iterations), contender(RELEASED, released_semantic, iterations)]
    return Workload(
        OPERATOR, f"semantic {n}x{k}", "float32", "cpu", make_inputs, contenders, cached=True, resident=True
    )


def sweeps(device: str) -> list[Sweep]:
    if device == "cuda":
        return []
    return [Sweep(OPERATOR, "n, of n x 100", doubling(1000, 64000), _of_two)]


def _of_two(n: int) -> Workload:
    workload = _plain(n, 100, smoke=False)
    return replace(workload, contenders=only(workload.contenders, OURS, RELEASED))


def test_speed(measure: Callable[[], None]) -> None:
    measure()

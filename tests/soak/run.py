"""One training, and what was seen of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle import ROUNDOFF
from tests.soak.families import FAMILIES, Comparison, Function
from tests.soak.memory import Memory, held

WARM = 5  # one in so many of the steps is over when memory is first looked at

# What memory may grow by after that. Pages: what malloc keeps for later, and splits. Bytes and blocks: strings and
# numbers of this and that; one float a step that is kept would be 192 KB and 8000 blocks in 10,000 steps.
LIMITS = Memory(resident=4 << 20, allocated=64 << 10, blocks=2000, tensors=0, graphs=0)


@dataclass
class Errors:
    """The worst of a half of the steps, relative, in the Euclidean norm, by what is compared: its place among the
    comparisons and their results and gradients."""

    fused: dict[tuple[int, int], float] = field(default_factory=dict)
    plain: dict[tuple[int, int], float] = field(default_factory=dict)
    allowed: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, place: tuple[int, int], fused: float, plain: float, comparison: Comparison) -> None:
        self.fused[place] = max(self.fused.get(place, 0.0), fused)
        self.plain[place] = max(self.plain.get(place, 0.0), plain)
        of_plain = 0.0 if comparison.is_iterated else 2 * self.plain[place]
        self.allowed[place] = of_plain + comparison.roundoffs * ROUNDOFF[torch.float32]

    def worst(self) -> tuple[float, float]:
        return max(self.fused.values()), max(self.plain.values())


@dataclass
class Outcome:
    family: str
    steps: int
    seconds: float = 0.0
    grown: Memory | None = None
    halves: tuple[Errors, Errors] = field(default_factory=lambda: (Errors(), Errors()))

    def failures(self, limits: Memory) -> list[str]:
        """What is not as it should be: the operator is wrong by more than twice what plain PyTorch in its dtype is
        wrong by, in the first half of the steps or in the second, or memory has grown."""
        found = []
        for half, errors in zip(("first", "second"), self.halves, strict=True):
            for place, error in errors.fused.items():
                if not error <= errors.allowed[place]:
                    found.append(
                        f"{self.family}: error {error:.2e} in the {half} half of {self.steps} steps, allowed "
                        f"{errors.allowed[place]:.2e} (comparison {place[0]}, tensor {place[1]})"
                    )
        assert self.grown is not None
        for name, limit in vars(limits).items():
            growth = getattr(self.grown, name)
            if growth > limit:
                found.append(f"{self.family}: {name} has grown by {growth} in {self.steps} steps, allowed {limit}")
        return found


def soak(family: str, steps: int, checks: int, on_step: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
    """Trains, compares at so many steps, evenly spread, and sees what memory has grown after the first fifth."""
    outcome, training = Outcome(family, steps), FAMILIES[family]()
    every, warm, before = max(steps // checks, 1), steps // WARM, held()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        training.step()
        if step % every == 0:
            errors = outcome.halves[2 * step > steps]
            for number, comparison in enumerate(training.comparisons(training.operands())):
                compare(comparison, number, errors)
        if step == warm:
            before = held()
        on_step(outcome)
    outcome.seconds = time.perf_counter() - start
    outcome.grown = held() - before
    return outcome


def compare(comparison: Comparison, number: int, errors: Errors) -> None:
    """Results, and gradients for an uneven upstream gradient."""
    fused, plain, operands = comparison[:3]
    ours, theirs = values(fused, operands, torch.float32), values(plain, operands, torch.float32)
    truth = values(plain, operands, torch.float64)
    for tensor, (actual, other, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert actual.isfinite().all()
        scale = true.norm().clamp_min(torch.finfo(torch.float32).tiny)
        error, plain_error = (((one.double() - true).norm() / scale).item() for one in (actual, other))
        errors.add((number, tensor), error, plain_error, comparison)


def values(function: Function, operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [
        operand.detach().to(dtype).requires_grad_(operand.requires_grad) if operand.is_floating_point() else operand
        for operand in operands
    ]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    if not trained:
        return results
    upstream = [torch.linspace(0.5, 1.5, one.numel(), dtype=torch.float64).view(one.shape).to(dtype) for one in results]
    gradients = torch.autograd.grad(results, trained, upstream)
    return [*(result.detach() for result in results), *gradients]

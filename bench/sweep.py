"""Sweeps: one contender or two over growing sizes, for the exponents of time and memory.

Sizes grow; a contender whose call takes long at one of them is left out at all that follow. A quick run takes every
other size, the largest among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from . import harness
from .budget import Budget
from .harness import Contender, Measurement, Settings, Workload

FULL = Settings(seconds=0.2, warm_up_seconds=0.05, only_call_seconds=1.0)
QUICK = Settings(seconds=0.05, warm_up_seconds=0.02, only_call_seconds=0.5, skip_slow=True)
SHARE = 0.2  # of the time of a run that also measures the workloads
LONGEST_CALL = 0.5  # seconds: the size after the one at which a call takes so long would take several times as long


@dataclass(frozen=True)
class Sweep:
    """`variable` says what grows and what does not, as in "N, of N x 512"; `make` makes the workload of a size, with
    the contenders to compare."""

    operator: str
    variable: str
    sizes: list[int]
    make: Callable[[int], Workload]

    def __str__(self) -> str:
        return f"{self.operator}: {self.variable}"

    def picked(self, settings: Settings) -> list[int]:
        return self.sizes[::-2][::-1] if settings.skip_slow else self.sizes


def doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range((last // first).bit_length())]


def only(contenders: Iterable[Contender], *names: str) -> list[Contender]:
    """Those of these names, as fast ones: in a sweep `LONGEST_CALL` decides."""
    return [replace(one, slow=False) for one in contenders if one.name in names]


def discover(device: str, operators: Iterable[str] = ()) -> list[Sweep]:
    """The sweeps of every `bench_<op>.py` for a device; of the operators whose names contain one of `operators`."""
    wanted = list(operators)
    found = [sweep for module in harness.modules() for sweep in module.sweeps(device)]
    return [sweep for sweep in found if harness.is_wanted(sweep.operator, wanted)]


def run(
    sweep: Sweep,
    settings: Settings = FULL,
    on_step: Callable[[str, float], None] = lambda step, done: None,
    share: float = math.inf,
    end: float = math.inf,
) -> list[Measurement]:
    """As `harness.run`, one size after the other."""
    measured: list[Measurement] = []
    too_long: dict[str, str] = {}
    sizes = sweep.picked(settings)
    budget = Budget(share, len(sizes))
    for i, size in enumerate(sizes):
        workload = sweep.make(size)
        due = [one for one in workload.contenders if one.name not in too_long]

        def hear(step: str, done: float, size: int = size, before: int = i) -> None:
            on_step(f"{size}, {step}", (before + done) / len(sizes))

        found = harness.run(replace(workload, contenders=due), settings, hear, budget.share(1), end)
        found += [harness.left_out(workload, name, reason) for name, reason in too_long.items()]
        for one in found:
            one.sweep, one.size = sweep.variable, size
            if one.seconds and min(one.seconds) >= LONGEST_CALL:
                too_long[one.contender] = f"a call took {min(one.seconds):.2g} s at {size}"
        measured += found
    return measured

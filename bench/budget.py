"""How the time of a run is shared out.

A run has so many minutes. Before every part of it (a workload, a sweep) the time that is left is divided among all
parts to come, by their weights, so that what one part takes beyond its share, or leaves of it, changes the shares of
all that follow. Nothing is stopped while it runs: a part that takes long takes long, and what finds no time any more is
left out, with that as its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Budget:
    """`seconds` for parts whose weights sum to `weight`."""

    def __init__(self, seconds: float, weight: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._weight = weight
        self.end = clock() + seconds

    @property
    def left(self) -> float:
        return self.end - self._clock()

    def share(self, weight: float) -> float:
        """The seconds of the next part, which counts as taken from here on; 0 when the time is over."""
        part = max(self.left, 0.0) * weight / max(self._weight, weight)
        self._weight -= weight
        return part


def fill(least: Sequence[float], most: Sequence[float], total: float) -> list[float]:
    """Shares of `total`, equal but for those who need at least, or can use at most, another amount. The least is given
    whatever the total."""
    shares = [0.0] * len(most)
    left, due = total - sum(least), sorted(range(len(most)), key=lambda i: most[i] - least[i])
    for count, i in zip(range(len(due), 0, -1), due, strict=True):
        extra = min(max(left, 0.0) / count, most[i] - least[i])
        shares[i] = least[i] + extra
        left -= extra
    return shares

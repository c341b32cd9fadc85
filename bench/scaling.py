"""Exponents of growth: a straight line through the upper half of a sweep's points, both axes logarithmic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .rows import Row

LEAST_POINTS = 3
NO_POWER = 0.5  # a line that points are off by half of their value says nothing


@dataclass(frozen=True)
class Fit:
    """values = factor * size^exponent, by least squares of the logarithms. `residual`: the root mean square by which
    points are off the line, as a share of their value; of `count` points from `first` on."""

    exponent: float
    factor: float
    residual: float
    count: int
    first: float

    def __call__(self, size: float) -> float:
        return float(self.factor * size**self.exponent)

    @property
    def power(self) -> str:
        return "none" if self.residual > NO_POWER else f"{self.exponent:.2f}"

    def __str__(self) -> str:
        return f"{self.power} (± {100 * self.residual:.0f} %)"


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit | None:
    """Through the points of the upper half of the sizes, where what does not grow no longer counts, but at least three;
    None if there are fewer. A value of 0 has no logarithm: the points up to the last of them are left out."""
    points = sorted(zip(sizes, values, strict=True))
    zeros = [i for i, (_, value) in enumerate(points) if value <= 0]
    points = points[zeros[-1] + 1 :] if zeros else points
    points = points[-max(LEAST_POINTS, math.ceil(len(points) / 2)) :]
    if len(points) < LEAST_POINTS:
        return None
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    exponent, offset = statistics.linear_regression(x, y)
    squares = [(exponent * x_i + offset - y_i) ** 2 for x_i, y_i in zip(x, y, strict=True)]
    residual = math.expm1(math.sqrt(statistics.fmean(squares)))
    return Fit(exponent, math.exp(offset), residual, len(points), points[0][0])


@dataclass(frozen=True)
class Curve:
    """One contender over a sweep."""

    sweep: str
    dtype: str
    contender: str
    rows: Sequence[Row]

    @property
    def time(self) -> tuple[list[int], list[float]]:
        return self._points(lambda row: row.median)

    @property
    def memory(self) -> tuple[list[int], list[float]]:
        return self._points(lambda row: row.peak_bytes)

    def _points(self, value: Callable[[Row], float | None]) -> tuple[list[int], list[float]]:
        found = [(row.size, number) for row in self.rows if row.size and (number := value(row)) is not None]
        return [size for size, _ in found], [float(number) for _, number in found]


def curves(rows: Iterable[Row], operator: str) -> dict[tuple[str, str], list[Curve]]:
    """The curves of an operator, by the sweep and its dtype."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.sweep and row.operator == operator:
            groups.setdefault((row.sweep, row.dtype, row.contender), []).append(row)
    result: dict[tuple[str, str], list[Curve]] = {}
    for (sweep, dtype, contender), found in groups.items():
        result.setdefault((sweep, dtype), []).append(Curve(sweep, dtype, contender, found))
    return result

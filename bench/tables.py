"""Tables of text made from rows: the same numbers for the console, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .harness import FLOOR, OURS
from .rows import Comparison, Row, comparisons
from .scaling import LEAST_POINTS, curves, fit

CONTENDER_HEADER = ["contender", "time", "p20 - p80", "ratio", "ours / floor", "peak"]
SUMMARY_HEADER = [
    "operator",
    "workload",
    "ours",
    "best rival",
    "its time / ours",
    "ours / floor",
    "ours, peak",
    "its peak",
]
TEXT_COLUMNS = {"operator", "workload", "contender", "best rival", "sweep", "target"}  # the others are numbers
SCALING_HEADER = ["sweep", "contender", "sizes", "exponent of time", "exponent of peak"]

LEGEND = (
    "Time: median of one call (20th to 80th percentile of samples). Ratio: time / ours. Peak: bytes above the inputs."
)
SCALING_LEGEND = (
    "Exponents: least squares over the upper half of the sizes, both axes logarithmic; in brackets the root mean square"
    " by which points are off the line."
)
TOO_FEW = f"fewer than {LEAST_POINTS} sizes"


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def cells(row: Row, comparison: Comparison) -> list[str]:
    """Of a contender: time, spread, ratio, ours / floor, peak."""
    if row.is_left_out:
        return ["left out", "", "", "", ""]
    if row.error:
        return [f"failed: {row.error[:40]}", "", "", "", ""]
    is_ours, is_floor = row.contender == OURS, row.contender == FLOOR
    return [
        seconds(row.median),
        f"{seconds(row.p20)} - {seconds(row.p80)}" if row.samples > 1 else "one call",
        ratio(comparison.ratio(row)),
        ratio(comparison.over_floor) if is_ours else "",
        "" if is_floor else size(row.peak_bytes),
    ]


def of_comparison(comparison: Comparison) -> Table:
    return Table(CONTENDER_HEADER, [[row.contender, *cells(row, comparison)] for row in comparison.rows])


def headlines(rows: Iterable[Row]) -> list[Comparison]:
    """Of each operator on each device the first workload that ours was measured on."""
    found: dict[tuple[str, str], Comparison] = {}
    for one in comparisons(rows):
        if one.ours:
            found.setdefault((one.ours.operator, one.ours.device), one)
    return list(found.values())


def summary(rows: Iterable[Row]) -> Table:
    """An operator a row."""
    lines = []
    for one in headlines(rows):
        ours, rival = one.ours, one.best_rival
        against = [rival.contender, ratio(one.ratio(rival))] if rival else ["", ""]
        peaks = [size(row.peak_bytes) if row else "" for row in (ours, rival)]
        time = seconds(ours.median) if ours else ""
        lines.append([one.rows[0].operator, one.title, time, *against, ratio(one.over_floor), *peaks])
    return Table(SUMMARY_HEADER, lines)


def scaling(rows: Iterable[Row], operator: str) -> Table:
    lines = []
    for found in curves(rows, operator).values():
        for curve in found:
            sizes = curve.time[0]
            if not sizes:
                continue
            fits = [fit(*points) for points in (curve.time, curve.memory)]
            span = f"{min(sizes)} - {max(sizes)}"
            lines.append([curve.sweep, curve.contender, span, *(TOO_FEW if one is None else str(one) for one in fits)])
    return Table(SCALING_HEADER, lines)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return _scaled(value, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def size(count: int | None) -> str:
    if count is None:
        return ""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits, in the largest of the units that leaves a digit before the point."""
    rounded = float(f"{value:.3g}")
    unit, one = next(((unit, one) for unit, one in units if rounded >= one), units[-1])
    return f"{float(f'{value / one:.3g}'):g} {unit}"


def rate(row: Row) -> str:
    """What the machine did in the floor of a workload, a second; empty where the floor counted nothing."""
    counted = ((row.floor_flops, "FLOP/s"), (row.floor_exponentials, "exp/s"), (row.floor_bytes, "B/s"))
    for count, unit in counted:
        if count and row.floor:
            return f"{count / row.floor / 1e9:.3g} G{unit}"
    return ""

"""Figures made from rows. They have no background, and lines and text of a gray that is read on white and on black."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import tables
from .harness import FLOOR, OURS
from .rows import Comparison, Row, comparisons, conditions, operators
from .scaling import NO_POWER, Curve, curves, fit

OURS_COLOR, OTHER_COLOR, FLOOR_COLOR = "#2a8fd0", "#a8a8a8", "#606060"
RIVAL_COLOR = "#d9822b"  # of a curve
TEXT_COLOR = "#808080"
WIDTH = 5.2  # inches: a phone shows it at three quarters of its size

# By the unit of the floor's rate: of what it is, and a color.
KINDS = {
    "B/s": ("memory traffic", OURS_COLOR),
    "FLOP/s": ("matrix products", RIVAL_COLOR),
    "exp/s": ("exponentials", "#8a63b8"),
    "": ("not counted", OTHER_COLOR),
}

STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT_COLOR),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9.0},
    **{
        "svg.fonttype": "none",
        "svg.hashsalt": "pyreg",
        "font.family": "sans-serif",
    },  # text, and the same ids each time
}

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return styled


@_styled
def summary(rows: Sequence[Row]) -> Figure:
    """An operator a line: the times of all rivals and of the floor, over ours."""
    found = [one for one in tables.headlines(rows) if one.best_rival]
    figure = Figure(figsize=(WIDTH, 0.36 * len(found) + 1.2), layout="constrained")
    axis = figure.subplots()
    axis.axvline(1.0, color=OURS_COLOR, linewidth=2, label="ours")
    kinds: dict[str, tuple[str, str, list[tuple[float, int]]]] = {
        "other rivals": ("o", OTHER_COLOR, []),
        "best rival": ("o", RIVAL_COLOR, []),
        "floor": ("|", TEXT_COLOR, []),
    }
    for i, one in enumerate(found):
        for row in one.rows:
            kind = "floor" if row.contender == FLOOR else "best rival" if row == one.best_rival else "other rivals"
            ratio = one.ratio(row)
            if ratio is not None and (row.is_rival or row.contender == FLOOR):
                kinds[kind][2].append((ratio, i))
                if kind == "best rival":
                    axis.hlines(i, 1.0, ratio, color=RIVAL_COLOR, linewidth=2)
                    text = f"{tables.ratio(ratio)} x  {row.contender}"
                    axis.text(1.01, i, text, transform=axis.get_yaxis_transform(), va="center", fontsize="small")
    for kind, (marker, color, points) in kinds.items():
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=color, label=kind, markersize=6, markeredgewidth=1.5)
    labels = [f"{one.rows[0].operator}\n{one.title}" for one in found]
    axis.set_yticks(range(len(found)), labels, fontsize="small")
    axis.set_ylim(len(found) - 0.4, -0.6)
    _logarithmic(axis)
    axis.set_xlabel("time / our time, logarithmic")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return figure


@_styled
def bars(found: Sequence[Comparison]) -> Figure:
    """One panel a workload, a bar a contender from fast to slow, whiskers from the 20th to the 80th percentile."""
    panels = [sorted((row for row in one.rows if row.median), key=lambda row: -(row.median or 0)) for one in found]
    panels = [panel for panel in panels if panel]
    heights = [len(panel) + 1.5 for panel in panels]
    figure = Figure(figsize=(WIDTH, 0.3 * sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _bars_of(axis, panel)
    axes[-1].set_xlabel("milliseconds a call, logarithmic")
    figure.supxlabel(_conditions([row for panel in panels for row in panel]), fontsize="x-small")
    return figure


def _bars_of(axis: Axes, panel: Sequence[Row]) -> None:
    medians, lows, highs = ([1e3 * (getattr(row, name) or 0.0) for row in panel] for name in ("median", "p20", "p80"))
    whiskers = (
        [median - low for median, low in zip(medians, lows, strict=True)],
        [high - median for median, high in zip(medians, highs, strict=True)],
    )
    names = [row.contender for row in panel]
    colors = [FLOOR_COLOR if row.contender == FLOOR else OURS_COLOR if row.is_ours else OTHER_COLOR for row in panel]
    drawn = axis.barh(names, medians, xerr=whiskers, color=colors, ecolor=TEXT_COLOR)
    axis.bar_label(drawn, [tables.seconds(row.median) for row in panel], padding=4)
    _logarithmic(axis)
    axis.set_xlim(min(medians) / 2, max(medians) * 6)
    row = panel[0]
    axis.set_title(f"{row.operator}, {row.workload}, {row.dtype}", loc="left", fontsize="medium")


@_styled
def scaling(rows: Sequence[Row], operator: str) -> Figure:
    """A line of panels a sweep: time and peak memory against the size, all axes logarithmic, with the fitted lines."""
    sweeps = curves(rows, operator)
    figure = Figure(figsize=(WIDTH, 2.5 * len(sweeps) + 0.3), layout="constrained")
    axes = figure.subplots(len(sweeps), 2, squeeze=False)
    for (time_axis, memory_axis), ((sweep, dtype), found) in zip(axes, sweeps.items(), strict=True):
        _curves_of(time_axis, [(curve, *curve.time) for curve in found], tables.seconds)
        _curves_of(memory_axis, [(curve, *curve.memory) for curve in found], lambda value: tables.size(round(value)))
        time_axis.set_title(f"time, {dtype}", loc="left", fontsize="medium")
        memory_axis.set_title("peak above the inputs", loc="left", fontsize="medium")
        for axis in (time_axis, memory_axis):
            axis.set_xlabel(sweep)
    figure.supxlabel(_conditions([row for row in rows if row.sweep and row.operator == operator]), fontsize="x-small")
    return figure


def _curves_of(axis: Axes, found: Sequence[tuple[Curve, list[int], list[float]]], show: Callable[[float], str]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, color=TEXT_COLOR, alpha=0.2)
    for curve, sizes, values in found:
        points = [(size, value) for size, value in zip(sizes, values, strict=True) if value > 0]
        line = fit(sizes, values)
        label = f"{curve.contender}: {line.power}" if line else curve.contender
        color = OURS_COLOR if curve.contender == OURS else RIVAL_COLOR
        axis.plot(*zip(*points, strict=True), "o", color=color, markersize=4, label=label) if points else None
        if line and line.residual <= NO_POWER:
            ends = [line.first, max(sizes)]
            axis.plot(ends, [line(end) for end in ends], color=color, linewidth=1)
    sizes = sorted({size for _, found_sizes, _ in found for size in found_sizes})
    if sizes:
        axis.set_xticks(sizes, [f"{size:g}" if size < 1e6 else f"{size / 1e6:.2g}M" for size in sizes], rotation=45)
        axis.xaxis.set_minor_formatter(NullFormatter())
    if axis.get_legend_handles_labels()[0]:
        low, high = (math.log10(limit) for limit in axis.get_ylim())
        # Whole decades, so that two ticks have labels, and one more for the legend.
        axis.set_ylim(10 ** math.floor(low), 10 ** (math.ceil(high) + 1))
        axis.legend(
            fontsize="small", title="exponent", title_fontsize="small", alignment="left", loc="upper left", borderpad=0
        )


@_styled
def roofline(rows: Sequence[Row]) -> Figure:
    """How near ours comes to what the machine can do: floor's time / our time of every workload, with the floor's rate
    beside it. More than 1 where ours does less work than the floor counts, such as skipped tiles."""
    lines = [(operator, one) for operator in operators(rows) for one in [None, *_with_floor(rows, operator)]]
    lines = [line for line, after in zip(lines, [*lines[1:], ("", None)], strict=True) if line[1] or after[1]]
    figure = Figure(figsize=(WIDTH, 0.2 * len(lines) + 1.3), layout="constrained")
    axis = figure.subplots()
    fractions, labels = [1.0], []
    drawn: dict[str, list[tuple[float, int]]] = {kind: [] for kind, _ in KINDS.values()}
    beside = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": "small"}  # of the axes
    for i, (operator, one) in enumerate(lines):
        if one is None:
            axis.text(0.01, i, operator, weight="bold", **beside)  # type: ignore[arg-type]
            labels.append("")
            continue
        floor, fraction = one.named(FLOOR), 1 / (one.over_floor or 1.0)
        rate = tables.rate(floor) if floor else ""
        drawn[KINDS[rate.rpartition("G")[2]][0]].append((fraction, i))
        axis.text(1.01, i, f"{fraction:.2f}   {rate}", **beside)  # type: ignore[arg-type]
        fractions.append(fraction)
        labels.append(one.title.replace("bfloat", "bf").replace("float", "fp"))
    least = min(0.1, *fractions)
    for kind, color in KINDS.values():
        if drawn[kind]:
            ends, positions = zip(*drawn[kind], strict=True)
            axis.hlines(positions, least, ends, color=color, linewidth=2)
            axis.plot(ends, positions, "o", color=color, label=kind)
    axis.axvline(1.0, color=TEXT_COLOR, linewidth=1, linestyle="--")
    _logarithmic(axis)
    axis.set_xlim(least, max(fractions) * 1.2)
    axis.set_yticks(range(len(lines)), labels, fontsize="small")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlabel("time of the floor / our time; beside it the rate of the floor")
    figure.legend(title="the floor is of", loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _with_floor(rows: Sequence[Row], operator: str) -> list[Comparison]:
    return [one for one in comparisons(rows, operator) if one.over_floor]


def _logarithmic(axis: Axes) -> None:
    """The x axis, with plain numbers at whole decades."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _conditions(rows: Sequence[Row]) -> str:
    return "\n".join(textwrap.fill(str(one), 84) for one in conditions(rows))


def svg(figure: Figure) -> str:
    """The same text for the same figure."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """By the ending of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(svg(figure))
        return
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        options: dict[str, Any] = {"dpi": 150}
        figure.savefig(path, **options)


def of_operators(rows: Sequence[Row]) -> dict[str, Figure]:
    """By file name without an ending: `<operator>` for the times of all contenders, `<operator>_scaling` for sweeps."""
    found = {}
    for operator in operators(rows):
        compared = [one for one in comparisons(rows, operator) if any(row.median for row in one.rows)]
        if compared:
            found[operator] = bars(compared)
        if curves(rows, operator):
            found[f"{operator}_scaling"] = scaling(rows, operator)
    return found

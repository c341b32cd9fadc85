"""`python -m bench.plot RESULTS.csv OUT.png [--workload NAME]`: bars of time, drawn from the CSV alone."""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from .report import format_seconds

OURS_COLOR, OTHER_COLOR, FLOOR_COLOR = "#0072b2", "#b0b0b0", "#555555"

Row = dict[str, str]


def draw(rows: list[Row]) -> Figure:
    """One panel a workload, a bar a contender from fast to slow, whiskers from the 20th to the 80th percentile."""
    panels = [
        (f"{operator}, {workload}, {dtype}", sorted(group, key=lambda row: -float(row["median_s"])))
        for (operator, workload, dtype), group in groupby(
            rows, key=lambda row: (row["operator"], row["workload"], row["dtype"])
        )
    ]
    heights = [len(group) + 1.5 for _, group in panels]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, group) in zip(axes, panels, strict=True):
        medians = [1e3 * float(row["median_s"]) for row in group]
        below = [median - 1e3 * float(row["p20_s"]) for median, row in zip(medians, group, strict=True)]
        above = [1e3 * float(row["p80_s"]) - median for median, row in zip(medians, group, strict=True)]
        names = [row["contender"] for row in group]
        bars = axis.barh(names, medians, xerr=(below, above), color=[_color(name) for name in names])
        axis.bar_label(bars, [format_seconds(median / 1e3) for median in medians], padding=4)
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, max(medians) * 4)
        axis.set_title(title, loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    row = rows[0]
    axes[-1].set_xlabel("milliseconds a call, logarithmic")
    conditions = f"{row['machine']}, {row['cores']} cores, torch {row['torch']}, commit {row['commit']}, {row['date']}"
    figure.supxlabel(conditions, fontsize="small")
    return figure


def _color(contender: str) -> str:
    if contender == "floor":
        return FLOOR_COLOR
    return OURS_COLOR if contender.startswith("ours") else OTHER_COLOR


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--workload", action="append", help="draw this workload only; may be given several times")
    options = parser.parse_args()
    with options.results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["median_s"]]
    last = max((row["date"] for row in rows), default="")  # of a file with several runs: only one run compares
    rows = [
        row for row in rows if row["date"] == last and (not options.workload or row["workload"] in options.workload)
    ]
    if not rows:
        print(f"bench.plot: nothing to draw in {options.results}", file=sys.stderr)
        return 2
    draw(rows).savefig(options.picture, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())

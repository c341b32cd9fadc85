"""What a run leaves behind: rows of CSV, one table, and the list of targets."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import machine
from .harness import FLOOR, OURS, Measurement
from .targets import MET, MISSED, NOT_MEASURED, Verdict

COLUMNS = [
    *("date", "machine", "cores", "torch", "commit", "load", "device"),
    *("operator", "workload", "dtype", "contender"),
    *("median_s", "p20_s", "p80_s", "samples", "floor_s", "peak_bytes", "launches", "error"),
]

NOISY = 1.5  # a verdict from samples that scatter so much is worth another run on a machine that is idle

STYLES = {MET: "green", MISSED: "red", NOT_MEASURED: "yellow"}


def rows(measurements: Iterable[Measurement]) -> list[dict[str, object]]:
    """One row a contender, with the floor of its workload; what was not measured stays empty."""
    measurements = list(measurements)
    floors = {_workload(m): m.median for m in measurements if m.contender == FLOOR and m.seconds}
    result = []
    for m in measurements:
        row: dict[str, object] = dict.fromkeys(COLUMNS, "")
        row |= machine.describe(m.device)
        row |= {"operator": m.operator, "workload": m.workload, "dtype": m.dtype, "contender": m.contender}
        row |= {"samples": len(m.seconds), "error": m.error or ""}
        if m.seconds:
            times = {"median_s": 50, "p20_s": 20, "p80_s": 80}
            row |= {column: f"{m.percentile(percent):.4g}" for column, percent in times.items()}
        if _workload(m) in floors:
            row["floor_s"] = f"{floors[_workload(m)]:.4g}"
        row |= {name: value for name in ("peak_bytes", "launches") if (value := getattr(m, name)) is not None}
        result.append(row)
    return result


def write_csv(path: Path, measurements: Iterable[Measurement]) -> None:
    """Adds the rows to the file, below a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows(measurements))


def show(console: Console, measurements: Iterable[Measurement], verdicts: list[Verdict], dropped: list[str]) -> None:
    """The table, a section for each workload, then the targets in the order of their file."""
    measurements = list(measurements)
    console.print(table(measurements, verdicts))
    if dropped:
        console.print(f"Left out of a quick run: {', '.join(dropped)}.")
    for status in (MET, MISSED, NOT_MEASURED):
        of_status = [verdict for verdict in verdicts if verdict.status == status]
        if of_status:
            console.print(f"[bold {STYLES[status]}]Targets {status}: {len(of_status)}[/]")
        for verdict in of_status:
            console.print(f"  {describe(verdict)}", highlight=False)


def table(measurements: list[Measurement], verdicts: list[Verdict]) -> Table:
    device = measurements[0].device
    about = machine.describe(device)
    result = Table(
        title=f"{about['machine']}, {about['cores']} cores, torch {about['torch']}, commit {about['commit']}",
        caption="Time: median of one call (20th to 80th percentile). Ratio: time / ours. Peak: bytes above the inputs.",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("operator, shape, dtype")
    result.add_column("contender")
    for name in ("time", "p20 - p80", "ratio", "ours / floor", "peak"):
        result.add_column(name, justify="right")
    result.add_column("target")

    for _, group in groupby(measurements, key=_workload):
        section = list(group)
        by_name = {m.contender: m for m in section}
        ours = by_name.get(OURS)
        for i, m in enumerate(section):
            title = [m.operator, m.workload, m.dtype][i] if i < 3 else ""
            targets = [v for v in verdicts if _applies(v, m)]
            result.add_row(title, m.contender, *_cells(m, ours, by_name.get(FLOOR)), "\n".join(map(_outcome, targets)))
        for title in [section[0].operator, section[0].workload, section[0].dtype][len(section) :]:
            result.add_row(title)
        result.add_section()
    return result


def describe(verdict: Verdict) -> str:
    target = verdict.target
    against = f", against {target.against}" if target.against else ""
    value = f": {verdict.value:.3g}" if verdict.value is not None else f": {verdict.reason}"
    noise = f" (noisy: p80 / p20 is {verdict.noise:.1f})" if verdict.noise >= NOISY else ""
    return f"{target.operator} {target.workload} {target.dtype}{against}, {target}{value}{noise}"


def _workload(m: Measurement) -> tuple[str, str, str, str]:
    return m.operator, m.workload, m.dtype, m.device


def _applies(verdict: Verdict, m: Measurement) -> bool:
    target = verdict.target
    same = (target.operator, target.workload, target.dtype, target.device) == _workload(m)
    return same and m.contender == (target.against or OURS)


def _outcome(verdict: Verdict) -> str:
    value = f": {verdict.value:.3g}" if verdict.value is not None else ""
    return f"[{STYLES[verdict.status]}]{verdict.target}{value}, {verdict.status}[/]"


def _cells(m: Measurement, ours: Measurement | None, floor: Measurement | None) -> list[str]:
    if m.error is not None:
        return [f"[red]failed: {m.error[:40]}[/]", "", "", "", ""]
    peak = format_bytes(m.peak_bytes) if m.peak_bytes is not None and m.contender != FLOOR else ""
    spread = f"{format_seconds(m.percentile(20))} - {format_seconds(m.percentile(80))}"
    ratio = f"{m.median / ours.median:.2f}" if ours is not None and ours.seconds else ""
    over_floor = f"{m.median / floor.median:.2f}" if m.contender == OURS and floor is not None and floor.seconds else ""
    return [format_seconds(m.median), spread, ratio, over_floor, peak]


def format_seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"

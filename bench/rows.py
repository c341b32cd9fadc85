"""Rows of CSV: what runs leave behind, and all that tables, figures and pages are made of."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, machine
from .harness import FLOOR, LEFT_OUT, OURS, Measurement

# `sweep` and `size`: what grew and how large it was, empty but for points of a sweep. `floor_*`: the time of the floor,
# and the bytes, floating-point operations and exponentials that it counted.
COLUMNS = [
    *("date", "machine", "cores", "isa", "torch", "commit", "load", "device"),
    *("operator", "workload", "dtype", "sweep", "size", "contender"),
    *("median_s", "p20_s", "p80_s", "samples", "floor_s", "floor_bytes", "floor_flops", "floor_exponentials"),
    *("peak_bytes", "launches", "error"),
]


@dataclass(frozen=True)
class Conditions:
    """Of one run; `source` is its file, as seen from the root of the repository."""

    date: str
    machine: str
    cores: str
    isa: str
    torch: str
    commit: str
    load: str
    source: str

    def __str__(self) -> str:
        cores, isa = "1 core" if self.cores == "1" else f"{self.cores} cores", f", {self.isa}" if self.isa else ""
        return (
            f"{cores} of {self.machine}{isa}, torch {self.torch}, commit {self.commit}, load {self.load} at the start,"
            f" {self.date[:10]}"
        )


@dataclass(frozen=True)
class Row:
    """One contender on one workload; None where nothing was measured."""

    conditions: Conditions
    device: str
    operator: str
    workload: str
    dtype: str
    sweep: str
    size: int | None
    contender: str
    median: float | None
    p20: float | None
    p80: float | None
    samples: int
    floor: float | None
    floor_bytes: int
    floor_flops: int
    floor_exponentials: int
    peak_bytes: int | None
    launches: int | None
    error: str

    @property
    def problem(self) -> tuple[str, str, str, str]:
        """What contenders are compared on."""
        return self.operator, self.workload, self.dtype, self.device

    @property
    def unit(self) -> tuple[str, str, str, str]:
        """What is taken from one run: all contenders of a workload, and all points of a sweep."""
        return (self.operator, f"sweep: {self.sweep}", self.dtype, self.device) if self.sweep else self.problem

    @property
    def spread(self) -> float:
        return self.p80 / self.p20 if self.p20 and self.p80 else 1.0

    @property
    def is_left_out(self) -> bool:
        return self.error.startswith(LEFT_OUT)

    @property
    def is_ours(self) -> bool:
        """One of our ways to do the work, such as "ours in place"."""
        return OURS in re.findall(r"\w+", self.contender) or self.contender == self.operator

    @property
    def is_rival(self) -> bool:
        return not self.is_ours and self.contender != FLOOR


def to_dicts(measurements: Iterable[Measurement]) -> list[dict[str, str]]:
    """One row a contender, with the floor of its workload; what was not measured stays empty."""
    measurements = list(measurements)
    floors = {_point(m): m for m in measurements if m.contender == FLOOR and m.seconds}
    result = []
    for m in measurements:
        row: dict[str, object] = dict.fromkeys(COLUMNS, "")
        row |= machine.describe(m.device)
        row |= {"operator": m.operator, "workload": m.workload, "dtype": m.dtype, "contender": m.contender}
        row |= {"sweep": m.sweep, "samples": len(m.seconds), "error": m.error or ""}
        if m.seconds:
            times = {"median_s": 50, "p20_s": 20, "p80_s": 80}
            row |= {column: f"{m.percentile(percent):.4g}" for column, percent in times.items()}
        if (floor := floors.get(_point(m))) is not None:
            row["floor_s"] = f"{floor.median:.4g}"
            if floor.work is not None:
                row |= {f"floor_{name}": count for name, count in vars(floor.work).items()}
        row |= {name: value for name in ("size", "peak_bytes", "launches") if (value := getattr(m, name)) is not None}
        result.append({column: str(value) for column, value in row.items()})
    return result


def _point(m: Measurement) -> tuple[object, ...]:
    return m.operator, m.workload, m.dtype, m.device, m.sweep, m.size


def parse(row: dict[str, str], source: str = "") -> Row:
    """A row of a file, which may be older than some of the columns."""

    def text(column: str) -> str:
        return row.get(column) or ""

    def number(column: str) -> float | None:
        return float(text(column)) if text(column) else None

    def count(column: str) -> int | None:
        return int(text(column)) if text(column) else None

    names = ("date", "machine", "cores", "isa", "torch", "commit", "load")
    return Row(
        conditions=Conditions(**{name: text(name) for name in names}, source=source),
        device=text("device"),
        operator=text("operator"),
        workload=text("workload"),
        dtype=text("dtype"),
        sweep=text("sweep"),
        size=count("size"),
        contender=text("contender"),
        median=number("median_s"),
        p20=number("p20_s"),
        p80=number("p80_s"),
        samples=count("samples") or 0,
        floor=number("floor_s"),
        floor_bytes=count("floor_bytes") or 0,
        floor_flops=count("floor_flops") or 0,
        floor_exponentials=count("floor_exponentials") or 0,
        peak_bytes=count("peak_bytes"),
        launches=count("launches"),
        error=text("error"),
    )


def of(measurements: Iterable[Measurement]) -> list[Row]:
    """The rows as a file would give them back."""
    return [parse(row) for row in to_dicts(measurements)]


def write(path: Path, measurements: Iterable[Measurement]) -> None:
    """Adds the rows to the file, below a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != COLUMNS:
            raise ValueError(f"bench: {path} has other columns than the rows to be added; name another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(to_dicts(measurements))


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files, of each workload and each sweep those of the last run that began it: only one run
    compares. Operators come in the order of their names, workloads in that of the runs, however `paths` are sorted."""
    found: list[Row] = []
    for path in paths:
        full = path.resolve()
        source = full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else path.name
        with path.open(newline="") as file:
            found += [parse(row, source) for row in csv.DictReader(file)]
    found.sort(key=lambda row: (row.conditions.date, row.conditions.source))
    last: dict[tuple[str, ...], Conditions] = {}
    for row in found:
        if not row.is_left_out or row.unit not in last:
            last[row.unit] = row.conditions
    return sorted((row for row in found if last[row.unit] == row.conditions), key=lambda row: row.operator)


def conditions(rows: Iterable[Row]) -> list[Conditions]:
    """Of all runs that the rows are from, in the order of their dates."""
    return sorted({row.conditions for row in rows}, key=lambda one: (one.date, one.source))


def operators(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.operator for row in rows))


@dataclass(frozen=True)
class Comparison:
    """All contenders of one workload in one run."""

    rows: Sequence[Row]

    @property
    def title(self) -> str:
        first = self.rows[0]
        return ", ".join([first.workload, first.dtype, *([first.device] if first.device != "cpu" else [])])

    def named(self, contender: str) -> Row | None:
        """The contender, if it was measured."""
        return next((row for row in self.rows if row.contender == contender and row.median), None)

    @property
    def ours(self) -> Row | None:
        return self.named(OURS)

    @property
    def best_rival(self) -> Row | None:
        rivals = [row for row in self.rows if row.is_rival and row.median]
        return min(rivals, key=lambda row: row.median or 0.0, default=None)

    def ratio(self, row: Row) -> float | None:
        """How many times our time."""
        ours = self.ours
        return row.median / ours.median if ours and ours.median and row.median else None

    @property
    def over_floor(self) -> float | None:
        """How many times the floor's our time is."""
        ours, floor = self.ours, self.named(FLOOR)
        return ours.median / floor.median if ours and floor and ours.median and floor.median else None


def comparisons(rows: Iterable[Row], operator: str | None = None) -> list[Comparison]:
    """The workloads, of one operator or of all; points of sweeps are none."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row.sweep and operator in (None, row.operator):
            groups.setdefault(row.problem, []).append(row)
    return [Comparison(group) for group in groups.values()]

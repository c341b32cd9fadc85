"""What a run shows at its end: one table, the exponents of its sweeps, and the list of targets."""

from __future__ import annotations

from collections.abc import Iterable

from rich import table as rich_table
from rich.console import Console
from rich.markup import escape

from . import tables
from .harness import OURS
from .rows import Row, comparisons, operators
from .targets import MET, MISSED, NOT_MEASURED, Verdict

NOISY = 1.5  # a verdict from samples that scatter so much is worth another run on a machine that is idle

STYLES = {MET: "green", MISSED: "red", NOT_MEASURED: "yellow"}


def show(console: Console, rows: Iterable[Row], verdicts: list[Verdict]) -> None:
    """The table, a section for each workload; sweeps; what was left out; the targets in the order of their file."""
    rows = list(rows)
    if comparisons(rows):
        console.print(table(rows, verdicts))
    if any(row.sweep for row in rows):
        console.print(scaling(rows))
    for reason, found in left_out(rows).items():
        console.print(f"{reason}: {'; '.join(found)}", highlight=False, markup=False)
    for status in (MET, MISSED, NOT_MEASURED):
        of_status = [verdict for verdict in verdicts if verdict.status == status]
        if of_status:
            console.print(f"[bold {STYLES[status]}]Targets {status}: {len(of_status)}[/]")
        for verdict in of_status:
            console.print(f"  {describe(verdict)}", highlight=False, markup=False)


def left_out(rows: Iterable[Row]) -> dict[str, list[str]]:
    """What was not measured, by the reason: contenders with their workload, or with the sizes of their sweep."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.error:
            where = f"{row.operator}, {row.sweep}" if row.sweep else f"{row.operator} {row.workload} {row.dtype}"
            sizes = reasons.setdefault(row.error, {}).setdefault(f"{where}, {row.contender}", [])
            sizes += [str(row.size)] if row.size else []
    return {
        reason: [f"{what} at {', '.join(sizes)}" if sizes else what for what, sizes in found.items()]
        for reason, found in reasons.items()
    }


def table(rows: Iterable[Row], verdicts: list[Verdict]) -> rich_table.Table:
    rows = list(rows)
    result = rich_table.Table(
        title=str(rows[0].conditions), caption=tables.LEGEND, title_justify="left", caption_justify="left"
    )
    result.add_column("operator, shape, dtype")
    for name in tables.CONTENDER_HEADER:
        result.add_column(name, justify="left" if name == "contender" else "right")
    result.add_column("target")

    for comparison in comparisons(rows):
        first = comparison.rows[0]
        titles = [first.operator, first.workload, first.dtype]
        for i, row in enumerate(comparison.rows):
            outcomes = "\n".join(outcome(verdict, colored=True) for verdict in verdicts if applies(verdict, row))
            cells = [escape(cell) for cell in tables.cells(row, comparison)]
            result.add_row(titles[i] if i < len(titles) else "", row.contender, *cells, outcomes)
        for title in titles[len(comparison.rows) :]:
            result.add_row(title)
        result.add_section()
    return result


def scaling(rows: Iterable[Row]) -> rich_table.Table:
    rows = list(rows)
    result = rich_table.Table(caption=tables.SCALING_LEGEND, caption_justify="left")
    for name in ("operator", *tables.SCALING_HEADER):
        result.add_column(name)
    for operator in operators(rows):
        for line in tables.scaling(rows, operator).rows:
            result.add_row(operator, *line)
        result.add_section()
    return result


def describe(verdict: Verdict) -> str:
    target = verdict.target
    against = f", against {target.against}" if target.against else ""
    value = f": {verdict.value:.3g}" if verdict.value is not None else f": {verdict.reason}"
    noise = f" (noisy: p80 / p20 is {verdict.noise:.1f})" if verdict.noise >= NOISY else ""
    return f"{target.operator} {target.workload} {target.dtype}{against}, {target}{value}{noise}"


def applies(verdict: Verdict, row: Row) -> bool:
    target = verdict.target
    same = (target.operator, target.workload, target.dtype, target.device) == row.problem
    return same and row.contender == (target.against or OURS)


def outcome(verdict: Verdict, colored: bool = False) -> str:
    value = f": {verdict.value:.3g}" if verdict.value is not None else ""
    text = f"{verdict.target}{value}, {verdict.status}"
    return f"[{STYLES[verdict.status]}]{text}[/]" if colored else text

"""`python -m bench.page RESULTS.csv [more.csv] OUT.html`: one page with all tables and figures.

It is drawn from the CSV alone. It needs nothing beside itself: styles and figures are inside of it.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from . import figures, report, tables, targets
from .rows import Comparison, Row, comparisons, conditions, operators, read
from .scaling import curves

TEMPLATE = "report.html.j2"


def page(rows: Sequence[Row]) -> str:
    verdicts = targets.judge(targets.load(), (row for row in rows if not row.sweep))
    by_status = {status: [report.describe(v) for v in verdicts if v.status == status] for status in report.STYLES}
    pictures = {name: _source(figure) for name, figure in figures.of_operators(rows).items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        conditions=conditions(rows),
        text_columns=tables.TEXT_COLUMNS,
        legend=tables.LEGEND,
        scaling_legend=tables.SCALING_LEGEND,
        summary=tables.summary(rows),
        summary_figure=_source(figures.summary(rows))
        if any(one.best_rival for one in tables.headlines(rows))
        else None,
        roofline=_source(figures.roofline(rows)) if any(one.over_floor for one in comparisons(rows)) else None,
        targets=by_status,
        left_out=report.left_out(rows),
        operators=[
            {
                "name": operator,
                "conditions": conditions(row for row in rows if row.operator == operator),
                "workloads": [_workload(one, verdicts) for one in comparisons(rows, operator)],
                "bars": pictures.get(operator),
                "scaling": tables.scaling(rows, operator) if curves(rows, operator) else None,
                "scaling_figure": pictures.get(f"{operator}_scaling"),
            }
            for operator in operators(rows)
        ],
    )


def _workload(comparison: Comparison, verdicts: Sequence[targets.Verdict]) -> dict[str, object]:
    table = tables.of_comparison(comparison)
    outcomes = [
        [(report.outcome(v), v.status.replace(" ", "-")) for v in verdicts if report.applies(v, row)]
        for row in comparison.rows
    ]
    return {"title": comparison.title, "header": table.header, "rows": list(zip(table.rows, outcomes, strict=True))}


def _source(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figures.svg(figure).encode()).decode()


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.csv")
    parser.add_argument("out", type=Path, metavar="OUT.html")
    options = parser.parse_args(arguments)
    write(options.out, read(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

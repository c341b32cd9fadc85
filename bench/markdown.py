"""`python -m bench.markdown [RESULTS.csv ...] FILE.md ...`: fills marked blocks of Markdown with tables made from rows.

A block starts with a line `<!-- bench: NAME -->` and ends with a line `<!-- /bench -->`; NAME is `summary` (an operator
a row), an operator (all its workloads), `scaling` (all exponents) or an operator and `scaling`. Below its table a block
names the files that it was made from: without RESULTS every block is made anew from those, and with --check nothing is
written, but the status is 1 if a block is not what they give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import ROOT, tables
from .harness import OURS
from .rows import Row, comparisons, conditions, operators, read
from .scaling import curves
from .tables import Table

BLOCK = re.compile(r"^<!-- bench: (?P<name>[^\n]+?) -->\n(?P<body>.*?)^<!-- /bench -->$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([^`]+\.csv)`")


def fill(text: str, rows: Sequence[Row] | None = None) -> str:
    """The text with every block made from these rows; without rows, each from the files that it names."""

    def one(found: re.Match[str]) -> str:
        own = read(_named(found)) if rows is None else rows
        return f"<!-- bench: {found['name']} -->\n\n{block(found['name'], own)}\n<!-- /bench -->"

    return BLOCK.sub(one, text)


def _named(found: re.Match[str]) -> list[Path]:
    paths = [ROOT / name for name in dict.fromkeys(FILE.findall(found["body"]))]
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        reason = f"names {', '.join(missing)}, which is not there" if missing else "names no CSV file"
        raise ValueError(f"bench.markdown: block '{found['name']}' {reason}; fill it with: make tables RESULTS=...")
    return paths


def block(name: str, rows: Sequence[Row]) -> str:
    """What stands between the marks."""
    known = {"summary": operators(rows)}
    known |= {one: [one] for one in operators(rows) if comparisons(rows, one)}
    swept = [one for one in operators(rows) if curves(rows, one)]
    known |= {"scaling": swept} if swept else {}
    known |= {f"{one} scaling": [one] for one in swept}
    if name not in known:
        raise ValueError(f"bench.markdown: no block is named '{name}'; the rows have: {', '.join(known)}")
    if name == "summary":
        table = tables.summary(rows)
        table = Table(table.header, [[f"`{operator}`", *cells] for operator, *cells in table.rows])
        return _markdown(table) + _sources([row for one in tables.headlines(rows) for row in one.rows])
    if name.endswith("scaling"):
        lines = [[f"`{operator}`", *line] for operator in known[name] for line in tables.scaling(rows, operator).rows]
        used = [row for row in rows if row.sweep and row.operator in known[name]]
        return _markdown(Table(["operator", *tables.SCALING_HEADER], lines)) + _sources(used)
    found = comparisons(rows, name)
    lines = []
    for one in found:
        of_one = tables.of_comparison(one).rows
        lines += [[one.title if i == 0 else "", *line] for i, line in enumerate(of_one)]
    table = Table(["workload", *tables.CONTENDER_HEADER], lines)
    return _markdown(table) + _sources([row for one in found for row in one.rows])


def _markdown(table: Table) -> str:
    rules = ["---" if name in tables.TEXT_COLUMNS else "---:" for name in table.header]
    lines = [table.header, rules, *([_cell(cell) for cell in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return f"**{text}**" if text == OURS else text.replace("|", "\\|")


def _sources(rows: Sequence[Row]) -> str:
    """The conditions, one line a run, with the operators that were measured in it."""
    lines = []
    for one in conditions(rows):
        names = ", ".join(f"`{name}`" for name in sorted({row.operator for row in rows if row.conditions == one}))
        lines.append(f"- {names}: {one}, `{one.source}`\n")
    return "\n" + "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.markdown", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="CSV files to take, Markdown files to fill")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a block is not what its CSV gives")
    options = parser.parse_intermixed_args(arguments)
    results = [path for path in options.files if path.suffix == ".csv"]
    stale = []
    try:
        rows = read(results) if results else None
        for path in options.files:
            if path.suffix == ".csv":
                continue
            text = path.read_text()
            filled = fill(text, rows)
            if filled != text:
                stale.append(str(path))
            if filled != text and not options.check:
                path.write_text(filled)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if stale:
        print(f"bench.markdown: {'not what the CSV gives' if options.check else 'written'}: {', '.join(stale)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

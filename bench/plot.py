"""`python -m bench.plot RESULTS.csv [more.csv] OUT`: figures, drawn from the CSV alone.

OUT is one picture of the times of all workloads, or of those that --workload names; with --summary, of one workload an
operator; with --per-operator it is a folder, which gets `<operator>.svg` and, of what was swept,
`<operator>_scaling.svg`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import figures
from .rows import comparisons, read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.csv")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--summary", action="store_true", help="all contenders' times over ours, an operator a line")
    parser.add_argument("--per-operator", action="store_true", help="OUT is a folder: a file or two an operator")
    parser.add_argument("--workload", action="append", help="draw this workload only; may be given several times")
    options = parser.parse_args(arguments)
    rows = [row for row in read(options.results) if not options.workload or row.workload in options.workload]
    if not any(row.median for row in rows):
        print(f"bench.plot: nothing to draw in {', '.join(map(str, options.results))}", file=sys.stderr)
        return 2
    if options.per_operator:
        for name, figure in figures.of_operators(rows).items():
            figures.save(figure, options.out / f"{name}.svg")
    elif options.summary:
        figures.save(figures.summary(rows), options.out)
    else:
        figures.save(figures.bars(comparisons(rows)), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

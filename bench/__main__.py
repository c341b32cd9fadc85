"""`python -m bench`: every workload with all contenders in turns, one table, targets met and missed, rows of CSV."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import harness, machine, report, targets

RESULTS = Path(__file__).with_name("results")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    harness.set_up_process()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    try:
        workloads = harness.discover(device, options.operators)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width; 80 columns would fold the table
    load = float(machine.describe(device)["load"])
    if load > 0.5 * machine.core_count():
        console.print(f"[yellow]The machine is not idle: load average {load}. These numbers will not hold.[/]")
    settings = harness.QUICK if options.quick else harness.FULL
    measurements = _measure(workloads, settings, console)
    dropped = [f"{c.name} ({w.name} {w.dtype})" for w in workloads for c in w.contenders if c.slow and options.quick]
    verdicts = targets.judge(targets.load(), measurements)
    report.show(console, measurements, verdicts, dropped)

    now = datetime.datetime.now(datetime.timezone.utc)
    path = options.csv or RESULTS / f"{now:%Y-%m-%d_%H%M%S}_{device}.csv"
    report.write_csv(path, measurements)
    console.print(f"Rows written to {path}")
    missed = any(verdict.status == targets.MISSED for verdict in verdicts)
    return 1 if options.strict and missed else 0


def _measure(
    workloads: list[harness.Workload], settings: harness.Settings, console: Console
) -> list[harness.Measurement]:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    measurements = []
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=len(workloads))
        for workload in workloads:
            on_step = lambda step, w=workload: progress.update(task, description=f"{w}: {step}")  # noqa: E731
            measurements += harness.run(workload, settings, on_step)
            progress.advance(task)
    return measurements


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="measure operators whose names contain this")
    parser.add_argument("--quick", action="store_true", help="less time for each contender, and no slow contenders")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if torch sees it")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="add the rows to this file (default: a new one)")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a target is missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())

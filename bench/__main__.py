"""`python -m bench`: every workload with all contenders in turns, sweeps of sizes, rows of CSV, a page, targets met and
missed."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from . import harness, machine, report, rows, sweep, targets
from .budget import Budget

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).with_name("report.html")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    harness.set_up_process()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.timezone.utc)
    path = options.csv or RESULTS / f"{now:%Y-%m-%d_%H%M%S}_{device}.csv"
    try:
        workloads = harness.discover(device, options.operators)
        rows.write(path, [])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    sweeps = [] if options.no_sweep else sweep.discover(device, options.operators)
    workloads = [] if options.sweep else workloads

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width; 80 columns would fold the table
    load = float(machine.describe(device)["load"])
    if load > 0.5 * machine.core_count():
        console.print(f"[yellow]The machine is not idle: load average {load}. These numbers will not hold.[/]")
    found: list[rows.Row] = []
    for measured in _measure(workloads, sweeps, options, console):
        rows.write(path, measured)  # at once: what stops the run later loses nothing
        found += rows.of(measured)
    verdicts = targets.judge(targets.load(), (row for row in found if not row.sweep))
    report.show(console, found, verdicts)

    console.print(f"Rows written to {path}", highlight=False, soft_wrap=True)
    try:
        from . import page
    except ModuleNotFoundError as error:
        console.print(
            f"No report, for {error.name} is not installed; elsewhere: python -m bench.page {path} report.html"
        )
    else:
        page.write(options.page, rows.read([path]))
        console.print(f"Report written to {options.page}", highlight=False, soft_wrap=True)
    missed = any(verdict.status == targets.MISSED for verdict in verdicts)
    return 1 if options.strict and missed else 0


def _measure(
    workloads: list[harness.Workload], sweeps: list[sweep.Sweep], options: argparse.Namespace, console: Console
) -> Iterator[list[harness.Measurement]]:
    """The workloads in the time that the sweeps do not need, then the sweeps, one after the other."""
    settings, sweep_settings = (harness.QUICK, sweep.QUICK) if options.quick else (harness.FULL, sweep.FULL)
    if options.minutes is not None:
        settings = replace(settings, minutes=options.minutes)
    seconds, end = 60 * settings.minutes, time.monotonic() + 60 * settings.minutes
    weights = [sum(one.weight for one in workload.picked(settings)) for workload in workloads]
    share = sweep.SHARE if workloads and sweeps else 1.0 if sweeps else 0.0
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("elapsed,")]
    columns.append(Remaining(end))
    # Parts differ in cost: a rate of the last half minute, as by default, says little of what is to come.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, speed_estimate_period=600
    ) as progress:
        task = progress.add_task("", total=100.0)
        hear = _listener(progress, task, console)
        budget = Budget(seconds * (1 - share), sum(weights))
        for i, (workload, weight) in enumerate(zip(workloads, weights, strict=True)):
            fast = sum(not one.slow for later in workloads[i + 1 :] for one in later.contenders)
            on_step = hear(str(workload), 100 * (1 - share) * sum(weights[:i]) / sum(weights), weight / sum(weights))
            yield harness.run(
                workload, settings, on_step, budget.share(weight), budget.end, fast * harness.RESERVED_SECONDS
            )
        budget = Budget(end - time.monotonic(), len(sweeps))
        for i, one in enumerate(sweeps):
            on_step = hear(str(one), 100 * (1 - share * (1 - i / len(sweeps))), share / len(sweeps))
            yield sweep.run(one, sweep_settings, on_step, budget.share(1), end)
        progress.update(task, description="", completed=100.0)


class Remaining(ProgressColumn):
    """By the rate so far, but never more than the run's time: at the end of that, what is left is left out."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self._end = end

    def render(self, task: Task) -> Text:
        left = max(self._end - time.monotonic(), 0.0)
        if task.time_remaining is None:
            return Text(f"at most {datetime.timedelta(seconds=round(left))} remaining")
        return Text(f"{datetime.timedelta(seconds=round(min(task.time_remaining, left)))} remaining")


def _listener(
    progress: Progress, task: TaskID, console: Console
) -> Callable[[str, float, float], Callable[[str, float], None]]:
    """Makes what a part of the run calls when it takes a step: where the output is no terminal, a line a part."""
    begin = time.monotonic()

    def part(name: str, percent: float, share: float) -> Callable[[str, float], None]:
        if not console.is_terminal:
            minutes, seconds = divmod(int(time.monotonic() - begin), 60)
            console.print(f"{minutes:3d}:{seconds:02d} {percent:3.0f} %  {name}", highlight=False, markup=False)

        def on_step(step: str, done: float) -> None:
            progress.update(task, description=f"{name}: {step}", completed=percent + 100 * share * done)

        return on_step

    return part


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="measure operators whose names contain this")
    parser.add_argument("--quick", action="store_true", help="3 minutes: no slow contenders, half of the sizes")
    parser.add_argument("--minutes", type=float, help="the time to share out (default: 14, of a quick run 2.75)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--sweep", action="store_true", help="the sweeps alone")
    only.add_argument("--no-sweep", action="store_true", help="no sweeps")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if torch sees it")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="add the rows to this file (default: a new one)")
    parser.add_argument("--page", type=Path, metavar="PATH", default=PAGE, help=f"the report (default: {PAGE.name})")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a target is missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())

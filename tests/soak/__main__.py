"""``python -m tests.soak``: every family, or those named, with a progress bar for each and one table at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.soak.families import FAMILIES
from tests.soak.run import LIMITS, Outcome, soak

CHECKS = 100  # comparisons with the reference in a training


def table(outcomes: Sequence[Outcome]) -> Table:
    result = Table(
        title=f"{outcomes[0].steps} steps: growth of memory after the first fifth, and the worst relative error",
        caption="Errors: of results and gradients against the definition in float64; plain: of that in float32.",
    )
    result.add_column("family", no_wrap=True)
    for heading in ("seconds", "resident", "malloc", "Python", "tensors", "1st half", "plain", "2nd half", "plain"):
        result.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        grown = outcome.grown
        assert grown is not None
        result.add_row(
            *(outcome.family, f"{outcome.seconds:.0f}"),
            *(f"{grown.resident / 1024:.0f} KiB", f"{grown.allocated / 1024:.1f} KiB", f"{grown.blocks} blocks"),
            f"{grown.tensors + grown.graphs}",
            *(f"{worst:.1e}" for half in outcome.halves for worst in half.worst()),
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Long trainings of every family.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)}; default: all")
    parser.add_argument("--steps", type=int, default=10000)
    options = parser.parse_args(arguments)
    unknown = [family for family in options.families if family not in FAMILIES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(FAMILIES)}")
    if options.steps < 2 * CHECKS:
        parser.error(f"--steps should be at least {2 * CHECKS}, got {options.steps}")

    torch.set_num_threads(1)  # on so small networks several threads wait for each other longer than they work
    console, outcomes = Console(width=max(Console().width, 120)), []
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        for family in options.families or FAMILIES:
            bar = progress.add_task(family, total=options.steps, note="")

            def show(outcome: Outcome, bar=bar) -> None:
                errors = outcome.halves[1] if outcome.halves[1].fused else outcome.halves[0]
                note = "error {:.1e}, plain {:.1e}".format(*errors.worst()) if errors.fused else ""
                progress.update(bar, advance=1, note=note)

            outcomes.append(soak(family, options.steps, CHECKS, show))
    console.print(table(outcomes))
    failures = [failure for outcome in outcomes for failure in outcome.failures(LIMITS)]
    for failure in failures:
        console.print(failure, style="red", soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the tools share that time, on this GPU, how a kernel may be tiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from triton.testing import do_bench

T = TypeVar("T")


def milliseconds(call: Callable[[], object]) -> float:
    return float(do_bench(call, warmup=200, rep=1000, return_mode="median"))


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


def tabulate(
    title: str,
    floor: tuple[str, float],
    operations: float,
    candidates: Iterable[T],
    attempt: Callable[[T], tuple[Callable[[], object], Sequence[float]]],
) -> None:
    """Prints what each candidate takes, beside a floor in milliseconds and its name.

    ``attempt`` runs a candidate once and returns what is timed, and the results' errors in units of what is allowed.
    """
    name, least = floor
    table = Table(title=f"{title}, {torch.cuda.get_device_name()}")
    for column in ("tiles", "ms", "TFLOP/s", f"of {name}"):
        table.add_column(column, justify="left" if column == "tiles" else "right")
    table.add_row(name, f"{least:.3f}", f"{operations / least / 1e9:.0f}", "")
    for candidate in candidates:
        try:
            call, errors = attempt(candidate)
        except Exception as error:  # whatever Triton raises: this Triton or this GPU cannot have it
            table.add_row(str(candidate), type(error).__name__, "", "")
            continue
        if not all(error < 1 for error in errors):  # NaN is wrong too
            table.add_row(str(candidate), "[red]wrong", "", "")
            continue
        taken = milliseconds(call)
        table.add_row(str(candidate), f"{taken:.3f}", f"{operations / taken / 1e9:.0f}", f"{least / taken:.0%}")
    Console(width=200).print(table)

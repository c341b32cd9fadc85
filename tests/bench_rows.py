"""Measurements and rows of CSV, made up."""

from __future__ import annotations

import csv
from pathlib import Path

from bench import rows, targets
from bench.harness import Measurement


def measurement(contender: str, seconds: list[float], **fields: object) -> Measurement:
    return Measurement("op", "8x8", "float32", "cpu", contender, seconds, **fields)  # type: ignore[arg-type]


def judge(wanted: list[targets.Target], measured: list[Measurement]) -> list[targets.Verdict]:
    return targets.judge(wanted, rows.of(measured))


def target(**fields: object) -> targets.Target:
    return targets.Target(operator="op", workload="8x8", dtype="float32", device="cpu", **fields)  # type: ignore[arg-type]


def write_rows(path: Path, date: str, lines: list[str]) -> Path:
    """Rows of `operator workload contender seconds`; a workload "N=4" is the point 4 of a sweep."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows.COLUMNS, restval="")
        writer.writeheader()
        for line in lines:
            operator, workload, contender, seconds = line.split()
            sweep_, _, size = workload.rpartition("=")
            times = dict.fromkeys(("median_s", "p20_s", "p80_s"), seconds)
            where = {"operator": operator, "workload": workload, "dtype": "float32", "device": "cpu"}
            peak = 1000 * int(size) if size and sweep_ else 2_000_000
            about = {
                "date": date,
                "machine": "Abacus",
                "cores": "2",
                "torch": "2.99",
                "commit": "c0ffee",
                "load": "0.10",
            }
            row = {**about, **where, **times, "sweep": sweep_, "size": size if sweep_ else "", "peak_bytes": peak}
            writer.writerow({**row, "contender": contender, "samples": 3})
    return path

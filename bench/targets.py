"""Targets: what `targets.toml` asks for, and whether one run reached it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .harness import OURS
from .rows import Row

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

MET = "met"
MISSED = "missed"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """Exactly one of `faster`, `within`, `launches` and `megabytes` is given; see `targets.toml`."""

    operator: str
    workload: str
    dtype: str
    device: str
    against: str | None = None
    faster: float | None = None
    within: float | None = None
    launches: int | None = None
    megabytes: float | None = None

    def __post_init__(self) -> None:
        alone = [limit for limit in (self.launches, self.megabytes) if limit is not None]
        compared = [limit for limit in (self.faster, self.within) if limit is not None]
        if len(alone) + len(compared) != 1 or (self.against is None) != bool(alone):
            raise ValueError(
                f"targets.toml: {self.operator} {self.workload} needs `against` with either `faster` or `within`,"
                " or `launches` alone, or `megabytes` alone"
            )

    def __str__(self) -> str:
        if self.launches is not None:
            return f"at most {self.launches} launches"
        if self.megabytes is not None:
            return f"at most {self.megabytes:g} MB"
        return f"{self.faster:g} x faster" if self.faster is not None else f"within {self.within:g} x"


@dataclass(frozen=True)
class Verdict:
    """`value` is the speed-up, the ratio to the contender, the launches or the peak memory in MB, as the target counts;
    `noise` is the larger spread of the two times compared."""

    target: Target
    status: str
    value: float | None = None
    reason: str = ""
    noise: float = 1.0


def load() -> list[Target]:
    with Path(__file__).with_name("targets.toml").open("rb") as file:
        return [Target(**entry) for entry in tomllib.load(file)["target"]]


def judge(targets: Iterable[Target], rows: Iterable[Row]) -> list[Verdict]:
    """A verdict for each target whose workload is among the rows. Where ours failed, the target is missed."""
    by_key = {(*row.problem, row.contender): row for row in rows}
    verdicts = []
    for target in targets:
        key = (target.operator, target.workload, target.dtype, target.device)
        if not any(measured[:4] == key for measured in by_key):
            continue
        verdicts.append(_judge_one(target, by_key.get((*key, OURS)), by_key.get((*key, target.against or OURS))))
    return verdicts


def _judge_one(target: Target, ours: Row | None, other: Row | None) -> Verdict:
    if ours is None or ours.is_left_out:
        return Verdict(target, NOT_MEASURED, reason="ours was not run")
    if ours.error:
        return Verdict(target, MISSED, reason=f"ours failed: {ours.error}")
    if target.launches is not None:
        if ours.launches is None:
            return Verdict(target, NOT_MEASURED, reason="launches were not counted")
        return Verdict(target, MET if ours.launches <= target.launches else MISSED, ours.launches)
    if target.megabytes is not None:
        if ours.peak_bytes is None:
            return Verdict(target, NOT_MEASURED, reason="memory was not measured")
        peak = ours.peak_bytes / 1e6
        return Verdict(target, MET if peak <= target.megabytes else MISSED, peak)
    if other is None or other.is_left_out:
        return Verdict(target, NOT_MEASURED, reason=f"{target.against} was not run")
    if other.error or other.median is None or ours.median is None:
        return Verdict(target, NOT_MEASURED, reason=f"{target.against} failed: {other.error}")
    noise = max(ours.spread, other.spread)
    if target.faster is not None:
        speedup = other.median / ours.median
        return Verdict(target, MET if speedup >= target.faster else MISSED, speedup, noise=noise)
    ratio = ours.median / other.median
    return Verdict(target, MET if target.within is not None and ratio <= target.within else MISSED, ratio, noise=noise)

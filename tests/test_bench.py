"""The measuring side: what it reports is what was measured. Small inputs, seconds in all."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import sys
import time
import timeit
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench` is not installed

import pyreg.functional
from bench import __main__ as command
from bench import (
    bench_conr,
    bench_info_nce,
    bench_orthograd,
    bench_sinkhorn,
    bench_sinkhorn_divergence,
    bench_stablemax,
    bench_supcon,
    budget,
    figures,
    floor,
    harness,
    html,
    markdown,
    memory,
    plot,
    report,
    rows,
    scaling,
    sweep,
    tables,
    targets,
)
from bench.harness import Contender, Measurement, Workload
from pyreg.nn import SamplesLoss
from pyreg.reference.conr import conr_loss
from pyreg.reference.info_nce import info_nce
from pyreg.reference.supcon import supcon_loss

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if markdown.BLOCK.search(path.read_text())
]


def measurement(contender: str, seconds: list[float], **fields: object) -> Measurement:
    return Measurement("op", "8x8", "float32", "cpu", contender, seconds, **fields)  # type: ignore[arg-type]


def judge(wanted: list[targets.Target], measured: list[Measurement]) -> list[targets.Verdict]:
    return targets.judge(wanted, rows.of(measured))


def target(**fields: object) -> targets.Target:
    return targets.Target(operator="op", workload="8x8", dtype="float32", device="cpu", **fields)  # type: ignore[arg-type]


def tiny_workload(*contenders: Contender, size: int = 1000) -> Workload:
    def make_inputs(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return (torch.randn(size, generator=generator),)

    return Workload("op", "8x8", "float32", "cpu", make_inputs, list(contenders), cached=True)


def sleeper(name: str, seconds: float, **fields: object) -> Contender:
    return Contender(name, lambda inputs: lambda: time.sleep(seconds), **fields)  # type: ignore[arg-type]


def same_loss(
    loss: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], *inputs: torch.Tensor, leaves: int = 1
) -> None:
    """Value, and gradients of the first inputs, in float32 are those of the reference in float64. Scores go up to 14;
    rounded by 1e-7 of that they leave exponentials right to some 1e-6, and ten times that is allowed."""

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        converted = [one.to(dtype, copy=True) if one.is_floating_point() else one for one in inputs]
        for leaf in converted[:leaves]:
            leaf.requires_grad_()
        value = function(*converted)
        return value.detach(), *torch.autograd.grad(value, converted[:leaves])

    for got, expected in zip(run(loss, torch.float32), run(reference, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class TestMeasurement:
    def test_percentiles_interpolate(self) -> None:
        m = measurement("ours", [5.0, 1.0, 4.0, 2.0, 3.0])
        assert m.median == 3.0
        assert m.percentile(20) == pytest.approx(1.8)
        assert m.percentile(80) == pytest.approx(4.2)
        assert m.spread == pytest.approx(4.2 / 1.8)

    @pytest.mark.parametrize(
        ("estimate", "samples", "calls"),
        [
            (4.0, 3, 1),  # never fewer than three samples
            (12.0, 1, 1),  # of what takes long, the call that told so
            (0.5, 4, 1),
            (1e-3, 60, 2),  # a sample fills 2 ms
            (50e-6, 60, 40),
            (0, 60, 2_000_000),
        ],
    )
    def test_plan(self, estimate: float, samples: int, calls: int) -> None:
        assert harness.plan(estimate, seconds=2.0) == (samples, calls)

    def test_a_plan_counts_what_a_sample_takes_beside_its_calls(self) -> None:
        assert harness.plan(0.1, seconds=2.0, overhead=0.3) == (5, 1)

    def test_turns_are_complete_interleaved_and_repeatable(self) -> None:
        order = list(harness.turns({"fast": 60, "slow": 3, "out": 0}))
        assert order.count("fast") == 60
        assert "out" not in order
        positions = [i for i, name in enumerate(order) if name == "slow"]
        assert [round(position / len(order), 1) for position in positions] == [0.3, 0.7, 1.0]
        assert order == list(harness.turns({"fast": 60, "slow": 3, "out": 0}))

    def test_turns_change_who_comes_first(self) -> None:
        order = list(harness.turns({"a": 30, "b": 30}))
        first = order[::2].count("a")
        assert 5 < first < 25

    def test_inputs_are_rotated_through_more_than_the_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "cache_bytes", lambda device: 10_000)
        cached = tiny_workload(size=1000)
        rotated = Workload("op", "8x8", "float32", "cpu", cached.make_inputs, [])
        assert len(harness.input_sets(cached)) == 1
        sets = harness.input_sets(rotated)
        assert sum(map(harness.input_bytes, sets)) == 12_000
        assert not torch.equal(sets[0][0], sets[1][0])
        assert torch.equal(sets[0][0], harness.input_sets(rotated)[0][0])

    def test_input_bytes_count_gradients(self) -> None:
        param = torch.ones(10, requires_grad=True)
        param.grad = torch.ones(10)
        assert harness.input_bytes([param, (torch.ones(5, dtype=torch.bfloat16),)]) == 90


class TestRun:
    def test_times_and_order_of_magnitude(self) -> None:
        workload = tiny_workload(sleeper("ours", 1e-3), sleeper("other", 10e-3))
        ours, other = harness.run(workload, harness.Settings(seconds=0.1))
        assert (ours.contender, other.contender) == ("ours", "other")
        assert ours.error is None
        assert len(ours.seconds) >= harness.MIN_SAMPLES
        assert min(ours.seconds) >= 1e-3
        assert min(other.seconds) >= 10e-3

    def test_quick_runs_leave_slow_contenders_out(self) -> None:
        workload = tiny_workload(sleeper("other", 1e-4, slow=True), sleeper("ours", 1e-4))
        other, ours = harness.run(workload, harness.QUICK)
        assert ours.seconds
        assert not other.seconds
        assert other.error == "left out: slow, and the run is a quick one"

    def test_a_run_whose_time_is_over_begins_nothing(self) -> None:
        workload = tiny_workload(sleeper("ours", 10), sleeper("other", 10))
        measured = harness.run(workload, end=time.monotonic())
        assert [m.error for m in measured] == ["left out: the time of the run was over"] * 2

    def test_a_slow_contender_is_not_begun_where_others_took_its_time(self) -> None:
        workload = tiny_workload(sleeper("other", 10, slow=True), sleeper("ours", 2e-3))
        other, ours = harness.run(workload, share=1e-3)
        assert other.error == "left out: slow, and its workload had taken 3 times its share of the run"
        assert len(ours.seconds) == harness.MIN_SAMPLES

    def test_samples_take_what_a_workload_has_left(self) -> None:
        """Of 0.6 s there are some left after the warm-up, in which the other does not call 30 times for 20 ms."""
        workload = tiny_workload(sleeper("ours", 5e-4), sleeper("other", 20e-3))
        ours, other = harness.run(workload, harness.Settings(seconds=10), share=0.6)
        assert harness.MIN_SAMPLES <= len(ours.seconds) <= harness.MAX_SAMPLES
        assert harness.MIN_SAMPLES <= len(other.seconds) < 30

    def test_the_warm_up_of_a_floor_ends(self) -> None:
        """It waits before every call: by the time of its calls alone, microseconds each, it would last minutes."""
        workload = tiny_workload(Contender("floor", lambda inputs: floor.read(*inputs)))
        begin = time.monotonic()
        (result,) = harness.run(workload, harness.Settings(seconds=0.1))
        assert result.error is None
        assert time.monotonic() - begin < 10

    def test_a_floor_says_what_it_does_and_a_process_elsewhere_no_memory(self) -> None:
        by_floor = Contender("floor", lambda inputs: floor.in_sequence(floor.read(*inputs), floor.copy(*inputs)))
        measured = harness.run(
            tiny_workload(by_floor, sleeper("other", 1e-3, elsewhere=True)), harness.Settings(seconds=0.01)
        )
        assert measured[0].work == floor.Work(bytes=3 * 4000)
        assert measured[1].peak_bytes is None
        assert rows.of(measured)[1].floor_bytes == 12_000

    def test_a_failing_contender_is_reported_and_stops_no_other(self) -> None:
        def fail(inputs: object) -> harness.Call:
            raise ValueError("no such kernel\nsecond line")

        ours, other = harness.run(
            tiny_workload(sleeper("ours", 1e-4), Contender("other", fail)), harness.Settings(seconds=0.01)
        )
        assert ours.seconds
        assert other.error == "ValueError: no such kernel"
        assert not other.seconds

    def test_consumed_inputs_are_made_anew_for_every_sample(self) -> None:
        prepared = 0

        def prepare(inputs: tuple[torch.Tensor]) -> harness.Call:
            nonlocal prepared
            prepared += 1
            used = False

            def call() -> None:
                nonlocal used
                assert not used
                used = True
                time.sleep(harness.SAMPLE_SECONDS)  # one call fills a sample

            return call

        (result,) = harness.run(
            tiny_workload(Contender("ours", prepare, consumes_inputs=True)), harness.Settings(seconds=0.02)
        )
        assert result.error is None
        assert prepared > len(result.seconds)

    def test_long_calls_are_not_repeated_for_warm_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "LONG_CALL_SECONDS", 5e-3)
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            time.sleep(6e-3)

        (result,) = harness.run(tiny_workload(Contender("ours", lambda inputs: call)), harness.Settings(seconds=0))
        assert calls == len(result.seconds) == harness.MIN_SAMPLES


class TestMemory:
    def test_large_calls_by_the_resident_set(self) -> None:
        size = 64 << 20
        peak = memory.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8), "cpu", memory.RESIDENT_BYTES)
        assert 0.98 * size < peak < 1.2 * size  # the kernel counts the resident set in batches of pages

    def test_small_calls_by_the_allocator(self) -> None:
        def two_at_once_then_one() -> None:
            first, second = torch.ones(1000), torch.ones(500)
            del first, second
            torch.ones(1200)

        assert memory.peak_extra_bytes(two_at_once_then_one, "cpu", 1) == 6000


class TestFloor:
    def test_update_leaves_the_values(self) -> None:
        inputs, updated = [torch.randn(70_001), torch.randn(64)], [torch.randn(70_001), torch.randn(64)]
        before = [tensor.clone() for tensor in updated]
        floor.update(inputs, updated)()
        assert all(map(torch.equal, before, updated))

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_every_word_is_read_and_copied_once(self, threads: int) -> None:
        library = floor._library()
        tensors = [torch.arange(1001), torch.arange(7), torch.full((300_000,), 3)]
        spans = floor._spans(tensors)
        assert library.read_spans(spans, len(spans), threads) == sum(int(tensor.sum()) for tensor in tensors)
        copied = torch.empty(sum(map(len, tensors)), dtype=torch.int64)
        library.copy_spans(spans, len(spans), threads, copied.data_ptr())
        assert torch.equal(copied, torch.cat(tensors))
        assert library.copy_spans_to_fresh_memory(spans, len(spans), threads) == 0

    def test_work_is_counted(self) -> None:
        a, b = torch.randn(10, 20), torch.randn(20, 30)
        with floor.counted() as work:
            floor.exponentials(1000)()
            floor.update([torch.ones(64)], [torch.ones(64)])()
            torch.mm(a, b, out=torch.empty(10, 30))
        floor.read(torch.ones(64))()
        assert work == floor.Work(bytes=3 * 256, flops=2 * 10 * 20 * 30, exponentials=1000)


class TestTargets:
    ours = measurement("ours", [1.0], launches=5, peak_bytes=3_000_000)
    other = measurement("other", [3.0])

    @pytest.mark.parametrize(
        ("limit", "status", "value"),
        [
            ({"against": "other", "faster": 3.0}, targets.MET, 3.0),
            ({"against": "other", "faster": 3.1}, targets.MISSED, 3.0),
            ({"against": "other", "within": 0.34}, targets.MET, 1 / 3),
            ({"against": "other", "within": 0.33}, targets.MISSED, 1 / 3),
            ({"launches": 5}, targets.MET, 5),
            ({"launches": 4}, targets.MISSED, 5),
            ({"megabytes": 3.0}, targets.MET, 3.0),
            ({"megabytes": 2.9}, targets.MISSED, 3.0),
            ({"against": "absent", "faster": 1.0}, targets.NOT_MEASURED, None),
        ],
    )
    def test_verdicts(self, limit: dict[str, object], status: str, value: float | None) -> None:
        (verdict,) = judge([target(**limit)], [self.ours, self.other])
        assert verdict.status == status
        assert verdict.value == (None if value is None else pytest.approx(value))

    def test_ours_failed_is_missed_and_the_other_failed_is_not_measured(self) -> None:
        wanted = [target(against="other", faster=1.0)]
        failed = {name: measurement(name, [], error="boom") for name in ("ours", "other")}
        assert judge(wanted, [failed["ours"], self.other])[0].status == targets.MISSED
        assert judge(wanted, [self.ours, failed["other"]])[0].status == targets.NOT_MEASURED
        left_out = measurement("ours", [], error="left out: no time")
        assert judge(wanted, [left_out, self.other])[0].status == targets.NOT_MEASURED

    def test_a_verdict_from_scattered_samples_says_so(self) -> None:
        scattered = measurement("floor", [1.0, 1.0, 2.0, 3.0, 3.0])
        (verdict,) = judge([target(against="floor", within=1.0)], [self.ours, scattered])
        assert (verdict.status, verdict.noise) == (targets.MET, 3.0)
        assert report.describe(verdict).endswith(": 0.5 (noisy: p80 / p20 is 3.0)")
        (quiet,) = judge([target(against="other", within=1.0)], [self.ours, self.other])
        assert "noisy" not in report.describe(quiet)

    def test_targets_of_other_workloads_are_left_alone(self) -> None:
        elsewhere = targets.Target("op", "9x9", "float32", "cpu", "other", faster=1.0)
        assert judge([elsewhere], [self.ours, self.other]) == []

    @pytest.mark.parametrize("limit", [{}, {"faster": 2.0}, {"against": "other", "faster": 2.0, "within": 1.0}])
    def test_a_target_says_one_thing(self, limit: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="op 8x8 needs `against` with either `faster` or `within`"):
            target(**limit)

    def test_every_target_of_the_file_names_a_workload_and_a_contender(self) -> None:
        workloads = {
            (w.operator, w.name, w.dtype, w.device): {c.name for c in w.contenders}
            for device in ("cpu", "cuda")
            for w in harness.discover(device)
        }
        loaded = targets.load()
        assert len(loaded) >= 12
        for one in loaded:
            contenders = workloads[one.operator, one.workload, one.dtype, one.device]
            assert (one.against or harness.OURS) in contenders


class TestRows:
    def test_csv_has_a_header_once_and_a_row_a_contender(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "results.csv"
        measured = [
            measurement("ours", [0.25, 0.25], peak_bytes=10),
            measurement("floor", [0.125]),
            measurement("other", [], error="boom"),
        ]
        rows.write(path, measured)
        rows.write(path, measured)
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert list(found[0]) == rows.COLUMNS
        assert len(found) == 6
        assert found[0]["contender"] == "ours"
        assert float(found[0]["median_s"]) == float(found[0]["p20_s"]) == 0.25
        assert {row["floor_s"] for row in found} == {"0.125"}
        assert found[0]["peak_bytes"] == "10"
        assert found[1]["peak_bytes"] == ""
        assert found[2]["median_s"] == ""
        assert found[2]["error"] == "boom"
        assert all(found[0][column] for column in ("date", "machine", "cores", "torch", "commit", "load", "device"))

    def test_rows_are_added_to_no_file_with_other_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "old.csv"
        path.write_text("date,operator\n")
        with pytest.raises(ValueError, match="has other columns than the rows to be added; name another file"):
            rows.write(path, [measurement("ours", [1.0])])

    def test_rows_are_what_was_measured(self, tmp_path: Path) -> None:
        measured = [measurement("ours", [1.0, 2.0, 3.0], sweep="N", size=8), measurement("other", [4.0])]
        rows.write(tmp_path / "rows.csv", measured)
        first, second = rows.read([tmp_path / "rows.csv"])
        assert (first.median, first.p20, first.p80, first.samples) == (2.0, 1.4, 2.6, 3)
        assert (first.sweep, first.size, first.peak_bytes) == ("N", 8, None)
        assert (second.contender, second.sweep, second.size) == ("other", "", None)

    def test_of_several_runs_the_last_one_of_each_workload_and_each_sweep(self, tmp_path: Path) -> None:
        old, new = (
            write_rows(tmp_path / f"{date}.csv", date, found)
            for date, found in (
                ("2026-01-01", ["a 8x8 ours 3", "a 8x8 other 6", "a 9x9 ours 1", "a N=1 ours 1", "a N=2 ours 2"]),
                ("2026-02-02", ["a 8x8 ours 2", "b 8x8 ours 7", "a N=1 ours 5"]),
            )
        )
        for paths in ([old, new], [new, old]):
            found = [(row.operator, row.workload, row.size, row.contender, row.median) for row in rows.read(paths)]
            assert found == [
                ("a", "9x9", None, "ours", 1.0),
                ("a", "8x8", None, "ours", 2.0),  # and not the other's 6 s, which were measured in another run
                ("a", "N=1", 1, "ours", 5.0),
                ("b", "8x8", None, "ours", 7.0),
            ]

    def test_files_of_all_ages_can_be_read(self) -> None:
        paths = sorted((Path(rows.__file__).parent / "results").glob("*.csv"))
        assert len(rows.read(paths)) > 150
        for path in paths:
            lines = len(path.read_text().splitlines()) - 1
            found = rows.read([path])
            assert len(found) == lines
            assert all(row.median or row.error for row in found)
            assert {row.conditions.source for row in found} == {f"bench/results/{path.name}"}

    def test_the_best_rival_is_neither_ours_nor_the_floor(self) -> None:
        names = {"ours": 2.0, "ours in place": 1.0, "logits + ours": 1.0, "op": 1.0, "floor": 1.0, "a": 5.0, "b": 3.0}
        (one,) = rows.comparisons(rows.of([measurement(name, [seconds]) for name, seconds in names.items()]))
        assert one.best_rival is not None
        assert one.best_rival.contender == "b"
        assert one.ratio(one.best_rival) == 1.5
        assert one.over_floor == 2.0


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


class TestBudget:
    def test_time_is_shared_by_weight_and_what_is_left_goes_to_the_others(self) -> None:
        now = 100.0
        shared = budget.Budget(seconds=60, weight=6, clock=lambda: now)
        assert shared.share(1) == 10
        now += 30  # three times its share
        assert shared.share(2) == 12  # two fifths of the 30 s that are left
        assert shared.share(3) == 30
        now += 31
        assert shared.left == -1
        assert shared.share(1) == 0

    @pytest.mark.parametrize(
        ("least", "most", "total", "shares"),
        [
            ([0, 0], [9, 9], 10, [5, 5]),
            ([0, 0, 0], [1, 9, 9], 10, [1, 4.5, 4.5]),  # what the first cannot use goes to the others
            ([6, 0], [9, 9], 10, [8, 2]),
            ([6, 6], [9, 9], 1, [6, 6]),
            ([0, 0], [1, 2], math.inf, [1, 2]),
            ([], [], 1, []),
        ],
    )
    def test_fill(self, least: list[float], most: list[float], total: float, shares: list[float]) -> None:
        assert budget.fill(least, most, total) == pytest.approx(shares)

    def test_a_full_run_and_a_quick_run_have_their_minutes(self) -> None:
        assert harness.FULL.minutes < 15
        assert harness.QUICK.minutes <= 3


class TestScaling:
    def test_the_exponent_of_a_power(self) -> None:
        sizes = [1, 2, 4, 8, 16, 32]
        line = scaling.fit(sizes, [5 + 3.0 * size**2 if size < 8 else 3.0 * size**2 for size in sizes])
        assert line is not None
        assert (line.count, line.first) == (3, 8)
        assert line.exponent == pytest.approx(2)
        assert line.factor == pytest.approx(3)
        assert line.residual == pytest.approx(0, abs=1e-9)
        assert line(10) == pytest.approx(300)
        assert str(line) == "2.00 (± 0 %)"

    def test_the_residual_of_scattered_points(self) -> None:
        """Logarithms off the line by +d, -2d, +d: of the parabola d x^2 - 2d/3 over -1, 0, 1, their mean taken."""
        d = math.log(1.1)
        line = scaling.fit([1, math.e, math.e**2], [math.exp(d), math.exp(-2 * d), math.exp(d)])
        assert line is not None
        assert line.exponent == pytest.approx(0, abs=1e-12)
        assert line.residual == pytest.approx(1.1 ** math.sqrt(2) - 1)

    def test_half_of_many_points_and_none_of_two(self) -> None:
        line = scaling.fit(range(1, 10), range(1, 10))
        assert line is not None
        assert (line.count, line.first) == (5, 5)
        assert scaling.fit([1, 2], [1, 2]) is None

    def test_points_without_a_logarithm_are_left_out(self) -> None:
        line = scaling.fit([1, 2, 4, 8, 16, 32], [9, 0, 4, 8, 16, 32])
        assert line is not None
        assert line.first == 8
        assert line.exponent == pytest.approx(1)
        assert scaling.fit([1, 2, 4], [0, 1, 2]) is None


class TestSweep:
    def test_doubling(self) -> None:
        assert sweep.doubling(125, 1000) == [125, 250, 500, 1000]
        assert sweep.doubling(3, 20) == [3, 6, 12]

    def test_a_quick_run_takes_every_other_size(self) -> None:
        one = sweep.Sweep("op", "N", [1, 2, 4, 8, 16, 32], lambda size: tiny_workload())
        assert one.picked(sweep.QUICK) == [2, 8, 32]
        assert one.picked(sweep.FULL) == one.sizes

    def test_points_know_their_size_and_long_calls_end_a_contender(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sweep, "LONGEST_CALL", 8e-3)

        def make(size: int) -> Workload:
            return tiny_workload(sleeper("ours", 1e-4 * size), sleeper("other", 10e-3 if size > 1 else 1e-4))

        settings = harness.Settings(seconds=0.01, warm_up_seconds=0)
        measured = sweep.run(sweep.Sweep("op", "N", [1, 2, 4], make), settings)
        assert [(m.contender, m.size) for m in measured] == [(c, n) for n in (1, 2, 4) for c in ("ours", "other")]
        assert {m.sweep for m in measured} == {"N"}
        assert [bool(m.seconds) for m in measured] == [True, True, True, True, True, False]
        assert measured[-1].error == "left out: a call took 0.01 s at 2"

    def test_a_sweep_whose_time_is_over_leaves_out_all_sizes(self) -> None:
        one = sweep.Sweep("op", "N", [1, 2], lambda size: tiny_workload(sleeper("ours", 10)))
        measured = sweep.run(one, end=time.monotonic())
        assert [m.error for m in measured] == ["left out: the time of the run was over"] * 2

    @pytest.mark.parametrize("one", sweep.discover("cpu"), ids=str)
    def test_every_sweep_compares_ours_with_one_rival(self, one: sweep.Sweep) -> None:
        workload = one.make(one.sizes[0])
        assert workload.operator == one.operator
        assert [contender.name == "ours" for contender in workload.contenders] == [True, False]
        assert len(one.picked(sweep.QUICK)) >= scaling.LEAST_POINTS
        inputs = workload.make_inputs(torch.Generator().manual_seed(0))
        for contender in workload.contenders:
            contender.prepare(inputs)()

    def test_every_operator_has_one(self) -> None:
        assert {one.operator for one in sweep.discover("cpu")} == {w.operator for w in harness.discover("cpu")}
        assert {one.operator for one in sweep.discover("cpu", ["stablemax"])} == {
            "linear_stablemax_cross_entropy",
            "stablemax_cross_entropy",
        }


class TestReport:
    def test_table_shows_ratios_and_verdicts(self) -> None:
        measured = [measurement("ours", [2.0]), measurement("other", [5.0]), measurement("floor", [1.6])]
        verdicts = judge([target(against="other", faster=2.0)], measured)
        table = report.table(rows.of(measured), verdicts)
        columns = {column.header: list(column.cells) for column in table.columns}
        assert columns["ratio"] == ["1.00", "2.50", "0.80"]
        assert columns["ours / floor"] == ["1.25", "", ""]
        assert "2 x faster: 2.5, met" in columns["target"][1]

    def test_what_was_left_out_is_named_with_its_reason(self) -> None:
        measured = [measurement("ours", [2.0])]
        measured += [measurement(name, [], error="left out: no time") for name in ("other", "third")]
        console = Console(width=200, record=True, file=io.StringIO())
        report.show(console, rows.of(measured), [])
        assert "Left out: no time: other (op 8x8 float32), third (op 8x8 float32)." in console.export_text()

    @pytest.mark.parametrize(
        ("value", "text"),
        [(12.4, "12.4 s"), (0.0482, "48.2 ms"), (51e-6, "51 us"), (999.7e-6, "1 ms"), (7200, "7200 s")],
    )
    def test_seconds(self, value: float, text: str) -> None:
        assert tables.seconds(value) == text

    @pytest.mark.parametrize(("value", "text"), [(524_288_000, "524 MB"), (0, "0 B"), (57_900, "57.9 kB")])
    def test_bytes(self, value: int, text: str) -> None:
        assert tables.size(value) == text

    def test_the_rate_of_a_floor(self) -> None:
        for work, text in (
            (floor.Work(bytes=3 * 10**9), "6 GB/s"),
            (floor.Work(bytes=10, flops=10**11), "200 GFLOP/s"),
            (floor.Work(exponentials=10**9), "2 Gexp/s"),
            (floor.Work(), ""),
        ):
            (row,) = rows.of([measurement("floor", [0.5], work=work)])
            assert tables.rate(row) == text


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    """Two runs of two operators."""
    first = [
        "alpha 8x8 ours 0.25",
        "alpha 8x8 other 0.5",
        "alpha 8x8 floor 0.2",
        "alpha 9x9 ours 1",
        "beta 7 ours 0.003",
    ]
    second = ["beta 7 ours 0.002", "beta 7 rival 0.005", "beta 7 floor 0.001"]
    swept = [f"beta N={n} {name} {seconds}" for n in (1, 2, 4) for name, seconds in (("ours", n), ("rival", n * n))]
    return [
        write_rows(tmp_path / "first.csv", "2026-01-01", first),
        write_rows(tmp_path / "second.csv", "2026-02-02", second + swept),
    ]


class TestFigures:
    def test_a_panel_a_workload_and_a_bar_a_contender(self) -> None:
        measured = [measurement("ours", [0.25]), measurement("other", [0.5, 0.75, 1.0]), measurement("floor", [0.125])]
        (axis,) = figures.bars(rows.comparisons(rows.of(measured))).axes
        assert axis.get_title(loc="left") == "op, 8x8, float32"
        assert [label.get_text() for label in axis.get_yticklabels()] == ["other", "ours", "floor"]
        assert [bar.get_width() for bar in axis.containers[-1]] == [750, 250, 125]

    def test_a_sweep_has_points_and_fitted_lines(self, results: list[Path]) -> None:
        time_axis, memory_axis = figures.scaling(rows.read(results), "beta").axes
        points, line, rivals, rivals_line = time_axis.get_lines()
        assert [list(points.get_xdata()), list(points.get_ydata())] == [[1, 2, 4], [1, 2, 4]]
        assert list(rivals.get_ydata()) == [1, 4, 16]
        assert list(line.get_ydata()) == pytest.approx([1, 4])
        assert list(rivals_line.get_ydata()) == pytest.approx([1, 16])
        assert [text.get_text() for text in time_axis.get_legend().get_texts()] == ["ours: 1.00", "rival: 2.00"]
        assert list(memory_axis.get_lines()[0].get_ydata()) == [1000, 2000, 4000]

    def test_distance_from_the_floor(self, results: list[Path]) -> None:
        (axis,) = figures.roofline(rows.read(results)).axes
        assert [label.get_text() for label in axis.get_yticklabels()] == ["alpha 8x8, float32", "beta 7, float32"]
        assert list(axis.get_lines()[0].get_xdata()) == [pytest.approx(0.8), 0.5]

    def test_files_of_operators_are_the_same_each_time(self, results: list[Path], tmp_path: Path) -> None:
        texts = []
        for folder in ("a", "b"):
            assert plot.main([*map(str, results), str(tmp_path / folder), "--per-operator"]) == 0
            texts.append({path.name: path.read_text() for path in (tmp_path / folder).iterdir()})
        assert sorted(texts[0]) == ["alpha.svg", "beta.svg", "beta_scaling.svg"]
        assert texts[0] == texts[1]
        assert "rival" in texts[0]["beta.svg"]

    def test_nothing_to_draw(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_rows(tmp_path / "none.csv", "2026-01-01", [])
        assert plot.main([str(path), str(tmp_path / "none.png")]) == 2
        assert f"nothing to draw in {path}" in capsys.readouterr().err


class Page(HTMLParser):
    """The words of a page, what it refers to, and the elements that it leaves open."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.resources, self.anchors, self.open = "", list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors += [str(values["href"])] if tag == "a" else []
        self.resources += [
            str(values[name]) for name in ("src", "href", "data", "srcset") if name in values and tag != "a"
        ]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


class TestPage:
    def test_it_is_whole_and_needs_nothing_else(self, results: list[Path], tmp_path: Path) -> None:
        path = tmp_path / "report.html"
        assert html.main([*map(str, results), str(path)]) == 0
        text = path.read_text()
        page = Page(text)
        assert page.open == []
        assert len(page.resources) == 4  # the floors, alpha, beta, beta's sweep
        assert all(resource.startswith("data:image/svg+xml;base64,") for resource in page.resources)
        assert set(page.anchors) == {"#alpha", "#beta"}
        assert all(f'id="{anchor[1:]}"' in text for anchor in page.anchors)
        assert not re.search(r"@import|url\(", text)
        for resource in page.resources:
            picture = base64.b64decode(resource.partition(",")[2]).decode()
            ElementTree.fromstring(picture)
            assert not re.search(r'(href|src)="(?!#)', picture)

    def test_it_has_all_numbers(self, results: list[Path]) -> None:
        words = Page(html.page(rows.read(results))).words
        # Two times and a peak, ours / floor, the rivals' ratios, exponents, where it was measured.
        for number in (
            "250 ms",
            "500 ms",
            "2 MB",
            "1.25",
            "2.00",
            "2.50",
            "1.00 (± 0 %)",
            "2.00 (± 0 %)",
            "Abacus",
            "c0ffee",
        ):
            assert number in words
        assert "3 ms" not in words  # of the older run
        assert "first.csv" in words
        assert "second.csv" in words

    def test_it_tells_targets_and_what_was_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [target(against="other", faster=2.0), target(against="gone", faster=2.0), target(megabytes=1)]
        monkeypatch.setattr(targets, "load", lambda: wanted)
        measured = [measurement("ours", [2.0], peak_bytes=3_000_000), measurement("other", [5.0])]
        measured += [measurement("gone", [], error="left out: no time")]
        words = Page(html.page(rows.of(measured))).words
        assert re.findall(r"(met|missed|not measured): (\d+)", words) == [
            ("met", "1"),
            ("missed", "1"),
            ("not measured", "1"),
        ]
        assert "op 8x8 float32, gone: left out: no time" in words


class TestMarkdown:
    TEXT = "# Title\n\n<!-- bench: summary -->\nold\n<!-- /bench -->\n\nText, `<!-- bench: beta -->` in a line.\n"

    def test_a_block_has_the_numbers_and_their_source(self, results: list[Path]) -> None:
        lines = markdown.fill(self.TEXT, rows.read(results)).splitlines()
        about = "2 cores of Abacus, torch 2.99, commit c0ffee, load 0.10 at the start"
        assert lines[:4] == ["# Title", "", "<!-- bench: summary -->", ""]
        assert lines[6:] == [
            "| `alpha` | 8x8, float32 | 250 ms | other | 2.00 | 1.25 | 2 MB | 2 MB |",
            "| `beta` | 7, float32 | 2 ms | rival | 2.50 | 2.00 | 2 MB | 2 MB |",
            "",
            f"- `alpha`: {about}, 2026-01-01, `first.csv`",
            f"- `beta`: {about}, 2026-02-02, `second.csv`",
            "",
            "<!-- /bench -->",
            "",
            "Text, `<!-- bench: beta -->` in a line.",
        ]

    def test_an_operator_and_its_exponents(self, results: list[Path]) -> None:
        found = rows.read(results)
        one = markdown.block("beta", found).splitlines()
        assert one[2:5] == [
            "| 7, float32 | **ours** | 2 ms | 2 ms - 2 ms | 1.00 | 2.00 | 2 MB |",
            "|  | rival | 5 ms | 5 ms - 5 ms | 2.50 |  | 2 MB |",
            "|  | floor | 1 ms | 1 ms - 1 ms | 0.50 |  |  |",
        ]
        assert "first.csv" not in markdown.block("beta", found)
        both = markdown.block("scaling", found)
        assert both == markdown.block("beta scaling", found)
        assert "| `beta` | N | rival | 1 - 4 | 2.00 (± 0 %) | 1.00 (± 0 %) |" in both

    def test_filling_again_changes_nothing(self, results: list[Path], tmp_path: Path) -> None:
        path = tmp_path / "page.md"
        path.write_text(self.TEXT)
        assert markdown.main([*map(str, results), str(path)]) == 0
        filled = path.read_text()
        assert filled != self.TEXT
        assert markdown.main([*map(str, results), "--check", str(path)]) == 0
        path.write_text(filled.replace("250 ms", "249 ms"))
        assert markdown.main([*map(str, results), "--check", str(path)]) == 1
        assert markdown.main([*map(str, results), str(path)]) == 0
        assert path.read_text() == filled

    def test_an_unknown_block_names_the_known_ones(
        self, results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "page.md"
        path.write_text("<!-- bench: gamma -->\n<!-- /bench -->\n")
        assert markdown.main([*map(str, results), str(path)]) == 2
        expected = "no block is named 'gamma'; the rows have: summary, alpha, beta, scaling, beta scaling"
        assert expected in capsys.readouterr().err

    def test_a_block_without_its_files(self) -> None:
        with pytest.raises(ValueError, match="block 'summary' names no CSV file; fill it with: make tables RESULTS="):
            markdown.fill(self.TEXT)
        with pytest.raises(ValueError, match=r"names .*gone\.csv, which is not there"):
            markdown.fill(self.TEXT.replace("old", "`bench/results/gone.csv`"))

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_tables_in_the_documentation_are_what_their_csv_gives(self, path: Path) -> None:
        text = path.read_text()
        assert markdown.fill(text) == text, f"python -m bench.markdown {path.name}"


class TestCommand:
    def test_unknown_operator_names_the_known_ones(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["--device", "cpu", "sinkhole"]) == 2
        error = capsys.readouterr().err
        assert "no operator named sinkhole on cpu; there are: " in error
        assert "orthograd, partial_transport, sinkhorn, sinkhorn_divergence, stablemax_cross_entropy" in error

    @pytest.mark.parametrize(("strict", "status"), [([], 0), (["--strict"], 1)])
    def test_a_missed_target_fails_only_a_strict_run(
        self, strict: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workload = tiny_workload(sleeper("ours", 2e-3), sleeper("other", 1e-3))
        monkeypatch.setattr(harness, "discover", lambda device, operators: [workload])
        points = sweep.Sweep("op", "N", [1, 2, 4], lambda size: tiny_workload(sleeper("ours", 1e-3 * size)))
        monkeypatch.setattr(sweep, "discover", lambda device, operators: [points])
        monkeypatch.setattr(targets, "load", lambda: [target(against="other", faster=1.0)])
        path, page = tmp_path / "rows.csv", tmp_path / "report.html"
        arguments = ["--quick", "--device", "cpu", "--csv", str(path), "--page", str(page), *strict]
        assert command.main(arguments) == status
        assert [row.size for row in rows.read([path])] == [None, None, 1, 4]
        assert "at least" not in page.read_text()
        assert "1 x faster" in page.read_text()


class TestContenders:
    """All contenders of an operator do the same work."""

    def test_resnet50(self) -> None:
        shapes = list(bench_orthograd.resnet50_shapes())
        assert len(shapes) == 161
        assert sum(map(math.prod, shapes)) == 25_557_032
        assert shapes[0] == (64, 3, 7, 7)
        assert shapes[-2:] == [(1000, 2048), (1000,)]

    @pytest.mark.parametrize("name", [c.name for c in bench_orthograd.CONTENDERS if c.name != "floor" and not c.slow])
    def test_orthograd(self, name: str) -> None:
        (workload,) = bench_orthograd.workloads("cpu", smoke=True)
        (contender,) = (c for c in workload.contenders if c.name == name)
        params, expected = (workload.make_inputs(torch.Generator().manual_seed(0)) for _ in range(2))
        bench_orthograd.released_(*bench_orthograd.split(expected))
        contender.prepare(params)()
        for param, truth in zip(params, expected, strict=True):
            torch.testing.assert_close(param.grad, truth.grad, rtol=1e-5, atol=1e-8)

    def test_stablemax_formulas(self) -> None:
        logits, labels = torch.randn(16, 11, dtype=torch.float64), torch.arange(16) % 11
        expected = F.cross_entropy(logits.sign() * logits.abs().log1p(), labels)
        torch.testing.assert_close(bench_stablemax.formula_fp64(logits, labels), expected)
        fp32 = bench_stablemax.formula_fp32(logits, labels)
        torch.testing.assert_close(fp32, expected.float(), rtol=1e-5, atol=0)

    def test_training_step(self) -> None:
        """It goes down to the leaves, and leaves no gradient for the next call to add to."""
        x, y = torch.ones(3, requires_grad=True), torch.ones(3)
        seen: list[torch.Tensor] = []
        x.register_hook(seen.append)
        call = harness.step(lambda x, y: (2 * x * y).sum())((x, y))
        call()
        call()
        assert [grad.tolist() for grad in seen] == [[2.0] * 3] * 2
        assert x.grad is None

    @pytest.mark.parametrize("kind", ["", "continuous labels", "predictions near labels"])
    @pytest.mark.parametrize(("loss", "variant"), [("fused", "paper"), ("formula", "paper"), ("released", "agedb")])
    def test_conr(self, loss: str, variant: str, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(1000, 24, generator=generator)  # so many that every row has a positive
        labels = bench_conr.make_labels(kind, 1000, generator, "cpu")
        expected = lambda x, *labels: conr_loss(x, *labels, variant=variant)  # noqa: E731
        same_loss(getattr(bench_conr, loss), expected, features, *labels)

    def test_conr_formula_of_lonely_rows(self) -> None:
        features, targets, preds = torch.randn(5, 3), torch.tensor([0.0, 0.5, 50.0, 90.0, 90.5]), torch.zeros(5)
        same_loss(bench_conr.formula, conr_loss, features, targets, preds)

    @pytest.mark.parametrize("name", ["continuous labels", "predictions near labels"])
    def test_conr_labels(self, name: str) -> None:
        targets, preds = bench_conr.make_labels(name, 10_000, torch.Generator().manual_seed(0), "cpu")
        assert targets.mean() == pytest.approx(50, abs=2)
        assert targets.max() <= 100
        near = name == "predictions near labels"
        assert (targets == targets.round()).all().item() == near
        rms = (preds - targets).square().mean().sqrt().item()
        assert rms == pytest.approx(2 if near else 100 / math.sqrt(6), rel=0.05)  # of two uniform numbers

    def test_symmetric_floor_multiplies_all_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = []
        product = torch.mm

        def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            shapes.append((*a.shape, b.shape[1]))
            return product(a, b, out=out)

        monkeypatch.setattr(bench_conr, "FLOOR_ROWS", 40)
        monkeypatch.setattr(torch, "mm", mm)
        bench_conr.symmetric_products((torch.randn(100, 7, requires_grad=True),))()
        multiplied = sum(map(math.prod, shapes))
        assert multiplied == 2.5 * 100 * 100 * 7
        assert len(shapes) == 9

    @pytest.mark.parametrize("loss", ["fused", "formula", "library"])
    def test_supcon(self, loss: str) -> None:
        if loss == "library" and not bench_supcon.HAS_LIBRARY:
            pytest.skip("pytorch-metric-learning is not installed")
        same_loss(getattr(bench_supcon, loss), supcon_loss, torch.randn(90, 12), torch.arange(90) % 7)

    @pytest.mark.parametrize("loss", ["fused", "cross_entropy", "SupConLoss", "NTXentLoss"])
    def test_info_nce(self, loss: str) -> None:
        if loss.endswith("Loss") and not bench_info_nce.HAS_LIBRARY:
            pytest.skip("pytorch-metric-learning is not installed")
        one = bench_info_nce.library(loss) if loss.endswith("Loss") else getattr(bench_info_nce, loss)
        same_loss(one, info_nce, torch.randn(50, 12), torch.randn(50, 12), leaves=2)

    @pytest.mark.parametrize("loss", ["fused_symmetric", "clip"])
    def test_symmetric_info_nce(self, loss: str) -> None:
        expected = lambda query, key: info_nce(query, key, symmetric=True)  # noqa: E731
        same_loss(getattr(bench_info_nce, loss), expected, torch.randn(50, 12), torch.randn(50, 12), leaves=2)

    @pytest.mark.parametrize("workload", harness.discover("cpu", smoke=True), ids=str)
    def test_every_fast_contender_runs(self, workload: Workload) -> None:
        inputs = workload.make_inputs(torch.Generator().manual_seed(0))
        for contender in workload.contenders:
            if not contender.slow:
                contender.prepare(inputs)()


class TestSinkhorn:
    """Contenders solve the same problem: at convergence, in float64, they agree to the error that is left."""

    CONVERGED = 400  # iterations, each of which leaves less than nine tenths of the error

    @pytest.mark.parametrize("batch", [(), (3,)])
    def test_loops_have_our_value(self, batch: tuple[int, ...]) -> None:
        cost = torch.rand(*batch, 9, 7, dtype=torch.float64)
        expected = bench_sinkhorn.fused(cost, 0.1, self.CONVERGED)
        torch.testing.assert_close(bench_sinkhorn.loop(cost, 0.1, self.CONVERGED), expected, rtol=1e-9, atol=0)

    @pytest.mark.skipif(not bench_sinkhorn.HAS_POT, reason="POT is not installed")
    @pytest.mark.parametrize("batch", [(), (3,)])
    @pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "batch"])
    def test_pot_has_our_cost(self, method: str, batch: tuple[int, ...]) -> None:
        cost = torch.rand(*batch, 9, 7, dtype=torch.float64)
        with bench_sinkhorn.unconverged():
            transport = pyreg.functional.sinkhorn(cost, epsilon=0.1, max_iter=self.CONVERGED, tol=0)
        if method == "batch":
            found = bench_sinkhorn.pot_batch(cost.reshape(-1, 9, 7), 0.1, self.CONVERGED)
        else:
            found = bench_sinkhorn.pot(cost, 0.1, self.CONVERGED, method)
        torch.testing.assert_close(found.flatten(), transport.transport_cost().flatten(), rtol=1e-7, atol=0)

    @pytest.mark.parametrize("name", ["loop", "tensorized"])
    def test_point_contenders_have_our_gradients(self, name: str) -> None:
        if name == "tensorized" and not bench_sinkhorn.HAS_GEOMLOSS:
            pytest.skip("geomloss is not installed")
        x, y = (torch.rand(count, 3, dtype=torch.float64, requires_grad=True) for count in (12, 10))
        contenders = {
            "ours": bench_sinkhorn.fused_points,
            "loop": bench_sinkhorn.loop_points,
            "tensorized": lambda *problem: bench_sinkhorn.geomloss_points(*problem, backend="tensorized"),
        }
        # geomloss's epsilons fall until the end, and its potentials lag behind: the more steps, the less.
        is_late = name == "tensorized"
        iterations = 10 * self.CONVERGED if is_late else self.CONVERGED
        values = [contenders[which](x, y, 0.1, iterations) for which in ("ours", name)]
        accuracy = {"rtol": 1e-3, "atol": 1e-4} if is_late else {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(values[1], values[0], **accuracy)
        for found, expected in zip(*(torch.autograd.grad(value, (x, y)) for value in values[::-1]), strict=True):
            torch.testing.assert_close(found, expected, **accuracy)


class TestSinkhornDivergence:
    @pytest.mark.skipif(not bench_sinkhorn_divergence.HAS_GEOMLOSS, reason="geomloss is not installed")
    def test_geomloss_has_our_value_and_gradients(self) -> None:
        """Of the points' own diameter, with the epsilons that the floor counts, to two."""
        x, y = (torch.rand(count, 3, dtype=torch.float64, requires_grad=True) for count in (40, 50))
        ours = bench_sinkhorn_divergence.contenders(3, smoke=True)[0].prepare((x, y))()
        (theirs,) = (
            contender.prepare((x, y))()
            for contender in bench_sinkhorn_divergence.contenders(3, smoke=True)
            if contender.name == bench_sinkhorn_divergence.TENSORIZED
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    def test_the_other_way_finds_as_much(self) -> None:
        x, y = (torch.rand(count, 3, dtype=torch.float64) for count in (40, 50))
        loss = SamplesLoss(blur=bench_sinkhorn_divergence.BLUR, scaling=0.97)(x, y)
        exact = bench_sinkhorn_divergence.divergence(x, y)
        assert exact.item() == pytest.approx(loss.item(), rel=5e-2)

    def test_iterations_of_a_gpu_run(self) -> None:
        """On the CPU, where they are not timed."""
        for workload in bench_sinkhorn_divergence.workloads("cuda", smoke=True):
            inputs = workload.make_inputs(torch.Generator().manual_seed(0))
            for contender in workload.contenders:
                contender.prepare(inputs)()

    def test_exponentials_take_time_by_their_number(self) -> None:
        def best_of(count: int) -> float:
            call = floor.exponentials(count)
            call()
            return min(timeit.repeat(call, number=1, repeat=5))

        assert best_of(1 << 26) > 4 * best_of(1 << 22)

"""The measuring side: what it reports is what was measured. Small inputs, seconds in all."""

from __future__ import annotations

import math
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
    floor,
    harness,
    memory,
    report,
    rows,
    scaling,
    sweep,
    targets,
)
from bench.harness import Contender, Workload
from pyreg.nn import SamplesLoss
from pyreg.reference.conr import conr_loss
from pyreg.reference.info_nce import info_nce
from pyreg.reference.supcon import supcon_loss
from tests.bench_rows import judge, measurement, target

pytestmark = pytest.mark.needs_compiler  # of the floors


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

    def test_a_slow_contender_takes_no_time_that_is_reserved_for_others(self) -> None:
        workload = tiny_workload(sleeper("other", 10, slow=True), sleeper("ours", 2e-3))
        other, ours = harness.run(workload, harness.Settings(seconds=0), end=time.monotonic() + 1000, reserved=1000)
        assert other.error == "left out: slow, and the time was needed for others"
        assert ours.seconds

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

    def test_a_module_is_imported_before_the_first_call(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "takes_long.py").write_text("import time; time.sleep(0.2)")
        monkeypatch.syspath_prepend(tmp_path)
        importing = Contender("other", lambda inputs: lambda: __import__("takes_long"), imports="takes_long")
        (result,) = harness.run(tiny_workload(importing), harness.Settings(seconds=0.01, only_call_seconds=0.1))
        assert max(result.seconds) < 0.1

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
            if contender.imports:
                pytest.importorskip(contender.imports)
            contender.prepare(inputs)()

    def test_those_of_a_gpu_can_be_made(self) -> None:
        found = sweep.discover("cuda")
        assert len(found) >= 7
        assert {one.make(one.sizes[0]).device for one in found} == {"cuda"}

    def test_every_operator_has_one(self) -> None:
        assert {one.operator for one in sweep.discover("cpu")} == {w.operator for w in harness.discover("cpu")}
        assert {one.operator for one in sweep.discover("cpu", ["stablemax"])} == {
            "linear_stablemax_cross_entropy",
            "stablemax_cross_entropy",
        }


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


@pytest.mark.parametrize(
    ("size", "settling"), [(2 * harness.RETURNED_BYTES, 0.3), (2 * harness.RETURNED_BYTES, 0.0), (64, 0.3)]
)
def test_fresh_memory_settles_before_a_sample(size: int, settling: float) -> None:
    """Calls that are not timed, for as long as is asked; where there is little memory, none."""
    calls = []

    def prepare(_: object) -> Callable[[], object]:
        def call() -> None:
            calls.append(len(torch.ones(size, dtype=torch.uint8)))

        return call

    workload = Workload("one", "size", "uint8", "cpu", lambda _: (torch.zeros(1),), [Contender("ours", prepare)])
    settings = harness.Settings(seconds=0.1, settling_seconds=settling)
    runner = harness.Runner(workload, workload.contenders[0], [(torch.zeros(1),)], settings)
    runner.warm_up()
    calls.clear()
    begin = time.monotonic()
    runner.take_sample()
    if settling > 0 and size > harness.RETURNED_BYTES:
        assert time.monotonic() - begin >= settling
        assert len(calls) > 1
    else:
        assert len(calls) == runner.calls_per_sample == 1


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
            return min(timeit.repeat(call, timer=time.process_time, number=1, repeat=20))  # whoever shares the cores

        assert best_of(1 << 26) > 4 * best_of(1 << 22)

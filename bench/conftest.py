"""`pytest bench/` runs the workloads of every bench file under pytest-benchmark, one group a workload.

With `--benchmark-disable` each contender runs once on small inputs: a check, in seconds, that the bench files work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import harness

_inputs: dict[str, list[Any]] = {}  # of one workload: the largest are gigabytes


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    harness.set_up_process()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" not in metafunc.fixturenames:
        return
    smoke = metafunc.config.getoption("benchmark_disable")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [(w, c) for w in metafunc.module.workloads(device, smoke) for c in w.contenders]
    ids = [f"{workload.name}-{workload.dtype}-{contender.name}" for workload, contender in cases]
    metafunc.parametrize("workload, contender", cases, ids=ids)


@pytest.fixture
def measure(benchmark: Any, workload: harness.Workload, contender: harness.Contender) -> Callable[[], None]:
    """The call of a contender under pytest-benchmark, as often as the interleaved runner would make it."""
    if str(workload) not in _inputs:
        _inputs.clear()
        torch.compiler.reset()
        _inputs[str(workload)] = harness.input_sets(workload)
    inputs = _inputs[str(workload)]
    benchmark.group = str(workload)

    def run() -> None:
        runner = harness.Runner(workload, contender, inputs, harness.FULL)
        if benchmark.disabled:
            benchmark(lambda: _finish(runner.prepare(1)[0], workload.device))
            return
        runner.warm_up()
        runner.plan(harness.FULL.seconds)
        if runner.result.error is not None:
            pytest.fail(runner.result.error)
        benchmark.extra_info["peak_bytes"] = runner.result.peak_bytes
        if contender.consumes_inputs:
            prepare: Callable[[], Any] = lambda: ((runner.prepare(1)[0], workload.device), {})  # noqa: E731
            benchmark.pedantic(_finish, setup=prepare, rounds=runner.samples_left)
            return
        calls = itertools.cycle(runner.prepare(len(inputs)))
        benchmark.pedantic(
            lambda: _finish(next(calls), workload.device),
            rounds=runner.samples_left,
            iterations=runner.calls_per_sample,
        )

    return run


def _finish(call: harness.Call, device: str) -> None:
    call()
    if device == "cuda":
        torch.cuda.synchronize()

"""Many threads, forked and spawned workers, other numbers of threads: results have the bits that they have alone."""

from __future__ import annotations

import faulthandler
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.calls import CALLS, WITH_PRODUCTS, WITHOUT_GRAPH, Computed

THREADS = 8
TIMEOUT = 120.0  # seconds, for what takes a few: a deadlock, not a slow machine


@pytest.fixture(autouse=True)
def _number_of_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def at_once(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return that each have a thread, and begin together."""
    barrier = threading.Barrier(len(tasks))
    results: list[Any] = [None] * len(tasks)

    def run(index: int) -> None:
        try:
            barrier.wait(TIMEOUT)
            results[index] = tasks[index]()
        except BaseException as error:
            results[index] = error

    # Daemons: those that hang are not to keep the tests from ending.
    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    hanging = [index for index, thread in enumerate(threads) if thread.is_alive()]
    if hanging:
        faulthandler.dump_traceback()
        pytest.fail(f"threads {hanging} of {len(tasks)} have not ended within {TIMEOUT:g} s; their stacks are above")
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one, other), f"{what}: tensor {index} differs by {(one - other).abs().max().item():.2e}"


@pytest.mark.not_emulated
@pytest.mark.parametrize("name", CALLS)
def test_called_from_many_threads_at_once(device: torch.device, name: str) -> None:
    """One half of the threads call the operator and go backward; the others go backward on graphs that the main thread
    has built, and build graphs for it."""
    call = CALLS[name]
    expected = [call(seed, device).with_gradients() for seed in range(THREADS)]
    assert not torch.equal(expected[0][0], expected[1][0]) or name == "collapse_rate"
    graphs = {seed: call(seed, device) for seed in range(1, THREADS, 2)}

    def task(seed: int) -> tuple[list[Tensor], Computed | None]:
        if seed not in graphs:
            return call(seed, device).with_gradients(), None
        return graphs[seed].with_gradients(), call(seed, device)

    for seed, (found, built) in enumerate(at_once([lambda seed=seed: task(seed) for seed in range(THREADS)])):
        assert_same(found, expected[seed], f"seed {seed}, backward in a thread")
        if built is not None:
            assert_same(built.with_gradients(), expected[seed], f"seed {seed}, forward alone in a thread")


@pytest.mark.not_emulated
@pytest.mark.parametrize("name", sorted(set(CALLS) - WITHOUT_GRAPH))
def test_one_graph_from_many_threads_at_once(device: torch.device, name: str) -> None:
    """What the first backward pass may take of a graph, one of them takes; the others have its bits all the same."""
    graph = CALLS[name](0, device)
    expected = CALLS[name](0, device).with_gradients()
    for found in at_once([lambda: graph.with_gradients(retain_graph=True)] * THREADS):
        assert_same(found, expected, "a thread")


def test_numbers_of_threads_change_between_calls() -> None:
    """Every thread goes through all operators in an order of its own and has another number of threads for each; the
    main thread changes it too, which is that of threads to come and that of MKL."""
    expected = {name: call(0).with_gradients() for name, call in CALLS.items()}

    def task(seed: int) -> None:
        generator = random.Random(seed)
        for name in generator.sample(sorted(CALLS), len(CALLS)):
            torch.set_num_threads(generator.randint(1, 3))
            built = CALLS[name](0)
            torch.set_num_threads(generator.randint(1, 3))
            actual = built.with_gradients()
            if name not in WITH_PRODUCTS:
                assert_same(actual, expected[name], name)
                continue
            for one, other in zip(actual, expected[name], strict=True):
                # Some hundred terms of a product, in another order.
                error = (one - other).norm() / other.norm()
                assert error <= 100 * 2.0**-24, f"{name}: relative error {error:.2e}"

    at_once([lambda seed=seed: task(seed) for seed in range(4)])


class Results(Dataset[list[Tensor]]):
    """Item i: results and gradients of all operators for the seed i."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, seed: int) -> list[Tensor]:
        assert torch.get_num_threads() == 1
        assert torch.utils.data.get_worker_info() is not None
        return [tensor for call in CALLS.values() for tensor in call(seed).with_gradients()]


def alone(seed: int) -> list[Tensor]:
    """What an item should be: a worker has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = [tensor for call in CALLS.values() for tensor in call(seed).with_gradients()]
    torch.set_num_threads(threads)
    return results


def items(start_method: str, workers: int) -> list[list[Tensor]]:
    return list(
        DataLoader(
            Results(), batch_size=None, num_workers=workers, timeout=TIMEOUT, multiprocessing_context=start_method
        )
    )


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_in_workers(start_method: str) -> None:
    """Of a process whose threads have worked, which a forked worker has not."""
    expected = [alone(seed) for seed in range(2)]
    for call in CALLS.values():
        call(0).with_gradients()
    for seed, item in enumerate(items(start_method, workers=2 if start_method == "fork" else 1)):
        assert_same(item, expected[seed], f"seed {seed}")


def in_a_fresh_process() -> None:
    """Workers are forked before any kernel has run; then the process has seen all there is."""
    first = items("fork", workers=2)
    for seed, item in enumerate(first):
        assert_same(item, alone(seed), f"seed {seed}")
    at_once([lambda name=name: CALLS[name](0).with_gradients() for name in CALLS])
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    runtimes = sorted(
        path for path in libraries if Path(path).name.startswith(("libgomp", "libomp", "libiomp", "libkmp"))
    )
    assert len(runtimes) == 1, f"OpenMP runtimes in the process: {runtimes}"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc/self/maps")
def test_forked_before_any_kernel_and_one_openmp_runtime() -> None:
    command = [sys.executable, "-c", "from tests.test_threads import in_a_fresh_process; in_a_fresh_process()"]
    root = Path(__file__).parent.parent
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

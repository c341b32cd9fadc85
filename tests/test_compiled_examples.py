"""The training steps of the examples, their forward pass and loss compiled as one graph: they train as they do in
eager mode, and are compiled once, or once more for the last batch of an epoch, which is smaller."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.test_examples import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compiled_as_eager(
    monkeypatch: pytest.MonkeyPatch, example: ModuleType, train: Callable[[], Any]
) -> tuple[Any, Any, int]:
    """What training gives with the example's objective as it is, and compiled, and how often it was compiled."""
    eager, counter = train(), CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(example, "objective", torch.compile(example.objective, fullgraph=True, backend=counter))
    return eager, train(), counter.frame_count


@pytest.mark.needs_compiler
@pytest.mark.parametrize("number", [1, 3], ids=["cross-entropy", "StableMax"])
def test_grokking(number: int) -> None:
    """By inductor, with OrthoGrad as it is."""
    grokking = load("grokking")
    data = grokking.modular_addition(0, "cpu")
    eager, compiled = (grokking.make_runs(0, "cpu")[number] for _ in range(2))
    counter = CompileCounterWithBackend("inductor")
    compiled.loss = torch.compile(compiled.loss, fullgraph=True, backend=counter)
    for run in (eager, compiled):
        for _ in range(5):
            run.step(data)
    assert eager.formulas == "pyreg"
    assert eager.losses[-1] < eager.losses[0]
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-5, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_compander(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    example = load("compander")
    prepare = functools.partial(example.fixed, a=0.5, b=0.5) if kind == "fixed" else example.learned
    data = example.digits(0, "cpu")
    train = functools.partial(example.train, prepare, data, 0, 2)
    eager, compiled, compilations = compiled_as_eager(monkeypatch, example, train)
    assert len(eager.losses) == 10
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(compiled.weights, eager.weights, rtol=1e-3, atol=1e-4)
    assert compilations == 2


def test_imbalanced_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("imbalanced_regression")
    train = functools.partial(example.train, example.DIABETES, example.ConR(0.1, 0.1, 2.0), 0, 2, "cpu")
    eager, compiled, compilations = compiled_as_eager(monkeypatch, example, train)
    torch.testing.assert_close(compiled.errors, eager.errors, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(compiled.features, eager.features, rtol=1e-3, atol=1e-4)
    assert compilations == 2


def test_monge_map(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("monge_map")
    problem = example.gaussians(seed=0, dimension=2)
    train = functools.partial(example.train, problem, 0, 1.0, problem.epsilon(0.1), 4)
    eager, compiled, compilations = compiled_as_eager(monkeypatch, example, train)
    torch.testing.assert_close(compiled(problem.test.x), eager(problem.test.x), rtol=1e-4, atol=1e-4)
    assert compilations == 1


def test_imbalanced_clustering(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    """InfoNCE of views, then pseudo-labels, which the objective finds in a closure. Adam moves a weight by its rate
    however small the gradient, which in float32 may be of either sign."""
    example = load("imbalanced_clustering")
    samples = example.long_tailed(seed=0, ratio=15, device="cpu")
    samples = dataclasses.replace(samples, x=samples.x.double())
    with monkeypatch.context() as patch:
        pretrain = functools.partial(example.pretrain, samples, 0, 2)
        eager, compiled, compilations = compiled_as_eager(patch, example, pretrain)
        for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        assert compilations == 2
    torch.compiler.reset()  # torch 2.10 remembers that batches differ in size

    def self_label() -> Any:
        model = example.Clusterer()
        model.load_state_dict(eager.state_dict())
        return example.self_label(model, samples, 0, 2, example.partial(2, example.SEMANTIC_WEIGHT))

    eager_run, compiled_run, compilations = compiled_as_eager(monkeypatch, example, self_label)
    assert compiled_run.history == eager_run.history
    assert compilations == 2

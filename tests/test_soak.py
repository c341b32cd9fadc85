"""The long trainings of tests/soak, made short, and that they would find what they look for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from tests.soak import __main__ as program
from tests.soak import run
from tests.soak.families import FAMILIES, StableMax
from tests.soak.run import LIMITS, soak

# In a short training pages count that are touched for the first time; bytes tell what leaks.
SHORT_LIMITS = replace(LIMITS, resident=16 << 20)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_stays_and_results_keep_to_the_definition(family: str) -> None:
    outcome = soak(family, steps=300, checks=6)
    assert outcome.failures(SHORT_LIMITS) == []
    for half in outcome.halves:  # float32's: neither nothing nor all
        assert 1e-9 < half.worst()[0] < 1e-3


class Keeping(StableMax):
    def loss(self, *operands: Tensor) -> Tensor:
        loss = super().loss(*operands)
        KEPT.append(loss)  # with its graph
        return loss


class Drifting(StableMax):
    """A state that grows by a roundoff a step."""

    factor = 1.0

    def loss(self, *operands: Tensor) -> Tensor:
        self.factor += 2.0**-24
        return self.factor * super().loss(*operands)


KEPT: list[Tensor] = []


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.FAMILIES, "keeping", Keeping)
    failures = "\n".join(soak("keeping", steps=100, checks=2).failures(SHORT_LIMITS))
    KEPT.clear()
    for what in ("allocated", "tensors", "graphs"):
        assert f"keeping: {what} has grown by" in failures


def test_a_drift_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.FAMILIES, "drifting", Drifting)
    failures = soak("drifting", steps=100, checks=10).failures(SHORT_LIMITS)
    assert any("drifting: error" in failure and "second half" in failure for failure in failures)


def test_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(program, "CHECKS", 5)
    assert program.main(["--steps", "50", "supcon", "info_nce"]) == 0
    shown = capsys.readouterr().out
    assert "50/50" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("│")] == ["supcon", "info_nce"]
    monkeypatch.setitem(run.FAMILIES, "drifting", Drifting)
    assert program.main(["--steps", "200", "drifting"]) == 1
    assert "drifting: error" in capsys.readouterr().out
    for arguments, message in ((["--steps", "9"], "--steps should be at least 10, got 9"), (["x"], "unknown: x")):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert message in capsys.readouterr().err

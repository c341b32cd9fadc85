"""The examples run as functions, for a few epochs: they train, and they leave what they say they leave."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grokking() -> ModuleType:
    return load("grokking")


@pytest.fixture(scope="module")
def plot(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("grokking") / "plot.png"


@pytest.fixture(scope="module")
def runs(grokking, plot) -> list:
    return grokking.main(["--epochs", "12", "--output", str(plot)])


class TestGrokking:
    def test_data_are_all_pairs_once(self, grokking) -> None:
        data = grokking.modular_addition(seed=0, device="cpu")
        assert (len(data.train_x), len(data.test_x)) == (5107, 7662)
        pairs = set()
        for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
            a, b = x[:, :113].argmax(1), x[:, 113:].argmax(1)
            assert x.sum().item() == 2 * len(x)
            assert ((a + b) % 113).equal(y)
            pairs |= set(zip(a.tolist(), b.tolist(), strict=True))
        assert len(pairs) == 113**2

    def test_every_run_learns(self, runs) -> None:
        assert len(runs) == 5
        for run in runs:
            assert len(run.losses) == 12
            assert run.losses[-1] < run.losses[0]
            assert run.epochs == [5, 10, 12]
            assert len(run.train_accuracy) == len(run.test_accuracy) == 3
            assert run.train_accuracy[-1] > 2 / 113  # twice chance
            assert run.seconds > 0

    def test_fused_and_plain_formulas_train_alike(self, runs) -> None:
        """They differ by rounding, which training amplifies: 1 % of the loss is ample for 12 epochs."""
        for fused, plain in ((runs[1], runs[2]), (runs[3], runs[4])):
            assert (fused.name, fused.formulas, plain.formulas) == (plain.name, "pyreg", "plain")
            assert fused.losses == pytest.approx(plain.losses, rel=1e-2)

    def test_orthograd_is_at_work(self, runs) -> None:
        assert runs[1].losses[-1] > 1.01 * runs[0].losses[-1]

    def test_plot_shows_every_run(self, runs, plot, grokking) -> None:
        pixels = image.imread(plot)[..., :3]
        assert pixels.shape[:2] == (690, 1500)
        for color in ("#d55e00", "#0072b2", "#009e73"):
            rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100

    def test_grokked_at_is_the_first_epoch_above(self, grokking) -> None:
        run = grokking.make_runs(seed=0, device="cpu")[0]
        run.epochs, run.test_accuracy = [5, 10, 15, 20], [0.1, 0.95, 0.9, 0.99]
        assert run.grokked_at() == 10
        run.test_accuracy = [0.1, 0.2, 0.3, 0.4]
        assert run.grokked_at() is None

    def test_epochs_are_checked(self, grokking, capsys) -> None:
        with pytest.raises(SystemExit):
            grokking.main(["--epochs", "0"])
        assert "--epochs should be at least 1, got 0" in capsys.readouterr().err

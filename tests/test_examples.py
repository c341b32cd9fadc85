"""The examples run as functions, for a few epochs: they train, and they leave what they say they leave."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import image
from rich.console import Console
from sklearn.datasets import load_diabetes, load_digits

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
def compander() -> ModuleType:
    return load("compander")


@pytest.fixture(scope="module")
def regression() -> ModuleType:
    return load("imbalanced_regression")


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


@pytest.fixture(scope="module")
def histograms(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compander") / "plot.png"


@pytest.fixture(scope="module")
def methods(compander, histograms) -> list:
    return compander.main(["--epochs", "4", "--seeds", "2", "--a", "0.5", "--b", "0.75", "--output", str(histograms)])


class TestCompander:
    def test_data_are_all_digits_once(self, compander) -> None:
        data = compander.digits(seed=0, device="cpu")
        parts = (data.train, data.validation, data.test)
        assert [len(part.x) for part in parts] == [269, 270, 1258]
        images = torch.cat([part.x for part in parts])
        assert images.shape == (1797, 1, 8, 8)
        assert (images.min(), images.max()) == (0, 1)
        source = load_digits()
        keys = lambda x, y: sorted(zip(map(tuple, x), y, strict=True))  # noqa: E731
        labels = torch.cat([part.y for part in parts]).tolist()
        assert keys((16 * images).flatten(1).tolist(), labels) == keys(source.data.tolist(), source.target.tolist())
        other = compander.digits(seed=1, device="cpu")
        assert not torch.equal(other.train.x, data.train.x)

    def test_every_method_learns_from_the_same_start(self, methods) -> None:
        """Companding leaves the function as it is: the first loss is that of the plain network, to rounding."""
        assert [method.name for method in methods] == ["plain", "fixed (0.5, 0.75)", "learned (a, b)"]
        for seed in range(2):
            runs = [method.runs[seed] for method in methods]
            assert [run.losses[0] for run in runs] == pytest.approx([runs[0].losses[0]] * 3, rel=1e-4)
            assert len({run.losses[-1] for run in runs}) == 3
            for run in runs:
                assert len(run.losses) == 4 * 5  # 269 images in batches of 64
                assert run.losses[-1] < 0.5 * run.losses[0]
                assert min(run.test_accuracy, run.validation_accuracy) > 0.5  # chance is 0.1
                assert len(run.weights) == 9 * (32 + 32 * 32 + 32 * 64) + 2560

    def test_weights_are_companded(self, methods, compander) -> None:
        _, fixed, learned = methods
        for run in fixed.runs:
            assert compander.largest(run) < 0.5 * torch.pi / 2
        model = compander.network(seed=0, device="cpu")
        optimizers = learned.prepare(model)
        assert [type(optimizer).__name__ for optimizer in optimizers] == ["CompandedOptimizer", "SGD"]
        assert len(optimizers[1].param_groups[0]["params"]) == 2 * 4
        assert compander.near_zero(compander.Run(weights=torch.tensor([0.0, 0.005, -0.02, 1.0]))) == 0.5

    def test_grid_takes_the_best_on_validation_images(self, compander, monkeypatch) -> None:
        scores = {0.5: 0.9, 0.75: 0.95, 1.0: 0.9}

        def train(prepare, *args) -> object:
            return compander.Run(validation_accuracy=scores[prepare.keywords["a"]], test_accuracy=prepare.keywords["b"])

        monkeypatch.setattr(compander, "train", train)
        grid = [(a, b) for a in scores for b in (0.5, 1.0)]
        assert compander.search(1, 2, "cpu", grid, Console()) == (0.75, 0.5)

    def test_quick_runs_the_grid_too(self, compander, tmp_path, capsys) -> None:
        methods = compander.main(["--quick", "--output", str(tmp_path / "plot.png")])
        assert all(len(method.runs) == 2 for method in methods)
        assert "grid of fixed (a, b)" in capsys.readouterr().out

    def test_plot_shows_every_method(self, methods, histograms) -> None:
        pixels = image.imread(histograms)[..., :3]
        assert pixels.shape[:2] == (660, 1800)
        for method in methods:
            rgb = [int(method.color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--epochs", "0"], "--epochs should be at least 1, got 0"),
            (["--seeds", "0"], "--seeds should be at least 1, got 0"),
            (["--a", "1"], "--a and --b belong together"),
        ],
    )
    def test_arguments_are_checked(self, compander, capsys, arguments, message) -> None:
        with pytest.raises(SystemExit):
            compander.main(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("imbalanced_regression") / "plot.png"


@pytest.fixture(scope="module")
def compared(regression, picture) -> dict:
    return regression.main(["--quick", "--output", str(picture)])


class TestImbalancedRegression:
    @pytest.mark.parametrize(("name", "sizes"), [("diabetes", (209, 68, 68)), ("digits", (898, 299, 600))])
    def test_training_labels_are_imbalanced_and_the_others_balanced(self, regression, name, sizes) -> None:
        task = regression.TASKS[name]
        data = task.data(seed=0, device="cpu")
        parts = (data.train, data.validation, data.test)
        assert tuple(len(part.y) for part in parts) == sizes
        train, validation, test = (task.bins(part.y).bincount(minlength=20) for part in parts)
        assert train.max() >= 2.5 * train.float().mean()
        assert (train < train.sum() / 80).sum() >= 4  # few-shot bins
        for held_out in (validation, test):
            assert held_out.max() <= 2 * held_out.float().mean()
        assert not torch.equal(task.data(seed=1, device="cpu").train.y, data.train.y)

    def test_no_patient_is_in_two_parts(self, regression) -> None:
        data = regression.TASKS["diabetes"].data(seed=0, device="cpu")
        source = load_diabetes()
        known = set(map(tuple, torch.tensor(source.data / source.data.std(0, ddof=1)).round(decimals=4).tolist()))
        seen = [tuple(row) for part in vars(data).values() for row in part.x.double().round(decimals=4).tolist()]
        assert len(seen) == len(set(seen)) == 209 + 2 * 68
        assert set(seen) <= known

    def test_digits_are_turned_by_their_label(self, regression) -> None:
        images = torch.zeros(3, 1, 8, 8)
        images[:, 0, 2:6, 6:] = 1
        images[:, 0, 3:5, :2] = 0.5
        turned = regression.rotated(images, torch.tensor([0.0, 90.0, 180.0]))
        for times, one in enumerate(turned[:, 0]):
            torch.testing.assert_close(one, images[0, 0].rot90(times), atol=1e-5, rtol=0)

    def test_every_method_runs_every_seed_and_task(self, compared) -> None:
        assert list(compared) == ["diabetes", "digits"]
        for name, methods in compared.items():
            assert [method.name for method in methods] == ["without", "with ConR"]
            assert methods[0].conr is None
            for without, conr in zip(*(method.runs for method in methods), strict=True):
                assert torch.equal(without.labels, conr.labels)
                assert (without.labels.diff() >= 0).all()
                assert not torch.equal(without.errors, conr.errors)
                assert conr.similarity().shape == (len(conr.labels),) * 2
                assert conr.error() < {"diabetes": 100, "digits": 30}[name]  # before training: 107 and 33
            assert len(methods[0].runs) == len(methods[1].runs) == 2

    def test_errors_by_kind(self, regression) -> None:
        errors = torch.tensor([1.0, 4.0, 16.0, 2.0])
        run = regression.Run(
            validation_error=0.0,
            labels=torch.tensor([0.0, 2.5, 7.5, 100.0]),
            errors=errors,
            features=torch.ones(4, 64),
            density=torch.ones(20, dtype=torch.int64),
            shots=torch.tensor([0, 1, 1, 2]),
        )
        assert [run.error(shot) for shot in (None, "many", "medium", "few")] == [5.75, 1.0, 10.0, 2.0]
        assert run.geometric_mean_error() == pytest.approx(128 ** (1 / 4), rel=1e-6)
        of_bins = regression.bin_errors(regression.TASKS["digits"], run)
        assert of_bins[[0, 1, 19]].tolist() == [2.5, 16.0, 2.0]
        assert of_bins[2:19].isnan().all()

    def test_kinds_count_training_samples_of_like_labels(self, regression, compared) -> None:
        run = compared["digits"][0].runs[0]
        assert run.density.sum() == 898
        counts = run.density[regression.TASKS["digits"].bins(run.labels)]
        average = 898 / 20
        assert counts[run.shots == 0].min() > average
        assert average >= counts[run.shots == 1].max()
        assert counts[run.shots == 1].min() >= average / 4 > counts[run.shots == 2].max()

    def test_grid_takes_the_least_error_on_validation_samples(self, regression, monkeypatch) -> None:
        grid = [regression.ConR(window, 0.1, weight) for window in (0.05, 0.1, 0.2) for weight in (1.0, 2.0)]

        class Trained:
            def __init__(self, conr) -> None:
                self.validation_error = abs(conr.window - 0.1) + conr.weight

        monkeypatch.setattr(regression, "train", lambda task, conr, *rest: Trained(conr))
        task = regression.TASKS["digits"]
        best = regression.search(task, 1, 2, "cpu", grid, Console())
        assert best == (0.1, 0.1, 1.0)
        assert regression.describe(task, best) == "window 10, temperature 0.1, weight 1"

    def test_plot_shows_both_methods(self, compared, picture) -> None:
        pixels = image.imread(picture)[..., :3]
        assert pixels.shape[:2] == (1008, 1560)
        for method in compared["digits"]:
            rgb = [int(method.color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100

    @pytest.mark.parametrize("name", ["epochs", "seeds"])
    def test_arguments_are_checked(self, regression, capsys, name) -> None:
        with pytest.raises(SystemExit):
            regression.main([f"--{name}", "0"])
        assert f"--{name} should be at least 1, got 0" in capsys.readouterr().err

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
def monge_map() -> ModuleType:
    return load("monge_map")


@pytest.fixture(scope="module")
def clustering() -> ModuleType:
    return load("imbalanced_clustering")


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


@pytest.fixture(scope="module")
def arrows(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("monge_map") / "plot.png"


@pytest.fixture(scope="module")
def mapped(monge_map, arrows) -> dict:
    return monge_map.main(["--quick", "--output", str(arrows)])


class TestMongeMap:
    @pytest.mark.parametrize("dimension", [2, 8])
    def test_optimal_map_of_gaussians(self, monge_map, dimension) -> None:
        """The one linear map with a symmetric positive definite matrix that takes one covariance to the other."""
        generator = torch.Generator().manual_seed(0)
        source, target = (monge_map.random_gaussian(dimension, 2.0, generator) for _ in range(2))
        transport = monge_map.optimal_map(source, target)
        torch.testing.assert_close(transport(source.mean), target.mean)
        linear = transport(torch.eye(dimension)) - transport(torch.zeros(dimension))
        torch.testing.assert_close(linear, linear.t(), atol=1e-5, rtol=1e-4)
        assert torch.linalg.eigvalsh(linear).min() > 0
        covariance = linear @ source.root @ source.root @ linear
        torch.testing.assert_close(covariance, target.root @ target.root, atol=1e-4, rtol=1e-3)

    def test_samples_are_of_their_gaussians(self, monge_map) -> None:
        problem = monge_map.gaussians(seed=0, dimension=2)
        carried = problem.truth(problem.train.x)
        for part in (problem.train, problem.test):
            assert part.x.shape == part.y.shape == (1000, 2)
            torch.testing.assert_close(part.y.mean(0), carried.mean(0), atol=0.3, rtol=0)
            torch.testing.assert_close(part.y.t().cov(), carried.t().cov(), atol=0.5, rtol=0)
        assert not torch.equal(problem.train.x, problem.test.x)

    def test_digits_are_halved(self, monge_map) -> None:
        problem = monge_map.digits(seed=0)
        counts = torch.tensor(load_digits().target).bincount()
        first, second = (len(problem.train.x) + len(problem.test.x), len(problem.train.y) + len(problem.test.y))
        assert {first, second} <= set(counts.tolist())
        parts = [points for part in (problem.train, problem.test) for points in (part.x, part.y)]
        rows = {tuple(row) for points in parts for row in points.tolist()}
        assert len(rows) == first + second
        assert {points.shape[1] for points in parts} == {8}
        both = torch.cat([problem.train.x, problem.train.y])
        torch.testing.assert_close(both.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
        covariance = both.t().cov()
        torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-4, rtol=0)
        assert (covariance.diag().diff() < 0).all()

    def test_measures_of_the_identity(self, monge_map) -> None:
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        problem = monge_map.Problem(monge_map.Samples(x, x), monge_map.Samples(x, x), truth=lambda points: points + 1)
        run = monge_map.measure(problem, lambda points: points, epsilon=1e-3)
        assert run.divergence == pytest.approx(0, abs=1e-4)
        assert run.cost == 0
        assert run.excess() == pytest.approx(0, abs=1e-4)  # a permutation, where epsilon is small
        assert run.unexplained == pytest.approx(100 * 2 / x.var(0).sum().item(), rel=1e-5)
        turned = monge_map.measure(problem, lambda points: -points, epsilon=1e-3)
        assert turned.excess() > 0.5 * turned.cost > 0.5

    def test_every_map_is_measured(self, mapped) -> None:
        learnt = ["divergence alone", "with Monge gap", "entropic map"]
        assert {name: [method.name for method in methods] for name, methods in mapped.items()} == {
            "gaussians-2": [*learnt, "true map"],
            "gaussians-8": [*learnt, "true map"],
            "digits": learnt,
        }
        for name, methods in mapped.items():
            assert all(len(method.runs) == 2 for method in methods)
            for alone, *others in zip(*(method.runs for method in methods), strict=True):
                assert all(torch.equal(alone.points[0], run.points[0]) for run in others)
                for run in (alone, *others):
                    assert 0 < run.divergence < {"gaussians-2": 0.5, "gaussians-8": 3, "digits": 5}[name]
                    assert run.excess() > 0
                    assert 1 < run.cost < 30

    def test_gap_brings_maps_nearer_to_the_optimal_one(self, mapped) -> None:
        for name in ("gaussians-2", "gaussians-8"):
            for alone, with_gap, entropic, true in zip(*(method.runs for method in mapped[name]), strict=True):
                assert with_gap.gap <= 1.02 * alone.gap
                assert with_gap.unexplained < alone.unexplained
                assert true.unexplained == 0
                assert 0 < entropic.unexplained < 25
                assert alone.unexplained < 50
        for alone, with_gap, _ in zip(*(method.runs for method in mapped["digits"]), strict=True):
            assert with_gap.gap <= 1.02 * alone.gap
            assert with_gap.unexplained is None

    def test_plot_shows_every_map(self, mapped, arrows) -> None:
        pixels = image.imread(arrows)[..., :3]
        assert pixels.shape[0] in (901, 902)  # matplotlib 3.10 and 3.11 round a tight box differently
        assert pixels.shape[1] == 1540
        for method in mapped["gaussians-2"]:
            rgb = [int(method.color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--steps", "0"], "--steps should be at least 1, got 0"),
            (["--seeds", "0"], "--seeds should be at least 1, got 0"),
            (["--weight", "-1"], "--weight should be above 0, got -1"),
            (["--epsilon", "0"], "--epsilon should be above 0, got 0"),
        ],
    )
    def test_arguments_are_checked(self, monge_map, capsys, arguments, message) -> None:
        with pytest.raises(SystemExit):
            monge_map.main(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def sizes_plot(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("imbalanced_clustering") / "plot.png"


@pytest.fixture(scope="module")
def clustered(clustering, sizes_plot) -> list:
    return clustering.main(["--quick", "--output", str(sizes_plot)])


class TestImbalancedClustering:
    def test_data_are_long_tailed(self, clustering) -> None:
        samples = clustering.long_tailed(seed=0, ratio=15, device="cpu")
        assert samples.sizes().tolist() == [170, 126, 93, 69, 51, 38, 28, 21, 15, 11]
        assert samples.x.shape == (622, 1, 8, 8)
        source = load_digits()
        digit_of = dict(zip(map(tuple, source.data), source.target, strict=True))
        digits = torch.tensor([digit_of[tuple(row)] for row in (16 * samples.x).flatten(1).tolist()])
        assert len({tuple(row) for row in samples.x.flatten(1).tolist()}) == 622
        pairs = set(zip(samples.y.tolist(), digits.tolist(), strict=True))
        assert len(pairs) == 10  # one digit a class
        other = clustering.long_tailed(seed=1, ratio=15, device="cpu")
        assert not torch.equal(samples.x, other.x)
        assert clustering.long_tailed(seed=0, ratio=1, device="cpu").sizes().tolist() == [170] * 10

    def test_views_are_of_their_image(self, clustering) -> None:
        torch.manual_seed(0)
        images = clustering.long_tailed(seed=0, ratio=15, device="cpu").x
        first, second = clustering.view(images), clustering.view(images)
        assert not torch.equal(first, second)
        distances = torch.cdist(first.flatten(1), images.flatten(1))
        farther = distances > distances.diag().unsqueeze(1)
        assert farther.float().mean() > 0.8  # by chance: 0.5

    def test_clusters_are_matched_with_classes(self, clustering) -> None:
        generator = torch.Generator().manual_seed(0)
        truth = torch.arange(10).repeat_interleave(20)
        clusters = torch.randperm(10, generator=generator)[truth]
        assert torch.equal(clustering.matched(clusters, truth), truth)
        clusters[:5] = clusters[-1]  # a quarter of class 0 goes to that of 9
        run = clustering.Run(truth, clustering.matched(clusters, truth))
        assert run.accuracies().tolist() == [0.75] + [1.0] * 9
        assert run.accuracy() == pytest.approx(195 / 200)
        assert [run.accuracy(kind) for kind in ("head", "medium", "tail")] == pytest.approx([2.75 / 3, 1, 1])
        assert run.sizes(run.clusters).tolist() == [15, *[20] * 8, 25]
        assert 0.9 < run.nmi() < 1

    def test_pseudo_labels(self, clustering) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(200, 10, generator=generator)
        features = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator), dim=1)
        equal = clustering.equal_sizes(logits, features)
        torch.testing.assert_close(equal.sum(0), torch.full((10,), 20.0), atol=0.25, rtol=0)
        torch.testing.assert_close(equal.sum(1), torch.ones(200), atol=0.25, rtol=0)
        plain, semantic = clustering.partial(2), clustering.partial(2, 0.5)
        totals = []
        for labelling in (plain, semantic):
            masses = [labelling(logits, features) for _ in range(3)]
            assert all(labels.sum(1).max() <= 1 + 1e-5 for labels in masses)
            totals.append([labels.sum().item() / 200 for labels in masses])
        ramp = [0.1 + 0.9 * torch.tensor(-5 * (1 - t) ** 2).exp().item() for t in (0.0, 0.5, 1.0)]
        assert totals[0] == pytest.approx(ramp, rel=1e-3)
        assert totals[1] == pytest.approx(ramp, rel=1e-3)
        assert not torch.equal(plain(logits, features), clustering.partial(2)(logits, features))

    def test_every_method_is_better_than_chance(self, clustered) -> None:
        names = ["k-means", "equal sizes", "progressive partial", "semantic partial"]
        assert [method.name for method in clustered] == names
        for method in clustered:
            assert len(method.runs) == 2
            for run in method.runs:
                assert 0.35 < run.accuracy() < 1  # all in one cluster: 170 / 622 = 0.27
                assert 0.35 < run.nmi() < 1
                assert len(run.clusters) == len(run.truth) == 622
                assert len(run.history) == (0 if method.labelling is None else 6)
                if run.history:
                    assert run.history[-1] == pytest.approx(run.accuracy())

    def test_partial_transport_lets_sizes_differ(self, clustered) -> None:
        _, equal, *partial = clustered
        for method in partial:
            for ours, theirs in zip(method.runs, equal.runs, strict=True):
                ours_spread, theirs_spread = (run.sizes(run.clusters).double().std() for run in (ours, theirs))
                assert ours_spread > 1.2 * theirs_spread

    def test_plot_shows_every_method(self, clustered, sizes_plot) -> None:
        pixels = image.imread(sizes_plot)[..., :3]
        assert pixels.shape[:2] == (552, 1680)
        for method in clustered:
            rgb = [int(method.color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--epochs", "0"], "--epochs should be at least 1, got 0"),
            (["--seeds", "0"], "--seeds should be at least 1, got 0"),
            (["--ratio", "0.5"], "--ratio should be from 1 to 170, got 0.5"),
        ],
    )
    def test_arguments_are_checked(self, clustering, capsys, arguments, message) -> None:
        with pytest.raises(SystemExit):
            clustering.main(arguments)
        assert message in capsys.readouterr().err

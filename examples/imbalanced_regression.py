"""ConR on imbalanced regression (arXiv 2309.06651): with and without, on two data sets that scikit-learn ships.

- diabetes: 442 patients and how far their disease got within a year, 25 to 346. Labels as they come in life: few, and
  so noisy that linear regression, trained on nine tenths of all, misses the others by 44 in the mean. Above 150 one in
  six stays in the training set.
- digits: 1797 handwritten digits of 8 x 8 pixels, each turned by an angle from 0 to 100 degrees, which the network has
  to tell. Images are enough for a balanced test set, labels exact, and what decides is that the features of far angles
  can be told apart. The training angles are dense around 30 degrees and rare beyond 60.

As deep imbalanced regression has it, training labels are imbalanced while validation and test labels are balanced, and
errors are told apart by how many training samples have labels like that of the test sample: of 20 bins of the label
range, "many" are those with more than the average, "few" those with less than a quarter of it.

A small network minimises the absolute error, of two noisy views of each sample as in the paper; with ConR, on the
features before its last layer, it minimises that plus a weight times ConR. Window, temperature and weight are chosen on
validation samples; without ConR there is nothing to choose. Both start from the same split and weights in each seed.

    python examples/imbalanced_regression.py [--data diabetes digits] [--epochs 40] [--seeds 8] [--device cpu]
                                             [--output examples/imbalanced_regression.png] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from pyreg.functional import conr_loss

BATCH = 64  # samples, in two views each
LEARNING_RATE = 3e-3
NOISE = 0.1  # of a view: standard deviation; inputs are of the order of one
BINS = 20
SHOTS = ("many", "medium", "few")
GRID_SEEDS = 2


class ConR(NamedTuple):
    window: float  # as a share of the label range
    temperature: float
    weight: float


GRID = [ConR(*values) for values in itertools.product((0.05, 0.1), (0.1, 0.3), (0.2, 2.0))]


# ---- data ----


@dataclass(frozen=True)
class Samples:
    x: Tensor  # [N, ...]
    y: Tensor  # [N]

    def take(self, rows: Tensor) -> Samples:
        return Samples(self.x[rows], self.y[rows])

    def to(self, device: str) -> Samples:
        return Samples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Data:
    train: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Task:
    name: str
    label: str
    lowest: float
    highest: float
    split: Callable[[torch.Generator], Data]
    layers: Callable[[], nn.Module]  # from inputs to features [N, 64]

    @property
    def label_range(self) -> float:
        return self.highest - self.lowest

    def bins(self, y: Tensor) -> Tensor:
        return ((y - self.lowest) / self.label_range * BINS).long().clamp(0, BINS - 1)

    def data(self, seed: int, device: str) -> Data:
        data = self.split(torch.Generator().manual_seed(seed))
        return Data(data.train.to(device), data.validation.to(device), data.test.to(device))


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Each of `images [N, 1, H, W]`, turned about its middle."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    maps = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    grid = F.affine_grid(F.pad(maps, (0, 1)), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def split_digits(generator: torch.Generator) -> Data:
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    images = images[torch.randperm(len(images), generator=generator)]
    train, validation = len(images) // 2, len(images) // 6
    degrees = 100 * torch.rand(len(images), generator=generator)
    density = torch.exp(-((torch.arange(100) - 30) ** 2) / (2 * 13**2)) + 0.01
    whole = torch.multinomial(density, train, replacement=True, generator=generator)
    degrees[:train] = whole + torch.rand(train, generator=generator)
    x = rotated(images, degrees)
    parts = (slice(0, train), slice(train, train + validation), slice(train + validation, None))
    return Data(*(Samples(x[part], degrees[part]) for part in parts))


def split_diabetes(generator: torch.Generator) -> Data:
    """Up to four samples of each bin to validate and to test; the rest, thinned, to train."""
    x, y = (torch.tensor(array, dtype=torch.float32) for array in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=generator)
    samples = Samples(x[order] / x.std(0), y[order])
    rows: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    bins = DIABETES.bins(samples.y)
    for one in range(BINS):
        members = (bins == one).nonzero().squeeze(1)
        held_out = min(4, len(members) // 3)
        rest = members[2 * held_out :]
        common = samples.y[rest] < 150
        rows[0].append(torch.cat([rest[common], rest[~common][::6]]))
        rows[1].append(members[:held_out])
        rows[2].append(members[held_out : 2 * held_out])
    return Data(*(samples.take(torch.cat(part)) for part in rows))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


DIGITS = Task("digits", "angle (degrees)", 0, 100, split_digits, convolutions)
DIABETES = Task("diabetes", "disease progression", 25, 346, split_diabetes, perceptron)
TASKS = {task.name: task for task in (DIABETES, DIGITS)}


# ---- training ----


class Regressor(nn.Module):
    def __init__(self, layers: nn.Module, y: Tensor) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(64, 1)
        self.mean, self.std = y.mean().item(), y.std().item()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 64] and predictions [N]."""
        features = self.layers(x)
        return features, self.mean + self.std * self.head(features).squeeze(1)


@dataclass
class Run:
    """One network, trained, and what it makes of the test samples, in the order of their labels."""

    validation_error: float
    labels: Tensor  # [N]
    errors: Tensor  # [N], absolute
    features: Tensor  # [N, 64]
    density: Tensor  # [BINS], training samples
    shots: Tensor  # [N], index into SHOTS

    def error(self, shot: str | None = None) -> float:
        """The mean absolute error, overall or of one kind."""
        of_kind = self.errors if shot is None else self.errors[self.shots == SHOTS.index(shot)]
        return of_kind.mean().item()

    def geometric_mean_error(self) -> float:
        return self.errors.clamp(min=1e-6).log().mean().exp().item()

    def similarity(self) -> Tensor:
        """The cosine of every two features, [N, N]."""
        z = F.normalize(self.features, dim=1)
        return z @ z.t()


def objective(model: Regressor, batch: Samples, conr: ConR | None, label_range: float) -> Tensor:
    features, preds = model(batch.x)
    loss = F.l1_loss(preds, batch.y) / model.std
    if conr is None:
        return loss
    window = conr.window * label_range
    return loss + conr.weight * conr_loss(
        features, batch.y, preds.detach(), window=window, temperature=conr.temperature
    )


def train(
    task: Task, conr: ConR | None, seed: int, epochs: int, device: str, on_epoch: Callable[[], None] = lambda: None
) -> Run:
    data = task.data(seed, device)
    torch.manual_seed(seed)
    model = Regressor(task.layers(), data.train.y).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train.y)).split(BATCH):
            batch = data.train.take(rows.repeat(2).to(device))
            noisy = Samples(batch.x + NOISE * torch.randn_like(batch.x), batch.y)
            loss = objective(model, noisy, conr, task.label_range)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        on_epoch()

    test = data.test.take(data.test.y.argsort())
    with torch.no_grad():
        validation_error = F.l1_loss(model(data.validation.x)[1], data.validation.y).item()
        features, preds = model(test.x)
    density = task.bins(data.train.y).bincount(minlength=BINS)
    average = density.sum() / BINS
    kinds = torch.where(density > average, 0, torch.where(density < average / 4, 2, 1))
    results = [test.y, (preds - test.y).abs(), features, density, kinds[task.bins(test.y)]]
    return Run(validation_error, *(result.cpu() for result in results))


@dataclass
class Method:
    """With or without ConR, and its run of every seed."""

    name: str
    color: str
    conr: ConR | None
    runs: list[Run] = field(default_factory=list)

    def values(self, of: Callable[[Run], float]) -> list[float]:
        return [of(run) for run in self.runs]


COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    TimeElapsedColumn(),
)  # fmt: skip


def search(task: Task, epochs: int, seeds: int, device: str, grid: Sequence[ConR], console: Console) -> ConR:
    """Window, temperature and weight with the least error on validation samples."""
    scores: dict[ConR, float] = {}
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task(f"{task.name}, grid", total=len(grid) * seeds * epochs, note="")
        advance = functools.partial(progress.advance, bar)
        for conr in grid:
            runs = [train(task, conr, seed, epochs, device, advance) for seed in range(seeds)]
            scores[conr] = statistics.mean(run.validation_error for run in runs)
            best = min(scores, key=scores.__getitem__)
            progress.update(bar, note=f"validation error {scores[best]:.2f}")
    return best


def describe(task: Task, conr: ConR) -> str:
    return f"window {conr.window * task.label_range:g}, temperature {conr.temperature:g}, weight {conr.weight:g}"


def compare(task: Task, conr: ConR, epochs: int, seeds: int, device: str, console: Console) -> list[Method]:
    """Trains both for every seed, in turns, with a progress bar for each."""
    methods = [Method("without", "#d55e00", None), Method("with ConR", "#0072b2", conr)]
    with Progress(*COLUMNS, console=console) as progress:
        bars = [progress.add_task(f"{task.name}, {method.name}", total=seeds * epochs, note="") for method in methods]
        for seed in range(seeds):
            for method, bar in zip(methods, bars, strict=True):
                advance = functools.partial(progress.advance, bar)
                method.runs.append(train(task, method.conr, seed, epochs, device, advance))
                progress.update(bar, note=f"test error {statistics.mean(method.values(Run.error)):.2f}")
    return methods


# ---- results ----


def table(results: dict[str, list[Method]], epochs: int) -> Table:
    seeds = len(next(iter(results.values()))[0].runs)
    result = Table(
        title=f"Mean absolute errors on balanced test samples, {seeds} seeds, {epochs} epochs",
        caption="± standard deviation over seeds. GM: geometric mean. vs without: seeds better / equal / worse.",
    )
    result.add_column("", no_wrap=True)
    for heading in ("overall", *SHOTS, "GM", "vs without"):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, methods in results.items():
        first = methods[0].values(Run.error)
        for method in methods:
            pairs = list(zip(method.values(Run.error), first, strict=True))
            signs = [sum(x < y for x, y in pairs), sum(x == y for x, y in pairs), sum(x > y for x, y in pairs)]
            result.add_row(
                f"{name}\n{method.name}",
                spread(method.values(Run.error)),
                *(spread(method.values(functools.partial(Run.error, shot=shot))) for shot in SHOTS),
                spread(method.values(Run.geometric_mean_error)),
                "" if method is methods[0] else " / ".join(map(str, signs)),
            )
        result.add_section()
    return result


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f}\n± {deviation:.2f}"


def plot(results: dict[str, list[Method]], path: Path) -> None:
    """A row a data set: error against label density, and the similarity of features without and with ConR."""
    figure = Figure(figsize=(13, 4.2 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 3, squeeze=False, width_ratios=(5, 3.5, 3.5))
    for (name, methods), (errors, *maps) in zip(results.items(), rows, strict=True):
        plot_errors(TASKS[name], methods, errors)
        for method, axis in zip(methods, maps, strict=True):
            image = axis.imshow(method.runs[0].similarity().numpy(), vmin=0, vmax=1, cmap="viridis")
            labels = method.runs[0].labels
            ticks = torch.linspace(0, len(labels) - 1, 6).long()
            for set_ticks in (axis.set_xticks, axis.set_yticks):
                set_ticks(ticks.tolist(), [f"{labels[tick]:.0f}" for tick in ticks])
            axis.set(title=f"Similarity of features {method.name}", xlabel=TASKS[name].label)
        figure.colorbar(image, ax=maps, label="cosine, test samples in order of label, seed 0")
    figure.savefig(path, dpi=120)


def plot_errors(task: Task, methods: Sequence[Method], axis: Axes) -> None:
    edges = torch.linspace(task.lowest, task.highest, BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    density = torch.stack([run.density for run in methods[0].runs]).float().mean(0)
    counts = axis.twinx()
    counts.stairs(density.tolist(), edges.tolist(), fill=True, color="0.88")
    counts.set_ylabel("training samples (grey)")
    axis.set_zorder(counts.get_zorder() + 1)
    axis.patch.set_visible(False)
    for method in methods:
        of_bins = torch.stack([bin_errors(task, run) for run in method.runs])  # [seeds, BINS]
        mean, deviation = of_bins.mean(0), of_bins.std(0, correction=0)
        axis.plot(middles, mean, "o-", markersize=4, color=method.color, label=method.name)
        axis.fill_between(middles, mean - deviation, mean + deviation, color=method.color, alpha=0.15, linewidth=0)
    axis.set(title=f"{task.name}, {len(methods[0].runs)} seeds", xlabel=task.label, ylabel="mean absolute error")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def bin_errors(task: Task, run: Run) -> Tensor:
    """The mean absolute error in each bin; NaN where no test sample is."""
    bins = task.bins(run.labels)
    return torch.zeros(BINS).index_add(0, bins, run.errors) / bins.bincount(minlength=BINS)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Method]]:
    parser = argparse.ArgumentParser(description="Imbalanced regression with and without ConR.")
    parser.add_argument("--data", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=8, help="how many splits and initial weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the plot")
    parser.add_argument("--quick", action="store_true", help="2 epochs, 2 seeds: to see that everything runs")
    options = parser.parse_args(arguments)
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(options, name)}")
    epochs, seeds, grid = (2, 2, GRID[:2]) if options.quick else (options.epochs, options.seeds, GRID)

    console = Console()
    results = {}
    for name in options.data:
        conr = search(TASKS[name], epochs, min(seeds, GRID_SEEDS), options.device, grid, console)
        console.print(f"{name}: {describe(TASKS[name], conr)}")
        results[name] = compare(TASKS[name], conr, epochs, seeds, options.device, console)
    console.print(table(results, epochs))
    plot(results, options.output)
    console.print(f"Plot: {options.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small a network several threads wait for each other longer than they work
    main()

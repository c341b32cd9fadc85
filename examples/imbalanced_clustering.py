"""Clustering of long-tailed data by pseudo-labels (arXiv 2401.09266, 2404.03446): what transport the labels come from.

Of scikit-learn's handwritten digits of 8 x 8 pixels the largest class keeps 170, the smallest --ratio times fewer; each
seed draws which digit is which. No method sees a label, or how large the classes are; that there are ten is known.

A small convolutional network first learns that two views of an image (turned, shifted, with noise) belong together, by
InfoNCE. From there

- k-means: clusters its features, and that is all;
- equal sizes: trains features and a head on pseudo-labels, which each epoch are the optimal transport from its
  predictions to ten classes of one size (`sinkhorn`), as SeLa and SwAV have them;
- progressive partial: the same with pseudo-labels for a part of the samples, which grows from a tenth to all, and with
  classes that may differ in size at a price (`ProgressivePseudoLabels`);
- semantic partial: the same with pseudo-labels that are alike for samples whose features are (`semantic_weight`).

All begin with the same network and head in each seed and train for as many steps, with the same options where they have
the same; those of partial transport are the papers'. Nothing is chosen by a figure of the table.

Accuracy is that of the best matching of clusters with classes, overall and within the three largest classes (head), the
four in the middle (medium) and the three smallest (tail). NMI is the normalised mutual information.

    python examples/imbalanced_clustering.py [--ratio 15] [--epochs 40] [--seeds 6] [--device cpu]
                                             [--output examples/imbalanced_clustering.png] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from pyreg.functional import info_nce, sinkhorn
from pyreg.nn import ProgressivePseudoLabels

CLASSES, LARGEST = 10, 170
KINDS = {"head": slice(0, 3), "medium": slice(3, 7), "tail": slice(7, 10)}  # of classes, from the largest on
BATCH = 128  # samples, in two views each
LEARNING_RATE = 2e-3
PRETRAINING = 1.5  # epochs before the pseudo-labels, for each one with them
VIEW_TEMPERATURE = 0.2  # of InfoNCE
HEAD_TEMPERATURE = 0.1  # of logits, which are cosines divided by it
EPSILON, GAMMA, START_MASS, SEMANTIC_WEIGHT = 0.1, 1.0, 0.1, 0.5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of rows and the features of their two views
Labelling = Callable[[Tensor, Tensor], Tensor]  # logits [N, K] and features [N, D] to pseudo-labels [N, K]


# ---- data ----


@dataclass(frozen=True)
class Samples:
    """Classes are numbered by size: 0 is the largest."""

    x: Tensor  # [N, 1, 8, 8], from 0 to 1
    y: Tensor  # [N]

    def sizes(self) -> Tensor:
        return self.y.bincount(minlength=CLASSES)


def long_tailed(seed: int, ratio: float, device: str) -> Samples:
    """Sizes fall by one factor from class to class."""
    images, digits = load_digits(return_X_y=True)
    images, digits = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for rank, digit in enumerate(torch.randperm(CLASSES, generator=generator)):
        members = (digits == digit).nonzero().squeeze(1)
        size = round(LARGEST * ratio ** (-rank / (CLASSES - 1)))
        rows.append(members[torch.randperm(len(members), generator=generator)[:size]])
        labels.append(torch.full((size,), rank))
    return Samples(images[torch.cat(rows)].to(device), torch.cat(labels).to(device))


def view(images: Tensor) -> Tensor:
    """Each of `images [N, 1, H, W]` turned by up to 15 degrees, shifted by up to a pixel, with noise."""
    angle, *shift = (torch.rand(3, len(images), device=images.device) * 2 - 1).unbind()
    cos, sin = (angle * math.radians(15)).cos(), (angle * math.radians(15)).sin()
    pixel = 2 / images.shape[-1]
    maps = torch.stack([cos, -sin, shift[0] * pixel, sin, cos, shift[1] * pixel], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.1 * torch.randn_like(images)


# ---- pseudo-labels ----


def equal_sizes(logits: Tensor, features: Tensor) -> Tensor:
    """Of optimal transport between samples and classes that all have one mass; rows sum to 1."""
    transport = sinkhorn(-logits.log_softmax(1), epsilon=EPSILON, epsilon_scaling=0.5, max_iter=10000, tol=1e-3)
    return transport.plan() * len(logits)


def partial(epochs: int, semantic_weight: float = 0.0) -> Labelling:
    """Of partial transport; a call is an epoch. Rows sum to what part of the sample takes part."""
    return ProgressivePseudoLabels(
        CLASSES,
        ramp_steps=epochs,
        start_mass=START_MASS,
        epsilon=EPSILON,
        gamma=GAMMA,
        semantic_weight=semantic_weight,
    )


# ---- training ----


class Clusterer(nn.Module):
    """Features of unit length `[N, 64]`; logits are their cosines with a prototype for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 64))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=1)

    def logits(self, features: Tensor) -> Tensor:
        return features @ F.normalize(self.prototypes, dim=1).t() / HEAD_TEMPERATURE


@dataclass
class Run:
    """Clusters of one data set, numbered as the classes they are matched with."""

    truth: Tensor  # [N]
    clusters: Tensor  # [N]
    history: list[float] = field(default_factory=list)  # the accuracy after each epoch

    def accuracies(self) -> Tensor:
        """Of each class, `[K]`."""
        hits = (self.clusters == self.truth).double()
        return torch.zeros(CLASSES, dtype=torch.float64).index_add(0, self.truth, hits) / self.sizes(self.truth)

    def accuracy(self, kind: str | None = None) -> float:
        """Overall, or the mean over classes of one kind."""
        if kind is None:
            return (self.clusters == self.truth).double().mean().item()
        return self.accuracies()[KINDS[kind]].mean().item()

    def nmi(self) -> float:
        return float(normalized_mutual_info_score(self.truth, self.clusters))

    @staticmethod
    def sizes(labels: Tensor) -> Tensor:
        return labels.bincount(minlength=CLASSES)


def matched(clusters: Tensor, truth: Tensor) -> Tensor:
    """Clusters renumbered so that as many as can be are their class."""
    together = (CLASSES * clusters + truth).bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
    _, classes = linear_sum_assignment(together.numpy(), maximize=True)
    return torch.tensor(classes)[clusters]


def objective(model: Clusterer, loss: Loss, rows: Tensor, views: Tensor) -> Tensor:
    return loss(rows, *model(views).chunk(2))


def minimise(model: Clusterer, samples: Samples, epochs: int, loss: Loss, before_epoch: Callable[[], None]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        before_epoch()
        model.train()
        for rows in torch.randperm(len(samples.y)).split(BATCH):
            if len(rows) < CLASSES:
                continue  # too few for the statistics of a batch
            rows = rows.to(samples.y.device)
            value = objective(model, loss, rows, torch.cat([view(samples.x[rows]), view(samples.x[rows])]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        scheduler.step()


def pretrain(samples: Samples, seed: int, epochs: int, on_epoch: Callable[[], None] = lambda: None) -> Clusterer:
    torch.manual_seed(seed)
    model = Clusterer().to(samples.x.device)

    def loss(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return info_nce(first, second, temperature=VIEW_TEMPERATURE, symmetric=True)

    minimise(model, samples, epochs, loss, on_epoch)
    return model


@torch.no_grad()
def predict(model: Clusterer, samples: Samples) -> tuple[Tensor, Tensor]:
    """Logits and features of the images as they are."""
    model.eval()
    features = model(samples.x)
    return model.logits(features), features


def k_means(model: Clusterer, samples: Samples, seed: int) -> Run:
    _, features = predict(model, samples)
    clusters = KMeans(CLASSES, n_init=10, random_state=seed).fit_predict(features.cpu().numpy())
    truth = samples.y.cpu()
    return Run(truth, matched(torch.tensor(clusters).long(), truth))


def self_label(
    model: Clusterer,
    samples: Samples,
    seed: int,
    epochs: int,
    labelling: Labelling,
    on_epoch: Callable[[], None] = lambda: None,
) -> Run:
    """Trains on pseudo-labels that are made anew each epoch, of all samples."""
    torch.manual_seed(seed)
    truth, history = samples.y.cpu(), []
    labels = torch.empty(0)

    def clusters() -> Tensor:
        return matched(predict(model, samples)[0].argmax(1).cpu(), truth)

    def relabel() -> None:
        nonlocal labels
        labels = labelling(*predict(model, samples))
        history.append((clusters() == truth).double().mean().item())
        on_epoch()

    def loss(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        target, log_probabilities = labels[rows], [model.logits(one).log_softmax(1) for one in (first, second)]
        return -(target * sum(log_probabilities)).sum() / (2 * target.sum())

    minimise(model, samples, epochs, loss, relabel)
    result = clusters()
    return Run(truth, result, [*history[1:], (result == truth).double().mean().item()])


# ---- comparison ----


@dataclass
class Method:
    """Where pseudo-labels come from, made anew for each run, or None; and the run of every seed."""

    name: str
    color: str
    labelling: Callable[[], Labelling] | None
    runs: list[Run] = field(default_factory=list)

    def values(self, of: Callable[[Run], float]) -> list[float]:
        return [of(run) for run in self.runs]


COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    TimeElapsedColumn(),
)  # fmt: skip


def compare(ratio: float, epochs: int, seeds: int, device: str, console: Console) -> list[Method]:
    """All of them for every seed, in turns, with a progress bar for each."""
    methods = [
        Method("k-means", "#999999", None),
        Method("equal sizes", "#d55e00", lambda: equal_sizes),
        Method("progressive partial", "#0072b2", functools.partial(partial, epochs)),
        Method("semantic partial", "#009e73", functools.partial(partial, epochs, SEMANTIC_WEIGHT)),
    ]
    features_epochs = math.ceil(PRETRAINING * epochs)
    with Progress(*COLUMNS, console=console) as progress:
        totals = [features_epochs, *[epochs] * (len(methods) - 1)]
        names = ["features, k-means", *(method.name for method in methods[1:])]
        bars = [
            progress.add_task(name, total=seeds * total, note="") for name, total in zip(names, totals, strict=True)
        ]
        for seed in range(seeds):
            samples = long_tailed(seed, ratio, device)
            model = pretrain(samples, seed, features_epochs, functools.partial(progress.advance, bars[0]))
            for method, bar in zip(methods, bars, strict=True):
                if method.labelling is None:
                    run = k_means(model, samples, seed)
                else:
                    advance = functools.partial(progress.advance, bar)
                    run = self_label(copy.deepcopy(model), samples, seed, epochs, method.labelling(), advance)
                method.runs.append(run)
                progress.update(bar, note=f"accuracy {statistics.mean(method.values(Run.accuracy)):.1%}")
    return methods


# ---- results ----


def table(methods: Sequence[Method], ratio: float, epochs: int) -> Table:
    runs = methods[0].runs
    result = Table(
        title=f"{len(runs[0].truth)} digits, classes of {LARGEST} to {round(LARGEST / ratio)}, {len(runs)} seeds, "
        f"{epochs} epochs",
        caption="Accuracies (%), mean ± standard deviation over seeds. Seeds: better / equal / worse than equal sizes.",
    )
    result.add_column("", no_wrap=True)
    for heading in ("overall", *KINDS, "NMI", "seeds"):
        result.add_column(heading, justify="right", no_wrap=True)
    equal = next(method for method in methods if method.name == "equal sizes")
    for method in methods:
        pairs = list(zip(method.values(Run.accuracy), equal.values(Run.accuracy), strict=True))
        signs = [sum(x > y for x, y in pairs), sum(x == y for x, y in pairs), sum(x < y for x, y in pairs)]
        result.add_row(
            method.name,
            spread(method.values(Run.accuracy)),
            *(spread(method.values(functools.partial(Run.accuracy, kind=kind))) for kind in KINDS),
            spread(method.values(Run.nmi)),
            "" if method is equal else " / ".join(map(str, signs)),
        )
    return result


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f}\n± {100 * deviation:.1f}"


def band(axis: Axes, x: Sequence[float], rows: Tensor, method: Method, marker: str) -> None:
    """Mean and standard deviation of `rows [seeds, len(x)]`."""
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    axis.plot(x, mean, marker, markersize=4, color=method.color, label=method.name)
    axis.fill_between(x, mean - deviation, mean + deviation, color=method.color, alpha=0.13, linewidth=0)


def plot(methods: Sequence[Method], ratio: float, path: Path) -> None:
    """Accuracies by kind of class, the sizes of clusters beside those of classes, and the accuracy during training."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    kinds, sizes, training = figure.subplots(1, 3)
    runs, ranks = methods[0].runs, list(range(1, CLASSES + 1))
    plot_kinds(methods, kinds)
    for method in methods:
        found = torch.stack([run.sizes(run.clusters).sort(descending=True).values for run in method.runs])
        band(sizes, ranks, found.double(), method, "o-")
        if method.labelling is None:
            mean = 100 * statistics.mean(method.values(Run.accuracy))
            training.axhline(mean, color=method.color, linestyle="--")
        else:
            history = 100 * torch.tensor([run.history for run in method.runs], dtype=torch.float64)
            band(training, range(1, history.shape[1] + 1), history, method, "-")
    edges = [rank + 0.5 for rank in range(CLASSES + 1)]
    sizes.stairs(Run.sizes(runs[0].truth).tolist(), edges, fill=True, color="0.88", label="true classes")
    sizes.set(title="Sizes of clusters", xlabel="from the largest on", ylabel="samples", ylim=(0, None), xticks=ranks)
    training.set(title="During training (dashed: k-means)", xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    for axis in (kinds, training):
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(
        f"{len(runs[0].truth)} digits in classes of {LARGEST} to {round(LARGEST / ratio)}, {len(runs)} seeds: "
        "mean ± standard deviation (left: each seed)"
    )
    handles, names = sizes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)


def plot_kinds(methods: Sequence[Method], axis: Axes) -> None:
    kinds = (None, *KINDS)
    for group, kind in enumerate(kinds):
        for i, method in enumerate(methods):
            place = group + 0.2 * (i - (len(methods) - 1) / 2)
            percent = [100 * value for value in method.values(functools.partial(Run.accuracy, kind=kind))]
            axis.plot([place] * len(percent), percent, "o", color=method.color, alpha=0.5, markersize=4)
            axis.hlines(statistics.mean(percent), place - 0.08, place + 0.08, color=method.color, linewidth=2.5)
    labels = [f"{kind}\n{part.start + 1} to {part.stop}" for kind, part in KINDS.items()]
    axis.set(title="Accuracy (%)", xlabel="classes, from the largest on", xticks=range(len(kinds)), ylim=(0, 100))
    axis.set_xticklabels(["all\nsamples", *labels])


def main(arguments: Sequence[str] | None = None) -> list[Method]:
    parser = argparse.ArgumentParser(description="Long-tailed digits, clustered by pseudo-labels from transport.")
    parser.add_argument("--ratio", type=float, default=15, help="how many times larger the largest class is")
    parser.add_argument("--epochs", type=int, default=40, help="on pseudo-labels")
    parser.add_argument("--seeds", type=int, default=6, help="how many data sets and initial weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the plot")
    parser.add_argument("--quick", action="store_true", help="6 epochs, 2 seeds: to see that everything runs")
    options = parser.parse_args(arguments)
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(options, name)}")
    if not 1 <= options.ratio <= LARGEST:
        parser.error(f"--ratio should be from 1 to {LARGEST}, got {options.ratio:g}")
    epochs, seeds = (6, 2) if options.quick else (options.epochs, options.seeds)

    console = Console()
    methods = compare(options.ratio, epochs, seeds, options.device, console)
    console.print(table(methods, options.ratio, epochs))
    plot(methods, options.ratio, options.output)
    console.print(f"Plot: {options.output}", soft_wrap=True)
    return methods


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small a network several threads wait for each other longer than they work
    main()

"""The weight compander on handwritten digits (arXiv 2306.16993): with and without, fixed and learned.

A small convolutional network learns digits of 8 x 8 pixels from 269 of scikit-learn's 1797, with Adam, in three ways:
as it is; with its weights companded by one fixed (a, b), which a small grid finds on validation images; with one
learned (a, b) a layer, trained by plain SGD. All three minimise the cross-entropy plus the same factor times a sum of
squares: of the weights or, for learned (a, b), of v, as the paper has it. For each seed they start from the same split
and the same weights, and the companded networks compute what the plain one does until their first step.

The paper says of companded weights that fewer are near zero and that their range is smaller: the plot shows their
histograms, and the table counts. A step of Adam moves w by Psi'(v)^2 times what it would without the compander, about
(a / b)^2 for small weights: that alone keeps weights nearer to where they began.

    python examples/compander.py [--epochs 40] [--seeds 8] [--a 0.5 --b 0.5] [--device cpu]
                                 [--output examples/compander.png] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyreg
from pyreg.optim import CompandedOptimizer

TRAINING_SHARE, VALIDATION_SHARE = 0.15, 0.15
BATCH = 64
LEARNING_RATE = 1e-2
CONSTANTS_LEARNING_RATE = 1e-2  # of the plain SGD on a and b
DECAY = 1e-3  # the loss gains DECAY * sum w^2
GRID = [(a, b) for a in (0.5, 0.75, 1.0) for b in (0.5, 0.75, 1.0)]  # the paper's square, in steps of 0.25
GRID_SEEDS = 2
NEAR_ZERO = 0.01

Constants = tuple[float, float]  # a and b


@dataclass(frozen=True)
class Images:
    x: Tensor  # [N, 1, 8, 8], from 0 to 1
    y: Tensor  # [N]


@dataclass(frozen=True)
class Data:
    train: Images
    validation: Images
    test: Images


def digits(seed: int, device: str) -> Data:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)[order].to(device) / 16
    y = torch.tensor(y)[order].to(device)
    first, second = int(TRAINING_SHARE * len(x)), int((TRAINING_SHARE + VALIDATION_SHARE) * len(x))
    parts = (slice(0, first), slice(first, second), slice(second, None))
    return Data(*(Images(x[part], y[part]) for part in parts))


def network(seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    ).to(device)  # fmt: skip


def weights(model: nn.Module) -> list[Tensor]:
    """Those that the compander takes, companded or not."""
    return [layer.weight for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]


# ---- the three ways ----


def plain(model: nn.Module) -> list[torch.optim.Optimizer]:
    decayed = {id(weight) for weight in weights(model)}
    groups = [
        {"params": weights(model), "weight_decay": 2 * DECAY},  # torch adds weight_decay * w to the gradient
        {"params": [param for param in model.parameters() if id(param) not in decayed]},
    ]
    return [torch.optim.Adam(groups, lr=LEARNING_RATE)]


def fixed(model: nn.Module, a: float, b: float) -> list[torch.optim.Optimizer]:
    pyreg.compand(model, a, b, learnable=False)
    return [CompandedOptimizer(model.parameters(), model, torch.optim.Adam, lr=LEARNING_RATE, decay=DECAY)]


def learned(model: nn.Module) -> list[torch.optim.Optimizer]:
    constants = pyreg.compand(model, a=0.5, b=1.0).constants
    others = [param for param in model.parameters() if all(param is not constant for constant in constants)]
    return [
        CompandedOptimizer(others, model, torch.optim.Adam, lr=LEARNING_RATE, decay=DECAY, decay_on="v"),
        torch.optim.SGD(constants, lr=CONSTANTS_LEARNING_RATE),
    ]


# ---- training ----


@dataclass
class Run:
    """One network, trained."""

    losses: list[float] = field(default_factory=list)  # of every batch, without decay
    validation_accuracy: float = 0.0
    test_accuracy: float = 0.0
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # all of them after training, on the CPU
    seconds: float = 0.0


@dataclass
class Method:
    """One way to train, and its run of every seed."""

    name: str
    color: str
    prepare: Callable[[nn.Module], list[torch.optim.Optimizer]]
    runs: list[Run] = field(default_factory=list)

    def mean(self, of: Callable[[Run], float]) -> float:
        return statistics.mean(of(run) for run in self.runs)


def batches(images: Images, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    for part in order.split(BATCH):
        yield images.x[part], images.y[part]


def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    return (model(images.x).argmax(1) == images.y).float().mean().item()


def train(
    prepare: Callable[[nn.Module], list[torch.optim.Optimizer]],
    data: Data,
    seed: int,
    epochs: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Run:
    run, start = Run(), time.perf_counter()
    model = network(seed, str(data.train.x.device))
    optimizers = prepare(model)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs) for optimizer in optimizers]
    for epoch in range(epochs):
        for x, y in batches(data.train, 1000 * seed + epoch):
            model.zero_grad()
            loss = objective(model, x, y)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            run.losses.append(loss.item())
        for scheduler in schedulers:
            scheduler.step()
        on_epoch()
    run.seconds = time.perf_counter() - start
    model.eval()
    run.validation_accuracy, run.test_accuracy = accuracy(model, data.validation), accuracy(model, data.test)
    run.weights = torch.cat([weight.detach().flatten() for weight in weights(model)]).cpu()
    return run


COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    TimeElapsedColumn(),
)  # fmt: skip


def search(epochs: int, seeds: int, device: str, grid: Sequence[Constants], console: Console) -> Constants:
    """The fixed (a, b) with the best accuracy on validation images."""
    scores: dict[Constants, float] = {}
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("grid of fixed (a, b)", total=len(grid) * seeds * epochs, note="")
        for a, b in grid:
            prepare = functools.partial(fixed, a=a, b=b)
            advance = functools.partial(progress.advance, bar)
            runs = [train(prepare, digits(seed, device), seed, epochs, advance) for seed in range(seeds)]
            scores[a, b] = statistics.mean(run.validation_accuracy for run in runs)
            best = max(scores, key=scores.__getitem__)
            progress.update(bar, note=f"a = {best[0]:g}, b = {best[1]:g}: validation {scores[best]:.2%}")
    return best


def compare(epochs: int, seeds: int, device: str, a: float, b: float, console: Console) -> list[Method]:
    """Trains all three for every seed, in turns, with a progress bar for each."""
    methods = [
        Method("plain", "#d55e00", plain),
        Method(f"fixed ({a:g}, {b:g})", "#0072b2", functools.partial(fixed, a=a, b=b)),
        Method("learned (a, b)", "#009e73", learned),
    ]
    with Progress(*COLUMNS, console=console) as progress:
        bars = [progress.add_task(method.name, total=seeds * epochs, note="") for method in methods]
        for seed in range(seeds):
            data = digits(seed, device)
            for method, bar in zip(methods, bars, strict=True):
                run = train(method.prepare, data, seed, epochs, functools.partial(progress.advance, bar))
                method.runs.append(run)
                progress.update(bar, note=f"test {method.mean(lambda run: run.test_accuracy):.2%}")
    return methods


# ---- results ----


def near_zero(run: Run) -> float:
    return (run.weights.abs() < NEAR_ZERO).float().mean().item()


def largest(run: Run) -> float:
    return run.weights.abs().max().item()


def table(methods: Sequence[Method], epochs: int) -> Table:
    runs, first = methods[0].runs, methods[0]
    title = f"{len(digits(0, 'cpu').test.y)} test digits, {len(runs)} seeds, {epochs} epochs"
    result = Table(title=title, caption="Means, ± standard deviation; vs plain: seeds better / equal / worse.")
    result.add_column("weights", no_wrap=True)
    for heading in ("test accuracy", f"|w| < {NEAR_ZERO:g}", "largest", "time", "vs plain"):
        result.add_column(heading, justify="right", no_wrap=True)
    for method in methods:
        accuracies = [run.test_accuracy for run in method.runs]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        pairs = list(zip(accuracies, (run.test_accuracy for run in first.runs), strict=True))
        signs = [sum(x > y for x, y in pairs), sum(x == y for x, y in pairs), sum(x < y for x, y in pairs)]
        result.add_row(
            method.name,
            f"{statistics.mean(accuracies):.2%} ± {spread:.2%}",
            f"{method.mean(near_zero):.1%}",
            f"{method.mean(largest):.2f}",
            f"{method.mean(lambda run: run.seconds):.2f} s",
            "" if method is first else " / ".join(map(str, signs)),
        )
    return result


def plot(methods: Sequence[Method], path: Path) -> None:
    """Histograms of all weights after training, those near zero apart, and the accuracy of every seed."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    whole, close, accuracies = figure.subplots(1, 3, width_ratios=(4, 4, 2.2))
    values = {method.name: torch.cat([run.weights for run in method.runs]) for method in methods}
    limit = 1.05 * max(value.abs().max().item() for value in values.values())
    for method in methods:
        for axis, edge, bins in ((whole, limit, 80), (close, 0.1, 40)):
            density, edges = torch.histogram(values[method.name], bins=bins, range=(-edge, edge))
            share = (100 * density / len(values[method.name])).tolist()
            axis.stairs(share, edges.tolist(), color=method.color, linewidth=1.8, label=method.name)
    whole.set(yscale="log", title="All weights", xlabel="w", ylabel="share of the weights (%)")
    close.set(
        title=f"Near zero (the band: |w| < {NEAR_ZERO:g})",
        xlabel="w",
        ylim=(0, None),
        xticks=(-0.1, -0.05, 0, 0.05, 0.1),
    )
    close.axvspan(-NEAR_ZERO, NEAR_ZERO, color="0.9", zorder=0)
    for position, method in enumerate(methods):
        percent = [100 * run.test_accuracy for run in method.runs]
        accuracies.plot([position] * len(percent), percent, "o", color=method.color, alpha=0.5)
        accuracies.hlines(statistics.mean(percent), position - 0.3, position + 0.3, color=method.color, linewidth=2.5)
    accuracies.set(title="Test accuracy (%)", xticks=range(len(methods)), xlim=(-0.5, len(methods) - 0.5))
    accuracies.set_xticklabels([method.name.split()[0] for method in methods])
    for axis in (whole, close, accuracies):
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"Convolutional network on 8 x 8 digits, Adam, {len(methods[0].runs)} seeds: weights after training"
    )
    figure.legend(handles=whole.get_legend_handles_labels()[0], loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> list[Method]:
    parser = argparse.ArgumentParser(description="A convolutional network on digits, its weights companded or not.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=8, help="how many splits and initial weights")
    parser.add_argument("--a", type=float, help="of the fixed compander; with --b, in place of the grid")
    parser.add_argument("--b", type=float)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the plot")
    parser.add_argument("--quick", action="store_true", help="2 epochs, 2 seeds: to see that everything runs")
    options = parser.parse_args(arguments)
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(options, name)}")
    if (options.a is None) != (options.b is None):
        parser.error("--a and --b belong together: pass both, or none for the grid")
    epochs, seeds, grid = (2, 2, GRID[:2]) if options.quick else (options.epochs, options.seeds, GRID)

    console = Console()
    a, b = options.a, options.b
    if a is None:
        a, b = search(epochs, min(seeds, GRID_SEEDS), options.device, grid, console)
    methods = compare(epochs, seeds, options.device, a, b, console)
    console.print(table(methods, epochs))
    plot(methods, options.output)
    console.print(f"Plot: {options.output}", soft_wrap=True)
    return methods


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small a network several threads wait for each other longer than they work
    main()

"""Optimal transport maps by a plain network (arXiv 2302.04953): fit alone, and with the Monge gap.

A map T is to carry samples x to samples y. A network x + mlp(x) minimises the Sinkhorn divergence between T(x) and y,
which asks where points arrive and not which; with the Monge gap, it minimises that plus a weight times the gap of
(x, T(x)), by how much points travel farther than they would have to for the same arrivals. Nothing about the network is
convex. Beside both stands the entropic map, which is not trained: where the plan between the training samples carries a
new point.

- gaussians, in 2 and in 8 dimensions: random means and covariances, whose optimal map is known,
  T*(x) = m_y + A (x - m_x) with A = S_x^-1/2 (S_x^1/2 S_y S_x^1/2)^1/2 S_x^-1/2. What is missing to it is
  L2-UVP = 100 |T - T*|^2 / Var(y), in per cent; a map of all x to the mean of y has 100.
- digits: two of scikit-learn's handwritten digits, in the space of their 8 principal components.

All figures are of held-out samples. Each seed draws other Gaussians, or other digits, and other weights; both networks
begin with the same ones, see the same batches and make the same number of steps. Options are the same for all problems,
and none was chosen by its figures. Costs are squared distances, and epsilon is --epsilon times their mean between the
training samples, everywhere. The gap then has a floor of epsilon log n, which the true map has as well.

    python examples/monge_map.py [--problems gaussians-2 gaussians-8 digits] [--steps 300] [--seeds 8] [--weight 1]
                                 [--epsilon 0.02] [--device cpu] [--output examples/monge_map.png] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyreg.functional import monge_gap, sinkhorn_divergence, sinkhorn_points

SAMPLES = 1000  # of each Gaussian, to train and to test
BATCH = 256
WIDTH = 64
LEARNING_RATE = 3e-3
COMPONENTS = 8  # of the digits
TOLERANCE = {"tol": 1e-3, "max_iter": 5000}  # of marginals, in the L1 norm

Map = Callable[[Tensor], Tensor]


# ---- data ----


@dataclass(frozen=True)
class Samples:
    x: Tensor  # [N, d]
    y: Tensor  # [M, d]


@dataclass(frozen=True)
class Problem:
    train: Samples
    test: Samples
    truth: Map | None  # the optimal map, where it is known

    def epsilon(self, relative: float) -> float:
        return relative * torch.cdist(self.train.x, self.train.y).square().mean().item()


@dataclass(frozen=True)
class Gaussian:
    mean: Tensor  # [d]
    root: Tensor  # [d, d], of the covariance: symmetric

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return self.mean + torch.randn(count, len(self.mean), generator=generator) @ self.root


def random_gaussian(dimension: int, offset: float, generator: torch.Generator) -> Gaussian:
    """Its mean is that far from 0, standard deviations along its axes are from 0.5 to 2."""
    axes, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator))
    deviations = 2 ** (2 * torch.rand(dimension, generator=generator) - 1)
    direction = torch.nn.functional.normalize(torch.randn(dimension, generator=generator), dim=0)
    return Gaussian(offset * direction, axes @ deviations.diag() @ axes.t())


def root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.t()


def optimal_map(source: Gaussian, target: Gaussian) -> Map:
    inverse = torch.linalg.inv(source.root)
    linear = inverse @ root(source.root @ target.root @ target.root @ source.root) @ inverse
    return lambda x: target.mean.to(x) + (x - source.mean.to(x)) @ linear.to(x)


def gaussians(seed: int, dimension: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    source, target = (random_gaussian(dimension, offset, generator) for offset in (0.0, 2.0))
    train, test = (Samples(source.draw(SAMPLES, generator), target.draw(SAMPLES, generator)) for _ in ("train", "test"))
    return Problem(train, test, optimal_map(source, target))


def digits(seed: int) -> Problem:
    """One half of each digit to train and one to test; principal components are of the training halves."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    parts = []
    for digit in torch.randperm(10, generator=generator)[:2]:
        members = images[labels == digit].float()
        parts.append(members[torch.randperm(len(members), generator=generator)])
    (x, x_test), (y, y_test) = (part.chunk(2) for part in parts)
    both = torch.cat([x, y])
    mean = both.mean(0)
    _, _, axes = torch.linalg.svd(both - mean, full_matrices=False)
    axes = axes[:COMPONENTS].t()
    scale = ((both - mean) @ axes).std()
    x, y, x_test, y_test = ((part - mean) @ axes / scale for part in (x, y, x_test, y_test))
    return Problem(Samples(x, y), Samples(x_test, y_test), truth=None)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "gaussians-2": functools.partial(gaussians, dimension=2),
    "gaussians-8": functools.partial(gaussians, dimension=8),
    "digits": digits,
}


def on(problem: Problem, device: str) -> Problem:
    train, test = (Samples(part.x.to(device), part.y.to(device)) for part in (problem.train, problem.test))
    return Problem(train, test, problem.truth)


# ---- maps ----


class Residual(nn.Module):
    """``x + mlp(x)``."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimension, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, dimension),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def objective(model: nn.Module, source: Tensor, target: Tensor, weight: float, epsilon: float) -> Tensor:
    """Divergence + weight * Monge gap; without the gap for a weight of 0."""
    mapped = model(source)
    loss = sinkhorn_divergence(mapped, target, epsilon=epsilon, **TOLERANCE)
    if weight > 0:
        loss = loss + weight * monge_gap(source, mapped, epsilon=epsilon, **TOLERANCE)
    return loss


def train(
    problem: Problem, seed: int, weight: float, epsilon: float, steps: int, on_step: Callable[[], None] = lambda: None
) -> Map:
    """The map that minimises the objective."""
    torch.manual_seed(seed)
    x, y = problem.train.x, problem.train.y
    model = Residual(x.shape[1]).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        source, target = (points[torch.randperm(len(points))[:BATCH].to(x.device)] for points in (x, y))
        loss = objective(model, source, target, weight, epsilon)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        on_step()
    return model.requires_grad_(False)


def entropic(problem: Problem, epsilon: float) -> Map:
    return sinkhorn_points(problem.train.x, problem.train.y, epsilon=epsilon, **TOLERANCE).map


# ---- measures ----


@dataclass(frozen=True)
class Run:
    """One map, measured on held-out samples."""

    divergence: float  # between T(x) and y
    gap: float  # of (x, T(x)); above floor
    floor: float  # epsilon log n
    cost: float  # the mean of |T(x) - x|^2
    unexplained: float | None  # L2-UVP in per cent, where the optimal map is known
    points: tuple[Tensor, Tensor]  # x and T(x)

    def excess(self) -> float:
        return self.gap - self.floor


@torch.no_grad()
def measure(problem: Problem, transport: Map, epsilon: float) -> Run:
    x, y = problem.test.x, problem.test.y
    mapped = transport(x)
    unexplained = None
    if problem.truth is not None:
        errors = (mapped - problem.truth(x)).square().sum(1)
        unexplained = 100 * (errors.mean() / y.var(0).sum()).item()
    return Run(
        divergence=sinkhorn_divergence(mapped, y, epsilon=epsilon, **TOLERANCE).item(),
        gap=monge_gap(x, mapped, epsilon=epsilon, **TOLERANCE).item(),
        floor=epsilon * math.log(len(x)),
        cost=(mapped - x).square().sum(1).mean().item(),
        unexplained=unexplained,
        points=(x.cpu(), mapped.cpu()),
    )


# ---- comparison ----


@dataclass
class Method:
    """One way to a map, and its run of every seed."""

    name: str
    color: str
    runs: list[Run] = field(default_factory=list)

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """None where a measure is not known."""
        return [value for run in self.runs if (value := of(run)) is not None]


ALONE, WITH_GAP, ENTROPIC, TRUE = "divergence alone", "with Monge gap", "entropic map", "true map"
COLORS = {ALONE: "#d55e00", WITH_GAP: "#0072b2", ENTROPIC: "#009e73", TRUE: "#222222"}
MEASURES: dict[str, Callable[[Run], float | None]] = {
    "divergence": lambda run: run.divergence,
    "Monge gap": lambda run: run.excess(),
    "transport cost": lambda run: run.cost,
    "L2-UVP (%)": lambda run: run.unexplained,
}

COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    TimeElapsedColumn(),
)  # fmt: skip


def compare(
    name: str, weight: float, relative_epsilon: float, steps: int, seeds: int, device: str, console: Console
) -> list[Method]:
    """All maps for every seed; a progress bar for each network."""
    methods = {method: Method(method, color) for method, color in COLORS.items()}
    weights = {ALONE: 0.0, WITH_GAP: weight}
    with Progress(*COLUMNS, console=console) as progress:
        bars = {method: progress.add_task(f"{name}, {method}", total=seeds * steps, note="") for method in weights}
        for seed in range(seeds):
            problem = on(PROBLEMS[name](seed), device)
            epsilon = problem.epsilon(relative_epsilon)
            maps = {ENTROPIC: entropic(problem, epsilon)}
            for method, bar in bars.items():
                advance = functools.partial(progress.advance, bar)
                maps[method] = train(problem, seed, weights[method], epsilon, steps, advance)
            if problem.truth is not None:
                maps[TRUE] = problem.truth
            for method, transport in maps.items():
                methods[method].runs.append(measure(problem, transport, epsilon))
            for method, bar in bars.items():
                progress.update(bar, note=f"Monge gap {statistics.mean(methods[method].values(Run.excess)):.3f}")
    return [method for method in methods.values() if method.runs]


# ---- results ----


def table(results: dict[str, list[Method]], weight: float, steps: int) -> Table:
    seeds = len(next(iter(results.values()))[0].runs)
    result = Table(
        title=f"Maps on held-out samples, {seeds} seeds, {steps} steps, weight of the gap {weight:g}",
        caption="Mean and standard deviation over seeds. Monge gap: without its floor of epsilon log n.",
    )
    result.add_column("", no_wrap=True)
    for heading in MEASURES:
        result.add_column(heading, justify="right", no_wrap=True)
    for name, methods in results.items():
        for method in methods:
            result.add_row(f"{name}\n{method.name}", *(spread(method.values(of)) for of in MEASURES.values()))
        result.add_section()
    return result


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f}\n± {deviation:.3f}"


def plot(results: dict[str, list[Method]], path: Path) -> None:
    """Above the maps of a problem in the plane, if there is one, as arrows; below what was measured of all problems."""
    plane = next((name for name in results if results[name][0].runs[0].points[0].shape[1] == 2), None)
    figure = Figure(figsize=(14, 8.2 if plane else 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4.2, 4)) if plane else (None, figure)
    if plane is not None:
        axes = above.subplots(1, len(results[plane]), sharex=True, sharey=True)
        for method, axis in zip(results[plane], axes, strict=True):
            plot_arrows(method, results[plane][-1], axis)
        above.suptitle(f"{plane}, seed 0: held-out samples (grey), where a map takes them, and the true map (circles)")
    shown = ("L2-UVP (%)", "Monge gap", "divergence")
    for measured, axis in zip(shown, below.subplots(1, len(shown)), strict=True):
        plot_measure(measured, results, axis)
    below.suptitle(
        f"Held-out samples, {len(next(iter(results.values()))[0].runs)} seeds (points) and their mean (lines)"
    )
    handles = [
        Line2D([], [], color=method.color, marker="o", label=method.name)
        for method in max(results.values(), key=len)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)


def plot_arrows(method: Method, true: Method, axis: Axes, count: int = 40) -> None:
    x, mapped = (points[:count] for points in method.runs[0].points)
    _, truth = (points[:count] for points in true.runs[0].points)
    axis.plot(*x.t(), "o", color="0.75", markersize=3)
    axis.plot(*truth.t(), "o", color="0.4", markersize=6, fillstyle="none", markeredgewidth=0.8)
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "color": method.color}
    axis.quiver(*x.t(), *(mapped - x).t(), **arrows)
    unexplained = method.runs[0].unexplained
    axis.set(title=f"{method.name}: L2-UVP {unexplained:.2f} %", xlabel="$x_1$", aspect="equal")
    if method.name == ALONE:
        axis.set_ylabel("$x_2$")


def plot_measure(measured: str, results: dict[str, list[Method]], axis: Axes) -> None:
    names = [name for name, methods in results.items() if methods[0].values(MEASURES[measured])]
    for group, name in enumerate(names):
        for method in results[name]:
            values = method.values(MEASURES[measured])
            if not any(values):
                continue  # the distance of the true map to itself
            place = group + 0.2 * (list(COLORS).index(method.name) - 1.5)
            axis.plot([place] * len(values), values, "o", color=method.color, alpha=0.5, markersize=4)
            axis.hlines(statistics.mean(values), place - 0.08, place + 0.08, color=method.color, linewidth=2.5)
    axis.set(xticks=range(len(names)), xlim=(-0.5, len(names) - 0.5), yscale="log", title=TITLES[measured])
    axis.set_xticklabels(names)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, axis="y")


TITLES = {
    "L2-UVP (%)": "Distance to the true map: L2-UVP (%)",
    "Monge gap": r"Monge gap, less $\varepsilon \log n$",
    "divergence": "Sinkhorn divergence of $T(x)$ and $y$",
}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Method]]:
    parser = argparse.ArgumentParser(description="Optimal transport maps, with and without the Monge gap.")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="default: all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8, help="how many problems of a kind, and initial weights")
    parser.add_argument("--weight", type=float, default=1.0, help="of the Monge gap")
    parser.add_argument("--epsilon", type=float, default=0.02, help="of entropic transport, in mean costs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the plot")
    parser.add_argument("--quick", action="store_true", help="60 steps, 2 seeds: to see that everything runs")
    options = parser.parse_args(arguments)
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(options, name)}")
    for name in ("weight", "epsilon"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} should be above 0, got {getattr(options, name):g}")
    steps, seeds = (60, 2) if options.quick else (options.steps, options.seeds)

    console = Console()
    results = {
        name: compare(name, options.weight, options.epsilon, steps, seeds, options.device, console)
        for name in options.problems
    }
    console.print(table(results, options.weight, steps))
    plot(results, options.output)
    console.print(f"Plot: {options.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # on so small problems several threads wait for each other longer than they work
    main()

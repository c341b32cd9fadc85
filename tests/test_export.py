"""Models that hold a loss, exported once for any number of rows, saved, and loaded by another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export, load, save

import pyreg
from pyreg.functional import sinkhorn, sinkhorn_divergence, sinkhorn_points
from pyreg.nn import (
    ConRLoss,
    InfoNCELoss,
    LinearStableMaxCrossEntropyLoss,
    MongeGap,
    ProgressivePseudoLabels,
    SamplesLoss,
    StableMaxCrossEntropyLoss,
    SupConLoss,
)
from tests.oracle import ROUNDOFF

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, CLASSES = 6, 5
ROWS, OTHER_ROWS = Dim("rows", min=CLASSES, max=4096), Dim("other_rows", min=4, max=4096)


class Model(nn.Module):
    """A layer, and what is made of its outputs."""

    def __init__(self, head: nn.Module, call: Callable[..., Tensor], outputs: int = CLASSES) -> None:
        super().__init__()
        self.layer, self.head, self.call = nn.Linear(FEATURES, outputs), head, call

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.call(self.head, self.layer, x, *others)


class Case(NamedTuple):
    model: nn.Module
    others: Callable[[int], tuple[Tensor, ...]]  # what a model takes beside x, for so many rows
    dims: tuple[Any, ...] = ()  # their numbers of rows


def labels(rows: int) -> tuple[Tensor]:
    return (torch.arange(rows) % CLASSES,)


def points(rows: int) -> tuple[Tensor]:
    return (torch.randn(rows + 3, FEATURES),)


def of_two(head: Callable[..., Tensor], layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return head(layer(x), layer(y))


def companded() -> nn.Module:
    layers = nn.Sequential(nn.Linear(CLASSES, 8), nn.Tanh(), nn.Linear(8, 3))
    pyreg.compand(layers)
    return layers


def of_a_cost(head: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    transport = sinkhorn(layer(x).abs(), epsilon=0.5)
    return transport.value + transport.plan().square().sum()


def of_points(head: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x, y = layer(x), layer(y)
    transport = sinkhorn_points(x, y, epsilon=1.0)
    return transport.value + transport.apply(y).sin().sum() + sinkhorn_divergence(x, y, epsilon=1.0)


def pseudo_labels() -> nn.Module:
    """Half trained, with a bank: in evaluation, where its state stays."""
    labelling = ProgressivePseudoLabels(CLASSES, ramp_steps=4, bank_size=20)
    for _ in range(2):
        labelling(torch.randn(16, CLASSES))
    return labelling.eval()


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    weighted = StableMaxCrossEntropyLoss(weight=torch.rand(CLASSES), label_smoothing=0.1)
    return {
        "StableMaxCrossEntropyLoss": Case(Model(weighted, lambda h, f, x, y: h(f(x), y)), labels, (ROWS,)),
        "LinearStableMaxCrossEntropyLoss": Case(
            Model(LinearStableMaxCrossEntropyLoss(CLASSES, 7), lambda h, f, x, y: h(f(x), y)), labels, (ROWS,)
        ),
        "ConRLoss": Case(
            Model(ConRLoss(), lambda h, f, x, y: h(f(x), y, f(x)[:, :1])), lambda n: (3 * torch.rand(n, 1),), (ROWS,)
        ),
        "InfoNCELoss": Case(Model(InfoNCELoss(symmetric=True), of_two), lambda n: (torch.randn(n, FEATURES),), (ROWS,)),
        "SupConLoss": Case(Model(SupConLoss(), lambda h, f, x, y: h(f(x), y)), labels, (ROWS,)),
        "SamplesLoss": Case(Model(SamplesLoss(blur=0.3), of_two), points, (OTHER_ROWS,)),
        "MongeGap": Case(Model(MongeGap(epsilon=0.5), lambda h, f, x: h(x, x + f(x)), outputs=FEATURES), lambda n: ()),
        "ProgressivePseudoLabels": Case(Model(pseudo_labels(), lambda h, f, x: h(f(x))), lambda n: ()),
        "compand": Case(Model(companded(), lambda h, f, x: h(f(x))), lambda n: ()),
        "sinkhorn": Case(Model(nn.Identity(), of_a_cost), lambda n: ()),
        "sinkhorn_points": Case(Model(nn.Identity(), of_points), points, (OTHER_ROWS,)),
    }


CASES = cases()
WITH_HELD_GRADIENTS = ("ConRLoss", "InfoNCELoss", "SupConLoss")  # up to 1024 rows, in eager calls


def inputs(name: str, rows: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, FEATURES), *CASES[name].others(rows)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported with 9 rows; beside each what the model makes of 23, and with them."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    for name, case in CASES.items():
        dims = tuple({0: dim} for dim in case.dims)
        program = export(case.model, inputs(name, 9), dynamic_shapes=({0: ROWS}, dims) if dims else ({0: ROWS},))
        save(program, folder / f"{name}.pt2")
        others = inputs(name, 23)
        torch.save((others, case.model(*others).detach()), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_program_gives_the_numbers_of_its_model(programs: Path, name: str) -> None:
    model, program = CASES[name].model, load(programs / f"{name}.pt2").module()
    for rows in (CLASSES, 23, *((1030,) if name in WITH_HELD_GRADIENTS else ())):
        others = inputs(name, rows)
        results = [part(*others) for part in (program, model)]
        # A program takes linear_stablemax's own way, whatever the size; an eager call with few logits holds them all.
        rtol = 4 * ROUNDOFF[torch.float32] if name == "LinearStableMaxCrossEntropyLoss" else 0
        torch.testing.assert_close(*results, rtol=rtol, atol=0)
        if results[0].requires_grad:
            found = [
                torch.autograd.grad(result.sum(), part.get_parameter("layer.weight"))[0]
                for result, part in zip(results, (program, model), strict=True)
            ]
            # A gradient that the forward pass formed, and one that the backward pass forms, in float32.
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * found[1].abs().max().item())


LOAD = """
import sys
from pathlib import Path
import torch
import pyreg
for path in sorted(Path(sys.argv[1]).glob("*.pt2")):
    inputs, expected = torch.load(path.with_suffix(".pt"))
    actual = torch.export.load(path).module()(*inputs)
    print(path.stem, torch.equal(actual, expected))
"""


def test_a_fresh_process_loads_programs(programs: Path) -> None:
    command = [sys.executable, "-W", "error::pyreg.transport.ConvergenceWarning", "-c", LOAD, str(programs)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.stdout.split("\n")[:-1] == [f"{name} True" for name in sorted(CASES)], ended.stderr[-3000:]

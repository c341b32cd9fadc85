"""A user's program, for type checkers alone: ``tests/test_typing.py`` reads what they find out, line by line."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import reveal_type

import pyreg
from pyreg import diagnostics, functional, nn, optim

model = torch.nn.Linear(8, 4)
x, labels = torch.randn(16, 8), torch.randint(4, (16,))

# Modules are called as functions are.
reveal_type(nn.StableMaxCrossEntropyLoss()(model(x), labels))  # -> Tensor
reveal_type(nn.LinearStableMaxCrossEntropyLoss(8, 4)(x, labels))  # -> Tensor
reveal_type(nn.ConRLoss(variant="agedb")(x, labels, labels))  # -> Tensor
reveal_type(nn.SupConLoss()(x, labels))  # -> Tensor
reveal_type(nn.InfoNCELoss()(x, x))  # -> Tensor
reveal_type(nn.MongeGap()(x, x))  # -> Tensor
reveal_type(nn.ProgressivePseudoLabels(4, ramp_steps=10)(x))  # -> Tensor
nn.SupConLoss()(x)  # ! Too few arguments

# Options are names, and another name is an error before the program runs.
reveal_type(functional.supcon_loss(x, labels, reduction="none"))  # -> Tensor
functional.supcon_loss(x, labels, reduction="average")  # ! incompatible type "Literal['average']"
functional.conr_loss(x, labels, labels, variant="imdb")  # ! incompatible type "Literal['imdb']"
functional.weight_compander(x, 0.5, 1.0, "tanh")  # ! incompatible type "Literal['tanh']"
pyreg.compand(model, per="weight")  # ! incompatible type "Literal['weight']"
functional.sinkhorn(x, epsilon=0.1, reference="entropy")  # ! incompatible type "Literal['entropy']"
functional.sinkhorn_points(x, x, cost="l1", epsilon=0.1)  # ! incompatible type "Literal['l1']"


def manhattan(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, p=1)


# Results.
transport = functional.sinkhorn_points(x, x, cost=manhattan, epsilon=0.1)
reveal_type(transport)  # -> Transport
reveal_type(transport.value)  # -> Tensor
reveal_type(transport.barycentric_map())  # -> Tensor
reveal_type(transport.plan().sum(0))  # -> Tensor | Any
nn.SamplesLoss()(x, x).backward()
potentials, _ = nn.SamplesLoss(potentials=True)(x, x)
nn.SamplesLoss()(x, "y")  # ! incompatible type "str"
reveal_type(transport.potentials())  # -> tuple[Tensor, Tensor]
reveal_type(pyreg.compand(model).weights)  # -> dict[str, Parameter]
reveal_type(diagnostics.naive_loss_minimization_alignment(model.parameters()).overall)  # -> Tensor

optimizer: torch.optim.Optimizer = optim.OrthoGrad(model.parameters(), torch.optim.AdamW, lr=1e-2)
reveal_type(optim.OrthoGrad(model.parameters(), lr=1e-2).step())  # -> float | None

# In place of functions of torch, with what their options are there: any string.
reduction: str = "mean"
reveal_type(functional.stablemax_cross_entropy(x, labels, reduction=reduction))  # -> Tensor

"""A cost matrix, and what a transport asks of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _checks, _potentials
from pyreg.ops._potentials import Side


class DenseCost:
    """A cost that is held, ``[B, n, m]``, float64 or float32; ``+inf`` where a pair is forbidden.

    Whatever else stands for a cost has these methods too.
    """

    def __init__(self, cost: Tensor) -> None:
        self.tensor = cost

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    # ---- constants ----

    def mean(self) -> Tensor:
        """Of finite costs, ``[B]``, float64."""
        is_there = self.tensor < torch.inf
        return torch.where(is_there, self.tensor.detach(), 0).sum((1, 2), dtype=torch.float64) / is_there.sum((1, 2))

    def deviation(self) -> Tensor:
        """The standard deviation of finite costs, ``[B]``, float64."""
        is_there, mean = self.tensor < torch.inf, self.mean().view(-1, 1, 1)
        squares = torch.where(is_there, self.tensor.detach() - mean, 0).square().sum((1, 2))
        return (squares / is_there.sum((1, 2))).sqrt()

    def range(self) -> Tensor:
        """Between finite costs, ``[B]``, float64."""
        costs = self.tensor.detach()
        largest = torch.where(costs < torch.inf, costs, -torch.inf).amax((1, 2))
        return (largest - costs.amin((1, 2))).double()

    def check(self, operator: str, a: Tensor, b: Tensor, rho_a: Tensor | None, rho_b: Tensor | None) -> None:
        """Errors for costs under which there is no plan; where values may be read."""
        cost = self.tensor.detach()
        # The sum of finite numbers is finite but for an overflow: one cheap pass.
        if not _checks.reads_values(cost) or math.isfinite(cost.sum().item()):
            return
        wrong = cost[~(cost > -torch.inf)]
        if wrong.numel() > 0:
            raise ValueError(
                f"{operator}: expected cost without NaN and -inf, got {wrong[0].item()}; +inf forbids a pair"
            )
        has_weight = (a > 0).unsqueeze(2) & (b > 0).unsqueeze(1)
        is_possible = (cost < torch.inf) & has_weight
        for name, weights, rho, dim in (("a", a, rho_a, 2), ("b", b, rho_b, 1)):
            stuck = ~is_possible.any(dim) & (weights > 0)
            if rho is not None:
                stuck &= rho == torch.inf
            if bool(stuck.any()):
                problem, entry = stuck.nonzero()[0].tolist()
                line = "row" if name == "a" else "column"
                raise ValueError(
                    f"{operator}: every cost in {line} {entry} of problem {problem} is infinite, or forbids what has a "
                    f"weight, but {name} = {weights[problem, entry].item():.3g} there must be transported; make it 0, "
                    f"or give rho_{name}"
                )

    # ---- differentiable ----

    def potentials(self, *problem: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _potentials.potentials(self.tensor, *problem)  # type: ignore[no-any-return]

    def value(self, row: Side, column: Side) -> Tensor:
        tensors = (row.weights, column.weights, row.potentials, column.potentials, row.rho, column.rho, row.epsilon)
        return _potentials.value(self.tensor, *tensors, row.is_counting)  # type: ignore[no-any-return]

    def paired(self) -> Tensor:
        """Costs between entry i of the rows and of the columns, ``[B, n]``, float64."""
        return self.tensor.diagonal(dim1=1, dim2=2).double()

    def plan(self, row: Side, column: Side) -> Tensor:
        return _potentials.plan(self.tensor, row, column)

    def product(self, potentials: Tensor, column: Side, z: Tensor) -> Tensor:
        """``E B z [B, n, k]`` under row potentials ``[B, n]``: ``P z`` for ``row.extended``, but that rows of weight 0
        count as if it were 1."""
        extended = self._exponential(potentials, column.extended, column.epsilon)
        return extended @ (column.factors.unsqueeze(2).to(z.dtype) * z)

    def transposed_product(self, row: Side, potentials: Tensor, z: Tensor) -> Tensor:
        """``E^T A z [B, m, k]``."""
        extended = self._exponential(row.extended, potentials, row.epsilon)
        return extended.mT @ (row.factors.unsqueeze(2).to(z.dtype) * z)

    def total(self, row: Side, column: Side) -> Tensor:
        """``<P, C>``, ``[B]``; forbidden pairs add nothing."""
        return (self.plan(row, column) * torch.where(self.tensor == torch.inf, 0, self.tensor)).sum((1, 2))

    def _exponential(self, f: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
        return _potentials.exponential_plan(self.tensor, f, g, epsilon, self.dtype)  # type: ignore[no-any-return]

"""Functions of rows, computed in panels of rows and differentiable to any order, of which no more is held than a panel.

Such a function takes tensors of rows, ``[B, n, ...]``, and tensors that all rows share; it gives results of rows, and
sums over rows. Its gradient is such a function again: of all these and of the upstream gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

# Entries of a panel: 2 MB of double for each step of its computation.
_ENTRIES = 1 << 18


@dataclass(frozen=True)
class RowFunction:
    """``compute(rows, shared) -> (results of rows, sums)``, and of how many tensors each of them is."""

    compute: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
    rows: int
    shared: int
    row_results: int
    sums: int

    def __call__(self, width: int, *tensors: Tensor) -> Tensors:
        """Results of rows and sums, of rows and what they share; a row is worth ``width`` entries."""
        return _InPanels.apply(self, width, *tensors)  # type: ignore[no-any-return, no-untyped-call]

    def pullback(self) -> RowFunction:
        """The gradients of rows and of what they share."""

        def compute(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
            def flat(*tensors: Tensor) -> Tensors:
                of_rows, sums = self.compute(tensors[: self.rows], tensors[self.rows :])
                return *of_rows, *sums

            pull = torch.func.vjp(flat, *rows[: self.rows], *shared[: self.shared])[1]
            gradients = pull((*rows[self.rows :], *shared[self.shared :]))
            return gradients[: self.rows], gradients[self.rows :]

        return RowFunction(compute, self.rows + self.row_results, self.shared + self.sums, self.rows, self.shared)


class _InPanels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: RowFunction, width: int, *tensors: Tensor) -> Tensors:
        rows, shared = tensors[: function.rows], tensors[function.rows :]
        batch, count = rows[0].shape[:2]
        height = max(_ENTRIES // max(batch * width, 1), 1)
        results: list[Tensors] = []
        sums: Tensors = ()
        for first in range(0, max(count, 1), height):
            of_rows, more = function.compute(tuple(part[:, first : first + height] for part in rows), shared)
            results.append(of_rows)
            sums = tuple(map(torch.add, sums, more)) if sums else more
        return *(torch.cat(parts, 1) for parts in zip(*results, strict=True)), *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, ctx.width, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        function, tensors = ctx.function, ctx.saved_tensors
        rows, shared = tensors[: function.rows], tensors[function.rows :]
        of_rows, of_sums = gradients[: function.row_results], gradients[function.row_results :]
        return None, None, *function.pullback()(ctx.width, *rows, *of_rows, *shared, *of_sums)

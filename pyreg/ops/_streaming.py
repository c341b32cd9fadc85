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

# Entries of a panel: 1 MB of double for each step of its computation.
_ENTRIES = 1 << 17


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

            tensors, upstream = (
                (*rows[: self.rows], *shared[: self.shared]),
                (*rows[self.rows :], *shared[self.shared :]),
            )
            gradients = _gradients(flat, tensors, upstream)
            return gradients[: self.rows], gradients[self.rows :]

        return RowFunction(compute, self.rows + self.row_results, self.shared + self.sums, self.rows, self.shared)


def _gradients(function: Callable[..., Tensors], tensors: Tensors, upstream: Tensors) -> Tensors:
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(function, *tensors)[1](upstream)  # type: ignore[no-any-return]
    # What torch.func.vjp holds is let go of by the garbage collector alone: all panels would be there at a time.
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [x.view_as(x) if with_graph and x.requires_grad else x.detach().requires_grad_() for x in tensors]
        pairs = [pair for pair in zip(function(*leaves), upstream, strict=True) if pair[0].requires_grad]
        results, gradients = zip(*pairs, strict=True)
        return torch.autograd.grad(results, leaves, gradients, create_graph=with_graph, materialize_grads=True)


class _InPanels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: RowFunction, width: int, *tensors: Tensor) -> Tensors:
        rows, shared = tensors[: function.rows], tensors[function.rows :]
        batch, count = rows[0].shape[:2]
        height = max(_ENTRIES // max(batch * width, 1), 1)
        # Small results kept one by one between a panel's large tensors would keep the heap from using these again.
        results: Tensors = ()
        sums: Tensors = ()
        for first in range(0, max(count, 1), height):
            of_rows, more = function.compute(tuple(part[:, first : first + height] for part in rows), shared)
            if first == 0:
                results = tuple(part.new_empty(batch, count, *part.shape[2:]) for part in of_rows)
                sums = tuple(torch.zeros_like(part) for part in more)
            for whole, part in zip(results, of_rows, strict=True):
                whole[:, first : first + height] = part
            for total, part in zip(sums, more, strict=True):
                total += part
        return *results, *sums

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

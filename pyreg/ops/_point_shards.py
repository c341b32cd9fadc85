"""Transport between points of which each rank of a process group has some of the rows, and all of the columns.

An iteration is the kernel's own on a rank's rows, with columns of weight 1, whose potentials then are ``-eps`` times
the logarithms of this rank's share of the columns' sums: these, ``[B, m]``, and the error are what ranks exchange, in
one message an iteration. A row's potential, its part of the plan and its point's gradient are a matter of its rank
alone; what is summed over rows is summed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyreg.ops import _library, _log_domain, _point_potentials, _potentials, _ranks
from pyreg.ops._point_cost import PointCost
from pyreg.ops._potentials import Side
from pyreg.ops._problems import Entries, Problems

T = TypeVar("T")


class ShardedEntries(Entries):
    """The rows of one rank."""

    def __init__(self, operator: str, shape: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(shape)
        self.group, self._operator, self._device = group, operator, device
        self.total = 0  # rows of all ranks, once they are known

    def exchange(self, *facts: int) -> list[list[int]]:
        """Of all ranks. Waits for them, and for a GPU."""
        own = torch.tensor(facts, device=self._device)
        return torch.stack(_ranks.all_gather(own, self.group)).tolist()

    def agree(self, check: Callable[[], T]) -> T:
        """An error on one rank is one on all: none is left waiting for the others."""
        failure, result = None, None
        try:
            result = check()
        except (ValueError, TypeError) as error:
            failure = error
        failed = [rank for rank, (has_failed,) in enumerate(self.exchange(failure is not None)) if has_failed]
        if failure is not None:
            raise failure
        if failed:
            raise ValueError(f"{self._operator}: rank {failed[0]} of group has refused its arguments; see its error")
        return result  # type: ignore[return-value]

    def check_alike(self, problems: Problems, d: int, dtype: torch.dtype) -> None:
        """Counts the rows; an error unless ranks have the same columns and batch."""
        alike = problems.columns.count, d, dtype.itemsize, len(problems.shape), math.prod(problems.shape)
        everyone = self.exchange(self.count, *alike)
        if any(facts[1:] != everyone[0][1:] for facts in everyone):
            found = [f"m={m}, d={d}, {8 * size} bits, {batch} problems" for _, m, d, size, _, batch in everyone]
            raise ValueError(
                f"{self._operator}: expected y, the points' dimension, dtype and batch to be the same on all ranks of "
                f"group, got {found}"
            )
        self.total = sum(facts[0] for facts in everyone)

    def over_ranks(self, numbers: Tensor) -> Tensor:
        numbers = numbers.detach().clone(memory_format=torch.contiguous_format)
        if numbers.numel() > 0:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def uniform(self, like: Tensor) -> Tensor:
        return super().uniform(like) * (self.count / self.total)

    def __str__(self) -> str:
        return f"{self.count} of {self.total}"


class ShardedPointCost(PointCost):
    """Of problems whose rows are :class:`ShardedEntries`. Of what is found by it only the value has gradients."""

    def __init__(self, operator: str, x: Tensor, y: Tensor, cost: str, problems: Problems) -> None:
        super().__init__(x, y, cost, problems, streaming=True)
        assert isinstance(problems.rows, ShardedEntries)
        self._operator, self._rows = operator, problems.rows

    # ---- constants ----

    def mean(self) -> Tensor:
        return self._rows.over_ranks(super().mean() * (self._rows.count / self._rows.total))

    def bounds(self) -> tuple[Tensor, Tensor]:
        least, most = super().bounds()
        both = torch.stack(_ranks.all_gather(torch.stack([-least, most]), self._rows.group)).amax(0)
        return -both[0], both[1]

    # ---- the iteration ----

    def potentials(
        self,
        a: Tensor,
        b: Tensor,
        rho_a: Tensor | None,
        rho_b: Tensor | None,
        epsilon: Tensor,
        first_epsilon: Tensor,
        epsilon_factor: float,
        is_counting: bool,
        max_iter: int,
        tol: float,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = (points.detach().contiguous() for points in self.points)
        a, b = a.detach(), b.detach()
        log_a, log_b, ones, zeros = a.log(), b.log(), torch.ones_like(b), torch.zeros_like(b)
        # A number on the points' device, which is where the group's ranks exchange.
        penalised = self._rows.over_ranks(epsilon.new_full((1,), rho_a is not None))
        is_balanced = penalised.item() == 0 and rho_b is None

        def own(g: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
            """This rank's potentials, and the logarithms of its sums of the columns."""
            f, found, *_ = _library.operator("sinkhorn_points")(
                *(x, y, self.code, True, a, ones, log_a, zeros, rho_a, None, current, current, 0.5, is_counting),
                *(1, 0.0, g),
            )
            return f, torch.where(found == -torch.inf, -torch.inf, -found / current.unsqueeze(1))

        def update(f: Tensor, g: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            new_f, sums = own(g, current)
            error = _log_domain.error_of(new_f - f, a, rho_a, current, is_balanced)
            everyone = torch.stack(_ranks.all_gather(torch.cat([sums, error.unsqueeze(1)], 1), self._rows.group))
            sums, error = everyone[..., :-1].logsumexp(0), everyone[..., -1].sum(0)
            return new_f, _log_domain.new_potentials(sums, log_b, rho_b, current, is_counting), error

        with_a, with_b, error, iterations = _log_domain.iterate(
            update, torch.zeros_like(a), initial, epsilon, first_epsilon, epsilon_factor, max_iter, tol
        )
        rows, columns = _potentials.sides(a, b, with_a, with_b, rho_a, rho_b, epsilon, is_counting)
        f = _point_potentials.without_weights((x, y), self.code, rows, with_b, None)
        return f, self._bare_columns(columns, with_a, x, y), error, iterations

    def _bare_columns(self, columns: Side, with_a: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Potentials without the weights, of columns of weight 0 too."""
        unknown = columns.potentials == -torch.inf
        options = self.code, with_a, columns.epsilon
        own = -_point_potentials.conditional(y, x, *options) / columns.epsilon.unsqueeze(1)
        sums = torch.stack(_ranks.all_gather(own, self._rows.group)).logsumexp(0)
        found = -columns.kappa * columns.epsilon.unsqueeze(1) * sums
        return torch.where(unknown, found, columns.bare)

    # ---- what is found ----

    def guarded(self, row: Side, column: Side) -> tuple[Side, Side]:
        """With potentials that have no gradients, and say so."""
        f, g = _Constant.apply(  # type: ignore[no-untyped-call]
            self._operator, row.potentials, column.potentials, *self.points, row.weights, column.weights
        )
        return replace(row, potentials=f), replace(column, potentials=g)

    def value(self, row: Side, column: Side) -> Tensor:
        potentials = row.potentials.detach(), column.potentials.detach()
        tensors = (row.weights, column.weights, *potentials, row.rho, column.rho, row.epsilon)
        return _Value.apply(self._rows, self._operator, *self.points, *tensors, self.code, row.is_counting)  # type: ignore[no-any-return, no-untyped-call]

    def transposed_product(self, row: Side, potentials: Tensor, z: Tensor) -> Tensor:
        return _SumOverRanks.apply(super().transposed_product(row, potentials, z), self._rows)  # type: ignore[no-any-return, no-untyped-call]

    def total(self, row: Side, column: Side) -> Tensor:
        return _SumOverRanks.apply(super().total(row, column), self._rows)  # type: ignore[no-any-return, no-untyped-call]


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, f: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        ctx.operator = operator
        return f.view_as(f), g.view_as(g)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.operator}: with group, of what is found only value has a gradient in points and weights; detach the "
            "others, or solve the problem on one rank"
        )


class _SumOverRanks(torch.autograd.Function):
    """Every rank gets the sum, and has the same upstream gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: ShardedEntries) -> Tensor:
        return rows.over_ranks(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: ShardedEntries, operator: str, *inputs: Any) -> Tensor:
        x, y, *tensors, ctx.point_cost, ctx.is_counting = inputs
        ctx.rows, ctx.operator = rows, operator
        ctx.save_for_backward(x, y, *tensors)
        return _potentials.dual_value(*_sides(tensors, ctx.is_counting), rows.over_ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _ranks.refuse_create_graph(ctx.operator)
        x, y, *tensors = ctx.saved_tensors
        sides = _sides(tensors, ctx.is_counting)
        needs = _point_potentials.Needs(*ctx.needs_input_grad[2:6])
        over_ranks = ctx.rows.over_ranks
        gradients = _point_potentials.value_gradients((x, y), *sides, ctx.point_cost, gradient, needs, over_ranks)
        return None, None, *gradients, *(None,) * 7


def _sides(tensors: list[Any], is_counting: bool) -> tuple[Side, Side]:
    a, b, f, g, rho_a, rho_b, epsilon = tensors
    return _potentials.sides(a, b, f, g, rho_a, rho_b, epsilon, is_counting)

"""A cost between points, and what a transport asks of it: never the matrix, but for the plan itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _checks, _pairwise_cost, _point_potentials, _potentials
from pyreg.ops._memory import available_bytes
from pyreg.ops._point_plan import point_plan
from pyreg.ops._potentials import Side
from pyreg.ops._problems import Entries, Problems

# K up to this size is held, for reading it is faster than exponentials: 5000 x 5000 points on two cores, 30 iterations
# in float32, 0.35 s held and 0.73 s formed anew in three dimensions, 0.9 and 4.0 s in 64.
_HELD_BYTES = 128 << 20

# From so many dimensions on it is held, too, where it leaves three quarters of the memory free.
_HIGH_DIMENSION = 8
_SHARE_OF_MEMORY = 4


class PointCost:
    """``x [B, n, d]`` and ``y [B, m, d]``, float64 or float32; has the methods of
    :class:`~pyreg.ops._dense_cost.DenseCost`."""

    def __init__(self, x: Tensor, y: Tensor, cost: str, problems: Problems, streaming: bool | None) -> None:
        self.points = (x, y) if cost != "cosine" else (_pairwise_cost.units(x), _pairwise_cost.units(y))
        self._cost, self.code, self._problems = cost, _pairwise_cost.COSTS.index(cost), problems
        self._is_streaming = self._must_stream() if streaming is None else streaming

    @property
    def dtype(self) -> torch.dtype:
        return self.points[0].dtype

    # ---- constants ----

    def mean(self) -> Tensor:
        """``[B]``, float64."""
        return self._mean(*(points.detach() for points in self.points))

    def _mean(self, x: Tensor, y: Tensor) -> Tensor:
        sides = (self._problems.rows, x), (self._problems.columns, y)
        u, z = (_without(entries, points.new_ones((*points.shape[:2], 1)), 0) for entries, points in sides)
        zeros = (
            _without(entries, points.new_zeros(points.shape[:2], dtype=torch.float64), -torch.inf)
            for entries, points in sides
        )
        # At an epsilon without end every entry of E is 1.
        everywhere = x.new_full((x.shape[0],), 1e30, dtype=torch.float64)
        options: dict[str, Any] = {"z": z, "rows": True, "times_cost": True}
        rows, *_ = point_plan((x, y), tuple(zeros), everywhere, self.code, **options)  # type: ignore[arg-type]
        count = u.sum(1, dtype=torch.float64) * z.sum(1, dtype=torch.float64)
        return ((rows * u).sum(1, dtype=torch.float64) / count).squeeze(1)

    def deviation(self) -> Tensor:
        """The standard deviation of costs, ``[B]``, float64: of moments of the points, but for distances, whose mean
        takes a pass over the pairs.

        With ``p = x - mean``, ``q = y - mean`` costs are ``alpha_i + beta_j - s p_i . q_j`` and a constant. The three
        are uncorrelated, for the means of p and q are 0, and ``mean (p_i . q_j)^2 = tr(Sigma_x Sigma_y)``."""
        x, y = (points.detach().double() for points in self.points)
        w, v = (entries.uniform(x).unsqueeze(2) for entries in (self._problems.rows, self._problems.columns))
        x_mean, y_mean = ((weights * points).sum(1, keepdim=True) for weights, points in ((w, x), (v, y)))
        p, q, apart = x - x_mean, y - y_mean, x_mean - y_mean
        if self._cost == "euclidean":
            squares = sum(((weights * part.square()).sum((1, 2)) for weights, part in ((w, p), (v, q))))
            squares = squares + apart.square().sum((1, 2))
            return (squares - self._mean(x, y).square()).clamp(min=0).sqrt()
        if self._cost == "sqeuclidean":
            alpha, beta = (part * (part + 2 * by) for part, by in ((p, apart), (q, -apart)))
            scale = 4
        else:
            alpha, beta, scale = p * y_mean, q * x_mean, 1
        variance = scale * _mean_square_of_products(p, q, w, v)
        for weights, part in ((w, alpha.sum(2, keepdim=True)), (v, beta.sum(2, keepdim=True))):
            variance = variance + (weights * (part - (weights * part).sum(1, keepdim=True)).square()).sum((1, 2))
        return variance.sqrt()

    def range(self) -> Tensor:
        """Of costs, ``[B]``, float64: a bound."""
        least, most = self.bounds()
        return most - least

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Between which costs are, ``[B]``, float64: from boxes and balls that hold all x and all y."""
        x, y = (points.detach().double() for points in self.points)
        if self._cost == "cosine":
            return x.new_zeros(x.shape[:1]), x.new_full(x.shape[:1], 2)
        (x_least, x_most, x_centre, x_radius), (y_least, y_most, y_centre, y_radius) = (
            _bounds(entries, points) for entries, points in ((self._problems.rows, x), (self._problems.columns, y))
        )
        apart = torch.maximum(x_least - y_most, y_least - x_most).clamp(min=0)
        across = torch.maximum(x_most - y_least, y_most - x_least)
        centres, radii = torch.linalg.vector_norm(x_centre - y_centre, dim=1), x_radius + y_radius
        least = torch.maximum(torch.linalg.vector_norm(apart, dim=1), centres - radii)
        most = torch.minimum(torch.linalg.vector_norm(across, dim=1), centres + radii)
        return (least, most) if self._cost == "euclidean" else (least.square(), most.square())

    def check(self, operator: str, a: Tensor, b: Tensor, rho_a: Tensor | None, rho_b: Tensor | None) -> None:
        """An error for points so far apart that their costs overflow; where values may be read."""
        x, y = (points.detach() for points in self.points)
        if self._cost == "cosine" or not _checks.reads_values(x) or x.shape[0] == 0:
            return
        most, least = (
            torch.stack([function(x.flatten(0, 1), 0), function(y.flatten(0, 1), 0)]).double()
            for function in (torch.amax, torch.amin)
        )
        square = (most.amax(0) - least.amin(0)).square().sum().item()
        if not square < torch.finfo(self.dtype).max:
            raise ValueError(
                f"{operator}: expected points whose squared distances are numbers of {self.dtype}, got some "
                f"{math.sqrt(square):.3g} apart; scale them down, and epsilon with the costs"
            )

    # ---- differentiable ----

    def potentials(self, *problem: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = (points.contiguous() for points in self.points)
        padding = self._problems.rows.padding, self._problems.columns.padding
        return _point_potentials.potentials(x, y, self.code, self._is_streaming, *problem, *padding)  # type: ignore[no-any-return]

    def value(self, row: Side, column: Side) -> Tensor:
        tensors = (row.weights, column.weights, row.potentials, column.potentials, row.rho, column.rho, row.epsilon)
        return _point_potentials.value(*self.points, *tensors, self.code, row.is_counting)  # type: ignore[no-any-return]

    def paired(self) -> Tensor:
        """Costs between entry i of the rows and of the columns, ``[B, n]``, float64; of the differences in the points'
        dtype that all costs are of."""
        x, y = self.points
        if self._cost == "cosine":
            return 1 - (x.double() * y).sum(2)
        squares = (x - y).double().square().sum(2)
        if self._cost == "sqeuclidean":
            return squares
        return torch.where(squares > 0, squares, 1).sqrt().where(squares > 0, 0)

    def plan(self, row: Side, column: Side) -> Tensor:
        return _potentials.plan(_pairwise_cost.cost_of_computed(*self.points, self.code), row, column)

    def product(self, potentials: Tensor, column: Side, z: Tensor) -> Tensor:
        """``E B z [B, n, k]``."""
        z = column.factors.unsqueeze(2).to(z.dtype) * z
        extended = potentials, column.extended
        return point_plan(self.points, extended, column.epsilon, self.code, z=z, rows=True)[0]

    def conditional_product(self, x: Tensor, column: Side, z: Tensor) -> Tensor:
        """``E B z [B, q, k]`` of other rows' points ``x [B, q, d]``, under potentials that are constants and with which
        rows of E B sum to 1: to be divided by that sum, which has a gradient."""
        x = _pairwise_cost.units(x) if self._cost == "cosine" else x
        y = self.points[1]
        options = self.code, column.masked, column.epsilon
        with torch.no_grad():
            potentials = _point_potentials.conditional(x.contiguous(), y.contiguous(), *options)
        z = column.factors.unsqueeze(2).to(z.dtype) * z
        extended = potentials, column.extended
        return point_plan((x, y), extended, column.epsilon, self.code, z=z, rows=True)[0]

    def transposed_product(self, row: Side, potentials: Tensor, z: Tensor) -> Tensor:
        """``E^T A z [B, m, k]``."""
        u = row.factors.unsqueeze(2).to(z.dtype) * z
        extended = row.extended, potentials
        return point_plan(self.points, extended, row.epsilon, self.code, u=u, columns=True)[1]

    def total(self, row: Side, column: Side) -> Tensor:
        """``<P, C>``, ``[B]``."""
        z, extended = column.factors.unsqueeze(2).to(self.dtype), (row.extended, column.extended)
        rows, *_ = point_plan(self.points, extended, row.epsilon, self.code, z=z, rows=True, times_cost=True)
        return (row.factors * rows.squeeze(2)).sum(1)

    # ---- inside ----

    def _must_stream(self) -> bool:
        x, y = self.points
        needed = x.shape[1] * y.shape[1] * x.element_size()
        if needed <= _HELD_BYTES:
            return False
        available = None if torch.compiler.is_compiling() else available_bytes(x.device)
        return x.shape[2] < _HIGH_DIMENSION or available is None or needed > available // _SHARE_OF_MEMORY


def _without(entries: Entries, inside: Tensor, fill: float) -> Tensor:
    """With padding filled."""
    if entries.padding is None:
        return inside
    return inside.masked_fill(entries.padding.reshape(inside.shape[:2] + (1,) * (inside.dim() - 2)), fill)


def _mean_square_of_products(p: Tensor, q: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """``sum_ij w_i v_j (p_i . q_j)^2``, ``[B]``, of what is smaller: matrices ``[d, d]`` or one ``[n, m]``."""
    if p.shape[2] ** 2 <= p.shape[1] * q.shape[1]:
        return ((p.mT @ (w * p)) * (q.mT @ (v * q))).sum((1, 2))
    return (w * (p @ q.mT).square() * v.mT).sum((1, 2))


def _bounds(entries: Entries, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[B, d]`` the box's corners and its centre, ``[B]`` the radius around that, of ``[B, n, d]``."""
    least, most = _without(entries, points, math.inf).amin(1), _without(entries, points, -math.inf).amax(1)
    centre = (least + most) / 2
    radius = _without(entries, torch.linalg.vector_norm(points - centre.unsqueeze(1), dim=2), 0).amax(1)
    return least, most, centre, radius

"""The result of entropic optimal transport: potentials, value, plan, and what is computed with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyreg.ops import _convergence, _library
from pyreg.ops._dense_cost import DenseCost
from pyreg.ops._memory import check_memory
from pyreg.ops._point_cost import PointCost
from pyreg.ops._potentials import Side
from pyreg.ops._problems import Entries, Problems


class Progress(NamedTuple):
    """How far the iteration has come, ``[B]``, and was asked to."""

    error: Tensor
    iterations: Tensor
    tol: float
    max_iter: int

    def warn(self, operator: str) -> None:
        """Of problems that have not converged, unless all iterations were asked for, by a tolerance of 0; not while
        tracing or inside of torch.func. Waits for a GPU."""
        if self.tol == 0 or not _library.can_read(self.error):
            return
        failed = ~(self.error <= self.tol)
        if not bool(failed.any()):
            return
        count = self.error.numel()
        which = f"{int(failed.sum())} of {count} problems have" if count > 1 else "the iteration has"
        _convergence.warn(
            f"{operator}: {which} not converged: after {int(self.iterations.max())} iterations marginal_error is "
            f"{self.error[failed].max().item():.2g}, above tol = {self.tol:g}; raise max_iter (here {self.max_iter}), "
            "epsilon or tol, or pass epsilon_scaling=0.5"
        )


class Transport:
    r"""Entropic optimal transport between weights a and b, as :func:`pyreg.functional.sinkhorn` and
    :func:`~pyreg.functional.sinkhorn_points` return it.

    .. code-block:: text

        P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)       reference "product"
        P_ij = exp((f_i + g_j - C_ij) / epsilon)               reference "counting"

    ``...`` below are the batch dimensions, none for a single problem; of a ragged batch ``[..., n]`` is ``[N]``, that
    of its problems one after another, and numbers are ``[B]``. Results have the cost's dtype, float32 for 16-bit costs,
    and are differentiable in the cost, or the points, and the weights: ``value`` by the envelope theorem, everything
    else through the potentials, by implicit differentiation. Gradients are those of the converged problem, as good as
    the potentials are.

    On CUDA nothing has waited for the iteration yet: the first look at a property does, to warn of problems that have
    not converged.
    """

    def __init__(
        self,
        operator: str,
        cost: DenseCost | PointCost,
        row: Side,
        column: Side,
        progress: Progress,
        problems: Problems,
        points: Tensor | None = None,
    ) -> None:
        self._operator, self._cost, self._row, self._column = operator, cost, row, column
        self._progress, self._problems, self._dtype, self._points = progress, problems, cost.dtype, points
        self._value = problems.numbers(cost.value(row, column))  # float64
        self._has_looked = False
        if row.weights.is_cpu:
            self._look()

    # ---- properties ----

    @property
    def value(self) -> Tensor:
        """``[...]``, what is minimised: the transport cost with entropy and penalties."""
        self._look()
        return self._value.to(self._dtype)

    @property
    def f(self) -> Tensor:
        """The potentials of the rows, ``[..., n]``. Where no penalty is finite they are known up to a constant, which
        is chosen so that ``<a, f> = <b, g>`` for those of "product"."""
        self._look()
        return self._problems.rows.outside(self._row.public).to(self._dtype)

    @property
    def g(self) -> Tensor:
        """The potentials of the columns, ``[..., m]``."""
        self._look()
        return self._problems.columns.outside(self._column.public).to(self._dtype)

    @property
    def n_iter(self) -> Tensor:
        """``[...]``, int64: the iterations made, in all stages of epsilon."""
        self._look()
        return self._problems.numbers(self._progress.iterations)

    @property
    def marginal_error(self) -> Tensor:
        """``[...]``, float64: what the iteration has reached. Of a problem without penalties the L1 norm of ``P 1 - a``
        (``P^T 1 = b`` holds after every iteration), else ``sum_i a_i |change of f_i| / (kappa_i epsilon)`` in the last
        one, with ``kappa = rho / (rho + epsilon)``: by how much masses are off from what potentials ask for."""
        self._look()
        return self._problems.numbers(self._progress.error)

    @property
    def converged(self) -> Tensor:
        """``[...]``, bool: whether ``marginal_error`` is at most ``tol``."""
        self._look()
        return self._problems.numbers(self._progress.error <= self._progress.tol)

    @property
    def epsilon(self) -> Tensor:
        """``[...]``, float64."""
        return self._problems.numbers(self._row.epsilon)

    @property
    def reference(self) -> str:
        return "counting" if self._row.is_counting else "product"

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """``P 1 [..., n]`` and ``P^T 1 [..., m]``."""
        rows, columns = (side.weights.new_ones((*side.weights.shape, 1)) for side in (self._row, self._column))
        of_rows, of_columns = self._times(columns.to(self._dtype)), self._transposed_times(rows.to(self._dtype))
        return self._problems.rows.outside(of_rows.squeeze(2)), self._problems.columns.outside(of_columns.squeeze(2))

    # ---- methods ----

    # To type checkers a list is Any: with ``Tensor | list[Tensor]`` every use of a plan would have to ask which it is.
    def plan(self) -> Tensor | Any:
        """``P [..., n, m]``, held as a whole; of a ragged batch a list of ``[n, m]``.

        Raises:
            ValueError: it is larger than the memory that is left.
        """
        self._look()
        shape = (*self._row.weights.shape, self._column.weights.shape[1])
        check_memory(self._operator, "plan()", shape, self._value.to(self._dtype))
        return self._problems.matrices(self._cost.plan(self._row, self._column))

    def apply(self, z: Tensor) -> Tensor:
        """``P z [..., n]`` or ``[..., n, k]`` of ``z [..., m]`` or ``[..., m, k]``."""
        inside, is_vector = self._inside("apply", "z", z, self._problems.columns, "m")
        result = self._problems.rows.outside(self._times(inside))
        return result.squeeze(-1) if is_vector else result

    def apply_transpose(self, z: Tensor) -> Tensor:
        """``P^T z [..., m]`` or ``[..., m, k]`` of ``z [..., n]`` or ``[..., n, k]``."""
        inside, is_vector = self._inside("apply_transpose", "z", z, self._problems.rows, "n")
        result = self._problems.columns.outside(self._transposed_times(inside))
        return result.squeeze(-1) if is_vector else result

    def barycentric_map(self, points: Tensor | None = None) -> Tensor:
        """``T_i = sum_j P_ij y_j / sum_j P_ij``, ``[..., n, d]``: where row i goes in the mean.

        Rows of weight 0 are mapped as rows of little weight are; a row whose costs are all infinite goes to 0.

        Args:
            points: ``y [..., m, d]``; those of :func:`~pyreg.functional.sinkhorn_points` by default.
        """
        y = self._points if points is None else self._target_points(points)
        if y is None:
            raise ValueError(
                f"{self._operator}: barycentric_map: expected points y [..., m, d], for the problem was given by its "
                "costs, got None; pass them, or use sinkhorn_points"
            )
        self._look()
        with _library.no_autocast(y):
            with_ones = torch.cat([y, torch.ones_like(y[..., :1])], 2)
            sums = self._cost.product(self._row.conditional, self._column, with_ones)
        mass = sums[..., -1:]
        return self._problems.rows.outside(torch.where(mass > 0, sums[..., :-1] / torch.where(mass > 0, mass, 1), 0))

    def map(self, points: Tensor) -> Tensor:
        r"""The entropic map, ``[..., q, d]`` of points ``[..., q, d]`` that need not be among x: where a point goes in
        the mean.

        .. code-block:: text

            T(x) = sum_j w_j(x) y_j / sum_j w_j(x),    w_j(x) = b_j exp((g_j - c(x, y_j)) / epsilon)

        ("counting": without b, and g as it has it.) At the problem's own x it is :meth:`barycentric_map`. It needs
        O((q + m) d) memory and is differentiable in the points and in all that the potentials g depend on.

        Args:
            points: of the dtype of ``value``; of a ragged batch ``[B, q, d]``.

        Raises:
            ValueError: the problem was given by its costs, or by a function that returns them; the shape does not fit.
            TypeError: another dtype or device.

        Source: Pooladian, Niles-Weed, "Entropic estimation of optimal transport maps", arXiv 2109.12004.

        Example:
            >>> x, y = torch.randn(50, 2), torch.randn(60, 2) + 1
            >>> transport = pyreg.functional.sinkhorn_points(x, y, epsilon=0.1)
            >>> transport.map(torch.randn(1000, 2)).shape
            torch.Size([1000, 2])
        """
        where, cost, y = f"{self._operator}: map", self._cost, self._points
        if not isinstance(cost, PointCost) or y is None:
            raise ValueError(
                f"{where}: a problem that is given by its costs knows none of other points; use sinkhorn_points with "
                "one of its own costs, or barycentric_map for the problem's own rows"
            )
        self._check_beside_value(where, "points", points)
        batch, d = self._problems.shape, y.shape[2]
        if points.dim() != len(batch) + 2 or points.shape[:-2] != batch or points.shape[-1] != d:
            expected = "[" + "".join(f"{size}, " for size in batch) + f"q, {d}]"
            raise ValueError(
                f"{where}: expected points of shape [..., q, d] = {expected}, got {list(points.shape)}"
                + ("; use points.unsqueeze(-2) for one point" if points.shape == (*batch, d) else "")
            )
        self._look()
        if points.numel() == 0:
            return points.clone()
        with _library.no_autocast(y):
            with_ones = torch.cat([y, torch.ones_like(y[..., :1])], 2)
            sums = cost.conditional_product(points.reshape(-1, *points.shape[-2:]), self._column, with_ones)
        return (sums[..., :-1] / sums[..., -1:]).reshape(points.shape)

    def transport_cost(self) -> Tensor:
        """``<P, C> [...]``, without entropy and penalties."""
        self._look()
        return self._problems.numbers(self._cost.total(self._row, self._column)).to(self._dtype)

    def potentials(self) -> tuple[Tensor, Tensor]:
        """f and g as constants in float64, for another problem to begin with."""
        f, g = self._row.public.detach(), self._column.public.detach()
        return self._problems.rows.outside(f), self._problems.columns.outside(g)

    def __repr__(self) -> str:
        error, iterations, tol, _ = self._progress
        described, count = f"Transport({self._problems}, reference={self.reference!r}", error.numel()
        if count == 0:
            return described + ")"
        converged = int((error <= tol).sum())
        state = f"{converged} of {count} converged" if count > 1 else ("converged" if converged else "not converged")
        most = f"{state} after {int(iterations.max())} iterations, marginal_error={error.max().item():.1e}"
        return f"{described}, {most})"

    # ---- inside ----

    def _times(self, z: Tensor) -> Tensor:
        self._look()
        with _library.no_autocast(z):
            return self._row.factors.unsqueeze(2).to(z.dtype) * self._cost.product(self._row.extended, self._column, z)

    def _transposed_times(self, z: Tensor) -> Tensor:
        self._look()
        with _library.no_autocast(z):
            product = self._cost.transposed_product(self._row, self._column.extended, z)
            return self._column.factors.unsqueeze(2).to(z.dtype) * product

    def _target_points(self, points: Tensor) -> Tensor:
        inside, is_vector = self._inside("barycentric_map", "points", points, self._problems.columns, "m")
        if is_vector:
            raise ValueError(
                f"{self._operator}: barycentric_map: expected points of shape [..., m, d], got {list(points.shape)}; "
                "use points.unsqueeze(-1) for points on a line"
            )
        return inside

    def _inside(self, method: str, name: str, z: Tensor, entries: Entries, symbol: str) -> tuple[Tensor, bool]:
        """``[B, count, k]``, and whether z has no k."""
        where = f"{self._operator}: {method}"
        self._check_beside_value(where, name, z)
        is_vector = z.shape == entries.shape
        if not is_vector and z.shape[:-1] != entries.shape:
            raise ValueError(
                f"{where}: expected {name} of shape [..., {symbol}] = {list(entries.shape)} or [..., {symbol}, k], got "
                f"{list(z.shape)}"
            )
        return entries.inside(z.unsqueeze(-1) if is_vector else z), is_vector

    def _check_beside_value(self, where: str, name: str, z: Tensor) -> None:
        device = self._row.weights.device
        if not isinstance(z, Tensor):
            raise TypeError(f"{where}: expected {name} to be a tensor, got {type(z).__name__}")
        if z.dtype != self._dtype or z.device != device:
            raise TypeError(
                f"{where}: expected {name} of {self._dtype} on {device}, got {z.dtype} on {z.device}; convert it with "
                f"{name}.to(transport.value)"
            )

    def _look(self) -> None:
        """Warns once, as soon as the error can be read."""
        if not self._has_looked and _library.can_read(self._progress.error):
            self._has_looked = True
            self._progress.warn(self._operator)


def exact_value(transport: Transport) -> Tensor:
    """Its value in float64, ``[...]``: for what subtracts from it."""
    transport._look()
    return transport._value

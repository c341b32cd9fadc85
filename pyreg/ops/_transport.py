"""The result of entropic optimal transport: potentials, value, plan, and what is computed with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyreg.ops import _convergence, _library, _potentials
from pyreg.ops._potentials import Side


class DenseCost:
    """A cost that is held, ``[B, n, m]``, and what a transport asks of it; all of it differentiable."""

    def __init__(self, cost: Tensor) -> None:
        self.tensor = cost

    def potentials(self, *problem: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _potentials.potentials(self.tensor, *problem)  # type: ignore[no-any-return]

    def value(self, row: Side, column: Side) -> Tensor:
        tensors = (row.weights, column.weights, row.potentials, column.potentials, row.rho, column.rho, row.epsilon)
        return _potentials.value(self.tensor, *tensors, row.is_counting)  # type: ignore[no-any-return]

    def plan(self, row: Side, column: Side) -> Tensor:
        return _potentials.plan(self.tensor, row, column)

    def product(self, row: Side, column: Side, z: Tensor) -> Tensor:
        """``E B z [B, n, k]``: ``P z``, but that rows of weight 0 count as if it were 1."""
        return self._extended(row, column) @ (column.factors.unsqueeze(2).to(z.dtype) * z)

    def transposed_product(self, row: Side, column: Side, z: Tensor) -> Tensor:
        """``E^T A z [B, m, k]``."""
        return self._extended(row, column).mT @ (row.factors.unsqueeze(2).to(z.dtype) * z)

    def total(self, row: Side, column: Side) -> Tensor:
        """``<P, C>``, ``[B]``; forbidden pairs add nothing."""
        return (self.plan(row, column) * torch.where(self.tensor == torch.inf, 0, self.tensor)).sum((1, 2))

    def _extended(self, row: Side, column: Side) -> Tensor:
        potentials = row.extended, column.extended
        return _potentials.exponential_plan(  # type: ignore[no-any-return]
            self.tensor, *potentials, row.epsilon, self.tensor.dtype
        )


@dataclass(frozen=True)
class Batch:
    """Problems of one size: ``[*shape, n, m]`` outside, ``[B, n, m]`` inside."""

    shape: tuple[int, ...]
    n: int
    m: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.shape, self.n)

    @property
    def column_shape(self) -> tuple[int, ...]:
        return (*self.shape, self.m)

    def numbers(self, inside: Tensor) -> Tensor:
        return inside.reshape(self.shape)

    def rows(self, inside: Tensor) -> Tensor:
        return inside.reshape(*self.shape, *inside.shape[1:])

    def columns(self, inside: Tensor) -> Tensor:
        return self.rows(inside)

    def inside_rows(self, outside: Tensor) -> Tensor:
        return outside.reshape(-1, *outside.shape[len(self.shape) :])

    def inside_columns(self, outside: Tensor) -> Tensor:
        return self.inside_rows(outside)

    def __str__(self) -> str:
        return f"n={self.n}, m={self.m}" + (f", batch={list(self.shape)}" if self.shape else "")


class Progress(NamedTuple):
    """How far the iteration has come, ``[B]``, and was asked to."""

    error: Tensor
    iterations: Tensor
    tol: float
    max_iter: int


class Transport:
    r"""Entropic optimal transport between weights a and b, as :func:`pyreg.functional.sinkhorn` and
    :func:`~pyreg.functional.sinkhorn_points` return it.

    .. code-block:: text

        P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)       reference "product"
        P_ij = exp((f_i + g_j - C_ij) / epsilon)               reference "counting"

    ``...`` below are the batch dimensions of the problem, none for a single one. Results have the cost's dtype, float32
    for 16-bit costs, and are differentiable in the cost (or the points) and the weights: ``value`` by the envelope
    theorem, everything else through the potentials, by implicit differentiation. Both are right where the iteration has
    converged; the potentials' error is the gradients'.

    On CUDA nothing has waited for the iteration yet; the first look at one of the properties does, to warn where it has
    not converged.
    """

    def __init__(
        self,
        operator: str,
        cost: DenseCost,
        row: Side,
        column: Side,
        progress: Progress,
        batch: Batch,
        dtype: torch.dtype,
        points: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._operator, self._cost, self._row, self._column = operator, cost, row, column
        self._progress, self._batch, self._dtype, self._points = progress, batch, dtype, points
        self._value = batch.numbers(cost.value(row, column)).to(dtype)
        self._has_looked = False
        if row.weights.is_cpu:
            self._look()

    # ---- properties ----

    @property
    def value(self) -> Tensor:
        """``[...]``, what is minimised: the transport cost with entropy and penalties."""
        self._look()
        return self._value

    @property
    def f(self) -> Tensor:
        """The potentials of the rows, ``[..., n]``. Where no penalty is finite they are known up to a constant, which
        is chosen so that ``<a, f> = <b, g>`` of the reference "product"."""
        self._look()
        return self._batch.rows(self._row.public).to(self._dtype)

    @property
    def g(self) -> Tensor:
        """The potentials of the columns, ``[..., m]``."""
        self._look()
        return self._batch.columns(self._column.public).to(self._dtype)

    @property
    def n_iter(self) -> Tensor:
        """``[...]``, int64: the iterations made, of all stages of epsilon."""
        return self._batch.numbers(self._progress.iterations)

    @property
    def marginal_error(self) -> Tensor:
        """``[...]``, float64: what the iteration has reached. Of a problem without penalties the L1 norm of ``P 1 - a``
        (``P^T 1 = b`` holds after every iteration), else ``sum_i a_i |change of f_i| / epsilon`` in the last."""
        self._look()
        return self._batch.numbers(self._progress.error)

    @property
    def converged(self) -> Tensor:
        """``[...]``, bool: whether ``marginal_error`` is at most ``tol``."""
        self._look()
        return self._batch.numbers(self._progress.error <= self._progress.tol)

    @property
    def epsilon(self) -> Tensor:
        """``[...]``, float64."""
        return self._batch.numbers(self._row.epsilon)

    @property
    def reference(self) -> str:
        return "counting" if self._row.is_counting else "product"

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """``P 1 [..., n]`` and ``P^T 1 [..., m]``."""
        ones = [
            side.weights.new_ones((*side.weights.shape, 1), dtype=self._dtype) for side in (self._row, self._column)
        ]
        return self._batch.rows(self._apply(ones[1]).squeeze(2)), self._batch.columns(
            self._transpose(ones[0]).squeeze(2)
        )

    # ---- methods ----

    def plan(self) -> Tensor:
        """``P [..., n, m]``, held as a whole.

        Raises:
            ValueError: it is larger than the memory that is there.
        """
        self._look()
        shape = (*self._row.weights.shape, self._column.weights.shape[1])
        check_memory(self._operator, "plan()", shape, self._value)
        return self._batch.rows(self._cost.plan(self._row, self._column))

    def apply(self, z: Tensor) -> Tensor:
        """``P z [..., n]`` or ``[..., n, k]`` of ``z [..., m]`` or ``[..., m, k]``."""
        inside, is_vector = self._inside("apply", z, self._batch.column_shape, "m", self._batch.inside_columns)
        result = self._batch.rows(self._apply(inside))
        return result.squeeze(-1) if is_vector else result

    def apply_transpose(self, z: Tensor) -> Tensor:
        """``P^T z [..., m]`` or ``[..., m, k]`` of ``z [..., n]`` or ``[..., n, k]``."""
        inside, is_vector = self._inside("apply_transpose", z, self._batch.row_shape, "n", self._batch.inside_rows)
        result = self._batch.columns(self._transpose(inside))
        return result.squeeze(-1) if is_vector else result

    def barycentric_map(self, points: Tensor | None = None) -> Tensor:
        """``T_i = sum_j P_ij y_j / sum_j P_ij``, ``[..., n, d]``: where row i goes in the mean.

        Rows of weight 0 are mapped too, as rows with little weight would be; one whose costs are all infinite goes
        to 0.

        Args:
            points: ``y [..., m, d]``; those of :func:`~pyreg.functional.sinkhorn_points` by default.
        """
        if points is None:
            if self._points is None:
                raise ValueError(
                    f"{self._operator}: barycentric_map needs points y [..., m, d], for the problem was given by its "
                    "costs; pass them, or use sinkhorn_points"
                )
            inside = self._points[1]
        else:
            inside, is_vector = self._inside(
                "barycentric_map", points, self._batch.column_shape, "m", self._batch.inside_columns, "points"
            )
            if is_vector:
                raise ValueError(
                    f"{self._operator}: barycentric_map: expected points of shape [..., m, d], got "
                    f"{list(points.shape)}; use points.unsqueeze(-1) for points on a line"
                )
        self._look()
        with _library.no_autocast(inside):
            ones = inside.new_ones((*inside.shape[:2], 1))
            sums = self._cost.product(self._row, self._column, torch.cat([inside, ones], 2))
        mass = sums[..., -1:]
        return self._batch.rows(torch.where(mass > 0, sums[..., :-1] / torch.where(mass > 0, mass, 1), 0))

    def transport_cost(self) -> Tensor:
        """``<P, C> [...]``, without entropy and penalties."""
        self._look()
        return self._batch.numbers(self._cost.total(self._row, self._column)).to(self._dtype)

    def __repr__(self) -> str:
        progress = self._progress
        count, converged = progress.error.numel(), int((progress.error <= progress.tol).sum())
        state = f"{converged} of {count} converged" if count > 1 else ("converged" if converged else "not converged")
        return (
            f"Transport({self._batch}, reference={self.reference!r}, {state} after {int(progress.iterations.max())} "
            f"iterations, marginal_error={progress.error.max().item():.1e})"
        )

    # ---- inside ----

    def potentials(self) -> tuple[Tensor, Tensor]:
        """f and g as constants in float64, for another problem to begin with."""
        return self._batch.rows(self._row.public.detach()), self._batch.columns(self._column.public.detach())

    def _apply(self, z: Tensor) -> Tensor:
        self._look()
        with _library.no_autocast(z):
            return self._row.factors.unsqueeze(2).to(z.dtype) * self._cost.product(self._row, self._column, z)

    def _transpose(self, z: Tensor) -> Tensor:
        self._look()
        with _library.no_autocast(z):
            product = self._cost.transposed_product(self._row, self._column, z)
            return self._column.factors.unsqueeze(2).to(z.dtype) * product

    def _inside(
        self, method: str, z: Tensor, shape: tuple[int, ...], symbol: str, inside: Any, name: str = "z"
    ) -> tuple[Tensor, bool]:
        """``[B, count, k]``, and whether z has no k."""
        where = f"{self._operator}: {method}"
        if not isinstance(z, Tensor):
            raise TypeError(f"{where}: expected {name} to be a tensor, got {type(z).__name__}")
        device = self._row.weights.device
        if z.dtype != self._dtype or z.device != device:
            raise TypeError(
                f"{where}: expected {name} of {self._dtype} on {device}, got {z.dtype} on {z.device}; convert it with "
                f"{name}.to(transport.value)"
            )
        is_vector = z.shape == shape
        if not is_vector and z.shape[:-1] != shape:
            raise ValueError(
                f"{where}: expected {name} of shape [..., {symbol}] = {list(shape)} or [..., {symbol}, k], got "
                f"{list(z.shape)}"
            )
        return inside(z.unsqueeze(-1) if is_vector else z), is_vector

    def _look(self) -> None:
        """Warns, once, of problems that have not converged; not while tracing or inside of torch.func."""
        if self._has_looked or not _library.can_read(self._progress.error):
            return
        self._has_looked = True
        error, tol = self._progress.error, self._progress.tol
        failed = ~(error <= tol)
        if not bool(failed.any()):
            return
        count = error.numel()
        which = f"{int(failed.sum())} of {count} problems have" if count > 1 else "the iteration has"
        _convergence.warn(
            f"{self._operator}: {which} not converged: after {int(self._progress.iterations.max())} iterations "
            f"marginal_error is {error[failed].max().item():.2g}, above tol = {tol:g}; raise max_iter "
            f"(here {self._progress.max_iter}), epsilon or tol, or pass epsilon_scaling=0.5"
        )


# ---- memory ----


def check_memory(operator: str, what: str, shape: tuple[int, ...], like: Tensor) -> None:
    """An error where a tensor of this shape, of like's dtype and device, is larger than the memory that is there."""
    if torch.compiler.is_compiling():
        return
    needed, available = math.prod(shape) * like.element_size(), available_bytes(like.device)
    if available is not None and needed > available:
        raise ValueError(
            f"{operator}: {what} of shape {list(shape)} takes {needed / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB of memory are left on {like.device}; use apply, apply_transpose, "
            "barycentric_map, or fewer points"
        )


def available_bytes(device: torch.device) -> int | None:
    """The memory that can still be had; none where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

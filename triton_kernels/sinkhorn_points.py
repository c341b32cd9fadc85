"""Sinkhorn's iteration between points in Triton. No n x m matrix exists.

_point_kernels.py has the formulas. An iteration is four launches:

    sums      of each row over all columns, of exp((F_i + G_j - C_ij) / eps) around the potentials as they are
    update    F, and the error of its rows
    sums      of each column, with the new F
    update    G, the error of all rows, and what comes next: the same stage of epsilon, the next one, or the end

That is two products and two exponentials a pair and iteration: columns need the rows' new potentials, which are known
when a row has been summed over all columns. A step that took both sums from one exponential would update both sides
from the old ones: two runs of this iteration side by side, each of which advances by a half, so that the same progress
takes as many exponentials; averaging the two contracts by (1 + s) / 2 where this iteration does by s^2.

Sums lie near the weights, for potentials have absorbed all that went before, so that no maximum is needed; where a sum
of a program's rows leaves [1e-30, 1e30], and in the first iteration of a stage, the program begins anew around the
maximum. Memory: O((n + m) d).

Every problem of a batch has its own epsilon, stage and end, which the device keeps. The host looks every few
iterations whether all of them have come to their end. Sums of a program are in the points' dtype, all that follows in
float64, and every sum is in a fixed order: the same bits on every run.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pyreg.triton_kernels import _point_kernels as kernels
from pyreg.triton_kernels._points import EVERY, NAMED_POINTS, Points, ahead_of_time, prepare
from pyreg.triton_kernels._shared import OPTIONS

# Iterations between two looks at whether all problems are done, each of which waits for the GPU.
_BETWEEN_CHECKS = 16

_STAGE_ITERATIONS = 3  # as in csrc/sinkhorn/sinkhorn.h: of each stage but the last
_UPDATED = 256  # rows of a program that updates potentials


class _Marginal(NamedTuple):
    """The rows of all problems, or the columns."""

    potentials: Tensor  # [B, n] float64
    weights: Tensor
    log_weights: Tensor
    rhos: Tensor | None


class _Stages(NamedTuple):
    """Where each problem is."""

    epsilons: Tensor  # [B] float64
    flags: Tensor  # [B] int32
    ends: Tensor  # [B] int32

    @staticmethod
    def first(epsilon: Tensor, first_epsilon: Tensor, max_iter: int) -> _Stages:
        is_last = first_epsilon <= epsilon
        if max_iter <= 1:
            is_last = torch.ones_like(is_last)
        flags = kernels.FRESH.value + kernels.LAST.value * is_last.int()
        ends = torch.where(is_last, max_iter, min(_STAGE_ITERATIONS, max_iter - 1)).int()
        return _Stages(torch.where(is_last, epsilon, first_epsilon), flags, ends)

    def like(self) -> _Stages:
        return _Stages(*(torch.empty_like(tensor) for tensor in self))

    def all_done(self) -> bool:
        return bool((self.flags & kernels.DONE.value).all())


class _Sums(NamedTuple):
    """Of rows, over the splits of the columns."""

    totals: Tensor  # [splits, B, n]
    shifts: Tensor
    tiles: int  # of columns, a split

    @staticmethod
    def of(points: Points) -> _Sums:
        splits, tiles = points.splits(points.tiles())
        totals = points.rows.values.new_empty((splits, *points.shape[:2]))
        return _Sums(totals, torch.empty_like(totals), tiles)

    def fill(
        self,
        points: Points,
        row_potentials: Tensor,
        column_potentials: Tensor,
        epsilons: Tensor,
        flags: Tensor,
        wanted: Tensor | None = None,
    ) -> None:
        batch, n, m = points.shape
        constants = points.constants(points.tiles())
        grid = (batch * triton.cdiv(n, constants["ROWS"]), len(self.totals))
        kernels.sums_kernel[grid](
            points.rows.values,
            points.columns.values,
            points.rows.halves,
            points.columns.halves,
            points.rows.counts,
            points.columns.counts,
            row_potentials,
            column_potentials,
            wanted,
            epsilons,
            flags,
            self.totals,
            self.shifts,
            n,
            m,
            points.width,
            self.tiles,
            batch,
            **constants,
        )


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    point_cost: int,
    is_streaming: bool,
    a: Tensor,
    b: Tensor,
    log_a: Tensor,
    log_b: Tensor,
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
    """F ``[B, n]`` and G ``[B, m]`` with ``eps log a`` and ``eps log b``, errors and numbers of iterations ``[B]``.

    Args:
        x: ``[B, n, d]``, float64 or float32; of cosines of length 1.
        y: ``[B, m, d]``.
        point_cost: 0 squared distances, 1 distances, 2 cosines.
        is_streaming: whatever it is, no matrix is held.
        a, b, log_a, log_b, rho_a, rho_b: ``[B, n]`` and ``[B, m]``, float64; no rho: all infinite.
        epsilon, first_epsilon: ``[B]``, float64, where it ends and begins.
        epsilon_factor: between stages, below 1.
        initial: G to begin with.
    """
    batch, n, m = x.shape[0], x.shape[1], y.shape[1]
    f, g = torch.zeros_like(a), initial.contiguous().clone()
    error = torch.full_like(epsilon, torch.inf)
    iterations = torch.zeros_like(epsilon, dtype=torch.int64)
    if batch == 0 or max_iter <= 0:
        return f, g, error, iterations
    with torch.cuda.device_of(x):
        points = prepare(x, y, point_cost, a > 0, b > 0)
        row = _Marginal(f, a.contiguous(), log_a.contiguous(), None if rho_a is None else rho_a.contiguous())
        column = _Marginal(g, b.contiguous(), log_b.contiguous(), None if rho_b is None else rho_b.contiguous())
        row_sums, column_sums = _Sums.of(points), _Sums.of(points.exchanged)
        row_blocks = triton.cdiv(n, _UPDATED)
        errors = f.new_empty((batch, row_blocks))
        last_epsilons = epsilon.contiguous()
        stages = _Stages.first(last_epsilons, first_epsilon.contiguous(), max_iter)
        following = stages.like()
        can_wait = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        for iteration in range(max_iter):
            sides = ((points, row, column, row_sums), (points.exchanged, column, row, column_sums))
            for is_last, (roles, own, other, sums) in enumerate(sides):
                sums.fill(roles, own.potentials, other.potentials, stages.epsilons, stages.flags)
                count = m if is_last else n
                kernels.update_kernel[(batch * triton.cdiv(count, _UPDATED),)](
                    sums.totals,
                    sums.shifts,
                    roles.rows.halves,
                    *own,
                    errors,
                    *stages,
                    *following,
                    last_epsilons,
                    error,
                    iterations,
                    count,
                    len(sums.totals),
                    row_blocks,
                    batch,
                    max_iter,
                    epsilon_factor,
                    tol,
                    IS_BALANCED=rho_a is None and rho_b is None,
                    IS_COUNTING=is_counting,
                    IS_LAST=bool(is_last),
                    ROWS=_UPDATED,
                )
            stages, following = following, stages
            if can_wait and iteration % _BETWEEN_CHECKS == _BETWEEN_CHECKS - 1 and stages.all_done():
                break
    return f, g, error, iterations


def log_sums(x: Tensor, y: Tensor, point_cost: int, others: Tensor, epsilon: Tensor, wanted: Tensor) -> Tensor:
    """``eps log sum_j exp((G_j - C_ij) / eps)``, ``[B, n]`` float64, of the rows that are ``wanted [B, n]``, and
    anything of others."""
    batch, n, _ = x.shape
    result = torch.empty_like(wanted, dtype=torch.float64)
    if result.numel() == 0:
        return result
    with torch.cuda.device_of(x):
        points = prepare(x, y, point_cost, wanted, others > -torch.inf)
        others, epsilon = others.contiguous(), epsilon.contiguous()
        sums = _Sums.of(points)
        flags = torch.full((batch,), kernels.FRESH.value, dtype=torch.int32, device=x.device)
        sums.fill(points, result, others, epsilon, flags, wanted.contiguous().view(torch.int8))
        kernels.log_sums_kernel[(batch * triton.cdiv(n, _UPDATED),)](
            *(sums.totals, sums.shifts, points.rows.halves, epsilon, result, n, len(sums.totals), batch),
            ROWS=_UPDATED,
        )
    return result


# ---- what tools/triton_report.py compiles ----


def _variants() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, dtype, cost, features in NAMED_POINTS:
        number = "fp64" if dtype == torch.float64 else "fp32"
        types, constants, options = ahead_of_time(name, dtype, cost, features, is_plan=False)
        types |= {f"{key}_ptr": f"*{number}:16" for key in ("sums", "shifts")} | {"wanted_ptr": "*i8"}
        without = {} if name == "sqeuclidean 64 tf32x3" else {"wanted_ptr": None}
        found[f"sinkhorn_points sums {name}"] = (kernels.sums_kernel, types, constants | without, options, EVERY)
    for number, form in itertools.product(("fp32", "fp64"), ("balanced rows", "counting columns")):
        is_balanced = form == "balanced rows"
        types = dict.fromkeys(kernels.COUNTS, "i32") | dict.fromkeys(("epsilon_factor", "tolerance"), "fp64")
        types |= {key: "*fp64:16" for key in kernels.update_kernel.arg_names if key.endswith("_ptr")}
        types |= dict.fromkeys(("sums_ptr", "shifts_ptr"), f"*{number}:16") | {"iterations_ptr": "*i64:16"}
        types |= dict.fromkeys(("flags_ptr", "ends_ptr", "next_flags_ptr", "next_ends_ptr"), "*i32:16")
        constants = {"IS_BALANCED": is_balanced, "IS_COUNTING": not is_balanced, "IS_LAST": not is_balanced}
        constants |= {"ROWS": _UPDATED} | ({"rhos_ptr": None} if is_balanced else {})
        if not is_balanced:
            log_sums = {"ROWS": _UPDATED, "halves_ptr": None}
            name = f"sinkhorn_points log_sums {number}"
            found[name] = kernels.log_sums_kernel, types | {"out_ptr": "*fp64:16"}, log_sums, OPTIONS, EVERY
        found[f"sinkhorn_points update {form} {number}"] = (kernels.update_kernel, types, constants, OPTIONS, EVERY)
    return found


AHEAD_OF_TIME = _variants()

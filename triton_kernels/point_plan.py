"""One pass over the plan between points in Triton: products with it and their gradients. No n x m matrix exists.

_point_kernels.py has the exponents, pyreg/ops/_point_plan.py the formulas. A program sums what a tile of rows gets of
all columns, or of its split of them; what columns get is the same with exchanged roles. Every result is thus a pass of
its own, of two products and an exponential a pair: one of the points and one of the tile of the plan with z or y. By_x
is x_i sum_j W_ij - sum_j W_ij y_j, around a centre for the digits' sake; of a few coordinates differences are summed as
they stand. Sums are in the points' dtype and in a fixed order: the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pyreg.triton_kernels import _point_kernels as kernels
from pyreg.triton_kernels._points import EVERY, NAMED_POINTS, Points, ahead_of_time, around_centre, prepare

# Results of a row in a program; of more, the plan is formed anew. Direct costs leave fewer registers to by_x.
_MOST_OUT, _MOST_DIRECT_PULLS = 64, 32
_FACTORS = 16  # of u . z at a time


def _out_block(width: int, *, is_direct: bool, is_pull: bool) -> int:
    most = _MOST_DIRECT_PULLS if is_direct and is_pull else _MOST_OUT
    return 1 if width == 1 else min(max(triton.next_power_of_2(width), 16), most)


def _pass(
    points: Points,
    potentials: tuple[Tensor, Tensor],
    epsilon: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    operands: tuple[Tensor | None, Tensor | None],
    width: int,
    *,
    times_cost: bool,
) -> Tensor:
    """``[B, n, width]``: by_x of u and z, or the product with the second operand."""
    batch, n, m = points.shape
    constants = points.constants(points.tiles(is_plan=True))
    out_block = _out_block(width, is_direct=points.is_direct, is_pull=factors is not None)
    out_blocks = triton.cdiv(width, out_block)
    splits, tiles = points.splits(points.tiles(is_plan=True), out_blocks)
    partial = points.rows.values.new_empty((splits, batch, n, width))
    u, z = factors or (None, None)
    n_factors = 1 if u is None else u.shape[2]
    kernels.plan_kernel[(batch * triton.cdiv(n, constants["ROWS"]), splits, out_blocks)](
        points.rows.values,
        points.columns.values,
        points.rows.halves,
        points.columns.halves,
        points.rows.counts,
        points.columns.counts,
        *potentials,
        u,
        z,
        *operands,
        epsilon,
        partial,
        n,
        m,
        points.width,
        n_factors,
        width,
        tiles,
        batch,
        PULLS=u is not None,
        TIMES_COST=times_cost,
        FACTORS=1 if n_factors == 1 else _FACTORS,
        OUT=out_block,
        **constants,
    )
    return partial.squeeze(0) if splits == 1 else partial.sum(0)


def _pull(
    points: Points,
    centred: tuple[Tensor, Tensor],
    potentials: tuple[Tensor, Tensor],
    epsilon: Tensor,
    factors: tuple[Tensor, Tensor],
    *,
    times_cost: bool,
) -> Tensor:
    """by_x, of the points around a centre."""
    width = centred[0].shape[2]
    result = _pass(points, potentials, epsilon, factors, centred, width, times_cost=times_cost)
    return result[..., : points.features].contiguous()


def point_plan(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor,
    u: Tensor,
    z: Tensor,
    point_cost: int,
    times_cost: bool,
    with_rows: bool,
    with_columns: bool,
    with_x: bool,
    with_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ``[B, n, k]``, columns ``[B, m, k]``, by_x ``[B, n, d]`` and by_y ``[B, m, d]``, zeros where not asked for.

    Args:
        x: ``[B, n, d]``, float64 or float32; of cosines of length 1.
        y, u, z: ``[B, m, d]``, ``[B, n, k]``, ``[B, m, k]``, of the same dtype.
        f, g, epsilon: ``[B, n]``, ``[B, m]`` and ``[B]``, float64.
        point_cost: 0 squared distances, 1 distances, 2 cosines.
    """
    x, y, f, g, epsilon, u, z = (tensor.contiguous() for tensor in (x, y, f, g, epsilon, u, z))
    rows, columns, by_x, by_y = (torch.zeros_like(tensor) for tensor in (u, z, x, y))
    if min(*x.shape, y.shape[1], u.shape[2]) == 0:
        return rows, columns, by_x, by_y
    with torch.cuda.device_of(x):
        points = prepare(x, y, point_cost, f > -torch.inf, g > -torch.inf)
        f_and_g, g_and_f = (f, g), (g, f)
        if with_rows:
            rows = _pass(points, f_and_g, epsilon, None, (None, z), z.shape[2], times_cost=times_cost)
        if with_columns:
            columns = _pass(points.exchanged, g_and_f, epsilon, None, (None, u), u.shape[2], times_cost=times_cost)
        if with_x or with_y:
            centred = points.rows.values, points.columns.values
            if points.is_direct and point_cost != kernels.COSINE.value:
                centred = around_centre(x, y, f > -torch.inf)
            if with_x:
                by_x = _pull(points, centred, f_and_g, epsilon, (u, z), times_cost=times_cost)
            if with_y:
                by_y = _pull(points.exchanged, centred[::-1], g_and_f, epsilon, (z, u), times_cost=times_cost)
    return rows, columns, by_x, by_y


# ---- what tools/triton_report.py compiles ----


def _variants() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, dtype, cost, features in NAMED_POINTS:
        types, constants, options = ahead_of_time(name, dtype, cost, features, is_plan=True)
        number = "fp64" if dtype == torch.float64 else "fp32"
        tensors = ("row_factors", "column_factors", "row_operand", "operand", "out")
        types |= {f"{key}_ptr": f"*{number}:16" for key in tensors}
        forms: list[tuple[str, int, int, dict[str, Any]]] = [("by_x", features, 1, {"PULLS": True})]
        forms += [("E z", 64, 1, {"PULLS": False})]
        if name in ("sqeuclidean 64 tf32x3", "euclidean 2"):
            forms += [("E z, k = 1", 1, 1, {"PULLS": False})]
            forms += [("by_x of C E, k = 16", features, _FACTORS, {"PULLS": True, "TIMES_COST": True})]
        for form, width, n_factors, changes in forms:
            of_form = constants | {"TIMES_COST": False, "FACTORS": n_factors, **changes}
            is_direct, is_pull = constants["DIRECT"], changes["PULLS"]
            of_form["OUT"] = _out_block(width, is_direct=is_direct, is_pull=is_pull)
            of_differences = is_direct and constants["FEATURES"] > 0
            absent = () if is_pull else ("row_factors_ptr", "column_factors_ptr", "row_operand_ptr")
            absent += ("operand_ptr",) if is_pull and of_differences and cost != "cosine" else ()
            of_form |= dict.fromkeys(absent)
            sizes = {"n_factors": "i32", "out_width": "i32" if width % 16 else "i32:16"}
            found[f"point_plan {form} {name}"] = (kernels.plan_kernel, types | sizes, of_form, options, EVERY)
    return found


AHEAD_OF_TIME = _variants()

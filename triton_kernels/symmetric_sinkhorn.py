r"""Sinkhorn's iteration with both potentials brought up to date at once and averaged, between points and of points with
themselves, in Triton. No n x m matrix exists.

csrc/symmetric_sinkhorn/symmetric_sinkhorn.h has the formulas. Potentials leave the weights out, and a pair has one
product and one exponential for the sums of both its points:

    E_ij = exp((f_i + g_j - C_ij) / eps)     S_i = sum_j b_j E_ij     T_j = sum_i a_i E_ij
    f'_i = kappa (f_i - eps log S_i)         g'_j = kappa (g_j - eps log T_j)

An iteration is two launches, whether of one problem or of the three of a debiased one:

    sums      of all pairs of points; of x with x and y with y those of one half
    update    f' and g' from the sums, averages, and of points with themselves the error

**Exponents**, in units of log 2, are F'_i + G'_j + t_ij of _point_kernels.py. An update leaves F' as a whole number of
steps of 2^-9, and what those leave of it. Two such numbers have an exact sum in float32 while it is below 2^14, with no
more than an addition; beyond, it is rounded as the product is.

**Blocks.** Each cloud is cut into at most 32 groups, so that a problem between points is a square of blocks, and one of
points with themselves a triangle of them; each block is a program, all in one grid. It takes a tile of 64 of its rows
at a time past its columns, 32 at a time. The rows' sums stay in registers, a term for each of the 32 columns, until the
tile has passed; columns' sums are taken over the tile and added up in memory, where the block has a place of its own
for each: slot j of row group i, slot i of column group j. So every slot of every point is filled once, nothing is
atomic, and slots are added in a fixed order: the same bits on every run, and of a problem alone and among others. On
the diagonal of a triangle a tile takes its own square whole, and gives to both sides beyond it.

Tiles are those of sinkhorn_points: 64 rows, whose coordinates stay in registers with both parts of their digits, by 32
columns, which leaves room for 16 exponents and 16 sums a thread without spilling. Sums over a tile's rows are 24
shuffles a thread for its 16 exponents, or none where coordinates are subtracted: there a warp lies along the columns.

**Safety.** S and T are near 1, but for the first iteration and where epsilon falls fast. One beyond [1e-30, 1e30] is
found again by the update, around a maximum: the program takes its rows past all columns, and what is not lost stays as
it was. An exponent may be beyond all numbers between two points that weigh nothing, of whose sums it is no part:
exponents of such rows are cut off, and their own sums trusted up to 1e3.

Memory: O((n + m) d), and 32 sums a point. Of an iteration in d coordinates, n points a cloud, of three problems (of one
between points, or of two of points with themselves, the half):

    products       4 n^2 d flops, three times that at float32's digits
    exponentials   2 n^2
    columns        n^2 d / 8 bytes from L2
    sums           512 n bytes written, and read: 5 MB at 10k, 26 MB at 50k

By count, on an H100 that issues an instruction in every cycle, for 64 coordinates: the loop has 677 instructions for
the 16 exponentials of a thread, or 470 where torch may use TF32 (an iteration of sinkhorn_points has 712 twice).

    three problems            10k        50k
    float32's digits          0.29 ms    7.1 ms
    of which matrix products  0.19       4.8
    TF32                      0.20       5.0
    L2                        0.15       3.6
    exponentials              0.05       1.4

An update reads the sums and is some microseconds.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyreg.triton_kernels import _point_kernels as kernels
from pyreg.triton_kernels._point_kernels import (
    ALMOST_NOTHING,
    EUCLIDEAN,
    LN_2,
    LOG2_E,
    NOTHING,
    _factor,
    _load_points,
    _pairs,
)
from pyreg.triton_kernels._points import EVERY, NAMED_POINTS, Points, Side, Tiles, ahead_of_time, prepare
from pyreg.triton_kernels._shared import OPTIONS

# Iterations between two looks at whether all problems are done, each of which waits for the GPU.
_BETWEEN_CHECKS = 16

# Of a cloud: enough blocks of two groups to fill a GPU, and sums of few slots. A block of less than two tiles by two
# would not be worth its program. Neither depends on the batch, and so do no sums.
_MOST_GROUPS, _LEAST_TILES = 32, 2
_EMULATED_GROUPS, _EMULATED_LEAST = 3, 1

# A unit of exponents has so many steps.
_STEPS = tl.constexpr(2.0**9)

# Errors that are added at a time.
_ERRORS = tl.constexpr(256)

_COUNTS = ("n_x", "n_y", "batch", "x_groups", "y_groups", "x_group", "y_group", "next_is_last", "averages")


# ---- kernels ----
#
# Everything of all problems lies in a row, a place for each point: f of each problem of the batch, then g, then those
# of x with x, and of y with y. Of these four the first two are of problems between x and y, and the last two, or f
# where there is no y, of points with themselves.


@triton.jit
def _number(argument):
    """In float64, of which the interpreter's arguments are not."""
    return tl.full((), argument, tl.float64)


@triton.jit
def _place(is_own, is_x, n_x, n_y, batch, HAS_PAIR: tl.constexpr):
    """Which of the four it is, its number of points, and where it begins."""
    clouds = batch.to(tl.int64)
    second = tl.where(is_own, 1, 0) if HAS_PAIR else 0
    begin = second * clouds * (n_x + n_y) + tl.where(is_x, 0, clouds * n_x)
    return second * 2 + tl.where(is_x, 0, 1), tl.where(is_x, n_x, n_y), begin


@triton.jit
def _present(counts_ptr, which, problem, batch, count):
    if counts_ptr is None:
        return count
    else:
        return tl.load(counts_ptr + which * batch + problem)


@triton.jit
def _error_of(errors_ptr, problem, blocks):
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, blocks, _ERRORS):
        part = start + tl.arange(0, _ERRORS)
        total += tl.sum(tl.load(errors_ptr + problem * blocks + part, mask=part < blocks, other=0.0), 0)
    return total


@triton.jit
def _triangle(index):
    """Row and column of a triangle's entry, row <= column."""
    column = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > index, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= index, column + 1, column)
    return index - column * (column + 1) // 2, column


@triton.jit
def _in_steps(exact, TOTAL: tl.constexpr):
    """A whole number of steps, of which two have an exact sum while that is below 2^14, and what that leaves."""
    exact = tl.maximum(exact, tl.full((), NOTHING, tl.float64), propagate_nan=tl.PropagateNan.ALL)
    steps = tl.floor(exact * _STEPS + 0.5) * (1.0 / _STEPS)
    # Of infinity nothing is left.
    high = tl.where(tl.abs(exact) < -NOTHING, steps, exact).to(TOTAL)
    low = tl.where(tl.abs(exact) < -NOTHING, exact - high.to(tl.float64), 0.0)
    return high, low.to(TOTAL)


@triton.jit
def _tile(
    side,
    row,
    column,
    row_at,
    column_at,
    row_exists,
    column_exists,
    row_tile,
    width,
    scale,
    least,
    COST: tl.constexpr,
    DIRECT: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2 E"""
    pairs = _pairs(
        side, side, row_at, column_at, row_exists, column_exists, row_tile, width, COST, DIRECT, FEATURES, DEPTH, WHOLE,
        TOTAL, PRECISION,
    )  # fmt: skip
    if COST == EUCLIDEAN:
        pairs = tl.maximum(pairs, least.to(TOTAL), propagate_nan=tl.PropagateNan.ALL)
    factor = _factor(scale, COST, DIRECT).to(TOTAL)
    return ((row[0][:, None] + column[0][None, :]) + pairs * factor) + (row[1][:, None] + column[1][None, :])


@triton.jit
def _load_steps(highs_ptr, lows_ptr, at, exists):
    high = tl.load(highs_ptr + at, mask=exists, other=NOTHING)
    return high, tl.load(lows_ptr + at, mask=exists, other=0.0)


@triton.jit(do_not_specialize=_COUNTS)
def sums_kernel(
    points_ptr,  # [places, n_features]
    highs_ptr,  # [places]: F' in whole steps
    lows_ptr,  # [places]: what that leaves
    weights_ptr,  # [places]
    counts_ptr,  # [4, B] int32: beyond so many points there is only padding; or None
    epsilons_ptr,  # [B] float64, or None: epsilon
    errors_ptr,  # [B, row blocks] float64, or None: problems whose error is within the tolerance are done
    partial_ptr,  # [slots, places] receives the sums of each block
    n_x,
    n_y,
    n_features,
    batch,
    x_groups,
    y_groups,
    x_group,  # points of a group
    y_group,
    epsilon: tl.float64,
    least: tl.float64,  # distance
    tolerance: tl.float64,
    HAS_PAIR: tl.constexpr,
    HAS_OWN: tl.constexpr,
    COST: tl.constexpr,
    DIRECT: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of group i and columns of group j."""
    pairs = x_groups * y_groups if HAS_PAIR else 0
    x_triangle, y_triangle = 0, 0
    if HAS_OWN:
        x_triangle = x_groups * (x_groups + 1) // 2
        if HAS_PAIR:
            y_triangle = y_groups * (y_groups + 1) // 2
    blocks = pairs + x_triangle + y_triangle
    problem, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if errors_ptr is not None:
        error = _error_of(errors_ptr, problem.to(tl.int64), tl.cdiv(n_x, ROWS))
        if error <= _number(tolerance):
            return

    # Squares come first: they are of the same size, and halves of diagonal ones fill what is left at the end.
    is_own = block >= pairs
    rest = tl.maximum(block - pairs, 0)
    is_x = rest < x_triangle
    row_group, column_group = _triangle(tl.where(is_x, rest, rest - x_triangle) if HAS_OWN else rest)
    if HAS_PAIR:
        row_group = tl.where(is_own, row_group, block // y_groups)
        column_group = tl.where(is_own, column_group, block % y_groups)
    row_is_x, column_is_x = is_x | ~is_own, is_x & is_own
    row_which, n_rows, row_begin = _place(is_own, row_is_x, n_x, n_y, batch, HAS_PAIR)
    column_which, n_columns, column_begin = _place(is_own, column_is_x, n_x, n_y, batch, HAS_PAIR)
    present_rows = _present(counts_ptr, row_which, problem, batch, n_rows)
    present_columns = _present(counts_ptr, column_which, problem, batch, n_columns)
    row_begin += problem.to(tl.int64) * n_rows
    column_begin += problem.to(tl.int64) * n_columns
    is_diagonal = is_own & (row_group == column_group)
    row_size, column_size = tl.where(row_is_x, x_group, y_group), tl.where(column_is_x, x_group, y_group)
    first_row, first_column = row_group * row_size, column_group * column_size
    end_row, end_column = tl.minimum(first_row + row_size, n_rows), tl.minimum(first_column + column_size, n_columns)

    places = batch.to(tl.int64) * (n_x + n_y) * (2 if HAS_PAIR and HAS_OWN else 1)
    row_sums_ptr = partial_ptr + column_group * places + row_begin
    column_sums_ptr = partial_ptr + row_group * places + column_begin
    column_highs_ptr, column_lows_ptr = highs_ptr + column_begin, lows_ptr + column_begin
    column_weights_ptr = weights_ptr + column_begin
    epsilon = _number(epsilon) if epsilons_ptr is None else tl.load(epsilons_ptr + problem)
    scale = LOG2_E / epsilon
    least = _number(least)
    side = points_ptr, None, None, n_rows

    for start in range(first_column, end_column, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        tl.store(column_sums_ptr + columns, tl.zeros((COLUMNS,), TOTAL), mask=columns < end_column)
    tl.debug_barrier()
    for first in range(first_row, end_row, ROWS):
        rows = first + tl.arange(0, ROWS)
        row_exists = rows < n_rows
        row_at = row_begin + rows
        row_tile = _load_points(side, row_at, row_exists, 0, n_features, DEPTH) if WHOLE else row_at
        row = _load_steps(highs_ptr, lows_ptr, row_at, row_exists)
        row_weight = tl.load(weights_ptr + row_at, mask=row_exists, other=0.0)
        weightless = tl.full((), 1000.0 if tl.float64 == TOTAL else 127.0, TOTAL)
        most = tl.where(row_weight == 0.0, weightless, float("inf"))
        total = tl.zeros((ROWS, COLUMNS), TOTAL)
        # Columns of the tile's own square have been, or will be, among its rows.
        begin = tl.where(is_diagonal, first, first_column)
        own_end = tl.where(is_diagonal, first + ROWS, 0)
        end = tl.where(first < present_rows, end_column, tl.minimum(end_column, present_columns))
        for start in range(begin, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            column_exists = columns < n_columns
            column_at = column_begin + columns
            column = _load_steps(column_highs_ptr, column_lows_ptr, columns, column_exists)
            column_weight = tl.load(column_weights_ptr + columns, mask=column_exists, other=0.0)
            exponents = _tile(
                side, row, column, row_at, column_at, row_exists, column_exists, row_tile, n_features, scale, least,
                COST, DIRECT, FEATURES, DEPTH, WHOLE, TOTAL, PRECISION,
            )  # fmt: skip
            e = tl.exp2(tl.minimum(exponents, most[:, None], propagate_nan=tl.PropagateNan.ALL))
            total += e * column_weight[None, :]
            column_total = tl.sum(e * row_weight[:, None], 0)
            gets = column_exists & (columns >= own_end)
            column_total += tl.load(column_sums_ptr + columns, mask=gets, other=0.0)
            tl.store(column_sums_ptr + columns, column_total, mask=gets)
        row_total = tl.sum(total, 1)
        tl.debug_barrier()
        if is_diagonal:
            row_total += tl.load(row_sums_ptr + rows, mask=row_exists, other=0.0)
        tl.store(row_sums_ptr + rows, row_total, mask=row_exists)
        tl.debug_barrier()


@triton.jit(do_not_specialize=_COUNTS)
def update_kernel(
    points_ptr,  # [places, n_features]
    halves_ptr,  # [places] float64: p, or None
    weights_ptr,  # [places] float64
    counts_ptr,  # [4, B] int32: beyond so many points there is only padding; or None
    potentials_ptr,  # [places] float64
    new_potentials_ptr,
    highs_ptr,  # [places]: of the new potentials, F' at the next epsilon in whole steps
    lows_ptr,  # [places]: what that leaves
    rhos_ptr,  # [places] float64, or None: rho
    epsilons_ptr,  # [B] float64, or None: epsilon
    next_epsilons_ptr,  # receives those of the next iteration
    last_epsilons_ptr,
    errors_ptr,  # [B, row blocks] float64, or None: what rows add to the last iteration's
    new_errors_ptr,
    iterations_ptr,  # [B] int64, counted up
    partial_ptr,  # [slots, places]
    n_x,
    n_y,
    n_features,
    batch,
    x_groups,
    y_groups,
    next_is_last,
    averages,
    epsilon: tl.float64,
    next_epsilon: tl.float64,
    rho: tl.float64,
    least: tl.float64,  # distance
    epsilon_factor: tl.float64,
    tolerance: tl.float64,
    HAS_PAIR: tl.constexpr,
    HAS_OWN: tl.constexpr,
    SLOTS: tl.constexpr,
    COST: tl.constexpr,
    DIRECT: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of rows of any problem: f' from their sums, or from those found again where they are not to be trusted."""
    x_blocks, y_blocks = tl.cdiv(n_x, ROWS), tl.cdiv(n_y, ROWS)
    blocks = (x_blocks + y_blocks) * (2 if HAS_PAIR and HAS_OWN else 1)
    problem, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    is_own = block >= x_blocks + y_blocks if HAS_PAIR else block >= 0
    if HAS_PAIR:
        block = block % (x_blocks + y_blocks)
    is_x = block < x_blocks
    _, n_rows, row_begin = _place(is_own, is_x, n_x, n_y, batch, HAS_PAIR)
    column_which, n_columns, column_begin = _place(is_own, is_x == is_own, n_x, n_y, batch, HAS_PAIR)
    row_begin += problem.to(tl.int64) * n_rows
    column_begin += problem.to(tl.int64) * n_columns
    rows = tl.where(is_x, block, block - x_blocks) * ROWS + tl.arange(0, ROWS)
    row_exists = rows < n_rows
    row_at = row_begin + rows
    old = tl.load(potentials_ptr + row_at, mask=row_exists, other=0.0)
    half = tl.zeros((ROWS,), tl.float64)
    if halves_ptr is not None:
        half = tl.load(halves_ptr + row_at, mask=row_exists, other=0.0)
    epsilon = _number(epsilon) if epsilons_ptr is None else tl.load(epsilons_ptr + problem)
    next_epsilon = _number(next_epsilon)
    if errors_ptr is not None:
        is_done = _error_of(errors_ptr, problem.to(tl.int64), x_blocks) <= _number(tolerance)
        last_epsilon = tl.load(last_epsilons_ptr + problem)
        wanted = tl.maximum(epsilon * _number(epsilon_factor), last_epsilon)
        next_epsilon = tl.where(next_is_last != 0, last_epsilon, wanted)
        if block == 0:
            tl.store(next_epsilons_ptr + problem, next_epsilon)
            done_now = tl.load(iterations_ptr + problem) + tl.where(is_done, 0, 1)
            tl.store(iterations_ptr + problem, done_now)
        if is_done:
            tl.store(new_potentials_ptr + row_at, old, mask=row_exists)
            error_at = problem.to(tl.int64) * x_blocks + block
            tl.store(new_errors_ptr + error_at, tl.load(errors_ptr + error_at))
            return

    scale = LOG2_E / epsilon
    least = _number(least)
    places = batch.to(tl.int64) * (n_x + n_y) * (2 if HAS_PAIR and HAS_OWN else 1)
    slots = tl.arange(0, SLOTS)
    filled = (slots < tl.where(is_x == is_own, x_groups, y_groups))[:, None] & row_exists[None, :]
    parts = tl.load(partial_ptr + slots.to(tl.int64)[:, None] * places + row_at[None, :], mask=filled, other=0.0)
    total = tl.sum(parts.to(tl.float64), 0)
    weight = tl.load(weights_ptr + row_at, mask=row_exists, other=1.0)
    is_trusted = (total > 1e-30) & (total < tl.where(weight == 0.0, 1e3, 1e30))
    log_total = tl.log2(tl.where(is_trusted, total, 1.0))
    is_lost = row_exists & ~is_trusted
    if tl.max(is_lost.to(tl.int32), 0) != 0:
        present_columns = _present(counts_ptr, column_which, problem, batch, n_columns)
        side = points_ptr, halves_ptr, potentials_ptr, n_rows
        row_tile = _load_points(side, row_at, row_exists, 0, n_features, DEPTH) if WHOLE else row_at
        row = _in_steps((old - half) * scale, TOTAL)
        around = tl.full((ROWS, COLUMNS), NOTHING, TOTAL)
        around_it = tl.zeros((ROWS, COLUMNS), TOTAL)
        for start in range(0, present_columns, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            column_exists = columns < present_columns
            column_at = column_begin + columns
            potential = tl.load(potentials_ptr + column_at, mask=column_exists, other=0.0)
            if halves_ptr is not None:
                potential -= tl.load(halves_ptr + column_at, mask=column_exists, other=0.0)
            column_weight = tl.load(weights_ptr + column_at, mask=column_exists, other=0.0)
            log_weight = tl.where(column_weight == 0.0, float("-inf"), tl.log2(column_weight))
            column = _in_steps(potential * scale + log_weight, TOTAL)
            exponents = _tile(
                side, row, column, row_at, column_at, row_exists, column_exists, row_tile, n_features, scale, least,
                COST, DIRECT, FEATURES, DEPTH, WHOLE, TOTAL, PRECISION,
            )  # fmt: skip
            exponents = tl.where(column_exists[None, :], exponents, NOTHING)
            most = tl.maximum(around, exponents, propagate_nan=tl.PropagateNan.ALL)
            around_it = around_it * tl.exp2(around - most) + tl.exp2(exponents - most)
            around = most
        most = tl.max(around, 1)
        found = tl.sum(around_it * tl.exp2(around - most[:, None]), 1).to(tl.float64)
        # Of no column; a maximum may leave NaN out, and the sum does not.
        is_nothing = (most < ALMOST_NOTHING) & (found == found)
        found = tl.where(is_nothing, float("-inf"), most.to(tl.float64) + tl.log2(found))
        log_total = tl.where(is_lost, found, log_total)

    new = old - epsilon * (LN_2 * log_total)
    kappa = tl.full((ROWS,), 1.0, tl.float64)
    if rhos_ptr is not None:
        rhos = tl.load(rhos_ptr + row_at, mask=row_exists, other=float("inf"))
        kappa = tl.where(rhos == float("inf"), kappa, rhos / (rhos + epsilon))
    elif HAS_PAIR:
        rho = _number(rho)
        kappa = tl.where(rho == float("inf"), kappa, rho / (rho + epsilon))
    new *= kappa
    if errors_ptr is not None:
        error = tl.abs(tl.exp2(log_total) - 1.0) if rhos_ptr is None else tl.abs(new - old) / (kappa * epsilon)
        error = tl.where(weight == 0.0, 0.0, weight * error)
        error = tl.sum(tl.where(row_exists, error, 0.0), 0)
        error = tl.where(epsilon <= last_epsilon, error, float("inf"))
        tl.store(new_errors_ptr + problem.to(tl.int64) * x_blocks + block, error)
    average = 0.5 * (old + new)
    if errors_ptr is not None:
        # Where a point has no weight no other's potential follows its own: the error does not tell how far that is off.
        average = tl.where(weight == 0.0, new, average)
    new = tl.where(averages != 0, average, new)
    tl.store(new_potentials_ptr + row_at, new, mask=row_exists)
    high, low = _in_steps((new - half) * (LOG2_E / next_epsilon), TOTAL)
    tl.store(highs_ptr + row_at, high, mask=row_exists)
    tl.store(lows_ptr + row_at, low, mask=row_exists)


@triton.jit
def error_kernel(errors_ptr, error_ptr, blocks):
    """[B] from [B, blocks], as the other kernels add them."""
    problem = tl.program_id(0).to(tl.int64)
    tl.store(error_ptr + problem, _error_of(errors_ptr, problem, blocks))


# ---- launchers ----


class _Clouds(NamedTuple):
    """Everything of all problems in a row, and how many there are."""

    points: Points  # of any two of them, for their tiles
    n_x: int
    n_y: int
    has_own: bool
    values: Tensor  # [places, width]
    halves: Tensor | None  # [places] float64
    weights: Tensor
    counts: Tensor | None  # [4, B] int32

    @staticmethod
    def of_pair(x: Tensor, y: Tensor, point_cost: int, a: Tensor, b: Tensor, *, with_own: bool) -> _Clouds:
        points = prepare(x, y, point_cost, a > 0, b > 0)
        sides = [points.rows, points.columns]
        if with_own:
            # Products lose the digits of what is far from the centre, which here is that of x.
            is_centred = not points.is_direct and point_cost != kernels.COSINE.value
            sides += [points.rows, prepare(y, y, point_cost, b > 0, b > 0).rows if is_centred else points.columns]
        return _Clouds._of(points, sides, [a, b, a, b][: len(sides)], x.shape[1], y.shape[1], with_own)

    @staticmethod
    def of_own(x: Tensor, point_cost: int, a: Tensor) -> _Clouds:
        points = prepare(x, x, point_cost, a > 0, a > 0)
        return _Clouds._of(points, [points.rows], [a], x.shape[1], 0, True)

    @staticmethod
    def _of(points: Points, sides: list[Side], weights: list[Tensor], n_x: int, n_y: int, has_own: bool) -> _Clouds:
        halves = [side.halves.flatten() for side in sides if side.halves is not None]
        counts = [side.counts for side in sides if side.counts is not None]
        return _Clouds(
            points,
            n_x,
            n_y,
            has_own,
            torch.cat([side.values.flatten(0, 1) for side in sides]),
            torch.cat(halves) if halves else None,
            torch.cat([each.flatten() for each in weights]),
            torch.stack(counts) if counts else None,
        )

    @property
    def copies(self) -> int:
        """Of the places of each cloud."""
        return 2 if self.n_y > 0 and self.has_own else 1

    @property
    def batch(self) -> int:
        return self.points.shape[0]

    def parts(self, places: Tensor) -> list[Tensor]:
        """f ``[B, n]``, g ``[B, m]``, and those of points with themselves."""
        sizes = [self.batch * self.n_x, self.batch * self.n_y] * self.copies
        return [part.view(self.batch, -1) for part in places.split(sizes)]


class _Stages(NamedTuple):
    """Where each problem is, and what the next iteration finds; nothing where a list has the epsilons."""

    epsilons: Tensor | None = None  # [B] float64
    next_epsilons: Tensor | None = None
    last_epsilons: Tensor | None = None
    errors: Tensor | None = None  # [B, row blocks] float64
    next_errors: Tensor | None = None
    iterations: Tensor | None = None  # [B] int64

    def following(self) -> _Stages:
        return self._replace(
            epsilons=self.next_epsilons,
            next_epsilons=self.epsilons,
            errors=self.next_errors,
            next_errors=self.errors,
        )


class _Iteration:
    """The two launches, and what lies between them."""

    def __init__(
        self,
        clouds: _Clouds,
        epsilon: float | Tensor,  # of the first iteration: [places] where problems have their own
        *,
        least_square: float = 0.0,
        rho: float = math.inf,
        rhos: Tensor | None = None,
        epsilon_factor: float = 1.0,
        tolerance: float = 0.0,
    ) -> None:
        self.clouds, self.rhos = clouds, rhos
        self.least, self.rho = math.sqrt(least_square), rho
        self.epsilon_factor, self.tolerance = epsilon_factor, tolerance
        problems = {"HAS_PAIR": clouds.n_y > 0, "HAS_OWN": clouds.has_own}
        tiles, update_tiles = _tiles(clouds.points), clouds.points.tiles(is_plan=True)
        self.constants = clouds.points.constants(tiles) | problems
        slots = triton.next_power_of_2(_MOST_GROUPS if clouds.values.is_cuda else _EMULATED_GROUPS)
        self.update_constants = clouds.points.constants(update_tiles) | problems | {"SLOTS": slots}
        self.sizes = (clouds.n_x, clouds.n_y)
        self.groups, self.group_sizes = zip(*(_groups(clouds, n, tiles.rows) for n in self.sizes), strict=True)
        self.row_blocks = [triton.cdiv(n, tiles.rows) for n in self.sizes]
        self.potentials, self.weights = torch.zeros_like(clouds.weights), clouds.weights.to(clouds.values.dtype)
        self.before = torch.empty_like(self.potentials)
        self.partial = clouds.values.new_empty((max(self.groups), len(clouds.values)))
        # Of potentials of 0.
        exact = torch.zeros_like(clouds.weights) if clouds.halves is None else clouds.halves * -LOG2_E.value
        exact = exact / epsilon
        self.highs = exact.to(clouds.values.dtype)
        self.lows = (exact - self.highs).to(clouds.values.dtype)

    def step(
        self, epsilon: float, next_epsilon: float, stages: _Stages, *, averages: bool, next_is_last: bool = False
    ) -> None:
        """Brings the potentials up to date, and keeps those before."""
        clouds = self.clouds
        blocks = self.groups[0] * self.groups[1]
        blocks += sum(groups * (groups + 1) // 2 for groups in self.groups) if clouds.has_own else 0
        sizes = (*self.sizes, clouds.points.width, clouds.batch, *self.groups)
        sums_kernel[(clouds.batch * blocks,)](
            clouds.values,
            self.highs,
            self.lows,
            self.weights,
            clouds.counts,
            stages.epsilons,
            stages.errors,
            self.partial,
            *sizes,
            *self.group_sizes,
            epsilon,
            self.least,
            self.tolerance,
            **self.constants,
        )
        update_kernel[(clouds.batch * clouds.copies * sum(self.row_blocks),)](
            clouds.values,
            clouds.halves,
            clouds.weights,
            clouds.counts,
            self.potentials,
            self.before,
            self.highs,
            self.lows,
            self.rhos,
            *stages,
            self.partial,
            *sizes,
            int(next_is_last),
            int(averages),
            epsilon,
            next_epsilon,
            self.rho,
            self.least,
            self.epsilon_factor,
            self.tolerance,
            **self.update_constants,
        )
        self.potentials, self.before = self.before, self.potentials


def symmetric_sinkhorn(
    x: Tensor,
    y: Tensor,
    point_cost: int,
    least_square: float,
    a: Tensor,
    b: Tensor,
    epsilons: list[float],
    rho: float,
    with_self: bool,
) -> tuple[Tensor, ...]:
    """f ``[B, n]``, g ``[B, m]``, and of x with x and y with y, after an iteration at each epsilon from potentials that
    are f' and g' of zeros; then f' and g' of those, of all four. Those of points with themselves are empty where they
    are not asked for.

    Args:
        x: ``[B, n, d]``, float64 or float32; of cosines of length 1.
        y: ``[B, m, d]``.
        point_cost: 0 squared distances, 1 distances, 2 cosines.
        least_square: squared distances count as no less, before roots are taken.
        a, b: ``[B, n]`` and ``[B, m]``, float64.
        rho: of both sides; infinite where they are balanced.
    """
    if min(*x.shape[:2], y.shape[1]) == 0:
        found = [torch.full_like(weights, torch.inf) for weights in (a, b)] * (2 if with_self else 1)
        return _eight(a, found, found)
    with torch.cuda.device_of(x):
        clouds = _Clouds.of_pair(x, y, point_cost, a, b, with_own=with_self)
        iteration = _Iteration(clouds, epsilons[0], least_square=least_square, rho=rho)
        all_epsilons = [epsilons[0], *epsilons, epsilons[-1]]
        for k, (epsilon, following) in enumerate(itertools.pairwise([*all_epsilons, 1.0])):
            iteration.step(epsilon, following, _Stages(), averages=0 < k <= len(epsilons))
    return _eight(a, clouds.parts(iteration.before), clouds.parts(iteration.potentials))


def _eight(like: Tensor, potentials: list[Tensor], following: list[Tensor]) -> tuple[Tensor, ...]:
    """Results own their memory, none of another's."""
    parts = [[part.clone() for part in each] for each in (potentials, following)]
    empty = [[like.new_empty((0, 0)) for _ in range(4 - len(each))] for each in parts]
    return *parts[0], *empty[0], *parts[1], *empty[1]


def symmetric_sinkhorn_self(
    x: Tensor,
    point_cost: int,
    a: Tensor,
    rho: Tensor | None,
    epsilon: Tensor,
    first_epsilon: Tensor,
    epsilon_factor: float,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """f ``[B, n]``, errors and numbers of iterations ``[B]``.

    Args:
        x: ``[B, n, d]``, float64 or float32; of cosines of length 1.
        point_cost: 0 squared distances, 1 distances, 2 cosines.
        a, rho: ``[B, n]``, float64; no rho: all infinite.
        epsilon, first_epsilon: ``[B]``, float64, where it ends and begins.
        epsilon_factor: from one iteration to the next.
    """
    error = torch.full_like(epsilon, torch.inf)
    iterations = torch.zeros_like(epsilon, dtype=torch.int64)
    if min(*x.shape[:2], max_iter) <= 0:
        return torch.zeros_like(a), error, iterations
    with torch.cuda.device_of(x):
        clouds = _Clouds.of_own(x, point_cost, a)
        rhos = None if rho is None else rho.contiguous()
        last = epsilon.contiguous()
        now = torch.maximum(last, first_epsilon) if max_iter > 1 else last.clone()
        of_each = now.unsqueeze(1).expand_as(a).flatten()
        iteration = _Iteration(clouds, of_each, rhos=rhos, epsilon_factor=epsilon_factor, tolerance=tol)
        blocks = iteration.row_blocks[0]
        errors = last.new_full((len(last), blocks), torch.inf)
        stages = _Stages(now, torch.empty_like(now), last, errors, torch.empty_like(errors), iterations)
        can_wait = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        for k in range(max_iter):
            iteration.step(1.0, 1.0, stages, averages=k > 0, next_is_last=k + 2 >= max_iter)
            stages = stages.following()
            is_look = can_wait and k % _BETWEEN_CHECKS == _BETWEEN_CHECKS - 1
            if is_look or k == max_iter - 1:
                error_kernel[(len(last),)](stages.errors, error, blocks)
                if is_look and bool((error <= tol).all()):
                    break
    return iteration.potentials.view_as(a), error, iterations


def _tiles(points: Points) -> Tiles:
    """Of sums; updates, which seldom take tiles, have those of the plan, of as many rows. Of direct tiles those whose
    sums over rows meet in fewer threads."""
    return points.tiles(is_plan=points.is_direct)


def _groups(clouds: _Clouds, count: int, rows: int) -> tuple[int, int]:
    """Into how many groups a cloud is cut, and of how many points."""
    most, least = (_MOST_GROUPS, _LEAST_TILES) if clouds.values.is_cuda else (_EMULATED_GROUPS, _EMULATED_LEAST)
    size = max(triton.cdiv(triton.cdiv(count, rows), most), least) * rows
    return triton.cdiv(count, size), size


# ---- what tools/triton_report.py compiles ----


def _variants() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, dtype, cost, features in NAMED_POINTS:
        types, constants, options = ahead_of_time(name, dtype, cost, features, is_plan=False)
        _, of_update, update_options = ahead_of_time(name, dtype, cost, features, is_plan=True)
        is_direct = constants["DIRECT"]
        if is_direct:
            constants, options = of_update, update_options
        number = "fp64" if dtype == torch.float64 else "fp32"
        types |= {f"{key}_ptr": f"*{number}:16" for key in ("points", "partial", "highs", "lows")}
        doubles = ("halves", "potentials", "new_potentials", "rhos", "epsilons", "next_epsilons")
        doubles += ("last_epsilons", "errors", "new_errors")
        types |= {f"{key}_ptr": "*fp64:16" for key in doubles}
        types |= {"counts_ptr": "*i32:16", "iterations_ptr": "*i64:16"} | dict.fromkeys(_COUNTS, "i32")
        types |= dict.fromkeys(("epsilon", "next_epsilon", "rho", "least", "epsilon_factor", "tolerance"), "fp64")
        # Of three problems in one launch, or a batch of one; of points with themselves, a batch, or one problem.
        of_own = ("rhos", "epsilons", "next_epsilons", "last_epsilons", "errors", "new_errors", "iterations", "counts")
        forms = {"": {"HAS_PAIR": True, "HAS_OWN": True} | {f"{key}_ptr": None for key in of_own}}
        if name in ("sqeuclidean 64 tf32x3", "sqeuclidean 3"):
            forms[" batch"] = forms[""] | {"HAS_OWN": False}
            del forms[" batch"]["counts_ptr"]
            forms[" self"] = {"HAS_PAIR": False, "HAS_OWN": True}
            forms[" balanced self"] = forms[" self"] | {"rhos_ptr": None, "counts_ptr": None}
        for form, of_form in forms.items():
            of_form |= {"halves_ptr": None} if is_direct else {}
            of_form |= {"SLOTS": _MOST_GROUPS}
            steps = (("sums", sums_kernel, constants, options), ("update", update_kernel, of_update, update_options))
            for step, kernel, of_points, of_launch in steps:
                known = {key: value for key, value in (of_points | of_form).items() if key in kernel.arg_names}
                weights = {"weights_ptr": f"*{number if step == 'sums' else 'fp64'}:16"}
                found[f"symmetric_sinkhorn{form} {step} {name}"] = kernel, types | weights, known, of_launch, EVERY
    return found


AHEAD_OF_TIME = _variants() | {
    "symmetric_sinkhorn error": (
        error_kernel,
        {"errors_ptr": "*fp64:16", "error_ptr": "*fp64:16", "blocks": "i32"},
        {},
        OPTIONS,
        EVERY,
    ),
}

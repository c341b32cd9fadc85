"""Triton kernels of Sinkhorn's iteration, and of one pass over its plan, between points; sinkhorn_points.py and
point_plan.py launch them.

Costs of rows i and columns j, of points x and y, and the plan of any potentials, in units of log 2:

    C_ij = p_i + q_j - r x_i . y_j              r = 2, p = |x|^2, q = |y|^2; of cosines r = 1, p = q = 1/2
    log2 E_ij = F'_i + G'_j + t_ij,   F'_i = (F_i - p_i) log2(e) / eps,   t_ij = r x_i . y_j log2(e) / eps

and where costs come from differences of coordinates, as a few of them, distances and float64 ask for, p = q = 0 and
t_ij = -C_ij log2(e) / eps. F' and G' are some thousands at times, and their sum with t some units: each is a number of
the points' dtype and what that leaves of it, and what the sum of the two loses is added back (Knuth's sum without
error). A pair has the same exponent in the sweep over rows and in that over columns, where the roles are exchanged:
what the products lose is a change of the cost that all passes agree on.

A side is (points, halves, potentials, count): [B, count, width], p or None, F [B, count], and count.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

SQEUCLIDEAN = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(1)
COSINE = tl.constexpr(2)

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

# Stands for minus infinity, of which differences are numbers; 2 to this power is 0 beside whatever cost.
NOTHING = tl.constexpr(-(2.0**100))
ALMOST_NOTHING = tl.constexpr(-(2.0**99))

# Of a problem in an iteration.
FRESH = tl.constexpr(1)  # a stage of epsilon begins: what sums are near is not known
LAST = tl.constexpr(2)  # epsilon has come to its end
DONE = tl.constexpr(4)

# Sizes for all of which there is one kernel.
COUNTS = ("n_rows", "n_columns", "tiles", "splits", "row_blocks", "batch", "max_iterations")


# ---- exponents of a tile ----


@triton.jit
def _load_potentials(side, at, exists, scale, TOTAL: tl.constexpr):
    """F' as one number and what that leaves."""
    _, halves_ptr, potentials_ptr, _ = side
    potential = tl.load(potentials_ptr + at, mask=exists, other=float("-inf"))
    if halves_ptr is not None:
        potential -= tl.load(halves_ptr + at, mask=exists, other=0.0)
    exact = tl.maximum(potential * scale, tl.full((), NOTHING, tl.float64), propagate_nan=tl.PropagateNan.ALL)
    high = exact.to(TOTAL)
    return high, (exact - high.to(tl.float64)).to(TOTAL)


@triton.jit
def _load_points(side, at, exists, start, width, DEPTH: tl.constexpr):
    """[count, DEPTH] coordinates from `start` on, of points padded to whole chunks of them."""
    points_ptr, _, _, _ = side
    features = start + tl.arange(0, DEPTH)
    return tl.load(points_ptr + at[:, None] * width + features[None, :], mask=exists[:, None], other=0.0)


@triton.jit
def _pairs(
    row_side,
    column_side,
    row_at,
    column_at,
    row_exists,
    column_exists,
    row_tile,
    width,
    COST: tl.constexpr,
    DIRECT: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[rows, columns] costs where they are direct, else x . y. `row_tile` has the rows' points where they are WHOLE in
    one chunk."""
    result = tl.zeros((row_at.shape[0], column_at.shape[0]), TOTAL)
    if DIRECT:
        row_points_ptr, _, _, _ = row_side
        column_points_ptr, _, _, _ = column_side
        row_points_ptr += row_at * width
        column_points_ptr += column_at * width
        if FEATURES > 0:
            for k in tl.static_range(FEATURES):
                x = tl.load(row_points_ptr + k, mask=row_exists, other=0.0)
                y = tl.load(column_points_ptr + k, mask=column_exists, other=0.0)
                result = _add_coordinate(result, x, y, COST)
        else:
            for k in range(width):
                x = tl.load(row_points_ptr + k, mask=row_exists, other=0.0)
                y = tl.load(column_points_ptr + k, mask=column_exists, other=0.0)
                result = _add_coordinate(result, x, y, COST)
        if COST == EUCLIDEAN:
            result = tl.sqrt(result)
        elif COST == COSINE:
            result = 1.0 - result
    elif WHOLE:
        columns = _load_points(column_side, column_at, column_exists, 0, width, DEPTH)
        result = tl.dot(row_tile, columns.trans(), result, input_precision=PRECISION, out_dtype=TOTAL)
    else:
        for start in range(0, width, DEPTH):
            rows = _load_points(row_side, row_at, row_exists, start, width, DEPTH)
            columns = _load_points(column_side, column_at, column_exists, start, width, DEPTH)
            result = tl.dot(rows, columns.trans(), result, input_precision=PRECISION, out_dtype=TOTAL)
    return result


@triton.jit
def _add_coordinate(total, x, y, COST: tl.constexpr):
    if COST == COSINE:
        return total + x[:, None] * y[None, :]
    else:
        difference = x[:, None] - y[None, :]
        return total + difference * difference


@triton.jit
def _factor(scale, COST: tl.constexpr, DIRECT: tl.constexpr):
    """Of costs or products in exponents."""
    if DIRECT:
        return -scale
    elif COST == SQEUCLIDEAN:
        return 2.0 * scale
    else:
        return scale


@triton.jit
def _exponents(row, column, pairs, factor, TOTAL: tl.constexpr):
    row_high, row_low = row[0][:, None], row[1][:, None]
    column_high, column_low = column[0][None, :], column[1][None, :]
    total = row_high + column_high
    if tl.float64 == TOTAL:
        return total + pairs * factor
    else:
        part = total - row_high
        loss = (row_high - (total - part)) + (column_high - part)
        return (total + pairs * factor) + (loss + (row_low + column_low))


# ---- the iteration ----


@triton.jit
def _sweep(
    first_tile,
    end_tile,
    row_side,
    column_side,
    row,
    row_at,
    row_exists,
    row_tile,
    column_base,
    width,
    scale,
    MAXIMUM: tl.constexpr,
    COST: tl.constexpr,
    DIRECT: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each row and the columns of some tiles, the sum of 2^exponent, or the largest exponent. They are taken over
    the tiles first: threads then exchange nothing until the end."""
    _, _, _, n_columns = column_side
    result = tl.full((row_at.shape[0], COLUMNS), NOTHING if MAXIMUM else 0.0, TOTAL)
    factor = _factor(scale, COST, DIRECT).to(TOTAL)
    for tile in range(first_tile, end_tile):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        column_exists = columns < n_columns
        column_at = column_base + columns
        column = _load_potentials(column_side, column_at, column_exists, scale, TOTAL)
        pairs = _pairs(
            row_side, column_side, row_at, column_at, row_exists, column_exists, row_tile, width, COST, DIRECT,
            FEATURES, DEPTH, WHOLE, TOTAL, PRECISION,
        )  # fmt: skip
        exponents = _exponents(row, column, pairs, factor, TOTAL)
        if MAXIMUM:
            exponents = tl.where(column_exists[None, :], exponents, NOTHING)
            result = tl.maximum(result, exponents, propagate_nan=tl.PropagateNan.ALL)
        else:
            result += tl.exp2(exponents)
    return tl.max(result, 1) if MAXIMUM else tl.sum(result, 1)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    row_points_ptr,  # [B, n_rows, n_features]
    column_points_ptr,  # [B, n_columns, n_features]
    row_halves_ptr,  # [B, n_rows] float64: p, or None
    column_halves_ptr,
    row_counts_ptr,  # [B] int32: beyond so many rows there is only padding, which is left out; or None
    column_counts_ptr,
    row_potentials_ptr,  # [B, n_rows] float64
    column_potentials_ptr,
    wanted_ptr,  # [B, n_rows] bool, or None: of tiles without such a row nothing is computed
    epsilons_ptr,  # [B] float64
    flags_ptr,  # [B] int32
    sums_ptr,  # [splits, B, n_rows] receives sums of 2^exponent
    shifts_ptr,  # [splits, B, n_rows] receives the exponent that has been subtracted; infinity: minus the row's own
    n_rows,
    n_columns,
    n_features,
    tiles,  # of columns, a split
    batch,
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
    """A tile of rows and its split of the columns: around the rows' own potentials, with one exponential an entry and
    no maximum. Where that is lost, for sums beyond [1e-30, 1e30], and in a stage's first iteration, around the
    maximum."""
    row_tiles = tl.cdiv(n_rows, ROWS)
    problem, split = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(1)
    flags = tl.load(flags_ptr + problem)
    if (flags & DONE) != 0:
        return
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    present_rows, present_columns = n_rows, n_columns
    if row_counts_ptr is not None:
        present_rows = tl.load(row_counts_ptr + problem)
        present_columns = tl.load(column_counts_ptr + problem)
        if first_row >= present_rows:
            return
    row_exists = rows < present_rows
    row_at = problem * n_rows + rows
    if wanted_ptr is not None:
        wanted = tl.load(wanted_ptr + row_at, mask=row_exists, other=0)
        if tl.max(wanted.to(tl.int32), 0) == 0:
            return
    scale = LOG2_E / tl.load(epsilons_ptr + problem)
    row_side = row_points_ptr, row_halves_ptr, row_potentials_ptr, n_rows
    column_side = column_points_ptr, column_halves_ptr, column_potentials_ptr, present_columns
    column_base = problem * n_columns
    row_tile = _load_points(row_side, row_at, row_exists, 0, n_features, DEPTH) if WHOLE else row_at
    first_tile = split * tiles
    end_tile = tl.minimum(first_tile + tiles, tl.cdiv(present_columns, COLUMNS))

    total = tl.zeros((ROWS,), TOTAL)
    shift = tl.full((ROWS,), float("inf"), TOTAL)
    is_lost = (flags & FRESH) != 0
    if not is_lost:
        row = _load_potentials(row_side, row_at, row_exists, scale, TOTAL)
        total = _sweep(
            first_tile, end_tile, row_side, column_side, row, row_at, row_exists, row_tile, column_base, n_features,
            scale, False, COST, DIRECT, FEATURES, DEPTH, WHOLE, TOTAL, PRECISION, COLUMNS,
        )  # fmt: skip
        has_sum = row_exists & ~(row[0] < ALMOST_NOTHING)
        is_lost = tl.max((has_sum & ~((total > 1e-30) & (total < 1e30))).to(tl.int32), 0) != 0
    if is_lost:
        none = tl.zeros((ROWS,), TOTAL)
        shift = _sweep(
            first_tile, end_tile, row_side, column_side, (none, none), row_at, row_exists, row_tile, column_base,
            n_features, scale, True, COST, DIRECT, FEATURES, DEPTH, WHOLE, TOTAL, PRECISION, COLUMNS,
        )  # fmt: skip
        total = _sweep(
            first_tile, end_tile, row_side, column_side, (-shift, none), row_at, row_exists, row_tile, column_base,
            n_features, scale, False, COST, DIRECT, FEATURES, DEPTH, WHOLE, TOTAL, PRECISION, COLUMNS,
        )  # fmt: skip
        total = tl.where(shift < ALMOST_NOTHING, 0.0, total)  # nothing around nothing
    to = split.to(tl.int64) * batch * n_rows + row_at
    tl.store(sums_ptr + to, total, mask=row_exists)
    tl.store(shifts_ptr + to, shift, mask=row_exists)


@triton.jit
def _log_sums(sums_ptr, shifts_ptr, half, own, at, exists, splits, step, scale, ROWS: tl.constexpr):
    """log sum_j exp((G_j - C_ij) / eps) from the sums of the splits, in float64; minus infinity for a sum of none."""
    none = tl.full((ROWS,), float("-inf"), tl.float64)
    largest = none
    for split in range(splits):
        term = _log_sum(sums_ptr, shifts_ptr, own, split * step + at, exists)
        largest = tl.maximum(largest, term, propagate_nan=tl.PropagateNan.ALL)
    around = tl.where(largest == none, 0.0, largest)
    total = tl.zeros((ROWS,), tl.float64)
    for split in range(splits):
        total += tl.exp2(_log_sum(sums_ptr, shifts_ptr, own, split * step + at, exists) - around)
    result = (around + tl.log2(tl.where(total == 0.0, 1.0, total)) - half * scale) * LN_2
    return tl.where((total == 0.0) | (around < ALMOST_NOTHING), none, result)


@triton.jit
def _log_sum(sums_ptr, shifts_ptr, own, at, exists):
    total = tl.load(sums_ptr + at, mask=exists, other=1.0).to(tl.float64)
    shift = tl.load(shifts_ptr + at, mask=exists, other=0.0).to(tl.float64)
    term = tl.where(shift == float("inf"), -own, shift) + tl.log2(tl.where(total == 0.0, 1.0, total))
    return tl.where(total == 0.0, float("-inf"), term)


@triton.jit(do_not_specialize=COUNTS)
def log_sums_kernel(
    sums_ptr,  # [splits, B, n_rows]
    shifts_ptr,
    halves_ptr,  # [B, n_rows] float64, or None
    epsilons_ptr,  # [B] float64
    out_ptr,  # [B, n_rows] float64 receives eps log sum_j exp((G_j - C_ij) / eps)
    n_rows,
    splits,
    batch,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(n_rows, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    at = problem * n_rows + rows
    epsilon = tl.load(epsilons_ptr + problem)
    half = tl.zeros((ROWS,), tl.float64)
    if halves_ptr is not None:
        half = tl.load(halves_ptr + at, mask=exists, other=0.0)
    step = batch.to(tl.int64) * n_rows
    scale = LOG2_E / epsilon
    result = _log_sums(sums_ptr, shifts_ptr, half, half, at, exists, splits, step, scale, ROWS)
    tl.store(out_ptr + at, epsilon * result, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def update_kernel(
    sums_ptr,  # [splits, B, n_rows]
    shifts_ptr,
    halves_ptr,  # [B, n_rows] float64, or None
    potentials_ptr,  # [B, n_rows] float64, changed
    weights_ptr,  # [B, n_rows] float64
    log_weights_ptr,
    rhos_ptr,  # [B, n_rows] float64, or None
    errors_ptr,  # [B, row_blocks] float64: rows store theirs, columns add them up
    epsilons_ptr,  # [B] float64
    flags_ptr,  # [B] int32
    ends_ptr,  # [B] int32: how many iterations there are at the stage's end
    next_epsilons_ptr,  # the same of the next iteration
    next_flags_ptr,
    next_ends_ptr,
    last_epsilons_ptr,  # [B] float64
    error_ptr,  # [B] float64
    iterations_ptr,  # [B] int64
    n_rows,
    splits,
    row_blocks,
    batch,
    max_iterations,
    epsilon_factor: tl.float64,
    tolerance: tl.float64,
    IS_BALANCED: tl.constexpr,
    IS_COUNTING: tl.constexpr,
    IS_LAST: tl.constexpr,  # the columns, which end an iteration
    ROWS: tl.constexpr,
):
    """New potentials from the sums, and of rows the error of those before; csrc/sinkhorn/sinkhorn.h has the formulas
    and the stages."""
    blocks = tl.cdiv(n_rows, ROWS)
    problem, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    flags = tl.load(flags_ptr + problem)
    epsilon = tl.load(epsilons_ptr + problem)
    end = tl.load(ends_ptr + problem)
    if IS_LAST and (block == 0):
        next_epsilon, next_flags, next_end = epsilon, flags, end
        if (flags & DONE) == 0:
            error = tl.full((), 0.0, tl.float64)
            for start in range(0, row_blocks, ROWS):
                part = start + tl.arange(0, ROWS)
                error += tl.sum(tl.load(errors_ptr + problem * row_blocks + part, mask=part < row_blocks, other=0.0), 0)
            iterations = tl.load(iterations_ptr + problem).to(tl.int32) + 1
            tl.store(error_ptr + problem, error)
            tl.store(iterations_ptr + problem, iterations.to(tl.int64))
            is_last = (flags & LAST) != 0
            goes_on = (iterations < end) & ~(is_last & (error <= tolerance))
            wanted, last = epsilon * epsilon_factor, tl.load(last_epsilons_ptr + problem)
            becomes_last = (wanted <= last) | (iterations + 1 >= max_iterations)
            stage_end = tl.minimum(iterations + 3, max_iterations - 1)
            next_flags = tl.where(goes_on, flags & LAST, tl.where(is_last, DONE, tl.where(becomes_last, LAST, 0)))
            next_flags = tl.where(goes_on | is_last, next_flags, next_flags | FRESH)
            next_epsilon = tl.where(goes_on | is_last, epsilon, tl.where(becomes_last, last, wanted))
            next_end = tl.where(goes_on | is_last, end, tl.where(becomes_last, max_iterations, stage_end))
        tl.store(next_epsilons_ptr + problem, next_epsilon)
        tl.store(next_flags_ptr + problem, next_flags)
        tl.store(next_ends_ptr + problem, next_end)
    if (flags & DONE) != 0:
        return

    rows = block * ROWS + tl.arange(0, ROWS)
    exists = rows < n_rows
    at = problem * n_rows + rows
    step = batch.to(tl.int64) * n_rows
    scale = LOG2_E / epsilon
    old = tl.load(potentials_ptr + at, mask=exists, other=0.0)
    half = tl.zeros((ROWS,), tl.float64)
    if halves_ptr is not None:
        half = tl.load(halves_ptr + at, mask=exists, other=0.0)
    log_sum = _log_sums(sums_ptr, shifts_ptr, half, (old - half) * scale, at, exists, splits, step, scale, ROWS)
    nothing = float("-inf")
    kappa = tl.full((ROWS,), 1.0, tl.float64)
    if rhos_ptr is not None:
        rho = tl.load(rhos_ptr + at, mask=exists, other=float("inf"))
        kappa = tl.where(rho == float("inf"), kappa, rho / (rho + epsilon))
    target = tl.load(log_weights_ptr + at, mask=exists, other=0.0)
    if IS_COUNTING:
        target *= kappa
    # A row that has lost all it is worth, or has nowhere to go, stays without in the stage.
    stays = (old == nothing) & ((flags & FRESH) == 0)
    is_nothing = (log_sum == nothing) | (target == nothing) | stays
    log_sum = tl.where(is_nothing, nothing, log_sum)
    new = tl.where(is_nothing, nothing, epsilon * (target - kappa * log_sum))
    tl.store(potentials_ptr + at, new, mask=exists)
    if not IS_LAST:
        weight = tl.load(weights_ptr + at, mask=exists, other=0.0)
        if IS_BALANCED:
            error = tl.abs(weight - tl.exp2((old / epsilon + log_sum) * LOG2_E))
        else:
            move = tl.where(is_nothing, 0.0, tl.abs(new - old))
            error = tl.where(move == float("inf"), 0.0, weight * move / (kappa * epsilon))
        error = tl.where(weight == 0.0, 0.0, error)
        tl.store(errors_ptr + problem * row_blocks + block, tl.sum(error, 0))


# ---- one pass over the plan ----


@triton.jit(do_not_specialize=COUNTS)
def plan_kernel(
    row_points_ptr,  # [B, n_rows, n_features]
    column_points_ptr,  # [B, n_columns, n_features]
    row_halves_ptr,  # [B, n_rows] float64, or None
    column_halves_ptr,
    row_counts_ptr,  # [B] int32: beyond so many rows there is only padding, whose results are 0; or None
    column_counts_ptr,
    row_potentials_ptr,  # [B, n_rows] float64
    column_potentials_ptr,
    row_factors_ptr,  # [B, n_rows, n_factors]: u, or None
    column_factors_ptr,  # [B, n_columns, n_factors]: z
    row_operand_ptr,  # [B, n_rows, out_width]: x around a centre, or None
    operand_ptr,  # [B, n_columns, out_width]: z, or y around a centre; None where differences are summed
    epsilons_ptr,  # [B] float64
    out_ptr,  # [splits, B, n_rows, out_width] receives E z, or what by_x is the sum of
    n_rows,
    n_columns,
    n_features,
    n_factors,
    out_width,
    tiles,
    batch,
    PULLS: tl.constexpr,  # by_x, else E z
    TIMES_COST: tl.constexpr,
    COST: tl.constexpr,
    DIRECT: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTORS: tl.constexpr,  # of u . z at a time; 1 where it is all
    OUT: tl.constexpr,  # of the results' width
):
    row_tiles = tl.cdiv(n_rows, ROWS)
    problem, split = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(1)
    first_row = (tl.program_id(0) % row_tiles) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    present_rows, present_columns = n_rows, n_columns
    if row_counts_ptr is not None:
        present_rows = tl.load(row_counts_ptr + problem)
        present_columns = tl.where(first_row < present_rows, tl.load(column_counts_ptr + problem), 0)
    row_exists = rows < present_rows
    row_at = problem * n_rows + rows
    epsilon = tl.load(epsilons_ptr + problem)
    scale = LOG2_E / epsilon
    factor = _factor(scale, COST, DIRECT).to(TOTAL)
    row_side = row_points_ptr, row_halves_ptr, row_potentials_ptr, n_rows
    column_side = column_points_ptr, column_halves_ptr, column_potentials_ptr, present_columns
    row_tile = _load_points(row_side, row_at, row_exists, 0, n_features, DEPTH) if WHOLE else row_at
    row = _load_potentials(row_side, row_at, row_exists, scale, TOTAL)
    out = tl.program_id(2) * OUT + tl.arange(0, OUT)
    out_exists = out < out_width

    result = tl.zeros((ROWS, OUT), TOTAL)
    total = tl.zeros((ROWS,), TOTAL)
    first_tile = split * tiles
    end_tile = tl.minimum(first_tile + tiles, tl.cdiv(present_columns, COLUMNS))
    for tile in range(first_tile, end_tile):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        column_exists = columns < present_columns
        column_at = problem * n_columns + columns
        column = _load_potentials(column_side, column_at, column_exists, scale, TOTAL)
        pairs = _pairs(
            row_side, column_side, row_at, column_at, row_exists, column_exists, row_tile, n_features, COST, DIRECT,
            FEATURES, DEPTH, WHOLE, TOTAL, PRECISION,
        )  # fmt: skip
        exponents = _exponents(row, column, pairs, factor, TOTAL)
        # As in csrc/point_plan: between two weights of 0 they may be anything.
        largest = tl.full((), (600.0 if tl.float64 == TOTAL else 80.0) * LOG2_E, TOTAL)
        weights = tl.exp2(tl.minimum(exponents, largest, propagate_nan=tl.PropagateNan.ALL))
        if TIMES_COST:
            cost = pairs
            if COST == COSINE and not DIRECT:
                cost = 1.0 - pairs
            elif not DIRECT:
                row_half = tl.load(row_halves_ptr + row_at, mask=row_exists, other=0.0).to(TOTAL)
                column_half = tl.load(column_halves_ptr + column_at, mask=column_exists, other=0.0).to(TOTAL)
                cost = tl.maximum(
                    (row_half[:, None] + column_half[None, :]) - 2.0 * pairs,
                    0.0,
                    propagate_nan=tl.PropagateNan.ALL,
                )
            weights *= cost - epsilon.to(TOTAL) if PULLS else cost
        if PULLS:
            weights *= _inner_products(
                row_factors_ptr, column_factors_ptr, row_at, column_at, row_exists, column_exists, n_factors, FACTORS,
                TOTAL, PRECISION,
            )  # fmt: skip
            if COST == EUCLIDEAN:  # costs are direct
                weights = tl.where(pairs > 0.0, weights / tl.where(pairs > 0.0, pairs, 1.0), 0.0)
        # Rows and columns beyond the last weigh nothing, whatever u and z hold there.
        if PULLS and (DIRECT and FEATURES > 0 and COST != COSINE):
            for k in tl.static_range(FEATURES):
                x = tl.load(row_points_ptr + row_at * n_features + k, mask=row_exists, other=0.0)
                y = tl.load(column_points_ptr + column_at * n_features + k, mask=column_exists, other=0.0)
                pull = tl.sum(weights * (x[:, None] - y[None, :]), 1)
                result += tl.where((out == k)[None, :], pull[:, None], 0.0)
        else:
            inside = column_exists[:, None] & out_exists[None, :]
            operand = tl.load(operand_ptr + column_at[:, None] * out_width + out[None, :], mask=inside, other=0.0)
            if OUT == 1:
                result += tl.sum(weights * operand.trans(), 1)[:, None]
            else:
                result = tl.dot(weights, operand, result, input_precision=PRECISION, out_dtype=TOTAL)
            if PULLS and COST != COSINE:
                total += tl.sum(weights, 1)
    inside = row_exists[:, None] & out_exists[None, :]
    at = row_at[:, None] * out_width + out[None, :]
    if PULLS and COST == COSINE:
        result = -result
    elif PULLS:
        if not (DIRECT and FEATURES > 0):
            result = total[:, None] * tl.load(row_operand_ptr + at, mask=inside, other=0.0) - result
        if COST == SQEUCLIDEAN:
            result *= 2.0
    inside = (rows < n_rows)[:, None] & out_exists[None, :]
    tl.store(out_ptr + split.to(tl.int64) * batch * n_rows * out_width + at, result, mask=inside)


@triton.jit
def _inner_products(
    row_factors_ptr,
    column_factors_ptr,
    row_at,
    column_at,
    row_exists,
    column_exists,
    n_factors,
    FACTORS: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u_i . z_j"""
    if FACTORS == 1:
        u = tl.load(row_factors_ptr + row_at, mask=row_exists, other=0.0)
        z = tl.load(column_factors_ptr + column_at, mask=column_exists, other=0.0)
        return u[:, None] * z[None, :]
    else:
        result = tl.zeros((row_at.shape[0], column_at.shape[0]), TOTAL)
        for start in range(0, n_factors, FACTORS):
            factors = start + tl.arange(0, FACTORS)
            is_factor = (factors < n_factors)[None, :]
            at = row_at[:, None] * n_factors + factors[None, :]
            u = tl.load(row_factors_ptr + at, mask=row_exists[:, None] & is_factor, other=0.0)
            at = column_at[:, None] * n_factors + factors[None, :]
            z = tl.load(column_factors_ptr + at, mask=column_exists[:, None] & is_factor, other=0.0)
            result = tl.dot(u, z.trans(), result, input_precision=PRECISION, out_dtype=TOTAL)
        return result

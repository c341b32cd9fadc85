"""Triton kernels of the pairwise contrastive losses; contrastive.py launches them.

Rows i and columns j (the same samples; for InfoNCE queries and keys), with z = f / max(|f|, 1e-12) or f itself:

    s_ij = z_i . z_j / temperature,   lse_i = log( sum_j a_ij exp(x_ij) + extra_i ),   T_i = sum_{j in P_i} x_ij

    loss_i = alpha_i lse_i - beta_i T_i
    G_ij = d loss_i / d s_ij = alpha_i a_ij exp(x_ij - lse_i) - beta_i [j in P_i]
    H_ij = u_i G_ij + u_j G'_ji,   dz_i = sum_j H_ij z_j / temperature,   df = (dz - z (z . dz)) / max(|f|, 1e-12)

    ConR            x_ij = s_ij, of negatives + eta d_ij;   a_ij = 1, of negatives w_i (nyud2: w_i eta d_ij)
    supervised      x_ij = s_ij;   a_ij = 1 for j != i
    InfoNCE         x_ij = s_ij - log_q_j;   a_ij = 1, 0 for duplicates of the positive

u is the gradient of the rows' losses; G' is that of the columns' losses: for ConR and supervised contrastive the rows'
again, for InfoNCE without log_q. Exponents and lse are in units of log 2: an exponent that is the whole sum is lse to
the last bit, however large. Sums of a tile are in float32 (float64 for float64), what follows from a row's sums in
float64.

The operands of the products are the features times a power of two a row that brings the norm into [1, 2): exact, and
no product of theirs overflows, whatever the features. What is left of the norm, and 1 / temperature, multiplies the
products. They are padded with zeros to whole tiles, which are then loaded without masks.

Of a tile inside, the range of whose exponents is small, a constant is subtracted from exponents, and one exponential
serves row and column. Other tiles (on the diagonal, at the edges; all where the temperature is very low, features are
not normalised, or labels lie far apart) take every check, and the row's and the column's maximum for themselves.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from pyreg.triton_kernels._shared import EMULATED, round_to

CONR = tl.constexpr(0)
SUPCON = tl.constexpr(1)
INFO_NCE = tl.constexpr(2)

# What eta d_ij does to a negative of ConR.
NO_PUSH = tl.constexpr(0)
PUSH_EXPONENT = tl.constexpr(1)
PUSH_FACTOR = tl.constexpr(2)

# What is subtracted from exponents before the exponential: a constant, the maximum of the tile's row or column, or
# whichever of the two the labels of the tile allow.
CONSTANT = tl.constexpr(0)
MAXIMUM = tl.constexpr(1)
BY_TILE = tl.constexpr(2)

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# Exponents of a range of 60 (87 in units of log 2) and sums of 2^31 of them are normal numbers of float32.
SMALL_RANGE = tl.constexpr(60 * math.log2(math.e))
# Counts of positives and negatives in a tile share a sum: more than a tile has rows, and with it exact in float32.
NEGATIVE = tl.constexpr(1024.0)


# Sizes for all of which there is one kernel: none is compiled for a last, smaller batch.
COUNTS = (
    "n_rows", "n_columns", "n_labels", "n_total", "diagonal", "first_row", "first_column", "row_tiles", "row_slots",
    "column_slots", "block_tiles", "row_statistics_step", "column_statistics_step",
)  # fmt: skip


# ---- operands ----


@triton.jit
def _inverse_power(x):
    """The power of two that brings |x| into [1, 2), as far as it is a normal number."""
    if x.dtype == tl.float64:
        exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        power = tl.minimum(tl.maximum(2046 - exponent, 1), 2045)
        return (power << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
        power = tl.minimum(tl.maximum(254 - exponent, 1), 253)
        return (power << 23).to(tl.float32, bitcast=True)


@triton.jit
def _square_root(x):
    """Correctly rounded, so that distances equal to the window are."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _prepare_rows(
    row,
    features_ptr,
    order_ptr,
    operand_ptr,
    norms_ptr,
    n_rows,
    n_features,
    padded_rows,
    depth,
    score_scale,
    TOTAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = row + tl.arange(0, BLOCK_R)
    exists = rows < n_rows
    source = rows.to(tl.int64)
    if SORTED:
        source = tl.load(order_ptr + rows, mask=exists, other=0)
    features_ptr += source[:, None] * n_features
    features = tl.arange(0, BLOCK_H)[None, :]

    scale = tl.full((BLOCK_R,), 1.0, TOTAL)
    inverse = tl.full((BLOCK_R,), 1.0, tl.float64)
    projected = tl.zeros((BLOCK_R,), TOTAL)
    if NORMALIZE:
        # The norm of the features times a power of two that follows the largest of them. In float64, so that the
        # factor of all pairs of a row, unlike those of single products, is rounded but once.
        largest = tl.zeros((BLOCK_R,), TOTAL)
        scale = _inverse_power(largest)
        squares = tl.zeros((BLOCK_R,), tl.float64)
        for start in range(0, n_features, BLOCK_H):
            inside = exists[:, None] & (start + features < n_features)
            x = tl.load(features_ptr + start + features, mask=inside, other=0.0).to(TOTAL)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
            smaller = _inverse_power(largest)
            shrink = (smaller / scale).to(tl.float64)
            scaled = (x * smaller[:, None]).to(tl.float64)
            squares = squares * shrink * shrink + tl.sum(scaled * scaled, 1)
            scale = smaller
        norm = tl.sqrt(squares)
        tiny = norm < 1e-12 * scale.to(tl.float64)
        shrink = _inverse_power(norm)
        scale = tl.where(tiny, 1e12, scale.to(tl.float64) * shrink).to(TOTAL)
        inverse = tl.where(tiny, 1.0, 1.0 / (norm * shrink))
        projected = tl.where(tiny, 0.0, 1.0).to(TOTAL)

    stored = rows < padded_rows
    factor = inverse * tl.sqrt(tl.full((), score_scale, tl.float64))
    tl.store(norms_ptr + rows, factor.to(TOTAL), mask=stored)
    tl.store(norms_ptr + padded_rows + rows, inverse.to(TOTAL), mask=stored)
    tl.store(norms_ptr + 2 * padded_rows + rows, (scale.to(tl.float64) * inverse).to(TOTAL), mask=stored)
    tl.store(norms_ptr + 3 * padded_rows + rows, projected, mask=stored)
    operand_ptr += rows.to(tl.int64)[:, None] * depth
    for start in range(0, depth, BLOCK_H):
        inside = exists[:, None] & (start + features < n_features)
        x = tl.load(features_ptr + start + features, mask=inside, other=0.0).to(TOTAL) * scale[:, None]
        inside = stored[:, None] & (start + features < depth)
        tl.store(operand_ptr + start + features, round_to(x, operand_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def prepare_kernel(
    row_features_ptr,  # [n_rows, n_features]
    column_features_ptr,  # [n_columns, n_features], or None
    order_ptr,  # [n_rows] int64: which row comes where, or None
    row_operand_ptr,  # [padded_rows, depth] receives the features times a power of two a row, then zeros
    column_operand_ptr,
    row_norms_ptr,  # [4, padded_rows] receives sqrt(score_scale) z / operand, z / operand, 1 / max(|f|, 1e-12), and
    # whether df loses its part along z
    column_norms_ptr,
    n_rows,
    n_columns,
    n_features,
    padded_rows,
    padded_columns,
    depth,
    score_scale: tl.float64,  # log2(e) / temperature
    TOTAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SORTED: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R
    if WITH_COLUMNS:
        row_programs = tl.cdiv(padded_rows, BLOCK_R)
        if tl.program_id(0) < row_programs:
            _prepare_rows(
                row, row_features_ptr, None, row_operand_ptr, row_norms_ptr, n_rows, n_features, padded_rows, depth,
                score_scale, TOTAL, NORMALIZE, False, BLOCK_R, BLOCK_H,
            )  # fmt: skip
        else:
            row -= row_programs * BLOCK_R
            _prepare_rows(
                row, column_features_ptr, None, column_operand_ptr, column_norms_ptr, n_columns, n_features,
                padded_columns, depth, score_scale, TOTAL, NORMALIZE, False, BLOCK_R, BLOCK_H,
            )  # fmt: skip
    else:
        _prepare_rows(
            row, row_features_ptr, order_ptr, row_operand_ptr, row_norms_ptr, n_rows, n_features, padded_rows, depth,
            score_scale, TOTAL, NORMALIZE, SORTED, BLOCK_R, BLOCK_H,
        )  # fmt: skip


# ---- the pairs of a tile ----
#
# A side is (scales_ptr, labels_ptr, preds_ptr, weights_ptr, n): of its n samples sqrt(score_scale) z / operand, for
# ConR targets [n, n_labels], preds and weights, for supervised contrastive labels and for InfoNCE ids. What a loss
# does without is None. Its vectors are what these hold of some samples: scale, label, pred, weight.


@triton.jit
def _vectors(side, samples, exists, LOSS: tl.constexpr, ONE_LABEL: tl.constexpr):
    scales_ptr, labels_ptr, preds_ptr, weights_ptr, _ = side
    scale = tl.load(scales_ptr + samples, mask=exists, other=0.0)
    label, pred, weight = scale, scale, scale
    if LOSS == CONR:
        if ONE_LABEL:  # NaN is in no relation to any
            label = tl.load(labels_ptr + samples, mask=exists, other=float("nan"))
            pred = tl.load(preds_ptr + samples, mask=exists, other=float("nan"))
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + samples, mask=exists, other=0.0)
    elif labels_ptr is not None:
        label = tl.load(labels_ptr + samples, mask=exists, other=0)
    return scale, label, pred, weight


@triton.jit
def _add_dimension(total, difference, NORM: tl.constexpr):
    if NORM == 0:
        return tl.maximum(total, difference, propagate_nan=tl.PropagateNan.ALL)
    elif NORM == 1:
        return total + difference
    else:
        return total + difference * difference


@triton.jit
def _distances(row_ptr, column_ptr, rows, columns, row_exists, column_exists, n_labels, NORM: tl.constexpr):
    """Of labels [.., n_labels]; NaN beyond the last row or column."""
    row_offsets, column_offsets = rows.to(tl.int64) * n_labels, columns.to(tl.int64) * n_labels
    total = tl.zeros((rows.shape[0], columns.shape[0]), row_ptr.dtype.element_ty)
    for k in range(n_labels):
        row_label = tl.load(row_ptr + row_offsets + k, mask=row_exists, other=float("nan"))
        column_label = tl.load(column_ptr + column_offsets + k, mask=column_exists, other=float("nan"))
        total = _add_dimension(total, tl.abs(row_label[:, None] - column_label[None, :]), NORM)
    if NORM == 2:
        total = _square_root(total)
    return total


@triton.jit
def _relations(
    rows,
    columns,
    row_side,
    column_side,
    row_vectors,
    column_vectors,
    numbers,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    INNER: tl.constexpr,
):
    """Which pairs are positives, which negatives, and for ConR the distances of labels: [rows, columns]."""
    _, row_labels_ptr, row_preds_ptr, _, n_rows = row_side
    _, column_labels_ptr, column_preds_ptr, _, n_columns = column_side
    _, row_label, row_pred, _ = row_vectors
    _, column_label, column_pred, _ = column_vectors
    n_labels, diagonal, window, _, _ = numbers
    row_exists, column_exists = rows < n_rows, columns < n_columns
    if INNER:
        own = tl.full((rows.shape[0], columns.shape[0]), False, tl.int1)
        exists = ~own
    else:
        own = (rows + diagonal)[:, None] == columns[None, :]
        exists = row_exists[:, None] & column_exists[None, :]
    if LOSS == CONR:
        if ONE_LABEL:
            distance = tl.abs(row_label[:, None] - column_label[None, :])
            pred_distance = tl.abs(row_pred[:, None] - column_pred[None, :])
        else:
            distance = _distances(
                row_labels_ptr, column_labels_ptr, rows, columns, row_exists, column_exists, n_labels, NORM
            )
            pred_distance = _distances(
                row_preds_ptr, column_preds_ptr, rows, columns, row_exists, column_exists, n_labels, NORM
            )
        limit = tl.full((), window, row_labels_ptr.dtype.element_ty)
        return (distance <= limit) & ~own, (distance > limit) & (pred_distance <= limit), distance
    else:
        same = own
        if row_labels_ptr is not None:
            same = row_label[:, None] == column_label[None, :]
        if LOSS == SUPCON:
            return exists & same & ~own, exists & ~same, 0.0
        else:
            return exists & own, exists & ~own & ~same, 0.0


@triton.jit
def _exponents(
    products,
    rows,
    columns,
    row_side,
    column_side,
    row_vectors,
    column_vectors,
    log_q_ptr,
    numbers,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Exponents of a pair in its row's and its column's loss; whether it is a positive, or a negative; by what the
    exponential of a negative is multiplied in the row's and the column's loss."""
    row_scale, _, _, row_weight = row_vectors
    column_scale, _, _, column_weight = column_vectors
    _, _, _, row_weights_ptr, _ = row_side
    _, _, _, _, n_columns = column_side
    _, _, _, _, push = numbers
    positive, negative, distance = _relations(
        rows, columns, row_side, column_side, row_vectors, column_vectors, numbers, LOSS, NORM, ONE_LABEL, INNER
    )
    x = products * row_scale[:, None] * column_scale[None, :]
    row_factor = 1.0
    column_factor = 1.0
    if PUSH == PUSH_EXPONENT:
        x = tl.where(negative, x + distance.to(x.dtype) * push, x)
    elif PUSH == PUSH_FACTOR:
        row_factor = distance.to(x.dtype) * push
        column_factor = row_factor
    if row_weights_ptr is not None:
        if PUSH == PUSH_FACTOR:
            row_factor = row_factor * row_weight[:, None]
            column_factor = column_factor * column_weight[None, :]
        else:
            row_factor = row_weight[:, None]
            column_factor = column_weight[None, :]
    row_x, column_x = x, x
    if log_q_ptr is not None:
        log_q = tl.load(log_q_ptr + columns, mask=columns < n_columns, other=0.0).to(x.dtype)
        row_x = x - (log_q * LOG2_E)[None, :]
    if WITH_FACTORS and not INNER:  # what adds nothing is no row's largest exponent, and no infinite exponential
        row_x = tl.where(negative & (row_factor == 0.0), float("-inf"), x)
        column_x = tl.where(negative & (column_factor == 0.0), float("-inf"), x)
    return row_x, column_x, positive, negative, row_factor, column_factor


@triton.jit
def _weigh(x, negative, factor, WITH_FACTORS: tl.constexpr):
    if WITH_FACTORS:
        x = tl.where(negative, x * factor, x)
    return x


@triton.jit
def _extremes(pointers, exists):
    """The smallest and the largest number along the last axis, NaN aside."""
    axis: tl.constexpr = len(pointers.shape) - 1
    label = tl.load(pointers, mask=exists, other=float("nan"))
    known = label == label
    return (
        tl.min(tl.where(known, label, float("inf")), axis),
        tl.max(tl.where(known, label, float("-inf")), axis),
    )


@triton.jit
def _largest_distance(row_ptr, column_ptr, rows, columns, n_rows, n_columns, n_labels, NORM: tl.constexpr):
    """A bound of the distances between the rows' and the columns' labels."""
    row_offsets, column_offsets = rows.to(tl.int64) * n_labels, columns.to(tl.int64) * n_labels
    total = tl.full((), 0.0, row_ptr.dtype.element_ty)
    for k in range(n_labels):
        row_low, row_high = _extremes(row_ptr + row_offsets + k, rows < n_rows)
        column_low, column_high = _extremes(column_ptr + column_offsets + k, columns < n_columns)
        total = _add_dimension(total, tl.maximum(row_high - column_low, column_high - row_low), NORM)
    if NORM == 2:
        total = tl.sqrt(total)
    return total


@triton.jit
def _constant_shift(
    row, column, row_side, column_side, numbers, SHIFT: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr
):
    """A bound of a tile's exponents, and whether it is an inner tile: its samples exist, none of its pairs is of a
    sample and itself or its own positive, and no exponent is so far below the bound that float32 loses it."""
    _, row_labels_ptr, _, _, n_rows = row_side
    _, column_labels_ptr, _, _, n_columns = column_side
    n_labels, diagonal, _, scale, push = numbers
    shift = scale
    if SHIFT == BY_TILE:
        rows, columns = row + tl.arange(0, SIZE), column + tl.arange(0, SIZE)
        reach = _largest_distance(row_labels_ptr, column_labels_ptr, rows, columns, n_rows, n_columns, n_labels, NORM)
        shift += push * reach.to(scale.dtype)
    is_inner = (row + SIZE <= n_rows) & (column + SIZE <= n_columns) & (tl.abs(row + diagonal - column) >= SIZE)
    return shift, is_inner & (scale + shift <= SMALL_RANGE)


@triton.jit
def _products(
    row_operand_ptr,
    column_operand_ptr,
    row,
    column,
    depth,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """[SIZE, SIZE] products of the operands' rows from `row` and `column` on."""
    total = tl.zeros((SIZE, SIZE), TOTAL)
    features = tl.arange(0, DEPTH)
    rows, columns = row + tl.arange(0, SIZE), column + tl.arange(0, SIZE)
    row_pointers = row_operand_ptr + rows.to(tl.int64)[:, None] * depth + features[None, :]
    column_pointers = column_operand_ptr + columns.to(tl.int64)[None, :] * depth + features[:, None]
    for _ in range(0, depth, DEPTH):
        row_tile, column_tile = tl.load(row_pointers), tl.load(column_pointers)
        total = tl.dot(row_tile, column_tile, total, input_precision=PRECISION, out_dtype=TOTAL)
        row_pointers += DEPTH
        column_pointers += DEPTH
    return total


@triton.jit
def _block_pointers(block_ptr, stride, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return block_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def _is_active(active_ptr, row, column, n_columns, SIZE: tl.constexpr):
    """Whether the tile from this row and column on may have positives or negatives."""
    offset = (row // SIZE).to(tl.int64) * tl.cdiv(n_columns, SIZE) + column // SIZE
    return tl.load(active_ptr + offset) != 0


@triton.jit
def _triangle(index):
    """(i, j) with i <= j, in the order of j (j + 1) / 2 + i."""
    j = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > index, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= index, j + 1, j)
    return index - j * (j + 1) // 2, j


# ---- forward ----


@triton.jit
def _fraction(old, new):
    """2^(old - new), 1 where both are infinite."""
    return tl.where(old == new, 1.0, tl.exp2(old - new))


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add_sums(a, b):
    """Sums are a shift, exponentials of what it has been subtracted from, and others."""
    a_shift, a_exponentials, a_scores, a_positives, a_negatives = a
    b_shift, b_exponentials, b_scores, b_positives, b_negatives = b
    shift = tl.maximum(a_shift, b_shift)
    return (
        shift,
        a_exponentials * _fraction(a_shift, shift) + b_exponentials * _fraction(b_shift, shift),
        a_scores + b_scores,
        a_positives + b_positives,
        a_negatives + b_negatives,
    )


@triton.jit
def _pair_terms(
    x, positive, negative, factor, shift, LOSS: tl.constexpr, INNER: tl.constexpr, WITH_FACTORS: tl.constexpr
):
    """What pairs add to sums: shift, exponential, exponent of a positive, counts. The shift of an inner tile's pairs is
    one for all, of others their own exponent."""
    related = positive | negative
    if INNER:
        term = tl.exp2(x - shift)
    else:
        shift = tl.where(related, x, float("-inf"))
        term = tl.where(x == x, 1.0, x)  # NaN stays
    term = tl.where(related, _weigh(term, negative, factor, WITH_FACTORS), 0.0)
    count = tl.where(positive, 1.0, 0.0).to(x.dtype)
    if LOSS == CONR:
        count = tl.where(negative, NEGATIVE, count)
    return shift, term, tl.where(positive, x, 0.0), count


@triton.jit
def _add_terms(a, b, INNER: tl.constexpr):
    a_shift, a_term, a_score, a_count = a
    b_shift, b_term, b_score, b_count = b
    if INNER:
        return a_shift, a_term + b_term, a_score + b_score, a_count + b_count
    else:
        shift = tl.maximum(a_shift, b_shift)
        term = a_term * _fraction(a_shift, shift) + b_term * _fraction(b_shift, shift)
        return shift, term, a_score + b_score, a_count + b_count


@triton.jit
def _sum_terms(terms, AXIS: tl.constexpr, LOSS: tl.constexpr, INNER: tl.constexpr):
    shift, term, score, count = terms
    if INNER:
        largest = tl.full((term.shape[1 - AXIS],), shift, term.dtype)
    else:
        largest = tl.max(shift, AXIS)
        term = term * _fraction(shift, tl.expand_dims(largest, AXIS))
    if INNER and LOSS == INFO_NCE:  # no positives here
        nothing = tl.zeros((term.shape[1 - AXIS],), term.dtype)
        return largest, tl.sum(term, AXIS), nothing, nothing, nothing
    else:
        if EMULATED:
            exponentials, scores, counts = tl.sum(term, AXIS), tl.sum(score, AXIS), tl.sum(count, AXIS)
        else:  # at once, and in one layout
            exponentials, scores, counts = tl.reduce((term, score, count), AXIS, _add_triples)
        negatives = tl.floor(counts * (1.0 / NEGATIVE))
        return largest, exponentials, scores, counts - negatives * NEGATIVE, negatives


@triton.jit
def _load_sums(sums_ptr, step, inside, LOSS: tl.constexpr):
    shift = tl.load(sums_ptr, mask=inside, other=float("-inf"))
    exponentials = tl.load(sums_ptr + step, mask=inside, other=0.0)
    scores = tl.load(sums_ptr + 2 * step, mask=inside, other=0.0)
    positives = tl.load(sums_ptr + 3 * step, mask=inside, other=0.0)
    negatives = positives
    if LOSS == CONR:
        negatives = tl.load(sums_ptr + 4 * step, mask=inside, other=0.0)
    return shift, exponentials, scores, positives, negatives


@triton.jit
def _store_sums(sums_ptr, step, sums, inside, LOSS: tl.constexpr):
    shift, exponentials, scores, positives, negatives = sums
    tl.store(sums_ptr, shift, mask=inside)
    tl.store(sums_ptr + step, exponentials, mask=inside)
    tl.store(sums_ptr + 2 * step, scores, mask=inside)
    tl.store(sums_ptr + 3 * step, positives, mask=inside)
    if LOSS == CONR:
        tl.store(sums_ptr + 4 * step, negatives, mask=inside)


@triton.jit
def _sum_rows(
    products,
    rows,
    columns,
    row_side,
    column_side,
    column_vectors,
    log_q_ptr,
    numbers,
    shift,
    row_slot,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Stores the sums of some rows over a tile's columns, or adds them to those in memory; returns what the pairs add
    to their columns' sums."""
    row_sums_ptr, row_step, n_rows = row_slot
    row_exists = rows < n_rows
    if ADDED:
        before = _load_sums(row_sums_ptr + rows, row_step, row_exists, LOSS)
    row_vectors = _vectors(row_side, rows, row_exists, LOSS, ONE_LABEL)
    row_x, column_x, positive, negative, row_factor, column_factor = _exponents(
        products, rows, columns, row_side, column_side, row_vectors, column_vectors, log_q_ptr, numbers, LOSS, NORM,
        PUSH, ONE_LABEL, WITH_FACTORS, INNER,
    )  # fmt: skip
    terms = _pair_terms(row_x, positive, negative, row_factor, shift, LOSS, INNER, WITH_FACTORS)
    sums = _sum_terms(terms, 1, LOSS, INNER)
    if ADDED:
        sums = _add_sums(before, sums)
        tl.debug_barrier()  # threads that hold the same element have read it before one of them writes
    _store_sums(row_sums_ptr + rows, row_step, sums, row_exists, LOSS)
    return _pair_terms(column_x, positive, negative, column_factor, shift, LOSS, INNER, WITH_FACTORS)


@triton.jit
def _sum_tile(
    row_operand_ptr,
    column_operand_ptr,
    depth,
    block,
    row,
    column,
    row_side,
    column_side,
    log_q_ptr,
    numbers,
    shift,
    row_slot,
    column_slot,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    block_ptr, stride, block_row, block_column = block
    column_sums_ptr, column_step, summed_columns, n_columns = column_slot
    columns = column + tl.arange(0, SIZE)
    column_vectors = _vectors(column_side, columns, columns < n_columns, LOSS, ONE_LABEL)
    inside = columns < summed_columns
    if block_ptr is None:
        products = _products(row_operand_ptr, column_operand_ptr, row, column, depth, SIZE, DEPTH, PRECISION, TOTAL)
        terms = _sum_rows(
            products, row + tl.arange(0, SIZE), columns, row_side, column_side, column_vectors, log_q_ptr, numbers,
            shift, row_slot, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, INNER, False,
        )  # fmt: skip
        if WITH_COLUMNS:
            _store_sums(column_sums_ptr + columns, column_step, _sum_terms(terms, 0, LOSS, INNER), inside, LOSS)
    else:
        # Zeros in the layout of loaded products: others have one of their own, and so has what is added to them.
        block_pointers = _block_pointers(block_ptr, stride, block_row, block_column, PIECE, SIZE)
        nothing = tl.load(block_pointers, mask=(columns < 0)[None, :], other=0.0)
        terms = (shift, nothing, nothing, nothing)
        if not INNER:
            terms = (tl.full((PIECE, SIZE), float("-inf"), TOTAL), nothing, nothing, nothing)
        products = tl.load(block_pointers)
        for start in range(0, SIZE, PIECE):
            rows = row + start + tl.arange(0, PIECE)
            next_row = block_row + tl.minimum(start + PIECE, SIZE - PIECE)  # on its way while these are used
            next_products = tl.load(_block_pointers(block_ptr, stride, next_row, block_column, PIECE, SIZE))
            more = _sum_rows(
                products, rows, columns, row_side, column_side, column_vectors, log_q_ptr,
                numbers, shift, row_slot, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, INNER, True,
            )  # fmt: skip
            if WITH_COLUMNS:
                terms = _add_terms(terms, more, INNER)
            products = next_products
        if WITH_COLUMNS:
            before = _load_sums(column_sums_ptr + columns, column_step, inside, LOSS)
            sums = _add_sums(before, _sum_terms(terms, 0, LOSS, INNER))
            tl.debug_barrier()
            _store_sums(column_sums_ptr + columns, column_step, sums, inside, LOSS)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    row_operand_ptr,  # [.., depth]; not read where the products are in memory
    column_operand_ptr,
    block_ptr,  # [.., block_stride] products of rows from first_row on with columns from first_column on, or None
    row_scales_ptr,  # [n_rows] sqrt(score_scale) z / operand
    column_scales_ptr,
    row_labels_ptr,  # ConR: targets [n_rows, n_labels]; supervised: labels [n_rows] int64; InfoNCE: ids, or None
    column_labels_ptr,
    row_preds_ptr,  # ConR: preds [n_rows, n_labels]
    column_preds_ptr,
    row_weights_ptr,  # ConR: [n_rows], or None
    column_weights_ptr,
    log_q_ptr,  # InfoNCE: [n_columns], or None
    active_ptr,  # [row tiles, column tiles] int8: 0 where a tile has no positives and negatives, or None
    row_sums_ptr,  # [4 or 5, row_slots, n_rows] receives, or gains, the sums of rows in slots of tiles of columns
    column_sums_ptr,  # [4 or 5, column_slots, n_columns], from the first of the slots for tiles of rows on
    n_rows,
    n_columns,
    depth,
    n_labels,
    diagonal,  # the column of row 0 itself, or of its positive
    first_row,
    first_column,
    row_tiles,  # in the block
    block_stride,
    row_slots,
    column_slots,
    score_scale: tl.float64,  # log2(e) / temperature
    push_scale: tl.float64,  # eta, times log2(e) in an exponent
    window: tl.float64,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    SHIFT: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A program takes a tile and has a slot for its rows' sums and one for its columns' to itself."""
    if TRIANGLE:
        row_tile, column_tile = _triangle(tl.program_id(0))
    else:
        row_tile, column_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first_row, first_column = tl.multiple_of(first_row, SIZE), tl.multiple_of(first_column, SIZE)
    row, column = first_row + row_tile * SIZE, first_column + column_tile * SIZE
    is_active = True
    if active_ptr is not None:
        is_active = _is_active(active_ptr, row, column, n_columns, SIZE)
    if is_active:
        scale = tl.full((), score_scale, TOTAL)
        push = tl.full((), push_scale, TOTAL)
        row_side = (row_scales_ptr, row_labels_ptr, row_preds_ptr, row_weights_ptr, n_rows)
        column_side = (column_scales_ptr, column_labels_ptr, column_preds_ptr, column_weights_ptr, n_columns)
        numbers = (n_labels, diagonal, window, scale, push)
        block = (block_ptr, block_stride, row_tile * SIZE, column_tile * SIZE)
        row_slot = (row_sums_ptr + column_tile.to(tl.int64) * n_rows, row_slots.to(tl.int64) * n_rows, n_rows)
        summed_columns = n_columns
        if TRIANGLE:  # of a tile on the diagonal, rows are all there is
            summed_columns = tl.where(row_tile == column_tile, 0, n_columns)
        column_slot = (
            column_sums_ptr + row_tile.to(tl.int64) * n_columns,
            column_slots.to(tl.int64) * n_columns,
            summed_columns,
            n_columns,
        )
        shift, is_inner = _constant_shift(row, column, row_side, column_side, numbers, SHIFT, NORM, SIZE)
        if SHIFT == MAXIMUM:
            is_inner = False
        if is_inner:
            _sum_tile(
                row_operand_ptr, column_operand_ptr, depth, block, row, column, row_side, column_side, log_q_ptr,
                numbers, shift, row_slot, column_slot, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, True, WITH_COLUMNS,
                SIZE, PIECE, DEPTH, PRECISION, TOTAL,
            )  # fmt: skip
        else:
            _sum_tile(
                row_operand_ptr, column_operand_ptr, depth, block, row, column, row_side, column_side, log_q_ptr,
                numbers, shift, row_slot, column_slot, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, False, WITH_COLUMNS,
                SIZE, PIECE, DEPTH, PRECISION, TOTAL,
            )  # fmt: skip


@triton.jit
def _row_terms(
    sums_ptr,  # [4 or 5, n_slots, n_rows]
    weights_ptr,
    statistics_ptr,  # [3, n_rows] receives lse in units of log 2, alpha, beta
    targets,  # where rows go there
    rows,
    n_rows,
    n_slots,
    n_total,
    LOSS: tl.constexpr,
    VARIANT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Losses of rows, and 1 where a row counts, else 0: [BLOCK_R] float64."""
    exists = rows < n_rows
    slots = tl.arange(0, BLOCK_T)
    step = n_slots.to(tl.int64) * n_rows
    TOTAL: tl.constexpr = sums_ptr.dtype.element_ty
    largest = tl.full((BLOCK_R,), float("-inf"), TOTAL)
    for start in range(0, n_slots, BLOCK_T):
        inside = (start + slots < n_slots)[:, None] & exists[None, :]
        pointers = sums_ptr + (start + slots).to(tl.int64)[:, None] * n_rows + rows[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(pointers, mask=inside, other=float("-inf")), 0))
    exponentials = tl.zeros((BLOCK_R,), tl.float64)
    positive_sum = tl.zeros((BLOCK_R,), tl.float64)
    positives = tl.zeros((BLOCK_R,), tl.float64)
    negatives = tl.zeros((BLOCK_R,), tl.float64)
    for start in range(0, n_slots, BLOCK_T):
        inside = (start + slots < n_slots)[:, None] & exists[None, :]
        pointers = sums_ptr + (start + slots).to(tl.int64)[:, None] * n_rows + rows[None, :]
        fraction = _fraction(tl.load(pointers, mask=inside, other=float("-inf")), largest[None, :]).to(tl.float64)
        exponentials += tl.sum(fraction * tl.load(pointers + step, mask=inside, other=0.0).to(tl.float64), 0)
        positive_sum += tl.sum(tl.load(pointers + 2 * step, mask=inside, other=0.0).to(tl.float64), 0)
        positives += tl.sum(tl.load(pointers + 3 * step, mask=inside, other=0.0).to(tl.float64), 0)
        if LOSS == CONR:
            negatives += tl.sum(tl.load(pointers + 4 * step, mask=inside, other=0.0).to(tl.float64), 0)

    shift = tl.where(largest == float("-inf"), 0.0, largest).to(tl.float64)
    exponentials = tl.where(largest == float("-inf"), 0.0, exponentials)
    active = positives > 0
    alpha = tl.full((BLOCK_R,), 1.0, tl.float64)
    beta = tl.full((BLOCK_R,), 1.0, tl.float64)
    if LOSS == CONR:
        active = active & (negatives > 0)
        if VARIANT > 0:  # masked entries enter as exp(0)
            larger = tl.maximum(shift, 0.0)
            exponentials = exponentials * tl.exp2(shift - larger) + (n_total - positives) * tl.exp2(-larger)
            shift = larger
        if VARIANT == 2:
            beta = 1.0 / (positives + 1.0)
            alpha = positives * beta
        else:
            if weights_ptr is not None:
                alpha = tl.load(weights_ptr + rows, mask=exists, other=0.0).to(tl.float64)
                active = active & (alpha != 0.0)
            beta = alpha / tl.maximum(positives, 1.0)
    elif LOSS == SUPCON:
        beta = 1.0 / tl.maximum(positives, 1.0)
    log_total = tl.log2(tl.where(active, exponentials, 1.0))
    lse = tl.where(active, shift + log_total, 0.0)
    alpha = tl.where(active, alpha, 0.0)
    beta = tl.where(active, beta, 0.0)
    tl.store(statistics_ptr + targets, lse.to(TOTAL), mask=exists)
    tl.store(statistics_ptr + n_rows + targets, alpha.to(TOTAL), mask=exists)
    tl.store(statistics_ptr + 2 * n_rows + targets, beta.to(TOTAL), mask=exists)
    loss = alpha * log_total + beta * (positives * shift - positive_sum)  # alpha is beta for each positive
    return tl.where(active, loss * LN_2, 0.0), tl.where(active, 1.0, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def finish_kernel(
    row_sums_ptr,
    column_sums_ptr,  # of InfoNCE in both directions, or None
    weights_ptr,
    order_ptr,
    row_statistics_ptr,
    column_statistics_ptr,
    loss_ptr,  # [n_rows], or [] where one program sums them
    partial_ptr,  # [2, programs] float64 receives sums of losses and counts of rows where several programs do
    n_rows,
    row_slots,
    column_slots,
    n_total,  # samples in all; also what the mean divides by
    LOSS: tl.constexpr,
    VARIANT: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """From sums to statistics, losses and, in one program, the reduced loss."""
    losses = tl.zeros((BLOCK_R,), tl.float64)
    counts = tl.zeros((BLOCK_R,), tl.float64)
    for start in range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        targets = rows.to(tl.int64)
        if order_ptr is not None:
            targets = tl.load(order_ptr + rows, mask=rows < n_rows, other=0)
        loss, count = _row_terms(
            row_sums_ptr, weights_ptr, row_statistics_ptr, targets, rows, n_rows, row_slots, n_total, LOSS, VARIANT,
            BLOCK_R, BLOCK_T,
        )  # fmt: skip
        if column_sums_ptr is not None:
            column_loss, _ = _row_terms(
                column_sums_ptr, None, column_statistics_ptr, targets, rows, n_rows, column_slots, n_total, LOSS,
                VARIANT, BLOCK_R, BLOCK_T,
            )  # fmt: skip
            loss = 0.5 * (loss + column_loss)
        if REDUCTION == 0:
            result = round_to(loss.to(row_sums_ptr.dtype.element_ty), loss_ptr.dtype.element_ty)
            tl.store(loss_ptr + targets, result, mask=rows < n_rows)
        losses += tl.where(rows < n_rows, loss, 0.0)
        counts += tl.where(rows < n_rows, count, 0.0)
    if REDUCTION != 0:
        total, count = tl.sum(losses, 0), tl.sum(counts, 0)
        if partial_ptr is not None:
            tl.store(partial_ptr + tl.program_id(0), total)
            tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), count)
        else:
            if REDUCTION == 1 and LOSS == SUPCON:
                total = total / tl.maximum(count, 1.0)
            elif REDUCTION == 1:
                total = total / n_total
            result = round_to(total.to(row_sums_ptr.dtype.element_ty), loss_ptr.dtype.element_ty)
            tl.store(loss_ptr, result)


# ---- backward ----


@triton.jit
def _loss_gradients(losses, samples, exists):
    """lse, and alpha and beta times the gradient of the loss; of a row that does not count, whatever that gradient, no
    exponential and 0."""
    statistics_ptr, step, upstream_ptr = losses
    upstream = tl.load(upstream_ptr + samples, mask=exists, other=0.0)
    lse = tl.load(statistics_ptr + samples, mask=exists, other=0.0)
    alpha = tl.load(statistics_ptr + step + samples, mask=exists, other=0.0)
    beta = tl.load(statistics_ptr + 2 * step + samples, mask=exists, other=0.0)
    alpha, beta = tl.where(alpha == 0.0, 0.0, alpha * upstream), tl.where(beta == 0.0, 0.0, beta * upstream)
    return tl.where(alpha == 0.0, float("inf"), lse), alpha, beta


@triton.jit
def _store_gradient(
    products,
    row,
    start,
    columns,
    row_side,
    column_side,
    column_vectors,
    log_q_ptr,
    numbers,
    shift,
    row_losses,
    column_losses,
    outer_scale,
    target,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
    MIRRORED: tl.constexpr,
):
    """Stores H of some rows and a tile's columns."""
    ROWS: tl.constexpr = products.shape[0]
    COLUMNS: tl.constexpr = products.shape[1]
    rows = row + start + tl.arange(0, ROWS)
    _, _, _, _, n_rows = row_side
    row_exists = rows < n_rows
    row_vectors = _vectors(row_side, rows, row_exists, LOSS, ONE_LABEL)
    row_x, column_x, positive, negative, row_factor, column_factor = _exponents(
        products, rows, columns, row_side, column_side, row_vectors, column_vectors, log_q_ptr, numbers, LOSS, NORM,
        PUSH, ONE_LABEL, WITH_FACTORS, INNER,
    )  # fmt: skip
    lse, alpha, row_beta = _loss_gradients(row_losses, rows, row_exists)
    beta = tl.broadcast_to(row_beta[:, None], (ROWS, COLUMNS))
    if INNER:  # one exponential for both
        share = tl.broadcast_to((alpha * tl.exp2(shift - lse))[:, None], (ROWS, COLUMNS))
        gradient = _weigh(share, negative, row_factor, WITH_FACTORS)
    else:
        gradient = _weigh(tl.exp2(row_x - lse[:, None]) * alpha[:, None], negative, row_factor, WITH_FACTORS)
    if column_losses is not None:
        _, _, _, _, n_columns = column_side
        lse, alpha, column_beta = _loss_gradients(column_losses, columns, columns < n_columns)
        beta += column_beta[None, :]
        if INNER:
            share = tl.broadcast_to((alpha * tl.exp2(shift - lse))[None, :], (ROWS, COLUMNS))
            gradient += _weigh(share, negative, column_factor, WITH_FACTORS)
        else:
            terms = tl.exp2(column_x - lse[None, :]) * alpha[None, :]
            gradient += _weigh(terms, negative, column_factor, WITH_FACTORS)
    if INNER:
        gradient *= tl.exp2(row_x - shift)
    gradient = tl.where(positive | negative, gradient, 0.0)
    gradient = tl.where(positive, gradient - beta, gradient)
    row_scale, _, _, _ = row_vectors
    column_scale, _, _, _ = column_vectors
    gradient = gradient * (row_scale * outer_scale)[:, None] * column_scale[None, :]

    target_ptr, stride, target_row, target_column, mirrored_columns = target
    gradient = round_to(gradient, target_ptr.dtype.element_ty)
    rows, columns = target_row + start + tl.arange(0, ROWS), target_column + tl.arange(0, COLUMNS)
    tl.store(_block_pointers(target_ptr, stride, target_row + start, target_column, ROWS, COLUMNS), gradient)
    if MIRRORED:
        pointers = target_ptr + columns.to(tl.int64)[None, :] * stride + rows[:, None]
        tl.store(pointers, gradient, mask=(columns < mirrored_columns)[None, :])


@triton.jit
def _gradient_tile(
    row_operand_ptr,
    column_operand_ptr,
    depth,
    block,
    row,
    column,
    row_side,
    column_side,
    log_q_ptr,
    numbers,
    shift,
    row_losses,
    column_losses,
    outer_scale,
    target,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
    MIRRORED: tl.constexpr,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    block_ptr, stride, block_row, block_column = block
    _, _, _, _, n_columns = column_side
    columns = column + tl.arange(0, SIZE)
    column_vectors = _vectors(column_side, columns, columns < n_columns, LOSS, ONE_LABEL)
    if block_ptr is None:
        products = _products(row_operand_ptr, column_operand_ptr, row, column, depth, SIZE, DEPTH, PRECISION, TOTAL)
        _store_gradient(
            products, row, 0, columns, row_side, column_side, column_vectors, log_q_ptr, numbers, shift, row_losses,
            column_losses, outer_scale, target, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, INNER,
            MIRRORED,
        )  # fmt: skip
    else:
        products = tl.load(_block_pointers(block_ptr, stride, block_row, block_column, PIECE, SIZE))
        for start in range(0, SIZE, PIECE):
            next_row = block_row + tl.minimum(start + PIECE, SIZE - PIECE)
            next_products = tl.load(_block_pointers(block_ptr, stride, next_row, block_column, PIECE, SIZE))
            _store_gradient(
                products, row, start, columns, row_side, column_side, column_vectors, log_q_ptr,
                numbers, shift, row_losses, column_losses, outer_scale, target, LOSS, NORM, PUSH, ONE_LABEL,
                WITH_FACTORS, INNER, MIRRORED,
            )  # fmt: skip
            products = next_products


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    row_operand_ptr,
    column_operand_ptr,
    block_ptr,  # as sums_kernel takes them, to column_weights_ptr
    row_scales_ptr,
    column_scales_ptr,
    row_labels_ptr,
    column_labels_ptr,
    row_preds_ptr,
    column_preds_ptr,
    row_weights_ptr,
    column_weights_ptr,
    log_q_ptr,
    active_ptr,
    row_statistics_ptr,  # [3, ..], as finish_kernel stores them
    column_statistics_ptr,  # or None where columns have no loss
    row_upstream_ptr,  # [n_rows] gradients of the rows' losses
    column_upstream_ptr,
    scale_ptr,  # [] a power of two, or None
    target_ptr,  # [.., block_stride] receives H z / operand of row and column, times scale / temperature
    n_rows,
    n_columns,
    depth,
    n_labels,
    diagonal,
    first_row,
    first_column,
    row_tiles,
    block_stride,
    row_statistics_step,
    column_statistics_step,
    score_scale: tl.float64,
    push_scale: tl.float64,
    window: tl.float64,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    SHIFT: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A program takes a tile; of a triangle it stores it twice."""
    if TRIANGLE:
        row_tile, column_tile = _triangle(tl.program_id(0))
    else:
        row_tile, column_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first_row, first_column = tl.multiple_of(first_row, SIZE), tl.multiple_of(first_column, SIZE)
    row, column = first_row + row_tile * SIZE, first_column + column_tile * SIZE
    is_active = True
    if active_ptr is not None:
        is_active = _is_active(active_ptr, row, column, n_columns, SIZE)
    if is_active:
        scale = tl.full((), score_scale, TOTAL)
        push = tl.full((), push_scale, TOTAL)
        outer_scale = tl.full((), LN_2, TOTAL)  # of the pair's two scales, what is no 1 / temperature
        if scale_ptr is not None:
            outer_scale *= tl.load(scale_ptr)
        row_side = (row_scales_ptr, row_labels_ptr, row_preds_ptr, row_weights_ptr, n_rows)
        column_side = (column_scales_ptr, column_labels_ptr, column_preds_ptr, column_weights_ptr, n_columns)
        numbers = (n_labels, diagonal, window, scale, push)
        block = (block_ptr, block_stride, row_tile * SIZE, column_tile * SIZE)
        row_losses = (row_statistics_ptr, row_statistics_step, row_upstream_ptr)
        column_losses = None
        if column_statistics_ptr is not None:
            column_losses = (column_statistics_ptr, column_statistics_step, column_upstream_ptr)
        mirrored_columns = tl.where(row_tile == column_tile, 0, n_columns)
        target = (target_ptr, block_stride, row_tile * SIZE, column_tile * SIZE, mirrored_columns)
        shift, is_inner = _constant_shift(row, column, row_side, column_side, numbers, SHIFT, NORM, SIZE)
        if SHIFT == MAXIMUM:
            is_inner = False
        if is_inner:
            _gradient_tile(
                row_operand_ptr, column_operand_ptr, depth, block, row, column, row_side, column_side, log_q_ptr,
                numbers, shift, row_losses, column_losses, outer_scale, target, LOSS, NORM, PUSH, ONE_LABEL,
                WITH_FACTORS, True, TRIANGLE, SIZE, PIECE, DEPTH, PRECISION, TOTAL,
            )  # fmt: skip
        else:
            _gradient_tile(
                row_operand_ptr, column_operand_ptr, depth, block, row, column, row_side, column_side, log_q_ptr,
                numbers, shift, row_losses, column_losses, outer_scale, target, LOSS, NORM, PUSH, ONE_LABEL,
                WITH_FACTORS, False, TRIANGLE, SIZE, PIECE, DEPTH, PRECISION, TOTAL,
            )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def finish_gradient_kernel(
    product_ptr,  # [n_rows, depth] sum_j H_ij z_j, times z / operand of the row, and times scale
    operand_ptr,  # [n_rows, depth]
    norms_ptr,  # [4, ..], as prepare_kernel stores them
    order_ptr,
    scale_ptr,
    out_ptr,  # [n_rows, n_features]
    n_rows,
    n_features,
    depth,
    norms_step,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """df = (dz - z (z . dz)) / |f|"""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < n_rows
    targets = rows.to(tl.int64)
    if order_ptr is not None:
        targets = tl.load(order_ptr + rows, mask=exists, other=0)
    offsets = rows.to(tl.int64)[:, None] * depth
    out_ptr += targets[:, None] * n_features
    features = tl.arange(0, BLOCK_H)[None, :]
    TOTAL: tl.constexpr = product_ptr.dtype.element_ty
    inverse = tl.load(norms_ptr + norms_step + rows, mask=exists, other=1.0)
    outer = tl.load(norms_ptr + 2 * norms_step + rows, mask=exists, other=0.0)
    factor = outer / inverse
    if scale_ptr is not None:
        factor /= tl.load(scale_ptr)
    along = tl.zeros((BLOCK_R,), TOTAL)
    if NORMALIZE:
        for start in range(0, n_features, BLOCK_H):
            inside = exists[:, None] & (start + features < n_features)
            product = tl.load(product_ptr + offsets + start + features, mask=inside, other=0.0)
            z = tl.load(operand_ptr + offsets + start + features, mask=inside, other=0.0).to(TOTAL)
            along += tl.sum(z * product, 1)
        along *= inverse * inverse * tl.load(norms_ptr + 3 * norms_step + rows, mask=exists, other=0.0)
    for start in range(0, n_features, BLOCK_H):
        inside = exists[:, None] & (start + features < n_features)
        gradient = tl.load(product_ptr + offsets + start + features, mask=inside, other=0.0)
        if NORMALIZE:
            z = tl.load(operand_ptr + offsets + start + features, mask=inside, other=0.0).to(TOTAL)
            gradient -= z * along[:, None]
        gradient = round_to(gradient * factor[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + features, gradient, mask=inside)


# ---- skipped tiles ----


@triton.jit
def _gaps(labels_ptr, tile, others, n_rows, n_labels, NORM: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Bounds from below of the distances between a tile's samples and the other tiles': [CHUNK]."""
    own = tile * SIZE + tl.arange(0, SIZE)
    samples = others[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((CHUNK,), labels_ptr.dtype.element_ty)
    for k in range(n_labels):
        low, high = _extremes(labels_ptr + own.to(tl.int64) * n_labels + k, own < n_rows)
        others_low, others_high = _extremes(labels_ptr + samples.to(tl.int64) * n_labels + k, samples < n_rows)
        total = _add_dimension(total, tl.maximum(tl.maximum(low - others_high, others_low - high), 0.0), NORM)
    if NORM == 2:
        total = _square_root(total)
    return total


@triton.jit(do_not_specialize=COUNTS)
def active_tiles_kernel(
    labels_ptr,  # [n_rows, n_labels]
    preds_ptr,
    active_ptr,  # [n_tiles, n_tiles] int8 receives 1 where a tile may have positives or negatives
    list_ptr,  # [n_tiles, n_blocks, block_tiles] int32 receives for each tile the numbers of the active ones of a block
    length_ptr,  # [n_tiles, n_blocks] int32 receives how many these are
    n_rows,
    n_labels,
    block_tiles,
    window: tl.float64,
    NORM: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program takes one tile of rows and a block of tiles of columns."""
    n_tiles = tl.cdiv(n_rows, SIZE)
    tile, block = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    n_blocks = tl.cdiv(n_tiles, block_tiles)
    # Sums over several labels may be rounded differently than those of a tile's pairs are.
    limit = tl.full((), window, labels_ptr.dtype.element_ty) * (1.0 + 1e-5)
    list_ptr += (tile.to(tl.int64) * n_blocks + block) * block_tiles
    active_ptr += tile.to(tl.int64) * n_tiles
    length = 0
    last = tl.minimum((block + 1) * block_tiles, n_tiles)
    for first in range(block * block_tiles, last, CHUNK):
        others = first + tl.arange(0, CHUNK)
        near = _gaps(labels_ptr, tile, others, n_rows, n_labels, NORM, SIZE, CHUNK) <= limit
        near_preds = _gaps(preds_ptr, tile, others, n_rows, n_labels, NORM, SIZE, CHUNK) <= limit
        active = ((near | near_preds) & (others < last)).to(tl.int32)
        tl.store(active_ptr + others, active.to(tl.int8), mask=others < last)
        tl.store(list_ptr + length + tl.cumsum(active, 0) - 1, others, mask=active != 0)
        length += tl.sum(active, 0)
    tl.store(length_ptr + tile * n_blocks + block, length)


@triton.jit(do_not_specialize=COUNTS)
def active_scores_kernel(
    operand_ptr,  # [.., depth]
    active_ptr,
    block_ptr,  # [.., block_stride] receives the products of active tiles
    n_rows,
    depth,
    first_row,
    first_column,
    row_tiles,
    block_stride,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    row_tile, column_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    row, column = first_row + row_tile * SIZE, first_column + column_tile * SIZE
    if _is_active(active_ptr, row, column, n_rows, SIZE):
        products = _products(operand_ptr, operand_ptr, row, column, depth, SIZE, DEPTH, PRECISION, TOTAL)
        rows, columns = row_tile * SIZE + tl.arange(0, SIZE), column_tile * SIZE + tl.arange(0, SIZE)
        tl.store(block_ptr + rows.to(tl.int64)[:, None] * block_stride + columns[None, :], products)


@triton.jit(do_not_specialize=COUNTS)
def active_product_kernel(
    block_ptr,  # [.., block_stride] tiles of H, active ones alone
    operand_ptr,  # [.., depth]
    out_ptr,  # [.., depth] receives, or gains, the block's product with the operand's rows
    list_ptr,  # as active_tiles_kernel stores them
    length_ptr,
    n_rows,
    depth,
    first_row,  # of those that receive
    first_column,  # of those that are multiplied
    row_tiles,
    block_tiles,
    block_stride,
    TRANSPOSED: tl.constexpr,
    ADDED: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A program takes WIDTH features of a tile of rows, and of the tiles of its row in H those on its list."""
    STEPS: tl.constexpr = SIZE // DEPTH
    n_blocks = tl.cdiv(tl.cdiv(n_rows, SIZE), block_tiles)
    tile = tl.program_id(0) % row_tiles
    features = tl.program_id(0) // row_tiles * WIDTH + tl.arange(0, WIDTH)
    place = (first_row // SIZE + tile).to(tl.int64) * n_blocks + first_column // SIZE // block_tiles
    list_ptr += place * block_tiles
    length = tl.load(length_ptr + place)
    rows = tile * SIZE + tl.arange(0, SIZE)
    inside = (features < depth)[None, :]
    total = tl.zeros((SIZE, WIDTH), TOTAL)
    for step in range(0, length * STEPS):
        columns = tl.load(list_ptr + step // STEPS) * SIZE + step % STEPS * DEPTH + tl.arange(0, DEPTH)
        block_columns = columns - first_column
        if TRANSPOSED:
            pointers = block_ptr + block_columns.to(tl.int64)[None, :] * block_stride + rows[:, None]
        else:
            pointers = block_ptr + rows.to(tl.int64)[:, None] * block_stride + block_columns[None, :]
        operand_pointers = operand_ptr + columns.to(tl.int64)[:, None] * depth + features[None, :]
        operand = tl.load(operand_pointers, mask=inside, other=0.0)
        tile_of_h = tl.load(pointers).to(operand.dtype)
        total = tl.dot(tile_of_h, operand, total, input_precision=PRECISION, out_dtype=TOTAL)
    pointers = out_ptr + (first_row + rows).to(tl.int64)[:, None] * depth + features[None, :]
    if ADDED:
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, total, mask=inside)

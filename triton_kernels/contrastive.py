"""ConR, supervised contrastive and InfoNCE losses on tensor cores: pairs of samples exist only as tiles in registers.

Rows i and columns j (the same samples; for InfoNCE queries and keys), with z = f / max(|f|, 1e-12) or f itself:

    s_ij = z_i . z_j / temperature,   lse_i = log( sum_j a_ij exp(x_ij) + extra_i ),   T_i = sum_{j in P_i} x_ij

    loss_i = alpha_i lse_i - beta_i T_i
    G_ij = d loss_i / d s_ij = alpha_i a_ij exp(x_ij - lse_i) - beta_i [j in P_i]
    H_ij = u_i G_ij + u_j G'_ji,   dz_i = sum_j H_ij z_j / temperature,   df = (dz - z (z . dz)) / |f|

    ConR            x_ij = s_ij, of negatives + eta d_ij;   a_ij = 1, of negatives w_i (nyud2: w_i eta d_ij)
    supervised      x_ij = s_ij;   a_ij = 1 for j != i
    InfoNCE         x_ij = s_ij - log_q_j;   a_ij = 1 but for duplicates of the positive

u is the gradient of the rows' losses; G' is that of the columns' losses, which for ConR and supervised contrastive are
the rows again. Kernels hold exponents in units of log 2. Sums of a tile are in float32 (float64 for float64), what
follows from a row's sums in float64.

Operands. A pass writes the features times a power of two a row that brings the norm into [1, 2): exact, and no product
of theirs overflows, whatever the features. What is left of the norm, and 1 / temperature, multiplies the scores. The
copy is padded with zeros to whole tiles, so that tiles are loaded without masks, and is in the order of the labels
where tiles are skipped. It moves 2 N D elements beside the N^2 D operations of the forward pass.

Forward. A tile's product takes 2 SIZE^2 D operations, its exponentials serve rows and columns: one for both where the
range of a tile's exponents is small (a constant is subtracted), else one for each (the row's and the column's maximum).
ConR and supervised contrastive take the tiles of the upper triangle alone. A program takes a square of tiles and owns
one slot of sums for its rows and one for its columns; there are at most 64 slots for each row, however many rows.
Adding the slots up in their order makes the result the same on every run. N^2 D operations, N^2 / 2 exponentials;
16 to 20 bytes for each row and slot.

Backward. Tiles of H, made anew and rounded to the dtype of the features, fill a block of up to 64 MB, which torch's
matrix product multiplies with the operands. A block off the diagonal serves rows and columns, as H and as its
transpose: 3 N^2 D operations in all, and 4 bytes or 2 written and read twice for every two pairs. What a row's norm
and z (z . dz) do to the sum is a pass of its own.

Skipped tiles (ConR). Bounds of labels and predictions of a tile's rows and columns prove many tiles without positives
and negatives where rows are ordered by label and prediction. It takes two sorts, and is done where the products take
several times their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyreg.triton_kernels._shared import EMULATED, OPTIONS, gpu_family, product_into, product_precision, round_to

_CONR = tl.constexpr(0)
_SUPCON = tl.constexpr(1)
_INFO_NCE = tl.constexpr(2)

# What eta d_ij does to a negative of ConR.
_NO_PUSH = tl.constexpr(0)
_PUSH_EXPONENT = tl.constexpr(1)
_PUSH_FACTOR = tl.constexpr(2)

# What is subtracted from exponents before the exponential: a constant, the maximum of the tile's row or column, or
# whichever of the two the labels of the tile allow.
_CONSTANT = tl.constexpr(0)
_MAXIMUM = tl.constexpr(1)
_BY_TILE = tl.constexpr(2)

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
# Exponents of a range of 60 (87 in units of log 2) and sums of 2^31 of them are normal numbers of float32.
_SMALL_RANGE = tl.constexpr(60 * math.log2(math.e))
# Counts of positives and negatives in a tile share a sum: more than a tile has rows, and with it exact in float32.
_NEGATIVE = tl.constexpr(1024.0)


# Sizes of which a kernel exists but once: a size of 1 would be a constant, and no tensor.
_COUNTS = (
    "n_rows", "n_columns", "n_labels", "n_total", "diagonal", "square_rows", "square_columns", "row_slots",
    "column_slots", "first_row_tile", "first_column_tile", "row_tiles", "column_tiles", "block_tiles",
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
    inverse = tl.full((BLOCK_R,), 1.0, TOTAL)
    projected = tl.zeros((BLOCK_R,), TOTAL)
    if NORMALIZE:
        # The norm of the features times a power of two that follows the largest of them.
        largest = tl.zeros((BLOCK_R,), TOTAL)
        scale = _inverse_power(largest)
        squares = tl.zeros((BLOCK_R,), TOTAL)
        for start in range(0, n_features, BLOCK_H):
            inside = exists[:, None] & (start + features < n_features)
            x = tl.load(features_ptr + start + features, mask=inside, other=0.0).to(TOTAL)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
            smaller = _inverse_power(largest)
            shrink = smaller / scale
            scaled = x * smaller[:, None]
            squares = squares * shrink * shrink + tl.sum(scaled * scaled, 1)
            scale = smaller
        norm = _square_root(squares)
        tiny = norm < 1e-12 * scale
        shrink = _inverse_power(norm)
        scale = tl.where(tiny, 1e12, scale * shrink)
        inverse = tl.where(tiny, 1.0, 1.0 / (norm * shrink))
        projected = tl.where(tiny, 0.0, 1.0).to(TOTAL)

    stored = rows < padded_rows
    tl.store(norms_ptr + rows, inverse, mask=stored)
    tl.store(norms_ptr + padded_rows + rows, scale * inverse, mask=stored)
    tl.store(norms_ptr + 2 * padded_rows + rows, projected, mask=stored)
    operand_ptr += rows.to(tl.int64)[:, None] * depth
    for start in range(0, depth, BLOCK_H):
        inside = exists[:, None] & (start + features < n_features)
        x = tl.load(features_ptr + start + features, mask=inside, other=0.0).to(TOTAL) * scale[:, None]
        inside = stored[:, None] & (start + features < depth)
        tl.store(operand_ptr + start + features, round_to(x, operand_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def prepare_kernel(
    row_features_ptr,  # [n_rows, n_features]
    column_features_ptr,  # [n_columns, n_features], or None
    order_ptr,  # [n_rows] int64: which row comes where, or None
    row_operand_ptr,  # [padded_rows, depth] receives the features times a power of two a row, then zeros
    column_operand_ptr,
    row_norms_ptr,  # [3, padded_rows] receives z / operand, 1 / max(|f|, 1e-12), and whether df loses its part along z
    column_norms_ptr,
    n_rows,
    n_columns,
    n_features,
    padded_rows,
    padded_columns,
    depth,
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
                TOTAL, NORMALIZE, False, BLOCK_R, BLOCK_H,
            )  # fmt: skip
        else:
            row -= row_programs * BLOCK_R
            _prepare_rows(
                row, column_features_ptr, None, column_operand_ptr, column_norms_ptr, n_columns, n_features,
                padded_columns, depth, TOTAL, NORMALIZE, False, BLOCK_R, BLOCK_H,
            )  # fmt: skip
    else:
        _prepare_rows(
            row, row_features_ptr, order_ptr, row_operand_ptr, row_norms_ptr, n_rows, n_features, padded_rows, depth,
            TOTAL, NORMALIZE, SORTED, BLOCK_R, BLOCK_H,
        )  # fmt: skip


# ---- the pairs of a tile ----
#
# A side is (inverse_ptr, labels_ptr, preds_ptr, weights_ptr, n): of its n samples the factors z / operand, for ConR
# targets [n, n_labels], preds and weights, for supervised contrastive labels and for InfoNCE ids. What a loss does
# without is None.


@triton.jit
def _add_dimension(total, difference, NORM: tl.constexpr):
    if NORM == 0:
        return tl.maximum(total, difference, propagate_nan=tl.PropagateNan.ALL)
    elif NORM == 1:
        return total + difference
    else:
        return total + difference * difference


@triton.jit
def _distances(
    row_ptr,
    column_ptr,
    rows,
    columns,
    row_exists,
    column_exists,
    n_labels,
    NORM: tl.constexpr,
    ONE_LABEL: tl.constexpr,
):
    """[ROWS, COLUMNS]; NaN beyond the last row or column, which is in no relation to any."""
    if ONE_LABEL:
        row_label = tl.load(row_ptr + rows, mask=row_exists, other=float("nan"))
        column_label = tl.load(column_ptr + columns, mask=column_exists, other=float("nan"))
        return tl.abs(row_label[:, None] - column_label[None, :])
    else:
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
def _extremes(pointers, exists):
    """The smallest and the largest number there, NaN aside."""
    label = tl.load(pointers, mask=exists, other=float("nan"))
    known = label == label
    return (
        tl.min(tl.where(known, label, float("inf")), 0),
        tl.max(tl.where(known, label, float("-inf")), 0),
    )


@triton.jit
def _largest_distance(
    row_ptr, column_ptr, rows, columns, n_rows, n_columns, n_labels, NORM: tl.constexpr, ONE_LABEL: tl.constexpr
):
    """A bound of the distances between the rows and the columns."""
    if ONE_LABEL:
        row_low, row_high = _extremes(row_ptr + rows, rows < n_rows)
        column_low, column_high = _extremes(column_ptr + columns, columns < n_columns)
        return tl.maximum(row_high - column_low, column_high - row_low)
    else:
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
    row, column, row_side, column_side, numbers, SHIFT: tl.constexpr, NORM: tl.constexpr, ONE_LABEL: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """A bound of the tile's exponents, and whether the tile is an inner one: all its pairs exist, none is of a sample
    and itself or its own positive, and no exponent is so far below the bound that its exponential loses digits."""
    _, row_labels_ptr, _, _, n_rows = row_side
    _, column_labels_ptr, _, _, n_columns = column_side
    n_labels, diagonal, _, scale, push = numbers
    shift = scale
    if SHIFT == _BY_TILE:
        rows, columns = row + tl.arange(0, SIZE), column + tl.arange(0, SIZE)
        reach = _largest_distance(
            row_labels_ptr, column_labels_ptr, rows, columns, n_rows, n_columns, n_labels, NORM, ONE_LABEL
        )
        shift += push * reach.to(scale.dtype)
    is_inner = (row + SIZE <= n_rows) & (column + SIZE <= n_columns) & (scale + shift <= _SMALL_RANGE)
    return shift, is_inner & (tl.abs(row + diagonal - column) >= SIZE)


@triton.jit
def _products(
    row_operand,
    column_operand,
    row,
    column,
    depth,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """[SIZE, SIZE] products of the operands' rows from `row` and `column` on."""
    total = tl.zeros((SIZE, SIZE), TOTAL)
    if DESCRIPTORS:
        for start in range(0, depth, DEPTH):
            row_tile = row_operand.load([row, start])
            column_tile = column_operand.load([column, start])
            total = tl.dot(row_tile, column_tile.T, total, input_precision=PRECISION, out_dtype=TOTAL)
    else:
        features = tl.arange(0, DEPTH)
        rows, columns = row + tl.arange(0, SIZE), column + tl.arange(0, SIZE)
        row_pointers = row_operand + rows.to(tl.int64)[:, None] * depth + features[None, :]
        column_pointers = column_operand + columns.to(tl.int64)[None, :] * depth + features[:, None]
        for _ in range(0, depth, DEPTH):
            row_tile, column_tile = tl.load(row_pointers), tl.load(column_pointers)
            total = tl.dot(row_tile, column_tile, total, input_precision=PRECISION, out_dtype=TOTAL)
            row_pointers += DEPTH
            column_pointers += DEPTH
    return total


@triton.jit
def _relations(
    rows,
    columns,
    row_side,
    column_side,
    numbers,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    INNER: tl.constexpr,
):
    """Which pairs are positives, which negatives, [ROWS, COLUMNS] each, and for ConR the distances of labels."""
    _, row_labels_ptr, row_preds_ptr, _, n_rows = row_side
    _, column_labels_ptr, column_preds_ptr, _, n_columns = column_side
    n_labels, diagonal, window, _, _ = numbers
    row_exists, column_exists = rows < n_rows, columns < n_columns
    if INNER:
        own = tl.full((rows.shape[0], columns.shape[0]), False, tl.int1)
        exists = ~own
    else:
        own = (rows + diagonal)[:, None] == columns[None, :]
        exists = row_exists[:, None] & column_exists[None, :]
    if LOSS == _CONR:
        limit = tl.full((), window, row_labels_ptr.dtype.element_ty)
        distance = _distances(
            row_labels_ptr, column_labels_ptr, rows, columns, row_exists, column_exists, n_labels, NORM, ONE_LABEL
        )
        pred_distance = _distances(
            row_preds_ptr, column_preds_ptr, rows, columns, row_exists, column_exists, n_labels, NORM, ONE_LABEL
        )
        return (distance <= limit) & ~own, (distance > limit) & (pred_distance <= limit), distance
    else:
        same = own
        if row_labels_ptr is not None:
            row_label = tl.load(row_labels_ptr + rows, mask=row_exists, other=0)
            column_label = tl.load(column_labels_ptr + columns, mask=column_exists, other=0)
            same = row_label[:, None] == column_label[None, :]
        if LOSS == _SUPCON:
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
    log_q_ptr,
    numbers,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    INNER: tl.constexpr,
):
    """Exponents of a pair in its row's and its column's loss; whether it is a positive, or a negative; by what the
    exponential of a negative is multiplied in the row's and the column's loss."""
    row_inverse_ptr, _, _, row_weights_ptr, n_rows = row_side
    column_inverse_ptr, _, _, column_weights_ptr, n_columns = column_side
    _, _, _, scale, push = numbers
    row_exists, column_exists = rows < n_rows, columns < n_columns
    positive, negative, distance = _relations(
        rows, columns, row_side, column_side, numbers, LOSS, NORM, ONE_LABEL, INNER
    )
    row_scale = tl.load(row_inverse_ptr + rows, mask=row_exists, other=0.0) * scale
    column_scale = tl.load(column_inverse_ptr + columns, mask=column_exists, other=0.0)
    x = products * row_scale[:, None] * column_scale[None, :]
    row_factor = 1.0
    column_factor = 1.0
    if PUSH == _PUSH_EXPONENT:
        x = tl.where(negative, x + distance.to(x.dtype) * push, x)
    elif PUSH == _PUSH_FACTOR:
        row_factor = distance.to(x.dtype) * push
        column_factor = row_factor
    if row_weights_ptr is not None:
        row_weight = tl.load(row_weights_ptr + rows, mask=row_exists, other=0.0)[:, None]
        column_weight = tl.load(column_weights_ptr + columns, mask=column_exists, other=0.0)[None, :]
        if PUSH == _PUSH_FACTOR:
            row_factor = row_factor * row_weight
            column_factor = column_factor * column_weight
        else:
            row_factor = row_weight
            column_factor = column_weight
    row_x = x
    if log_q_ptr is not None:
        log_q = tl.load(log_q_ptr + columns, mask=column_exists, other=0.0).to(x.dtype)
        row_x = x - (log_q * _LOG2_E)[None, :]
    return row_x, x, positive, negative, row_factor, column_factor


@triton.jit
def _weigh(x, negative, factor, WITH_FACTORS: tl.constexpr):
    if WITH_FACTORS:
        x = tl.where(negative, x * factor, x)
    return x


# ---- forward ----


@triton.jit
def _fraction(old, new):
    """2^(old - new), 1 where both are infinite."""
    return tl.where(old == new, 1.0, tl.exp2(old - new))


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sum_along(
    x,
    positive,
    negative,
    factor,
    shift,
    AXIS: tl.constexpr,
    LOSS: tl.constexpr,
    INNER: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """What has been subtracted from the exponents, exponentials, positives' exponents, positives, negatives."""
    related = positive | negative
    if INNER:
        largest = tl.full((x.shape[1 - AXIS],), shift, TOTAL)
        terms = tl.exp2(x - shift)
    else:
        largest = tl.max(tl.where(related, x, float("-inf")), AXIS)
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        terms = tl.exp2(x - tl.expand_dims(finite, AXIS))
    terms = tl.where(related, _weigh(terms, negative, factor, WITH_FACTORS), 0.0)
    if INNER and LOSS == _INFO_NCE:  # no positives here
        nothing = tl.zeros((x.shape[1 - AXIS],), TOTAL)
        return largest, tl.sum(terms, AXIS), nothing, nothing, nothing
    else:
        scores = tl.where(positive, x, 0.0)
        counts = tl.where(positive, 1.0, 0.0).to(TOTAL)
        if LOSS == _CONR:
            counts = tl.where(negative, _NEGATIVE, counts)
        if EMULATED:
            exponentials, positive_sum, count = tl.sum(terms, AXIS), tl.sum(scores, AXIS), tl.sum(counts, AXIS)
        else:  # at once, and in one layout
            exponentials, positive_sum, count = tl.reduce((terms, scores, counts), AXIS, _add_triples)
        negatives = tl.floor(count * (1.0 / _NEGATIVE))
        return largest, exponentials, positive_sum, count - negatives * _NEGATIVE, negatives


@triton.jit
def _stored_sums(sums_ptr, step, inside, WITH_NEGATIVES: tl.constexpr):
    """Shift, exponentials, positives' scores, positives, negatives in memory; nothing where not inside."""
    shift = tl.load(sums_ptr, mask=inside, other=float("-inf"))
    exponentials = tl.load(sums_ptr + step, mask=inside, other=0.0)
    positive_sum = tl.load(sums_ptr + 2 * step, mask=inside, other=0.0)
    positives = tl.load(sums_ptr + 3 * step, mask=inside, other=0.0)
    negatives = positives
    if WITH_NEGATIVES:
        negatives = tl.load(sums_ptr + 4 * step, mask=inside, other=0.0)
    return shift, exponentials, positive_sum, positives, negatives


@triton.jit
def _store_sums(
    sums_ptr, step, shift, exponentials, positive_sum, positives, negatives, inside, WITH_NEGATIVES: tl.constexpr
):
    tl.store(sums_ptr, shift, mask=inside)
    tl.store(sums_ptr + step, exponentials, mask=inside)
    tl.store(sums_ptr + 2 * step, positive_sum, mask=inside)
    tl.store(sums_ptr + 3 * step, positives, mask=inside)
    if WITH_NEGATIVES:
        tl.store(sums_ptr + 4 * step, negatives, mask=inside)


@triton.jit
def _add_exponentials(shift, exponentials, other_shift, other_exponentials):
    larger = tl.maximum(shift, other_shift)
    return larger, exponentials * _fraction(shift, larger) + other_exponentials * _fraction(other_shift, larger)


@triton.jit
def _triangle(index):
    """(i, j) with i <= j, in the order of j (j + 1) / 2 + i."""
    j = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > index, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= index, j + 1, j)
    return index - j * (j + 1) // 2, j


@triton.jit
def _sum_parts(
    products,
    sums,
    row,
    column,
    row_side,
    column_side,
    log_q_ptr,
    numbers,
    shift,
    column_slot,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Adds a tile to its rows' sums and, in memory, to its columns'. A part of its columns at a time: what is made of
    the products takes several times their registers."""
    ROWS: tl.constexpr = products.shape[0]
    COLUMNS: tl.constexpr = products.shape[1]
    if PARTS > 1:
        halves = tl.permute(tl.reshape(products, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        sums = _sum_parts(
            left, sums, row, column, row_side, column_side, log_q_ptr, numbers, shift, column_slot, LOSS, NORM, PUSH,
            ONE_LABEL, WITH_FACTORS, INNER, WITH_COLUMNS, PARTS // 2, TOTAL,
        )  # fmt: skip
        return _sum_parts(
            right, sums, row, column + COLUMNS // 2, row_side, column_side, log_q_ptr, numbers, shift, column_slot,
            LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, INNER, WITH_COLUMNS, PARTS // 2, TOTAL,
        )  # fmt: skip
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        row_x, column_x, positive, negative, row_factor, column_factor = _exponents(
            products, rows, columns, row_side, column_side, log_q_ptr, numbers, LOSS, NORM, PUSH, ONE_LABEL, INNER
        )
        if WITH_COLUMNS:
            sums_ptr, step, kept, stored = column_slot
            column_shift, exponentials, positive_sum, positives, negatives = _sum_along(
                column_x, positive, negative, column_factor, shift, 0, LOSS, INNER, WITH_FACTORS, TOTAL
            )
            old_shift, old_exponentials, old_positive_sum, old_positives, old_negatives = _stored_sums(
                sums_ptr + columns, step, columns < kept, LOSS == _CONR
            )
            tl.debug_barrier()  # threads that hold the same element have read it before one of them writes
            column_shift, exponentials = _add_exponentials(column_shift, exponentials, old_shift, old_exponentials)
            _store_sums(
                sums_ptr + columns, step, column_shift, exponentials, positive_sum + old_positive_sum,
                positives + old_positives, negatives + old_negatives, columns < stored, LOSS == _CONR,
            )  # fmt: skip
        row_shift, exponentials, positive_sum, positives, negatives = _sum_along(
            row_x, positive, negative, row_factor, shift, 1, LOSS, INNER, WITH_FACTORS, TOTAL
        )
        total_shift, total, total_positive_sum, total_positives, total_negatives = sums
        total_shift, total = _add_exponentials(total_shift, total, row_shift, exponentials)
        return (
            total_shift,
            total,
            total_positive_sum + positive_sum,
            total_positives + positives,
            total_negatives + negatives,
        )


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    row_operand,  # [.., depth], or its descriptor
    column_operand,
    row_inverse_ptr,  # [n_rows] z / operand
    column_inverse_ptr,
    row_labels_ptr,  # ConR: targets [n_rows, n_labels]; supervised: labels [n_rows] int64; InfoNCE: ids, or None
    column_labels_ptr,
    row_preds_ptr,  # ConR: preds [n_rows, n_labels]
    column_preds_ptr,
    row_weights_ptr,  # ConR: [n_rows], or None
    column_weights_ptr,
    log_q_ptr,  # InfoNCE: [n_columns], or None
    active_ptr,  # [row tiles, column tiles] int8: 0 where a tile has no positives and negatives, or None
    row_sums_ptr,  # [4 or 5, row slots, n_rows] receives shift, exponentials, positives' scores, positives, negatives
    column_sums_ptr,  # [4 or 5, column slots, n_columns]; row_sums_ptr where rows and columns are one
    n_rows,
    n_columns,
    depth,
    n_labels,
    diagonal,  # the column of row 0 itself, or of its positive
    square_rows,  # tiles of a program's square
    square_columns,
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
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A program takes a square of tiles, rows of tiles in turn.

    A row's sums over the square stay in registers; a column's are added to its slot in memory, which no other program
    has. Of a triangle's squares on the diagonal, all tiles are computed and rows alone have sums.
    """
    row_tiles, column_tiles = tl.cdiv(n_rows, SIZE), tl.cdiv(n_columns, SIZE)
    row_squares, column_squares = tl.cdiv(row_tiles, square_rows), tl.cdiv(column_tiles, square_columns)
    summed_columns = n_columns  # those before it have sums
    if TRIANGLE:
        square_row, square_column = _triangle(tl.program_id(0))
        summed_columns = tl.where(square_row == square_column, 0, n_columns)
    else:
        square_row, square_column = tl.program_id(0) % row_squares, tl.program_id(0) // row_squares
    row_step = column_squares.to(tl.int64) * n_rows
    column_step = row_squares.to(tl.int64) * n_columns
    row_sums_ptr += square_column.to(tl.int64) * n_rows
    column_sums_ptr += square_row.to(tl.int64) * n_columns

    scale = tl.full((), score_scale, TOTAL)
    push = tl.full((), push_scale, TOTAL)
    row_side = (row_inverse_ptr, row_labels_ptr, row_preds_ptr, row_weights_ptr, n_rows)
    column_side = (column_inverse_ptr, column_labels_ptr, column_preds_ptr, column_weights_ptr, n_columns)
    numbers = (n_labels, diagonal, window, scale, push)
    nothing = tl.zeros((SIZE,), TOTAL)
    least = tl.full((SIZE,), float("-inf"), TOTAL)
    for row_in_square in range(square_rows):
        row_tile = square_row * square_rows + row_in_square
        is_first = row_tile == square_row * square_rows
        row = row_tile * SIZE
        rows = row + tl.arange(0, SIZE)
        sums = (least, nothing, nothing, nothing, nothing)
        for column_in_square in range(square_columns):
            column_tile = square_column * square_columns + column_in_square
            column = column_tile * SIZE
            columns = column + tl.arange(0, SIZE)
            is_active = (row < n_rows) & (column < n_columns)
            if active_ptr is not None:
                offset = row_tile.to(tl.int64) * column_tiles + column_tile
                is_active = tl.load(active_ptr + offset, mask=is_active, other=0) != 0
            if is_active:
                products = _products(
                    row_operand, column_operand, row, column, depth, SIZE, DEPTH, DESCRIPTORS, PRECISION, TOTAL
                )
                column_slot = (column_sums_ptr, column_step, tl.where(is_first, 0, summed_columns), summed_columns)
                shift, is_inner = _constant_shift(
                    row, column, row_side, column_side, numbers, SHIFT, NORM, ONE_LABEL, SIZE
                )
                if SHIFT == _MAXIMUM:
                    is_inner = False
                if is_inner:
                    sums = _sum_parts(
                        products, sums, row, column, row_side, column_side, log_q_ptr, numbers, shift, column_slot,
                        LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, True, WITH_COLUMNS, PARTS, TOTAL,
                    )  # fmt: skip
                else:
                    sums = _sum_parts(
                        products, sums, row, column, row_side, column_side, log_q_ptr, numbers, shift, column_slot,
                        LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, False, WITH_COLUMNS, 2 * PARTS, TOTAL,
                    )  # fmt: skip
            elif WITH_COLUMNS:
                _store_sums(
                    column_sums_ptr + columns, column_step, least, nothing, nothing, nothing, nothing,
                    columns < tl.where(is_first, summed_columns, 0), LOSS == _CONR,
                )  # fmt: skip
        shift, exponentials, positive_sum, positives, negatives = sums
        _store_sums(
            row_sums_ptr + rows, row_step, shift, exponentials, positive_sum, positives, negatives, rows < n_rows,
            LOSS == _CONR,
        )  # fmt: skip
        if WITH_COLUMNS:
            tl.debug_barrier()  # before other threads read what these have stored


@triton.jit
def _row_terms(
    sums_ptr,  # [4 or 5, n_slots, n_rows]
    weights_ptr,
    statistics_ptr,  # [3, n_rows] receives lse, alpha, beta
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
        if LOSS == _CONR:
            negatives += tl.sum(tl.load(pointers + 4 * step, mask=inside, other=0.0).to(tl.float64), 0)

    shift = tl.where(largest == float("-inf"), 0.0, largest).to(tl.float64)
    active = positives > 0
    alpha = tl.full((BLOCK_R,), 1.0, tl.float64)
    beta = tl.full((BLOCK_R,), 1.0, tl.float64)
    if LOSS == _CONR:
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
    elif LOSS == _SUPCON:
        beta = 1.0 / tl.maximum(positives, 1.0)
    lse = tl.where(active, shift * _LN_2 + tl.log(tl.where(active, exponentials, 1.0)), 0.0)
    alpha = tl.where(active, alpha, 0.0)
    beta = tl.where(active, beta, 0.0)
    tl.store(statistics_ptr + targets, lse.to(TOTAL), mask=exists)
    tl.store(statistics_ptr + n_rows + targets, alpha.to(TOTAL), mask=exists)
    tl.store(statistics_ptr + 2 * n_rows + targets, beta.to(TOTAL), mask=exists)
    return tl.where(active, alpha * lse - beta * (positive_sum * _LN_2), 0.0), tl.where(active, 1.0, 0.0)


@triton.jit(do_not_specialize=_COUNTS)
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
            if REDUCTION == 1:
                if LOSS == _SUPCON:
                    total = total / tl.maximum(count, 1.0)
                else:
                    total = total / n_total
            result = round_to(total.to(row_sums_ptr.dtype.element_ty), loss_ptr.dtype.element_ty)
            tl.store(loss_ptr, result)


# ---- backward ----


@triton.jit
def _loss_gradients(losses, samples, exists):
    """lse in units of log 2, and alpha and beta times the gradient of the loss."""
    statistics_ptr, step, upstream_ptr = losses
    upstream = tl.load(upstream_ptr + samples, mask=exists, other=0.0)
    lse = tl.load(statistics_ptr + samples, mask=exists, other=0.0) * _LOG2_E
    alpha = tl.load(statistics_ptr + step + samples, mask=exists, other=0.0) * upstream
    beta = tl.load(statistics_ptr + 2 * step + samples, mask=exists, other=0.0) * upstream
    return tl.where(alpha == 0.0, float("inf"), lse), alpha, beta  # no exponential of a row that does not count


@triton.jit
def _store_gradient_parts(
    products,
    row,
    column,
    row_side,
    column_side,
    log_q_ptr,
    numbers,
    row_losses,
    column_losses,
    shift,
    outer_scale,
    block,
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    INNER: tl.constexpr,
    MIRRORED: tl.constexpr,
    PARTS: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Stores the tile's H, a part of its columns at a time."""
    ROWS: tl.constexpr = products.shape[0]
    COLUMNS: tl.constexpr = products.shape[1]
    if PARTS > 1:
        halves = tl.permute(tl.reshape(products, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_gradient_parts(
            left, row, column, row_side, column_side, log_q_ptr, numbers, row_losses, column_losses, shift,
            outer_scale, block, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, INNER, MIRRORED, PARTS // 2, TOTAL,
        )  # fmt: skip
        _store_gradient_parts(
            right, row, column + COLUMNS // 2, row_side, column_side, log_q_ptr, numbers, row_losses, column_losses,
            shift, outer_scale, block, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, INNER, MIRRORED, PARTS // 2, TOTAL,
        )  # fmt: skip
    else:
        row_inverse_ptr, _, _, _, n_rows = row_side
        column_inverse_ptr, _, _, _, n_columns = column_side
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        row_exists, column_exists = rows < n_rows, columns < n_columns
        row_x, column_x, positive, negative, row_factor, column_factor = _exponents(
            products, rows, columns, row_side, column_side, log_q_ptr, numbers, LOSS, NORM, PUSH, ONE_LABEL, INNER
        )
        lse, alpha, beta = _loss_gradients(row_losses, rows, row_exists)
        beta = beta[:, None]
        if INNER:
            share = tl.broadcast_to((alpha * tl.exp2(shift - lse))[:, None], (ROWS, COLUMNS))
            gradient = _weigh(share, negative, row_factor, WITH_FACTORS)
        else:
            gradient = _weigh(tl.exp2(row_x - lse[:, None]) * alpha[:, None], negative, row_factor, WITH_FACTORS)
        if column_losses is not None:
            lse, alpha, column_beta = _loss_gradients(column_losses, columns, column_exists)
            beta = beta + column_beta[None, :]
            if INNER:
                share = tl.broadcast_to((alpha * tl.exp2(shift - lse))[None, :], (ROWS, COLUMNS))
                gradient += _weigh(share, negative, column_factor, WITH_FACTORS)
            else:
                gradient += _weigh(tl.exp2(column_x - lse[None, :]) * alpha[None, :], negative, column_factor, WITH_FACTORS)
        if INNER:
            gradient *= tl.exp2(row_x - shift)
        gradient = tl.where(positive | negative, gradient, 0.0)
        gradient = tl.where(positive, gradient - beta, gradient)
        row_scale = tl.load(row_inverse_ptr + rows, mask=row_exists, other=0.0) * outer_scale
        column_scale = tl.load(column_inverse_ptr + columns, mask=column_exists, other=0.0)
        gradient = gradient * row_scale[:, None] * column_scale[None, :]

        block_ptr, stride, first_row, first_column, mirrored_columns = block
        gradient = round_to(gradient, block_ptr.dtype.element_ty)
        block_rows, block_columns = rows - first_row, columns - first_column
        tl.store(block_ptr + block_rows.to(tl.int64)[:, None] * stride + block_columns[None, :], gradient)
        if MIRRORED:
            pointers = block_ptr + block_columns.to(tl.int64)[None, :] * stride + block_rows[:, None]
            tl.store(pointers, gradient, mask=(block_columns < mirrored_columns)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def gradient_tiles_kernel(
    row_operand,
    column_operand,
    row_inverse_ptr,
    column_inverse_ptr,
    row_labels_ptr,
    column_labels_ptr,
    row_preds_ptr,
    column_preds_ptr,
    row_weights_ptr,
    column_weights_ptr,
    log_q_ptr,
    active_ptr,
    row_statistics_ptr,  # [3, ..]: lse, alpha, beta
    column_statistics_ptr,  # or None where columns have no loss
    row_upstream_ptr,  # [n_rows] gradients of the rows' losses
    column_upstream_ptr,
    scale_ptr,  # [] a power of two, or None
    block_ptr,  # [.., block_stride] receives H z / operand of row and column, times scale / temperature
    n_rows,
    n_columns,
    depth,
    n_labels,
    diagonal,
    first_row_tile,  # of the block
    first_column_tile,
    row_tiles,  # in the block
    block_stride,
    row_statistics_step,
    column_statistics_step,
    score_scale: tl.float64,
    push_scale: tl.float64,
    window: tl.float64,
    gradient_scale: tl.float64,  # 1 / temperature
    LOSS: tl.constexpr,
    NORM: tl.constexpr,
    PUSH: tl.constexpr,
    SHIFT: tl.constexpr,
    ONE_LABEL: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    MIRRORED: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A program takes a tile; of a block on the diagonal (MIRRORED) one of the upper triangle, stored twice."""
    if MIRRORED:
        row_tile, column_tile = _triangle(tl.program_id(0))
    else:
        row_tile, column_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first_row, first_column = first_row_tile * SIZE, first_column_tile * SIZE
    row, column = first_row + row_tile * SIZE, first_column + column_tile * SIZE
    is_active = True
    if active_ptr is not None:
        tiles = (first_row_tile + row_tile).to(tl.int64) * tl.cdiv(n_columns, SIZE) + first_column_tile + column_tile
        is_active = tl.load(active_ptr + tiles) != 0
    if is_active:
        scale = tl.full((), score_scale, TOTAL)
        push = tl.full((), push_scale, TOTAL)
        outer_scale = tl.full((), gradient_scale, TOTAL)
        if scale_ptr is not None:
            outer_scale *= tl.load(scale_ptr)
        row_side = (row_inverse_ptr, row_labels_ptr, row_preds_ptr, row_weights_ptr, n_rows)
        column_side = (column_inverse_ptr, column_labels_ptr, column_preds_ptr, column_weights_ptr, n_columns)
        numbers = (n_labels, diagonal, window, scale, push)
        row_losses = (row_statistics_ptr, row_statistics_step, row_upstream_ptr)
        column_losses = None
        if column_statistics_ptr is not None:
            column_losses = (column_statistics_ptr, column_statistics_step, column_upstream_ptr)
        block = (block_ptr, block_stride, first_row, first_column, tl.where(row_tile == column_tile, 0, block_stride))
        products = _products(
            row_operand, column_operand, row, column, depth, SIZE, DEPTH, DESCRIPTORS, PRECISION, TOTAL
        )
        shift, is_inner = _constant_shift(row, column, row_side, column_side, numbers, SHIFT, NORM, ONE_LABEL, SIZE)
        if SHIFT == _MAXIMUM:
            is_inner = False
        if is_inner:
            _store_gradient_parts(
                products, row, column, row_side, column_side, log_q_ptr, numbers, row_losses, column_losses, shift,
                outer_scale, block, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, True, MIRRORED, PARTS, TOTAL,
            )  # fmt: skip
        else:
            _store_gradient_parts(
                products, row, column, row_side, column_side, log_q_ptr, numbers, row_losses, column_losses, shift,
                outer_scale, block, LOSS, NORM, PUSH, ONE_LABEL, WITH_FACTORS, False, MIRRORED, PARTS, TOTAL,
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def finish_gradient_kernel(
    product_ptr,  # [n_rows, depth] sum_j H_ij z_j, times z / operand of the row, and times scale
    operand_ptr,  # [n_rows, depth]
    norms_ptr,  # [3, ..], as prepare_kernel stores them
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
    inverse = tl.load(norms_ptr + rows, mask=exists, other=1.0)
    outer = tl.load(norms_ptr + norms_step + rows, mask=exists, other=0.0)
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
        along *= inverse * inverse * tl.load(norms_ptr + 2 * norms_step + rows, mask=exists, other=0.0)
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
        label = tl.load(labels_ptr + samples.to(tl.int64) * n_labels + k, mask=samples < n_rows, other=float("nan"))
        known = label == label
        others_low = tl.min(tl.where(known, label, float("inf")), 1)
        others_high = tl.max(tl.where(known, label, float("-inf")), 1)
        total = _add_dimension(total, tl.maximum(tl.maximum(low - others_high, others_low - high), 0.0), NORM)
    if NORM == 2:
        total = _square_root(total)
    return total


@triton.jit(do_not_specialize=_COUNTS)
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


@triton.jit(do_not_specialize=_COUNTS)
def active_product_kernel(
    block_ptr,  # [.., block_stride] tiles of H, active ones alone
    operand_ptr,  # [.., depth]
    out_ptr,  # [.., depth] receives, or gains, the block's product with the operand's rows
    list_ptr,  # as active_tiles_kernel stores them
    length_ptr,
    n_rows,
    depth,
    first_row_tile,  # of the rows that receive
    first_column_tile,  # of the rows that are multiplied
    row_tiles,
    block_tiles,
    block_stride,
    TRANSPOSED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """A program takes WIDTH features of a tile of rows, and of the tiles of its row in H those on its list."""
    STEPS: tl.constexpr = SIZE // STEP
    n_blocks = tl.cdiv(tl.cdiv(n_rows, SIZE), block_tiles)
    tile = tl.program_id(0) % row_tiles
    features = tl.program_id(0) // row_tiles * WIDTH + tl.arange(0, WIDTH)
    place = (first_row_tile + tile).to(tl.int64) * n_blocks + first_column_tile // block_tiles
    list_ptr += place * block_tiles
    length = tl.load(length_ptr + place)
    rows = tile * SIZE + tl.arange(0, SIZE)
    steps = tl.arange(0, STEP)
    total = tl.zeros((SIZE, WIDTH), TOTAL)
    for step in range(0, length * STEPS):
        column = tl.load(list_ptr + step // STEPS) * SIZE + step % STEPS * STEP + steps
        column_in_block = column - first_column_tile * SIZE
        if TRANSPOSED:
            pointers = block_ptr + column_in_block.to(tl.int64)[None, :] * block_stride + rows[:, None]
        else:
            pointers = block_ptr + rows.to(tl.int64)[:, None] * block_stride + column_in_block[None, :]
        operand_pointers = operand_ptr + column.to(tl.int64)[:, None] * depth + features[None, :]
        operand = tl.load(operand_pointers, mask=(features < depth)[None, :], other=0.0)
        total = tl.dot(
            tl.load(pointers).to(operand.dtype), operand, total, input_precision=PRECISION, out_dtype=TOTAL
        )
    pointers = out_ptr + (first_row_tile * SIZE + rows).to(tl.int64)[:, None] * depth + features[None, :]
    inside = (features < depth)[None, :]
    if ACCUMULATE:
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, total, mask=inside)


# ---- which tiles ----


class Tiles(NamedTuple):
    """How a program works; fixed by device, dtype and shape, for the sums depend on it."""

    size: int  # rows, and columns
    depth: int
    warps: int
    stages: int
    parts: int = 1  # of the columns, each consumed before the next
    descriptors: bool = False  # tensor descriptors: the copy engine of sm_90 and later


# 128 x 128 results reach 64 operations for each 2 bytes from L2, and leave registers and shared memory for a second
# program on the multiprocessor, which multiplies while the first is at its exponentials.
_TILES = {
    ("sm_80", "16 bits"): Tiles(128, 64, warps=8, stages=3),
    ("sm_80", "tf32"): Tiles(128, 32, warps=8, stages=3),
    ("sm_86", "16 bits"): Tiles(128, 64, warps=8, stages=2),
    ("sm_86", "tf32"): Tiles(128, 32, warps=8, stages=2),
    ("sm_90", "16 bits"): Tiles(128, 64, warps=8, stages=3, parts=4, descriptors=True),
    ("sm_90", "tf32"): Tiles(128, 32, warps=8, stages=3, parts=4, descriptors=True),
    ("sm_100", "16 bits"): Tiles(128, 64, warps=8, stages=3, parts=4, descriptors=True),
    ("sm_100", "tf32"): Tiles(128, 32, warps=8, stages=3, parts=4, descriptors=True),
    ("sm_120", "16 bits"): Tiles(128, 64, warps=8, stages=2, descriptors=True),
    ("sm_120", "tf32"): Tiles(128, 32, warps=8, stages=2, descriptors=True),
}
# No matrix instruction multiplies in float32; those of float64 take small tiles.
_PLAIN_TILES = {"ieee": Tiles(128, 16, warps=8, stages=2), "fp64": Tiles(64, 16, warps=8, stages=2)}
# Where the large ones are fewer than two a multiprocessor.
_SMALL_TILES = {
    "16 bits": Tiles(64, 64, warps=4, stages=3),
    "tf32": Tiles(64, 32, warps=4, stages=3),
    "ieee": Tiles(32, 32, warps=4, stages=2),
    "fp64": Tiles(32, 16, warps=4, stages=2),
}
_EMULATED_TILES = Tiles(16, 16, warps=1, stages=1, parts=2)  # small: a small test has several

_MOST_SLOTS = 64  # a program's square of tiles is as large as that needs
_BLOCK_BYTES = 64 << 20  # of H in the backward pass

# Of the kernels that are bound by memory: 2048 elements a program. 128 rows' sums lie next to each other in a slot.
_ELEMENT_BLOCKS = {"BLOCK_R": 4, "BLOCK_H": 512}
_FINISH_BLOCKS = {"BLOCK_R": 128, "BLOCK_T": 8}
_ACTIVE_CHUNK = 16
_MOST_ROWS_OF_ONE_PROGRAM = 1024  # which then finishes the loss in the same launch

# Multiplications and additions, N^2 D of them a product, from which on tiles are skipped. Sorting and the lists take
# some 0.15 ms of an H100, in forward and backward pass each; the products so large take five times that.
_LEAST_SORTED = {"16 bits": 6e11, "tf32": 3e11, "ieee": 2e10, "fp64": 3e10}


def _arithmetic(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "fp64"
    return "16 bits" if dtype.itemsize == 2 else product_precision(dtype)


def _choose_tiles(features: Tensor, n_rows: int, n_columns: int) -> Tiles:
    if not features.is_cuda:
        return _EMULATED_TILES
    kind = _arithmetic(features.dtype)
    family = gpu_family(*torch.cuda.get_device_capability(features.device))
    large = _PLAIN_TILES[kind] if kind in _PLAIN_TILES else _TILES[family, kind]
    programs = triton.cdiv(n_rows, large.size) * triton.cdiv(n_columns, large.size)
    processors = torch.cuda.get_device_properties(features.device).multi_processor_count
    return large if programs >= 2 * processors else _SMALL_TILES[kind]


def _skips(features: Tensor) -> bool:
    return features.shape[0] ** 2 * features.shape[1] >= _LEAST_SORTED[_arithmetic(features.dtype)]


# ---- launchers ----
#
# Tensors of one call lie on one device, are contiguous, and have the dtypes that csrc/schemas.cpp and the functions name.
# Nothing waits for the GPU. Call them where autograd and autocast are off.


class _Operand(NamedTuple):
    """Features as the products take them."""

    values: Tensor  # [padded, depth]
    norms: Tensor  # [3, padded]: z / values, 1 / max(|f|, 1e-12), whether df loses its part along z

    def part(self, first: int) -> _Operand:
        return _Operand(self.values[first:], self.norms[:, first:])


class _Side(NamedTuple):
    """The rows of all pairs, or the columns."""

    count: int
    operand: _Operand
    labels: Tensor | None = None
    preds: Tensor | None = None
    weights: Tensor | None = None


class _Problem(NamedTuple):
    rows: _Side
    columns: _Side
    tiles: Tiles
    n_features: int
    dtype: torch.dtype  # of the features
    total: torch.dtype
    loss: int
    temperature: float
    normalize: bool = True
    diagonal: int = 0
    triangle: bool = False  # rows are the columns
    columns_have_losses: bool = True
    variant: int = 0
    norm: int = 1
    push: int = 0
    push_scale: float = 0.0
    window: float = 0.0
    shift: int = 0
    log_q: Tensor | None = None
    order: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.rows.operand.values.device

    def common(self, active: Tensor | None) -> dict[str, Any]:
        """What the kernels that take tiles of pairs have in common."""
        tiles, rows, columns = self.tiles, self.rows, self.columns
        operands = [side.operand.values for side in (rows, columns)]
        if tiles.descriptors:
            operands = [TensorDescriptor.from_tensor(values, [tiles.size, tiles.depth]) for values in operands]
        return {
            "row_operand": operands[0],
            "column_operand": operands[1],
            "row_inverse_ptr": rows.operand.norms,
            "column_inverse_ptr": columns.operand.norms,
            "row_labels_ptr": rows.labels,
            "column_labels_ptr": columns.labels,
            "row_preds_ptr": rows.preds,
            "column_preds_ptr": columns.preds,
            "row_weights_ptr": rows.weights,
            "column_weights_ptr": columns.weights,
            "log_q_ptr": self.log_q,
            "active_ptr": active,
            "n_rows": rows.count,
            "n_columns": columns.count,
            "depth": columns.operand.values.shape[1],
            "n_labels": 1 if rows.labels is None else rows.labels.numel() // rows.count,
            "diagonal": self.diagonal,
            "score_scale": math.log2(math.e) / self.temperature,
            "push_scale": self.push_scale,
            "window": self.window,
            "LOSS": self.loss,
            "NORM": self.norm,
            "PUSH": self.push,
            "SHIFT": self.shift,
            "ONE_LABEL": rows.labels is None or rows.labels.numel() == rows.count,
            "WITH_FACTORS": rows.weights is not None or self.push == _PUSH_FACTOR.value,
            "PARTS": tiles.parts,
            "SIZE": tiles.size,
            "DEPTH": tiles.depth,
            "DESCRIPTORS": tiles.descriptors,
            **self.arithmetic,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            **OPTIONS,
        }

    @property
    def arithmetic(self) -> dict[str, Any]:
        total = tl.float64 if self.total == torch.float64 else tl.float32
        return {"PRECISION": product_precision(self.dtype), "TOTAL": total}


def _total_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prepare(
    features: Tensor,
    columns: Tensor | None,
    tiles: Tiles,
    *,
    normalize: bool,
    order: Tensor | None = None,
    spare: int = 0,
) -> tuple[_Operand, _Operand]:
    """The operands of rows and columns, which may be one; with ``spare`` rows of zeros more than tiles need."""
    n_features = features.shape[1]
    depth = max(triton.cdiv(n_features, tiles.depth), 1) * tiles.depth
    dtype, total = features.dtype, _total_dtype(features.dtype)
    if dtype == torch.bfloat16 and not features.is_cuda:
        dtype = torch.float32  # numpy has no product of bfloat16; the product of float32 is the same

    def new(count: int) -> _Operand:
        padded = triton.cdiv(count, tiles.size) * tiles.size + spare
        return _Operand(
            features.new_empty((padded, depth), dtype=dtype), features.new_empty((3, padded), dtype=total)
        )

    row_operand = new(features.shape[0])
    column_operand = row_operand if columns is None else new(columns.shape[0])
    padded = [len(operand.values) for operand in (row_operand, column_operand)]
    programs = sum(triton.cdiv(count, _ELEMENT_BLOCKS["BLOCK_R"]) for count in padded[: 1 if columns is None else 2])
    prepare_kernel[(programs,)](
        features,
        columns,
        order,
        row_operand.values,
        column_operand.values,
        row_operand.norms,
        column_operand.norms,
        features.shape[0],
        0 if columns is None else columns.shape[0],
        n_features,
        *padded,
        depth,
        TOTAL=tl.float64 if total == torch.float64 else tl.float32,
        NORMALIZE=normalize,
        SORTED=order is not None,
        WITH_COLUMNS=columns is not None,
        **_ELEMENT_BLOCKS,
        **OPTIONS,
    )
    return row_operand, column_operand


def _shift(temperature: float, normalize: bool, push: int = 0) -> int:
    """How exponents are kept in range, as far as no data are needed to know."""
    if not normalize or 2.0 / temperature * _LOG2_E.value > _SMALL_RANGE.value:
        return int(_MAXIMUM.value)
    return int(_BY_TILE.value if push == _PUSH_EXPONENT.value else _CONSTANT.value)


def _conr_problem(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor | None,
    window: float,
    temperature: float,
    eta: float,
    variant: int,
    label_norm: int,
    first_row: int,
    row_count: int,
) -> _Problem:
    count = features.shape[0]
    triangle = row_count == count
    tiles = _choose_tiles(features, row_count, count * 2 if not triangle else count)
    order = None
    if triangle and _skips(features):
        order = torch.sort(preds[:, 0], stable=True).indices
        order = order[torch.sort(targets[order, 0], stable=True).indices]
        targets, preds = targets[order], preds[order]
        weights = None if weights is None else weights[order]
    operand, _ = _prepare(features, None, tiles, normalize=True, order=order, spare=0 if triangle else tiles.size)
    columns = _Side(count, operand, targets, preds, weights)
    rows = columns
    if not triangle:
        own = slice(first_row, first_row + row_count)
        row_weights = None if weights is None else weights[own]
        rows = _Side(row_count, operand.part(first_row), targets[own], preds[own], row_weights)
    push = _PUSH_FACTOR.value if variant == 2 else _PUSH_EXPONENT.value
    return _Problem(
        rows,
        columns,
        tiles,
        features.shape[1],
        features.dtype,
        _total_dtype(features.dtype),
        _CONR.value,
        temperature,
        diagonal=first_row,
        triangle=triangle,
        variant=variant,
        norm=label_norm,
        push=push,
        push_scale=eta if variant == 2 else eta * math.log2(math.e),
        window=window,
        shift=_shift(temperature, True, push),
        order=order,
    )


def _supcon_problem(
    features: Tensor, labels: Tensor, temperature: float, normalize: bool, first_row: int, row_count: int
) -> _Problem:
    count = features.shape[0]
    triangle = row_count == count
    tiles = _choose_tiles(features, row_count, count)
    operand, _ = _prepare(features, None, tiles, normalize=normalize, spare=0 if triangle else tiles.size)
    columns = _Side(count, operand, labels)
    rows = columns
    if not triangle:
        rows = _Side(row_count, operand.part(first_row), labels[first_row : first_row + row_count])
    return _Problem(
        rows,
        columns,
        tiles,
        features.shape[1],
        features.dtype,
        _total_dtype(features.dtype),
        _SUPCON.value,
        temperature,
        normalize,
        diagonal=first_row,
        triangle=triangle,
        shift=_shift(temperature, normalize),
    )


def _info_nce_problem(
    query: Tensor,
    key: Tensor,
    log_q: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float,
    normalize: bool,
    offset: int,
    both: bool,
) -> _Problem:
    tiles = _choose_tiles(query, query.shape[0], key.shape[0])
    operands = _prepare(query, key, tiles, normalize=normalize)
    return _Problem(
        _Side(query.shape[0], operands[0], query_ids),
        _Side(key.shape[0], operands[1], key_ids),
        tiles,
        query.shape[1],
        query.dtype,
        _total_dtype(query.dtype),
        _INFO_NCE.value,
        temperature,
        normalize,
        diagonal=offset,
        columns_have_losses=both,
        shift=_MAXIMUM.value if log_q is not None else _shift(temperature, normalize),
        log_q=log_q,
    )


class _Active(NamedTuple):
    """Tiles that may have positives or negatives."""

    flags: Tensor  # [n_tiles, n_tiles] int8
    list: Tensor  # [n_tiles, n_blocks, block_tiles] int32
    length: Tensor  # [n_tiles, n_blocks] int32


def _active_tiles(problem: _Problem, block_tiles: int) -> _Active | None:
    if problem.order is None:
        return None
    side, size = problem.rows, problem.tiles.size
    n_tiles = triton.cdiv(side.count, size)
    n_blocks = triton.cdiv(n_tiles, block_tiles)
    values = side.operand.values
    active = _Active(
        values.new_empty((n_tiles, n_tiles), dtype=torch.int8),
        values.new_empty((n_tiles, n_blocks, block_tiles), dtype=torch.int32),
        values.new_empty((n_tiles, n_blocks), dtype=torch.int32),
    )
    active_tiles_kernel[(n_tiles * n_blocks,)](
        side.labels,
        side.preds,
        *active,
        side.count,
        side.labels.numel() // side.count,
        block_tiles,
        problem.window,
        NORM=problem.norm,
        SIZE=size,
        CHUNK=_ACTIVE_CHUNK,
        **OPTIONS,
    )
    return active


def _forward(problem: _Problem, reduction: int, loss_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and statistics of rows and columns."""
    rows, columns, size = problem.rows, problem.columns, problem.tiles.size
    row_tiles, column_tiles = triton.cdiv(rows.count, size), triton.cdiv(columns.count, size)
    with_columns = problem.triangle or (problem.loss == _INFO_NCE.value and problem.columns_have_losses)
    # Without sums of columns a square need not be one: a row of tiles has the most programs.
    square_rows = triton.cdiv(row_tiles, _MOST_SLOTS) if with_columns else 1
    square_columns = triton.cdiv(column_tiles, _MOST_SLOTS)
    row_squares, column_squares = triton.cdiv(row_tiles, square_rows), triton.cdiv(column_tiles, square_columns)
    new = problem.rows.operand.norms.new_empty
    sums = 5 if problem.loss == _CONR.value else 4
    row_sums = new((sums, column_squares, rows.count))
    both = with_columns and not problem.triangle
    column_sums = new((sums, row_squares, columns.count)) if both else None
    active = _active_tiles(problem, column_tiles)
    programs = row_squares * (row_squares + 1) // 2 if problem.triangle else row_squares * column_squares
    forward_kernel[(programs,)](
        **problem.common(None if active is None else active.flags),
        row_sums_ptr=row_sums,
        column_sums_ptr=column_sums if both else row_sums,
        square_rows=square_rows,
        square_columns=square_columns,
        TRIANGLE=problem.triangle,
        WITH_COLUMNS=with_columns,
    )

    one_program = reduction == 0 or rows.count <= _MOST_ROWS_OF_ONE_PROGRAM
    programs = 1 if rows.count <= _MOST_ROWS_OF_ONE_PROGRAM else triton.cdiv(rows.count, _FINISH_BLOCKS["BLOCK_R"])
    row_statistics = new((3, rows.count))
    column_statistics = new((3, columns.count if both else 0))
    loss = new((rows.count,) if reduction == 0 else (), dtype=loss_dtype)
    partial = None if one_program else new((2, programs), dtype=torch.float64)
    n_total = columns.count if problem.loss == _CONR.value else rows.count
    finish_kernel[(programs,)](
        row_sums,
        column_sums,
        rows.weights,
        problem.order,
        row_statistics,
        column_statistics,
        loss,
        partial,
        rows.count,
        column_squares,
        row_squares,
        n_total,
        LOSS=problem.loss,
        VARIANT=problem.variant,
        REDUCTION=reduction,
        **_FINISH_BLOCKS,
        **OPTIONS,
    )
    if partial is not None:
        total, count = partial.sum(1)
        if reduction == 1:
            total = total / (count.clamp(min=1) if problem.loss == _SUPCON.value else n_total)
        loss = total.to(loss_dtype)
    return loss, row_statistics, column_statistics


class _Losses(NamedTuple):
    """What the gradients take of one side's losses."""

    statistics: Tensor  # [3, n], rows contiguous
    upstream: Tensor  # [n]


def _gradients(
    problem: _Problem,
    row_losses: _Losses,
    column_losses: _Losses | None,
    *,
    needs_rows: bool = True,
    needs_columns: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the features of rows and columns. In a triangle they are one."""
    rows, columns, size, triangle = problem.rows, problem.columns, problem.tiles.size, problem.triangle
    if problem.order is not None:
        row_losses = _Losses(row_losses.statistics[:, problem.order], row_losses.upstream[problem.order])
        column_losses = row_losses
    block_dtype = problem.dtype
    depth = rows.operand.values.shape[1]
    elements = _BLOCK_BYTES // block_dtype.itemsize
    padded = [triton.cdiv(side.count, size) * size for side in (rows, columns)]
    height = min(max(math.isqrt(elements) // size, 1) * size, padded[0])
    width = height if triangle else min(max(elements // height // size, 1) * size, padded[1])
    block = rows.operand.values.new_empty((height, width), dtype=block_dtype)
    scale = _block_scale(problem, row_losses, column_losses) if problem.dtype == torch.float16 else None
    active = _active_tiles(problem, height // size)

    sums: list[Tensor | None] = [
        rows.operand.norms.new_empty((count, depth)) if needed else None
        for count, needed in zip(padded, (needs_rows or triangle, needs_columns), strict=True)
    ]
    begun: set[tuple[int, int]] = set()

    def add(side: int, first: int, h: Tensor, other: _Side, other_first: int) -> None:
        """Adds the block's product with other's operand from other_first on to the sums of a side from first on."""
        accumulate = (side, first) in begun
        begun.add((side, first))
        if active is not None:
            _multiply_active(problem, active, sums[side], first, h, other_first, height // size, accumulate)
            return
        product_into(
            sums[side][first : first + h.shape[0]],
            h,
            other.operand.values[other_first : other_first + h.shape[1]],
            accumulate=accumulate,
        )

    common = problem.common(None if active is None else active.flags)
    for first_row in range(0, rows.count, height):
        for first_column in range(first_row if triangle else 0, columns.count, width):
            own = triangle and first_row == first_column
            row_count = min(height, rows.count - first_row)
            column_count = min(width, columns.count - first_column)
            row_tiles, column_tiles = triton.cdiv(row_count, size), triton.cdiv(column_count, size)
            gradient_tiles_kernel[(row_tiles * (row_tiles + 1) // 2 if own else row_tiles * column_tiles,)](
                **common,
                row_statistics_ptr=row_losses.statistics,
                column_statistics_ptr=None if column_losses is None else column_losses.statistics,
                row_upstream_ptr=row_losses.upstream,
                column_upstream_ptr=None if column_losses is None else column_losses.upstream,
                scale_ptr=scale,
                block_ptr=block,
                first_row_tile=first_row // size,
                first_column_tile=first_column // size,
                row_tiles=row_tiles,
                block_stride=width,
                row_statistics_step=row_losses.statistics.stride(0),
                column_statistics_step=0 if column_losses is None else column_losses.statistics.stride(0),
                gradient_scale=1.0 / problem.temperature,
                MIRRORED=own,
            )
            h = block[:row_count, :column_count]
            if needs_rows or triangle:
                add(0, first_row, h, columns, first_column)
            if triangle and not own:
                add(0, first_column, h.T, rows, first_row)
            if needs_columns:
                add(1, first_column, h.T, rows, first_row)

    finished = [
        None if total is None else _finish_gradient(problem, side, total, scale, dtype or problem.dtype)
        for side, total in zip((rows, columns), sums, strict=True)
    ]
    return finished[0], finished[1]


def _block_scale(problem: _Problem, *losses: _Losses | None) -> Tensor:
    """The power of two, [], that makes the largest possible element of H in float16 2^13 to 2^14.

    |H_ij| is at most |u_i| (alpha_i + beta_i) + |u_j| (alpha_j + beta_j), over the temperature.
    """
    bound = sum(
        (side.statistics[1:].abs().sum(0) * side.upstream.abs()).amax() for side in losses if side is not None
    )
    return torch.exp2((2.0**14 * problem.temperature / bound).log2().floor().clamp(-100.0, 100.0))


def _multiply_active(
    problem: _Problem,
    active: _Active,
    out: Tensor,
    first: int,
    h: Tensor,
    other_first: int,
    block_tiles: int,
    accumulate: bool,
) -> None:
    size, depth = problem.tiles.size, out.shape[1]
    row_tiles = triton.cdiv(h.shape[0], size)
    transposed = h.stride(1) != 1
    width = min(triton.next_power_of_2(depth), problem.tiles.size)
    active_product_kernel[(row_tiles * triton.cdiv(depth, width),)](
        h,
        problem.rows.operand.values,
        out,
        active.list,
        active.length,
        problem.rows.count,
        depth,
        first // size,
        other_first // size,
        row_tiles,
        block_tiles,
        h.stride(1) if transposed else h.stride(0),
        TRANSPOSED=transposed,
        ACCUMULATE=accumulate,
        SIZE=size,
        STEP=problem.tiles.depth,
        WIDTH=width,
        **problem.arithmetic,
        num_warps=problem.tiles.warps,
        num_stages=problem.tiles.stages,
        **OPTIONS,
    )


def _finish_gradient(problem: _Problem, side: _Side, total: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    values, norms = side.operand
    out = values.new_empty((side.count, problem.n_features), dtype=dtype)
    finish_gradient_kernel[(triton.cdiv(side.count, _ELEMENT_BLOCKS["BLOCK_R"]),)](
        total,
        values,
        norms,
        problem.order,
        scale,
        out,
        side.count,
        problem.n_features,
        values.shape[1],
        norms.stride(0),
        NORMALIZE=problem.normalize,
        **_ELEMENT_BLOCKS,
        **OPTIONS,
    )
    return out


# ---- the operators ----


def _without_rows(loss_rows: Tensor, reduction: int, loss_dtype: torch.dtype) -> Tensor:
    return loss_rows.new_zeros((0,) if reduction == 0 else (), dtype=loss_dtype)


def _one_operator(
    build: Callable[[], _Problem],
    features: Tensor,
    reduction: int,
    loss_dtype: torch.dtype,
    row_count: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and, where wanted, the gradient of a loss whose rows are its columns."""
    total = _total_dtype(features.dtype)
    if row_count == 0:
        return _without_rows(features, reduction, loss_dtype), features.new_empty((3, 0), dtype=total), features[:0, 0]
    with torch.cuda.device_of(features):
        problem = build()
        loss, statistics, _ = _forward(problem, reduction, loss_dtype)
        if not with_gradient:
            return loss, statistics, features.new_empty(0, dtype=total)
        upstream = torch.ones_like(statistics[0])
        if reduction == 1:
            upstream /= statistics[1].sum().clamp(min=1) if problem.loss == _SUPCON.value else row_count
        losses = _Losses(statistics, upstream)
        gradient, _ = _gradients(problem, losses, losses, dtype=total)
    return loss, statistics, gradient


def conr(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor | None,
    window: float,
    temperature: float,
    eta: float,
    variant: int,
    label_norm: int,
    reduction: int,
    loss_dtype: torch.dtype,
    first_row: int,
    row_count: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics ``[3, row_count]`` (lse, alpha, beta) and, where wanted, its gradient ``[N, D]``, else ``[0]``.

    Args:
        features: ``[N, D]``; float64, float32, bfloat16 or float16.
        targets, preds: ``[N, K]``, float32 or float64.
        weights: ``[N]``, float32 (float64 for float64 features), or None.
        variant: 0 paper, 1 agedb, 2 nyud2.
        label_norm: 1, 2, or 0 for the largest difference.
        reduction: 0 none, 1 mean over N, 2 sum.
        first_row, row_count: which rows' losses; all of them are half the work, and alone have a gradient at once,
            of a reduced loss.
    """

    def build() -> _Problem:
        return _conr_problem(
            features, targets, preds, weights, window, temperature, eta, variant, label_norm, first_row, row_count
        )

    return _one_operator(build, features, reduction, loss_dtype, row_count, with_gradient)


def conr_backward(
    grad_rows: Tensor,
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor | None,
    statistics: Tensor,
    window: float,
    temperature: float,
    eta: float,
    variant: int,
    label_norm: int,
    first_row: int,
    row_count: int,
) -> Tensor:
    """Gradient of some rows' features, ``[row_count, D]``; ``grad_rows [N]`` are the gradients of all rows' losses and
    ``statistics`` is ``[3, N]``."""
    if row_count == 0:
        return features[:0].clone()
    with torch.cuda.device_of(features):
        problem = _conr_problem(
            features, targets, preds, weights, window, temperature, eta, variant, label_norm, first_row, row_count
        )
        return _own_gradient(problem, statistics, grad_rows, first_row, row_count)


def _own_gradient(
    problem: _Problem, statistics: Tensor, grad_rows: Tensor, first_row: int, row_count: int
) -> Tensor:
    own = slice(first_row, first_row + row_count)
    grad_rows = grad_rows.contiguous()
    gradient, _ = _gradients(
        problem, _Losses(statistics[:, own], grad_rows[own]), _Losses(statistics, grad_rows)
    )
    return gradient


def supcon(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    normalize: bool,
    reduction: int,
    loss_dtype: torch.dtype,
    first_row: int,
    row_count: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`conr`; ``labels [N]`` are int64, and the mean is over those of the rows that have a positive."""

    def build() -> _Problem:
        return _supcon_problem(features, labels, temperature, normalize, first_row, row_count)

    return _one_operator(build, features, reduction, loss_dtype, row_count, with_gradient)


def supcon_backward(
    grad_rows: Tensor,
    features: Tensor,
    labels: Tensor,
    statistics: Tensor,
    temperature: float,
    normalize: bool,
    first_row: int,
    row_count: int,
) -> Tensor:
    """As :func:`conr_backward`."""
    if row_count == 0:
        return features[:0].clone()
    with torch.cuda.device_of(features):
        problem = _supcon_problem(features, labels, temperature, normalize, first_row, row_count)
        return _own_gradient(problem, statistics, grad_rows, first_row, row_count)


def info_nce(
    query: Tensor,
    key: Tensor,
    log_q: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float,
    normalize: bool,
    by_query: bool,
    by_key: bool,
    offset: int,
    reduction: int,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and statistics ``[3, N]`` of queries and ``[3, M]`` of keys, ``[3, 0]`` for a direction not asked for.

    Args:
        query: ``[N, D]``; float64, float32, bfloat16 or float16.
        key: ``[M, D]``; the positive of query i is key ``i + offset``.
        log_q: ``[M]``, float32 (float64 for float64 features), or None; not of the keys' direction.
        query_ids, key_ids: ``[N]`` and ``[M]``, int64, or None.
        by_query, by_key: directions. Both: the loss of query i is the mean of its own and of its key's, and N = M.
        reduction: 0 none, 1 mean over queries, or over keys where these alone have losses, 2 sum.
    """
    empty = query.new_empty((3, 0), dtype=_total_dtype(query.dtype))
    if not by_query:
        loss, statistics, _ = info_nce(
            *(key, query, None, key_ids, query_ids, temperature, normalize, True, False, -offset),
            *(reduction, loss_dtype),
        )
        return loss, empty, statistics
    if query.shape[0] == 0:
        return _without_rows(query, reduction, loss_dtype), empty, empty.new_zeros((3, key.shape[0] if by_key else 0))
    with torch.cuda.device_of(query):
        problem = _info_nce_problem(query, key, log_q, query_ids, key_ids, temperature, normalize, offset, by_key)
        return _forward(problem, reduction, loss_dtype)


def info_nce_backward(
    grad_queries: Tensor,
    grad_keys: Tensor,
    query: Tensor,
    key: Tensor,
    log_q: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_statistics: Tensor,
    key_statistics: Tensor,
    temperature: float,
    normalize: bool,
    offset: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, ``[0]`` where not needed; ``grad_queries [N]`` and ``grad_keys [M]`` are those of the
    losses, ``[0]`` for a direction that has none."""
    none = query.new_empty(0)
    if grad_queries.shape[0] == 0 and grad_keys.shape[0] > 0 and query.shape[0] > 0:
        gradients = info_nce_backward(
            *(grad_keys, grad_queries, key, query, None, key_ids, query_ids, key_statistics, query_statistics),
            *(temperature, normalize, -offset, needs_grad[::-1]),
        )
        return gradients[1], gradients[0]
    if query.shape[0] == 0 or key.shape[0] == 0:
        gradients = [torch.zeros_like(side) if needs else none for side, needs in zip((query, key), needs_grad)]
        return gradients[0], gradients[1]
    both = grad_keys.shape[0] > 0
    with torch.cuda.device_of(query):
        problem = _info_nce_problem(query, key, log_q, query_ids, key_ids, temperature, normalize, offset, both)
        by_row, by_column = _gradients(
            problem,
            _Losses(query_statistics, grad_queries.contiguous()),
            _Losses(key_statistics, grad_keys.contiguous()) if both else None,
            needs_rows=needs_grad[0],
            needs_columns=needs_grad[1],
        )
    return none if by_row is None else by_row, none if by_column is None else by_column


# ---- what tools/triton_report.py compiles ----

_LOSSES = {"ConR": _CONR.value, "SupCon": _SUPCON.value, "InfoNCE": _INFO_NCE.value}
_OF_CONR = ("row_preds", "column_preds", "row_weights", "column_weights", "active")


def _pair_variant(
    kernel: Any, tiles: Tiles, dtype: str, loss: str, *, precision: str = "ieee", labels: str = "fp32", **changes: Any
) -> Any:
    """A kernel that takes tiles of pairs; in the form of ``loss`` that does most, but for ``changes`` of constants."""
    conr = loss == "ConR"
    total = "fp64" if dtype == "fp64" else "fp32"
    labels = labels if conr else "i64"
    operand = f"tensordesc<{dtype}[{tiles.size},{tiles.depth}]>" if tiles.descriptors else f"*{dtype}:16"
    types = {"row_operand": operand, "column_operand": operand}
    kinds = dict.fromkeys(("row_labels", "column_labels", "row_preds", "column_preds"), labels)
    pointers = ("row_inverse", "column_inverse", "row_weights", "column_weights", "log_q", "row_sums", "column_sums")
    kinds |= dict.fromkeys(pointers, total) | {"active": "i8"}
    kinds |= dict.fromkeys(("row_statistics", "column_statistics", "row_upstream", "column_upstream", "scale"), total)
    kinds |= {"block": dtype}
    types |= {f"{name}_ptr": f"*{kind}:16" for name, kind in kinds.items()}
    types |= dict.fromkeys(_COUNTS, "i32") | dict.fromkeys(("depth", "block_stride"), "i32:16")
    types |= dict.fromkeys(("row_statistics_step", "column_statistics_step"), "i32")
    types |= dict.fromkeys(("score_scale", "push_scale", "window", "gradient_scale"), "fp64")
    constants = {
        "LOSS": _LOSSES[loss],
        "NORM": 2,
        "PUSH": _PUSH_EXPONENT.value if conr else _NO_PUSH.value,
        "SHIFT": _BY_TILE.value if conr else _CONSTANT.value,
        "ONE_LABEL": True,
        "TRIANGLE": loss != "InfoNCE",
        "WITH_COLUMNS": True,
        "MIRRORED": loss != "InfoNCE",
        "WITH_FACTORS": conr,
        "PARTS": tiles.parts,
        "SIZE": tiles.size,
        "DEPTH": tiles.depth,
        "DESCRIPTORS": tiles.descriptors,
        "PRECISION": precision,
        "TOTAL": tl.float64 if total == "fp64" else tl.float32,
    }
    absent = () if conr else _OF_CONR
    absent += () if loss == "InfoNCE" else ("log_q",)
    absent += () if dtype == "fp16" else ("scale",)
    constants |= dict.fromkeys((f"{name}_ptr" for name in absent), None)
    constants |= changes
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return kernel, types, constants, {"num_warps": tiles.warps, "num_stages": tiles.stages} | OPTIONS

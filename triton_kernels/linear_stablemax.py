"""Linear StableMax cross-entropy on tensor cores: the logits exist only as tiles of a product, in registers.

    z = x W^T + b,   s(z) = z + 1 for z >= 0, 1 / (1 - z) below,   R = sum_{v != y} s(z_v),   S = R + s(z_y)

    loss = w_y log1p(R / s(z_y))
    dL/dz_v = c s'(z_v) for v != y,  c = w_y / S;      dL/dz_y = t = -w_y R / (S (1 + |z_y|))

s' needs no row sum, so that the epilogue of the logits' product writes E = s'(z), with E_y = 0, while it sums s(z):

    dX = c (E W) + t W[y],   dW = E^T (c x), plus t x at row y,   db = E^T c, plus t at y

Every product accumulates in float32; a row's R is summed in float32 within a tile, in float64 across tiles, and what
follows from it is computed in float64: R / s(z_y) and w / S leave float32 although their results do not.

The logits' product, of R rows, V classes and H features of b bytes, is 2 R V H operations; it reads x and W (from
memory once or twice, else from L2) and writes b R V bytes of E. Its epilogue is a reciprocal and some ten other
instructions a logit: with u = min(z, 0), the slope is h = 1 / (1 - u), s(z) = h + max(z, 0) and s'(z) = h^2.
"""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyreg.triton_kernels._shared import EMULATED, OPTIONS, product_into, product_precision, round_to

# ---- the logits' product ----


@triton.jit
def _consume(
    z,  # [BLOCK_M, BLOCK_N] logits, consumed
    derivatives,
    derivatives_stride,
    row,
    column,
    n_rows,
    n_classes,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOPE_SCALE: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    WITH_DERIVATIVES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Stores SLOPE_SCALE^2 s'(z); returns SUM_SCALE times the sums of s(z), [BLOCK_M]."""
    below = tl.minimum(z, 0.0)
    distance = 1.0 / SLOPE_SCALE - below * (1.0 / SLOPE_SCALE)
    if EMULATED:
        slope = 1.0 / distance
    else:  # one instruction; 1 / distance is four, which scale numbers that cannot occur here
        slope = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [distance], dtype=tl.float32, is_pure=True, pack=1
        )
    if WITH_DERIVATIVES:
        derivative = slope * slope
        if DESCRIPTORS:
            derivatives.store([row, column], round_to(derivative, derivatives.dtype))
        else:
            rows = row + tl.arange(0, BLOCK_M)
            columns = column + tl.arange(0, BLOCK_N)
            pointers = derivatives + rows.to(tl.int64)[:, None] * derivatives_stride + columns[None, :]
            inside = (rows < n_rows)[:, None] & (columns < n_classes)[None, :]
            tl.store(pointers, round_to(derivative, derivatives.dtype.element_ty), mask=inside)
    above = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # `below` has lost a NaN
    return tl.sum(slope, 1) * (SUM_SCALE / SLOPE_SCALE) + tl.sum(above * SUM_SCALE, 1)


@triton.jit
def linear_stablemax_kernel(
    x_ptr,  # [n_rows, n_features]
    weight_ptr,  # [n_classes, n_features]
    bias_ptr,  # [n_classes], or None
    labels_ptr,  # [n_rows] int64
    derivatives_ptr,  # [n_rows, n_classes] receives SLOPE_SCALE^2 E, or None
    sums_ptr,  # [column tiles, n_rows] float32 receives SUM_SCALE sum of s(z) over the tile, without the target
    n_rows,
    n_classes,
    n_features,
    x_stride,
    weight_stride,
    derivatives_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    SLOPE_SCALE: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    WITH_DERIVATIVES: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    RAGGED_N: tl.constexpr,
    RAGGED_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program takes tiles of BLOCK_M rows by BLOCK_N classes in turn, GROUP_M tiles of rows before the next classes.

    All programs together then read a nearly square piece of the product, whose operands stay in L2.
    """
    PART_N: tl.constexpr = BLOCK_N // PARTS
    derivatives = derivatives_ptr
    if DESCRIPTORS:
        x = tl.make_tensor_descriptor(x_ptr, [n_rows, n_features], [x_stride, 1], [BLOCK_M, BLOCK_K])
        weight = tl.make_tensor_descriptor(weight_ptr, [n_classes, n_features], [weight_stride, 1], [BLOCK_N, BLOCK_K])
        if WITH_DERIVATIVES:
            derivatives = tl.make_tensor_descriptor(
                derivatives_ptr, [n_rows, n_classes], [derivatives_stride, 1], [BLOCK_M, PART_N]
            )
    tiles_m = tl.cdiv(n_rows, BLOCK_M)
    tiles_n = tl.cdiv(n_classes, BLOCK_N)
    steps = tl.cdiv(n_features, BLOCK_K)
    per_group = GROUP_M * tiles_n
    first_tile = tl.program_id(0)
    for tile in tl.range(first_tile, tiles_m * tiles_n, tl.num_programs(0), warp_specialize=SPECIALIZED):
        first_m = tile // per_group * GROUP_M
        group_m = tl.minimum(tiles_m - first_m, GROUP_M)
        tile_n = tile % per_group // group_m
        row = (first_m + tile % per_group % group_m) * BLOCK_M
        column = tile_n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)

        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if DESCRIPTORS:
            for step in range(steps):
                x_tile = x.load([row, step * BLOCK_K])
                weight_tile = weight.load([column, step * BLOCK_K])
                z = tl.dot(x_tile, weight_tile.T, z, input_precision=PRECISION)
        else:  # rows and classes beyond the last repeat it: their results are dropped
            features = tl.arange(0, BLOCK_K)
            x_pointers = x_ptr + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * x_stride + features[None, :]
            weight_rows = tl.minimum(columns, n_classes - 1).to(tl.int64)
            weight_pointers = weight_ptr + weight_rows[None, :] * weight_stride + features[:, None]
            for step in range(steps):
                if RAGGED_K:
                    inside = features < n_features - step * BLOCK_K
                    x_tile = tl.load(x_pointers, mask=inside[None, :], other=0.0)
                    weight_tile = tl.load(weight_pointers, mask=inside[:, None], other=0.0)
                else:
                    x_tile = tl.load(x_pointers)
                    weight_tile = tl.load(weight_pointers)
                z = tl.dot(x_tile, weight_tile, z, input_precision=PRECISION)
                x_pointers += BLOCK_K
                weight_pointers += BLOCK_K

        # A logit of -inf adds nothing and has slope 0: classes beyond the last, and the target.
        if WITH_BIAS:
            z += tl.load(bias_ptr + columns, mask=columns < n_classes, other=float("-inf")).to(tl.float32)[None, :]
        if RAGGED_N:
            z = tl.where((columns < n_classes)[None, :], z, float("-inf"))
        label = tl.load(labels_ptr + rows, mask=rows < n_rows, other=-1)
        target = (label - column).to(tl.int32)
        z = tl.where(target[:, None] == tl.arange(0, BLOCK_N)[None, :], float("-inf"), z)

        # Halves of a tile need less shared memory on their way out, and fewer registers.
        if PARTS == 1:
            sums = _consume(
                z, derivatives, derivatives_stride, row, column, n_rows, n_classes, BLOCK_M, PART_N, SLOPE_SCALE,
                SUM_SCALE, WITH_DERIVATIVES, DESCRIPTORS,
            )  # fmt: skip
        else:
            left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, PART_N)), (0, 2, 1)))
            sums = _consume(
                left, derivatives, derivatives_stride, row, column, n_rows, n_classes, BLOCK_M, PART_N, SLOPE_SCALE,
                SUM_SCALE, WITH_DERIVATIVES, DESCRIPTORS,
            )  # fmt: skip
            sums += _consume(
                right, derivatives, derivatives_stride, row, column + PART_N, n_rows, n_classes, BLOCK_M, PART_N,
                SLOPE_SCALE, SUM_SCALE, WITH_DERIVATIVES, DESCRIPTORS,
            )  # fmt: skip
        tl.store(sums_ptr + tile_n.to(tl.int64) * n_rows + rows, sums, mask=rows < n_rows)


# ---- what follows from a row's sums ----


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 in float64, where 1 + x loses digits of x that its logarithm needs."""
    u = 1.0 + x
    correction = tl.where(x < 1e15, x / tl.where(u == 1.0, 1.0, u - 1.0), 1.0)
    return tl.where(u == 1.0, x, tl.log(u) * correction)


@triton.jit
def row_terms_kernel(
    sums_ptr,  # [n_tiles, n_rows]
    x_ptr,  # [n_rows, n_features]
    weight_ptr,  # [n_classes, n_features]
    bias_ptr,  # [n_classes], or None
    labels_ptr,  # [n_rows]
    class_weight_ptr,  # [n_classes] float32, or None
    loss_ptr,  # [n_rows] float32 receives w_y log1p(R / s(z_y))
    sum_gradient_ptr,  # [n_rows] float32 receives c
    target_gradient_ptr,  # [n_rows] float32 receives t
    n_rows,
    n_classes,
    n_features,
    n_tiles,
    x_stride,
    weight_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WITH_CLASS_WEIGHT: tl.constexpr,
):
    """A program takes BLOCK_R rows. The target's logit is computed anew: 1 / n_classes of the logits' product."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    label = tl.load(labels_ptr + rows, mask=rows < n_rows, other=-1)
    counted = (label >= 0) & (label < n_classes)
    label = tl.where(counted, label, 0)

    features = tl.arange(0, BLOCK_H)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + label[:, None] * weight_stride
    products = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for start in range(0, n_features, BLOCK_H):
        inside = counted[:, None] & (start + features < n_features)[None, :]
        x = tl.load(x_rows + start + features[None, :], mask=inside, other=0.0).to(tl.float32)
        products += x * tl.load(weight_rows + start + features[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.sum(products, 1)
    if WITH_BIAS:
        z += tl.load(bias_ptr + label, mask=counted, other=0.0).to(tl.float32)

    tiles = tl.arange(0, BLOCK_T)
    partial = tl.zeros((BLOCK_T, BLOCK_R), tl.float64)
    for start in range(0, n_tiles, BLOCK_T):
        inside = (start + tiles < n_tiles)[:, None] & counted[None, :]
        pointers = sums_ptr + (start + tiles).to(tl.int64)[:, None] * n_rows + rows[None, :]
        partial += tl.load(pointers, mask=inside, other=0.0).to(tl.float64)
    rest = tl.sum(partial, 0) / SUM_SCALE

    z = z.to(tl.float64)
    distance = 1.0 + tl.abs(z)
    target = tl.where(z < 0.0, 1.0 / distance, distance)
    total = rest + target
    total += total - total  # NaN where a logit is NaN or +infinity
    class_weight = tl.full((BLOCK_R,), 1.0, tl.float64)
    if WITH_CLASS_WEIGHT:
        class_weight = tl.load(class_weight_ptr + label, mask=counted, other=0.0).to(tl.float64)
    loss = class_weight * (_log1p(rest / target) + (total - total))
    exists = rows < n_rows
    tl.store(loss_ptr + rows, tl.where(counted, loss, 0.0).to(tl.float32), mask=exists)
    sum_gradient = class_weight / total
    tl.store(sum_gradient_ptr + rows, tl.where(counted, sum_gradient, 0.0).to(tl.float32), mask=exists)
    target_gradient = -sum_gradient * rest / distance
    tl.store(target_gradient_ptr + rows, tl.where(counted, target_gradient, 0.0).to(tl.float32), mask=exists)


# ---- around the products of the gradients ----


@triton.jit
def scale_rows_kernel(
    x_ptr,  # [n_rows, n_features]
    factor_ptr,  # [n_rows] float32
    scale_ptr,  # [] float32, or None
    out_ptr,  # [n_rows, n_features] receives scale SCALE factor x
    n_rows,
    n_features,
    x_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCALE: tl.constexpr,
    WITH_SCALE: tl.constexpr,
):
    """A row whose factor is 0 becomes 0, whatever it holds."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    factor = tl.load(factor_ptr + rows, mask=rows < n_rows, other=0.0)
    used = factor != 0.0
    factor *= SCALE
    if WITH_SCALE:
        factor *= tl.load(scale_ptr)
    features = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = (rows < n_rows)[:, None] & (features < n_features)[None, :]
    offsets = rows.to(tl.int64)[:, None] * x_stride + features[None, :]
    x = tl.load(x_ptr + offsets, mask=exists & used[:, None], other=0.0).to(tl.float32)
    out = out_ptr + rows.to(tl.int64)[:, None] * n_features + features[None, :]
    tl.store(out, round_to(x * factor[:, None], out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def finish_input_gradient_kernel(
    product_ptr,  # [n_rows, n_features] float32: (SCALE E) W
    weight_ptr,  # [n_classes, n_features]
    labels_ptr,  # [n_rows]
    sum_gradient_ptr,  # [n_rows]
    target_gradient_ptr,  # [n_rows]
    out_ptr,  # [n_rows, n_features] receives c (E W) + t W[y]
    n_rows,
    n_classes,
    n_features,
    weight_stride,
    out_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCALE: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    label = tl.load(labels_ptr + rows, mask=rows < n_rows, other=-1)
    counted = (label >= 0) & (label < n_classes)
    label = tl.where(counted, label, 0)
    c = tl.load(sum_gradient_ptr + rows, mask=counted, other=0.0) / SCALE
    t = tl.load(target_gradient_ptr + rows, mask=counted, other=0.0)
    features = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = (rows < n_rows)[:, None] & (features < n_features)[None, :]
    used = exists & counted[:, None]
    offsets = rows.to(tl.int64)[:, None] * n_features + features[None, :]
    product = tl.load(product_ptr + offsets, mask=used, other=0.0)
    weight = tl.load(weight_ptr + label[:, None] * weight_stride + features[None, :], mask=used, other=0.0)
    gradient = c[:, None] * product + t[:, None] * weight.to(tl.float32)
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + features[None, :]
    tl.store(out, round_to(gradient, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def sum_columns_kernel(
    derivatives_ptr,  # [n_rows, n_classes] SCALE E
    factor_ptr,  # [n_rows] float32
    out_ptr,  # [n_classes] float32 receives, or gains, E^T factor
    n_rows,
    n_classes,
    derivatives_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, n_rows, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        factor = tl.load(factor_ptr + rows, mask=rows < n_rows, other=0.0) / SCALE
        pointers = derivatives_ptr + rows.to(tl.int64)[:, None] * derivatives_stride + columns[None, :]
        inside = (rows < n_rows)[:, None] & (columns < n_classes)[None, :]
        products += factor[:, None] * tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    pointers = out_ptr + columns
    previous = tl.load(pointers, mask=columns < n_classes, other=0.0)
    tl.store(pointers, previous + tl.sum(products, 0), mask=columns < n_classes)


@triton.jit
def rescale_kernel(x_ptr, ratio_ptr, n, BLOCK: tl.constexpr):
    """x *= ratio, [n] and []; a ratio of 1, the usual one, costs nothing."""
    ratio = tl.load(ratio_ptr)
    if ratio != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) * ratio, mask=offsets < n)


# ---- which tiles ----


class Tiles(NamedTuple):
    """How a program of `linear_stablemax_kernel` works; fixed by device, dtype and shape, for the sums depend on it."""

    rows: int
    classes: int
    features: int
    parts: int
    warps: int
    stages: int
    descriptors: bool = False  # tensor descriptors: the copy engine of sm_90 and later
    specialized: bool = False  # a warp group that copies, others that multiply; needs descriptors
    group: int = 16


# 128 x 256 float32 results are half of a multiprocessor's registers; with 16-bit operands they reach 85 operations for
# each byte from L2, where smaller tiles wait for it. Stages of (rows + classes) x features operands and the part of E
# on its way out must fit into shared memory: 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on its siblings and on
# sm_120.
_TILES = {
    ("sm_80", "16 bits"): Tiles(128, 128, 64, parts=1, warps=8, stages=4),
    ("sm_80", "tf32"): Tiles(128, 128, 32, parts=1, warps=8, stages=4),
    ("sm_86", "16 bits"): Tiles(128, 128, 64, parts=2, warps=8, stages=3),
    ("sm_86", "tf32"): Tiles(128, 128, 32, parts=2, warps=8, stages=3),
    ("sm_90", "16 bits"): Tiles(128, 256, 64, parts=2, warps=8, stages=4, descriptors=True),
    ("sm_90", "tf32"): Tiles(128, 256, 32, parts=2, warps=8, stages=3, descriptors=True),
    ("sm_100", "16 bits"): Tiles(128, 256, 64, parts=1, warps=8, stages=3, descriptors=True),
    ("sm_100", "tf32"): Tiles(128, 128, 32, parts=1, warps=8, stages=4, descriptors=True),
    ("sm_120", "16 bits"): Tiles(128, 128, 64, parts=2, warps=8, stages=3, descriptors=True),
    ("sm_120", "tf32"): Tiles(128, 128, 32, parts=2, warps=8, stages=2, descriptors=True),
}
_IEEE_TILES = Tiles(128, 64, 16, parts=1, warps=8, stages=2)  # no matrix instruction multiplies in float32
_EMULATED_TILES = Tiles(16, 32, 16, parts=2, warps=1, stages=1, group=2)  # small: a small test has several

# Of the other kernels, which are bound by memory: 2048 elements a program, 16 a thread. Sums of a row's tiles lie
# n_rows apart, so that 8 rows make one sector of 32 bytes.
_ROW_TERMS_BLOCKS = {"BLOCK_R": 8, "BLOCK_T": 64, "BLOCK_H": 256}
_ELEMENT_BLOCKS = {"BLOCK_R": 4, "BLOCK_H": 512}
_COLUMN_BLOCKS = {"BLOCK_R": 32, "BLOCK_N": 128}


def _element_grid(n_rows: int, n_features: int) -> tuple[int, int]:
    return triton.cdiv(n_rows, _ELEMENT_BLOCKS["BLOCK_R"]), triton.cdiv(n_features, _ELEMENT_BLOCKS["BLOCK_H"])


def _family(major: int, minor: int) -> str:
    if major >= 12:
        return "sm_120"
    if major >= 10:
        return "sm_100"
    if major == 9:
        return "sm_90"
    return "sm_80" if minor in (0, 7) else "sm_86"


def _choose_tiles(x: Tensor, weight: Tensor, derivatives: Tensor | None, precision: str) -> Tiles:
    if not x.is_cuda:
        return _EMULATED_TILES
    if x.dtype == torch.float32 and precision == "ieee":
        return _IEEE_TILES
    kind = "16 bits" if x.dtype.itemsize == 2 else precision
    family = _family(*torch.cuda.get_device_capability(x.device))
    tiles = _TILES[family, kind]
    if tiles.descriptors and not all(map(_is_describable, (x, weight, derivatives))):
        tiles = _TILES["sm_86" if family == "sm_120" else "sm_80", kind]
    return tiles


def _is_describable(matrix: Tensor | None) -> bool:
    """Whether the copy engine can address it: 16-byte steps between rows, and an aligned start."""
    if matrix is None:
        return True
    step = matrix.stride(0) * matrix.element_size()
    return matrix.numel() > 0 and step % 16 == 0 and step > 0 and matrix.data_ptr() % 16 == 0


# ---- launchers ----
#
# Tensors of one call lie on one device and hold float32, bfloat16 or float16; labels are int64, and one outside
# [0, n_classes) stands for a row that does not count. Nothing waits for the GPU. Call them where autograd and autocast
# are off.


class RowTerms(NamedTuple):
    """What a row's sums give, float32 [R] each; 0 for rows that do not count."""

    loss: Tensor  # w_y log1p(R / s(z_y))
    sum_gradient: Tensor  # c = w_y / S
    target_gradient: Tensor  # t = dL/dz_y


def new_derivatives(n_rows: int, weight: Tensor) -> Tensor:
    """Memory for E of n_rows rows, [n_rows, V]: rows start at multiples of 16 bytes, for fast copies and products."""
    multiple = 16 // weight.element_size()
    stride = triton.cdiv(weight.shape[0], multiple) * multiple
    return weight.new_empty((n_rows, stride))[:, : weight.shape[0]]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None = None,
    derivatives: Tensor | None = None,
) -> RowTerms:
    """Losses of rows, and what their gradients need.

    Args:
        x: [R, H].
        weight: [V, H], of x's dtype.
        bias: [V] of any of the dtypes, or None.
        labels: [R].
        class_weight: [V] float32, or None.
        derivatives: [R, V] from :func:`new_derivatives`, which receives E for the gradients; None for the loss alone.
    """
    x, weight = _rows(x), _rows(weight)
    bias, labels, class_weight = map(_vector, (bias, labels, class_weight))
    n_rows, n_features = x.shape
    n_classes = weight.shape[0]
    result = RowTerms(*x.new_empty((3, n_rows), dtype=torch.float32))
    if n_rows == 0:
        return result
    precision = product_precision(x.dtype)
    tiles = _choose_tiles(x, weight, derivatives, precision)
    tiles_n = triton.cdiv(n_classes, tiles.classes)
    sums = x.new_empty((tiles_n, n_rows), dtype=torch.float32)
    sum_scale = 0.5 / tiles.classes  # a tile's sum of finite logits is finite
    with torch.cuda.device_of(x):
        _multiply(x, weight, bias, labels, derivatives, sums, tiles, precision, sum_scale)
        row_terms_kernel[(triton.cdiv(n_rows, _ROW_TERMS_BLOCKS["BLOCK_R"]),)](
            sums,
            x,
            weight,
            bias,
            labels,
            class_weight,
            *result,
            n_rows,
            n_classes,
            n_features,
            tiles_n,
            x.stride(0),
            weight.stride(0),
            **_ROW_TERMS_BLOCKS,
            SUM_SCALE=sum_scale,
            WITH_BIAS=bias is not None,
            WITH_CLASS_WEIGHT=class_weight is not None,
            **OPTIONS,
        )
    return result


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    derivatives: Tensor | None,
    sums: Tensor,
    tiles: Tiles,
    precision: str,
    sum_scale: float,
) -> None:
    n_rows, n_features = x.shape
    n_classes = weight.shape[0]
    count = triton.cdiv(n_rows, tiles.rows) * triton.cdiv(n_classes, tiles.classes)
    if not x.is_cuda:
        count = min(count, 3)
        if x.dtype == torch.bfloat16:  # numpy has no product of bfloat16; the product of float32 is the same
            x, weight = x.float(), weight.float()
    elif tiles.descriptors:  # such a program takes tile after tile, one program a multiprocessor
        count = min(count, torch.cuda.get_device_properties(x.device).multi_processor_count)

    def launch() -> None:
        triton.set_allocator(_allocate_scratch)
        linear_stablemax_kernel[(count,)](
            x,
            weight,
            bias,
            labels,
            derivatives,
            sums,
            n_rows,
            n_classes,
            n_features,
            x.stride(0),
            weight.stride(0),
            0 if derivatives is None else derivatives.stride(0),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.classes,
            BLOCK_K=tiles.features,
            GROUP_M=tiles.group,
            PARTS=tiles.parts,
            SLOPE_SCALE=_slope_scale(x.dtype),
            SUM_SCALE=sum_scale,
            WITH_DERIVATIVES=derivatives is not None,
            WITH_BIAS=bias is not None,
            RAGGED_N=bias is None and n_classes % tiles.classes != 0,
            RAGGED_K=n_features % tiles.features != 0,
            DESCRIPTORS=tiles.descriptors,
            SPECIALIZED=tiles.specialized,
            PRECISION=precision,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **OPTIONS,
        )

    # Descriptors lie in scratch memory, whose allocator belongs to the context: to a copy of the caller's.
    contextvars.copy_context().run(launch)


def _allocate_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _slope_scale(dtype: torch.dtype) -> float:
    """E is stored times the square of this.

    2^7 keeps the E of every float16 logit above float16's smallest number; with 4 the slope of no float32 logit is
    subnormal, which the reciprocal would flush to 0.
    """
    return 128.0 if dtype == torch.float16 else 4.0


def input_gradient(
    derivatives: Tensor,
    weight: Tensor,
    labels: Tensor,
    sum_gradient: Tensor,
    target_gradient: Tensor,
    out: Tensor,
) -> None:
    """out = c (E W) + t W[y], [R, H] of any of the dtypes, rows contiguous.

    ``sum_gradient`` and ``target_gradient`` are those of :func:`forward`, times the gradient of each row's loss.
    """
    n_rows, n_features = out.shape
    if out.numel() == 0:
        return
    weight = _rows(weight)
    product = out.new_empty((n_rows, n_features), dtype=torch.float32)
    with torch.cuda.device_of(out):
        product_into(product, derivatives, weight, accumulate=False)
        finish_input_gradient_kernel[_element_grid(n_rows, n_features)](
            product,
            weight,
            labels.contiguous(),
            sum_gradient.contiguous(),
            target_gradient.contiguous(),
            out,
            n_rows,
            weight.shape[0],
            n_features,
            weight.stride(0),
            out.stride(0),
            **_ELEMENT_BLOCKS,
            SCALE=_slope_scale(derivatives.dtype) ** 2,
            **OPTIONS,
        )


def add_bias_gradient(
    out: Tensor, derivatives: Tensor, labels: Tensor, sum_gradient: Tensor, target_gradient: Tensor
) -> None:
    """out += E^T c, plus t at the targets: [V] float32."""
    n_rows, n_classes = derivatives.shape
    if n_rows == 0:
        return
    with torch.cuda.device_of(out):
        sum_columns_kernel[(triton.cdiv(n_classes, _COLUMN_BLOCKS["BLOCK_N"]),)](
            derivatives,
            sum_gradient.contiguous(),
            out,
            n_rows,
            n_classes,
            derivatives.stride(0),
            **_COLUMN_BLOCKS,
            SCALE=_slope_scale(derivatives.dtype) ** 2,
            **OPTIONS,
        )
    out.index_put_((labels.clamp(0, n_classes - 1),), target_gradient, accumulate=True)


class WeightGradient:
    """dW = sum over chunks of rows of E^T (c x), and t x added to rows y: [V, H].

    Args:
        weight: [V, H], for its shape, dtype and device.
        dtype: of the sum. float32 for any number of chunks. A single chunk of bfloat16 may sum in bfloat16: nothing is
            rounded before the end, and the sum is the result.
    """

    # Of float16, c x and E must share 40 binades with sums that span more: the sum is kept times a power of two that
    # lets the largest c x so far fit, chosen anew, on the device, when a larger one comes.
    _LARGEST = 2.0**15
    _USUAL = 2.0**8

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> None:
        if dtype != torch.float32 and (dtype != torch.bfloat16 or weight.dtype != dtype):
            raise TypeError(f"WeightGradient: expected float32, or bfloat16 for a bfloat16 weight, got {dtype}")
        self._sum = weight.new_empty(weight.shape, dtype=dtype)
        self._derivative_scale = _slope_scale(weight.dtype) ** 2
        self._scale: Tensor | None = None  # [], of c x in float16
        self._chunks = 0

    def add(
        self, derivatives: Tensor, x: Tensor, labels: Tensor, sum_gradient: Tensor, target_gradient: Tensor
    ) -> None:
        """Adds a chunk of rows; ``sum_gradient`` and ``target_gradient`` as in :func:`input_gradient`."""
        if self._chunks > 0 and self._sum.dtype != torch.float32:
            raise ValueError(f"WeightGradient: a sum in {self._sum.dtype} takes one chunk; sum in float32")
        if x.shape[0] == 0:
            return
        x = _rows(x)
        if x.dtype == torch.float16:
            self._fit(x, sum_gradient)
            product_scale, target_scale = 1.0, self._derivative_scale
        else:
            product_scale, target_scale = 1.0 / self._derivative_scale, 1.0
        with torch.cuda.device_of(x):
            scaled = _scale_rows(x, sum_gradient, self._scale, product_scale, x.dtype)
            product_into(self._sum, derivatives.T, scaled, accumulate=self._chunks > 0)
            targets = _scale_rows(x, target_gradient, self._scale, target_scale, self._sum.dtype)
        self._sum.index_put_((labels.clamp(0, self._sum.shape[0] - 1),), targets, accumulate=True)
        self._chunks += 1

    def result(self, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
        """dW times ``factor`` ([], float32), in ``dtype``; the sum itself where it is that."""
        if self._chunks == 0:
            return torch.zeros_like(self._sum, dtype=dtype)
        if self._scale is not None:
            factor = (1.0 if factor is None else factor) / (self._scale * self._derivative_scale)
        if factor is None:
            return self._sum.to(dtype)
        return torch.mul(self._sum, factor, out=torch.empty_like(self._sum, dtype=dtype))

    def _fit(self, x: Tensor, sum_gradient: Tensor) -> None:
        magnitude = torch.linalg.vector_norm(x, float("inf"), dim=1, dtype=torch.float32) * sum_gradient.abs()
        largest = magnitude.where(sum_gradient != 0, 0.0).amax()
        fitting = torch.exp2((self._USUAL / largest).log2().floor().clamp(-100.0, 100.0))
        if self._scale is None:
            self._scale = fitting
            return
        scale = fitting.where(largest * self._scale > self._LARGEST, self._scale)
        with torch.cuda.device_of(x):
            rescale_kernel[(1024 if x.is_cuda else 2,)](
                self._sum, scale / self._scale, self._sum.numel(), BLOCK=4096, **OPTIONS
            )
        self._scale = scale


def _scale_rows(x: Tensor, factor: Tensor, scale: Tensor | None, constant: float, dtype: torch.dtype) -> Tensor:
    """constant scale factor x, [R, H] in dtype."""
    n_rows, n_features = x.shape
    out = x.new_empty((n_rows, n_features), dtype=dtype)
    scale_rows_kernel[_element_grid(n_rows, n_features)](
        x,
        factor.contiguous(),
        scale,
        out,
        n_rows,
        n_features,
        x.stride(0),
        **_ELEMENT_BLOCKS,
        SCALE=constant,
        WITH_SCALE=scale is not None,
        **OPTIONS,
    )
    return out


# ---- what tools/triton_report.py compiles ----


def _product_variant(tiles: Tiles, dtype: str, *, derivatives: bool = True, bias: bool = False) -> Any:
    types = _types(dtype, x="dtype", weight="dtype", labels="i64", sums="fp32")
    constants = {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.classes,
        "BLOCK_K": tiles.features,
        "GROUP_M": tiles.group,
        "PARTS": tiles.parts,
        "SLOPE_SCALE": 128.0 if dtype == "fp16" else 4.0,
        "SUM_SCALE": 0.5 / tiles.classes,
        "WITH_DERIVATIVES": derivatives,
        "WITH_BIAS": bias,
        "RAGGED_N": not bias,
        "RAGGED_K": not tiles.descriptors,
        "DESCRIPTORS": tiles.descriptors,
        "SPECIALIZED": tiles.specialized,
        "PRECISION": "ieee" if dtype != "fp32" or tiles is _IEEE_TILES else "tf32",
    }
    for name, wanted in (("bias_ptr", bias), ("derivatives_ptr", derivatives)):
        types |= {name: f"*{dtype}:16"} if wanted else {}
        constants |= {} if wanted else {name: None}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages} | OPTIONS
    return linear_stablemax_kernel, types, constants, options


def _types(dtype: str, **pointers: str) -> dict[str, str]:
    """Types of parameters: pointers, and sizes and strides as far as kernels have them."""
    steps = ("n_features", "x_stride", "weight_stride", "derivatives_stride", "out_stride")
    return (
        {f"{name}_ptr": f"*{dtype if of == 'dtype' else of}:16" for name, of in pointers.items()}
        | dict.fromkeys(("n_rows", "n_classes", "n_tiles"), "i32")
        | dict.fromkeys(steps, "i32:16")
    )


def _variants() -> dict[str, Any]:
    """By name: a kernel, types, constants, options, and the architectures that run it so."""
    every = (80, 90, 100, 120)
    served_by = {"sm_80": every[:3], "sm_86": (120,), "sm_90": (90,), "sm_100": (100,), "sm_120": (120,)}
    found = {}
    for (family, kind), tiles in [*_TILES.items(), (("all", "ieee"), _IEEE_TILES)]:
        dtypes = ("bf16", "fp16") if kind == "16 bits" else ("fp32",)
        size = f"{tiles.rows}x{tiles.classes}x{tiles.features} of {family}"
        for suffix, options in {"": {}, " with bias": {"bias": True}, " without E": {"derivatives": False}}.items():
            for dtype in dtypes[:1] if options else dtypes:
                name = f"linear_stablemax {kind if dtype == 'fp32' else dtype} {size}{suffix}"
                found[name] = (*_product_variant(tiles, dtype, **options), served_by.get(family, every))
    for dtype in ("bf16", "fp32"):
        rows = {"factor": "fp32", "out": dtype}
        gradients = {"sum_gradient": "fp32", "target_gradient": "fp32"}
        found |= {
            f"row_terms {dtype}": (
                row_terms_kernel,
                _types(dtype, sums="fp32", x="dtype", weight="dtype", labels="i64", loss="fp32", **gradients)
                | dict.fromkeys(("bias_ptr", "class_weight_ptr"), "*fp32:16"),
                _ROW_TERMS_BLOCKS | {"SUM_SCALE": 1 / 512, "WITH_BIAS": True, "WITH_CLASS_WEIGHT": True},
                OPTIONS,
                every,
            ),
            f"scale_rows {dtype}": (
                scale_rows_kernel,
                _types(dtype, x="dtype", scale="fp32", **rows),
                _ELEMENT_BLOCKS | {"SCALE": 1.0, "WITH_SCALE": True},
                OPTIONS,
                every,
            ),
            f"finish_input_gradient {dtype}": (
                finish_input_gradient_kernel,
                _types(dtype, product="fp32", weight="dtype", labels="i64", out="dtype", **gradients),
                _ELEMENT_BLOCKS | {"SCALE": 16.0},
                OPTIONS,
                every,
            ),
            f"sum_columns {dtype}": (
                sum_columns_kernel,
                _types(dtype, derivatives="dtype", factor="fp32", out="fp32"),
                _COLUMN_BLOCKS | {"SCALE": 16.0},
                OPTIONS,
                every,
            ),
        }
    found["rescale"] = (
        rescale_kernel,
        _types("fp32", x="fp32", ratio="fp32") | {"n": "i64"},
        {"BLOCK": 4096},
        {},
        every,
    )
    return found


AHEAD_OF_TIME = _variants()

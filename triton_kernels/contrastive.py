"""ConR, supervised contrastive and InfoNCE losses on tensor cores. No N x M matrix exists.

_pair_kernels.py has the formulas. For N rows of D features, with b bytes each:

Operands. A pass writes the features anew, scaled, padded, and sorted where that pays: 2 b N D bytes.

Few samples. A program multiplies a tile's rows and columns (tl.dot), and what the tile adds to the sums of its rows and
columns follows in registers. With the operands before and the sums of the tiles after, that is three launches. N^2 D
operations and N^2 / 2 exponentials: of rows that are the columns, the tiles of the upper triangle.

Many samples. A kernel that holds the products of a tile of 128 x 128 has too few registers left for what follows, and
nothing else on its multiprocessor to multiply meanwhile. Here torch's matrix product fills a block of at most 64 MB,
next to L2's size, and a second kernel reads it, 1024 pairs at a time. Of rows that are the columns, blocks of the
upper triangle, which is (1 + 1 / n) N^2 D operations for n blocks a side; each pair's product is written and read
once, 8 bytes, and every arithmetic of torch's (TF32, float32, float64) is as fast as torch's. The sums of a block's
rows and columns are added to slots, one for each tile of the block's columns and rows, in the order of the blocks.
At N = 32768, D = 512 in bfloat16 on an H100: products 0.8 ms, the other half 0.8 ms of some 30 instructions a pair.

Backward. Tiles of H, made from the products anew and rounded to the dtype of the features, fill a block, which torch's
matrix product multiplies with the operands. A block off the diagonal serves rows and columns, as H and as its
transpose: 3 N^2 D operations in all. What the norm and z (z . dz) do to the sum is a pass of its own.

Skipped tiles (ConR). In the order of label and prediction, bounds of a tile's labels and predictions prove many tiles
empty. They are then skipped in both products, which are Triton's there, and between them. It takes two sorts, and is
done where the products take several times their time.

Every sum is in a fixed order: the same bits on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyreg.triton_kernels import _pair_kernels as kernels
from pyreg.triton_kernels._shared import OPTIONS, product_into, product_precision

# ---- which tiles ----


class Tiles(NamedTuple):
    """How programs work; fixed by device, dtype and shape, for the sums depend on it."""

    size: int  # rows, and columns
    depth: int  # features of a step of a product
    warps: int
    stages: int
    piece: int = 0  # rows of a tile in memory that are taken at a time; 0 where the tiles' products stay in registers
    registers: int = 255  # of a thread: without a limit of ours, ptxas spills to have room for one program more

    def options(self, *, wide_labels: bool = False) -> dict[str, Any]:
        """Of a launch; labels of several numbers, or of float64, take more registers."""
        registers = 255 if wide_labels else self.registers
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers, **OPTIONS}


# Of few samples a tile's products stay in registers: three launches, and a tile that is small enough for several on a
# multiprocessor, and for the exponentials of all its pairs beside its products.
_FUSED_TILES = {
    "16 bits": Tiles(64, 64, warps=8, stages=5),
    "tf32": Tiles(64, 32, warps=8, stages=5),
    "ieee": Tiles(32, 32, warps=4, stages=3),
    "fp64": Tiles(32, 16, warps=8, stages=3),
}
_MOST_FUSED = 1024  # rows, and columns

# Of many a block of them is in memory, most of it in L2. 8 x 128 at a time are 8 of a thread; 168 registers let three
# programs run on a multiprocessor.
_BLOCK_TILES = {
    "16 bits": Tiles(128, 64, warps=4, stages=1, piece=8, registers=168),
    "tf32": Tiles(128, 32, warps=4, stages=1, piece=8, registers=168),
    "ieee": Tiles(128, 16, warps=4, stages=1, piece=8, registers=168),
    "fp64": Tiles(128, 16, warps=4, stages=1, piece=4),
}
_BLOCK_BYTES = 64 << 20  # of products and H
# Operations of a block's product: 80 us of an H100, twice what the launches of a block take of a processor.
_BLOCK_OPERATIONS = {"16 bits": 6e10, "tf32": 3e10, "ieee": 4e9, "fp64": 4e9}

# Products of active tiles: 128 x 128 results in 8 warps, at most 64 KB.
_PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 3}
_PRODUCT_WIDTH = 512  # bytes of a row of results

_EMULATED_FUSED_TILES = Tiles(16, 16, warps=1, stages=1)  # small: a small test has several
_EMULATED_BLOCK_TILES = Tiles(16, 16, warps=1, stages=1, piece=8)

# Of the kernels that are bound by memory: 2048 elements a program. 128 rows' sums lie next to each other in a slot.
_ELEMENT_BLOCKS = {"BLOCK_R": 4, "BLOCK_H": 512}
_ELEMENT_OPTIONS = OPTIONS | {"maxnreg": 128}
_FINISH_BLOCKS = {"BLOCK_R": 128, "BLOCK_T": 8}
_ACTIVE_CHUNK = 8

# Operations, N^2 D of them a product, from which on tiles are skipped: sorting and the lists take some 0.15 ms of an
# H100 in forward and backward pass each, the products so large five times that.
_LEAST_SORTED = {"16 bits": 6e11, "tf32": 3e11, "ieee": 4e10, "fp64": 4e10}


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "fp64"
    return "16 bits" if dtype.itemsize == 2 else product_precision(dtype)


def _choose_tiles(features: Tensor, n_rows: int, n_columns: int) -> Tiles:
    fused = max(n_rows, n_columns) <= _MOST_FUSED
    if not features.is_cuda:
        return _EMULATED_FUSED_TILES if fused else _EMULATED_BLOCK_TILES
    return (_FUSED_TILES if fused else _BLOCK_TILES)[_kind(features.dtype)]


def _skips(features: Tensor) -> bool:
    return features.shape[0] ** 2 * features.shape[1] >= _LEAST_SORTED[_kind(features.dtype)]


# ---- launchers ----
#
# Tensors of one call lie on one device, are contiguous, and have the dtypes that the functions name. Nothing waits for
# the GPU. Call them where autograd and autocast are off.


class _Operand(NamedTuple):
    """Features as the products take them."""

    values: Tensor  # [padded, depth]
    norms: Tensor  # [4, padded], as prepare_kernel stores them

    def part(self, first: int) -> _Operand:
        return _Operand(self.values[first:], self.norms[:, first:])


class _Side(NamedTuple):
    """The rows of all pairs, or the columns."""

    count: int
    operand: _Operand
    labels: Tensor | None = None
    preds: Tensor | None = None
    weights: Tensor | None = None


class _Block(NamedTuple):
    """Pairs that are treated at once; counts are multiples of the tiles' size."""

    first_row: int
    first_column: int
    row_count: int
    column_count: int


class _Problem(NamedTuple):
    rows: _Side
    columns: _Side
    tiles: Tiles
    n_features: int
    dtype: torch.dtype  # of the features
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
    def fused(self) -> bool:
        return self.tiles.piece == 0

    @property
    def device_total(self) -> Any:
        return tl.float64 if self.dtype == torch.float64 else tl.float32

    @property
    def arithmetic(self) -> dict[str, Any]:
        return {"PRECISION": product_precision(self.dtype), "TOTAL": self.device_total}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory, of the dtype of sums if of no other."""
        return self.rows.operand.norms.new_empty(shape, dtype=dtype)

    def common(self) -> dict[str, Any]:
        """What the kernels that take tiles of pairs have in common."""
        tiles, rows, columns = self.tiles, self.rows, self.columns
        n_labels = 1 if rows.labels is None else rows.labels.numel() // rows.count
        return {
            "row_operand_ptr": rows.operand.values,
            "column_operand_ptr": columns.operand.values,
            "row_scales_ptr": rows.operand.norms,
            "column_scales_ptr": columns.operand.norms,
            "row_labels_ptr": rows.labels,
            "column_labels_ptr": columns.labels,
            "row_preds_ptr": rows.preds,
            "column_preds_ptr": columns.preds,
            "row_weights_ptr": rows.weights,
            "column_weights_ptr": columns.weights,
            "log_q_ptr": self.log_q,
            "n_rows": rows.count,
            "n_columns": columns.count,
            "depth": columns.operand.values.shape[1],
            "n_labels": n_labels,
            "diagonal": self.diagonal,
            "score_scale": math.log2(math.e) / self.temperature,
            "push_scale": self.push_scale,
            "window": self.window,
            "LOSS": self.loss,
            "NORM": self.norm,
            "PUSH": self.push,
            "SHIFT": self.shift,
            "ONE_LABEL": n_labels == 1,
            "WITH_FACTORS": rows.weights is not None or self.push == kernels.PUSH_FACTOR.value,
            "SIZE": tiles.size,
            "PIECE": tiles.piece,
            "DEPTH": tiles.depth,
            **self.arithmetic,
            **tiles.options(wide_labels=n_labels > 1 or (rows.preds is not None and rows.preds.dtype == torch.float64)),
        }

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns, to whole tiles."""
        size = self.tiles.size
        return triton.cdiv(self.rows.count, size) * size, triton.cdiv(self.columns.count, size) * size

    @property
    def block_shape(self) -> tuple[int, int]:
        """The largest block: all pairs where they are few, else at most half of the rows and columns, so that of a
        triangle at most three quarters are computed."""
        rows, columns = self.padded
        if self.fused:
            return rows, columns
        size, kind = self.tiles.size, _kind(self.dtype)
        # Products, and H where these are too wide to take its place.
        elements = _BLOCK_BYTES // (8 if kind == "fp64" else 6 if kind == "16 bits" else 4)
        worthwhile = _BLOCK_OPERATIONS[kind] / (2 * max(self.n_features, 1))
        side = max(math.isqrt(int(min(elements, worthwhile))) // size, 1)
        height = min(side, triton.cdiv(rows // size, 2))
        width = height
        if not self.triangle:  # a slot of sums for each tile's rows and columns: not too long either
            width = min(int(min(elements, worthwhile)) // (height * size * size), triton.cdiv(columns // size, 2))
            width = max(min(width, 4 * side), 1)
        return height * size, width * size

    def blocks(self) -> Iterator[_Block]:
        height, width = self.block_shape
        rows, columns = self.padded
        for first_row in range(0, rows, height):
            for first_column in range(first_row if self.triangle else 0, columns, width):
                yield _Block(first_row, first_column, min(height, rows - first_row), min(width, columns - first_column))


def _total_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prepare(
    features: Tensor,
    columns: Tensor | None,
    tiles: Tiles,
    *,
    temperature: float,
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
        return _Operand(features.new_empty((padded, depth), dtype=dtype), features.new_empty((4, padded), dtype=total))

    row_operand = new(features.shape[0])
    column_operand = row_operand if columns is None else new(columns.shape[0])
    padded = [len(operand.values) for operand in (row_operand, column_operand)]
    programs = sum(triton.cdiv(count, _ELEMENT_BLOCKS["BLOCK_R"]) for count in padded[: 1 if columns is None else 2])
    kernels.prepare_kernel[(programs,)](
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
        math.log2(math.e) / temperature,
        TOTAL=tl.float64 if total == torch.float64 else tl.float32,
        NORMALIZE=normalize,
        SORTED=order is not None,
        WITH_COLUMNS=columns is not None,
        **_ELEMENT_BLOCKS,
        **_ELEMENT_OPTIONS,
    )
    return row_operand, column_operand


def _shift(temperature: float, normalize: bool, push: int = 0) -> int:
    """How exponents are kept in range, as far as no data are needed to know."""
    if not normalize or 2.0 / temperature * kernels.LOG2_E.value > kernels.SMALL_RANGE.value:
        return int(kernels.MAXIMUM.value)
    return int(kernels.BY_TILE.value if push == kernels.PUSH_EXPONENT.value else kernels.CONSTANT.value)


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
    tiles = _choose_tiles(features, row_count, count)
    order = None
    if triangle and tiles.piece > 0 and _skips(features):
        order = torch.sort(preds[:, 0], stable=True).indices
        order = order[torch.sort(targets[order, 0], stable=True).indices]
        targets, preds = targets[order], preds[order]
        weights = None if weights is None else weights[order]
    operand, _ = _prepare(
        features, None, tiles, temperature=temperature, normalize=True, order=order, spare=0 if triangle else tiles.size
    )
    columns = _Side(count, operand, targets, preds, weights)
    rows = columns
    if not triangle:
        own = slice(first_row, first_row + row_count)
        row_weights = None if weights is None else weights[own]
        rows = _Side(row_count, operand.part(first_row), targets[own], preds[own], row_weights)
    push = kernels.PUSH_FACTOR.value if variant == 2 else kernels.PUSH_EXPONENT.value
    return _Problem(
        rows,
        columns,
        tiles,
        features.shape[1],
        features.dtype,
        kernels.CONR.value,
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
    operand, _ = _prepare(
        features, None, tiles, temperature=temperature, normalize=normalize, spare=0 if triangle else tiles.size
    )
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
        kernels.SUPCON.value,
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
    operands = _prepare(query, key, tiles, temperature=temperature, normalize=normalize)
    return _Problem(
        _Side(query.shape[0], operands[0], query_ids),
        _Side(key.shape[0], operands[1], key_ids),
        tiles,
        query.shape[1],
        query.dtype,
        kernels.INFO_NCE.value,
        temperature,
        normalize,
        diagonal=offset,
        columns_have_losses=both,
        shift=kernels.MAXIMUM.value if log_q is not None else _shift(temperature, normalize),
        log_q=log_q,
    )


class _Active(NamedTuple):
    """Tiles that may have positives or negatives."""

    flags: Tensor  # [n_tiles, n_tiles] int8
    list: Tensor  # [n_tiles, n_blocks, block_tiles] int32
    length: Tensor  # [n_tiles, n_blocks] int32


def _active_tiles(problem: _Problem) -> _Active | None:
    if problem.order is None:
        return None
    side, size = problem.rows, problem.tiles.size
    block_tiles = problem.block_shape[0] // size
    n_tiles = triton.cdiv(side.count, size)
    n_blocks = triton.cdiv(n_tiles, block_tiles)
    active = _Active(
        problem.new(n_tiles, n_tiles, dtype=torch.int8),
        problem.new(n_tiles, n_blocks, block_tiles, dtype=torch.int32),
        problem.new(n_tiles, n_blocks, dtype=torch.int32),
    )
    kernels.active_tiles_kernel[(n_tiles * n_blocks,)](
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


def _block_memory(problem: _Problem) -> Tensor | None:
    if problem.fused:
        return None
    height, width = problem.block_shape
    return problem.new(height * width)


def _multiply(problem: _Problem, block: _Block, memory: Tensor, active: _Active | None) -> Tensor:
    """The products of a block's rows and columns, [row_count, column_count]."""
    rows, columns = problem.rows.operand.values, problem.columns.operand.values
    products = memory[: block.row_count * block.column_count].view(block.row_count, block.column_count)
    if active is None:
        rows = rows[block.first_row : block.first_row + block.row_count]
        columns = columns[block.first_column : block.first_column + block.column_count]
        product_into(products, rows, columns.T, accumulate=False)
        return products
    size = problem.tiles.size
    row_tiles, column_tiles = block.row_count // size, block.column_count // size
    kernels.active_scores_kernel[(row_tiles * column_tiles,)](
        rows,
        active.flags,
        products,
        problem.rows.count,
        rows.shape[1],
        block.first_row,
        block.first_column,
        row_tiles,
        block.column_count,
        SIZE=size,
        DEPTH=problem.tiles.depth,
        **problem.arithmetic,
        **_PRODUCT_OPTIONS,
        **OPTIONS,
    )
    return products


def _forward(problem: _Problem, reduction: int, loss_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and statistics of rows and columns."""
    rows, columns, size, triangle = problem.rows, problem.columns, problem.tiles.size, problem.triangle
    both = not triangle and problem.loss == kernels.INFO_NCE.value and problem.columns_have_losses
    height, width = problem.block_shape
    row_slots, column_slots = width // size, height // size
    first_column_slot = 0
    if triangle and not problem.fused:  # tiles of rows and of columns have slots of their own
        first_column_slot = row_slots
        row_slots = column_slots = row_slots + column_slots
    kinds = 5 if problem.loss == kernels.CONR.value else 4
    row_sums = problem.new(kinds, row_slots, rows.count)
    column_sums = problem.new(kinds, column_slots, columns.count) if both else row_sums[:, first_column_slot:]
    if not problem.fused:
        for sums in (row_sums, column_sums) if both else (row_sums,):
            sums.zero_()
            sums[0].fill_(-torch.inf)

    active = _active_tiles(problem)
    memory = _block_memory(problem)
    common = problem.common()
    for block in problem.blocks():
        products = None if memory is None else _multiply(problem, block, memory, active)
        row_tiles, column_tiles = block.row_count // size, block.column_count // size
        own = triangle and block.first_row == block.first_column
        folded = own and problem.fused
        programs = row_tiles * (row_tiles + 1) // 2 if folded else row_tiles * column_tiles
        kernels.sums_kernel[(programs,)](
            **common,
            block_ptr=products,
            active_ptr=None if active is None else active.flags,
            row_sums_ptr=row_sums,
            column_sums_ptr=column_sums,
            first_row=block.first_row,
            first_column=block.first_column,
            row_tiles=row_tiles,
            block_stride=block.column_count,
            row_slots=row_slots,
            column_slots=column_slots,
            TRIANGLE=folded,
            WITH_COLUMNS=folded or (triangle and not own) or both,
        )
    return _finish(problem, reduction, loss_dtype, row_sums, column_sums if both else None)


def _finish(
    problem: _Problem, reduction: int, loss_dtype: torch.dtype, row_sums: Tensor, column_sums: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = problem.rows, problem.columns
    # One program finishes the loss of few rows in the same launch.
    programs = 1 if problem.fused else triton.cdiv(rows.count, _FINISH_BLOCKS["BLOCK_R"])
    row_statistics = problem.new(3, rows.count)
    column_statistics = problem.new(3, 0 if column_sums is None else columns.count)
    loss = problem.new(*([rows.count] if reduction == 0 else []), dtype=loss_dtype)
    partial = None if reduction == 0 or programs == 1 else problem.new(2, programs, dtype=torch.float64)
    n_total = columns.count if problem.loss == kernels.CONR.value else rows.count
    kernels.finish_kernel[(programs,)](
        row_sums,
        column_sums,
        rows.weights,
        problem.order,
        row_statistics,
        column_statistics,
        loss,
        partial,
        rows.count,
        row_sums.shape[1],
        0 if column_sums is None else column_sums.shape[1],
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
            total = total / (count.clamp(min=1) if problem.loss == kernels.SUPCON.value else n_total)
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
    scale = _block_scale(problem, row_losses, column_losses) if problem.dtype == torch.float16 else None
    active = _active_tiles(problem)
    memory = _block_memory(problem)
    height, width = problem.block_shape
    h_memory = memory
    if memory is None or memory.dtype != problem.dtype:
        h_memory = problem.new(height * width, dtype=problem.dtype)
    depth = rows.operand.values.shape[1]
    sums = [
        problem.new(count, depth) if needed else None
        for count, needed in zip(problem.padded, (needs_rows, needs_columns), strict=True)
    ]
    begun: set[tuple[int, int]] = set()

    def add(side: int, first: int, h: Tensor, other: _Operand, other_first: int) -> None:
        """Adds h times other's rows from other_first on to the sums of a side from first on."""
        accumulate = (side, first) in begun
        begun.add((side, first))
        if active is not None:
            _multiply_active(problem, active, sums[side], first, h, other_first, accumulate)
            return
        out, factor = sums[side][first : first + h.shape[0]], other.values[other_first : other_first + h.shape[1]]
        product_into(out, h, factor, accumulate=accumulate)

    common = problem.common()
    for block in problem.blocks():
        products = None if memory is None else _multiply(problem, block, memory, active)
        row_tiles, column_tiles = block.row_count // size, block.column_count // size
        own = triangle and block.first_row == block.first_column
        folded = own and problem.fused
        h = h_memory[: block.row_count * block.column_count].view(block.row_count, block.column_count)
        kernels.gradient_kernel[(row_tiles * (row_tiles + 1) // 2 if folded else row_tiles * column_tiles,)](
            **common,
            block_ptr=products,
            active_ptr=None if active is None else active.flags,
            row_statistics_ptr=row_losses.statistics,
            column_statistics_ptr=None if column_losses is None else column_losses.statistics,
            row_upstream_ptr=row_losses.upstream,
            column_upstream_ptr=None if column_losses is None else column_losses.upstream,
            scale_ptr=scale,
            target_ptr=h,
            first_row=block.first_row,
            first_column=block.first_column,
            row_tiles=row_tiles,
            block_stride=block.column_count,
            row_statistics_step=row_losses.statistics.stride(0),
            column_statistics_step=0 if column_losses is None else column_losses.statistics.stride(0),
            TRIANGLE=folded,
        )
        if needs_rows:
            add(0, block.first_row, h, columns.operand, block.first_column)
        if triangle and not own:
            add(0, block.first_column, h.T, rows.operand, block.first_row)
        if needs_columns:
            add(1, block.first_column, h.T, rows.operand, block.first_row)

    by_row, by_column = (
        None if total is None else _finish_gradient(problem, side, total, scale, dtype or problem.dtype)
        for side, total in zip((rows, columns), sums, strict=True)
    )
    return by_row, by_column


def _block_scale(problem: _Problem, *losses: _Losses | None) -> Tensor:
    """The power of two, [], that makes the largest possible element of H in float16 2^13 to 2^14.

    |H_ij| is at most |u_i| (alpha_i + beta_i) + |u_j| (alpha_j + beta_j), over the temperature.
    """

    def largest(side: _Losses) -> Tensor:
        factors = side.statistics[1:]
        return (factors * side.upstream).masked_fill(factors == 0, 0).abs().sum(0).amax()

    bound = sum(largest(side) for side in losses if side is not None)
    return torch.exp2((2.0**14 * problem.temperature / bound).log2().floor().clamp(-100.0, 100.0))


def _multiply_active(
    problem: _Problem, active: _Active, out: Tensor, first: int, h: Tensor, other_first: int, accumulate: bool
) -> None:
    size, depth = problem.tiles.size, out.shape[1]
    row_tiles = h.shape[0] // size
    transposed = h.stride(1) != 1
    width = min(triton.next_power_of_2(depth), size, _PRODUCT_WIDTH // out.element_size())
    kernels.active_product_kernel[(row_tiles * triton.cdiv(depth, width),)](
        h,
        problem.rows.operand.values,
        out,
        active.list,
        active.length,
        problem.rows.count,
        depth,
        first,
        other_first,
        row_tiles,
        active.list.shape[2],
        h.stride(1) if transposed else h.stride(0),
        TRANSPOSED=transposed,
        ADDED=accumulate,
        SIZE=size,
        DEPTH=problem.tiles.depth,
        WIDTH=width,
        **problem.arithmetic,
        **_PRODUCT_OPTIONS,
        **OPTIONS,
    )


def _finish_gradient(problem: _Problem, side: _Side, total: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    values, norms = side.operand
    out = values.new_empty((side.count, problem.n_features), dtype=dtype)
    kernels.finish_gradient_kernel[(triton.cdiv(side.count, _ELEMENT_BLOCKS["BLOCK_R"]),)](
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
        **_ELEMENT_OPTIONS,
    )
    return out


# ---- the operators ----


def _loss_of_nothing(features: Tensor, reduction: int, loss_dtype: torch.dtype) -> Tensor:
    return features.new_zeros((0,) if reduction == 0 else (), dtype=loss_dtype)


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
    no_gradient = features.new_empty((0, features.shape[1]) if with_gradient else (0,), dtype=total)
    if row_count == 0:
        return _loss_of_nothing(features, reduction, loss_dtype), features.new_empty((3, 0), dtype=total), no_gradient
    with torch.cuda.device_of(features):
        problem = build()
        loss, statistics, _ = _forward(problem, reduction, loss_dtype)
        if not with_gradient:
            return loss, statistics, no_gradient
        upstream = torch.ones_like(statistics[0])
        if reduction == 1:
            upstream /= statistics[1].sum().clamp(min=1) if problem.loss == kernels.SUPCON.value else row_count
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
    """Loss, statistics ``[3, row_count]`` (lse in units of log 2, alpha, beta) and, where wanted, its gradient
    ``[N, D]``, else ``[0]``.

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


def _own_gradient(problem: _Problem, statistics: Tensor, grad_rows: Tensor, first_row: int, row_count: int) -> Tensor:
    own = slice(first_row, first_row + row_count)
    grad_rows = grad_rows.contiguous()
    gradient, _ = _gradients(problem, _Losses(statistics[:, own], grad_rows[own]), _Losses(statistics, grad_rows))
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
    with_gradient: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Loss, statistics ``[3, N]`` of queries and ``[3, M]`` of keys, ``[3, 0]`` for a direction not asked for, and in
    the place of gradients ``[0]`` twice: the forward pass is not asked for them.

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
        loss, statistics, _, *gradients = info_nce(
            *(key, query, None, key_ids, query_ids, temperature, normalize, True, False, -offset),
            *(reduction, loss_dtype, with_gradient),
        )
        return loss, empty, statistics, *gradients
    gradients = [empty.new_empty(0) for _ in with_gradient]
    if query.shape[0] == 0:
        of_keys = empty.new_zeros((3, key.shape[0] if by_key else 0))
        return _loss_of_nothing(query, reduction, loss_dtype), empty, of_keys, *gradients
    with torch.cuda.device_of(query):
        problem = _info_nce_problem(query, key, log_q, query_ids, key_ids, temperature, normalize, offset, by_key)
        return *_forward(problem, reduction, loss_dtype), *gradients


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
        return torch.zeros_like(query) if needs_grad[0] else none, torch.zeros_like(key) if needs_grad[1] else none
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

_EVERY = (80, 90, 100, 120)
_LOSSES = {"ConR": kernels.CONR.value, "SupCon": kernels.SUPCON.value, "InfoNCE": kernels.INFO_NCE.value}
_OF_CONR = ("row_preds", "column_preds", "row_weights", "column_weights", "active")


def _dtypes(kind: str) -> tuple[str, str]:
    """Of operands and of sums."""
    dtype = "fp32" if kind in ("ieee", "tf32") else kind
    return dtype, "fp64" if kind == "fp64" else "fp32"


def _types(**pointers: str) -> dict[str, str]:
    return (
        {f"{name}_ptr": f"*{of}:16" for name, of in pointers.items()}
        | dict.fromkeys(kernels.COUNTS, "i32")
        | dict.fromkeys(
            ("depth", "block_stride", "n_features", "padded_rows", "padded_columns", "norms_step"), "i32:16"
        )
        | dict.fromkeys(("score_scale", "push_scale", "window"), "fp64")
    )


def _arithmetic_of(kind: str) -> dict[str, Any]:
    return {"PRECISION": "tf32" if kind == "tf32" else "ieee", "TOTAL": tl.float64 if kind == "fp64" else tl.float32}


def _variant(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]) -> Any:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return kernel, types, constants, options, _EVERY


def _pair_variant(kernel: Any, tiles: Tiles, kind: str, loss: str, *, labels: str = "fp32", **changes: Any) -> Any:
    """A kernel that takes tiles of pairs; in the form of ``loss`` that does most, but for ``changes`` of constants."""
    conr, fused = loss == "ConR", tiles.piece == 0
    dtype, total = _dtypes(kind)
    sides = {name: labels if conr else "i64" for name in ("row_labels", "column_labels", "row_preds", "column_preds")}
    sums = (
        "block", "row_scales", "column_scales", "row_weights", "column_weights", "log_q", "row_sums", "column_sums",
        "row_statistics", "column_statistics", "row_upstream", "column_upstream", "scale",
    )  # fmt: skip
    operands = dict.fromkeys(("row_operand", "column_operand", "target"), dtype)
    types = _types(**operands, **sides, **dict.fromkeys(sums, total), active="i8")
    constants = {
        "LOSS": _LOSSES[loss],
        "NORM": 2,
        "PUSH": (kernels.PUSH_EXPONENT if conr else kernels.NO_PUSH).value,
        "SHIFT": (kernels.BY_TILE if conr else kernels.CONSTANT).value,
        "ONE_LABEL": True,
        "WITH_FACTORS": conr,
        "TRIANGLE": fused and loss != "InfoNCE",
        "WITH_COLUMNS": True,
        "SIZE": tiles.size,
        "PIECE": tiles.piece,
        "DEPTH": tiles.depth,
        **_arithmetic_of(kind),
    }
    absent = () if conr else _OF_CONR
    absent += () if changes.get("log_q_ptr") else ("log_q",)
    absent += () if dtype == "fp16" else ("scale",)
    absent += ("block", "active") if fused else ("row_operand", "column_operand")
    constants |= dict.fromkeys((f"{name}_ptr" for name in absent), None)
    constants |= {name: value for name, value in changes.items() if name != "log_q_ptr"}
    wide_labels = labels == "fp64" or not constants["ONE_LABEL"]
    return _variant(kernel, types, constants, tiles.options(wide_labels=wide_labels))


def _pair_variants() -> dict[str, Any]:
    sums, gradient = kernels.sums_kernel, kernels.gradient_kernel
    largest = {"SHIFT": kernels.MAXIMUM.value}
    forms: dict[str, dict[str, Any]] = {
        "": {},
        " at low temperature, labels [N, K]": {"ONE_LABEL": False, **largest},
        " of nyud2, labels fp64": {"PUSH": kernels.PUSH_FACTOR.value, "labels": "fp64"},
        " with log_q": {"log_q_ptr": True, **largest},
    }
    conr = [("ConR", form) for form in list(forms)[:3]]
    others = [("SupCon", ""), ("InfoNCE", ""), ("InfoNCE", " with log_q")]
    wanted = [
        # Products in registers: of every arithmetic, in every form.
        *((kernel, _FUSED_TILES, "bf16", *of) for kernel in (sums, gradient) for of in conr + others),
        *((kernel, _FUSED_TILES, kind, "ConR", "") for kernel in (sums, gradient) for kind in ("tf32", "ieee", "fp64")),
        *((kernel, _FUSED_TILES, "ieee", of, "") for kernel in (sums, gradient) for of in ("SupCon", "InfoNCE")),
        (gradient, _FUSED_TILES, "fp16", "ConR", ""),
        # Products in memory: the operands' dtype is nothing to sums.
        *((kernel, _BLOCK_TILES, "bf16", *of) for kernel in (sums, gradient) for of in conr + others),
        *((kernel, _BLOCK_TILES, "fp64", "ConR", "") for kernel in (sums, gradient)),
        *((gradient, _BLOCK_TILES, kind, "ConR", "") for kind in ("fp16", "ieee")),
    ]
    found = {}
    for kernel, of_kind, kind, loss, form in wanted:
        tiles = of_kind.get(kind, of_kind["16 bits"])
        place = "fused" if tiles.piece == 0 else "block"
        name = f"contrastive {kernel.fn.__name__.removesuffix('_kernel')} {place} {loss} {kind}{form}"
        found[name] = _pair_variant(kernel, tiles, kind, loss, **forms[form])
    return found


def _other_variants() -> dict[str, Any]:
    found = {}
    for kind in ("bf16", "tf32", "ieee", "fp64"):
        dtype, total = _dtypes(kind)
        tiles = _BLOCK_TILES["16 bits" if kind == "bf16" else kind]
        width = min(_PRODUCT_WIDTH // (8 if kind == "fp64" else 4), tiles.size)
        constants = {"SIZE": tiles.size, "DEPTH": tiles.depth, "WIDTH": width, **_arithmetic_of(kind)}
        options = _PRODUCT_OPTIONS | OPTIONS
        types = _types(operand=dtype, active="i8", block=total)
        found[f"contrastive active_scores {kind}"] = _variant(kernels.active_scores_kernel, types, constants, options)
        types = _types(list="i32", length="i32", operand=dtype, block=dtype, out=total)
        for transposed in (False, True) if kind == "bf16" else (True,):
            found[f"contrastive active_product {kind}{' transposed' if transposed else ''}"] = _variant(
                kernels.active_product_kernel, types, constants | {"TRANSPOSED": transposed, "ADDED": True}, options
            )
    for kind, is_sorted in (("bf16", False), ("fp32", True), ("fp64", False)):
        dtype, total = _dtypes(kind)
        operands = ("row_features", "column_features", "row_operand", "column_operand", "operand", "out")
        sums = ("row_norms", "column_norms", "norms", "product", "scale")
        types = _types(**dict.fromkeys(operands, dtype), **dict.fromkeys(sums, total), order="i64")
        constants = {"NORMALIZE": True, "SORTED": is_sorted, "WITH_COLUMNS": not is_sorted}
        constants |= _ELEMENT_BLOCKS | _arithmetic_of(kind)
        for kernel in (kernels.prepare_kernel, kernels.finish_gradient_kernel):
            name = f"contrastive {kernel.fn.__name__.removesuffix('_kernel')} {kind}"
            found[name] = _variant(kernel, types, constants, _ELEMENT_OPTIONS)
    for total, loss, reduction in (("fp32", "ConR", 0), ("fp32", "SupCon", 1), ("fp64", "InfoNCE", 2)):
        sums = ("row_sums", "column_sums", "weights", "row_statistics", "column_statistics", "loss")
        types = _types(**dict.fromkeys(sums, total), order="i64", partial="fp64")
        constants = {"LOSS": _LOSSES[loss], "VARIANT": 1, "REDUCTION": reduction, **_FINISH_BLOCKS}
        found[f"contrastive finish {loss} {total}"] = _variant(kernels.finish_kernel, types, constants, OPTIONS)
    for labels in ("fp32", "fp64"):
        types = _types(labels=labels, preds=labels, active="i8", list="i32", length="i32")
        constants = {"NORM": 2, "SIZE": _BLOCK_TILES["16 bits"].size, "CHUNK": _ACTIVE_CHUNK}
        found[f"contrastive active_tiles {labels}"] = _variant(kernels.active_tiles_kernel, types, constants, OPTIONS)
    return found


AHEAD_OF_TIME = _pair_variants() | _other_variants()

"""Points as the kernels of _point_kernels.py take them, and which tiles these work on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pyreg.triton_kernels import _point_kernels as kernels
from pyreg.triton_kernels import _shared as shared


class Tiles(NamedTuple):
    """How programs work; fixed by dtype and shape, for the sums depend on it."""

    rows: int
    columns: int
    depth: int  # coordinates of a step of a product
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        # Without a limit of ours, ptxas spills to have room for one program more.
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": 255, **shared.OPTIONS}


# Few coordinates are subtracted, which keeps the digits of points that nearly meet; so are those of distances, whose
# root a product's error would be taken of, and of float64. Others are multiplied by matrix instructions.
_MOST_DIRECT = 8

# Up to so many coordinates a row's stay in a program; of more, they come in steps of _STEP.
_MOST_WHOLE = {"tf32": 64, "tf32x3": 32}
_STEP = 32

# As large as registers allow: beside its sums, a thread of direct tiles holds the coordinates and potentials of its
# rows, and one of products both parts of float32's digits. Those of the plan are of 64 rows, of which there are matrix
# instructions on every GPU, and hold no coordinates beside a third product.
_DIRECT_TILES = {torch.float32: Tiles(32, 64, 0, warps=8, stages=1), torch.float64: Tiles(32, 32, 0, warps=4, stages=1)}
_DIRECT_PLAN_TILES = {torch.float32: Tiles(64, 32, 0, warps=8, stages=1), torch.float64: _DIRECT_TILES[torch.float64]}
_PRODUCT_TILES = Tiles(64, 32, _STEP, warps=4, stages=2)
_PRODUCT_PLAN_TILES = Tiles(64, 32, 16, warps=8, stages=2)
_EMULATED_TILES = (16, 16)  # rows and columns, small: a small test has several

# Programs that fill a GPU. Of few tiles of rows, columns are split; their sums are partial, and added in a fixed order.
_PROGRAMS, _EMULATED_PROGRAMS = 512, 6
_MOST_SPLITS = 16


def product_precision() -> str:
    """Float32's digits from three products of TF32, or one where torch may use it."""
    return "tf32" if shared.product_precision(torch.float32) == "tf32" else "tf32x3"


def _is_direct(dtype: torch.dtype, point_cost: int, features: int) -> bool:
    return dtype == torch.float64 or features <= _MOST_DIRECT or point_cost == kernels.EUCLIDEAN.value


def _width(features: int) -> int:
    """Of points that are multiplied, padded."""
    whole = max(triton.next_power_of_2(features), 16)
    return whole if whole <= _MOST_WHOLE["tf32"] else int(triton.cdiv(features, _STEP)) * _STEP


def _tiles(dtype: torch.dtype, is_direct: bool, width: int, precision: str, *, is_plan: bool) -> Tiles:
    if is_direct:
        return (_DIRECT_PLAN_TILES if is_plan else _DIRECT_TILES)[dtype]
    if is_plan:
        return _PRODUCT_PLAN_TILES
    return _PRODUCT_TILES._replace(depth=width) if width <= _MOST_WHOLE[precision] else _PRODUCT_TILES


def _constants(
    dtype: torch.dtype, point_cost: int, is_direct: bool, features: int, width: int, tiles: Tiles
) -> dict[str, Any]:
    is_double = dtype == torch.float64
    return {
        "COST": point_cost,
        "DIRECT": is_direct,
        "FEATURES": features if is_direct and features <= _MOST_DIRECT else 0,
        "DEPTH": tiles.depth,
        "WHOLE": not is_direct and tiles.depth == width,
        "TOTAL": tl.float64 if is_double else tl.float32,
        "PRECISION": "ieee" if is_double else product_precision(),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
    }


class Side(NamedTuple):
    values: Tensor  # [B, n, width], contiguous
    halves: Tensor | None  # [B, n] float64
    counts: Tensor | None = None  # [B] int32: beyond is padding


class Points(NamedTuple):
    """x and y: rows and columns, or with exchanged roles."""

    rows: Side
    columns: Side
    point_cost: int
    features: int
    is_direct: bool

    @property
    def exchanged(self) -> Points:
        return self._replace(rows=self.columns, columns=self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, n, m."""
        return self.rows.values.shape[0], self.rows.values.shape[1], self.columns.values.shape[1]

    @property
    def width(self) -> int:
        return self.rows.values.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.values.dtype

    def tiles(self, *, is_plan: bool = False) -> Tiles:
        tiles = _tiles(self.dtype, self.is_direct, self.width, product_precision(), is_plan=is_plan)
        if not self.rows.values.is_cuda:
            rows, columns = _EMULATED_TILES
            tiles = tiles._replace(rows=rows, columns=columns, warps=1, stages=1)
        return tiles

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        """Of the kernels that take tiles of pairs, and the options of their launch."""
        of_points = _constants(self.dtype, self.point_cost, self.is_direct, self.features, self.width, tiles)
        return of_points | tiles.options()

    def splits(self, tiles: Tiles, others: int = 1) -> tuple[int, int]:
        """Into how many parts the columns are split, and of how many tiles; beside other programs of each."""
        batch, n, m = self.shape
        programs = _PROGRAMS if self.rows.values.is_cuda else _EMULATED_PROGRAMS
        column_tiles = triton.cdiv(m, tiles.columns)
        wanted = programs // (batch * triton.cdiv(n, tiles.rows) * others)
        each = triton.cdiv(column_tiles, min(max(wanted, 1), _MOST_SPLITS, column_tiles))
        return triton.cdiv(column_tiles, each), each


def prepare(x: Tensor, y: Tensor, point_cost: int, rows: Tensor, columns: Tensor) -> Points:
    """From ``x [B, n, d]`` and ``y [B, m, d]``; n, m and d are not 0. What follows on the last of a problem's rows
    ``[B, n]`` and columns ``[B, m]`` that are there is padding; a single problem has none."""
    features, counts = x.shape[2], (_counts(rows), _counts(columns))
    if _is_direct(x.dtype, point_cost, features):
        sides = (Side(points.contiguous(), None, count) for points, count in zip((x, y), counts, strict=True))
        return Points(*sides, point_cost, features, True)
    width = _width(features)

    def side(points: Tensor, count: Tensor | None) -> Side:
        values = F.pad(points, (0, width - features)).contiguous()
        if point_cost == kernels.COSINE.value:
            return Side(values, values.new_full(values.shape[:2], 0.5, dtype=torch.float64), count)
        return Side(values, torch.linalg.vector_norm(values, dim=2, dtype=torch.float64).square_(), count)

    if point_cost != kernels.COSINE.value:
        x, y = around_centre(x, y, rows)
    return Points(side(x, counts[0]), side(y, counts[1]), point_cost, features, False)


def _counts(is_there: Tensor) -> Tensor | None:
    if len(is_there) == 1:
        return None
    places = torch.arange(1, is_there.shape[1] + 1, dtype=torch.int32, device=is_there.device)
    return torch.where(is_there, places, 0).amax(1)


def around_centre(x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The points around the mean of x, of the rows that are there, whose digits products would lose."""
    if len(x) == 1:
        centre = x.mean(1, keepdim=True, dtype=torch.float64)
    else:
        total = x.masked_fill(~rows.unsqueeze(2), 0).sum(1, keepdim=True, dtype=torch.float64)
        centre = total / rows.sum(1).clamp(min=1).view(-1, 1, 1)
    return x - centre.to(x.dtype), y - centre.to(x.dtype)


# ---- what tools/triton_report.py compiles ----

EVERY = (80, 90, 100, 120)
_COSTS = {
    "sqeuclidean": kernels.SQEUCLIDEAN.value,
    "euclidean": kernels.EUCLIDEAN.value,
    "cosine": kernels.COSINE.value,
}
_FLOAT, _DOUBLE = torch.float32, torch.float64

# Name, dtype, cost, coordinates.
NAMED_POINTS = [
    ("sqeuclidean 3", _FLOAT, "sqeuclidean", 3),
    ("sqeuclidean 64 tf32x3", _FLOAT, "sqeuclidean", 64),
    ("sqeuclidean 64 tf32", _FLOAT, "sqeuclidean", 64),
    ("sqeuclidean 128 tf32x3", _FLOAT, "sqeuclidean", 128),
    ("sqeuclidean 512 tf32x3", _FLOAT, "sqeuclidean", 512),
    ("euclidean 2", _FLOAT, "euclidean", 2),
    ("euclidean 64", _FLOAT, "euclidean", 64),
    ("euclidean 64 fp64", _DOUBLE, "euclidean", 64),
    ("cosine 64 tf32x3", _FLOAT, "cosine", 64),
    ("cosine 3 fp64", _DOUBLE, "cosine", 3),
]


def ahead_of_time(
    name: str, dtype: torch.dtype, cost: str, features: int, *, is_plan: bool
) -> tuple[dict[str, str], dict[str, Any], Any]:
    """Types, constants and options of the kernels that take tiles of pairs of such points."""
    point_cost = _COSTS[cost]
    is_direct = _is_direct(dtype, point_cost, features)
    width = features if is_direct else _width(features)
    precision = "tf32" if name.endswith("tf32") else "tf32x3"
    tiles = _tiles(dtype, is_direct, width, precision, is_plan=is_plan)
    constants = _constants(dtype, point_cost, is_direct, features, width, tiles)
    constants["PRECISION"] = "ieee" if dtype == torch.float64 else precision
    number = "fp64" if dtype == torch.float64 else "fp32"
    types = dict.fromkeys(("row_points_ptr", "column_points_ptr"), f"*{number}:16")
    types |= dict.fromkeys(("row_potentials_ptr", "column_potentials_ptr", "epsilons_ptr"), "*fp64:16")
    types |= dict.fromkeys(("row_halves_ptr", "column_halves_ptr"), "*fp64:16") | {"flags_ptr": "*i32:16"}
    types |= dict.fromkeys(kernels.COUNTS, "i32") | {"n_features": "i32" if width % 16 else "i32:16"}
    if is_direct:
        constants |= dict.fromkeys(("row_halves_ptr", "column_halves_ptr"))
    counts = ("row_counts_ptr", "column_counts_ptr")
    if name == "sqeuclidean 64 tf32x3":
        types |= dict.fromkeys(counts, "*i32:16")
    else:
        constants |= dict.fromkeys(counts)
    return types, constants, tiles.options()

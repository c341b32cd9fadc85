"""Random tensors, as recipes whose ``repr`` is code that makes them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import FLOAT_DTYPES

# Around what kernels take at a time: vectors of 2 to 16 elements, tiles of 16 to 128 rows.
SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 61, 64, 67, 127, 129)
SOME_SIZES = SIZES[1:]

LAYOUTS = ("contiguous", "reversed", "expanded", "sliced", "shifted", "inner")

# What elements are; "inf", "-inf" and "nan" are among normal numbers.
FINITE = ("normal", "integers", "equal", "zeros", "large", "tiny", "subnormal", "wide")
VALUES = (*FINITE, "huge", "inf", "-inf", "all -inf", "nan")


@dataclass(frozen=True)
class Recipe:
    """A floating tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    def build(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = list(self.shape)
        if self.layout == "expanded" and shape:
            shape[self.seed % len(shape)] = min(shape[self.seed % len(shape)], 1)
        return laid_out(_values(shape, self.dtype, self.values, generator), self.shape, self.layout)

    def of(self, **changes: object) -> Recipe:
        return replace(self, **changes)  # type: ignore[arg-type]


def _values(shape: Sequence[int], dtype: torch.dtype, kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chosen = torch.rand(shape, generator=generator) < 0.2
    info = torch.finfo(dtype)
    if kind == "integers":
        x = (3 * x).round()
    elif kind == "equal":
        x = torch.full_like(x, 0.7)
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "large":
        x = 30 * x
    elif kind == "tiny":
        x = x * math.sqrt(info.tiny)
    elif kind == "subnormal":
        x = x * info.tiny / 8
    elif kind == "wide":
        x = x * 10.0 ** torch.randint(-4, 5, x.shape, generator=generator)
    elif kind == "huge":
        # Not of float64, in which the reference is computed.
        x = x.clamp(-1, 1) * (info.max / 2 if dtype != torch.float64 else 1e150)
    elif kind in ("inf", "-inf", "nan"):
        x = x.masked_fill(chosen, float(kind))
    elif kind == "all -inf":
        x = torch.full_like(x, -math.inf)
    return x.to(dtype)


def laid_out(x: Tensor, shape: Sequence[int], layout: str) -> Tensor:
    """The same values in other places of memory."""
    if layout == "expanded":
        return x.expand(tuple(shape))
    if layout == "reversed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced" and x.dim() > 0:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
        wide[..., 1 : 2 * x.shape[-1] : 2] = x
        return wide[..., 1 : 2 * x.shape[-1] : 2]
    if layout == "shifted":  # its address is no multiple of a vector's size
        longer = x.new_full((x.numel() + 1,), math.nan)
        longer[1:] = x.flatten()
        return longer[1:].view(x.shape)
    if layout == "inner" and x.dim() > 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(FLOAT_DTYPES)


def recipes(
    shapes: st.SearchStrategy[tuple[int, ...]],
    dtype: st.SearchStrategy[torch.dtype] | None = None,
    values: Sequence[str] = VALUES,
    layouts: Sequence[str] = LAYOUTS,
) -> st.SearchStrategy[Recipe]:
    return st.builds(Recipe, shapes, dtype or dtypes(), st.sampled_from(values), st.sampled_from(layouts), seeds())


def shapes(
    least: int, most: int, sizes: Sequence[int] = SIZES, most_elements: int = 1 << 13
) -> st.SearchStrategy[tuple[int, ...]]:
    """Of ``least`` to ``most`` dimensions."""
    return (
        st.lists(st.sampled_from(sizes), min_size=least, max_size=most)
        .map(tuple)
        .filter(lambda shape: math.prod(shape) <= most_elements)
    )


def labels(count: int | Sequence[int], classes: int, seed: int, ignored: int | None = None) -> Tensor:
    """Class indices, a quarter of them ``ignored`` where that is given."""
    shape = (count,) if isinstance(count, int) else tuple(count)
    generator = torch.Generator().manual_seed(seed)
    result = torch.randint(max(classes, 1), shape, generator=generator)
    if ignored is not None:
        result = result.masked_fill(torch.rand(shape, generator=generator) < 0.25, ignored)
    return result


def weights(shape: Sequence[int], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """At least 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.1
    if kind == "zeros among":
        x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, 0)
    elif kind == "wide":
        x = x * 10.0 ** torch.randint(-4, 5, x.shape, generator=generator)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    return x.to(dtype)

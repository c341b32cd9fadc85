"""StableMax, its logarithm and its cross-entropies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pyreg import functional as F
from pyreg.reference import linear_stablemax as linear_reference
from pyreg.reference import stablemax as reference
from tests.fuzz.agreement import assert_agrees
from tests.fuzz.tensors import SOME_SIZES, VALUES, Recipe, dtypes, labels, recipes, seeds, shapes, weights

# A logit of +inf leaves all of its row without a number, as under softmax; only its own in the reference.
LOGITS = tuple(kind for kind in VALUES if kind != "inf")
REDUCTIONS = ("mean", "sum", "none")
WEIGHTS = (None, "random", "zeros among", "wide", "zeros")
IGNORED = (-100, 0, 1, -(2**62))


@given(
    input=recipes(shapes(0, 4), values=LOGITS),
    dim=st.integers(-4, 3),
    dtype=st.none() | dtypes(),
    name=st.sampled_from(["stablemax", "log_stablemax"]),
    trained=st.booleans(),
    seed=seeds(),
)
def test_rows(input: Recipe, dim: int, dtype: torch.dtype | None, name: str, trained: bool, seed: int) -> None:
    rank = max(len(input.shape), 1)
    assume(-rank <= dim < rank)
    x = input.build()
    finest = dtype if dtype is not None and dtype.itemsize < x.dtype.itemsize else x.dtype

    def ours(x: Tensor) -> Tensor:
        result: Tensor = getattr(F, name)(x, dim, dtype)
        assert result.dtype == (dtype or x.dtype)
        return result

    def definition(x: Tensor) -> Tensor:
        cast = x.to(finest).to(x.dtype) if finest != x.dtype else x
        result: Tensor = getattr(reference, name)(cast, dim)
        return result

    def plain(x: Tensor) -> Tensor:
        result: Tensor = getattr(reference, name)(x, dim, dtype)
        return result

    # Gradients are products with differences of upstream ones, which are up to 2.
    options = {"plain": plain, "compute": finest, "scale": 2.0}
    assert_agrees(ours, definition, [x], [trained], seed=seed, **options)


@dataclass(frozen=True)
class CrossEntropy:
    """Options and constants of a loss over ``[N, C, ...]`` or ``[C]``."""

    target: str  # "labels" or "probabilities"
    weight: str | None
    ignore_index: int
    reduction: str
    smoothing: float
    seed: int

    def target_for(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        classes = shape[min(len(shape) - 1, 1)]
        if self.target == "probabilities":
            generator = torch.Generator().manual_seed(self.seed)
            dim = min(len(shape) - 1, 1)
            return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(dim).to(dtype)
        rows = (shape[0], *shape[2:]) if len(shape) > 1 else ()
        return labels(rows, classes, self.seed, self.ignore_index)

    def constants(self, classes: int, dtype: torch.dtype) -> dict[str, Any]:
        weight = None if self.weight is None else weights((classes,), dtype, self.weight, self.seed)
        ignore_index = -100 if self.target == "probabilities" else self.ignore_index
        return {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.smoothing,
        }


def cross_entropies(targets: tuple[str, ...]) -> st.SearchStrategy[CrossEntropy]:
    return st.builds(
        CrossEntropy,
        st.sampled_from(targets),
        st.sampled_from(WEIGHTS),
        st.sampled_from(IGNORED),
        st.sampled_from(REDUCTIONS),
        st.sampled_from([0.0, 0.1, 1.0]),
        seeds(),
    )


def _definition(x: Tensor, target: Tensor, **constants: Any) -> Tensor:
    """In float64, whatever an ignored row holds, it adds nothing."""
    if constants["weight"] is not None:
        constants["weight"] = constants["weight"].to(x.dtype)
    if not target.is_floating_point():
        ignored = target == constants["ignore_index"]
        x = x.masked_fill(ignored.unsqueeze(min(x.dim() - 1, 1)) if x.dim() > 1 else ignored, 0)
    return reference.stablemax_cross_entropy(x, target, **constants)


def _scale(constants: dict[str, Any], shape: tuple[int, ...]) -> float:
    """Logarithms near 0 are differences of numbers near 1; they are multiplied by weights."""
    weight = constants["weight"]
    rows = math.prod(shape) / max(shape[min(len(shape) - 1, 1)], 1) if constants["reduction"] != "mean" else 1
    return max(rows, 1.0) * (1.0 if weight is None else max(float(weight.max()), 1e-3))


@given(
    input=recipes(shapes(1, 4), values=LOGITS),
    loss=cross_entropies(("labels", "probabilities")),
    in_place=st.booleans(),
    trained=st.booleans(),
    trained_target=st.booleans(),
    seed=seeds(),
)
def test_cross_entropy(
    input: Recipe, loss: CrossEntropy, in_place: bool, trained: bool, trained_target: bool, seed: int
) -> None:
    shape = input.shape
    classes = shape[min(len(shape) - 1, 1)]
    assume(classes > 0)
    x = input.build()
    target, constants = loss.target_for(shape, x.dtype), loss.constants(classes, x.dtype)

    def ours(x: Tensor, target: Tensor) -> Tensor:
        if in_place and loss.target == "labels":
            return F.stablemax_cross_entropy_(x.clone(memory_format=torch.contiguous_format), target, **constants)
        return F.stablemax_cross_entropy(x, target, **constants)

    def definition(x: Tensor, target: Tensor) -> Tensor:
        return _definition(x, target, **constants)

    trained_target = trained_target and target.is_floating_point()
    scale = _scale(constants, x.shape)
    assert_agrees(ours, definition, [x, target], [trained, trained_target], seed=seed, nan_must_stay=False, scale=scale)


@given(
    input=recipes(shapes(1, 3, most_elements=1 << 11), values=("normal", "large", "equal", "wide", "tiny")),
    classes=st.sampled_from(SOME_SIZES),
    loss=cross_entropies(("labels", "probabilities")),
    bias=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    in_chunks=st.booleans(),
    seed=seeds(),
)
def test_linear_cross_entropy(
    input: Recipe,
    classes: int,
    loss: CrossEntropy,
    bias: bool,
    trained: tuple[bool, bool, bool],
    in_chunks: bool,
    seed: int,
) -> None:
    from pyreg.ops import linear_stablemax

    x = input.build()
    w = Recipe((classes, x.shape[-1]), x.dtype, "normal", "reversed", seed).build()
    b = Recipe((classes,), x.dtype, "normal", "sliced", seed + 1).build()
    rows = (*x.shape[:-1], classes)
    if loss.target == "labels":
        target = labels(x.shape[:-1], classes, seed, loss.ignore_index)
    else:
        target = Recipe(rows, x.dtype, "normal", "contiguous", seed).build().softmax(-1)
    constants = loss.constants(classes, x.dtype)

    def arguments(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return tensors[0], tensors[1], tensors[2] if bias else None

    def ours(*tensors: Tensor) -> Tensor:
        x, w, b = arguments(*tensors)
        return F.linear_stablemax_cross_entropy(x, w, target, linear_bias=b, **constants)

    def definition(*tensors: Tensor) -> Tensor:
        x, w, b = arguments(*tensors)
        x, y = (
            (x.flatten(0, -2), target.flatten(0, -2 if target.is_floating_point() else -1))
            if x.dim() > 2
            else (x, target)
        )
        of = {**constants, "weight": None if constants["weight"] is None else constants["weight"].to(x.dtype)}
        y = y.to(x.dtype) if y.is_floating_point() else y
        result = linear_reference.linear_stablemax_cross_entropy(x, w, y, b, **of)
        return result.reshape(tensors[0].shape[:-1]) if loss.reduction == "none" else result

    threshold = linear_stablemax._SMALL_LOGITS_BYTES
    linear_stablemax._SMALL_LOGITS_BYTES = -1 if in_chunks else threshold
    try:
        assert_agrees(
            *(ours, definition, [x, w, b], [*trained[:2], trained[2] and bias]),
            **{"seed": seed, "nan_must_stay": False, "scale": _scale(constants, rows)},
        )
    finally:
        linear_stablemax._SMALL_LOGITS_BYTES = threshold

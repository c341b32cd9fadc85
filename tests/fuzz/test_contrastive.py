"""ConR, SupCon and InfoNCE."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyreg import functional as F
from pyreg.reference import conr as conr_reference
from pyreg.reference import info_nce as info_nce_reference
from pyreg.reference import supcon as supcon_reference
from tests.fuzz.agreement import Function, assert_agrees
from tests.fuzz.tensors import Recipe, labels, recipes, seeds, shapes, weights

# Features of length 1 or so, of length 0, and from one end of the dtype to the other.
VALUES = ("normal", "integers", "equal", "zeros", "large", "wide", "tiny", "subnormal", "huge")
RAW = ("normal", "integers", "equal", "zeros")  # without normalisation scores are to be numbers
REDUCTIONS = ("mean", "sum", "none")
TEMPERATURES = (0.01, 0.07, 0.5, 1.0, 30.0)
_SHAPES = shapes(2, 3, sizes=(1, 2, 3, 5, 8, 16, 17, 33, 67, 129), most_elements=1 << 13)
_FEATURES = st.one_of(_SHAPES, _SHAPES.map(lambda shape: (0, *shape[1:])))


def _plain(definition: Function) -> Function:
    """As in tests/pairwise.py: 16-bit features are normalised in 16 bits."""

    def plain(*features: Tensor) -> Tensor:
        result: Tensor = definition(*features)
        return result

    return plain


def _check(
    ours: Function, definition: Function, features: list[Tensor], trained: list[bool], temperature: float, seed: int
) -> None:
    """Losses are differences of scores, which are up to 1 / temperature, and so are the gradients' terms, times the
    inverse of a row's length."""
    scale = 2.0 * math.sqrt(max(len(features[0]), 1)) / temperature
    assert_agrees(ours, definition, features, trained, seed=seed, scale=scale, floor=2)


@given(
    features=recipes(_FEATURES, values=VALUES),
    window=st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e30]),
    temperature=st.sampled_from(TEMPERATURES),
    eta=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    weight=st.sampled_from([None, "random", "zeros among", "wide", "zeros"]),
    variant=st.sampled_from(["paper", "agedb", "nyud2"]),
    label_norm=st.sampled_from([1, 2, math.inf]),
    values=st.sampled_from([1, 2, 3]),
    kinds=st.tuples(*[st.sampled_from(["integers", "normal", "equal", "wide"])] * 2),
    reduction=st.sampled_from(REDUCTIONS),
    trained=st.booleans(),
    seed=seeds(),
)
def test_conr(
    features: Recipe,
    window: float,
    temperature: float,
    eta: float,
    weight: str | None,
    variant: str,
    label_norm: float,
    values: int,
    kinds: tuple[str, str],
    reduction: str,
    trained: bool,
    seed: int,
) -> None:
    count, x = features.shape[0], features.build()
    # In eighths, whose differences are exact: none is nearer to the window than rounding.
    targets, preds = (
        Recipe((count, values), torch.float64, kind, "reversed", seed + k).build().mul(8).round().div(8)
        for k, kind in enumerate(kinds)
    )
    of = None if weight is None else weights((count,), torch.float64, weight, seed)
    options: dict[str, Any] = {
        "window": window,
        "temperature": temperature,
        "eta": eta,
        "weights": of,
        "variant": variant,
        "label_norm": label_norm,
        "reduction": reduction,
    }

    def ours(x: Tensor) -> Tensor:
        return F.conr_loss(x, targets, preds, **options)

    def definition(x: Tensor) -> Tensor:
        return conr_reference.conr_loss(x, targets, preds, **options)

    _check(ours, definition, [x], [trained], temperature, seed)


@given(
    features=recipes(_FEATURES, values=VALUES),
    classes=st.sampled_from([1, 2, 5, 100]),
    temperature=st.sampled_from(TEMPERATURES),
    normalize=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    trained=st.booleans(),
    seed=seeds(),
)
def test_supcon(
    features: Recipe, classes: int, temperature: float, normalize: bool, reduction: str, trained: bool, seed: int
) -> None:
    if not normalize and features.values not in RAW:
        features = features.of(values="normal")
    x, of = features.build(), labels(features.shape[0], classes, seed, -(2**63))

    def ours(x: Tensor) -> Tensor:
        return F.supcon_loss(x, of, temperature=temperature, normalize=normalize, reduction=reduction)

    def definition(x: Tensor) -> Tensor:
        return supcon_reference.supcon_loss(x, of, temperature, normalize, reduction)

    _check(ours, definition, [x], [trained], temperature, seed)


@given(
    query=recipes(_FEATURES, values=VALUES),
    key_values=st.sampled_from(VALUES),
    more_keys=st.sampled_from([0, 0, 1, 7, 64]),
    temperature=st.sampled_from(TEMPERATURES),
    normalize=st.booleans(),
    symmetric=st.booleans(),
    log_q=st.booleans(),
    ids=st.sampled_from([None, 1, 3, 1000]),
    reduction=st.sampled_from(REDUCTIONS),
    trained=st.tuples(st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_info_nce(
    query: Recipe,
    key_values: str,
    more_keys: int,
    temperature: float,
    normalize: bool,
    symmetric: bool,
    log_q: bool,
    ids: int | None,
    reduction: str,
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    if not normalize:
        query, key_values = query.of(values=query.values if query.values in RAW else "normal"), "normal"
    keys = query.shape[0] + (0 if symmetric else more_keys)
    key = query.of(shape=(keys, *query.shape[1:]), values=key_values, seed=query.seed + 1, layout="sliced")
    correction = weights((keys,), query.dtype, "wide", seed).log() if log_q else None
    of = None if ids is None else labels(keys, ids, seed)
    options: dict[str, Any] = {
        "temperature": temperature,
        "normalize": normalize,
        "symmetric": symmetric,
        "log_q": correction,
        "ids": of,
        "reduction": reduction,
    }

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return F.info_nce(q, k, **options)

    def definition(q: Tensor, k: Tensor) -> Tensor:
        return info_nce_reference.info_nce(q, k, **options)

    _check(ours, definition, [query.build(), key.build()], list(trained), temperature, seed)

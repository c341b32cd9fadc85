"""The pairwise losses by torch's own operators, which serve CUDA where no kernel does, on the CPU: as they are, and in
the place of the CPU's kernels, in tests of the public functions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_extra_bytes
from pyreg.ops import _contrastive, _pairs
from tests.oracle import FLOAT_DTYPES
from tests.pairwise import LOSSES, Loss
from tests.test_conr import (  # noqa: F401
    test_a_large_push,
    test_a_row_opposite_to_all_others,
    test_averaged_labels,
    test_golden,
    test_labels_of_several_values,
    test_rows_of_bad_labels_and_weights_are_in_no_pair,
    test_rows_that_add_nothing_take_no_part_whatever_their_upstream_gradient,
    test_rows_without_pairs_add_nothing,
    test_window_includes_its_border,
    test_zero_tiny_and_huge_weights,
)
from tests.test_contrastive import (  # noqa: F401
    operator_arguments,
    test_huge_tiny_and_zero_rows,
    test_low_temperature,
    test_same_bits_on_every_run,
    test_zero_features,
)
from tests.test_info_nce import test_all_of_one_id, test_rare_keys  # noqa: F401
from tests.test_supcon import test_a_mean_is_over_rows_with_positives, test_all_of_one_label  # noqa: F401

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-11, "atol": 1e-13}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES[request.param]


@pytest.fixture(scope="module", autouse=True)
def _composition() -> Iterator[None]:
    """Takes the place of the CPU's kernels."""
    library = torch.library.Library("pyreg", "IMPL", "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_contrastive, "_kernels", lambda tensor: _pairs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel.*")
            for name in ("conr", "supcon"):
                library.impl(name, _contrastive.on_cuda(name, row_count=-2), allow_override=True)
                backward = f"{name}_backward"
                library.impl(backward, _contrastive.on_cuda(backward, row_count=-1), allow_override=True)
            library.impl("info_nce", _info_nce_with_gradient, allow_override=True)
            library.impl("info_nce_backward", _contrastive.on_cuda("info_nce_backward"), allow_override=True)
        yield
    library._destroy()


def _info_nce_with_gradient(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """On the CPU the forward pass is asked for gradients too."""
    (*others, temperature, normalize, _, symmetric, offset, reduction, _, with_gradient) = options
    loss, *statistics, _, _ = _pairs.info_nce(query, key, *options)
    total = statistics[0].dtype
    share = (1 / len(query) if reduction == 1 else 1.0) / (2 if symmetric else 1)
    rows = torch.full((len(query),), share, dtype=total)
    sides = (rows, rows if symmetric else rows[:0], query.to(total), key.to(total), *others, *statistics)
    return loss, *statistics, *_pairs.info_nce_backward(*sides, temperature, normalize, offset, with_gradient)


@pytest.fixture(params=["one block", "many blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows however few there are."""
    if request.param == "many blocks":
        monkeypatch.setattr(_pairs, "_BLOCK_BYTES", 3000)


def problem_of(loss: Loss, shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    return [tensor.detach() for tensor in loss.features(shape, dtype, CPU)], loss.arguments(shape[0], CPU)


def compose(loss: Loss, features: list[Tensor], arguments: dict[str, Any], reduction: int) -> list[Tensor]:
    """The loss and the gradients for the upstream gradient that `value_and_gradients` takes."""
    forward = operator_arguments(loss, features, arguments, reduction)
    value, *statistics = getattr(_pairs, loss.operator)(*forward)
    count, total = len(features[0]), statistics[0].dtype
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=total).reshape(value.shape)
    rows = (upstream / {0: 1, 1: count, 2: 1}[reduction]).expand(count)
    backward = getattr(_pairs, f"{loss.operator}_backward")
    if loss.operator == "info_nce":
        symmetric = forward[8]
        rows = rows / 2 if symmetric else rows
        sides = (rows, rows if symmetric else rows[:0])
        return [value, *backward(*sides, *forward[:5], *statistics[:2], *forward[5:7], 0, [True, True])]
    if loss.operator == "supcon" and reduction == 1:
        rows = rows * count / statistics[0][1].sum()
    tensors = {"conr": 4, "supcon": 2}[loss.operator]
    return [value, backward(rows, *forward[:tensors], statistics[0], *forward[tensors:-5], 0, count)]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (37, 19), (131, 8)], ids=str)
def test_against_reference(loss: Loss, shape: tuple[int, int], dtype: torch.dtype) -> None:
    features, arguments = problem_of(loss, shape, dtype)
    leaves = [tensor.requires_grad_() for tensor in features]
    for reduction, name in enumerate(("none", "mean", "sum")):
        ours = compose(loss, [tensor.detach() for tensor in leaves], arguments, reduction)
        loss.assert_as_accurate(leaves, {**arguments, "reduction": name}, ours, floor=4)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("info_nce")])
@pytest.mark.parametrize("first", [0, 11, 40])
def test_some_rows_of_all(name: str, first: int) -> None:
    """As each rank of a process group computes them."""
    loss, count, rows = LOSSES[name], 53, 13
    features, arguments = problem_of(loss, (count, 6), torch.float64)
    forward = operator_arguments(loss, features, arguments, 0)
    losses, statistics, _ = getattr(_pairs, loss.operator)(*forward)
    some, some_statistics, none = getattr(_pairs, loss.operator)(*forward[:-3], first, rows, False)
    own = slice(first, first + rows)
    torch.testing.assert_close([some, some_statistics], [losses[own], statistics[:, own]], **EXACT)
    assert none.shape == (0,)
    tensors, upstream = {"conr": 4, "supcon": 2}[loss.operator], torch.rand(count, dtype=torch.float64)
    backward = getattr(_pairs, f"{loss.operator}_backward")
    options = (upstream, *forward[:tensors], statistics, *forward[tensors:-5])
    torch.testing.assert_close(backward(*options, first, rows), backward(*options, 0, count)[own], **EXACT)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("info_nce")])
@pytest.mark.parametrize("reduction", [1, 2])
def test_gradient_formed_with_the_loss(name: str, reduction: int) -> None:
    loss = LOSSES[name]
    features, arguments = problem_of(loss, (37, 6), torch.float64)
    forward = operator_arguments(loss, features, arguments, reduction)
    *_, gradient = getattr(_pairs, loss.operator)(*forward[:-1], True)
    features[0].requires_grad_()
    value = loss.reference(*features, reduction=["none", "mean", "sum"][reduction], **arguments)
    torch.testing.assert_close(gradient, torch.autograd.grad(value, features)[0], **EXACT)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("offset", [0, 3, 5, -4, 20, -20])
def test_positives_elsewhere(offset: int) -> None:
    """Query i and key i + offset, where there is one: the others have no loss, but are still negatives."""
    loss, queries, keys = LOSSES["info_nce"], 12, 17
    features, _ = problem_of(loss, (keys, 6), torch.float64)
    query, key, ids = features[0][:queries], features[1], torch.randint(9, (keys,))
    numbers = (0.3, True)
    pairs = [(i, i + offset) for i in range(queries) if 0 <= i + offset < keys]
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).t() / 0.3
    for by_key in (False, True):
        own = (
            query,
            key,
            None,
            ids[:queries],
            ids,
            *numbers,
            not by_key,
            by_key,
            offset,
            0,
            torch.float64,
            [False] * 2,
        )
        losses = _pairs.info_nce(*own)[0]
        expected = torch.zeros(keys if by_key else queries, dtype=torch.float64)
        for i, j in pairs:
            same = ids[:queries] == ids[j] if by_key else ids == ids[i]
            same[i if by_key else j] = False
            row = (scores[:, j] if by_key else scores[i]).masked_fill(same, -torch.inf)
            expected[j if by_key else i] = row.logsumexp(0) - scores[i, j]
        torch.testing.assert_close(losses, expected, **EXACT)


def test_memory_is_that_of_some_blocks(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    count, block = 2000, 1 << 20
    monkeypatch.setattr(_pairs, "_BLOCK_BYTES", block)
    features, arguments = problem_of(loss, (count, 8), torch.float32)
    peak = peak_extra_bytes(lambda: compose(loss, features, arguments, 1), "cpu", 0)
    assert peak <= 10 * block < 4 * count * count

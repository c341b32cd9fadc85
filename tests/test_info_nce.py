"""InfoNCE: two sides and directions, sampling corrections, ids. What it shares with others: ``test_contrastive.py``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.functional import info_nce
from pyreg.reference.info_nce import info_nce as reference
from tests.oracle import FLOAT_DTYPES, assert_as_accurate
from tests.pairwise import REDUCTIONS, in_float64, value_and_gradients

pytestmark = pytest.mark.not_emulated

# The same float64 numbers in another order of summation.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def sides(
    count: int, keys: int, width: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries and keys as leaves; log_q; ids, some of which come several times."""
    query, key = torch.randn(count, width, dtype=torch.float64), torch.randn(keys, width, dtype=torch.float64)
    log_q, ids = torch.rand(keys, dtype=torch.float64).log(), torch.randint(2 * keys, (keys,))
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in (query, key)]
    return tensors, log_q.to(device), ids.to(device)


# ---- right ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (17, 29), (600, 600), (300, 1031)], ids=str)
def test_is_torchs_cross_entropy(device: torch.device, shape: tuple[int, int], normalize: bool) -> None:
    tensors, log_q, _ = sides(*shape, 6, device)
    labels = torch.arange(shape[0], device=device)

    def torchs(q: Tensor, k: Tensor, reduction: str) -> Tensor:
        q, k = (F.normalize(q), F.normalize(k)) if normalize else (q, k)
        return F.cross_entropy(q @ k.t() / 0.5 - log_q, labels, reduction=reduction)

    def ours(q: Tensor, k: Tensor, reduction: str) -> Tensor:
        return info_nce(q, k, temperature=0.5, normalize=normalize, log_q=log_q, reduction=reduction)

    for reduction in REDUCTIONS:
        actual, expected = (value_and_gradients(f, tensors, reduction=reduction) for f in (ours, torchs))
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("count", [7, 600])
def test_symmetric_is_clips_loss(device: torch.device, count: int) -> None:
    tensors, _, _ = sides(count, count, 6, device)
    labels = torch.arange(count, device=device)

    def clip(q: Tensor, k: Tensor) -> Tensor:
        scores = F.normalize(q) @ F.normalize(k).t() / 0.2
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2

    actual = value_and_gradients(lambda q, k: info_nce(q, k, temperature=0.2, symmetric=True), tensors)
    torch.testing.assert_close(actual, value_and_gradients(clip, tensors), **EXACT)


@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(9, 9), (37, 53), (530, 530), (140, 700)], ids=str)
def test_against_the_derivative_by_hand(
    device: torch.device, shape: tuple[int, int], symmetric: bool, with_ids: bool, with_log_q: bool
) -> None:
    """Another algebra: softmaxes of masked scores, and their Jacobians."""
    count, keys = (shape[0], shape[0]) if symmetric else shape
    (query, key), log_q, ids = sides(count, keys, 5, device)
    tau = 0.3
    options = {"log_q": log_q if with_log_q else None, "ids": ids if with_ids else None, "symmetric": symmetric}
    loss = info_nce(query, key, temperature=tau, reduction="sum", **options)
    gradients = torch.autograd.grad(loss, (query, key))
    with torch.no_grad():
        lengths = [side.norm(dim=1, keepdim=True) for side in (query, key)]
        q, k = query / lengths[0], key / lengths[1]
        itself = torch.eye(count, keys, dtype=torch.float64, device=device)
        counts = ((ids[:count, None] != ids) | (itself > 0)) if with_ids else torch.ones_like(itself, dtype=torch.bool)
        exponentials = (q @ k.t() / tau).exp() * counts
        corrected = exponentials / (log_q.exp() if with_log_q else 1)
        of_query = corrected / corrected.sum(1, keepdim=True)
        expected = -of_query.diagonal().log().sum()
        g = of_query - itself
        if symmetric:
            of_key = exponentials / exponentials.sum(0)
            expected = (expected - of_key.diagonal().log().sum()) / 2
            g = (g + of_key - itself) / 2
        by_units = (g @ k / tau, g.t() @ q / tau)
        expected_gradients = tuple(
            (dz - z * (z * dz).sum(1, keepdim=True)) / length
            for dz, z, length in zip(by_units, (q, k), lengths, strict=True)
        )
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients, expected_gradients, **EXACT)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(3, 130), (129, 131), (300, 1031)], ids=str)
def test_more_keys_than_queries(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors, log_q, ids = sides(*shape, 24, device, dtype)
    arguments = {"log_q": log_q, "ids": ids, "temperature": 0.2}

    def plain(q: Tensor, k: Tensor, **arguments: Any) -> Tensor:
        if dtype.itemsize == 2 and q.dtype == dtype:
            return reference(F.normalize(q).float(), F.normalize(k).float(), **arguments).to(dtype)
        return reference(q, k, **arguments)

    for reduction in REDUCTIONS:
        ours, theirs = (value_and_gradients(f, tensors, reduction=reduction, **arguments) for f in (info_nce, plain))
        truth = value_and_gradients(plain, in_float64(tensors), reduction=reduction, **arguments)
        for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
            assert_as_accurate(actual, same_dtype, expected, floor=8)


# ---- gradients ----


@pytest.mark.parametrize(("reduction", "symmetric"), [*itertools.product(REDUCTIONS, [False, True])])
@pytest.mark.parametrize("count", [20, 600])
def test_gradients_only_where_needed(device: torch.device, reduction: str, symmetric: bool, count: int) -> None:
    (query, key), log_q, ids = sides(count, count, 6, device)
    options = {"log_q": log_q, "ids": ids, "symmetric": symmetric, "reduction": reduction, "temperature": 0.3}
    both = value_and_gradients(info_nce, [query, key], **options)
    of_query = value_and_gradients(info_nce, [query, key.detach()], **options)
    of_key = value_and_gradients(info_nce, [query.detach(), key], **options)
    torch.testing.assert_close([*of_query, of_key[1]], both, **EXACT)
    loss = info_nce(query, key, **options)
    upstream = torch.ones_like(loss)
    partly = torch.autograd.grad(loss, key, upstream, retain_graph=True)
    torch.testing.assert_close(partly, torch.autograd.grad(loss, (query, key), upstream)[1:], **EXACT)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_tensor_on_both_sides(device: torch.device, symmetric: bool) -> None:
    (x, _), _, _ = sides(20, 20, 6, device)
    ours, theirs = (torch.autograd.grad(f(x, x, symmetric=symmetric), x) for f in (info_nce, reference))
    torch.testing.assert_close(ours, theirs, **EXACT)


# ---- edges ----


def test_ids_leave_duplicates_out(device: torch.device) -> None:
    """Whatever such keys hold, and whatever bits of their ids agree."""
    (query, key), log_q, _ = sides(40, 60, 5, device)
    ids = torch.arange(60, device=device) * 2**32 + 7
    ids[50:], ids[20:23] = ids[:10], ids[30]
    losses = info_nce(query, key, ids=ids, log_q=log_q, temperature=0.3, reduction="none")
    for i in (0, 5, 15, 20, 30):
        others = [j for j in range(60) if j != i and ids[j] != ids[i]]
        alone = info_nce(query[i : i + 1], key[[i, *others]], log_q=log_q[[i, *others]], temperature=0.3)
        torch.testing.assert_close(losses[i], alone, **EXACT)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [20, 600])
def test_all_of_one_id(device: torch.device, symmetric: bool, count: int) -> None:
    """No negatives: nothing to learn."""
    (query, key), _, _ = sides(count, count, 5, device)
    ids = torch.full((count,), 3, device=device)
    loss, *gradients = value_and_gradients(info_nce, [query, key], ids=ids, symmetric=symmetric)
    # differences of equal numbers of up to 1 / temperature
    assert loss.abs() < 1e-13
    assert all(gradient.abs().max() < 1e-13 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rare_keys(device: torch.device, dtype: torch.dtype) -> None:
    """Probabilities down to e^-200, beyond float32's numbers."""
    tensors, _, _ = sides(130, 130, 8, device, dtype)
    log_q = -torch.linspace(0, 200, 130, dtype=torch.float64, device=device)
    for symmetric in (False, True):
        arguments = {"log_q": log_q, "temperature": 0.5, "symmetric": symmetric}
        ours, theirs = (value_and_gradients(f, tensors, **arguments) for f in (info_nce, reference))
        truth = value_and_gradients(reference, in_float64(tensors), **arguments)
        for actual, same_dtype, expected in zip(ours, theirs, truth, strict=True):
            assert actual.isfinite().all()
            # exponents of 200 are rounded to 200 roundoffs
            assert_as_accurate(actual, same_dtype, expected, floor=200)


def test_no_queries(device: torch.device) -> None:
    query, key = torch.randn(0, 4, device=device, requires_grad=True), torch.randn(5, 4, device=device)
    key.requires_grad_()
    loss, *gradients = value_and_gradients(info_nce, [query, key])
    assert loss == 0
    assert gradients[0].shape == (0, 4)
    assert (gradients[1] == 0).all()


def test_autocast_joins_dtypes(device: torch.device) -> None:
    """A bfloat16 and a float32 tower."""
    (query, key), _, _ = sides(30, 30, 8, device, torch.float32)
    short = query.detach().bfloat16().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, *gradients = value_and_gradients(info_nce, [short, key])
    expected = value_and_gradients(info_nce, [short.detach().float().requires_grad_(), key])
    assert [tensor.dtype for tensor in (loss, *gradients)] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close([loss, gradients[1]], [expected[0], expected[2]])
    torch.testing.assert_close(gradients[0], expected[1].bfloat16())


# ---- hard to misuse ----

Q, K = torch.randn(4, 3), torch.randn(6, 3)
IDS, LOG_Q = torch.arange(6), torch.zeros(6)
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "list": (TypeError, r"expected query to be a tensor, got list", lambda: info_nce([1.0], K)),  # type: ignore[arg-type]
    "key list": (TypeError, r"expected key to be a tensor, got list", lambda: info_nce(Q, [1.0])),  # type: ignore[arg-type]
    "trained temperature": (
        ValueError,
        r"temperature has no gradient; pass temperature.detach\(\)",
        lambda: info_nce(Q, K, temperature=torch.tensor(0.1, requires_grad=True)),  # type: ignore[arg-type]
    ),
    "integers": (TypeError, r"expected key to be float64.* got torch.int64", lambda: info_nce(Q, K.long())),
    "one dimension": (ValueError, r"expected query of shape \[N, D\]", lambda: info_nce(Q[:, 0], K)),
    "no features": (ValueError, r"expected query .* got \[4, 0\]", lambda: info_nce(Q[:, :0], K[:, :0])),
    "dtypes": (
        TypeError,
        r"expected key of query's dtype torch.float32, got torch.float64; convert it with key.to\(query.dtype\)",
        lambda: info_nce(Q, K.double()),
    ),
    "widths": (
        ValueError,
        r"expected key of shape \[M, D\] with query's D = 3, got \[6, 2\]",
        lambda: info_nce(Q, K[:, :2]),
    ),
    "fewer keys": (
        ValueError,
        r"expected key of shape \[M, D\] with M >= N = 4 rows, got \[3, 3\]",
        lambda: info_nce(Q, K[:3]),
    ),
    "symmetric": (
        ValueError,
        r"expected key of shape \[M, D\] with M = N = 4, as symmetric needs, rows, got \[6, 3\]",
        lambda: info_nce(Q, K, symmetric=True),
    ),
    "key's device": (
        ValueError,
        r"expected key on query's device cpu, got meta; move it with key.to\('cpu'\)",
        lambda: info_nce(Q, K.to("meta")),
    ),
    "log_q": (TypeError, r"expected log_q to be a tensor, got float", lambda: info_nce(Q, K, log_q=0.5)),  # type: ignore[arg-type]
    "integer log_q": (TypeError, r"expected log_q to be float64", lambda: info_nce(Q, K, log_q=IDS)),
    "log_q's shape": (
        ValueError,
        r"expected log_q of shape \[M\] = \[6\], got \[4\]",
        lambda: info_nce(Q, K, log_q=LOG_Q[:4]),
    ),
    "log_q of 0": (
        ValueError,
        r"expected finite numbers in log_q, got -inf",
        lambda: info_nce(Q, K, log_q=LOG_Q.log()),
    ),
    "trained log_q": (
        ValueError,
        r"log_q has no gradient; pass log_q.detach\(\)",
        lambda: info_nce(Q, K, log_q=LOG_Q.clone().requires_grad_()),
    ),
    "ids": (
        TypeError,
        r"expected ids to be integers, got torch.float32; use ids.long\(\)",
        lambda: info_nce(Q, K, ids=LOG_Q),
    ),
    "ids' shape": (ValueError, r"expected ids of shape \[M\] = \[6\], got \[4\]", lambda: info_nce(Q, K, ids=IDS[:4])),
    "temperature": (
        ValueError,
        r"expected temperature to be a finite number > 0, got -1",
        lambda: info_nce(Q, K, temperature=-1),
    ),
    "reduction": (ValueError, r"expected reduction to be .* got 'all'", lambda: info_nce(Q, K, reduction="all")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^info_nce: {message}"):
        call()

"""The Triton kernels of ConR, SupCon and InfoNCE. Interpreted, they take the place of the CPU's kernels in the public
functions; where there is a GPU, they are what the public functions call."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_conr, test_contrastive, test_info_nce, test_supcon
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_runs_without_waiting_and_in_a_graph, relative_error
from tests.pairwise import LOSSES, Loss, in_float64, in_place_of_the_cpus, value_and_gradients
from tests.test_contrastive import operator_arguments

# The interpreter computes with numpy, which warns where a GPU does not. New memory is NaN here, by an option of torch's
# that warns of what else has no fixed order.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

NONE, MEAN, SUM = 0, 1, 2  # reductions
CONR = [name for name in LOSSES if name.startswith("conr")]
SELF = [*CONR, "supcon"]
EXACT = {"rtol": 1e-11, "atol": 1e-12}

# Products of tiles in registers; in memory, a block of tiles at a time; of those tiles that may hold pairs, sorted.
MODES = ("fused", "block", "sorted")


@pytest.fixture(scope="module")
def kernels(triton_device: torch.device) -> Iterator[Any]:
    module = importlib.import_module("pyreg.triton_kernels.contrastive")
    with in_place_of_the_cpus(module) if triton_device.type == "cpu" else contextlib.nullcontext():
        yield module


@pytest.fixture
def device(triton_device: torch.device, kernels: Any) -> torch.device:
    """Of the tests of the public functions."""
    return triton_device


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use(kernels: Any, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Chooses how pairs are treated, whatever their number; of the interpreter, the size of tiles."""

    def choose(mode: str, size: int = 16) -> None:
        monkeypatch.setattr(kernels, "_MOST_FUSED", 10**9 if mode == "fused" else 0)
        monkeypatch.setattr(kernels, "_skips", lambda features: mode == "sorted")
        for name in ("_EMULATED_FUSED_TILES", "_EMULATED_BLOCK_TILES"):
            monkeypatch.setattr(kernels, name, getattr(kernels, name)._replace(size=size))
        size = size if triton_device.type == "cpu" else 128
        monkeypatch.setattr(kernels, "_BLOCK_BYTES", (2 * size) ** 2 * 8)  # two tiles a side, of float64

    return choose


def several_blocks(device: torch.device) -> int:
    """Samples: no multiple of a tile's; several blocks of two tiles a side."""
    return 59 if device.type == "cpu" else 600


def problem_of(
    loss: Loss, count: int, dtype: torch.dtype, device: torch.device, width: int = 9
) -> tuple[list[Tensor], dict[str, Any]]:
    return loss.features((count, width), dtype, device), loss.arguments(count, device)


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def upstream(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    total = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.linspace(0.5, 1.5, count, dtype=total, device=device)


def backward(kernels: Any, loss: Loss, forward: tuple[Any, ...], statistics: Tensor, grad_rows: Tensor) -> Tensor:
    """Of a loss of rows among themselves."""
    tensors = {"conr": 4, "supcon": 2}[loss.operator]
    gradient = getattr(kernels, f"{loss.operator}_backward")
    return gradient(grad_rows, *forward[:tensors], statistics, *forward[tensors:-5], *forward[-3:-1])  # type: ignore[no-any-return]


# ---- the public functions ----


CASES = [
    *((name, "fused", dtype) for name in LOSSES for dtype in (torch.float64, torch.bfloat16)),
    *((name, "block", torch.float32) for name in LOSSES),
    *((name, "sorted", dtype) for name, dtype in zip(CONR, FLOAT_DTYPES[1:], strict=True)),
    *((name, mode, torch.float16) for name, mode in (("supcon", "fused"), ("info_nce-symmetric", "block"))),
]


@pytest.mark.parametrize(("name", "mode", "dtype"), CASES)
def test_against_reference(device: torch.device, use: Any, name: str, dtype: torch.dtype, mode: str) -> None:
    use(mode)
    loss, reduction = LOSSES[name], "none" if mode == "fused" else "mean"
    count = 37 if mode == "fused" else several_blocks(device)
    features, arguments = problem_of(loss, count, dtype, device, width=19)
    arguments["reduction"] = reduction
    ours = value_and_gradients(loss.fused, features, **arguments)
    loss.assert_as_accurate(features, arguments, ours, floor=4)


@pytest.mark.parametrize("shape", [(2, 1), (17, 32), (5, 600)], ids=str)
@pytest.mark.parametrize("name", ["conr-paper", "supcon", "info_nce-symmetric"])
def test_shapes(device: torch.device, use: Any, name: str, shape: tuple[int, int]) -> None:
    loss = LOSSES[name]
    for mode in ("fused", "sorted" if name in CONR else "block"):
        use(mode)
        features, arguments = loss.features(shape, torch.float32, device), loss.arguments(shape[0], device)
        ours = value_and_gradients(loss.fused, features, **arguments)
        loss.assert_as_accurate(features, arguments, ours, floor=8)


WIDE = [
    *(("conr-paper", *options) for options in ((0.01, 0.05), (0.2, 10.0), (0.01, 10.0))),
    ("conr-agedb", 0.01, 10.0), ("conr-agedb", 0.002, 0.05), ("conr-nyud2", 0.01, 10.0),
    ("supcon", 0.01, 0), ("info_nce-symmetric", 0.01, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "temperature", "eta", "dtype"),
    [*((*case, torch.float32) for case in WIDE), *((*case, torch.bfloat16) for case in WIDE[2:-1:2])],
)
def test_wide_ranges(
    device: torch.device, use: Any, name: str, temperature: float, eta: float, dtype: torch.dtype
) -> None:
    """Exponents that span hundreds: nothing underflows to the logarithm of 0, nothing overflows."""
    loss = LOSSES[name]
    features, arguments = problem_of(loss, 37, dtype, device)
    arguments |= {"temperature": temperature} | ({"eta": eta} if loss.operator == "conr" else {})
    use("fused" if dtype == torch.float32 else "block")
    ours = value_and_gradients(loss.fused, features, **arguments)
    loss.assert_as_accurate(features, arguments, ours, floor=64)


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
VARIANTS = ("paper", "agedb", "nyud2")
SMALL: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    *((test_conr.test_golden, (file,)) for file in ("agedb_0", "nyud2_0")),
    *((test_conr.test_against_the_derivative_by_hand, (variant, 31)) for variant in VARIANTS),
    *((test_conr.test_labels_of_several_values, (norm, 37)) for norm in (1, 2, math.inf)),
    (test_conr.test_averaged_labels, ()),
    *((test_conr.test_a_push_as_large_as_the_norm_makes_it, (norm,)) for norm in (1, 2, math.inf)),
    (test_conr.test_labels_beyond_float32_are_told_apart, ()),
    (test_conr.test_window_includes_its_border, ()),
    *(
        (test_conr.test_rows_without_pairs_add_nothing, (variant, case, F32, 30))
        for variant, case in (("paper", "no positives"), ("agedb", "no negatives"), ("nyud2", "equal labels"))
    ),
    *((test_conr.test_a_large_push, (variant, scale, F32, 60)) for variant in VARIANTS for scale in (10.0, 1e6)),
    *((test_conr.test_zero_tiny_and_huge_weights, (variant, F32, 60)) for variant in VARIANTS),
    *((test_conr.test_a_row_opposite_to_all_others, (variant, F32, 12)) for variant in VARIANTS),
    *(
        (test_conr.test_a_factor_of_zero_beside_the_largest_score, (variant, zero, temperature, dtype))
        for variant, zero in (("paper", "weights"), ("nyud2", "weights"), ("nyud2", "eta"))
        for temperature in (0.02, 0.001)
        for dtype in (F64, F32)
    ),
    *((test_supcon.test_against_the_derivative_by_hand, (normalize, 31)) for normalize in (True, False)),
    (test_supcon.test_rows_without_positives_add_nothing, (F32, 30)),
    (test_supcon.test_a_mean_is_over_rows_with_positives, (30,)),
    (test_supcon.test_all_of_one_label, (30,)),
    (test_supcon.test_names_and_order_of_labels_do_not_matter, (20,)),
    *((test_info_nce.test_is_torchs_cross_entropy, ((5, 5), normalize)) for normalize in (True, False)),
    *(
        (test_info_nce.test_against_the_derivative_by_hand, ((37, 53), symmetric, True, True))
        for symmetric in (False, True)
    ),
    (test_info_nce.test_gradients_only_where_needed, ("sum", True, 20)),
    (test_info_nce.test_all_of_one_id, (True, 20)),
    (test_info_nce.test_no_queries, ()),
    *((test_contrastive.test_zero_features, (LOSSES[name], BF16)) for name in ("conr-agedb", "info_nce-symmetric")),
    *(
        (test_contrastive.test_huge_tiny_and_zero_rows, ("conr-paper", dtype, size))
        for dtype in (F32, BF16)
        for size in (1e25, 2e-13, 1e-20, 0.0)
    ),
    *(
        (test_contrastive.test_too_few_rows_for_a_pair, (loss, "none", count))
        for loss in LOSSES.values()
        for count in (0, 1)
    ),
]


def named(cases: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[Any]:
    def of(argument: Any) -> str:
        return argument.operator if isinstance(argument, Loss) else str(argument).removeprefix("torch.")

    return [
        pytest.param(*case, MODES[i % 2], id="-".join([case[0].__name__[5:], *map(of, case[1])]))
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("body", "arguments", "mode"), named(SMALL))
def test_of_the_public_functions(
    device: torch.device, use: Any, body: Callable[..., None], arguments: tuple[Any, ...], mode: str
) -> None:
    use(mode)
    body(device, *arguments)


def test_a_distance_that_is_rounded_to_the_window(device: torch.device, use: Any) -> None:
    use("sorted", size=128)
    test_conr.test_a_distance_that_is_rounded_to_the_window(device)


# ---- as operators ----


@pytest.mark.parametrize(("name", "mode"), [(name, MODES[i % 2]) for i, name in enumerate(SELF)])
def test_some_rows_of_all(kernels: Any, use: Any, device: torch.device, name: str, mode: str) -> None:
    """As each rank of a process group computes them."""
    use(mode)
    loss, count = LOSSES[name], several_blocks(device)
    features, arguments = problem_of(loss, count, torch.float64, device)
    forward = operator_arguments(loss, detached(features), arguments, NONE)
    operator = getattr(kernels, loss.operator)
    losses, statistics, _ = operator(*forward)
    grad_rows = upstream(count, torch.float64, device)
    gradient = backward(kernels, loss, forward, statistics, grad_rows)
    for first, rows in ((0, 16), (11, 30), (count - 1, 1)):
        part, own = (*forward[:-3], first, rows, False), slice(first, first + rows)
        some, some_statistics, none = operator(*part)
        torch.testing.assert_close([some, some_statistics], [losses[own], statistics[:, own]], **EXACT)
        assert none.shape == (0,)
        torch.testing.assert_close(backward(kernels, loss, part, statistics, grad_rows), gradient[own], **EXACT)


@pytest.mark.parametrize(
    ("offset", "by_key", "mode"), [(5, False, "block"), (-4, False, "fused"), (5, True, "fused"), (-4, True, "block")]
)
def test_one_direction_with_positives_elsewhere(
    kernels: Any, use: Any, triton_device: torch.device, offset: int, by_key: bool, mode: str
) -> None:
    """Query i and key i + offset, where there is one: the others have no loss, but are still negatives."""
    use(mode)
    queries, keys = 22, 37
    query = torch.randn(queries, 6, dtype=torch.float64, device=triton_device, requires_grad=True)
    key = torch.randn(keys, 6, dtype=torch.float64, device=triton_device, requires_grad=True)
    ids = torch.randint(9, (keys,), device=triton_device)
    options = (None, ids[:queries].contiguous(), ids, 0.3, True, not by_key, by_key, offset, NONE)
    losses, *statistics = kernels.info_nce(query.detach(), key.detach(), *options, torch.float64, [False, False])[:3]
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).t() / 0.3
    expected = torch.zeros(keys if by_key else queries, dtype=torch.float64, device=triton_device)
    for i in range(queries):
        j = i + offset
        if not 0 <= j < keys:
            continue
        same = ids[:queries] == ids[j] if by_key else ids == ids[i]
        same[i if by_key else j] = False
        row = (scores[:, j] if by_key else scores[i]).masked_fill(same, -torch.inf)
        expected[j if by_key else i] = row.logsumexp(0) - scores[i, j]
    torch.testing.assert_close(losses, expected.detach(), **EXACT)
    grad_rows = torch.rand_like(losses)
    sides = (grad_rows[:0], grad_rows) if by_key else (grad_rows, grad_rows[:0])
    ours = kernels.info_nce_backward(
        *sides, query.detach(), key.detach(), *options[:3], *statistics, 0.3, True, offset, [True, True]
    )
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (query, key), grad_rows), **EXACT)


@pytest.mark.parametrize("mode", MODES[:2])
def test_keys_that_are_left_out(kernels: Any, use: Any, triton_device: torch.device, mode: str) -> None:
    """A key of log_q = infinity is as if it were not there; a positive that is gives NaN, as in PyTorch."""
    use(mode)
    query, key = torch.randn(20, 5, device=triton_device), torch.randn(40, 5, device=triton_device)
    log_q = torch.linspace(-9.0, 0.0, 40, device=triton_device)
    kept = torch.arange(40, device=triton_device) % 3 != 1
    kept[:20] = True

    def losses(key: Tensor, log_q: Tensor) -> Tensor:
        options = (None, None, 0.3, True, True, False, 0, NONE, torch.float32, [False, False])
        return kernels.info_nce(query, key, log_q, *options)[0]  # type: ignore[no-any-return]

    expected = losses(key[kept], log_q[kept])
    torch.testing.assert_close(losses(key, log_q.masked_fill(~kept, math.inf)), expected, rtol=1e-6, atol=1e-6)
    assert losses(key, torch.full_like(log_q, math.inf)).isnan().all()


@pytest.mark.parametrize(("name", "mode"), [*zip(CONR, MODES, strict=True), *(("supcon", mode) for mode in MODES[:2])])
def test_gradient_formed_with_the_loss(kernels: Any, use: Any, device: torch.device, name: str, mode: str) -> None:
    """It is what the backward pass forms; a reduced loss is the losses' mean or sum, in the dtype asked for."""
    use(mode)
    loss = LOSSES[name]
    features, arguments = problem_of(loss, 40, torch.float32, device)
    forward = operator_arguments(loss, detached(features), arguments, NONE)
    operator = getattr(kernels, loss.operator)
    losses, statistics, _ = operator(*forward)
    divisor = statistics[1].sum() if loss.operator == "supcon" else 40
    for reduction, expected, share in ((MEAN, losses.sum() / divisor, 1 / divisor), (SUM, losses.sum(), 1.0)):
        reduced = (*forward[:-5], reduction, torch.bfloat16, 0, 40, True)
        value, same_statistics, gradient = operator(*reduced)
        assert value.shape == ()
        torch.testing.assert_close(value, expected.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(same_statistics, statistics, rtol=0, atol=0)
        later = backward(kernels, loss, forward, statistics, torch.ones_like(losses) * share)
        torch.testing.assert_close(gradient, later, rtol=0, atol=0)


@pytest.mark.parametrize("n_labels", [1, 2])
def test_skipped_tiles(kernels: Any, use: Any, device: torch.device, n_labels: int) -> None:
    """A quarter of the tiles at least, and nothing changes but roundings; results come in the caller's order."""
    count = several_blocks(device)
    rank = torch.randperm(count, device=device)[:, None].double()
    targets = (rank / 2 if n_labels == 1 else torch.cat([rank, rank % 3], 1) / 4).contiguous()
    preds = targets + 2 * torch.rand(count, n_labels, dtype=torch.float64, device=device)
    unknown = (rank < 20).squeeze(1) & (n_labels > 1)  # more than a tile, in no pair
    targets[unknown, -1] = preds[unknown, -1] = math.nan
    features = torch.randn(count, 6, dtype=torch.float64, device=device)
    weights, grad_rows = torch.rand(count, dtype=torch.float64, device=device), upstream(count, torch.float64, device)
    numbers = (1.0, 0.2, 0.05, 0, 2)
    results = []
    for mode in MODES:
        use(mode)
        forward = (features, targets, preds, weights, *numbers, NONE, torch.float64, 0, count, False)
        losses, statistics, _ = kernels.conr(*forward)
        gradient = backward(kernels, LOSSES["conr-paper"], forward, statistics, grad_rows)
        results.append((losses, statistics, gradient))
    assert (results[0][0] != 0).sum() > count / 3
    assert (results[0][0][unknown] == 0).all()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)

    problem = kernels._conr_problem(features, targets, preds, None, *numbers, 0, count)
    flags, listed, length = kernels._active_tiles(problem)
    assert (flags.diagonal() == 1).sum() >= len(flags) - unknown.sum() // problem.tiles.size
    assert torch.equal(flags, flags.t())
    assert flags.sum() <= 0.75 * flags.numel()
    blocks = range(listed.shape[1])
    for tile in range(len(flags)):
        found = [i for block in blocks for i in listed[tile, block, : length[tile, block]].tolist()]
        assert found == flags[tile].nonzero().squeeze(1).tolist()
        assert [i // listed.shape[2] for i in found] == [b for b in blocks for _ in range(length[tile, b])]


def test_tiles_are_skipped_where_products_take_long(kernels: Any) -> None:
    def skips(count: int, width: int, dtype: torch.dtype) -> bool:
        return kernels._skips(torch.empty(count, width, dtype=dtype, device="meta"))  # type: ignore[no-any-return]

    assert not skips(8192, 512, torch.bfloat16)
    assert skips(65536, 512, torch.bfloat16)
    assert not skips(4096, 512, torch.float32)
    assert skips(16384, 512, torch.float32)


def test_few_rows_of_very_many_features_skip_no_tiles(kernels: Any, device: torch.device, use: Any) -> None:
    use("sorted")
    features, labels = torch.zeros(40, 3, device=device), torch.zeros(40, 1, device=device)
    for most_fused in (0, 40):
        kernels._MOST_FUSED = most_fused  # `use` restores it
        problem = kernels._conr_problem(features, labels, labels, None, 1.0, 0.2, 0.05, 0, 2, 0, 40)
        assert (problem.order is None) == problem.fused == (most_fused == 40)


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        ("conr-paper", "sorted", torch.float32),
        ("supcon", "block", torch.float16),
        ("info_nce", "fused", torch.bfloat16),
    ],
)
def test_same_bits_on_every_run(device: torch.device, use: Any, name: str, mode: str, dtype: torch.dtype) -> None:
    use(mode)
    loss = LOSSES[name]
    features, arguments = problem_of(loss, several_blocks(device), dtype, device)
    first, second = (value_and_gradients(loss.fused, features, **arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_three_launches_forward(kernels: Any, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Counting:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return self.kernel[grid]

    for name in vars(kernels.kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels.kernels, name, Counting(getattr(kernels.kernels, name)))
    count = 48 if triton_device.type == "cpu" else 256
    for name in ("conr-paper", "supcon", "info_nce-symmetric"):
        loss = LOSSES[name]
        features, arguments = problem_of(loss, count, torch.float32, triton_device)
        launches.clear()
        getattr(kernels, loss.operator)(*operator_arguments(loss, detached(features), arguments, MEAN))
        assert len(launches) == 3


# ---- numbers at the ends of the range ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_features_of_any_magnitude(kernels: Any, use: Any, device: torch.device, dtype: torch.dtype) -> None:
    """The loss does not know it; the gradient is as much larger as the features are smaller."""
    loss = LOSSES["conr-paper"]
    (features,), arguments = problem_of(loss, 34, dtype, device)
    smallest, largest = (-8, 12) if dtype == torch.float16 else (-30, 100)
    powers = 2.0 ** torch.linspace(smallest, largest, 34, dtype=torch.float64, device=device).round()[:, None]
    scaled = (features.detach().double() * powers).to(dtype)
    grad_rows = upstream(34, dtype, device)
    use("block" if dtype.itemsize == 2 else "fused")

    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        forward = operator_arguments(loss, [x], arguments, NONE)
        losses, statistics, _ = kernels.conr(*forward)
        return losses, backward(kernels, loss, forward, statistics, grad_rows)

    losses, gradient = results(features.detach())
    same_losses, smaller = results(scaled)
    if dtype == torch.float16:  # some elements of the smallest rows, and of the largest rows' gradients, are subnormal
        assert relative_error(same_losses, losses) < 1e-2
        assert relative_error(smaller.double() * powers, gradient) < 0.05
    else:
        torch.testing.assert_close(same_losses, losses, rtol=0, atol=0)
        torch.testing.assert_close((smaller.double() * powers).to(dtype), gradient, rtol=0, atol=0)


def test_float16_gradients_of_any_magnitude(kernels: Any, use: Any, device: torch.device) -> None:
    """H is scaled to fit float16, for upstream gradients from 2^-60 to 2^60; rows of none do not count."""
    use("fused")
    loss = LOSSES["conr-paper"]
    features, arguments = problem_of(loss, 40, torch.float16, device)
    forward = operator_arguments(loss, detached(features), arguments, NONE)
    statistics = kernels.conr(*forward)[1]
    grad_rows = upstream(40, torch.float16, device)
    (leaf,) = in_float64(features)
    losses = loss.reference(leaf, reduction="none", **arguments)
    (exact,) = torch.autograd.grad(losses, leaf, grad_rows.double())
    problem = kernels._conr_problem(*forward[:9], 0, 40)
    for exponent in (-60, -20, 20, 60):
        side = kernels._Losses(statistics, grad_rows * 2.0**exponent)
        gradient, _ = kernels._gradients(problem, side, side, dtype=torch.float32)
        assert relative_error(gradient.double() * 2.0**-exponent, exact) < 2 * ROUNDOFF[torch.float16]
    assert (backward(kernels, loss, forward, statistics, torch.zeros_like(grad_rows)) == 0).all()
    without = statistics[1] == 0
    assert without.any()
    infinite = backward(kernels, loss, forward, statistics, grad_rows.masked_fill(without, math.inf))
    assert torch.equal(infinite, backward(kernels, loss, forward, statistics, grad_rows))


@pytest.mark.parametrize("mode", MODES)
def test_nan_is_not_lost(device: torch.device, use: Any, mode: str) -> None:
    use(mode)
    loss = LOSSES["conr-paper"]
    arguments = {"targets": torch.arange(40, device=device) % 5, "preds": torch.zeros(40, device=device)}
    for special in (math.nan, math.inf):
        features = torch.randn(40, 6, device=device)
        features[11, 3] = special
        # Each sample is a positive or a negative of each.
        losses, gradient = value_and_gradients(loss.fused, [features.requires_grad_()], reduction="none", **arguments)
        assert losses.isnan().all()
        assert gradient.isnan().any(1).all()


# ---- launchers ----


def test_blocks_cover_all_pairs_once(kernels: Any, use: Any, triton_device: torch.device) -> None:
    """Of the upper triangle of blocks, or of all; none as large as the whole."""
    use("block")
    for count, keys in ((59, 59), (100, 17), (16, 300)):
        query, key = (torch.randn(rows, 4, device=triton_device) for rows in (count, keys))
        problem = kernels._info_nce_problem(query, key, None, None, None, 0.07, True, 0, False)
        for triangle in (False, True) if count == keys else (False,):
            problem = problem._replace(triangle=triangle)
            seen = torch.zeros(problem.padded, dtype=torch.int32)
            for first_row, first_column, n_rows, n_columns in problem.blocks():
                assert n_rows * n_columns < seen.numel() or max(problem.padded) <= 2 * problem.tiles.size
                seen[first_row : first_row + n_rows, first_column : first_column + n_columns] += 1
                if triangle and first_row != first_column:
                    seen[first_column : first_column + n_columns, first_row : first_row + n_rows] += 1
            assert (seen == 1).all()


def test_float32_products_follow_torch(kernels: Any) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert kernels._kind(torch.float32) == expected
            assert [kernels._kind(dtype) for dtype in (torch.bfloat16, torch.float16)] == ["16 bits"] * 2
    finally:
        torch.set_float32_matmul_precision(before)


# ---- on a GPU alone ----


@pytest.mark.parametrize("name", ["conr-paper", "supcon", "info_nce-symmetric"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_runs_without_waiting_and_in_a_graph(device: torch.device, use: Any, name: str, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    loss = LOSSES[name]
    for mode in MODES if name in CONR else MODES[:2]:
        use(mode)
        features, arguments = problem_of(loss, 600, dtype, device)
        upstream_gradient = torch.tensor(0.7, dtype=dtype, device=device)

        def step(features: Any = features, arguments: Any = arguments, above: Any = upstream_gradient) -> list[Tensor]:
            value = loss.fused(*features, **arguments)
            return [value.detach(), *torch.autograd.grad(value, features, above)]

        assert_runs_without_waiting_and_in_a_graph(step)


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_samples(kernels: Any, triton_device: torch.device, dtype: torch.dtype) -> None:
    """The tiles and blocks of real use; more pairs than 32 bits count, of which some rows are checked."""
    count, few = 70_000, slice(69_900, 69_950)
    query, key = (torch.randn(count, 18, device=triton_device).to(dtype) for _ in range(2))
    options = (None, None, None, 0.07, True)
    forward = (query, key, *options, True, True, 0, NONE, torch.float32, [False, False])
    losses, *statistics, _, _ = kernels.info_nce(*forward)
    grad_rows = upstream(count, dtype, triton_device)
    gradients = kernels.info_nce_backward(
        grad_rows, grad_rows, query, key, *options[:3], *statistics, *options[3:], 0, [True, True]
    )
    q, k = (torch.nn.functional.normalize(side.double()) for side in (query, key))
    total = [torch.logsumexp(a[few] @ b.T / 0.07, 1) for a, b in ((q, k), (k, q))]
    positive = (q[few] * k[few]).sum(1) / 0.07
    assert relative_error(losses[few], (total[0] + total[1]) / 2 - positive) < 1e-5
    scores, (by_query, by_key) = q[few] @ k.T / 0.07, (side[0].double() for side in statistics)
    h = torch.exp(scores - by_query[few, None]) * grad_rows.double()[few, None]
    h = (h + torch.exp(scores - by_key) * grad_rows.double()) / 0.07
    h[torch.arange(50), torch.arange(69_900, 69_950)] -= 2 * grad_rows.double()[few] / 0.07
    dz = h @ k
    exact = (dz - q[few] * (q[few] * dz).sum(1, keepdim=True)) / query[few].double().norm(dim=1, keepdim=True)
    assert relative_error(gradients[0][few], exact) < 4 * ROUNDOFF[dtype] + 1e-5

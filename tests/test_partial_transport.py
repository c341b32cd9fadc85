"""Progressive partial transport: against golden files, the reference, Sinkhorn transport and laws; its module."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import pyreg.functional
from bench import bench_partial_transport, memory
from pyreg.functional import progressive_partial_transport, semantic_partial_transport
from pyreg.nn import ProgressivePseudoLabels
from pyreg.ops import partial_transport as ops
from pyreg.reference import partial_transport as reference
from pyreg.transport import ConvergenceWarning
from tests.oracle import FLOAT_DTYPES, assert_as_accurate, relative_error

GOLDEN = Path(__file__).parent / "golden"
DOUBLE = torch.float64

# Converged to rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
CONVERGED: dict[str, Any] = {"tol": 1e-12, "max_iter": 20000}
pytestmark = pytest.mark.filterwarnings("error::pyreg.transport.ConvergenceWarning")


def logits_of(n: int = 23, k: int = 5, scale: float = 2.0) -> Tensor:
    """Some classes have most of the samples."""
    return scale * (torch.randn(n, k, dtype=DOUBLE) + torch.linspace(0, 1, k, dtype=DOUBLE))


def features_of(n: int = 23, d: int = 4) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=DOUBLE))


def prior_of(k: int = 5) -> Tensor:
    weights = torch.rand(k, dtype=DOUBLE) + 0.1
    return weights / weights.sum()


def golden(number: int) -> tuple[Tensor, Tensor, dict[str, float], dict[str, Any], dict[str, Tensor]]:
    data = np.load(GOLDEN / f"ppot_{number}.npz")
    problem = {key: data[name].item() for key, name in (("mass", "rho"), ("gamma", "gamma"), ("epsilon", "epsilon"))}
    steps = {"semantic_weight": data["mm_lambda"].item(), "mm_iter": data["mm_iters"].item(), "mm_tol": 0.0}
    plans = {name: torch.from_numpy(data[f"{name}_plan_times_n"]).double() for name in ("ppot", "sp2ot")}
    return torch.from_numpy(data["logits"]), torch.from_numpy(data["similarity"]), problem, steps, plans


def solved(
    logits: Tensor, gain: Tensor | None = None, *, mass: float = 0.5, epsilon: float = 0.1, gamma: float = 1.0
) -> list[Tensor]:
    """The operator's results."""
    k = logits.shape[1]
    targets = torch.tensor([mass / k] * k + [1 - mass], dtype=DOUBLE)
    start = torch.zeros_like(targets)
    return torch.ops.pyreg.partial_transport(logits, gain, targets, start, epsilon, gamma, 20000, 1e-12, True)  # type: ignore[no-any-return]


# ---- right: golden files, the reference, other algebra ----


@pytest.mark.not_emulated
@pytest.mark.parametrize("number", range(2))
def test_golden(device: torch.device, number: int) -> None:
    logits, similarity, problem, steps, plans = golden(number)
    logits, similarity = logits.to(device), similarity.to(device)
    labels = progressive_partial_transport(logits, **problem, **CONVERGED).cpu()
    torch.testing.assert_close(labels, plans["ppot"], rtol=0, atol=1e-7)
    labels = semantic_partial_transport(logits, similarity, **problem, **steps, **CONVERGED).cpu()
    torch.testing.assert_close(labels, plans["sp2ot"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("number", range(2))
def test_golden_at_default_tolerance(number: int) -> None:
    logits, similarity, problem, steps, plans = golden(number)
    for dtype in (torch.float32, DOUBLE):
        inputs = logits.to(dtype), similarity.to(dtype)
        labels = progressive_partial_transport(inputs[0], **problem).double()
        torch.testing.assert_close(labels, plans["ppot"], rtol=0, atol=1e-5)
        labels = semantic_partial_transport(*inputs, **problem, **steps).double()
        torch.testing.assert_close(labels, plans["sp2ot"], rtol=0, atol=1e-5)


GRID = list(itertools.product([0.1, 0.7, 1.0], [0.02, 0.1, 1.0], [0.05, 1.0, math.inf], [False, True]))


@pytest.mark.not_emulated
@pytest.mark.parametrize(("mass", "epsilon", "gamma", "has_prior"), GRID)
def test_against_reference(device: torch.device, mass: float, epsilon: float, gamma: float, has_prior: bool) -> None:
    logits = logits_of()
    options: dict[str, Any] = {"mass": mass, "epsilon": epsilon, "gamma": gamma, "max_iter": 20000}
    prior = prior_of() if has_prior else None
    expected = reference.progressive_partial_transport(logits, prior=prior, tol=1e-13, **options)
    prior = prior.to(device) if has_prior else None
    actual = progressive_partial_transport(logits.to(device), prior=prior, tol=1e-13, **options)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 2, 7, 40])
@pytest.mark.parametrize("epsilon", [0.01, 0.1])
@pytest.mark.parametrize("scale", [0.1, 30.0, 1000.0])
def test_iterations_are_the_reference_s(scale: float, epsilon: float, iterations: int) -> None:
    """One by one, where a kernel in the released form would have no numbers."""
    for mass, gamma in itertools.product([1e-6, 0.5, 1.0], [0.1, 1.0, math.inf]):
        logits = scale * (2 * torch.rand(29, 7, dtype=DOUBLE) - 1)
        options: dict[str, Any] = {"epsilon": epsilon, "gamma": gamma, "max_iter": iterations, "tol": 0}
        expected = reference.progressive_partial_transport(logits, mass, **options)
        actual = progressive_partial_transport(logits, mass=mass, **options)
        assert relative_error(actual, expected) < 1e-11


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 60),
    k=st.integers(1, 40),
    mass=st.floats(1e-6, 1.0),
    epsilon=st.floats(0.01, 10.0),
    gamma=st.floats(0.01, 100.0),
    scale=st.floats(0.0, 1000.0),
)
def test_any_problem(seed: int, n: int, k: int, mass: float, epsilon: float, gamma: float, scale: float) -> None:
    n = max(n, k)
    logits = scale * torch.randn(n, k, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"epsilon": epsilon, "gamma": gamma, "max_iter": 9, "tol": 0}
    expected = reference.progressive_partial_transport(logits, mass, **options)
    for dtype in (DOUBLE, torch.float32):
        labels = progressive_partial_transport(logits.to(dtype), mass=mass, **options)
        assert labels.isfinite().all()
        assert (labels >= 0).all()
        assert (labels.sum(1) <= 1 + 1e-6).all()
        if dtype == DOUBLE:
            torch.testing.assert_close(labels, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.not_emulated
@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_all_mass_is_unbalanced_transport(device: torch.device, gamma: float) -> None:
    """Without a virtual class: transport with rows that hold and columns that are penalised."""
    logits = logits_of().to(device)
    labels = progressive_partial_transport(logits, mass=1.0, gamma=gamma, **CONVERGED)
    cost = -logits.log_softmax(1)
    options: dict[str, Any] = {"rho_b": gamma, "reference": "counting", "tol": 1e-14, "max_iter": 20000}
    transport = pyreg.functional.sinkhorn(cost, epsilon=0.1, **options)
    torch.testing.assert_close(labels, 23 * transport.plan(), rtol=1e-9, atol=1e-10)


@pytest.mark.not_emulated
def test_is_transport_to_one_more_class(device: torch.device) -> None:
    logits, mass, gamma = logits_of().to(device), 0.4, 0.7
    cost = torch.cat([-logits.log_softmax(1), logits.new_zeros(23, 1)], dim=1)
    weights = torch.tensor([mass / 5] * 5 + [1 - mass], dtype=DOUBLE, device=device)
    rho = torch.tensor([gamma] * 5 + [math.inf], dtype=DOUBLE, device=device)
    options: dict[str, Any] = {"rho_b": rho, "reference": "counting", "tol": 1e-14, "max_iter": 50000}
    plan = pyreg.functional.sinkhorn(cost, None, weights, epsilon=0.1, **options).plan()
    labels = progressive_partial_transport(logits, mass=mass, gamma=gamma, **CONVERGED)
    torch.testing.assert_close(labels, 23 * plan[:, :5], rtol=1e-8, atol=1e-9)


def test_composition_of_transport_is_the_kernel(device: torch.device) -> None:
    """What runs on CUDA; here on whatever kernel of Sinkhorn's iteration the device stands for."""
    for k, mass, gamma in ((5, 0.5, 1.0), (5, 1.0, 1.0), (3, 0.2, math.inf), (1, 0.3, 0.1)):
        logits, gain = logits_of(17, k).to(device), 0.1 * torch.rand(17, k, dtype=DOUBLE).to(device)
        targets = torch.tensor([mass / k] * k + [1 - mass], dtype=DOUBLE, device=device)
        start = torch.zeros_like(targets)
        composed = ops._on_cuda(logits, gain, targets, start, 0.1, gamma, 5000, 1e-13, True)
        expected = solved(logits.cpu(), gain.cpu(), mass=mass, gamma=gamma)
        torch.testing.assert_close(composed[0].cpu(), expected[0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(composed[4].cpu(), expected[4], rtol=1e-8, atol=1e-9)
        if gamma < math.inf:
            torch.testing.assert_close(composed[1].cpu(), expected[1], rtol=1e-6, atol=1e-6)
        few = ops._on_cuda(logits, gain, targets, start, 0.1, gamma, 11, 0.0, False)
        assert few[3].item() == 11


@pytest.mark.not_emulated
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "epsilon"), [(300, 7, 0.1), (5000, 30, 0.1), (300, 16, 0.02)])
def test_dtypes(device: torch.device, n: int, k: int, epsilon: float, dtype: torch.dtype) -> None:
    logits = logits_of(n, k).to(device=device, dtype=dtype)
    working = DOUBLE if dtype == DOUBLE else torch.float32
    options: dict[str, Any] = {"mass": 0.6, "epsilon": epsilon, "max_iter": 30, "tol": 0}
    labels = progressive_partial_transport(logits, **options)
    assert labels.dtype == working
    if device.type == "cuda":  # shifts of scalings at other times: converged ones are compared
        return
    plain = reference.progressive_partial_transport(logits.to(working), **options)
    truth = reference.progressive_partial_transport(logits.double(), **options)
    assert_as_accurate(labels, plain, truth, floor=4)


@pytest.mark.parametrize(("scale", "epsilon"), [(1.0, 0.01), (1000.0, 0.01), (1000.0, 0.1)])
def test_float32_where_exponentials_have_no_numbers(scale: float, epsilon: float) -> None:
    logits = (scale * (2 * torch.rand(97, 13) - 1)).float()
    for mass in (1e-6, 0.5, 1.0):
        options: dict[str, Any] = {"mass": mass, "epsilon": epsilon, "max_iter": 50, "tol": 0}
        truth = reference.progressive_partial_transport(logits.double(), **options)
        plain = reference.progressive_partial_transport(logits, **options)
        labels = progressive_partial_transport(logits, **options)
        assert_as_accurate(labels, plain, truth, floor=32)


# ---- laws ----


@pytest.mark.not_emulated
@pytest.mark.parametrize("mass", [1e-6, 0.3, 1.0])
def test_masses(device: torch.device, mass: float) -> None:
    labels = progressive_partial_transport(logits_of(200).to(device), mass=mass, **CONVERGED)
    assert (labels >= 0).all()
    assert (labels.sum(1) <= 1 + 1e-12).all()
    assert labels.sum().item() == pytest.approx(200 * mass, rel=1e-9 / mass**0.5)


@pytest.mark.not_emulated
@pytest.mark.parametrize("value", [0.0, 1000.0])
def test_constant_logits_give_the_uniform_answer(device: torch.device, value: float) -> None:
    for dtype in (DOUBLE, torch.float32):
        logits = torch.full((12, 4), value, dtype=dtype, device=device)
        labels = progressive_partial_transport(logits, mass=0.3)
        torch.testing.assert_close(labels, torch.full_like(labels, 0.3 / 4), rtol=1e-5, atol=0)
        labels = semantic_partial_transport(logits, torch.ones_like(logits @ logits.mT), mass=0.3)
        torch.testing.assert_close(labels, torch.full_like(labels, 0.3 / 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [1e4, 1e9, math.inf])
def test_large_gamma_balances_the_classes(gamma: float) -> None:
    prior = prior_of()
    logits = logits_of(50)
    labels = progressive_partial_transport(logits, mass=0.5, gamma=gamma, **CONVERGED)
    torch.testing.assert_close(
        labels.sum(0) / 50, torch.full((5,), 0.1, dtype=DOUBLE), rtol=1e-2 if gamma < 1e5 else 1e-6, atol=0
    )
    labels = progressive_partial_transport(logits, mass=0.5, gamma=math.inf, prior=prior, **CONVERGED)
    shares = labels.sum(0) / 25
    torch.testing.assert_close(shares.sort().values, prior.sort().values, rtol=1e-8, atol=0)


def test_largest_share_goes_to_the_class_of_the_largest_cost() -> None:
    logits = logits_of(60)
    prior = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25], dtype=DOUBLE)
    shares = progressive_partial_transport(logits, mass=0.5, gamma=math.inf, prior=prior, **CONVERGED).sum(0)
    order = (-logits.log_softmax(1)).sum(0).argsort(descending=True)
    assert (shares[order].diff() < 0).all()


def test_class_without_a_share_gets_nothing() -> None:
    prior = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0], dtype=DOUBLE)
    for logits in (logits_of(), logits_of().float()):
        labels = progressive_partial_transport(logits, mass=0.5, prior=prior)
        assert (labels.sum(0) == 0).sum() == 3
        assert labels.sum().item() == pytest.approx(0.5 * 23, rel=1e-4)


def test_classes_and_samples_may_be_renamed() -> None:
    logits, rows, columns = logits_of(), torch.randperm(23), torch.randperm(5)
    labels = progressive_partial_transport(logits, mass=0.5, **CONVERGED)
    renamed = progressive_partial_transport(logits[rows][:, columns], mass=0.5, **CONVERGED)
    torch.testing.assert_close(renamed, labels[rows][:, columns], **EXACT)


def test_constants_added_to_rows_are_nothing() -> None:
    logits = logits_of()
    shifted = logits + 100 * torch.randn(23, 1, dtype=DOUBLE)
    labels = [progressive_partial_transport(x, mass=0.5, **CONVERGED) for x in (logits, shifted)]
    torch.testing.assert_close(*labels, **EXACT)


def test_small_masses_converge_in_few_iterations() -> None:
    logits = logits_of(500, 20)
    for mass in (1e-6, 0.1, 0.5):
        progressive_partial_transport(logits, mass=mass, max_iter=150, tol=1e-9)  # a warning is an error


# ---- semantic ----


@pytest.mark.not_emulated
@pytest.mark.parametrize("mass", [0.2, 1.0])
def test_semantic_against_reference(device: torch.device, mass: float) -> None:
    logits, z, prior = logits_of(), features_of(), prior_of()
    lopsided = torch.rand(23, 23, dtype=DOUBLE)
    for similarity, given_features in ((z @ z.mT, z), (lopsided, None)):
        options: dict[str, Any] = {"mass": mass, "semantic_weight": 2.0, "mm_iter": 4, "prior": prior}
        expected = reference.semantic_partial_transport(logits, similarity, tol=1e-13, max_iter=20000, **options)
        options |= {"mm_tol": 0, "prior": prior.to(device), **CONVERGED}
        labels = semantic_partial_transport(logits.to(device), similarity.to(device), **options)
        torch.testing.assert_close(labels.cpu(), expected, rtol=1e-7, atol=1e-8)
        if given_features is not None:
            labels = semantic_partial_transport(logits.to(device), features=given_features.to(device), **options)
            torch.testing.assert_close(labels.cpu(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_semantic_dtypes(dtype: torch.dtype) -> None:
    logits, z = logits_of(200, 6).to(dtype), features_of(200).to(dtype)
    working = DOUBLE if dtype == DOUBLE else torch.float32
    options: dict[str, Any] = {"mass": 0.5, "semantic_weight": 1.0, "mm_iter": 3, "mm_tol": 0, "tol": 1e-6}
    labels = semantic_partial_transport(logits, features=z, **options)
    assert labels.dtype == working
    truth = z.double() @ z.double().mT
    options = {"mass": 0.5, "semantic_weight": 1.0, "mm_iter": 3, "tol": 1e-12}
    expected = reference.semantic_partial_transport(logits.double(), truth, **options)
    torch.testing.assert_close(labels.double(), expected, rtol=0, atol=1e-5)


def test_semantic_steps_end_at_their_tolerance() -> None:
    logits, z = logits_of(), features_of()
    options: dict[str, Any] = {"mass": 0.5, "semantic_weight": 1.0, **CONVERGED}
    many = semantic_partial_transport(logits, features=z, mm_iter=200, mm_tol=1e-13, **options)
    more = semantic_partial_transport(logits, features=z, mm_iter=60, mm_tol=0, **options)
    torch.testing.assert_close(many, more, rtol=0, atol=1e-5)
    first = semantic_partial_transport(logits, features=z, mm_iter=1, mm_tol=0, **options)
    second = semantic_partial_transport(logits, features=z, mm_iter=2, mm_tol=0, **options)
    assert not torch.equal(first, second)
    # The first objective has none before it: the steps end after the second at the earliest.
    torch.testing.assert_close(
        semantic_partial_transport(logits, features=z, mm_iter=50, mm_tol=1e3, **options), second, **EXACT
    )


def test_alike_samples_get_alike_labels() -> None:
    """Two groups, whose logits are noise."""
    group = torch.arange(40) % 2
    similarity = (group[:, None] == group).double()
    logits = 0.3 * torch.randn(40, 2, dtype=DOUBLE) + 0.3 * torch.nn.functional.one_hot(group, 2)
    options: dict[str, Any] = {"mass": 0.9, **CONVERGED}
    spread = [
        (labels / labels.sum(1, keepdim=True))[group == 0].var(0).sum().item()
        for labels in (
            progressive_partial_transport(logits, **options),
            semantic_partial_transport(logits, similarity, semantic_weight=0.5, **options),
        )
    ]
    assert spread[1] < 0.8 * spread[0]


def test_energy_of_the_operator() -> None:
    logits, gain = logits_of(), torch.rand(23, 5, dtype=DOUBLE)
    for x, g in ((logits, gain), (logits.float(), gain.float())):
        labels, _, _, _, energy = torch.ops.pyreg.partial_transport(
            x, g, torch.tensor([0.1] * 5 + [0.5], dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE), 0.1, 1.0, 50, 0.0, True
        )
        q = labels.double() / 23
        expected = (q * -logits.log_softmax(1)).sum() + 0.1 * torch.xlogy(q, q).sum()
        assert energy.item() == pytest.approx(expected.item(), rel=1e-5 if x.dtype == torch.float32 else 1e-12)


# ---- edges ----


SIZES = [(1, 1), (7, 7), (13, 1), (31, 17), (64, 16), (257, 100), (1009, 8), (4099, 37)]


@pytest.mark.not_emulated
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_sizes(device: torch.device, n: int, k: int) -> None:
    logits = logits_of(n, k)
    options: dict[str, Any] = {"mass": 0.4, "epsilon": 0.3}
    expected = reference.progressive_partial_transport(logits, **options)
    for dtype, atol in ((DOUBLE, 1e-9), (torch.float32, 2e-5)):
        tol = 1e-12 if dtype == DOUBLE else 1e-6
        labels = progressive_partial_transport(logits.to(device=device, dtype=dtype), tol=tol, max_iter=5000, **options)
        assert labels.is_contiguous()
        torch.testing.assert_close(labels.cpu().double(), expected, rtol=0, atol=atol)


@pytest.mark.not_emulated
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_non_contiguous(device: torch.device, dtype: torch.dtype) -> None:
    logits, z = logits_of(40, 6).to(device, dtype), features_of(40, 8).to(device, dtype)
    wide = torch.stack([logits, logits.flip(0)], dim=2)
    for view in (wide[..., 0], logits.mT.contiguous().mT, logits.expand(40, 6)):
        assert torch.equal(
            progressive_partial_transport(view, mass=0.5), progressive_partial_transport(logits, mass=0.5)
        )
        labels = semantic_partial_transport(view, features=z.mT.contiguous().mT, mass=0.5)
        torch.testing.assert_close(labels, semantic_partial_transport(logits, features=z, mass=0.5), rtol=0, atol=2e-5)


def test_expanded_logits() -> None:
    logits = logits_of(1, 4).expand(9, 4)
    torch.testing.assert_close(
        progressive_partial_transport(logits, mass=0.5, **CONVERGED),
        progressive_partial_transport(logits.contiguous(), mass=0.5, **CONVERGED),
        rtol=0,
        atol=0,
    )


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.cpu_only
def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    for logits in (logits_of(5000, 37).float(), logits_of(5000, 48)):
        results = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            results.append(progressive_partial_transport(logits, mass=0.5, max_iter=20, tol=0))
        assert all(torch.equal(result, results[0]) for result in results)


def test_arguments_are_left_alone() -> None:
    logits, z, prior = logits_of(64, 16), features_of(64), prior_of(16)
    before = [tensor.clone() for tensor in (logits, z, prior)]
    progressive_partial_transport(logits, mass=0.5, prior=prior)
    semantic_partial_transport(logits, features=z, mass=0.5, prior=prior)
    assert all(map(torch.equal, (logits, z, prior), before))


@pytest.mark.cpu_only
def test_memory() -> None:
    """Beside the result, at most three times as much."""
    for k in (100, 112):
        logits, z = torch.randn(100000, k), torch.randn(100000, 8) / 3
        assert _peak_of(logits) < 2.5
        assert _peak_of(logits, z) < 4.3


def _peak_of(logits: Tensor, z: Tensor | None = None) -> float:
    """Times the logits, the result included. Of three calls the least: what a call needs it needs every time, and what
    the process does beside it, such as a library's first buffers, only adds."""
    options: dict[str, Any] = {"mass": 0.5, "max_iter": 3, "tol": 0}

    def call() -> Tensor:
        if z is None:
            return progressive_partial_transport(logits, **options)
        return semantic_partial_transport(logits, features=z, mm_iter=2, **options)

    return min(memory.peak_extra_bytes(call, "cpu", logits.nbytes) for _ in range(3)) / logits.nbytes


# ---- convergence ----


def test_warning() -> None:
    logits = logits_of()
    text = (
        r"progressive_partial_transport: not converged: after 3 iterations the error is .*, above tol = 1e-09; raise "
        r"max_iter \(here 3\), epsilon or tol"
    )
    with pytest.warns(ConvergenceWarning, match=text) as caught:
        progressive_partial_transport(logits, mass=0.5, max_iter=3, tol=1e-9)
    assert caught[0].filename == __file__
    with pytest.warns(ConvergenceWarning, match="semantic_partial_transport: not converged"):
        semantic_partial_transport(logits, features=features_of(), mass=0.5, max_iter=3, tol=1e-9)
    progressive_partial_transport(logits, mass=0.5, max_iter=3, tol=0)


def test_iterations_end_at_the_tolerance() -> None:
    *_, error, iterations, _ = solved(logits_of())
    assert error.item() <= 1e-12
    assert 5 < iterations.item() < 1000


# ---- a citizen of torch ----


@pytest.mark.not_emulated
def test_no_gradient(device: torch.device) -> None:
    logits = logits_of().to(device).requires_grad_()
    z = features_of().to(device).requires_grad_()
    assert not progressive_partial_transport(logits, mass=0.5).requires_grad
    assert not semantic_partial_transport(logits, features=z, mass=0.5).requires_grad
    labels = progressive_partial_transport(logits, mass=0.5)
    (gradient,) = torch.autograd.grad(-(labels * logits.log_softmax(1)).sum(), logits)
    expected = labels.sum(1, keepdim=True) * logits.softmax(1) - labels
    torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.not_emulated
def test_opcheck(device: torch.device) -> None:
    targets = torch.tensor([0.1] * 5 + [0.5], dtype=DOUBLE, device=device)
    start = torch.zeros_like(targets)
    for dtype in (DOUBLE, torch.float32, torch.bfloat16):
        logits = logits_of().to(device, dtype)
        gain = torch.zeros(23, 5, dtype=DOUBLE if dtype == DOUBLE else torch.float32, device=device)
        for each in (None, gain):
            opcheck(torch.ops.pyreg.partial_transport.default, (logits, each, targets, start, 0.1, 1.0, 5, 0.0, True))
        z = features_of().to(device, dtype)
        for alike, is_features in ((z, True), (z @ z.mT, False)):
            arguments = (logits, alike, is_features, targets, 0.5, 3, 0.0, 0.1, 1.0, 5, 0.0)
            opcheck(torch.ops.pyreg.semantic_partial_transport.default, arguments)


def test_compile() -> None:
    logits, z, prior = logits_of(), features_of(), prior_of()

    def labels(logits: Tensor, z: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        first = progressive_partial_transport(2 * logits, mass=0.5, prior=prior)
        return first + 1, semantic_partial_transport(logits, features=z, mass=0.5) * 2

    compiled = torch.compile(labels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, z, prior), labels(logits, z, prior), **EXACT)


def test_torch_func() -> None:
    logits, z, prior = torch.stack([logits_of(), logits_of()]), torch.stack([features_of()] * 2), prior_of()

    def labels(logits: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        first = progressive_partial_transport(logits, mass=0.5, prior=prior, **CONVERGED)
        return first, semantic_partial_transport(logits, features=z, mass=0.5, **CONVERGED)

    batched = torch.func.vmap(labels)(logits, z)
    for i in range(2):
        torch.testing.assert_close(tuple(part[i] for part in batched), labels(logits[i], z[i]), **EXACT)

    def loss(logits: Tensor) -> Tensor:
        return -(progressive_partial_transport(logits, mass=0.5) * logits.log_softmax(1)).sum()

    leaf = logits[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits[0]), expected, **EXACT)


def test_autocast_changes_nothing() -> None:
    logits, z = logits_of().float(), features_of().float()
    expected = progressive_partial_transport(logits, mass=0.5), semantic_partial_transport(logits, features=z, mass=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = (
            progressive_partial_transport(logits, mass=0.5),
            semantic_partial_transport(logits, features=z, mass=0.5),
        )
    assert all(map(torch.equal, actual, expected))


def test_meta() -> None:
    logits = torch.empty(9, 4, dtype=torch.bfloat16, device="meta")
    labels = progressive_partial_transport(logits, mass=0.5)
    assert labels.shape == (9, 4)
    assert labels.dtype == torch.float32
    assert labels.is_meta


# ---- bad input ----

LOGITS, Z = torch.arange(12.0).reshape(4, 3), torch.ones(4, 2)
NAN = torch.tensor([[0.0, 1.0], [math.nan, 2.0]])

BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([1.0], {}, TypeError, "expected logits to be a tensor, got list"),
    (LOGITS.long(), {}, TypeError, r"expected logits to be float64, .* got torch.int64; convert it with logits.float"),
    (LOGITS[0], {}, ValueError, r"expected logits of shape \[n, k\] with at least one class, got \[3\]"),
    (LOGITS[None], {}, ValueError, r"got \[1, 4, 3\]; flatten all dimensions but the last"),
    (LOGITS[:, :0], {}, ValueError, r"with at least one class, got \[4, 0\]"),
    (LOGITS[:2], {}, ValueError, r"at least as many samples as classes, got \[2, 3\]; append those of earlier batches"),
    (NAN, {}, ValueError, "expected finite numbers in logits, got nan"),
    (NAN.nan_to_num(nan=math.inf), {}, ValueError, "expected finite numbers in logits, got inf"),
    (LOGITS, {"mass": 0.0}, ValueError, r"expected mass to be a number in \(0, 1\], got 0.0"),
    (LOGITS, {"mass": 1.5}, ValueError, r"expected mass to be a number in \(0, 1\], got 1.5"),
    (LOGITS, {"mass": math.nan}, ValueError, r"expected mass to be a number in \(0, 1\], got nan"),
    (LOGITS, {"mass": "all"}, ValueError, r"expected mass to be a number in \(0, 1\], got 'all'"),
    (LOGITS, {"epsilon": 0}, ValueError, "expected epsilon to be a finite number > 0, got 0"),
    (LOGITS, {"epsilon": math.inf}, ValueError, "expected epsilon to be a finite number > 0, got inf"),
    (LOGITS, {"gamma": -1.0}, ValueError, "expected gamma to be a finite number > 0, got -1.0"),
    (LOGITS, {"gamma": math.nan}, ValueError, "expected gamma to be a finite number > 0, got nan"),
    (LOGITS, {"max_iter": 0}, ValueError, "expected max_iter to be an integer >= 1, got 0"),
    (LOGITS, {"tol": -1e-3}, ValueError, "expected tol to be a finite number >= 0, got -0.001"),
    (LOGITS, {"prior": [1 / 3] * 3}, TypeError, "expected prior to be a tensor, got list"),
    (
        LOGITS,
        {"prior": torch.ones(3).long()},
        TypeError,
        "expected prior to be floating, got torch.int64; divide counts",
    ),
    (LOGITS, {"prior": torch.ones(4) / 4}, ValueError, r"expected prior of shape \[k\] = \[3\], got \[4\]"),
    (LOGITS, {"prior": torch.ones(3)}, ValueError, r"expected prior to sum to 1, got 3; divide it by its sum"),
    (LOGITS, {"prior": torch.tensor([-0.5, 1.0, 0.5])}, ValueError, "expected prior to be at least 0, got -0.5"),
    (LOGITS, {"prior": torch.tensor([math.nan, 1, 0])}, ValueError, "expected finite numbers in prior, got nan"),
    (
        LOGITS,
        {"prior": torch.ones(3, device="meta")},
        ValueError,
        "expected prior on the device of logits, cpu, got meta",
    ),
]


@pytest.mark.parametrize(("logits", "options", "error", "text"), BAD)
def test_bad_input(logits: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    options = {"mass": 0.5, **options}
    with pytest.raises(error, match=f"^progressive_partial_transport: .*{text}"):
        progressive_partial_transport(logits, **options)
    with pytest.raises(error, match=f"^semantic_partial_transport: .*{text}"):
        semantic_partial_transport(logits, features=Z, **options)


BAD_SIMILARITY: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"expected either similarity \[n, n\] or features \[n, d\], got neither; features=z stands for"),
    ({"similarity": Z @ Z.T, "features": Z}, ValueError, "got both"),
    (
        {"similarity": Z},
        ValueError,
        r"expected similarity of shape \[n, n\] = \[4, 4\], got \[4, 2\]; give .* features=",
    ),
    ({"similarity": torch.ones(3, 3)}, ValueError, r"expected similarity of shape \[n, n\] = \[4, 4\], got \[3, 3\]$"),
    ({"similarity": [1]}, TypeError, "expected similarity to be a tensor, got list"),
    ({"similarity": (Z @ Z.T).double()}, TypeError, r"expected similarity of the dtype of logits, .*; convert it with"),
    ({"similarity": (Z @ Z.T).log() / 0}, ValueError, "expected finite numbers in similarity, got inf"),
    (
        {"similarity": torch.ones(4, 4, device="meta")},
        ValueError,
        "expected similarity on the device of logits, cpu, got",
    ),
    ({"features": torch.ones(3, 2)}, ValueError, r"expected features of shape \[n, d\] with n = 4, got \[3, 2\]"),
    ({"features": torch.ones(4)}, ValueError, r"expected features of shape \[n, d\] with n = 4, got \[4\]"),
    ({"features": torch.ones(4, 0)}, ValueError, r"expected features of shape \[n, d\] with n = 4, got \[4, 0\]"),
    ({"features": Z * math.nan}, ValueError, "expected finite numbers in features, got nan"),
    ({"features": Z, "semantic_weight": -1}, ValueError, "expected semantic_weight to be a finite number >= 0, got -1"),
    ({"features": Z, "mm_iter": 0}, ValueError, "expected mm_iter to be an integer >= 1, got 0"),
    ({"features": Z, "mm_tol": -1}, ValueError, "expected mm_tol to be a finite number >= 0, got -1"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_SIMILARITY)
def test_bad_similarity(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^semantic_partial_transport: .*{text}"):
        semantic_partial_transport(LOGITS, mass=0.5, **options)


def test_operator_refuses_what_would_read_beyond() -> None:
    targets = torch.tensor([0.1] * 3 + [0.7], dtype=DOUBLE)
    start = torch.zeros_like(targets)

    def call(logits: Tensor, gain: Tensor | None, targets: Tensor, start: Tensor, epsilon: float = 0.1) -> None:
        torch.ops.pyreg.partial_transport(logits, gain, targets, start, epsilon, 1.0, 3, 0.0, False)

    text = "expected contiguous float64 targets and initial scalings"
    for bad in (targets[:3], targets.float(), targets.repeat_interleave(2)[::2]):
        with pytest.raises((ValueError, RuntimeError), match=text):
            call(LOGITS, None, bad, start)
        with pytest.raises((ValueError, RuntimeError), match=text):
            call(LOGITS, None, targets, bad)
    with pytest.raises((ValueError, RuntimeError), match="expected a gain of the logits' shape"):
        call(LOGITS, LOGITS[:2], targets, start)
    with pytest.raises((ValueError, RuntimeError), match=r"expected logits \[n, k\]"):
        call(LOGITS[:0], None, targets, start)
    with pytest.raises((ValueError, RuntimeError), match="expected epsilon and gamma above 0"):
        call(LOGITS, None, targets, start, 0.0)


def test_nan_that_nobody_looked_for_ends() -> None:
    logits = LOGITS.clone()
    logits[1, 1] = math.nan
    targets = torch.tensor([0.1] * 3 + [0.7], dtype=DOUBLE)
    for bad in (logits, logits.nan_to_num(nan=-math.inf), logits.nan_to_num(nan=math.inf)):
        torch.ops.pyreg.partial_transport(bad, None, targets, torch.zeros_like(targets), 0.1, 1.0, 30, 1e-6, True)


@pytest.mark.cpu_only
def test_contenders_of_the_benchmark_agree() -> None:
    logits, z = logits_of(300, 8).float(), features_of(300).float()
    plain = [getattr(bench_partial_transport, name)(logits, 2000) for name in ("fused", "released", "released_32")]
    semantic = [getattr(bench_partial_transport, f"{name}_semantic")(logits, z, 2000) for name in ("fused", "released")]
    for first, *others in (plain, semantic):
        for other in others:
            torch.testing.assert_close(first.double(), other.double(), rtol=0, atol=1e-5)


# ---- the module ----


def test_ramp() -> None:
    module = ProgressivePseudoLabels(3, ramp_steps=10, start_mass=0.1, end_mass=0.8, tol=0, max_iter=1)
    logits = torch.randn(8, 3)
    masses = []
    for step in range(13):
        assert module.steps == step
        masses.append(module.mass)
        module(logits)
    expected = [0.1 + 0.7 * math.exp(-5 * (1 - min(i / 10, 1)) ** 2) for i in range(13)]
    assert masses == pytest.approx(expected)
    module.eval()
    module(logits)
    assert module.steps == 13


def test_module_without_a_bank_is_the_function() -> None:
    logits = logits_of(30, 3)
    module = ProgressivePseudoLabels(3, ramp_steps=100, epsilon=0.2, gamma=2.0, prior=prior_of(3))
    options: dict[str, Any] = {"mass": module.mass, "epsilon": 0.2, "gamma": 2.0, "prior": module.prior}
    expected = progressive_partial_transport(logits, **options)
    labels = module(logits.requires_grad_())
    assert torch.equal(labels, expected)
    assert not labels.requires_grad


def test_bank_is_a_ring() -> None:
    module = ProgressivePseudoLabels(2, ramp_steps=100, bank_size=5, dtype=DOUBLE)
    seen = torch.empty(0, 2, dtype=DOUBLE)
    for n in (2, 2, 3, 1, 9, 4, 5):
        logits = logits_of(n, 2)
        before = seen[-5:]
        assert module.bank_count == len(before)
        together = torch.cat([logits, before])
        # The order of remembered samples is nothing to the labels of the batch.
        expected = progressive_partial_transport(together, mass=module.mass)[:n]
        torch.testing.assert_close(module(logits), expected, rtol=0, atol=1e-6)
        seen = torch.cat([seen, logits])
        bank = module.bank_logits[: module.bank_count]
        torch.testing.assert_close(bank.sort(0).values, seen[-5:].sort(0).values, rtol=0, atol=0)
    module.eval()
    before = module.bank_logits.clone()
    module(logits_of(4, 2))
    assert torch.equal(module.bank_logits, before)


def test_nothing_takes_part_before_there_are_as_many_samples_as_classes() -> None:
    module = ProgressivePseudoLabels(6, ramp_steps=10, bank_size=12)
    batches = [torch.randn(3, 6).bfloat16().float() for _ in range(3)]
    assert torch.equal(module(batches[0]), torch.zeros(3, 6))
    assert module(batches[1]).sum() > 0
    assert module.steps == 2


def test_semantic_module() -> None:
    module = ProgressivePseudoLabels(
        3, ramp_steps=20, semantic_weight=0.7, feature_dim=4, bank_size=8, mm_iter=3, dtype=DOUBLE
    )
    first, second = ((logits_of(9, 3), features_of(9)) for _ in range(2))
    module(*first)
    logits = torch.cat([second[0], module.bank_logits])
    z = torch.cat([second[1], module.bank_features])
    options: dict[str, Any] = {"mass": module.mass, "semantic_weight": 0.7 * (1 - module.mass), "mm_iter": 3}
    expected = semantic_partial_transport(logits, features=z, **options)[:9]
    assert torch.equal(module(*second), expected)
    # All mass takes part: no semantic term.
    last = ProgressivePseudoLabels(3, ramp_steps=1, start_mass=1.0, semantic_weight=0.7)
    assert torch.equal(last(*first), progressive_partial_transport(first[0], mass=1.0))


def test_module_is_saved_and_copied() -> None:
    def module() -> ProgressivePseudoLabels:
        options: dict[str, Any] = {"bank_size": 8, "semantic_weight": 0.5, "feature_dim": 4, "prior": prior_of(3)}
        return ProgressivePseudoLabels(3, ramp_steps=20, dtype=DOUBLE, **options)

    used = module()
    for n in (3, 9, 5):
        used(logits_of(n, 3), features_of(n))
    file = io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    loaded = module()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    logits, z = logits_of(7, 3), features_of(7)
    copies = [copy.deepcopy(used), pickle.loads(pickle.dumps(used)), loaded]
    expected = used(logits, z)
    for each in copies:
        assert each.steps == 3
        assert each.bank_count == 8
        assert torch.equal(each(logits, z), expected)
        assert each.steps == 4
        assert torch.equal(each.bank_logits, used.bank_logits)
    assert "num_classes=3, ramp_steps=20" in repr(used)


BAD_MODULES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_classes": 0}, ValueError, "expected num_classes to be an integer >= 1, got 0"),
    ({"ramp_steps": 0}, ValueError, "expected ramp_steps to be an integer >= 1, got 0"),
    ({"ramp_steps": 1.5}, ValueError, "expected ramp_steps to be an integer >= 1, got 1.5"),
    ({"start_mass": 0.0}, ValueError, r"expected start_mass to be a number in \(0, 1\], got 0.0"),
    ({"end_mass": 2}, ValueError, r"expected end_mass to be a number in \(0, 1\], got 2"),
    ({"bank_size": -1}, ValueError, "expected bank_size to be an integer >= 0, got -1"),
    ({"semantic_weight": -0.1}, ValueError, "expected semantic_weight to be a finite number >= 0, got -0.1"),
    ({"feature_dim": 0}, ValueError, "expected feature_dim to be an integer >= 1, got 0"),
    (
        {"bank_size": 4, "semantic_weight": 1.0},
        ValueError,
        "expected feature_dim with a memory bank and a semantic_weight",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_MODULES)
def test_bad_modules(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^ProgressivePseudoLabels: {text}"):
        ProgressivePseudoLabels(**{"num_classes": 3, "ramp_steps": 5, **options})


BAD_CALLS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((torch.ones(4, 2), Z), ValueError, r"expected logits of shape \[n, 3\], got \[4, 2\]"),
    ((LOGITS,), ValueError, r"expected features \[n, d\] with a semantic_weight above 0, got None"),
    ((LOGITS, torch.ones(4, 3)), ValueError, r"expected features of shape \[4, 2\], got \[4, 3\]"),
    ((LOGITS, torch.ones(3, 2)), ValueError, r"expected features of shape \[4, 2\], got \[3, 2\]"),
    (
        (LOGITS.double(), Z),
        TypeError,
        r"expected logits of the memory bank's dtype torch.float32 on cpu, got torch.float64",
    ),
    (([1.0], Z), TypeError, "expected logits to be a tensor, got list"),
]


@pytest.mark.parametrize(("inputs", "error", "text"), BAD_CALLS)
def test_bad_calls(inputs: tuple[Any, ...], error: type[Exception], text: str) -> None:
    module = ProgressivePseudoLabels(3, ramp_steps=5, semantic_weight=0.5, feature_dim=2, bank_size=8)
    with pytest.raises(error, match=f"^ProgressivePseudoLabels: {text}"):
        module(*inputs)

"""nn.SamplesLoss: against geomloss over its options, and against its definition in plain PyTorch."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from pyreg.functional import sinkhorn_divergence
from pyreg.nn import SamplesLoss
from pyreg.ops import samples_loss
from pyreg.reference import sinkhorn_divergence as reference
from tests.oracle import ROUNDOFF, relative_error

DOUBLE = torch.float64
pytestmark = pytest.mark.not_emulated


def clouds(*batch: int, n: int = 30, m: int = 41, d: int = 3, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    return torch.rand(*batch, n, d, dtype=dtype), torch.rand(*batch, m, d, dtype=dtype) * 0.8


def weights_for(points: Tensor, mass: float = 1.0) -> Tensor:
    weights = torch.rand(points.shape[:-1], dtype=points.dtype) + 0.1
    return mass * weights / weights.sum(-1, keepdim=True)


def results_and_gradients(loss: Any, arguments: tuple[Tensor, ...], upstream: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments]
    results = loss(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    results = tuple(result.reshape(like.shape) for result, like in zip(results, upstream, strict=True))
    found = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    zeros = (torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, found, strict=True))
    return [*results, *zeros]


# ---- right ----


@pytest.mark.parametrize("potentials", [False, True])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("p", [1, 2])
def test_geomloss(p: int, reach: float | None, debias: bool, potentials: bool) -> None:
    """Values and gradients of its tensorized backend in float64."""
    geomloss = pytest.importorskip("geomloss")
    options: dict[str, Any] = {"p": p, "reach": reach, "debias": debias, "potentials": potentials}
    grid = itertools.product([0.05, 0.3, 5.0], [None, 2.0], [0.5, 0.8], [(), (2,)], ["none", "given", "with zeros"])
    for blur, diameter, scaling, batch, kind in grid:
        x, y = clouds(*batch)
        arguments: tuple[Tensor, ...] = (x, y)
        upstream = [torch.randn(x.shape[:-1], dtype=DOUBLE), torch.randn(y.shape[:-1], dtype=DOUBLE)]
        if kind != "none":
            a, b = weights_for(x), weights_for(y, 1.3 if reach else 1.0)
            if kind == "with zeros":
                a[..., 3], b[..., 5] = 0, 0
                upstream = [upstream[0] * (a > 0), upstream[1] * (b > 0)]
            arguments = (a, x, b, y)
        if not potentials:
            upstream = [torch.randn(batch, dtype=DOUBLE)]
        options.update(blur=blur, diameter=diameter, scaling=scaling)
        actual = results_and_gradients(SamplesLoss("sinkhorn", **options), arguments, upstream)
        truth = geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options)
        expected = results_and_gradients(truth, arguments, upstream)
        for one, other in zip(actual, expected, strict=True):
            # Rounding of sums of some dozen terms; at a blur of 5 the loss is a hundredth of its terms.
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def expected(x: Tensor, y: Tensor, options: samples_loss.Options, diameter: float) -> Tensor:
    a, b = (points.new_full(points.shape[:-1], 1 / points.shape[-2]) for points in (x, y))
    steps = reference.epsilons(options.p, diameter, options.blur, options.scaling)
    return reference.samples_loss(x, y, a, b, options.p, steps, options.reach**options.p, options.debias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [2, 20])
@pytest.mark.parametrize("p", [1, 2])
def test_dtypes(device: torch.device, p: int, d: int, dtype: torch.dtype) -> None:
    """Against the definition in float64 on the same points, and no more than twice as far off as it is in the dtype
    that is computed in."""
    x, y = clouds(2, n=150, m=130, d=d, dtype=dtype)
    compute = DOUBLE if dtype == DOUBLE else torch.float32
    loss = SamplesLoss("sinkhorn", p=p, blur=0.1, diameter=2.0, scaling=0.6)
    options = samples_loss.checked(p, 0.1, None, 2.0, 0.6, True)

    def run(function: Any, *points: Tensor) -> list[Tensor]:
        leaves = [point.detach().clone().requires_grad_() for point in points]
        value = function(*leaves)
        return [value, *torch.autograd.grad(value.sum(), leaves)]

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return expected(x, y, options, 2.0)

    truth = run(plain, x.double(), y.double())
    in_dtype = run(plain, x.to(compute), y.to(compute))
    actual = run(loss, x.to(device), y.to(device))
    assert actual[0].dtype == compute
    for index, (one, other, exact) in enumerate(zip(actual, in_dtype, truth, strict=True)):
        floor = 64 * ROUNDOFF[compute] + (2 * ROUNDOFF[dtype] if index > 0 else 0)
        assert relative_error(one, exact) <= 2 * relative_error(other, exact) + floor


def test_exact_gradient() -> None:
    """With reach: the gradient of what the loss converges to, where geomloss's is short of a factor."""
    x, y = clouds(n=20, m=25)
    a, b = weights_for(x), weights_for(y, 1.3)
    options: dict[str, Any] = {
        "blur": 0.3,
        "reach": 0.5,
        "scaling": 0.995,
    }  # some two hundred iterations
    rho, epsilon = 0.25, 0.09
    x.requires_grad_()
    truth = sinkhorn_divergence(x, y, a, b, epsilon=2 * epsilon, rho=2 * rho, tol=1e-13, max_iter=10000) / 2
    (by_x,) = torch.autograd.grad(truth, x)
    exact, as_geomloss = SamplesLoss(**options, exact_gradient=True), SamplesLoss(**options)
    assert exact(a, x, b, y).item() == pytest.approx(truth.item(), rel=2e-3)
    (found,) = torch.autograd.grad(exact(a, x, b, y), x)
    assert relative_error(found, by_x) < 4e-3
    (found,) = torch.autograd.grad(as_geomloss(a, x, b, y), x)
    assert relative_error(found * (rho + epsilon) / (rho + epsilon / 2), by_x) < 4e-3


@pytest.mark.parametrize("p", [1, 2])
def test_near_convergence_it_is_the_divergence(device: torch.device, p: int) -> None:
    x, y = (points.to(device) for points in clouds(n=50, m=60))
    loss = SamplesLoss(p=p, blur=0.2, scaling=0.97)
    cost, epsilon = (("euclidean", 0.2), ("sqeuclidean", 2 * 0.2**2))[p - 1]
    divergence = sinkhorn_divergence(x, y, cost=cost, epsilon=epsilon, tol=1e-12, max_iter=20000)
    assert loss(x, y).item() == pytest.approx(divergence.item() / p, rel=2e-3)


def test_where_points_meet() -> None:
    """p = 1 has no slope there."""
    x = torch.rand(20, 2, dtype=DOUBLE)
    y = x.clone().requires_grad_()
    x.requires_grad_()
    loss = SamplesLoss(p=1, blur=0.05)(x, y)
    assert abs(loss.item()) < 1e-12
    for gradient in torch.autograd.grad(loss, (x, y)):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("scaling", [0.5, 1e-4])
def test_one_point_everywhere(d: int, scaling: float) -> None:
    """A diameter of 0; and epsilon may fall at once."""
    x = torch.ones(7, d, dtype=DOUBLE, requires_grad=True)
    loss = SamplesLoss(scaling=scaling)(x, torch.ones(5, d, dtype=DOUBLE))
    assert abs(loss.item()) < 1e-12
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.abs().max() < 1e-12
    y = torch.rand(5, d, dtype=DOUBLE)
    assert SamplesLoss(scaling=scaling)(x, y).isfinite()


@pytest.mark.parametrize("d", [3, 6])
def test_slopes_by_the_plan(monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    """Where the kernel leaves no slopes they are a pass over the plan."""
    x, y = clouds(2, d=d)
    loss = SamplesLoss(blur=0.1)
    upstream = [torch.randn(2, dtype=DOUBLE)]
    fused = results_and_gradients(loss, (x, y), upstream)
    kernel = samples_loss.symmetric_sinkhorn
    monkeypatch.setattr(samples_loss, "symmetric_sinkhorn", lambda *arguments: kernel(*arguments[:-2], False, False))
    for one, other in zip(fused, results_and_gradients(loss, (x, y), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


# ---- a citizen of torch ----


def test_shapes() -> None:
    x, y = clouds(2)
    a, b = weights_for(x), weights_for(y)
    loss, potentials = SamplesLoss(blur=0.3), SamplesLoss(blur=0.3, potentials=True)
    assert loss(x, y).shape == (2,)
    assert loss(x[0], y[0]).shape == ()
    torch.testing.assert_close(loss(a.unsqueeze(2), x, b.unsqueeze(2), y), loss(a, x, b, y), rtol=0, atol=0)
    assert [part.shape for part in potentials(a.unsqueeze(2), x, b.unsqueeze(2), y)] == [(2, 30, 1), (2, 41, 1)]
    assert [part.shape for part in potentials(x[0], y[0])] == [(30,), (41,)]
    assert loss(x[:0], y[:0]).shape == (0,)


def test_second_order_is_refused_and_first_is_not() -> None:
    x, y = clouds()
    x.requires_grad_()
    loss = SamplesLoss(blur=0.3)
    (by_x,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    torch.testing.assert_close(by_x.detach(), torch.autograd.grad(loss(x, y), x)[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), y), by_x.detach(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"SamplesLoss: no second derivatives.*sinkhorn_divergence"):
        by_x.square().sum().backward()


def test_compile_and_opcheck() -> None:
    x, y = clouds(2)
    for diameter in (None, 1.5):
        loss = SamplesLoss(blur=0.3, diameter=diameter)
        upstream = [torch.randn(2, dtype=DOUBLE)]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = results_and_gradients(loss, (x, y), upstream)
        for one, other in zip(results_and_gradients(compiled, (x, y), upstream), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    a, b = weights_for(x), weights_for(y)
    for debias in (True, False):
        options = (2, 0.3, math.inf, 1.5, 0.5, debias, True, True)
        operator = torch.ops.pyreg.samples_loss_potentials.default
        opcheck(operator, (x.requires_grad_(), y.requires_grad_(), a, b, *options))


def test_vmap_and_autocast() -> None:
    x, y = clouds(3)
    loss = SamplesLoss(blur=0.3)
    each = torch.stack([loss(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, y), each, rtol=1e-12, atol=1e-14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(x[0], y[0]), each[0], rtol=0, atol=0)


def test_module() -> None:
    loss = SamplesLoss("sinkhorn", 1, 0.2, reach=0.7, scaling=0.6)
    x, y = clouds()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin(x, y), loss(x, y), rtol=0, atol=0)
    assert repr(loss) == "SamplesLoss(p=1, blur=0.2, reach=0.7, diameter=None, scaling=0.6, debias=True)"
    loss.blur = 0.4  # as geomloss's attributes, which schedules change
    torch.testing.assert_close(loss(x, y), SamplesLoss(p=1, blur=0.4, reach=0.7, scaling=0.6)(x, y), rtol=0, atol=0)


# ---- hard to misuse ----


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "energy"}, "expected loss to be 'sinkhorn', got 'energy'; kernel losses"),
        ({"p": 3}, "expected p to be 1 or 2, got 3; use pyreg.functional.sinkhorn"),
        ({"blur": 0}, "expected blur to be a finite number > 0, got 0"),
        ({"reach": -1}, "expected reach to be a finite number > 0, got -1"),
        ({"diameter": 0}, "expected diameter to be a finite number > 0, got 0"),
        ({"scaling": 1.0}, "expected scaling to be between 0 and 1, got 1.0"),
        ({"cost": torch.cdist}, r"expected cost to be None.*use pyreg.functional.sinkhorn on cost\(x, y\)"),
        ({"kernel": 1}, "expected kernel to be None"),
        ({"cluster_scale": 0.1}, "expected cluster_scale to be None, for no clusters are made, got 0.1"),
        ({"backend": "cuda"}, "expected backend to be one of 'auto', 'tensorized', 'online', 'multiscale', got 'cuda'"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="SamplesLoss: " + text):
        SamplesLoss(**options)


X, Y = torch.rand(5, 2), torch.rand(6, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((X,), ValueError, r"expected \(x, y\) or \(a, x, b, y\), got 1 arguments"),
        ((X[:, 0], X[:, 0], X, X[:, 0], X[:, 0], X), ValueError, "labels of clusters are of geomloss's multiscale"),
        ((X, Y[:, :1]), ValueError, "with the same batch and dimension"),
        ((X[None, None], Y[None, None]), ValueError, r"expected x of shape \[n, d\] or \[B, n, d\]"),
        ((X[:, 0], X, Y[:5, 0], Y), ValueError, r"expected b of shape \[..., m\] = \[6\] or \[6, 1\], got \[5\]"),
        ((-X[:, 0], X, Y[:, 0], Y), ValueError, "expected a to be at least 0"),
        ((X[:, 0] / 0, X, Y[:, 0], Y), ValueError, "expected finite numbers in a"),
        ((X[:, 0].long(), X, Y[:, 0], Y), TypeError, "expected a to be float64"),
        ((X / 0, Y), ValueError, "expected finite numbers in x"),
        ((X, Y.double()), TypeError, "expected y of the dtype of x"),
        (("x", Y), TypeError, "expected x to be a tensor"),
    ],
)
def test_bad_samples(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="SamplesLoss: .*" + text):
        SamplesLoss()(*arguments)

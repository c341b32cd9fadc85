"""Entropic transport under costs and between points, and what is made of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pyreg import functional as F
from pyreg.nn import SamplesLoss
from pyreg.reference import monge_gap as monge_reference
from pyreg.reference import partial_transport as partial_reference
from pyreg.reference import sinkhorn as reference
from pyreg.reference import sinkhorn_divergence as divergence_reference
from pyreg.transport import ConvergenceWarning, Transport
from tests.fuzz.agreement import assert_agrees
from tests.fuzz.tensors import LAYOUTS, Recipe, dtypes, seeds, weights

COUNTS = (1, 2, 3, 5, 8, 17)
BATCHES = ((), (), (2,), (2, 1))
MOST_ITERATIONS = 500
# Costs of these epsilons, in shares of their range, are solved to rounding in some hundred iterations.
SHARES = (0.1, 0.3, 1.0, 100.0)
COSTS = ("sqeuclidean", "euclidean", "cosine")


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == torch.float64 else 1e-6


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _solved(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """None where the iteration has not converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return function(*arguments, **options)
        except ConvergenceWarning:
            return None


@dataclass(frozen=True)
class Marginals:
    """Weights of both sides, and their penalties in epsilons, at first."""

    a: str | None
    b: str | None
    rho_a: float
    rho_b: float
    counting: bool
    seed: int

    @property
    def is_balanced(self) -> bool:
        return self.rho_a == self.rho_b == math.inf

    def at(self, epsilon: float) -> Marginals:
        """Penalties as they are."""
        return replace(self, rho_a=self.rho_a * epsilon, rho_b=self.rho_b * epsilon)

    def weights(self, shape: tuple[int, ...], kind: str | None, seed: int, dtype: torch.dtype) -> Tensor:
        if kind is None or dtype.itemsize == 2:  # whose sums would be rounded
            return torch.ones(shape, dtype=dtype)
        result = weights(shape, dtype, kind, seed)
        result[..., 0] = result[..., 0].clamp(min=0.25)
        return result

    def normalised(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The constant that is free in gradients by balanced weights is nothing to weights of sum 1."""
        return a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)

    def arguments(self, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """In 16 bits, whose sums are rounded, the weights that there are without any."""
        return self.normalised(a, b) if a.dtype.itemsize > 2 else (None, None)


def marginals() -> st.SearchStrategy[Marginals]:
    kinds = st.sampled_from([None, "random", "zeros among", "wide"])
    rhos = st.sampled_from([math.inf, math.inf, 1e-3, 0.3, 5.0])
    return st.builds(Marginals, kinds, kinds, rhos, rhos, st.booleans(), seeds())


def _reference_value(cost: Tensor, a: Tensor, b: Tensor, epsilon: Any, of: Marginals) -> tuple[Tensor, Tensor]:
    name = "counting" if of.counting else "product"
    options = epsilon, of.rho_a, of.rho_b, name
    with torch.no_grad():
        tol = 1e-14 if cost.dtype == torch.float64 else 1e-6
        f, g = reference.sinkhorn(cost, a, b, *options, max_iter=MOST_ITERATIONS, tol=tol)
    if of.counting:  # of weights of 0 they are infinite
        f, g = f.nan_to_num(neginf=0.0), g.nan_to_num(neginf=0.0)
    plan = reference.plan(cost, a, b, f, g, epsilon, name)
    if of.counting:
        plan = plan * (a > 0).unsqueeze(-1) * (b > 0).unsqueeze(-2)
    return _value_of(cost, a, b, f, g, plan, epsilon, of), plan.detach()


def _value_of(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, plan: Tensor, epsilon: Any, of: Marginals
) -> Tensor:
    mass = plan.sum((-2, -1))
    if not of.counting:
        mass = mass - a.sum(-1) * b.sum(-1)
    return reference._of_weights(a, f, of.rho_a) + reference._of_weights(b, g, of.rho_b) - epsilon * mass


def _is_possible(cost: Tensor, a: Tensor, b: Tensor, of: Marginals) -> bool:
    """Whether everything that must be transported may go somewhere."""
    there = (cost < math.inf) & (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    rows = (there.any(-1) | (a == 0)).all() or of.rho_a < math.inf
    return bool(rows) and bool((there.any(-2) | (b == 0)).all() or of.rho_b < math.inf)


@given(
    batch=st.sampled_from(BATCHES),
    n=st.sampled_from(COUNTS),
    m=st.sampled_from(COUNTS),
    dtype=dtypes(),
    values=st.sampled_from(["normal", "integers", "equal", "zeros", "large", "inf", "tiny"]),
    layout=st.sampled_from(LAYOUTS),
    share=st.sampled_from(SHARES),
    of=marginals(),
    scaling=st.sampled_from([None, None, 0.3]),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_sinkhorn(
    batch: tuple[int, ...],
    n: int,
    m: int,
    dtype: torch.dtype,
    values: str,
    layout: str,
    share: float,
    of: Marginals,
    scaling: float | None,
    trained: tuple[bool, bool, bool],
    seed: int,
) -> None:
    cost = Recipe((*batch, n, m), dtype, values, layout, seed).build()
    finite = cost.double().masked_fill(cost.isinf(), 0)
    epsilon = share * max(float(finite.max() - finite.min()), float(torch.finfo(dtype).tiny) * 1e6)
    if float(finite.max()) == float(finite.min()):
        epsilon = share
    of = of.at(epsilon)
    a, b = of.weights((*batch, n), of.a, seed, dtype), of.weights((*batch, m), of.b, seed + 1, dtype)
    tol = _tolerance(dtype)
    options: dict[str, Any] = {
        "epsilon": epsilon,
        "rho_a": of.rho_a,
        "rho_b": of.rho_b,
        "reference": "counting" if of.counting else "product",
        "tol": tol,
        "max_iter": MOST_ITERATIONS,
        "epsilon_scaling": scaling,
    }

    def ours(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        transport = F.sinkhorn(cost, *of.arguments(a, b), **options)
        return transport.value, transport.plan().detach()

    def definition(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return _reference_value(cost, *of.normalised(a, b), epsilon, of)

    if values == "inf" and not _is_possible(cost, a, b, of):
        with pytest.raises(ValueError, match=r"^sinkhorn: every cost in (row|column) \d+ of problem \d+ is infinite"):
            ours(cost, a, b)
        return
    assume(_solved(ours, cost, a, b) is not None)
    if values == "inf":
        trained = (trained[0], False, False)
    # By a weight of 0 the reference leaves the potential out of its gradient.
    trained = (trained[0], trained[1] and of.a != "zeros among", trained[2] and of.b != "zeros among")
    # Exponents are as large as costs are in epsilons; potentials are of their size.
    size = float(finite.abs().max()) + epsilon * (1 + math.log(n * m))
    assert_agrees(
        *(ours, definition, [cost, a, b], [t and not (dtype.itemsize == 2 and k > 0) for k, t in enumerate(trained)]),
        seed=seed,
        compute=_computed(dtype),
        scale=(size + 1) * 4,
        floor=4 / min(share, 1.0),
        moves=1,
    )


@given(
    batch=st.sampled_from(BATCHES),
    n=st.sampled_from(COUNTS),
    m=st.sampled_from(COUNTS),
    d=st.sampled_from([1, 2, 3, 8, 17]),
    dtype=dtypes(),
    values=st.tuples(
        st.sampled_from(["normal", "integers", "equal", "zeros", "large", "huge"]),
        st.sampled_from(["normal", "integers", "equal", "zeros", "large", "tiny"]),
    ),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    cost=st.sampled_from(COSTS),
    streaming=st.sampled_from([None, True, False]),
    share=st.sampled_from(SHARES),
    of=marginals(),
    trained=st.tuples(st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_sinkhorn_points(
    batch: tuple[int, ...],
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    values: tuple[str, str],
    layouts: tuple[str, str],
    cost: str,
    streaming: bool | None,
    share: float,
    of: Marginals,
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    if cost != "cosine":  # the others' squares would be no numbers
        values = (values[0].replace("huge", "large"), values[1].replace("tiny", "normal"))
    x = Recipe((*batch, n, d), dtype, values[0], layouts[0], seed).build()
    y = Recipe((*batch, m, d), dtype, values[1], layouts[1], seed + 1).build()
    costs = reference.pairwise_cost(x.double(), y.double(), cost)
    epsilon = share * max(float(costs.max() - costs.min()), 1e-3)
    of = of.at(epsilon)
    a, b = of.weights((*batch, n), of.a, seed, dtype), of.weights((*batch, m), of.b, seed + 1, dtype)
    options: dict[str, Any] = {
        "epsilon": epsilon,
        "rho_a": of.rho_a,
        "rho_b": of.rho_b,
        "reference": "counting" if of.counting else "product",
        "tol": _tolerance(dtype),
        "max_iter": MOST_ITERATIONS,
        "cost": cost,
        "streaming": streaming,
    }
    z = Recipe((*batch, m, 2), _computed(dtype), "normal", "reversed", seed + 2).build()

    def solved(x: Tensor, y: Tensor) -> Transport:
        return F.sinkhorn_points(x, y, *of.arguments(a, b), **options)

    def ours(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        transport = solved(x, y)
        results = (
            transport.value,
            transport.plan(),
            transport.apply(z),
            transport.transport_cost(),
            *transport.marginals,
        )
        return results[0], *(result.detach() for result in results[1:])

    def definition(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        costs = reference.pairwise_cost(x, y, cost)
        weights = (w.to(x.dtype) for w in of.normalised(a.double(), b.double()))
        value, plan = _reference_value(costs, *weights, epsilon, of)
        return value, plan, plan @ z.to(plan), (plan * costs.detach()).sum((-2, -1)), plan.sum(-1), plan.sum(-2)

    transport = _solved(solved, x, y)
    assume(transport is not None)
    size = float(costs.abs().max()) + epsilon * (1 + math.log(n * m))
    reach = max(float(x.double().abs().max()), float(y.double().abs().max()), 1.0) if cost != "cosine" else 4.0
    assert_agrees(
        *(ours, definition, [x, y], trained),
        seed=seed,
        compute=_computed(dtype),
        scale=(size + reach) * 4,
        floor=4 / min(share, 1.0),
        moves=1,
    )
    if of.is_balanced or not of.counting:
        points = x if dtype.itemsize > 2 else x.float()
        mapped, own = transport.map(points).double(), transport.barycentric_map().double()
        has_weight = (a > 0).unsqueeze(-1)
        limit = 1e-4 * reach if dtype != torch.float64 else 1e-8 * reach
        if of.is_balanced:
            assert ((mapped - own).abs() * has_weight).max() <= limit / min(share, 1.0) * 4


@given(
    n=st.sampled_from(COUNTS),
    m=st.sampled_from(COUNTS),
    d=st.sampled_from([1, 2, 5, 9]),
    batch=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    values=st.tuples(*[st.sampled_from(["normal", "integers", "equal"])] * 2),
    cost=st.sampled_from(COSTS),
    share=st.sampled_from([0.5, 1.0, 10.0]),
    rho=st.sampled_from([math.inf, 1e-3, 0.5, 10.0]),
    kinds=st.tuples(*[st.sampled_from([None, "random"])] * 2),
    trained=st.tuples(st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_sinkhorn_divergence(
    n: int,
    m: int,
    d: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    values: tuple[str, str],
    cost: str,
    share: float,
    rho: float,
    kinds: tuple[str | None, str | None],
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    x = Recipe((*batch, n, d), dtype, values[0], "contiguous", seed).build()
    y = Recipe((*batch, m, d), dtype, values[1], "reversed", seed + 1).build()
    of = Marginals(*kinds, rho, rho, False, seed)
    a, b = of.normalised(of.weights((*batch, n), kinds[0], seed, dtype), of.weights((*batch, m), kinds[1], seed, dtype))
    costs = reference.pairwise_cost(x.double(), y.double(), cost)
    epsilon = share * max(float(costs.max() - costs.min()), 0.1, float(costs.max()) / 10)
    of, rho = of.at(epsilon), rho * epsilon

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return F.sinkhorn_divergence(
            *(x, y, a, b), cost=cost, epsilon=epsilon, rho=rho, tol=_tolerance(dtype), max_iter=MOST_ITERATIONS
        )

    def definition(x: Tensor, y: Tensor) -> Tensor:
        """By the iteration that alternates, of all three problems."""
        c, e = a.to(x.dtype), b.to(x.dtype)
        between, of_x, of_y = (
            _reference_value(reference.pairwise_cost(one, other, cost), *weights, epsilon, of)[0]
            for one, other, weights in ((x, y, (c, e)), (x, x, (c, c)), (y, y, (e, e)))
        )
        return between - of_x / 2 - of_y / 2 + epsilon / 2 * (c.sum(-1) - e.sum(-1)).square()

    assume(_solved(ours, x, y) is not None)
    reach = max(float(x.double().abs().max()), float(y.double().abs().max()), 1.0)
    size = float(costs.abs().max()) + epsilon + reach**2
    assert_agrees(*(ours, definition, [x, y], trained), seed=seed, scale=8 * size, floor=8 / share + 8, moves=1)


@given(
    n=st.sampled_from(COUNTS),
    m=st.sampled_from(COUNTS),
    d=st.sampled_from([1, 2, 5, 9]),
    batch=st.sampled_from([(), (1,), (3,)]),
    dtype=dtypes(),
    values=st.tuples(*[st.sampled_from(["normal", "integers", "equal", "zeros"])] * 2),
    p=st.sampled_from([1, 2]),
    blur=st.sampled_from([0.05, 0.5, 3.0]),
    reach=st.sampled_from([None, 0.3, 10.0]),
    scaling=st.sampled_from([0.3, 0.7]),
    debias=st.booleans(),
    kind=st.sampled_from([None, "random"]),
    trained=st.tuples(st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_samples_loss(
    n: int,
    m: int,
    d: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    values: tuple[str, str],
    p: int,
    blur: float,
    reach: float | None,
    scaling: float,
    debias: bool,
    kind: str | None,
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    x = Recipe((*batch, n, d), dtype, values[0], "sliced", seed).build()
    y = Recipe((*batch, m, d), dtype, values[1], "reversed", seed + 1).build()
    of = Marginals(kind, kind, math.inf, math.inf, False, seed)
    a, b = of.normalised(of.weights((*batch, n), kind, seed, dtype), of.weights((*batch, m), kind, seed, dtype))
    diameter = 8.0
    loss = SamplesLoss("sinkhorn", p, blur, reach, diameter, scaling, debias=debias)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = loss(a, x, b, y)
        return result

    def definition(x: Tensor, y: Tensor) -> Tensor:
        x, y, c, e = (t if batch else t.unsqueeze(0) for t in (x, y, a.to(x.dtype), b.to(x.dtype)))
        steps = divergence_reference.epsilons(p, diameter, blur, scaling)
        rho = math.inf if reach is None else reach**p
        result = divergence_reference.samples_loss(x, y, c, e, p, steps, rho, debias)
        return result if batch else result.squeeze(0)

    far = max(float(x.double().abs().max()), float(y.double().abs().max()), 1.0)
    size = d * far**p + blur**p + (0 if reach is None else reach**p)
    assert_agrees(
        *(ours, definition, [x, y], trained), seed=seed, compute=_computed(dtype), scale=4 * size + 4, floor=16, moves=1
    )


@given(
    n=st.sampled_from(COUNTS),
    d=st.sampled_from([1, 2, 5, 9]),
    batch=st.sampled_from([(), (3,)]),
    dtype=dtypes(),
    values=st.tuples(*[st.sampled_from(["normal", "integers", "equal"])] * 2),
    cost=st.sampled_from(COSTS),
    share=st.sampled_from([0.1, 1.0, 10.0]),
    trained=st.tuples(st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_monge_gap(
    n: int,
    d: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    values: tuple[str, str],
    cost: str,
    share: float,
    trained: tuple[bool, bool],
    seed: int,
) -> None:
    x = Recipe((*batch, n, d), dtype, values[0], "inner", seed).build()
    y = Recipe((*batch, n, d), dtype, values[1], "shifted", seed + 1).build()
    costs = reference.pairwise_cost(x.double(), y.double(), cost)
    epsilon = share * max(float(costs.max() - costs.min()), 0.1)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return F.monge_gap(x, y, epsilon=epsilon, cost=cost, tol=_tolerance(dtype), max_iter=MOST_ITERATIONS)

    def definition(x: Tensor, y: Tensor) -> Tensor:
        return monge_reference.monge_gap(x, y, epsilon, cost, MOST_ITERATIONS, 1e-14)

    assume(_solved(ours, x, y) is not None)
    far = max(float(x.double().abs().max()), float(y.double().abs().max()), 1.0)
    size = float(costs.abs().max()) + epsilon * (1 + math.log(n)) + far
    options = {"scale": 4 * size, "floor": 8 / min(share, 1.0), "moves": 1}
    assert_agrees(ours, definition, [x, y], trained, seed=seed, compute=_computed(dtype), **options)


@given(
    k=st.sampled_from([1, 2, 3, 7, 17]),
    more=st.sampled_from([0, 1, 5, 30, 100]),
    dtype=dtypes(),
    values=st.sampled_from(["normal", "integers", "equal", "zeros", "large"]),
    layout=st.sampled_from(LAYOUTS),
    mass=st.sampled_from([0.01, 0.3, 0.9, 1.0]),
    epsilon=st.sampled_from([0.1, 1.0]),
    gamma=st.sampled_from([0.5, 1.0, 20.0, math.inf]),
    prior=st.sampled_from([None, "random", "zeros among"]),
    semantic=st.sampled_from([None, "similarity", "features"]),
    seed=seeds(),
)
def test_partial_transport(
    k: int,
    more: int,
    dtype: torch.dtype,
    values: str,
    layout: str,
    mass: float,
    epsilon: float,
    gamma: float,
    prior: str | None,
    semantic: str | None,
    seed: int,
) -> None:
    logits = Recipe((k + more, k), dtype, values, layout, seed).build()
    n = k + more
    shares = None
    if prior is not None:
        shares = weights((k,), torch.float64, prior, seed)
        shares[0] += 0.5
        shares = shares / shares.sum()
        # Which class has which share depends on sums, which are not to be equal but for rounding.
        sums = logits.double().sum(0).sort().values
        assume(bool((sums.diff() > 1e-3).all()))
    tol = 1e-12 if dtype == torch.float64 else 3e-6
    options: dict[str, Any] = {"mass": mass, "epsilon": epsilon, "gamma": gamma, "prior": shares, "max_iter": 3000}
    z = torch.nn.functional.normalize(Recipe((n, 3), torch.float64, "normal", "reversed", seed + 1).build(), dim=1)

    def ours(logits: Tensor) -> Tensor:
        if semantic is None:
            return F.progressive_partial_transport(logits, tol=tol, **options)
        alike = (
            {"features": z.to(logits.dtype)} if semantic == "features" else {"similarity": (z @ z.T).to(logits.dtype)}
        )
        return F.semantic_partial_transport(logits, tol=tol, mm_iter=3, mm_tol=0.0, **alike, **options)

    def definition(logits: Tensor) -> Tensor:
        own = logits if logits.dtype.itemsize > 2 else logits.float()
        of = {
            **options,
            "prior": None if shares is None else shares.to(own.dtype),
            "tol": 1e-13 if own.dtype == torch.float64 else 1e-6,
        }
        if semantic is None:
            return partial_reference.progressive_partial_transport(own, **of)
        f = z.to(dtype).to(own.dtype)
        similarity = f @ f.T if semantic == "features" else (z @ z.T).to(dtype).to(own.dtype)
        return partial_reference.semantic_partial_transport(own, similarity, mm_iter=3, **of)

    found = _solved(ours, logits)
    assume(found is not None)
    assert not found.isnan().any()
    assert ((found >= 0) & (found.sum(1, keepdim=True) <= 1 + 1e-5)).all()
    assert_agrees(
        ours,
        definition,
        [logits],
        [False],
        seed=seed,
        compute=_computed(dtype),
        scale=n**0.5,
        floor=64 / epsilon,
        moves=1,
    )

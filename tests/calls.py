"""One call of every operator, forward and backward: what tests of a whole process, not of one formula, go through.

``CALLS[name](seed, device)`` makes inputs from the seed alone and computes results; :meth:`Computed.with_gradients`
goes backward. Sizes are such that CPU kernels share their work among threads: from 32,768 elements on where each stands
for itself, from 120,000 costs that are held and 65,536 that are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyreg
from pyreg import functional
from pyreg.diagnostics import softmax_collapse_rate
from pyreg.optim import CompandedOptimizer, OrthoGrad, orthogonalize_gradients_


@dataclass
class Computed:
    """Results, and the tensors that all of them have a gradient in; none where the call went backward itself."""

    results: list[Tensor]
    leaves: list[Tensor]

    def with_gradients(self, retain_graph: bool = False) -> list[Tensor]:
        """The results, and the gradients of their sum."""
        results = [result.detach().clone() for result in self.results]
        if not self.leaves:
            return results
        # Not of result.sum(): the order of nodes that another thread has added to a graph is another.
        ones = [torch.ones_like(result) for result in self.results]
        return [*results, *torch.autograd.grad(self.results, self.leaves, ones, retain_graph=retain_graph)]


Call = Callable[..., Computed]  # (seed, device="cpu")

CALLS: dict[str, Call] = {}

# Their sums are torch's matrix products, whose bits may be others for another number of threads.
WITH_PRODUCTS = frozenset(
    {
        "linear_stablemax_cross_entropy",
        *("companded_optimizer", "orthograd"),  # of a network
        *("conr_loss", "info_nce", "supcon_loss"),
        "partial_transport",  # semantic: features with features
    }
)

# Those that leave no graph, or one that can be gone through once.
WITHOUT_GRAPH = frozenset(
    {
        *("weight_compander_inverse", "companded_optimizer", "orthograd", "orthogonalized_gradients"),
        *("partial_transport", "progressive_pseudo_labels", "collapse_rate", "stablemax_cross_entropy_"),
    }
)


def call(function: Callable[[Callable[..., Tensor]], Computed]) -> Call:
    """Decorator: the function takes a maker of normal numbers, ``randn(*shape)``, and goes by its own name."""

    @functools.wraps(function)
    def from_seed(seed: int, device: torch.device | str = "cpu") -> Computed:
        generator = torch.Generator().manual_seed(seed)
        return function(lambda *shape: torch.randn(shape, generator=generator).to(device))

    CALLS[function.__name__] = from_seed
    return from_seed


def computed(function: Callable[..., Any], *leaves: Tensor) -> Computed:
    """A function of leaves, which returns one result or several."""
    trained = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*trained)
    return Computed(list(results) if isinstance(results, tuple) else [results], trained)


def labels_for(numbers: Tensor, classes: int) -> Tensor:
    """A class for each row, by its first number."""
    return (1000 * numbers[:, 0]).long().remainder(classes)


# ---- StableMax ----


@call
def stablemax(randn: Callable[..., Tensor]) -> Computed:
    weights = randn(120, 1500)
    return computed(lambda x: (functional.stablemax(x) * weights, functional.log_stablemax(x)), randn(120, 1500))


@call
def stablemax_cross_entropy(randn: Callable[..., Tensor]) -> Computed:
    logits = randn(120, 1500)
    options = {"weight": randn(1500).abs(), "label_smoothing": 0.1}
    target = labels_for(logits, 1500)
    return computed(lambda x: functional.stablemax_cross_entropy(x, target, **options), logits)


@call
def stablemax_cross_entropy_(randn: Callable[..., Tensor]) -> Computed:
    logits = randn(120, 1500)
    target = labels_for(logits, 1500)
    return computed(lambda x: functional.stablemax_cross_entropy_(x * 1.0, target), logits)


@call
def second_derivatives_of_stablemax_cross_entropy(randn: Callable[..., Tensor]) -> Computed:
    logits, direction = randn(50, 700).requires_grad_(), randn(50, 700)
    loss = functional.stablemax_cross_entropy(logits, labels_for(logits, 700))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    return Computed([gradient * direction], [logits])


@call
def linear_stablemax_cross_entropy(randn: Callable[..., Tensor]) -> Computed:
    hidden, weight, bias = randn(150, 48), randn(1500, 48) / 7, randn(1500)
    target = labels_for(hidden, 1500)
    return computed(
        lambda x, w, b: functional.linear_stablemax_cross_entropy(x, w, target, linear_bias=b), hidden, weight, bias
    )


# ---- weight compander and optimizers ----


def _network(randn: Callable[..., Tensor]) -> nn.Module:
    model = nn.Sequential(nn.Linear(150, 250), nn.Tanh(), nn.Linear(250, 150, bias=False), nn.Tanh())
    model.to(randn(0).device)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(randn(*param.shape) / 20)
    return model


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, randn: Callable[..., Tensor]) -> Computed:
    x, y = randn(32, 150), randn(32, 150)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return Computed([loss, *model.parameters()], [])


@call
def weight_compander(randn: Callable[..., Tensor]) -> Computed:
    weights, constants = randn(300, 350), (randn().abs() + 0.5, randn(300).abs() + 0.5)
    return computed(
        lambda v, a, b: tuple(
            functional.weight_compander(v, a, b, kind) * weights for kind in ("arctan", "arsinh", "erf")
        ),
        randn(300, 350),
        *constants,
    )


@call
def weight_compander_inverse(randn: Callable[..., Tensor]) -> Computed:
    a, b, w = randn().abs() + 0.5, randn().abs() + 0.5, randn(300, 350) / 20
    return Computed([functional.weight_compander_inverse(w, a, b, kind) for kind in ("arctan", "arsinh", "erf")], [])


@call
def companded_optimizer(randn: Callable[..., Tensor]) -> Computed:
    model = _network(randn)
    pyreg.compand(model)
    optimizer = CompandedOptimizer(model.parameters(), model, torch.optim.Adam, lr=1e-3, decay=1e-3)
    return _trained(model, optimizer, randn)


@call
def orthograd(randn: Callable[..., Tensor]) -> Computed:
    model = _network(randn)
    return _trained(model, OrthoGrad(model.parameters(), torch.optim.AdamW, lr=1e-3), randn)


@call
def orthogonalized_gradients(randn: Callable[..., Tensor]) -> Computed:
    params = [nn.Parameter(randn(size)) for size in (5, 100_003, 1000, 40_000)]
    for param in params:
        param.grad = randn(len(param)) + param.detach()
    orthogonalize_gradients_(params)
    return Computed([param.grad for param in params if param.grad is not None], [])


# ---- contrastive losses ----


@call
def conr_loss(randn: Callable[..., Tensor]) -> Computed:
    """From 512 rows on tiles are skipped, and sparse ones made pair by pair."""
    features = randn(700, 24)
    targets = 20 * features[:, 0]
    preds, weights = targets + 2 * randn(700), randn(700).abs()

    def losses(z: Tensor) -> tuple[Tensor, Tensor]:
        few = functional.conr_loss(z[:200], targets[:200], preds[:200], temperature=0.2)
        return few, functional.conr_loss(z, targets, preds, weights=weights, temperature=0.2)

    return computed(losses, features)


@call
def info_nce(randn: Callable[..., Tensor]) -> Computed:
    query, key = randn(600, 24), randn(600, 24)
    options = {"temperature": 0.2, "log_q": -randn(600).abs(), "ids": labels_for(query, 500)}

    def losses(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return functional.info_nce(q, k, symmetric=True, **options), functional.info_nce(q, k, **options)

    return computed(losses, query, query + key)


@call
def supcon_loss(randn: Callable[..., Tensor]) -> Computed:
    return computed(lambda z: functional.supcon_loss(z, labels_for(z, 40), temperature=0.2), randn(600, 24))


# ---- transport ----


# Converged or not: iterations are the same ones, of which nobody is to be told.
_ITERATIONS = {"epsilon": 0.5, "tol": 0, "max_iter": 6}


@call
def sinkhorn(randn: Callable[..., Tensor]) -> Computed:
    """One problem, whose rows the threads share; many small ones, which they share."""

    def losses(one: Tensor, a: Tensor, b: Tensor, many: Tensor) -> tuple[Tensor, ...]:
        transport = functional.sinkhorn(one, a.softmax(0), b.softmax(0), **_ITERATIONS)
        value = functional.sinkhorn(many, rho_a=2.0, **_ITERATIONS).value
        return transport.value, transport.f, transport.plan() ** 2, value

    return computed(losses, randn(320, 380).abs(), randn(320), randn(380), randn(9, 40, 50).abs())


@call
def sinkhorn_points(randn: Callable[..., Tensor]) -> Computed:
    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        streamed = functional.sinkhorn_points(x, y, streaming=True, **_ITERATIONS)
        held = functional.sinkhorn_points(x[:90], y[:80], streaming=False, **_ITERATIONS)
        return streamed.value, streamed.apply(y), held.value, held.map(x[:50])

    return computed(losses, randn(260, 3), randn(270, 3) + 0.5)


@call
def sinkhorn_potentials(randn: Callable[..., Tensor]) -> Computed:
    """Whose gradient is that of another iteration."""
    return computed(
        lambda x, y: functional.sinkhorn_points(x, y, **_ITERATIONS).f.cos(), randn(90, 3), randn(80, 3) + 0.5
    )


@call
def sinkhorn_divergence(randn: Callable[..., Tensor]) -> Computed:
    return computed(
        lambda x, y: functional.sinkhorn_divergence(x, y, **_ITERATIONS), randn(260, 3), randn(270, 3) + 0.5
    )


@call
def samples_loss(randn: Callable[..., Tensor]) -> Computed:
    losses = pyreg.nn.SamplesLoss(p=2, blur=0.3, reach=2.0), pyreg.nn.SamplesLoss(p=1, blur=0.3, debias=False)
    return computed(lambda x, y: tuple(loss(x, y) for loss in losses), randn(260, 3), randn(270, 3) + 0.5)


@call
def monge_gap(randn: Callable[..., Tensor]) -> Computed:
    x = randn(300, 3)
    return computed(lambda x, y: functional.monge_gap(x, y, **_ITERATIONS), x, x + 0.5 * randn(300, 3))


@call
def partial_transport(randn: Callable[..., Tensor]) -> Computed:
    logits, features = 2 * randn(3000, 40), F.normalize(randn(3000, 16))
    options = {"mass": 0.3, "tol": 0, "max_iter": 6}
    plain = functional.progressive_partial_transport(logits, **options)
    return Computed([plain, functional.semantic_partial_transport(logits, features=features, mm_iter=2, **options)], [])


@call
def progressive_pseudo_labels(randn: Callable[..., Tensor]) -> Computed:
    options = {"ramp_steps": 3, "bank_size": 500, "device": randn(0).device, "tol": 0, "max_iter": 6}
    labelling = pyreg.nn.ProgressivePseudoLabels(40, **options)
    return Computed([labelling(2 * randn(400, 40)) for _ in range(3)], [])


@call
def collapse_rate(randn: Callable[..., Tensor]) -> Computed:
    logits = 20 * randn(120, 1500)
    return Computed([softmax_collapse_rate(logits, labels_for(logits, 1500))], [])

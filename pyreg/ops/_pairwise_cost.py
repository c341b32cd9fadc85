"""Costs between points, held, and their gradients to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _library

COSTS = ("sqeuclidean", "euclidean", "cosine")


def pairwise_cost(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """``[B, n, m]`` of ``x [B, n, d]`` and ``y [B, m, d]``: ``|x - y|^2``, ``|x - y|`` or ``1 - x.y / (|x| |y|)``,
    1 for a point at 0."""
    if cost == "cosine":
        x, y = units(x), units(y)
    return cost_of_computed(x, y, COSTS.index(cost))


def cost_of_computed(x: Tensor, y: Tensor, code: int) -> Tensor:
    """The same, by the cost's place in COSTS; points of cosines have length 1."""
    if COSTS[code] == "cosine":
        with _library.no_autocast(x):
            return 1 - x @ y.mT
    function = _SquaredDistances if COSTS[code] == "sqeuclidean" else _Distances
    return function.apply(x, y)  # type: ignore[no-any-return, no-untyped-call]


def pull(weights: Tensor, x: Tensor, y: Tensor, costs: Tensor, code: int) -> tuple[Tensor, Tensor]:
    """``sum_j w_ij dC_ij / dx_i`` and ``sum_i w_ij dC_ij / dy_j``; 0 at x = y for distances, where there is none."""
    if COSTS[code] == "cosine":
        with _library.no_autocast(x):
            return -(weights @ y), -(weights.mT @ x)
    if COSTS[code] == "sqeuclidean":
        return _pull(2 * weights, x, y)
    apart = costs > 0
    return _pull(torch.where(apart, weights / torch.where(apart, costs, 1), 0), x, y)


def units(x: Tensor) -> Tensor:
    """At length 1, by way of the largest coordinate, so that no square over- or underflows; a point at 0 stays there,
    and has no gradient."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    is_there = largest > 0
    x = torch.where(is_there, x / torch.where(is_there, largest, 1), 0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(is_there, length, 1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # From differences of coordinates: a product of matrices loses what lengths and distances have in common.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _pull(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_j w_ij (x_i - y_j)`` and ``sum_i w_ij (y_j - x_i)``, taken around a centre for the digits' sake."""
    centre = x.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    with _library.no_autocast(x):
        by_x = weights.sum(-1, keepdim=True) * x - weights @ y
        return by_x, weights.sum(-2).unsqueeze(-1) * y - weights.mT @ x


class _SquaredDistances(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return _distances(x, y).square_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _pull(2 * gradient, *ctx.saved_tensors)


class _Distances(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return _distances(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y, distances = ctx.saved_tensors
        return pull(gradient, x, y, distances, COSTS.index("euclidean"))

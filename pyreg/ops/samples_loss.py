r"""geomloss's Sinkhorn loss between samples: :class:`pyreg.nn.SamplesLoss`.

.. code-block:: text

    C_ij = |x_i - y_j| (p = 1), |x_i - y_j|^2 / 2 (p = 2)        eps = blur^p,  rho = reach^p
    epsilons: diameter^p, then from there on each scaling^p times the one before, as long as it is above eps; eps

An iteration is made at each of the epsilons (:mod:`pyreg.ops._symmetric_sinkhorn`), and a last one, not averaged,
through which the gradient goes, the potentials before it being constants: ``df_i/dx_i = kappa sum_j w_ij dC_ij/dx_i``
with the softmin's weights w. The iteration is not asked to converge.

Kernels: ``csrc/symmetric_sinkhorn`` and ``csrc/point_plan``, on CUDA those of ``triton_kernels``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyreg.ops import _checks, _library, _pairwise_cost, sinkhorn
from pyreg.ops._point_plan import point_plan
from pyreg.ops._symmetric_sinkhorn import symmetric_sinkhorn

_NAME = "SamplesLoss"

_BACKENDS = ("auto", "tensorized", "online", "multiscale")

# Squared distances that p = 1 takes no root of, as geomloss.
_LEAST_SQUARE = 1e-8

_COST = {1: _pairwise_cost.COSTS.index("euclidean"), 2: _pairwise_cost.COSTS.index("sqeuclidean")}


class Options(NamedTuple):
    p: int
    blur: float
    reach: float  # infinite: balanced
    diameter: float  # 0: of the points
    scaling: float
    debias: bool


def epsilons(options: Options, diameter: float) -> list[float]:
    """Of the iterations."""
    p, last = options.p, options.blur**options.p
    if diameter <= 0:
        return [last]
    start, stop, step = (p * math.log(scale) for scale in (diameter, options.blur, options.scaling))
    between = [math.exp(start + k * step) for k in range(max(math.ceil((stop - start) / step), 0))]
    return [diameter**p, *between, last]


def _diameter(x: Tensor, y: Tensor) -> float:
    """Of the box around all points; waits for a GPU."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "SamplesLoss: a CUDA graph cannot be captured without diameter, for the number of iterations follows from "
            "it; pass SamplesLoss(diameter=...)"
        )
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    if len(x) == 0 or len(y) == 0:
        return 0.0
    most, least = torch.maximum(x.amax(0), y.amax(0)), torch.minimum(x.amin(0), y.amin(0))
    return float(torch.linalg.vector_norm(most - least).item())


# ---- the operator ----


def _found(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    p: int,
    blur: float,
    reach: float,
    diameter: float,
    scaling: float,
    debias: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, ...]:
    options = Options(p, blur, reach, diameter, scaling, debias)
    steps = epsilons(options, diameter or _diameter(x, y))
    # The kernels' squares are not halved: everything is twice as large inside.
    unit, cost = float(p), _COST[p]
    rho, epsilon = unit * reach**p, unit * steps[-1]
    kappa = 1.0 if rho == math.inf else rho / (rho + epsilon)
    found = symmetric_sinkhorn(
        x, y, cost, _LEAST_SQUARE, a, b, [unit * step for step in steps], rho, debias, need_x, need_y
    )
    potentials, following, slopes = found[:4], found[4:8], list(found[8:])
    if (need_x or need_y) and all(slope.numel() == 0 for slope in slopes):
        of_x, of_y, x_alone, y_alone = (
            _Side(points, weights, old, new / kappa)
            for points, weights, old, new in zip((x, y) * 2, (a, b) * 2, potentials, following, strict=True)
        )
        sides = (of_x, of_y), (of_y, of_x), (x_alone, x_alone), (y_alone, y_alone)
        for index, (side, others) in enumerate(sides[: 4 if debias else 2]):
            if (need_x, need_y)[index % 2]:
                slopes[index] = _slopes(side, others, cost, epsilon)
    return *(new / unit for new in following), *(slope.mul_(kappa / unit) for slope in slopes)


class _Side(NamedTuple):
    points: Tensor
    weights: Tensor
    potentials: Tensor
    softmin: Tensor  # of the others' potentials


def _slopes(side: _Side, others: _Side, cost: int, epsilon: float) -> Tensor:
    """Sums over the weights ``exp((softmin_i + g_j - C_ij) / eps) b_j``, a row's of which are 1 together."""
    points = side.points, others.points
    potentials = side.softmin, others.potentials + epsilon * others.weights.log()
    ones = (one.new_ones((*one.shape[:2], 1)) for one in points)
    epsilons = side.weights.new_full(side.weights.shape[:1], epsilon)
    return point_plan(points, potentials, epsilons, cost, *ones, by_x=True)[2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[4:])
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)
    ctx.debias = inputs[9]


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, *slopes = ctx.saved_tensors

    def total(first: int, points: Tensor) -> Tensor | None:
        result = None
        for k in (first, first + 2) if ctx.debias else (first,):
            gradient = gradients[k]
            if gradient is not None:
                part = slopes[k] * gradient.unsqueeze(2).to(slopes[k].dtype)
                result = part if result is None else result + part
        if result is None or not torch.is_grad_enabled():
            return result
        return _OfFirstOrder.apply(result, points)  # type: ignore[no-any-return, no-untyped-call]

    need_x, need_y, *_ = ctx.needs_input_grad
    return (total(0, x) if need_x else None), (total(1, y) if need_y else None), *(None,) * 10


class _OfFirstOrder(torch.autograd.Function):
    """A gradient that says, where it is differentiated in turn, that it can't be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, points: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "SamplesLoss: no second derivatives, for its gradient takes the potentials before the last iteration for "
            "constants; use pyreg.functional.sinkhorn_divergence, which has derivatives of any order"
        )


@_library.fake("samples_loss_potentials")
def _fake(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int, blur: float, reach: float, diameter: float, *options: Any
) -> tuple[Tensor, ...]:
    _, debias, need_x, need_y = options
    nothing, no_slopes = a.new_empty((0, 0)), x.new_empty((0, 0, 0))
    potentials = (a, b, a, b) if debias else (a, b, nothing, nothing)
    slopes = (
        points if is_needed else no_slopes
        for points, is_needed in ((x, need_x), (y, need_y), (x, need_x and debias), (y, need_y and debias))
    )
    return tuple(torch.empty_like(like) for like in (*potentials, *slopes))


_library.implement("samples_loss_potentials", _found)
_library.vmap_one_by_one("samples_loss_potentials")
_potentials = _library.differentiable("samples_loss_potentials", setup_context=_setup, backward=_backward)


# ---- the loss ----


def samples_loss(
    arguments: tuple[Tensor, ...], options: Options, potentials: bool, exact_gradient: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Of ``(x, y)`` or ``(a, x, b, y)``."""
    x, y, a, b, is_batch = _samples(arguments)
    points = sinkhorn.computed(x).contiguous(), sinkhorn.computed(y).contiguous()
    dtype = points[0].dtype
    weights = a.double().contiguous(), b.double().contiguous()
    f, g, f_self, g_self = _all_potentials(points, weights, options)
    if potentials:
        if options.debias:
            f, g = f - f_self, g - g_self
        shapes = [_weights_shape(arguments, index) for index in (0, 1)]
        return f.reshape(shapes[0]).to(dtype), g.reshape(shapes[1]).to(dtype)
    result = _value(weights, (f, g), (f_self, g_self), options, exact_gradient).to(dtype)
    return result if is_batch else result.squeeze(0)


def _value(
    weights: tuple[Tensor, Tensor],
    between: tuple[Tensor, Tensor],
    selves: tuple[Tensor, Tensor],
    options: Options,
    exact_gradient: bool,
) -> Tensor:
    """``[B]``, float64."""
    rho, epsilon = options.reach**options.p, options.blur**options.p

    def term(f: Tensor, f_self: Tensor) -> Tensor:
        if rho == math.inf:
            return f - f_self if options.debias else f
        terms = (-f_self / rho).exp() - (-f / rho).exp() if options.debias else -torch.expm1(-f / rho)
        result = (rho + epsilon / 2) * terms
        # In what the iteration takes for constants the value is stationary, and they make up for the other half.
        return result + epsilon / 2 * (terms - terms.detach()) if exact_gradient else result

    f, g = (w * term(one, own) for w, one, own in zip(weights, between, selves, strict=True))
    return f.sum(1) + g.sum(1)


def _all_potentials(
    points: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], options: Options
) -> tuple[Tensor, ...]:
    needs = (torch.is_grad_enabled() and one.requires_grad for one in points)
    return _potentials(*points, *(w.detach() for w in weights), *options, *needs)[:4]  # type: ignore[no-any-return]


# ---- arguments ----


def refuse_unknown(loss: str, cost: object, kernel: object, cluster_scale: object, backend: str) -> None:
    """An error for what geomloss's class takes, and this one does not."""
    if loss != "sinkhorn":
        raise ValueError(
            f"{_NAME}: expected loss to be 'sinkhorn', got {loss!r}; kernel losses ('energy', 'gaussian', 'laplacian', "
            "'hausdorff') are geomloss's alone"
        )
    if cost is not None:
        raise ValueError(
            f"{_NAME}: expected cost to be None, for p gives it, got {cost!r}; use pyreg.functional.sinkhorn on "
            "cost(x, y) for a cost of your own"
        )
    if kernel is not None:
        raise ValueError(f"{_NAME}: expected kernel to be None, as of loss='sinkhorn', got {kernel!r}")
    if cluster_scale is not None:
        raise ValueError(
            f"{_NAME}: expected cluster_scale to be None, for no clusters are made, got {cluster_scale!r}; leave it out"
        )
    if backend not in _BACKENDS:
        raise ValueError(f"{_NAME}: expected backend to be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")


def checked(p: int, blur: float, reach: float | None, diameter: float | None, scaling: float, debias: bool) -> Options:
    if not _checks.is_number(p) or p not in (1, 2):
        raise ValueError(
            f"{_NAME}: expected p to be 1 or 2, got {p!r}; use pyreg.functional.sinkhorn on a cost of your own"
        )
    p = int(p)
    blur = _check_length("blur", blur, p)
    if reach is not None and not (_checks.is_number(reach) and reach == math.inf):
        reach = _check_length("reach", reach, p)
    if diameter is not None:
        diameter = _check_length("diameter", diameter, p)
    _checks.check_flag(_NAME, "debias", debias)
    scaling = _checks.check_number(_NAME, "scaling", scaling, 0, or_equal=False)
    if scaling >= 1:
        raise ValueError(f"{_NAME}: expected scaling to be between 0 and 1, got {scaling!r}")
    return Options(p, blur, math.inf if reach is None else reach, diameter or 0.0, scaling, debias)


def _check_length(name: str, length: float, p: int) -> float:
    """Above 0, and its power p, which is a cost, too."""
    length = _checks.check_number(_NAME, name, length, 0, or_equal=False)
    # By logarithms, for a power may be no number; the costs inside are up to twice as large.
    if not -700 < p * math.log(length) < 700:
        raise ValueError(
            f"{_NAME}: expected {name} whose power {name}^p = {name}^{p} is a number above 0, got {length!r}; scale "
            "points and lengths"
        )
    return length


def _samples(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """x, y, a and b as a batch, and whether they were one."""
    if len(arguments) == 6:
        raise ValueError(
            f"{_NAME}: labels of clusters are of geomloss's multiscale backend; pass (a, x, b, y), whose sums are exact"
        )
    if len(arguments) not in (2, 4):
        raise ValueError(f"{_NAME}: expected (x, y) or (a, x, b, y), got {len(arguments)} arguments")
    x, y = arguments if len(arguments) == 2 else arguments[1::2]
    sinkhorn.check_points(_NAME, x, y)
    if x.dim() not in (2, 3):
        raise ValueError(f"{_NAME}: expected x of shape [n, d] or [B, n, d], got {list(x.shape)}")
    if len(arguments) == 2:
        a, b = (points.new_full(points.shape[:-1], 1 / points.shape[-2], dtype=torch.float64) for points in (x, y))
    else:
        a, b = _weights("a", arguments[0], x), _weights("b", arguments[2], y)
    if x.dim() == 3:
        return x, y, a, b, True
    return x.unsqueeze(0), y.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), False


def _weights(name: str, weights: Tensor, points: Tensor) -> Tensor:
    of, symbol = ("x", "n") if name == "a" else ("y", "m")
    _library.check_float(_NAME, name, weights)
    _checks.check_beside(_NAME, name, weights, points, of)
    shape = points.shape[:-1]
    if weights.shape != shape and weights.shape != (*shape, 1):
        raise ValueError(
            f"{_NAME}: expected {name} of shape [..., {symbol}] = {list(shape)} or {[*shape, 1]}, got "
            f"{list(weights.shape)}"
        )
    _checks.check_weights(_NAME, name, weights)
    return weights.reshape(shape)


def _weights_shape(arguments: tuple[Tensor, ...], index: int) -> tuple[int, ...]:
    """Of a or b as they came, or as they would have come."""
    if len(arguments) == 4:
        return tuple(arguments[2 * index].shape)
    return tuple(arguments[index].shape[:-1])

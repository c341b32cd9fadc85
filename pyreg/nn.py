"""Operators as modules, named as in :mod:`torch.nn`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyreg import functional
from pyreg.ops.weight_compander import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist

__all__ = [
    "ConRLoss",
    "InfoNCELoss",
    "LinearStableMaxCrossEntropyLoss",
    "MongeGap",
    "StableMaxCrossEntropyLoss",
    "SupConLoss",
    "WeightCompander",
]


class StableMaxCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy under StableMax, in place of :class:`torch.nn.CrossEntropyLoss`, whose constructor it has.

    Formula, shapes, dtypes, errors and gradients: :func:`pyreg.functional.stablemax_cross_entropy`.

    Example:
        >>> loss = pyreg.nn.StableMaxCrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.randn(8, 113, requires_grad=True), torch.randint(113, (8,))).backward()
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.stablemax_cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearStableMaxCrossEntropyLoss(torch.nn.Module):
    """A linear layer and its StableMax cross-entropy in one: the head of a language model without its logits. In place
    of :class:`torch.nn.LinearCrossEntropyLoss`, whose constructor it has.

    The layer is the attribute ``linear``; tie it to an embedding by ``loss.linear.weight = embedding.weight``, and take
    logits where they are wanted, as in generation, by ``loss.linear(hidden)``. Formula, shapes, dtypes, errors and
    gradients: :func:`pyreg.functional.linear_stablemax_cross_entropy`.

    Args:
        in_features: features ``H`` of the input ``[..., H]``.
        num_classes: classes ``C``.
        bias: whether the layer has one.
        device, dtype: of the layer.
        weight: class weights ``[C]``.
        reduction, ignore_index, label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`.

    Example:
        >>> head = pyreg.nn.LinearStableMaxCrossEntropyLoss(1024, 32000)
        >>> head(torch.randn(2, 256, 1024), torch.randint(32000, (2, 256))).backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.linear_stablemax_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"


class ConRLoss(torch.nn.Module):
    """ConR, the contrastive regularizer for deep imbalanced regression, to be added to a regression loss.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.conr_loss`.

    Example:
        >>> conr = pyreg.nn.ConRLoss(window=1.0, temperature=0.07)
        >>> encoder, head = torch.nn.Linear(8, 32), torch.nn.Linear(32, 1)
        >>> x, ages = torch.randn(64, 8), torch.randint(100, (64, 1)).float()
        >>> features = encoder(x)
        >>> preds = head(features)
        >>> (torch.nn.functional.l1_loss(preds, ages) + conr(features, ages, preds)).backward()
    """

    def __init__(
        self,
        *,
        window: float = 1.0,
        temperature: float = 0.07,
        eta: float = 0.01,
        variant: str = "paper",
        label_norm: float = 2,
        reduction: str = "mean",
        group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        self.window, self.temperature, self.eta = window, temperature, eta
        self.variant, self.label_norm, self.reduction, self.group = variant, label_norm, reduction, group

    def forward(self, features: Tensor, targets: Tensor, preds: Tensor, weights: Tensor | None = None) -> Tensor:
        return functional.conr_loss(
            features,
            targets,
            preds,
            window=self.window,
            temperature=self.temperature,
            eta=self.eta,
            weights=weights,
            variant=self.variant,
            label_norm=self.label_norm,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"window={self.window}, temperature={self.temperature}, eta={self.eta}, variant={self.variant!r}, "
            f"label_norm={self.label_norm}, reduction={self.reduction!r}" + _group_repr(self.group)
        )


class SupConLoss(torch.nn.Module):
    """The supervised contrastive loss: samples of the same label attract each other, all others repel.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.supcon_loss`.

    Example:
        >>> loss = pyreg.nn.SupConLoss(temperature=0.1)
        >>> loss(torch.randn(64, 128, requires_grad=True), torch.randint(10, (64,))).backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
        group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.reduction, self.group = temperature, normalize, reduction, group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return functional.supcon_loss(
            features,
            labels,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"
            + _group_repr(self.group)
        )


class InfoNCELoss(torch.nn.Module):
    """InfoNCE with in-batch negatives: query i is to find key i among all keys.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.info_nce`.

    Example:
        >>> clip = pyreg.nn.InfoNCELoss(temperature=0.07, symmetric=True)
        >>> clip(torch.randn(64, 128, requires_grad=True), torch.randn(64, 128)).backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        normalize: bool = True,
        symmetric: bool = False,
        reduction: str = "mean",
        group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.symmetric = temperature, normalize, symmetric
        self.reduction, self.group = reduction, group

    def forward(self, query: Tensor, key: Tensor, log_q: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        return functional.info_nce(
            query,
            key,
            temperature=self.temperature,
            normalize=self.normalize,
            symmetric=self.symmetric,
            log_q=log_q,
            ids=ids,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, symmetric={self.symmetric}, "
            f"reduction={self.reduction!r}" + _group_repr(self.group)
        )


class MongeGap(torch.nn.Module):
    """The Monge gap of a map: by how much it moves points at a higher cost than is needed to move them to the same
    places. To be added to a loss that fits the map to its targets.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.monge_gap`.

    Example:
        >>> gap = pyreg.nn.MongeGap(epsilon=0.1)
        >>> model, x = torch.nn.Linear(2, 2), torch.randn(64, 2)
        >>> gap(x, model(x)).backward()
    """

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        relative_epsilon: float | None = None,
        cost: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
        max_iter: int = 2000,
        tol: float = 1e-3,
        epsilon_scaling: float | None = None,
        streaming: bool | None = None,
    ) -> None:
        super().__init__()
        self.epsilon, self.relative_epsilon, self.cost = epsilon, relative_epsilon, cost
        self.max_iter, self.tol, self.epsilon_scaling, self.streaming = max_iter, tol, epsilon_scaling, streaming

    def forward(self, source: Tensor, mapped: Tensor) -> Tensor:
        return functional.monge_gap(
            source,
            mapped,
            epsilon=self.epsilon,
            relative_epsilon=self.relative_epsilon,
            cost=self.cost,
            max_iter=self.max_iter,
            tol=self.tol,
            epsilon_scaling=self.epsilon_scaling,
            streaming=self.streaming,
        )

    def extra_repr(self) -> str:
        cost = self.cost if isinstance(self.cost, str) else getattr(self.cost, "__name__", type(self.cost).__name__)
        return (
            f"epsilon={self.epsilon}, relative_epsilon={self.relative_epsilon}, cost={cost!r}, "
            f"max_iter={self.max_iter}, tol={self.tol}, epsilon_scaling={self.epsilon_scaling}"
        )


def _group_repr(group: dist.ProcessGroup | bool | None) -> str:
    """Said where there is one."""
    return "" if group is None else f", group={'default' if group is True else group}"


class WeightCompander(torch.nn.Module):
    r"""A weight as a saturating function of what is trained, for :mod:`torch.nn.utils.parametrize`.

    .. code-block:: text

        w = Psi(v) = a f(v / b),    f: arctan, arsinh or erf

    The parameter that the optimizer sees becomes ``v``; it is found from the weight that was there by the inverse of
    ``Psi``, as is every weight that is assigned later. Formula, gradients and dtypes:
    :func:`pyreg.functional.weight_compander`. For all weights of a model: :func:`pyreg.compand`.

    Args:
        a, b: numbers other than 0, or tensors that hold one value for the whole weight or ``[C]``, one for each slice
            of its dimension 0. Numbers take torch's default dtype, tensors are copied as they are.
        learnable: whether ``a`` and ``b`` are parameters, or buffers.
        kind: ``"arctan"`` (``|w| < |a| pi / 2``), ``"arsinh"`` (any ``w``) or ``"erf"`` (``|w| < |a|``).
        clamp: brings weights beyond that range to its border, where they would be an error.

    Shape:
        ``v`` and ``w``: any; float64, float32, bfloat16 or float16.

    Raises:
        ValueError: an unknown ``kind``; ``a`` or ``b`` zero, infinite or NaN; a weight out of range.
        TypeError: ``a`` or ``b`` neither a number nor a floating tensor.

    Source: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", arXiv
    2306.16993.

    Example:
        >>> layer = torch.nn.Linear(8, 4)
        >>> compander = pyreg.nn.WeightCompander(a=0.5, b=1.0)
        >>> _ = torch.nn.utils.parametrize.register_parametrization(layer, "weight", compander)
        >>> bool((layer.weight.abs() < 0.5 * torch.pi / 2).all())
        True
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        a: Tensor | float = 0.5,
        b: Tensor | float = 1.0,
        learnable: bool = True,
        kind: str = "arctan",
        clamp: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"WeightCompander: expected kind to be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        for name, value in (("a", a), ("b", b)):
            constant = compander_constant("WeightCompander", name, value)
            if learnable:
                self.register_parameter(name, torch.nn.Parameter(constant))
            else:
                self.register_buffer(name, constant)
        self.kind, self.clamp = kind, clamp

    def forward(self, v: Tensor) -> Tensor:
        return functional.weight_compander(v, self.a, self.b, self.kind)

    def right_inverse(self, w: Tensor) -> Tensor:
        """The ``v`` that gives the weight ``w``."""
        return functional.weight_compander_inverse(w, self.a, self.b, self.kind, self.clamp)

    def extra_repr(self) -> str:
        learnable = isinstance(self.a, torch.nn.Parameter)
        return f"kind={self.kind!r}, learnable={learnable}" + (", clamp=True" if self.clamp else "")


def compander_constant(operator: str, name: str, value: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``a`` or ``b`` as a tensor, its values checked; a number in the dtype, torch's default by default."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{operator}: expected {name} to be a number or a tensor, got {type(value).__name__}")
    constant = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=dtype)
    if not constant.is_floating_point():
        raise TypeError(f"{operator}: expected {name} to be floating, got {constant.dtype}; convert it with .float()")
    if constant.dim() > 1 or constant.numel() == 0:
        raise ValueError(
            f"{operator}: expected {name} to hold one value or [C], one for each slice of the weight's dimension 0, "
            f"got shape {list(constant.shape)}"
        )
    if not constant.is_meta and not bool((constant.isfinite() & (constant != 0)).all()):
        wrong = constant[~constant.isfinite() | (constant == 0)][0].item() if constant.dim() else constant.item()
        raise ValueError(
            f"{operator}: expected {name} to be finite and other than 0, got {wrong}; w = a f(v / b) would not depend "
            "on v, or be NaN"
        )
    return constant

"""Operators as modules, named as in :mod:`torch.nn`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyreg import functional

__all__ = ["LinearStableMaxCrossEntropyLoss", "StableMaxCrossEntropyLoss"]


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

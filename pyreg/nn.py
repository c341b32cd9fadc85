"""Operators as modules, named as in :mod:`torch.nn`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyreg import functional

__all__ = ["StableMaxCrossEntropyLoss"]


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

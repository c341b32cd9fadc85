"""StableMax cross-entropy of a linear layer: the composition that the fused operator replaces."""

from __future__ import annotations

import torch
from torch import Tensor

from .stablemax import stablemax_cross_entropy


def linear_stablemax_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``stablemax_cross_entropy(input @ linear_weight.T + linear_bias, target)``; input ``[H]`` or ``[N, H]``."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return stablemax_cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing)

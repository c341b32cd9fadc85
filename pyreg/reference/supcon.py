"""Supervised contrastive loss (Khosla et al., arXiv 2004.11362, its L_out), as pytorch-metric-learning's `SupConLoss`.

    s_ij = z_i . z_j / temperature,   z_i = f_i / max(|f_i|, 1e-12) or f_i
    P_i  = { j != i : y_j = y_i }
    l_i  = log( sum_{j != i} exp(s_ij) ) - 1 / |P_i| sum_{P_i} s_ij,   0 for a row without positives

The mean is over the rows that have a positive, and 0 where none has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supcon_loss(
    features: Tensor, labels: Tensor, temperature: float = 0.1, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """`features [N, ...]`, `labels [N]`; in the dtype of features, bf16 and fp16 compute in fp32."""
    f = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
    z = F.normalize(f, eps=1e-12) if normalize else f
    scores = z @ z.t() / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels.unsqueeze(1) == labels.unsqueeze(0)) & ~itself
    positives = positive.sum(1)
    active = positives > 0

    logits = scores.masked_fill(itself, -torch.inf).masked_fill(~active.unsqueeze(1), 0)
    losses = logits.logsumexp(1) - scores.masked_fill(~positive, 0).sum(1) / positives.clamp(min=1)
    losses = losses.masked_fill(~active, 0)

    loss = losses if reduction == "none" else losses.sum()
    return (loss / active.sum().clamp(min=1) if reduction == "mean" else loss).to(features.dtype)

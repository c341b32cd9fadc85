"""ConR: contrastive regularizer for deep imbalanced regression (Keramati, Meng, Evans, arXiv 2309.06651).

    z_i  = f_i / max(|f_i|, 1e-12)        s_ij = z_i . z_j / temperature
    d_ij = |y_i - y_j|                    e_ij = |yhat_i - yhat_j|
    positives  P_i = { j != i : d_ij <= window }
    negatives  N_i = { j : d_ij > window and e_ij <= window }        push  r_ij = w_i exp(eta d_ij)
    A_i = sum_{P_i} exp(s_ij)             B_i = sum_{N_i} r_ij exp(s_ij)
    l_i = w_i / |P_i| sum_{P_i} ( log(A_i + B_i) - s_ij ),   0 for a row without positives or without negatives

The code released for AgeDB (`"agedb"`) adds `N - |P_i|` to `A_i`, for the entries it masks enter as exp(0). That for
NYUD2 (`"nyud2"`) does so too, has the push `w_i eta d_ij`, divides by `|P_i| + 1` and leaves the outer `w_i` out.

Entries that do not count are filled before the exponential, so that no NaN reaches the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conr_loss(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    window: float = 1.0,
    temperature: float = 0.07,
    eta: float = 0.01,
    weights: Tensor | None = None,
    variant: str = "paper",
    label_norm: float = 2,
    reduction: str = "mean",
) -> Tensor:
    """`features [N, ...]`, `targets` and `preds` `[N]` or `[N, K]`, `weights [N]` or `[N, 1]`; for `"nyud2"` the last
    three are `[N, ...]` and averaged. In the dtype of features; bf16 and fp16 compute in fp32, labels as `label_dtype`
    says."""
    compute, labels_in = torch.promote_types(features.dtype, torch.float32), label_dtype(features, targets, preds)
    targets, preds = (sample_labels(labels.to(labels_in), variant) for labels in (targets, preds))
    count = len(features)
    weight = torch.ones(count, dtype=compute, device=features.device)
    if weights is not None:
        weight = sample_labels(weights.to(compute), variant).squeeze(1)

    z = F.normalize(features.flatten(1).to(compute), eps=1e-12)
    scores = z @ z.t() / temperature
    d, e = distances(targets, label_norm), distances(preds, label_norm)
    itself = torch.eye(count, dtype=torch.bool, device=features.device)
    positive, negative = (d <= window) & ~itself, (d > window) & (e <= window)
    positives = positive.sum(1)
    active = (positives > 0) & negative.any(1)

    push = eta * d if variant != "nyud2" else (eta * d).log()
    logits = scores + torch.where(negative, push.to(compute) + weight.log().unsqueeze(1), 0)
    logits = logits.masked_fill(~(positive | negative), -torch.inf).masked_fill(~active.unsqueeze(1), 0)
    if variant != "paper":
        logits = torch.cat([logits, (count - positives).to(compute).log().unsqueeze(1)], 1)
    terms = positives * logits.logsumexp(1) - scores.masked_fill(~positive, 0).sum(1)
    losses = terms / (positives + 1) if variant == "nyud2" else weight * terms / positives.clamp(min=1)
    losses = losses.masked_fill(~active, 0)

    loss = losses if reduction == "none" else losses.sum()
    return (loss / max(count, 1) if reduction == "mean" else loss).to(features.dtype)


def label_dtype(features: Tensor, targets: Tensor, preds: Tensor) -> torch.dtype:
    """The dtype of differences of labels and of their comparison with the window: float64 where one of the tensors is,
    or labels are integers, which float32 holds to 2^24 only; else float32."""
    exact = any(labels.dtype == torch.float64 or not labels.is_floating_point() for labels in (targets, preds))
    return torch.float64 if exact or features.dtype == torch.float64 else torch.float32


def sample_labels(labels: Tensor, variant: str) -> Tensor:
    """`[N, K]`; the mean over all but the first dimension, `[N, 1]`, for `"nyud2"`."""
    labels = labels.unsqueeze(1) if labels.dim() == 1 else labels.flatten(1)
    return labels.mean(1, keepdim=True) if variant == "nyud2" else labels


def distances(labels: Tensor, norm: float) -> Tensor:
    """`|y_i - y_j|`, `[N, N]`, of labels `[N, K]`."""
    result: Tensor = torch.linalg.vector_norm(labels.unsqueeze(1) - labels.unsqueeze(0), ord=norm, dim=2)
    return result

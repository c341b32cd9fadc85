"""InfoNCE (van den Oord et al., arXiv 1807.03748) with in-batch negatives; the positive of query i is key i.

    s_ij = q_i . k_j / temperature,   rows of q and k divided by max(|.|, 1e-12), or as they are
    l_i  = log( sum_j exp(s_ij - log_q_j) ) - (s_ii - log_q_i)

`log_q [M]` is the logarithm of the keys' sampling probabilities (the logQ correction). `ids [M]`: a key j != i with
`ids[j] == ids[i]` is left out of row i. Symmetric (CLIP): the mean of that and of the loss of key i among the queries,

    log( sum_j exp(s_ji) ) - s_ii,   without log_q.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    log_q: Tensor | None = None,
    ids: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`query [N, ...]`, `key [M, ...]`, `M >= N`; in the dtype of query, bf16 and fp16 compute in fp32."""
    compute = torch.promote_types(query.dtype, torch.float32)
    q, k = query.flatten(1).to(compute), key.flatten(1).to(compute)
    if normalize:
        q, k = F.normalize(q, eps=1e-12), F.normalize(k, eps=1e-12)
    count = len(q)
    scores = q @ k.t() / temperature
    if ids is not None:
        itself = torch.eye(count, len(k), dtype=torch.bool, device=q.device)
        scores = scores.masked_fill((ids[:count].unsqueeze(1) == ids.unsqueeze(0)) & ~itself, -torch.inf)

    logits = scores if log_q is None else scores - log_q.to(compute)
    losses = logits.logsumexp(1) - logits.diagonal()
    if symmetric:
        losses = (losses + scores.logsumexp(0) - scores.diagonal()) / 2

    loss = losses if reduction == "none" else losses.sum()
    return (loss / max(count, 1) if reduction == "mean" else loss).to(query.dtype)
